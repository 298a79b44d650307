"""Several processes for one ensemble."""

import subprocess
import sys
import threading
import time

import pytest

from bids_varaug.errors import UserError
from bids_varaug.files import file_lock
from bids_varaug.training.train import train_in_parallel

MODULE = """
import sys, time
from pathlib import Path
member, device, folder = sys.argv[1:]
(Path(folder) / f"{member}.{device}").touch()
print("training", member)
time.sleep(0.2)
sys.exit(3 if member == "bad" else 0)
"""


@pytest.fixture
def command_of(tmp_path, monkeypatch):
    (tmp_path / "pretend_to_train.py").write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return lambda member, device: ["pretend_to_train", member, device, str(tmp_path)]


def test_members_are_spread_over_the_devices(command_of, tmp_path):
    train_in_parallel(command_of, ["a", "b", "c", "d"], ["x", "y"], tmp_path / "logs")
    ran = [path.name for path in tmp_path.glob("?.?")]
    assert sorted(name[0] for name in ran) == ["a", "b", "c", "d"]
    assert {name[2] for name in ran} == {"x", "y"}
    assert (tmp_path / "logs" / "c.txt").read_text() == "training c\n"


def test_a_failed_member_is_named_when_the_others_are_done(command_of, tmp_path, capsys):
    with pytest.raises(UserError, match=r"failed for bad; see .*bad.txt"):
        train_in_parallel(command_of, ["bad", "b", "c"], ["x"], tmp_path / "logs")
    assert len(list(tmp_path.glob("*.x"))) == 3
    assert "bad: failed (exit code 3)" in capsys.readouterr().err


def test_file_lock_holds_between_processes_and_is_freed_by_a_kill(tmp_path):
    held = tmp_path / "held"
    script = (
        "import sys, time\nfrom pathlib import Path\n"
        "from bids_varaug.files import file_lock\n"
        f"with file_lock(Path({str(tmp_path / 'lock')!r})):\n"
        f"    Path({str(held)!r}).touch()\n    time.sleep(60)\n"
    )
    other = subprocess.Popen([sys.executable, "-c", script])
    got = threading.Event()

    def wait_for_it():
        with file_lock(tmp_path / "lock"):
            got.set()

    try:
        while not held.exists():
            time.sleep(0.05)
        waiting = threading.Thread(target=wait_for_it)
        waiting.start()
        assert not got.wait(0.5)
        other.kill()
        assert got.wait(10)
        waiting.join()
    finally:
        other.kill()
        other.wait()
