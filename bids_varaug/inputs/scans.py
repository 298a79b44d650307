"""T1w images of the requested participants and sessions of a BIDS dataset.

pybids takes minutes to index a large dataset, so the participants are read from the directory listing and nothing but
the images of their ``anat`` folders is handed to it.
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from bids_varaug.errors import FiltersError, NoInputError, OutputError, UsageError
from bids_varaug.inputs.tables import some
from bids_varaug.settings import Settings

if TYPE_CHECKING:
    from bids.layout import BIDSLayout

PARTS_WITHOUT_CONTRAST = {"phase", "real", "imag"}
# Where a head keeps its size; any other space is taken for that of a template.
OWN_SPACES = set("individual subject native orig scanner scanras anat acpc fsnative t1w t2w pdw "
                 "flair bold boldref func epi dwi asl pet".split())  # fmt: skip
DATABASE_FILE = "layout_index.sqlite"
MANY = 20  # more names than this are not printed one by one

_RENAME = "Rename them, or list them in .bidsignore."
BAD_FOLDER = f"not processed. Folders of participants are named sub-<label>, a label of letters and digits. {_RENAME}"
BAD_FILE = f"not processed. File names consist of BIDS entities, with the labels of their folders. {_RENAME}"
IGNORED = "left out by .bidsignore."
TEMPLATE = "left out: volumes in a template space are not the person's. Name the person's own space space-individual."
PART = "left out: part of a head. To process it, filter on chunk or hemi (--bids-filter-file)."
DERIVED = "left out beside its raw image. To use it, filter on desc or space (--bids-filter-file)."
PHASE = "left out: the phase, real or imaginary part of an image has no T1w contrast."
_ERRORS = (BAD_FOLDER, BAD_FILE)
_NOTES = (IGNORED, TEMPLATE, PART, DERIVED)  # not PHASE: beside magnitude images, and nobody expects it to be processed
_EXPECTED = "sub-{0}/[ses-<label>/]anat/*_T1w.nii[.gz]."

_PARTICIPANT = re.compile("sub-[0-9a-zA-Z+]+")
_PARTICIPANT_LIKE = re.compile(r"(?i)sub(?:j|ject)?[\W_\d]")  # also Sub-01, sub_01, subject01
# From the participant's folder down to a NIfTI file of an anat folder.
_ANAT_PATH = re.compile(r"/sub-([^/]+)(?:/ses-[^/]*)?(?:/anat(?:/[^/]+\.nii(?:\.gz)?)?)?")
_T1W_PATH = re.compile(  # no entity twice; sub- and ses- as in the folders
    r"(?!.*(_[a-z]+-).*\1)(sub-L)/(?:(ses-L)/)?anat/\2(?(3)_\3)"
    r"(?:_(?!sub-|ses-)[a-z]+-L)*_T1w\.nii(?:\.gz)?".replace("L", "[0-9a-zA-Z+]+")
)
_SUFFIX = re.compile(r"(_T1w)?(?i:\.nii(\.gz)?)$")
_DERIVATIVE_ENTITY = re.compile("_(?:space|desc)-[^_]+")
# Entities that no T1w image has, or that each output sets itself.
_DROPPED_ENTITY = re.compile(r"_(?!(?:ses|task|acq|ce|rec|run|echo|part|space|chunk)-)[a-z]+-[^_]+")
_QUERY_NAME = re.compile(r"<?Query\.(NONE|REQUIRED|ANY|OPTIONAL)(: \d+)?>?")


@dataclass(frozen=True)
class Scan:
    """One T1w image.

    `entities` are those of pybids, without suffix, extension and datatype, digits padded as in the file name, e.g.
    ``{"subject": "01", "session": "a", "run": "01"}``.
    """

    path: Path  # absolute
    entities: Mapping[str, str]
    relative: str  # POSIX path relative to the BIDS directory

    @property
    def prefix(self) -> str:
        """File name without suffix, extension and derivatives' entities; every output starts so.

        >>> Scan(Path("/x/sub-01_run-02_desc-preproc_T1w.nii"), {"subject": "01"}, "").prefix
        'sub-01_run-02'
        """
        return _DROPPED_ENTITY.sub("", _SUFFIX.sub("", self.path.name))

    @property
    def subject(self) -> str:
        """Participant label without ``sub-``."""
        return self.entities["subject"]

    @property
    def session(self) -> str | None:
        """Session label without ``ses-``, None where the dataset has no sessions."""
        return self.entities.get("session")


@dataclass(frozen=True)
class Selection:
    """What the request found; one message for each reason."""

    scans: tuple[Scan, ...]  # images whose content is there, in natural order of their paths
    errors: tuple[str, ...] = ()  # what cannot be processed; any means exit code 1
    notes: tuple[str, ...] = ()  # what is left out on purpose


def find_scans(settings: Settings) -> Selection:
    """T1w images of the requested participants and sessions that pass the BIDS filters.

    T1w images below ``derivatives/`` and ``sourcedata/`` do not count, nor those that `_sort_out` leaves out. Raises
    `UsageError` for a filter that cannot be and a database of another dataset; `FiltersError` for labels that do not
    exist and filters that leave nothing; `NoInputError` where no image is there, or none whose content is present, or a
    folder or .bidsignore cannot be read.
    """
    bids_dir, named = settings.bids_dir, bool(settings.participant_labels)
    filters, sessions = dict(settings.bids_filters.get("t1w", {})), set(settings.session_labels)
    participants = select_participants(settings)
    misnamed = {} if named else dict.fromkeys(_list_participants(bids_dir)[1], BAD_FOLDER)
    database = settings.bids_database_dir
    if settings.dry_run and database is not None and not database.exists():  # it would be made
        database = None
    layouts = _open_layouts(bids_dir, participants, database)
    found = _query(layouts, bids_dir, participants, {})
    usable, unusable = _sort_out(bids_dir, found, filters)
    if not usable:
        who = f"participant {some(participants, shown=MANY)}" if named else "any participant"
        why = _explain(misnamed | unusable) or [f"Expected {_EXPECTED.format('<label>')}"]
        raise NoInputError("\n".join([f"{bids_dir}: no T1w image of {who} can be used.", *why]))
    existing = {scan.session for scan in usable if scan.session is not None}
    _check_labels("--session-label: no T1w image in session {} of the requested participants", sessions, existing)
    wanted = _query(layouts, bids_dir, participants, filters) if filters else found
    wanted, left_out = _sort_out(bids_dir, (s for s in wanted if not sessions or s.session in sessions), filters)
    flags = ["--session-label"] * bool(sessions) + ["--bids-filter-file"] * bool(filters)
    unmet = f"passes {' and '.join(flags)}."
    if not wanted:
        none = f"{bids_dir}: none of the {len(usable)} T1w image(s) {unmet} Loosen the selection."
        raise FiltersError("\n".join([none, *_explain(misnamed | left_out)]))
    scans, errors = _split_available(bids_dir, wanted, not named)
    if not scans:
        raise NoInputError("\n".join([f"{bids_dir}: no T1w image can be read.", *errors]))
    errors += _explain(misnamed | left_out, _ERRORS)
    cause = {path.partition("/")[0]: reason for path, reason in unusable.items()}
    cause |= {f"sub-{scan.subject}": f"no usable T1w image {unmet}" for scan in usable}
    present = {f"sub-{scan.subject}" for scan in wanted}
    if not named:  # only somebody who was named must not vanish silently because of a filter
        present |= {f"sub-{scan.subject}" for scan in usable}
        present |= {path.partition("/")[0] for path, reason in unusable.items() if reason == IGNORED}
    for label in participants:
        if (folder := f"sub-{label}") not in present:
            errors.append(f"{folder}: {cause.get(folder, f'no {_EXPECTED.format(label)}')}")
    return Selection(tuple(scans), tuple(errors), tuple(_explain(left_out, _NOTES)))


def select_participants(settings: Settings) -> list[str]:
    """Participants of the dataset that are asked for and not excluded; raises as `find_scans`."""
    bids_dir, wanted = settings.bids_dir, set(settings.participant_labels)
    existing, misnamed, ignored = _list_participants(bids_dir)
    if not existing:
        none = f"{bids_dir}: no sub-<label> folder. Give the root of a BIDS dataset."
        raise NoInputError("\n".join([none, *_explain(dict.fromkeys(misnamed, BAD_FOLDER))]))
    if named := sorted(wanted.intersection(ignored)):
        raise FiltersError(f"--participant-label: {', '.join(named)}: {IGNORED}")
    excluded = set(settings.exclude_participant_labels)
    _check_labels("--participant-label: not in the dataset: {}", wanted, existing)
    _check_labels("--exclude-participant-label: not in the dataset: {}", excluded, [*existing, *ignored])
    chosen = [label for label in existing if (not wanted or label in wanted) and label not in excluded]
    if not chosen:
        raise FiltersError(f"{bids_dir}: --exclude-participant-label leaves no participant.")
    return chosen


def _list_participants(bids_dir: Path) -> tuple[list[str], list[str], set[str]]:
    """Labels of participants and misnamed folders, in natural order; labels of those in .bidsignore."""
    is_ignored = _read_bidsignore(bids_dir)
    try:
        with os.scandir(bids_dir) as entries:
            names = sorted((e.name for e in entries if _PARTICIPANT_LIKE.match(e.name) and e.is_dir()), key=natural_key)
    except OSError as error:
        raise NoInputError(f"{bids_dir}: cannot list this directory: {error.strerror}.") from error
    good = [name for name in names if _PARTICIPANT.fullmatch(name)]
    ignored = {name for name in names if is_ignored(f"{name}/")}
    misnamed = [name for name in names if not _PARTICIPANT.fullmatch(name) and name not in ignored]
    return [name[4:] for name in good if name not in ignored], misnamed, {name[4:] for name in ignored}


def _read_bidsignore(bids_dir: Path) -> Callable[[str], bool]:
    """Function that tells whether .bidsignore matches a path in the dataset (of a folder: ``x/``)."""
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


def natural_key(text: str) -> list[tuple[int, int | str]]:
    """Key that sorts ``run-2`` before ``run-10``."""
    parts = re.split(r"(\d+)", text)
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in parts if part]


def is_absent(path: Path) -> bool:
    """Whether git-annex (or a cleanup) left a name without content; OSError if the file is there and unreadable."""
    if not path.exists():
        return True
    # Unlocked annexed files hold a one-line pointer instead of being a dangling link.
    with path.open("rb") as stream:
        return stream.read(15) == b"/annex/objects/"


def datalad_command(bids_dir: Path, relatives: Collection[str], whole_dataset: bool = False) -> str:
    """Shell command that fetches the content of annexed files; many of the whole dataset are written as patterns."""
    targets = " ".join(map(shlex.quote, relatives))
    if whole_dataset and len(relatives) > MANY:
        targets = " ".join(sorted({f"sub-{'*/' * relative.count('/')}*_T1w.nii*" for relative in relatives}))
    return f"cd {shlex.quote(str(bids_dir))} && datalad get {targets}"


def _check_labels(problem: str, labels: set[str], existing: Collection[str]) -> None:
    """Refuse labels that do not exist; `problem` has a place for them."""
    if missing := sorted(labels.difference(existing), key=natural_key):
        there = some(sorted(existing, key=natural_key), shown=MANY) or "none (the dataset has no sessions)"
        raise FiltersError(f"{problem.format(', '.join(missing))}. There are: {there}.")


def _sort_out(bids_dir: Path, scans: Iterable[Scan], filters: Collection[str]) -> tuple[list[Scan], dict[str, str]]:
    """Images to process, and why the others are not, by path.

    An image is left out for the first reason that its name tells, unless `filters` ask for it.
    """
    is_ignored = _read_bidsignore(bids_dir)
    chosen, left_out = [], {}
    for scan in scans:
        entities: dict[str, str] = dict(re.findall("_([a-z]+)-([^_]+)", scan.path.name))
        checks = {
            IGNORED: is_ignored(scan.relative),
            BAD_FILE: not _T1W_PATH.fullmatch(scan.relative),
            TEMPLATE: entities.get("tpl", entities.get("space", "orig")).lower() not in OWN_SPACES,
            PART: any(part in entities and part not in filters for part in ("chunk", "hemi")),
            PHASE: entities.get("part") in PARTS_WITHOUT_CONTRAST and "part" not in filters,
        }
        if reasons := [reason for reason, holds in checks.items() if holds]:
            left_out[scan.relative] = reasons[0]
        else:
            chosen.append(scan)
    is_derived = {scan.relative: bool(_DERIVATIVE_ENTITY.search(scan.path.name)) for scan in chosen}
    raw = {_SUFFIX.sub("", scan.path.name) for scan in chosen if not is_derived[scan.relative]}
    for scan in chosen:
        if is_derived[scan.relative] and _DERIVATIVE_ENTITY.sub("", scan.prefix) in raw:
            left_out[scan.relative] = DERIVED
    return [scan for scan in chosen if scan.relative not in left_out], left_out


def _explain(left_out: Mapping[str, str], reasons: Iterable[str] = (*_ERRORS, *_NOTES, PHASE)) -> list[str]:
    """One message for each of these reasons."""
    names = {reason: [name for name in left_out if left_out[name] == reason] for reason in reasons}
    return [f"{some(names[reason], shown=MANY)}: {reason}" for reason in reasons if names[reason]]


def _split_available(bids_dir: Path, scans: list[Scan], whole_dataset: bool) -> tuple[list[Scan], list[str]]:
    """Images that can be opened, and what is wrong with the others; many links in one message."""
    available: dict[str, Scan] = {}
    absent, errors = [], []
    for scan in scans:
        twin = available.get(scan.prefix)
        try:
            if is_absent(scan.path):
                absent.append(scan.relative)
            elif twin is None:
                available[scan.prefix] = scan
            else:
                choose = "Keep one of them, or choose with --bids-filter-file. This one is skipped."
                errors.append(f"{scan.relative}: {twin.relative} would give outputs of the same names. {choose}")
        except OSError as error:
            errors.append(f"{scan.relative}: cannot read it: {error.strerror}. It is skipped.")
    if absent:
        errors.append(
            f"{some(absent, shown=MANY)}: skipped, only a link is here, its content was not fetched. To fetch it:\n"
            f"  {datalad_command(bids_dir, absent, whole_dataset)}"
        )
    return list(available.values()), errors


def _is_elsewhere(participants: Collection[str], path: str) -> bool:
    """Whether a path, ``/`` being the dataset, leads to no NIfTI file in these participants' ``anat`` folders."""
    match = _ANAT_PATH.fullmatch(path)
    return match is None or match[1] not in participants


def _index(bids_dir: Path, participants: Iterable[str], database: Path | None) -> BIDSLayout:
    """Index with pybids the participants' ``anat`` folders, in memory or in `database`."""
    from bids.layout import BIDSLayout, BIDSLayoutIndexer

    # It stands in for a regular expression, which would be as long as the list of participants.
    elsewhere = SimpleNamespace(search=partial(_is_elsewhere, set(participants)))
    # Sidecars are as many again, and nothing asks for them.
    indexer = BIDSLayoutIndexer(ignore=[elsewhere], index_metadata=False)
    configs = ["bids", "derivatives"]
    return BIDSLayout(bids_dir, validate=False, config=configs, indexer=indexer, database_path=database)


def _open_layouts(bids_dir: Path, participants: list[str], database: Path | None) -> list[BIDSLayout]:
    """The layout, and one more for participants that an existing database does not hold.

    A database is made once, in a temporary folder, moved when it is whole, and then only read: jobs may share it.
    """
    from bids.layout import BIDSLayout

    if database is None:
        return [_index(bids_dir, participants, None)]
    if not (database / DATABASE_FILE).exists():
        try:
            database.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=database, prefix=".new-") as fresh:
                _index(bids_dir, participants, Path(fresh)).connection_manager.session.close()
                (Path(fresh) / DATABASE_FILE).replace(database / DATABASE_FILE)
        except OSError as error:
            other = "Give a writable --bids-database-dir, or leave it out."
            raise OutputError(f"{database}: cannot write the pybids database: {error.strerror}. {other}") from error
    try:
        layout = BIDSLayout(bids_dir, validate=False, database_path=database)
        missing = sorted(set(participants).difference(layout.get_subjects(scope="self")))
    except Exception as error:  # sqlite, sqlalchemy and pybids raise their own kinds here
        raise UsageError(f"{database}: pybids cannot read this database ({error}). Delete it.") from error
    if Path(str(layout.root)) != bids_dir:
        other = "Give another --bids-database-dir, or delete this one."
        raise UsageError(f"{database}: the database is of {layout.root}, not of {bids_dir}. {other}")
    return [layout, _index(bids_dir, missing, None)] if missing else [layout]


def _query(
    layouts: Iterable[BIDSLayout], bids_dir: Path, participants: Collection[str], filters: Mapping[str, Any]
) -> list[Scan]:
    """Images of the participants that pass pybids filters, in natural order."""
    query = {"suffix": "T1w", "datatype": "anat", "extension": [".nii", ".nii.gz"]}
    scans, participants = [], set(participants)
    for layout in layouts:
        known = sorted(layout.get_entities(metadata=False))
        asked = query | {name: _filter_value(name, value, known) for name, value in filters.items()}
        for found in layout.get(scope="self", invalid_filters="allow", **asked):
            path = Path(str(found.path))
            relative = path.relative_to(bids_dir).as_posix()
            entities = {name: str(value) for name, value in found.get_entities().items() if name not in query}
            # A database made by others may hold more than the anat folders.
            if not _is_elsewhere(participants, f"/{relative}"):
                scans.append(Scan(path, entities, relative))
    return sorted(scans, key=lambda scan: (natural_key(scan.relative), scan.relative))


def _filter_value(name: str, value: Any, known: list[str]) -> Any:
    """A value of the JSON filter file as pybids wants it; `known` are its entities.

    As in nipreps, null and ``"Query.NONE"`` mean "has no such entity", ``"*"`` "has one".
    """
    from bids.layout import Query

    if name not in known:
        # "acq" and "run" style short names are closer to a prefix than to the whole word.
        close = [word for word in known if word.startswith(name)] or difflib.get_close_matches(name, known, 1, 0.3)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise UsageError(f"--bids-filter-file: t1w: {name!r} is not a pybids entity.{hint}")
    if isinstance(value, list):
        return [_filter_value(name, item, known) for item in value]
    if value in (None, "*"):
        return Query.NONE if value is None else Query.REQUIRED
    if isinstance(value, str):
        if word := _QUERY_NAME.fullmatch(value):
            return Query[word[1]]
        return value.removeprefix({"subject": "sub-", "session": "ses-"}.get(name, ""))
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise UsageError(
        f"--bids-filter-file: t1w: {name}: {value!r} is neither text, a whole number, null, nor a list of these."
    )
