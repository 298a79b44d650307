"""One at a time, where several processes train members of one ensemble."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def take_turns(path: Path) -> Iterator[None]:
    """Wait until no other process, on this node or another, is in a block of the same `path`.

    The system lets the next one in where a process was killed. The file stays, empty: to remove
    it would let two processes hold two files of one name. Where the file system has no locks,
    nobody waits.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        with suppress(OSError):
            fcntl.lockf(file, fcntl.LOCK_EX)  # not flock: some NFS mounts keep that to one node
        yield
