"""Sparse clones: files of which git-annex has left only the name."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path

MANY = 20  # more names than this are not printed one by one


def is_absent(path: Path) -> bool:
    """Whether git-annex (or a cleanup) left a name without content.

    Raises
    ------
    OSError
        If the file is there and cannot be read.
    """
    if not path.exists():
        return True
    # Unlocked annexed files hold a one-line pointer instead of being a dangling link.
    with path.open("rb") as stream:
        return stream.read(15) == b"/annex/objects/"


def datalad_command(bids_dir: Path, relatives: Iterable[str], whole_dataset: bool = False) -> str:
    """Shell command that fetches the content of annexed files.

    Parameters
    ----------
    bids_dir : Path
    relatives : iterable of str
        Paths relative to `bids_dir`.
    whole_dataset : bool
        Whether the files are T1w images of all participants: many are then written as patterns.
    """
    relatives = list(relatives)
    targets = " ".join(shlex.quote(relative) for relative in relatives)
    if whole_dataset and len(relatives) > MANY:
        patterns = {"*/" * relative.count("/") + "*_T1w.nii*" for relative in relatives}
        targets = " ".join(sorted(f"sub-{pattern}" for pattern in patterns))
    return f"cd {shlex.quote(str(bids_dir))} && datalad get {targets}"
