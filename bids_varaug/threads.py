"""How many threads torch and numba use in this process."""

from __future__ import annotations

from functools import cache

import numba
import torch


def use_threads(n: int) -> None:
    """Let torch and numba's parallel loops use `n` threads each; they never run at once."""
    start_numba_threads()
    numba.set_num_threads(min(n, numba.config.NUMBA_NUM_THREADS))
    torch.set_num_threads(n)


@cache
def start_numba_threads() -> None:
    """Start numba's threads now, and leave torch the number that it has.

    Both stand on OpenMP: as numba starts, at its first parallel loop, it sets the number of
    threads for the whole process, to one for each processor. The bits of a training step depend on
    that number, and a job on a cluster may have fewer.
    """
    before = torch.get_num_threads()
    numba.set_num_threads(numba.get_num_threads())
    torch.set_num_threads(before)
