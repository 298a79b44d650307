"""Let the C library keep freed memory, so that large tensors are not zeroed anew by the kernel."""

from __future__ import annotations

import ctypes
import sys

# <malloc.h>
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Make glibc reuse freed blocks instead of returning them to the kernel.

    Each activation of a 3D network is a block of 50-500 MB, which malloc would map and unmap at
    every layer; the page faults took up to three quarters of a forward pass. Peak memory hardly
    changes. Does nothing (and returns False) where the C library is not glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return all(
        mallopt(option, value)
        for option, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_ARENA_MAX, 1))
    )


def release_freed_memory() -> bool:
    """Give freed blocks back to the kernel: a process that waits for work should not hold them.

    Does nothing (and returns False) where the C library is not glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        return bool(ctypes.CDLL("libc.so.6").malloc_trim(0))
    except (OSError, AttributeError):
        return False
