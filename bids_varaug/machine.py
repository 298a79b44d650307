"""The machine's resources: processors, threads, devices, memory, compiled code and its caches.

torch and numba are imported where they are needed: the command line must not wait for them.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import resource
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

from bids_varaug.errors import UsageError

DRIVER = "libcuda.so.1"  # shared library that comes with NVIDIA's driver, not with torch, which opens it by this name
AMD_DEVICE = "/dev/kfd"

# Environment variable -> folder of a cache; deno runs the validator.
CACHES = {"NUMBA_CACHE_DIR": "numba", "MPLCONFIGDIR": "matplotlib", "DENO_DIR": "deno"}

# What each worker process imports, with torch; a name that does not exist would be passed over.
WORKER_MODULES = (
    "bids_varaug.segmentation.predict",
    "bids_varaug.workflows.plugins",
    "bids_varaug.workflows.interfaces",
)

GIB = 2**30
_NO_LIMIT = 2**60  # version 1 of cgroups says "none" with a number of about 2^63
MAX_DEFAULT_THREADS = 8  # a 3D convolution gains little from more


def available_processors() -> int:
    """Processors that this process may use (fewer than the machine has, under Slurm or docker)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_threads(n: int) -> None:
    """Let torch and numba's parallel loops use `n` threads each; they never run at once."""
    import numba
    import torch

    start_numba_threads()
    numba.set_num_threads(min(n, numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]  # set at run time
    torch.set_num_threads(n)


@cache
def start_numba_threads() -> None:
    """Start numba's threads now, and leave torch the number that it has.

    Both use OpenMP: as numba starts, at its first parallel loop, it sets the number of threads for the whole process,
    to one for each processor. The bits of a training step depend on that number, and a job on a cluster may have fewer.
    """
    import numba
    import torch

    before = torch.get_num_threads()
    numba.set_num_threads(numba.get_num_threads())
    torch.set_num_threads(before)


def compiled(**options: Any) -> Callable[..., Any]:
    """Like ``numba.njit(cache=True, **options)``, but works where no cache can be written.

    In a read-only container without a home directory numba raises while it looks for a place for its cache; the kernel
    is then compiled again in each process (seconds, same result).
    """
    import numba

    def decorate(function: Any) -> Callable[..., Any]:
        if options.get("parallel"):
            # numba's cache knows functions by name: a serial twin would be taken for this one, or this for it
            code, name = function.__code__, f"{function.__name__}_parallel"
            copy = FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)
            copy.__qualname__, copy.__doc__ = name, function.__doc__
            function = copy
        try:
            return numba.njit(cache=True, **options)(function)
        except RuntimeError:  # "cannot cache function: no locator available"
            return numba.njit(**options)(function)

    return decorate


def caches_below(work_dir: Path) -> Path:
    """Folder of what may be removed at any time, and is shared by the runs with this ``-w``."""
    return work_dir / "caches"


def keep_caches_below(work_dir: Path) -> None:
    """Have this process keep caches in the work directory: the home or the package may be read-only or another user's.

    Variables that the user has set stay. Call it before numba and matplotlib are imported: they look at them once.
    """
    folders = {variable: caches_below(work_dir) / name for variable, name in CACHES.items()}
    folders["NUMBA_CACHE_DIR"] /= name_kernels(Path(__file__).parent)
    for variable, folder in folders.items():
        os.environ.setdefault(variable, str(folder))


def name_kernels(package: Path) -> str:
    """Name a package's compiled kernels by the text of the modules that hold them.

    numba itself compiles a kernel again when its own module has changed, not when another one that it calls has.
    """
    texts = (path.read_bytes() for path in sorted(package.rglob("*.py")))
    return hashlib.sha256(b"".join(text for text in texts if b"@compiled(" in text)).hexdigest()[:12]


def resolve_device(wanted: str) -> str:
    """Return "cpu" or "cuda:N" for auto, cpu, cuda or cuda:N; `UsageError` if this machine or torch has no such GPU."""
    # torch takes seconds to import, and the main process needs it for nothing else.
    if wanted == "cpu" or (wanted == "auto" and not _has_driver()):
        return "cpu"
    if not re.fullmatch(r"auto|cuda(:\d+)?", wanted):
        raise UsageError(f"--device {wanted}: use auto, cpu, cuda or cuda:N.")
    import torch

    if wanted == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    number = int(wanted.partition(":")[2] or 0)
    if not torch.cuda.is_available() or number >= torch.cuda.device_count():
        raise UsageError(
            f"--device {wanted}: torch {torch.__version__} sees {torch.cuda.device_count()} GPU(s) here. Use --device "
            "cpu, or install a CUDA build of torch and check nvidia-smi."
        )
    return f"cuda:{number}"


def _has_driver() -> bool:
    """Whether a GPU's driver is there, without which torch can use none."""
    with suppress(OSError):
        return bool(ctypes.CDLL(DRIVER))
    return Path(AMD_DEVICE).exists()  # torch for ROCm calls its devices "cuda" too


class MemoryBound(NamedTuple):
    """GiB that this process and its children may use, how much of it is free, and who says so."""

    total: float
    free: float
    source: str


def memory_bound(root: Path = Path("/")) -> MemoryBound:
    """The tightest of the machine's memory, the limits of its control groups (the kernel kills), and ``ulimit -v``.

    `root` is where ``proc`` and ``sys`` are.
    """
    return min(_bounds(root), key=lambda bound: bound.total)


def _bounds(root: Path) -> Iterator[MemoryBound]:
    machine = free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
    with suppress(OSError, KeyError, ValueError):  # not Linux
        kib = _read_numbers(root / "proc/meminfo")
        machine, free = kib["MemTotal:"] / 2**20, kib["MemAvailable:"] / 2**20
    yield MemoryBound(machine, free, "the machine's memory")
    for folder in _control_groups(root):
        # Version 2, then version 1. What the cache of files uses is given back when it is needed.
        for limit, usage, cached in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            with suppress(OSError, ValueError):  # no such file; "max": no limit
                total, used = (int((folder / name).read_text()) for name in (limit, usage))
                used -= _read_numbers(folder / "memory.stat").get(cached, 0)
                if total < _NO_LIMIT:
                    left = max(0, total - used) / GIB
                    yield MemoryBound(total / GIB, min(left, free), f"limit in {folder / limit}")
    soft = resource.getrlimit(resource.RLIMIT_AS)[0]
    if soft != resource.RLIM_INFINITY:
        yield MemoryBound(soft / GIB, min(soft / GIB, free), "ulimit -v")


def _read_numbers(path: Path) -> dict[str, int]:
    """First words of the lines of a file, each with the number after it."""
    lines = (line.split() for line in path.read_text().splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1}


def _control_groups(root: Path) -> Iterator[Path]:
    """Folders of this process's memory control groups and those above them."""
    groups = root / "proc/self/cgroup"
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            top = root / "sys/fs/cgroup" / controllers
            # In a container the path may be the host's, of which only the top is seen.
            folder = top / path.lstrip("/")
            yield from (each for each in (folder, *folder.parents) if each.is_relative_to(top))


# <malloc.h>
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_release: threading.Timer | None = None


def keep_freed_memory() -> bool:
    """Make glibc reuse freed blocks instead of returning them to the kernel; False where the C library is another one.

    malloc would map and unmap each activation (50-500 MB) of a 3D network; the page faults took up to three quarters of
    a forward pass. Peak memory hardly changes.
    """
    if _release is not None:
        _release.cancel()
    options = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_ARENA_MAX, 1))
    libc = _glibc()
    return libc is not None and all(libc.mallopt(option, value) for option, value in options)


def release_freed_memory(seconds: float = 1.0) -> None:
    """Give freed blocks back to the kernel, unless `keep_freed_memory` is called before, as the next member does."""
    global _release
    if (libc := _glibc()) is not None:
        _release = threading.Timer(seconds, libc.malloc_trim, [0])
        _release.daemon = True
        _release.start()


def _glibc() -> ctypes.CDLL | None:
    with suppress(OSError):
        libc = ctypes.CDLL("libc.so.6") if sys.platform.startswith("linux") else None
        return libc if hasattr(libc, "mallopt") else None
    return None
