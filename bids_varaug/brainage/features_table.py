"""A table of features made elsewhere (FreeSurfer, ...) as a cohort."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from bids_varaug.brainage.assemble import BASELINE, Gathered, assemble
from bids_varaug.brainage.cohort import Cohort
from bids_varaug.brainage.leaks import reason_by_name, reasons_by_value
from bids_varaug.brainage.spellings import match_people
from bids_varaug.inputs.participants import (
    SESSION_COLUMNS,
    People,
    choose_column,
    prefixed,
    read_ages,
    read_sexes,
)
from bids_varaug.inputs.tables import (
    MISSING,
    TableError,
    find_column,
    read_columns,
    read_header,
    some,
)

KEYS = {
    "participant": (
        "participant_id",
        "participant",
        "subject_id",
        "subject",
        "sub",
        "subjid",
        "id",
    ),
    "session": SESSION_COLUMNS,
    "run": ("run_id", "run"),
    "member": ("member", "member_id"),
}
"""Names, in any case, of the columns that say what a row is of."""

# First column of FreeSurfer's asegstats2table and aparcstats2table.
_FREESURFER_IDS = re.compile(r"Measure:\w+|[lr]h\.[\w.]+\.\w+")
_LISTED = 8  # contradictions that a message lists
_MOSTLY = 0.5  # share of numbers that makes a column with some text one of numbers


@dataclass(frozen=True, eq=False)
class _Labels:
    """A column of labels: `codes` (N,) int64 into `names`, -1 where missing."""

    codes: np.ndarray
    names: list[str]


@dataclass(frozen=True, eq=False)
class _Rows:
    """What each of the N rows is of.

    `observation` and `member` are (N,) int64, indices into `people` (one row per observation) and
    `member_ids`; `participant` (N,) int64 numbers the participants.
    """

    observation: np.ndarray
    member: np.ndarray
    participant: np.ndarray
    member_ids: tuple[str, ...]
    people: pd.DataFrame


def read_features_table(
    path: Path,
    people: People | None = None,
    *,
    age_column: str = "age",
    sex_column: str = "sex",
    site_column: str = "site",
    features: Sequence[str] | None = None,
    require_age: bool = True,
) -> Cohort:
    """Read a table with one row per participant, or per participant, session, run and member.

    Columns: participant_id; optional session_id, run and member (`ieee` is the baseline); optional
    age (in years, or as its name or a JSON sidecar of the table's name says), sex and site; every
    other column of numbers is a feature. Columns of text are ignored, and so are, with a note,
    numbers that are no measures of the brain by their names (IQ, education, body, identifiers,
    anything called age) or values (almost a function of age, counters, years), see `leaks`; a few
    values of text in a column of numbers count as missing. What the table lacks of age, sex and
    site comes from `people`, also where the two spell ids differently and it is clear who is meant.

    Parameters
    ----------
    path : Path
        TSV, or CSV where the name ends in .csv; FreeSurfer's stats tables are read too.
    people : People, optional
        Of participants.tsv.
    age_column, sex_column, site_column : str
        In the table.
    features, require_age : as `assemble`

    Returns
    -------
    Cohort
        Its `source` (JSON types): "kind" ("table"), "table" (file name), "ignored_columns"
        (reasons by name), "notes"; and what `assemble` adds. Values of the members are as they
        stand in the table; observations are in the order of their first rows.

    Raises
    ------
    TableError
        If the table cannot be read, is damaged or truncated; lacks participant ids, or ages that
        are not in `people` either; has two rows of the same participant, session, run and member;
        or a participant in two sites, of two sexes, or of two ages in one session; or ids that
        could mean several of `people`.
    CohortError
        If one of `features` is missing; if nobody or no feature is left.
    """
    path = Path(path)
    columns = read_header(path)
    keys = _find_keys(path, columns)
    asked = {"age": age_column, "sex": sex_column, "site": site_column}
    own = {
        key: _own_column(path, columns, key, name, people, require_age)
        for key, name in asked.items()
    }
    labels = [name for name in (*keys.values(), *own.values()) if name]
    table = read_columns(path, labels, features)
    notes: list[str] = []
    rows = _index_rows(path, table, keys, people, notes)
    left_out: dict[str, str] = {}
    age_reasons = _fill_people(path, table, rows, own, people, notes)
    if people is not None and require_age and own["age"] is None:
        left_out |= _report_absent(people, rows)
    names, ignored = _feature_columns(table, labels, features, notes)
    values, present = _arrange(table, rows, names)
    del table
    if features is None:
        each = pd.DataFrame(values[:, 0] if values.shape[1] == 1 else values.mean(axis=1))
        leaks = reasons_by_value(each.set_axis(names, axis=1), rows.people)
        ignored |= leaks
        kept = [f for f, name in enumerate(names) if name not in leaks]
        names, values = [names[f] for f in kept], values[:, :, kept] if leaks else values
        _note_leaks(path, ignored, notes)
    found = Gathered(
        rows.people, values, present, rows.member_ids, tuple(names), left_out, age_reasons
    )
    source = {"kind": "table", "table": path.name, "ignored_columns": ignored, "notes": notes}
    return assemble(found, source, "", features=features, require_age=require_age)


def _find_keys(path: Path, columns: Sequence[str]) -> dict[str, str]:
    """Columns that say what a row is of, as the table spells them."""
    found = {key: find_column(columns, usual[0], usual[1:]) for key, usual in KEYS.items()}
    if found["participant"] is None and _FREESURFER_IDS.fullmatch(columns[0]):
        found["participant"] = columns[0]
    if found["participant"] is None:
        raise TableError(
            f"{path}: no column 'participant_id'. It has: {some(columns)}. Name the column of the "
            "participants so."
        )
    return {key: name for key, name in found.items() if name is not None}


def _own_column(
    path: Path, columns: Sequence[str], key: str, name: str, people: People | None, need_age: bool
) -> str | None:
    """Column of age, sex or site in the table itself."""
    if people is None or name == key:
        required = need_age and people is None and key == "age"
        return choose_column(path, columns, key, name, required)
    # A name that was asked for may be that of participants.tsv, which was read before.
    return find_column(columns, name)


def _index_rows(
    path: Path,
    table: pd.DataFrame,
    keys: Mapping[str, str],
    given: People | None,
    notes: list[str],
) -> _Rows:
    participant = _labels(table[keys["participant"]], "sub")
    without = np.flatnonzero(participant.codes < 0) + 2
    if len(without):
        raise TableError(f"{path}: no participant in line {some([str(n) for n in without])}.")
    codes = participant.codes
    parts = [participant]
    for key, entity in (("session", "ses"), ("run", "run")):
        label = _labels(table[keys[key]], entity) if key in keys else _Labels(codes * 0 - 1, [])
        parts.append(label)
        codes = codes * (len(label.names) + 1) + label.codes + 1
    same = match_people(given, parts[0].names, parts[1].names, path.name, notes)
    for label in parts[:2]:
        label.names[:] = [same.get(name, name) for name in label.names]
    observation, kinds = pd.factorize(codes)
    first = np.full(len(kinds), len(codes))
    np.minimum.at(first, observation, np.arange(len(codes)))
    people = pd.DataFrame(
        {
            "participant_id": _texts(parts[0], first),
            "session_id": _texts(parts[1], first),
            "run": _texts(parts[2], first),
        },
        dtype=object,
    )
    names = [
        "_".join(part for part in row if part is not None)
        for row in people.itertuples(index=False, name=None)
    ]
    people["observation"] = pd.Series(names, dtype=object)
    member = np.zeros(len(codes), np.int64)
    ids = (BASELINE,)
    if "member" in keys:
        label = _labels(table[keys["member"]])
        without = np.flatnonzero(label.codes < 0) + 2
        if len(without):
            raise TableError(f"{path}: no member in line {some([str(n) for n in without])}.")
        order, seen = pd.factorize(label.codes)
        ids = tuple(
            BASELINE if label.names[code].lower() == "baseline" else label.names[code]
            for code in seen
        )
        member = order
    rows = _Rows(observation, member, participant.codes, ids, people)
    _check_unique(path, rows, keys)
    return rows


def _check_unique(path: Path, rows: _Rows, keys: Mapping[str, str]) -> None:
    counts = np.bincount(rows.observation * len(rows.member_ids) + rows.member)
    twice = [divmod(int(cell), len(rows.member_ids)) for cell in np.flatnonzero(counts > 1)]
    if not twice:
        return
    names = rows.people["observation"]
    listed = [
        f"{names[who]} member {rows.member_ids[m]}" if "member" in keys else names[who]
        for who, m in twice
    ]
    raise TableError(
        f"{path}: more than one row of: {some(listed)}. Keep one of each, or tell them apart by "
        "the columns session_id, run and member."
    )


def _labels(column: pd.Series, entity: str = "") -> _Labels:
    """Labels without blanks, with the entity's prefix where there is one."""
    codes, given = pd.factorize(column)
    names = [prefixed(name.strip(), entity) if entity else name.strip() for name in given]
    index = {name: at for at, name in enumerate(dict.fromkeys(names))}
    # The last entry is that of code -1, missing.
    known = np.array([index[name] for name in names] + [-1], np.int64)
    return _Labels(known[codes], list(index))


def _texts(label: _Labels, rows: np.ndarray) -> list[str | None]:
    return [None if code < 0 else label.names[code] for code in label.codes[rows]]


def _fill_people(
    path: Path,
    table: pd.DataFrame,
    rows: _Rows,
    own: Mapping[str, str | None],
    people: People | None,
    notes: list[str],
) -> dict[str, str]:
    """Add age, sex and site of each observation; return why ages are missing."""
    frame = rows.people
    names = list(frame["observation"])
    reasons: dict[str, str] = {}
    persons = [
        people.find(participant, session) if people is not None else None
        for participant, session in zip(frame["participant_id"], frame["session_id"], strict=True)
    ]
    for key in ("age", "sex", "site"):
        column = own[key]
        if column is None:
            missing = np.nan if key == "age" else None
            values = [missing if person is None else getattr(person, key) for person in persons]
        else:
            label = _labels(table[column])
            told = _one_each(path, key, _as_numbers(label) if key == "age" else label, rows)
            told = [None if value in MISSING else value for value in told]
            if key == "age":
                values = read_ages(path, column, told, names, reasons, notes)
            elif key == "sex":
                values = read_sexes(path, column, told, notes)
            else:
                values = told
        frame[key] = pd.Series(values, dtype="float64" if key == "age" else object)
    if own["age"] is None and people is not None:
        for name, person in zip(names, persons, strict=True):
            if person is None:
                reasons[name] = f"not in {people.source}, and {path.name} has no ages"
            elif np.isnan(person.age):
                reasons[name] = person.reason or f"no age in {people.source}"
    rows.people.drop(columns="run", inplace=True)
    return reasons


def _one_each(path: Path, key: str, label: _Labels, rows: _Rows) -> list[str | None]:
    """What all rows of an observation say (sex, site: of a participant); None where missing.

    Raises
    ------
    TableError
        If they contradict.
    """
    of = rows.observation if key == "age" else rows.participant
    known = np.flatnonzero(label.codes >= 0)[::-1]
    first = np.full(of.max() + 1, -1)
    first[of[known]] = label.codes[known]  # of several, the last assignment: the first row
    other = known[label.codes[known] != first[of[known]]]
    if len(other):
        listed = []
        for name in dict.fromkeys(rows.people["participant_id"][rows.observation[other[::-1]]]):
            theirs = rows.people["participant_id"][rows.observation[known]].to_numpy() == name
            said = sorted({label.names[code] for code in label.codes[known[theirs]]})
            listed.append(f"{name} ({', '.join(said)})")
            if len(listed) == _LISTED:
                break
        where = " in one session" if key == "age" else ""
        raise TableError(
            f"{path}: more than one {key} of the same participant{where}: {'; '.join(listed)}. "
            f"Correct the table, or choose another column with --{key}-column."
        )
    participant = np.zeros(len(rows.people), np.int64)
    participant[rows.observation] = of
    codes = first[participant]
    return [None if code < 0 else label.names[code] for code in codes]


def _as_numbers(label: _Labels) -> _Labels:
    """Labels of which those that are the same number ("30", "30.0") are one."""
    index: dict[object, int] = {}
    known = []
    names = []
    for name in label.names:
        try:
            key: object = float(name)
        except ValueError:
            key = name
        if key not in index:
            index[key] = len(names)
            names.append(name)
        known.append(index[key])
    return _Labels(np.array([*known, -1], np.int64)[label.codes], names)


def _report_absent(people: People, rows: _Rows) -> dict[str, str]:
    there = set(rows.people["participant_id"])
    return {name: "not in the table" for name in people.participants if name not in there}


def _feature_columns(
    table: pd.DataFrame, labels: Sequence[str], features: Sequence[str] | None, notes: list[str]
) -> tuple[list[str], dict[str, str]]:
    """Names of the features, which are numbers from here on, and why others are ignored."""
    names, ignored = [], {}
    for name in [name for name in table.columns if name not in labels]:
        column = table[name]
        if not pd.api.types.is_numeric_dtype(column) and column.dtype != bool:
            numbers = pd.to_numeric(column, errors="coerce")
            wrong = column[numbers.isna() & column.notna()]
            if column.notna().any() and numbers.notna().sum() < _MOSTLY * column.notna().sum():
                ignored[name] = f"no numbers (such as {str(wrong.iloc[0])!r})"
                continue
            table[name] = numbers
            if len(wrong):
                notes.append(
                    f"column {name!r}: {len(wrong)} values that are no numbers were taken as "
                    f"missing ({some([repr(str(value)) for value in dict.fromkeys(wrong)])})."
                )
        elif column.dtype == bool:
            ignored[name] = "no numbers (true or false)"
            continue
        if features is None and (reason := reason_by_name(name)):
            ignored[name] = reason
            continue
        names.append(name)
    return names, ignored


def _note_leaks(path: Path, ignored: Mapping[str, str], notes: list[str]) -> None:
    listed = [f"{n} ({why})" for n, why in ignored.items() if not why.startswith("no numbers")]
    if listed:
        notes.append(f"{path.name}: left out as no measures of the brain: {some(listed)}.")


def _arrange(
    table: pd.DataFrame, rows: _Rows, names: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Values (R, M, F) float64, NaN where missing, and which members there are, (R, M) bool."""
    shape = (len(rows.people), len(rows.member_ids))
    cell = rows.observation * shape[1] + rows.member
    values = np.full((shape[0] * shape[1], len(names)), np.nan)
    for f, name in enumerate(names):
        values[cell, f] = table[name].to_numpy(np.float64)
    present = np.zeros(shape[0] * shape[1], bool)
    present[cell] = True
    return values.reshape(*shape, len(names)), present.reshape(shape)
