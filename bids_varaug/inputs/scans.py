"""T1w images of the requested participants and sessions of a BIDS dataset.

pybids takes minutes to index a large dataset, so the participants are read from the directory
listing and nothing but the images of their ``anat`` folders is handed to it.
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
import tempfile
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
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

IGNORED = "left out by .bidsignore."
_RENAME = "Rename them, or list them in .bidsignore."
BAD_FOLDER = f"not processed. Folders of participants are named sub-<label>, a label of letters and digits. {_RENAME}"
BAD_FILE = f"not processed. File names consist of BIDS entities, with the labels of their folders. {_RENAME}"
TEMPLATE = "left out: volumes in a template space are not the person's. Name the person's own space space-individual."
PART = "left out: part of a head. To process it, filter on chunk or hemi (--bids-filter-file)."
DERIVED = "left out beside its raw image. To use it, filter on desc or space (--bids-filter-file)."
PHASE = "left out: the phase, real or imaginary part of an image has no T1w contrast."
EXPECTED = "sub-{0}/[ses-<label>/]anat/*_T1w.nii[.gz]."

_PARTICIPANT = re.compile("sub-[0-9a-zA-Z+]+")
_MEANT = re.compile(r"(?i)sub(?:j|ject)?[\W_\d]")  # also Sub-01, sub_01, subject01
# From the participant's folder down to a NIfTI file of an anat folder.
_ON_THE_WAY = re.compile(r"/(sub-[^/]+)(?:/ses-[^/]*)?(?:/anat(?:/[^/]+\.nii(?:\.gz)?)?)?")
_GOOD_FILE = re.compile(  # no entity twice; sub- and ses- as in the folders
    r"(?!.*(_[a-z]+-).*\1)(sub-L)/(?:(ses-L)/)?anat/\2(?(3)_\3)"
    r"(?:_(?!sub-|ses-)[a-z]+-L)*_T1w\.nii(?:\.gz)?".replace("L", "[0-9a-zA-Z+]+")
)
_ENDING = re.compile(r"(_T1w)?(?i:\.nii(\.gz)?)$")
_MADE = re.compile("_(?:space|desc)-[^_]+")
# Entities that no T1w image has, or that each output sets itself.
_DROPPED = re.compile(r"_(?!(?:ses|task|acq|ce|rec|run|echo|part|space|chunk)-)[a-z]+-[^_]+")
_QUERY_WORD = re.compile(r"<?Query\.(NONE|REQUIRED|ANY|OPTIONAL)(: \d+)?>?")


@dataclass(frozen=True)
class Scan:
    """One T1w image.

    Attributes
    ----------
    path : of the image, absolute
    entities : of pybids, without suffix, extension and datatype, digits padded as in the file name,
        e.g. ``{"subject": "01", "session": "a", "run": "01"}``
    relative : POSIX path relative to the BIDS directory
    """

    path: Path
    entities: Mapping[str, str]
    relative: str

    @property
    def prefix(self) -> str:
        """File name without suffix, extension and derivatives' entities; every output starts so.

        Examples
        --------
        >>> Scan(Path("/x/sub-01_run-02_desc-preproc_T1w.nii"), {"subject": "01"}, "").prefix
        'sub-01_run-02'
        """
        return _DROPPED.sub("", _ENDING.sub("", self.path.name))

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
    """What the request found: images to process, and what must be reported as failed.

    Attributes
    ----------
    scans : images whose content is there, in natural order of their paths
    complaints : what cannot be processed, one message for each reason; any means exit code 1
    notes : what is left out on purpose, one message for each reason
    """

    scans: tuple[Scan, ...]
    complaints: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def find_scans(settings: Settings) -> Selection:
    """T1w images of the requested participants and sessions that pass the BIDS filters.

    T1w images below ``derivatives/`` and ``sourcedata/`` do not count, nor those that `_sort_out`
    leaves out.

    Raises
    ------
    UsageError
        A filter that cannot be; a database of another dataset.
    FiltersError
        A participant or session label that does not exist; filters that leave nothing.
    NoInputError
        No T1w image anywhere, or none whose content is present; a folder or .bidsignore that cannot
        be read.
    """
    bids_dir, named = settings.bids_dir, set(settings.participant_labels)
    filters = dict(settings.bids_filters.get("t1w", {}))
    participants = select_participants(settings)
    misnamed = [] if named else _list_participants(bids_dir)[1]
    sort_out = partial(_sort_out, misnamed, filters, _read_bidsignore(bids_dir))
    layouts = _open_layouts(bids_dir, participants, settings.bids_database_dir)
    found = _query(layouts, bids_dir, participants, {})
    everything, left_out = sort_out(found)
    cause = {path.partition("/")[0]: why for why, paths in left_out.items() for path in paths}
    if not everything:
        who = f"participant {some(participants, shown=MANY)}" if named else "any participant"
        why = _explain(left_out) or [f"Expected {EXPECTED.format('<label>')}"]
        raise NoInputError("\n".join([f"{bids_dir}: no T1w image of {who} can be used.", *why]))
    with_any = {scan.subject for scan in everything}
    with_any |= {relative[4:].partition("/")[0] for relative in left_out[IGNORED]}
    sessions = _existing_labels(
        settings.session_labels,
        {scan.session for scan in everything} - {None},
        "--session-label: no T1w image in session {} of the requested participants",
    )
    wanted = _query(layouts, bids_dir, participants, filters) if filters else found
    wanted, left_out = sort_out([s for s in wanted if not sessions or s.session in sessions])
    flags = ["--session-label"] * bool(sessions) + ["--bids-filter-file"] * bool(filters)
    unmet = f"passes {' and '.join(flags)}."
    if not wanted:
        none = f"{bids_dir}: none of the {len(everything)} T1w image(s) {unmet} "
        raise FiltersError("\n".join([f"{none}Loosen the selection.", *_explain(left_out)]))
    scans, complaints = _split_available(bids_dir, wanted, not named)
    if not scans:
        raise NoInputError("\n".join([f"{bids_dir}: no T1w image can be read.", *complaints]))
    cause |= {f"sub-{scan.subject}": f"no usable T1w image {unmet}" for scan in everything}
    left_out.pop(PHASE, None)  # beside magnitude images, and nobody expects them to be processed
    for reason in (BAD_FOLDER, BAD_FILE):
        if names := left_out.pop(reason, ()):
            complaints.append(f"{', '.join(names)}: {reason}")
    # A participant who was named must not vanish silently because of a filter.
    with_wanted = {scan.subject for scan in wanted}
    without = [p for p in participants if p not in (with_wanted if p in named else with_any)]
    complaints += [f"sub-{p}: {cause.get(f'sub-{p}', f'no {EXPECTED.format(p)}')}" for p in without]
    return Selection(tuple(scans), tuple(complaints), tuple(_explain(left_out)))


def select_participants(settings: Settings) -> list[str]:
    """Participants of the dataset that are asked for and not excluded.

    Raises
    ------
    NoInputError, FiltersError
        As `find_scans`.
    """
    bids_dir = settings.bids_dir
    existing, misnamed = _list_participants(bids_dir)
    if not existing:
        none = f"{bids_dir}: no sub-<label> folder. Give the root of a BIDS dataset."
        raise NoInputError("\n".join([none, *_explain({BAD_FOLDER: misnamed})]))
    wanted, excluded = settings.participant_labels, settings.exclude_participant_labels
    is_ignored = _read_bidsignore(bids_dir)
    ignored = {p for p in (*wanted, *excluded) if is_ignored(f"sub-{p}/")}
    if named := ignored.intersection(wanted):
        raise FiltersError(f"--participant-label: {', '.join(sorted(named))}: {IGNORED}")
    absent = "-participant-label: not in the dataset: {}"
    wanted = _existing_labels(wanted, existing, f"-{absent}")
    excluded = _existing_labels(excluded, ignored.union(existing), f"--exclude{absent}")
    chosen = [p for p in existing if (not wanted or p in wanted) and p not in excluded]
    if not chosen:
        raise FiltersError(f"{bids_dir}: --exclude-participant-label leaves no participant.")
    return chosen


def _list_participants(bids_dir: Path) -> tuple[list[str], list[str]]:
    """Labels of the participants, and misnamed folders; in natural order, without those in .bidsignore."""
    is_ignored = _read_bidsignore(bids_dir)
    try:
        with os.scandir(bids_dir) as entries:
            names = [e.name for e in entries if _MEANT.match(e.name) and e.is_dir()]
    except OSError as error:
        raise NoInputError(f"{bids_dir}: cannot list this directory: {error.strerror}.") from error
    names = sorted((name for name in names if not is_ignored(f"{name}/")), key=natural_key)
    labels = [name[4:] for name in names if _PARTICIPANT.fullmatch(name)]
    return labels, [name for name in names if not _PARTICIPANT.fullmatch(name)]


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
    relatives : paths relative to `bids_dir`
    whole_dataset : whether these are T1w images of all participants: many are written as patterns
    """
    relatives = list(relatives)
    targets = " ".join(shlex.quote(relative) for relative in relatives)
    if whole_dataset and len(relatives) > MANY:
        patterns = {"*/" * relative.count("/") + "*_T1w.nii*" for relative in relatives}
        targets = " ".join(sorted(f"sub-{pattern}" for pattern in patterns))
    return f"cd {shlex.quote(str(bids_dir))} && datalad get {targets}"


def _existing_labels(labels: Iterable[str], existing: Collection[str], problem: str) -> set[str]:
    """Labels, all of which exist; `problem` has a place for those that do not."""
    missing = sorted(set(labels).difference(existing), key=natural_key)
    if missing:
        none = "none (the dataset has no sessions)"
        there = some(sorted(existing, key=natural_key), shown=MANY) or none
        raise FiltersError(f"{problem.format(', '.join(missing))}. There are: {there}.")
    return set(labels)


def _sort_out(
    misnamed: Iterable[str],
    filters: Collection[str],
    is_ignored: Callable[[str], bool],
    scans: Iterable[Scan],
) -> tuple[list[Scan], dict[str, list[str]]]:
    """Images to process, and by reason the paths of the others and of `misnamed` folders.

    An image is left out for the first reason that its name tells, unless `filters` ask for it.
    """
    chosen, left_out = [], defaultdict(list, {BAD_FOLDER: [*misnamed]})
    for scan in scans:
        entities = dict(re.findall("_([a-z]+)-([^_]+)", scan.path.name))
        checks = {
            IGNORED: is_ignored(scan.relative),
            BAD_FILE: not _GOOD_FILE.fullmatch(scan.relative),
            TEMPLATE: entities.get("tpl", entities.get("space", "orig")).lower() not in OWN_SPACES,
            PART: any(part in entities and part not in filters for part in ("chunk", "hemi")),
            PHASE: entities.get("part") in PARTS_WITHOUT_CONTRAST and "part" not in filters,
        }
        reason = next((reason for reason, holds in checks.items() if holds), None)
        chosen.append(scan) if reason is None else left_out[reason].append(scan.relative)
    made = {scan.relative: _MADE.sub("", scan.prefix) for scan in chosen if _MADE.search(scan.path.name)}
    raw = {_ENDING.sub("", scan.path.name) for scan in chosen if scan.relative not in made}
    left_out[DERIVED] = [relative for relative, source in made.items() if source in raw]
    return [scan for scan in chosen if made.get(scan.relative) not in raw], left_out


def _explain(left_out: Mapping[str, list[str]]) -> list[str]:
    return [f"{some(names, shown=MANY)}: {reason}" for reason, names in left_out.items() if names]


def _split_available(bids_dir: Path, scans: list[Scan], whole_dataset: bool) -> tuple[list[Scan], list[str]]:
    """Images that can be opened, and what is wrong with the others; many links in one message."""
    available: dict[str, Scan] = {}
    absent, complaints = [], []
    for scan in scans:
        twin = available.get(scan.prefix)
        try:
            if is_absent(scan.path):
                absent.append(scan.relative)
            elif twin is None:
                available[scan.prefix] = scan
            else:
                complaints.append(
                    f"{scan.relative}: {twin.relative} would give outputs of the same names. Keep "
                    "one of them, or choose with --bids-filter-file. This one is skipped."
                )
        except OSError as error:
            complaints.append(f"{scan.relative}: cannot read it: {error.strerror}. It is skipped.")
    if absent:
        complaints.append(
            f"{some(absent, shown=MANY)}: skipped, only a link is here, its content was not "
            f"fetched. To fetch it:\n  {datalad_command(bids_dir, absent, whole_dataset)}"
        )
    return list(available.values()), complaints


class _Elsewhere:
    """What pybids skips: all but NIfTI files of the participants' ``anat`` folders.

    It stands in for a regular expression, which would be as long as the list of participants.
    """

    def __init__(self, participants: Iterable[str]):
        self.folders = {f"sub-{label}" for label in participants}

    def search(self, path: str) -> bool:
        """Whether to skip a path, ``/`` being the dataset."""
        match = _ON_THE_WAY.fullmatch(path)
        return match is None or match[1] not in self.folders


def _index(bids_dir: Path, participants: Iterable[str], database: Path | None) -> BIDSLayout:
    """Index with pybids the participants' ``anat`` folders, in memory or in `database`."""
    from bids.layout import BIDSLayout, BIDSLayoutIndexer

    # Sidecars are as many again, and nothing asks for them.
    indexer = BIDSLayoutIndexer(ignore=[_Elsewhere(participants)], index_metadata=False)
    return BIDSLayout(
        bids_dir, validate=False, derivatives=False, config=["bids", "derivatives"],
        indexer=indexer, database_path=database,
    )  # fmt: skip


def _open_layouts(bids_dir: Path, participants: list[str], database: Path | None) -> list[BIDSLayout]:
    """The layout, and one more for participants that an existing database does not hold.

    A database is made once and then only read: jobs that share it cannot disturb each other, and
    one made for other participants still gives the right answer. It is indexed into a temporary
    folder and moved, so that no job ever reads half of it.
    """
    if database is None:
        return [_index(bids_dir, participants, None)]
    if not (database / DATABASE_FILE).exists():
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
    from bids.layout import BIDSLayout

    try:
        layout = BIDSLayout(bids_dir, validate=False, database_path=database)
        missing = sorted(set(participants).difference(layout.get_subjects(scope="self")))
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
    return [layout, _index(bids_dir, missing, None)] if missing else [layout]


def _query(
    layouts: Iterable[BIDSLayout],
    bids_dir: Path,
    participants: Collection[str],
    filters: Mapping[str, Any],
) -> list[Scan]:
    """Images of the participants that pass pybids filters, in natural order."""
    query = {"suffix": "T1w", "datatype": "anat", "extension": [".nii", ".nii.gz"]}
    scans, elsewhere = [], _Elsewhere(participants)
    for layout in layouts:
        known = sorted(layout.get_entities(metadata=False))
        asked = query | {name: _filter_value(name, value, known) for name, value in filters.items()}
        for found in layout.get(scope="self", invalid_filters="allow", **asked):
            path = Path(str(found.path))
            relative = path.relative_to(bids_dir).as_posix()
            entities = {name: str(value) for name, value in found.get_entities().items() if name not in query}
            # A database made by others may hold more than the anat folders.
            if not elsewhere.search(f"/{relative}"):
                scans.append(Scan(path, entities, relative))
    return sorted(scans, key=lambda scan: (natural_key(scan.relative), scan.relative))


def _filter_value(name: str, value: Any, known: list[str]) -> Any:
    """A value of the JSON filter file as pybids wants it; `known` are its entities.

    As in nipreps, null and ``"Query.NONE"`` mean "has no such entity", ``"*"`` "has one".
    """
    from bids.layout import Query

    flag = "--bids-filter-file: t1w:"
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.3)
        # "acq" and "run" style short names are closer to a prefix than to the whole word.
        close = [word for word in known if word.startswith(name)] or close
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise UsageError(f"{flag} {name!r} is not a pybids entity.{hint}")
    if isinstance(value, list):
        return [_filter_value(name, item, known) for item in value]
    if value in (None, "*"):
        return Query.NONE if value is None else Query.REQUIRED
    if isinstance(value, str):
        if word := _QUERY_WORD.fullmatch(value):
            return Query[word[1]]
        return value.removeprefix({"subject": "sub-", "session": "ses-"}.get(name, ""))
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise UsageError(f"{flag} {name}: {value!r} is neither text, a whole number, null, nor a list of these.")
