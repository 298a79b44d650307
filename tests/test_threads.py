"""The number of threads is what was asked for, whichever library starts first."""

import subprocess
import sys

import pytest

SCRIPT = """
import numba, torch
from bids_varaug.numerics import MonteCarloArithmetic
from bids_varaug.machine import use_threads
{before}
with MonteCarloArithmetic(seed=1):
    torch.rand(100_000).sqrt()
print(torch.get_num_threads(), numba.get_num_threads())
"""


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        ("use_threads(1)", "1 1"),
        ("use_threads(3); use_threads(1)", "1 1"),
        ("torch.set_num_threads(1)", "1 4"),  # a user's own choice stays
    ],
)
def test_numba_does_not_change_the_number_of_torchs_threads(before, expected):
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(before=before)], capture_output=True, text=True,
        env={"PATH": "", "NUMBA_NUM_THREADS": "4"}, check=True,
    )  # fmt: skip
    assert found.stdout.strip() == expected
