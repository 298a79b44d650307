"""One run at a time for each participant, however often it was started."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TextIO

from bids_varaug.errors import OutputError


@contextmanager
def hold_participants(subjects: Iterable[str], folders: Sequence[Path]) -> Iterator[set[str]]:
    """Keep participants to this process until the block ends; gives those that it got.

    One that another process holds in any of the `folders` is left to it, and told. The system
    frees what a killed process held, also on another node. Where the file system has no locks,
    nothing is held back.

    Raises
    ------
    OutputError
        If there can be no file in one of the folders.
    """
    with ExitStack() as held:
        got = set()
        for subject in sorted(subjects):
            for path in (folder / f".sub-{subject}.lock" for folder in folders):
                file = _lock(path)
                if file is None:
                    print(
                        f"ERROR: sub-{subject}: another run works on it ({_holder(path)}; {path}). "
                        "It is left to that run.",
                        file=sys.stderr,
                    )
                    break
                held.callback(_release, path, file)
            else:
                got.add(subject)
        yield got


def _lock(path: Path) -> TextIO | None:
    """Make and lock a file, without waiting; None where another process has it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            file = path.open("a")
            try:
                # Not flock: some NFS mounts keep that to one node.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    return file  # no locks here
                file.close()
                return None
            if _is_still(path, file):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}")
                file.flush()
                return file
            file.close()  # who held it removed it after it was opened here
    except OSError as error:
        raise OutputError(f"{path}: cannot be created ({error.strerror}).") from error


def _release(path: Path, file: TextIO) -> None:
    path.unlink(missing_ok=True)  # while it is locked
    file.close()


def _is_still(path: Path, file: TextIO) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _holder(path: Path) -> str:
    try:
        return path.read_text() or "just started"
    except OSError:
        return "just ended"
