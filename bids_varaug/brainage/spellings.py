"""Labels that two tables spell differently: sub-1 here, sub-001_T1w.nii.gz there."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable

from bids_varaug.inputs.participants import People
from bids_varaug.inputs.tables import TableError, some

# The label of a file or folder of BIDS, which no underscore ends unless an entity follows.
_SUBJECT = re.compile(
    r"(?<![a-z0-9])sub-([a-z0-9+]+)(?=$|[\\/.]|_[a-z]+-|_T1w)", flags=re.IGNORECASE
)
_ADDED = re.compile(r"\.long\..*$|(_MR\d+)?(_T1w)?(\.nii|\.gz|\.mg[hz]|\.0)*$", re.IGNORECASE)


def plain_label(label: str) -> str:
    """Label without prefix, leading zeros, case, folders, endings of files and of FreeSurfer.

    Examples
    --------
    >>> plain_label("sub-001"), plain_label("/data/sub-01_ses-1_T1w.nii.gz"), plain_label("ses-02")
    ('1', '1', '2')
    >>> plain_label("sub01"), plain_label("01_MR1")
    ('1', '1')
    >>> plain_label("OAS0007.long.OAS0007_base"), plain_label("sub-OAS7")
    ('oas7', 'oas7')
    """
    inside = _SUBJECT.search(label)
    name = inside[1] if inside else re.split(r"[\\/]", label)[-1]
    name = re.sub(
        r"^((sub|ses)-)?((sub|subj|subject|ses)[-_ ]?(?=\d))?", "", name, flags=re.IGNORECASE
    )
    return re.sub(r"(?<!\d)0+(?=\d)", "", _ADDED.sub("", name, count=1).lower())


def match_labels(
    labels: Iterable[str], known: Iterable[str], here: str, there: str, notes: list[str]
) -> dict[str, str]:
    """What labels are called among the known ones, where spelled differently; that is noted.

    Parameters
    ----------
    labels, known : the spellings `here` and `there`, two names for messages

    Raises
    ------
    TableError
        If one label could be several known ones, or several could be one.
    """
    ours, theirs = _by_plain(labels), _by_plain(known)
    differ = {
        key: (ours[key], theirs[key])
        for key in ours.keys() & theirs.keys()
        if not set(ours[key]) <= set(theirs[key])
    }
    words = {
        key: f"{' and '.join(mine)} here {'are' if mine[1:] else 'is'} {' or '.join(other)} there"
        for key, (mine, other) in sorted(differ.items())
    }
    unclear = [w for key, w in words.items() if len(differ[key][0]) + len(differ[key][1]) > 2]
    if unclear:
        raise TableError(
            f"{here} and {there} spell labels differently. Did you mean that "
            f"{some(unclear, ', that ')}? Write each label the same way in both."
        )
    if words:
        notes.append(
            f"{here} and {there} spell {len(words)} label(s) differently; each fits only one and "
            f"was taken for it: {some(list(words.values()), '; ')}."
        )
    return {mine[0]: other[0] for mine, other in differ.values()}


def match_people(
    people: People | None,
    participants: Iterable[str],
    sessions: Collection[str],
    here: str,
    notes: list[str],
) -> dict[str, str]:
    """As `match_labels`, of the participants and the sessions of `people`."""
    if people is None:
        return {}
    known = people.table["session_id"].dropna().unique()
    participants, listed = list(dict.fromkeys(participants)), people.participants
    same = match_labels(participants, listed, here, people.source, notes)
    if participants and listed and not {same.get(p, p) for p in participants} & set(listed):
        bare = [label[len("sub-") :] for label in (participants[0], *listed)]
        close = difflib.get_close_matches(bare[0], bare[1:], n=1, cutoff=0.3)
        guess = f" Did you mean that {participants[0]} is sub-{close[0]}?" if close else ""
        notes.append(
            f"No participant of {here} ({some(participants, shown=3)}) is in {people.source} "
            f"({some(listed, shown=3)}).{guess} Write each label the same way in both."
        )
    return same | match_labels(sessions, known, here, people.source, notes)


def _by_plain(labels: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for label in dict.fromkeys(labels):
        found.setdefault(plain_label(label), []).append(label)
    return found
