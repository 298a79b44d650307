"""Numba kernels, compiled once per machine where the compiled code can be kept."""

from __future__ import annotations

from collections.abc import Callable

import numba


def compiled(**options) -> Callable:
    """Like ``numba.njit(cache=True, **options)``, but works where no cache can be written.

    In a read-only container without a home directory numba raises while it looks for a place for
    its cache; the kernel is then compiled anew in each process (seconds, same result).

    Examples
    --------
    >>> @compiled()
    ... def twice(x):
    ...     return 2 * x
    >>> twice(4)
    8
    """

    def decorate(function: Callable) -> Callable:
        try:
            return numba.njit(cache=True, **options)(function)
        except RuntimeError:  # "cannot cache function: no locator available"
            return numba.njit(**options)(function)

    return decorate
