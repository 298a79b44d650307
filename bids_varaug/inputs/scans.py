"""T1w images of the requested participants and sessions of a BIDS dataset."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bids_varaug.cli.settings import Settings
from bids_varaug.errors import FiltersError, NoInputError, ScanError
from bids_varaug.inputs.annex import MANY, datalad_command, is_absent
from bids_varaug.inputs.layout import (
    filter_value,
    list_participants,
    natural_key,
    normalize_label,
    open_layouts,
)

if TYPE_CHECKING:
    from bids.layout import BIDSLayout

EXTENSIONS = (".nii", ".nii.gz")
PARTS_WITHOUT_CONTRAST = {"phase", "real", "imag"}

_ANAT_FILE = re.compile(r"sub-[^/]+/(ses-[^/]+/)?anat/[^/]+")
_ENDING = re.compile(r"_[0-9a-zA-Z]+\.nii(\.gz)?$")


@dataclass(frozen=True)
class Scan:
    """One T1w image.

    Attributes
    ----------
    path : Path
        Absolute path of the image.
    entities : mapping of str to str
        pybids entities without suffix, extension and datatype, digits padded as in the file name,
        e.g. ``{"subject": "01", "session": "a", "run": "01"}``.
    relative : str
        POSIX path relative to the BIDS directory.
    """

    path: Path
    entities: Mapping[str, str]
    relative: str

    @property
    def prefix(self) -> str:
        """File name without suffix and extension, which every output name starts with.

        Examples
        --------
        >>> Scan(Path("/x/sub-01_run-02_T1w.nii.gz"), {"subject": "01"}, "").prefix
        'sub-01_run-02'
        """
        return _ENDING.sub("", self.path.name)

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
    scans : tuple of Scan
        Images whose content is there, in natural order of their paths.
    unavailable : tuple of (Scan, ScanError)
        Images without content (dangling links, two files of one name); the error says what to do.
    participants_without_t1w : tuple of str
        Participants that were asked for and have no T1w image; the run ends with exit code 1.
    complaints : tuple of str
        What to tell about `unavailable`: one message, with one command, for all that only has to
        be fetched.
    """

    scans: tuple[Scan, ...]
    unavailable: tuple[tuple[Scan, ScanError], ...] = ()
    participants_without_t1w: tuple[str, ...] = ()
    complaints: tuple[str, ...] = ()


def find_scans(settings: Settings) -> Selection:
    """T1w images of the requested participants and sessions that pass the BIDS filters.

    T1w images below ``derivatives/`` and ``sourcedata/`` do not count, nor phase, real and
    imaginary parts (unless a filter on ``part`` asks for them).

    Raises
    ------
    UsageError
        A label or filter that cannot be; a database of another dataset.
    FiltersError
        A participant or session label that does not exist; filters that leave nothing.
    NoInputError
        No T1w image anywhere, or none whose content is present.
    """
    bids_dir = settings.bids_dir
    participants = select_participants(settings)
    layout, extra = open_layouts(bids_dir, participants, settings.bids_database_dir)
    filters = dict(settings.bids_filters.get("t1w", {}))
    everything, wanted = [], []
    for each in (layout, *extra):
        found = _query(each, bids_dir, participants, {})
        everything += found
        wanted += _query(each, bids_dir, participants, filters) if filters else found
    if not everything:
        _refuse_empty(bids_dir, participants, settings.participant_labels)
    wanted = _restrict_sessions(wanted, everything, settings.session_labels)
    if not wanted:
        raise FiltersError(
            f"{bids_dir}: none of the {len(everything)} T1w images passes --session-label and "
            "--bids-filter-file. Loosen them."
        )
    # A participant who was named must not vanish silently because of a filter.
    named = {normalize_label(label) for label in settings.participant_labels}
    with_any = {scan.subject for scan in everything}
    with_wanted = {scan.subject for scan in wanted}
    without = [p for p in participants if p not in (with_wanted if p in named else with_any)]
    scans, unavailable = _split_available(bids_dir, sorted(wanted, key=_scan_key))
    if not scans:
        _refuse_unavailable(bids_dir, unavailable, whole_dataset=not named)
    complaints = _complaints(bids_dir, unavailable, whole_dataset=not named)
    return Selection(tuple(scans), tuple(unavailable), tuple(without), complaints)


def select_participants(settings: Settings) -> list[str]:
    """Participants of the dataset that are asked for and not excluded.

    Raises
    ------
    NoInputError, UsageError, FiltersError
        As `find_scans`.
    """
    existing = list_participants(settings.bids_dir)
    if not existing:
        raise NoInputError(
            f"{settings.bids_dir}: no sub-* folder. Give the root of a BIDS dataset."
        )
    wanted = _existing_labels(settings.participant_labels, existing, "--participant-label")
    excluded = _existing_labels(
        settings.exclude_participant_labels, existing, "--exclude-participant-label"
    )
    chosen = [p for p in existing if (not wanted or p in wanted) and p not in excluded]
    if not chosen:
        raise FiltersError(
            f"{settings.bids_dir}: --exclude-participant-label leaves no participant."
        )
    return chosen


def _existing_labels(labels: Iterable[str], existing: list[str], flag: str) -> set[str]:
    """Labels without prefix, all of which exist."""
    bare = {normalize_label(label) for label in labels}
    missing = sorted(bare.difference(existing), key=natural_key)
    if missing:
        raise FiltersError(
            f"{flag}: not in the dataset: {', '.join(missing)}. There are: {_some(existing)}."
        )
    return bare


def _some(names: Iterable[str]) -> str:
    """First names of a list, for a message."""
    names = list(names)
    rest = f" and {len(names) - MANY} more" if len(names) > MANY else ""
    return ", ".join(names[:MANY]) + rest


def _query(
    layout: BIDSLayout, bids_dir: Path, participants: Iterable[str], filters: Mapping[str, Any]
) -> list[Scan]:
    """Images of the participants that pass pybids filters."""
    known = sorted(layout.get_entities(metadata=False))
    query: dict[str, Any] = {"suffix": "T1w", "datatype": "anat", "extension": list(EXTENSIONS)}
    query.update({name: filter_value(name, value, known) for name, value in filters.items()})
    chosen = set(participants)
    scans = []
    for found in layout.get(scope="self", invalid_filters="allow", **query):
        path = Path(str(found.path))
        entities = {
            name: str(value)
            for name, value in found.get_entities().items()
            if name not in ("suffix", "extension", "datatype")
        }
        relative = path.relative_to(bids_dir).as_posix()
        # A database made by others may hold more than the anat folders.
        if not _ANAT_FILE.fullmatch(relative) or entities.get("subject") not in chosen:
            continue
        if "part" in filters or entities.get("part") not in PARTS_WITHOUT_CONTRAST:
            scans.append(Scan(path, entities, relative))
    return scans


def _restrict_sessions(
    wanted: list[Scan], everything: list[Scan], labels: Iterable[str]
) -> list[Scan]:
    """Images of the requested sessions, all of which exist."""
    sessions = {normalize_label(label, "ses") for label in labels}
    if not sessions:
        return wanted
    existing = {scan.session for scan in everything if scan.session is not None}
    missing = sorted(sessions - existing, key=natural_key)
    if missing:
        there = _some(sorted(existing, key=natural_key)) or "none (the dataset has no sessions)"
        raise FiltersError(
            f"--session-label: no T1w image in session {', '.join(missing)} of the requested "
            f"participants. There are: {there}."
        )
    return [scan for scan in wanted if scan.session in sessions]


def _scan_key(scan: Scan) -> tuple:
    return natural_key(scan.relative), scan.relative


def _split_available(
    bids_dir: Path, scans: list[Scan]
) -> tuple[list[Scan], list[tuple[Scan, ScanError]]]:
    """Images that can be opened, and the others with what is wrong."""
    available: dict[str, Scan] = {}
    unavailable = []
    for scan in scans:
        try:
            absent = is_absent(scan.path)
        except OSError as error:
            message = f"{scan.relative}: cannot read it: {error.strerror}. It is skipped."
            unavailable.append((scan, ScanError(message)))
            continue
        twin = available.get(scan.prefix)
        if absent:
            unavailable.append((scan, _AbsentError(bids_dir, scan)))
        elif twin is not None:
            message = (
                f"{scan.relative}: {twin.relative} would give outputs of the same names. Keep one "
                f"of them, or choose with --bids-filter-file. {scan.relative} is skipped."
            )
            unavailable.append((scan, ScanError(message)))
        else:
            available[scan.prefix] = scan
    return list(available.values()), unavailable


class _AbsentError(ScanError):
    """The content of an image is not there."""

    def __init__(self, bids_dir: Path, scan: Scan) -> None:
        super().__init__(
            f"{scan.relative}: the link leads nowhere (its content was not fetched); it is "
            f"skipped. To fetch it: {datalad_command(bids_dir, [scan.relative])}"
        )


def _refuse_empty(bids_dir: Path, participants: list[str], requested: Iterable[str]) -> None:
    who = f"participant {_some(participants)}" if tuple(requested) else "any participant"
    raise NoInputError(
        f"{bids_dir}: no T1w image of {who}. "
        "Expected sub-<label>/[ses-<label>/]anat/*_T1w.nii[.gz]."
    )


def _complaints(
    bids_dir: Path, unavailable: list[tuple[Scan, ScanError]], whole_dataset: bool
) -> tuple[str, ...]:
    """Message of each image; of a sparse clone's many links, only one message and command."""
    absent = [scan for scan, error in unavailable if isinstance(error, _AbsentError)]
    if len(absent) < 2:
        return tuple(str(error) for _, error in unavailable)
    others = [str(error) for _, error in unavailable if not isinstance(error, _AbsentError)]
    subjects = dict.fromkeys(f"sub-{scan.subject}" for scan in absent)
    command = datalad_command(bids_dir, [scan.relative for scan in absent], whole_dataset)
    return (
        *others,
        f"{len(absent)} T1w images of {_some(subjects)} are skipped: only links are here, their "
        f"content was not fetched. To fetch it:\n  {command}",
    )


def _refuse_unavailable(
    bids_dir: Path, unavailable: list[tuple[Scan, ScanError]], whole_dataset: bool
) -> None:
    absent = [scan.relative for scan, error in unavailable if isinstance(error, _AbsentError)]
    if not absent:
        raise NoInputError("\n".join(str(error) for _, error in unavailable))
    raise NoInputError(
        f"{bids_dir}: the content of {len(absent)} T1w image(s) is not here, only dangling links. "
        f"Fetch it with:\n  {datalad_command(bids_dir, absent, whole_dataset)}"
    )
