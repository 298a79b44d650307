"""Atomic, reproducible writing of files.

Every file is written under a temporary name in its own folder and then renamed: a reader never sees half a file, a run
killed at any moment leaves the old one whole, and an annexed output (a link to read-only content) is replaced as a
link, its content untouched. The same data gives the same bytes. What cannot be written raises as `replacing` does.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

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
        _remove_stale(path)
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


def _remove_stale(path: Path) -> None:
    """Remove what a killed run left of the same output (a live one was modified just now)."""
    for old in path.parent.glob(f".{path.name}.????????.part"):
        with suppress(FileNotFoundError):  # another job was faster
            if time.time() - old.stat().st_mtime > STALE_SECONDS:
                old.unlink()


def write_text(text: str, path: Path) -> Path:
    """Write UTF-8 text with LF line ends; returns `path`."""
    with replacing(path) as stream:
        # A folder's name may hold bytes that are no UTF-8; they must not cost the output.
        stream.write(text.encode("utf-8", errors="backslashreplace"))
    return Path(path)


def write_json(content: Mapping[str, Any], path: Path) -> Path:
    """Write a JSON object, keys in the order given; returns `path`. NaN and infinity are a ValueError."""
    return write_text(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n", path)
