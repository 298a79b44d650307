"""Where pybids meets the dataset: only the ``anat`` folders of the requested participants.

pybids takes minutes to index a large dataset, so the participants are read from the directory
listing and nothing but the images of their ``anat`` folders is handed to it.
"""

from __future__ import annotations

import difflib
import os
import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bids_varaug.errors import NoInputError, OutputError, UsageError

if TYPE_CHECKING:
    from bids.layout import BIDSLayout

LABEL = re.compile(r"[0-9a-zA-Z+]+")
PARTICIPANT = re.compile(f"sub-{LABEL.pattern}")
_MEANT = re.compile(r"(?i)sub(?:j|ject)?[\W_\d]")  # also Sub-01, sub_01, subject01
DATABASE_FILE = "layout_index.sqlite"

_QUERY_WORD = re.compile(r"<?Query\.(NONE|REQUIRED|ANY|OPTIONAL)(: \d+)?>?")


def normalize_label(label: str, entity: str = "sub") -> str:
    """Strip the ``sub-``/``ses-`` prefix of a label and refuse what no BIDS label can be.

    Raises
    ------
    UsageError
        If the label is empty or holds other characters than letters, digits and ``+``.

    Examples
    --------
    >>> normalize_label("sub-01")
    '01'
    """
    bare = label.removeprefix(f"{entity}-")
    if not LABEL.fullmatch(bare):
        raise UsageError(
            f"{label!r} is not a BIDS label: only letters and digits may follow '{entity}-'. "
            "Give labels, not paths, separated by spaces."
        )
    return bare


def natural_key(text: str) -> list[tuple[int, int | str]]:
    """Key that sorts ``run-2`` before ``run-10``."""
    parts = re.split(r"(\d+)", text)
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in parts if part]


def participant_folders(bids_dir: Path) -> list[str]:
    """Names of folders that are meant for a participant and not in .bidsignore, in natural order.

    Raises
    ------
    NoInputError
        If the directory cannot be listed, or .bidsignore not be read.
    """
    is_ignored = read_bidsignore(bids_dir)
    try:
        with os.scandir(bids_dir) as entries:
            names = [e.name for e in entries if _MEANT.match(e.name) and e.is_dir()]
    except OSError as error:
        raise NoInputError(f"{bids_dir}: cannot list this directory: {error.strerror}.") from error
    return sorted((name for name in names if not is_ignored(f"{name}/")), key=natural_key)


def list_participants(bids_dir: Path) -> list[str]:
    """Labels of the `participant_folders`; one with an impossible name is nobody's."""
    return [name[4:] for name in participant_folders(bids_dir) if PARTICIPANT.fullmatch(name)]


def read_bidsignore(bids_dir: Path) -> Callable[[str], bool]:
    """Function that tells whether .bidsignore matches a path in the dataset (of a folder: ``x/``).

    Raises
    ------
    NoInputError
        If there is a .bidsignore that cannot be read.
    """
    from pathspec import GitIgnoreSpec

    path = bids_dir / ".bidsignore"
    try:
        text = path.read_text("utf-8-sig", "surrogateescape") if os.path.lexists(path) else ""
        spec = GitIgnoreSpec.from_lines(text.lower().splitlines())
    except (OSError, ValueError, re.error) as error:
        raise NoInputError(f"{path}: cannot read it ({error}). Fetch or correct it.") from error

    def is_ignored(relative: str) -> bool:
        # As in the validator, case does not count, and nothing comes back from an ignored folder.
        lower = relative.lower()
        return any(spec.match_file(lower[: end.end()]) for end in re.finditer(".(/|$)", lower))

    return is_ignored


def _ignore_patterns(participants: Iterable[str], existing: Iterable[str]) -> list[re.Pattern]:
    """Patterns that keep pybids to the NIfTI files of the participants' ``anat`` folders."""
    chosen = set(participants)
    # One short pattern where nobody is left out: it is matched against every path.
    any_label = LABEL.pattern if chosen.issuperset(existing) else None
    labels = any_label or "|".join(map(re.escape, sorted(chosen)))
    return [
        re.compile(rf"^/(?!sub-(?:{labels})(?:/|$))"),
        re.compile(r"^/sub-[^/]+/(?!ses-[^/]*(?:/|$)|anat(?:/|$))"),
        re.compile(r"^/sub-[^/]+/ses-[^/]*/(?!anat(?:/|$))"),
        # Sidecars are as many again, and nothing asks for them.
        re.compile(r"/anat/.*(?<!\.nii)(?<!\.nii\.gz)$"),
    ]


def _index(bids_dir: Path, participants: Iterable[str], database: Path | None) -> BIDSLayout:
    """Index with pybids the participants' ``anat`` folders, in memory or in `database`."""
    from bids.layout import BIDSLayout, BIDSLayoutIndexer

    indexer = BIDSLayoutIndexer(
        validate=False,
        index_metadata=False,
        ignore=_ignore_patterns(participants, list_participants(bids_dir)),
    )
    return BIDSLayout(
        bids_dir, validate=False, derivatives=False, config=["bids", "derivatives"],
        indexer=indexer, database_path=database,
    )  # fmt: skip


def open_layouts(
    bids_dir: Path, participants: list[str], database: Path | None
) -> list[BIDSLayout]:
    """The layout, and one more for participants that an existing database does not hold.

    A database is made once and then only read: jobs that share it cannot disturb each other, and
    one made for other participants still gives the right answer.

    Raises
    ------
    UsageError
        If the database is damaged or of another dataset.
    OutputError
        If it cannot be written.
    """
    if database is None:
        return [_index(bids_dir, participants, None)]
    if not (database / DATABASE_FILE).exists():
        _make_database(bids_dir, participants, database)
    from bids.layout import BIDSLayout

    try:
        layout = BIDSLayout(bids_dir, validate=False, database_path=database)
        held = set(layout.get_subjects(scope="self"))
        root = Path(str(layout.root))
    except Exception as error:  # sqlite, sqlalchemy and pybids raise their own kinds here
        raise UsageError(
            f"{database}: pybids cannot read this database ({error}). Delete it to have it rebuilt."
        ) from error
    if root != bids_dir:
        raise UsageError(
            f"{database}: the database is of {root}, not of {bids_dir}. "
            "Give another --bids-database-dir, or delete this one."
        )
    missing = [p for p in participants if p not in held]
    return [layout, _index(bids_dir, missing, None)] if missing else [layout]


def _make_database(bids_dir: Path, participants: list[str], database: Path) -> None:
    """Index into a temporary folder and move it, so that no job ever reads half a database."""
    try:
        database.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=database, prefix=".new-") as fresh:
            _index(bids_dir, participants, Path(fresh)).connection_manager.session.close()
            os.replace(Path(fresh) / DATABASE_FILE, database / DATABASE_FILE)
    except OSError as error:
        raise OutputError(
            f"{database}: cannot write the pybids database: {error.strerror}. "
            "Give a writable --bids-database-dir, or leave it out."
        ) from error


def filter_value(name: str, value: Any, known: list[str]) -> Any:
    """A value of the JSON filter file as pybids wants it.

    As in nipreps, null and ``"Query.NONE"`` mean "has no such entity", ``"*"`` "has one".

    Raises
    ------
    UsageError
        If `name` is not one of the entities `known` to pybids, or the value is of another type.
    """
    from bids.layout import Query

    if name not in known:
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.3)
        # "acq" and "run" style short names are closer to a prefix than to the whole word.
        close = [word for word in known if word.startswith(name)] or close
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise UsageError(f"--bids-filter-file: t1w: {name!r} is not a pybids entity.{hint}")
    if isinstance(value, list):
        return [filter_value(name, item, known) for item in value]
    if value in (None, "*"):
        return Query.NONE if value is None else Query.REQUIRED
    if isinstance(value, str):
        if word := _QUERY_WORD.fullmatch(value):
            return Query["REQUIRED" if word[1] == "ANY" else word[1]]
        if name in ("subject", "session"):
            return value.removeprefix({"subject": "sub-", "session": "ses-"}[name])
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise UsageError(
        f"--bids-filter-file: t1w: {name}: {value!r} is neither text, a whole number, null, "
        "nor a list of these."
    )
