"""File locks between processes, on one node or on several.

The system frees what a killed process held. Where the file system has no locks, nobody waits and nothing is held back.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TextIO

from bids_varaug.errors import OutputError


@contextmanager
def file_lock(path: Path, wait: bool = True) -> Iterator[bool]:
    """Keep other processes out of blocks of the same `path`; gives whether this one is in.

    Without `wait` for the process that has it to leave its block, that is False at once. The file is there for the time
    of the block; raises `OutputError` if there can be no such file.
    """
    try:
        file = _lock(path, wait)
    except OSError as error:
        raise OutputError(f"{path}: cannot be created ({error.strerror}).") from error
    try:
        yield file is not None
    finally:
        if file is not None:
            path.unlink(missing_ok=True)  # while it is locked
            file.close()


def _lock(path: Path, wait: bool) -> TextIO | None:
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = path.open("a")
        try:
            # Not flock: some NFS mounts keep that to one node.
            fcntl.lockf(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return file  # no locks here
            file.close()
            return None
        with suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(file.fileno())):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}")
                file.flush()
                return file
        file.close()  # who held it removed it after it was opened here


@contextmanager
def hold_participants(subjects: Iterable[str], folders: Sequence[Path]) -> Iterator[set[str]]:
    """Keep participants to this process until the block ends; gives those that it got.

    A participant that another process holds in any of the `folders` is left to it, with a message.
    """
    with ExitStack() as held:
        got = set(subjects)
        for subject in sorted(got):
            for path in (folder / f".sub-{subject}.lock" for folder in folders):
                if subject in got and not held.enter_context(file_lock(path, wait=False)):
                    got.remove(subject)
                    work = f"another run works on it ({_holder(path)}; {path}). It is left to that run."
                    print(f"ERROR: sub-{subject}: {work}", file=sys.stderr)
        yield got


def _holder(path: Path) -> str:
    with suppress(OSError):
        return path.read_text() or "just started"
    return "just ended"
