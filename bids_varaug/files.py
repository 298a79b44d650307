"""Files that several processes may write or read at once: atomic writing, and file locks.

Every file is written under a temporary name in its own folder and then renamed: a reader never sees half a file, a run
killed at any moment leaves the old one whole, and an annexed output (a link to read-only content) is replaced as a
link, its content untouched. The same data gives the same bytes. What cannot be written raises as `replacing` does.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import socket
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from bids_varaug.errors import DiskError, OutputError

STALE_SECONDS = 600
NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Binary stream whose content becomes `path` when the block ends without an error; makes missing folders.

    On an error the temporary file is removed and `path` is as before. Raises `OutputError` (exit code 73) if the file
    cannot be created, and `DiskError` (exit code 74) if the disk is full or fails.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for old in path.parent.glob(f".{path.name}.????????.part"):  # that a killed run of the same output left
            with suppress(FileNotFoundError):  # another job was faster
                if time.time() - old.stat().st_mtime > STALE_SECONDS:  # a live one was modified just now
                    old.unlink()
        # Not tempfile: its files are readable by their owner only, whatever the umask says.
        with temporary.open("xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)  # replaces a link or read-only file as such, and leaves no moment without an output
    except BaseException as error:
        with suppress(OSError):  # the folder itself is gone or read-only; the first error is the one to tell
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise _explain(path, error) from error
        raise


def _explain(path: Path, error: OSError) -> OutputError:
    reason = error.strerror or str(error)
    if error.errno in NO_SPACE:
        return DiskError(
            f"{path}: could not be written, the disk is full ({reason}). No partial file is left. Free some space and "
            "start again: what was finished before is kept."
        )
    if error.errno == errno.EIO:
        return DiskError(f"{path}: could not be written, the disk fails ({reason}).")
    return OutputError(f"{path}: cannot be created ({reason}). Check the permissions of {path.parent}.")


def write_text(text: str, path: Path) -> Path:
    """Write UTF-8 text with LF line ends; returns `path`."""
    with replacing(path) as stream:
        # A folder's name may hold bytes that are no UTF-8; they must not cost the output.
        stream.write(text.encode("utf-8", errors="backslashreplace"))
    return Path(path)


def write_json(content: Mapping[str, Any], path: Path) -> Path:
    """Write a JSON object, keys in the order given; returns `path`. NaN and infinity are a ValueError."""
    return write_text(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n", path)


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
