"""Participants of a table found in participants.tsv, also where the two spell labels differently."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection, Iterable, Mapping
from itertools import groupby

import pandas as pd

from bids_varaug.inputs.participants import People, Person
from bids_varaug.inputs.tables import TableError, some

# The label of a file or folder of BIDS, which no underscore ends unless an entity follows.
_SUBJECT = re.compile(r"(?<![a-z0-9])sub-([a-z0-9+]+)(?=$|[\\/.]|_[a-z]+-|_T1w)", flags=re.IGNORECASE)
_ADDED = re.compile(r"\.long\..*$|(_MR\d+)?(_T1w)?(\.nii|\.gz|\.mg[hz]|\.0)*$", re.IGNORECASE)


def plain_label(label: str) -> str:
    """Label without prefix, leading zeros, case, folders, endings of files and of FreeSurfer.

    >>> plain_label("sub-001"), plain_label("/data/sub-01_ses-1_T1w.nii.gz"), plain_label("ses-02")
    ('1', '1', '2')
    >>> plain_label("sub01"), plain_label("01_MR1")
    ('1', '1')
    >>> plain_label("OAS0007.long.OAS0007_base"), plain_label("sub-OAS7")
    ('oas7', 'oas7')
    """
    inside = _SUBJECT.search(label)
    name = inside[1] if inside else re.split(r"[\\/]", label)[-1]
    name = re.sub(r"^((sub|ses)-)?((sub|subj|subject|ses)[-_ ]?(?=\d))?", "", name, flags=re.IGNORECASE)
    return re.sub(r"(?<!\d)0+(?=\d)", "", _ADDED.sub("", name, count=1).lower())


def look_up_people(
    ids: pd.DataFrame, people: People | None, same: Mapping[str, str]
) -> tuple[pd.DataFrame, dict[str, str]]:
    """Observations with the age, sex and site of `people`, and why ages are missing.

    `ids` has the columns participant_id, session_id and observation; `same` is of `match_people`.
    """
    known, reasons = [], {}
    listed = set() if people is None else set(people.participants)
    for who, session, observation in ids.itertuples(index=False, name=None):
        who_there = same.get(who, who)
        person = None if people is None else people.find(who_there, same.get(session, session))
        known.append((person or Person(math.nan, None, None))[:3])
        if people is None:
            continue
        if person is None:
            at = f" at {session or 'no session'}" if who_there in listed else ""
            reasons[observation] = f"not in {people.source}{at}"
        elif math.isnan(person.age):
            reasons[observation] = person.reason or f"no age in {people.source}"
    found = pd.DataFrame(known, columns=["age", "sex", "site"], dtype=object, index=ids.index)
    return pd.concat([ids, found.astype({"age": "float64"})], axis=1), reasons


def match_people(
    people: People | None, participants: Iterable[str], sessions: Collection[str], here: str, notes: list[str]
) -> dict[str, str]:
    """Spelling in `people` of participants and sessions of a table called `here`, where it differs; that is noted.

    A TableError says that one label could be several known ones, or several could be one.
    """
    if people is None:
        return {}
    participants, listed = list(dict.fromkeys(participants)), people.participants
    same = _match_labels(participants, listed, here, people.source, notes)
    if participants and listed and not {same.get(p, p) for p in participants} & set(listed):
        bare = [label.removeprefix("sub-") for label in (participants[0], *listed)]
        close = difflib.get_close_matches(bare[0], bare[1:], n=1, cutoff=0.3)
        guess = f" Did you mean that {participants[0]} is sub-{close[0]}?" if close else ""
        notes.append(
            f"No participant of {here} ({some(participants, shown=3)}) is in {people.source} "
            f"({some(listed, shown=3)}).{guess} Write each label the same way in both."
        )
    known = people.table["session_id"].dropna().unique()
    return same | _match_labels(sessions, known, here, people.source, notes)


def _match_labels(labels: Iterable[str], known: Iterable[str], here: str, there: str, notes: list) -> dict[str, str]:
    ours, theirs = _by_plain_label(labels), _by_plain_label(known)
    said, unclear, same = [], [], {}
    for key in sorted(ours.keys() & theirs.keys()):
        mine, others = ours[key], theirs[key]
        if set(mine) <= set(others):
            continue
        said.append(f"{' and '.join(mine)} here {'are' if mine[1:] else 'is'} {' or '.join(others)} there")
        unclear += said[-1:] if len(mine) + len(others) > 2 else []
        same[mine[0]] = others[0]
    if unclear:
        raise TableError(
            f"{here} and {there} spell labels differently. Did you mean that {some(unclear, ', that ')}? Write each "
            "label the same way in both."
        )
    if said:
        notes.append(
            f"{here} and {there} spell {len(said)} label(s) differently; each fits only one and was taken for it: "
            f"{some(said, '; ')}."
        )
    return same


def _by_plain_label(labels: Iterable[str]) -> dict[str, list[str]]:
    ordered = sorted(dict.fromkeys(labels), key=plain_label)
    return {key: list(group) for key, group in groupby(ordered, key=plain_label)}
