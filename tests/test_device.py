"""Which device runs the networks; no GPU is needed."""

import pytest
import torch

from bids_varaug import machine
from bids_varaug.errors import UsageError
from bids_varaug.machine import resolve_device

A_LIBRARY = "libc.so.6"


@pytest.fixture
def gpus(monkeypatch):
    """Let torch see some GPUs, with a driver or without."""

    def pretend(n: int, driver: str = A_LIBRARY) -> None:
        monkeypatch.setattr(machine, "DRIVER", driver)
        monkeypatch.setattr(machine, "AMD_DEVICE", "/there/is/none")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: n > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: n)

    return pretend


@pytest.mark.parametrize(
    ("n", "wanted", "device"),
    [(0, "auto", "cpu"), (2, "auto", "cuda:0"), (2, "cpu", "cpu"), (2, "cuda", "cuda:0"),
     (2, "cuda:1", "cuda:1")],
)  # fmt: skip
def test_device_is_the_one_that_is_there(gpus, n, wanted, device):
    gpus(n)
    assert resolve_device(wanted) == device


def test_without_a_driver_torch_is_not_asked(gpus, monkeypatch):
    gpus(1, driver="libno-such-driver.so.1")
    assert resolve_device("auto") == "cpu"
    assert resolve_device("cuda") == "cuda:0"  # asked for by name: torch has the last word
    monkeypatch.setattr(machine, "AMD_DEVICE", "/dev/null")
    assert resolve_device("auto") == "cuda:0"


@pytest.mark.parametrize(("n", "wanted"), [(0, "cuda"), (2, "cuda:2"), (2, "gpu"), (2, "cuda:x")])
def test_device_that_is_not_there_is_refused_by_name(gpus, n, wanted):
    gpus(n)
    with pytest.raises(UsageError, match=f"--device {wanted}: "):
        resolve_device(wanted)
