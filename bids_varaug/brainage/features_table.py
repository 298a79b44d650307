"""A table of features made elsewhere (FreeSurfer, ...) as a cohort, also where ids are spelled differently."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from bids_varaug.brainage.cohort import Cohort, Gathered, assemble
from bids_varaug.inputs.leaks import reason_by_name, reasons_by_value
from bids_varaug.inputs.matching import look_up_people, match_people
from bids_varaug.inputs.participants import SESSION_COLUMNS, People, choose_column, read_ages, read_sexes
from bids_varaug.inputs.tables import (
    MISSING,
    PARTICIPANT_COLUMNS,
    TableError,
    find_column,
    prefixed,
    read_columns,
    read_header,
    some,
)
from bids_varaug.models.ensemble import BASELINE

KEYS = {
    "participant": PARTICIPANT_COLUMNS,
    "session": SESSION_COLUMNS,
    "run": ("run_id", "run"),
    "member": ("member", "member_id"),
}
"""Names, in any case, of the columns that say what a row is of."""

ENTITIES = {"participant": "sub", "session": "ses", "run": "run", "member": ""}
# First column of FreeSurfer's asegstats2table and aparcstats2table.
_FREESURFER_IDS = re.compile(r"Measure:\w+|[lr]h\.[\w.]+\.\w+")
_MOSTLY = 0.5  # share of numbers that makes a column with some text one of numbers


def read_features_table(
    path: Path, people: People | None = None, *, age_column: str = "age", sex_column: str = "sex",
    site_column: str = "site", features: Sequence[str] | None = None, require_age: bool = True,
) -> Cohort:  # fmt: skip
    """Read a table with one row per participant, or per participant, session, run and member.

    Columns: participant_id; optional session_id, run and member (`ieee` is the baseline); optional age (in years, or as
    its name or a JSON sidecar of the table's name says), sex and site; every other column of numbers is a feature.
    Columns of text are ignored, and so are, with a note, numbers that do not measure the brain by their names or
    values, see `leaks`; a few values of text in a column of numbers count as missing. What the table lacks of age, sex
    and site comes from `people`, also where the two spell ids differently and it is clear who is meant.

    The table is a TSV, or a CSV where the name ends in .csv; FreeSurfer's tables of stats are read too. `features` and
    `require_age` are as of `assemble`. The `source` of the cohort (JSON types) has "kind" ("table"), "table" (file
    name), "ignored_columns" (reasons by name), "notes"; and what `assemble` adds.

    A TableError says that the table cannot be read, lacks ids or ages, has rows or people twice, or contradicts itself.
    """
    path = Path(path)
    columns = read_header(path)
    keys = {key: find_column(columns, usual[0], usual[1:]) for key, usual in KEYS.items()}
    if keys["participant"] is None and _FREESURFER_IDS.fullmatch(columns[0]):
        keys["participant"] = columns[0]
    if keys["participant"] is None:
        raise TableError(
            f"{path}: no column 'participant_id'. It has: {some(columns)}. Name the column of the participants so."
        )
    wanted = {"age": age_column, "sex": sex_column, "site": site_column}
    own = {key: _own_column(path, columns, key, name, people, require_age) for key, name in wanted.items()}
    labels = [name for name in (*keys.values(), *own.values()) if name]
    table = read_columns(path, labels, features)
    notes: list[str] = []
    rows = _index_rows(path, table, keys, people, notes)
    frame, age_reasons = _fill_people(path, table, rows, own, people, notes)
    left_out = {}
    if people is not None and require_age and own["age"] is None:
        absent = set(people.participants) - set(frame["participant_id"])
        left_out = {name: "not in the table" for name in people.participants if name in absent}
    names, ignored = _feature_columns(table, labels, features is None, notes)
    member, member_ids = pd.factorize(rows["member"])
    shape = (len(frame), len(member_ids))
    values, present = np.full((*shape, len(names)), np.nan), np.zeros(shape, bool)
    present[rows["observation"], member] = True
    for f, name in enumerate(names):
        values[rows["observation"], member, f] = table[name].to_numpy(np.float64)
    del table
    if features is None:
        leaks = reasons_by_value(pd.DataFrame(values.mean(axis=1), columns=names), frame)
        ignored |= leaks
        values = values[:, :, [name not in leaks for name in names]] if leaks else values
        names = [name for name in names if name not in leaks]
        told = [f"{name} ({why})" for name, why in ignored.items() if not why.startswith("no numbers")]
        if told:
            notes.append(f"{path.name}: columns that are not used as features: {some(told)}.")
    found = Gathered(frame, values, present, tuple(member_ids), tuple(names), left_out, age_reasons)
    source = {"kind": "table", "table": path.name, "ignored_columns": ignored, "notes": notes}
    return assemble(found, source, "", features=features, require_age=require_age)


def _own_column(
    path: Path, columns: Sequence[str], key: str, name: str, people: People | None, need_age: bool
) -> str | None:
    """Column of age, sex or site in the table itself."""
    if people is None or name == key:
        return choose_column(path, columns, key, name, required=need_age and people is None and key == "age")
    # A name that was asked for may be that of participants.tsv, which was read before.
    return find_column(columns, name)


def _index_rows(
    path: Path, table: pd.DataFrame, keys: Mapping[str, str | None], people: People | None, notes: list[str]
) -> pd.DataFrame:
    """What each row is of: participant_id, session_id, run, member, observation (number) and its name."""
    rows = pd.DataFrame(index=table.index)
    for key, entity in ENTITIES.items():
        column = keys[key]
        rows[key] = None if column is None else _labels(table[column], entity)
        without = np.flatnonzero(rows[key].isna()) + 2
        if column is not None and len(without) and key in ("participant", "member"):
            raise TableError(f"{path}: no {key} in line {some([str(line) for line in without])}.")
    sessions = set(rows["session"].dropna())
    same = match_people(people, rows["participant"].unique(), sessions, path.name, notes)
    for key in ("participant", "session"):
        rows[key] = rows[key].replace(same)
    baseline = rows["member"].isna() | (rows["member"].str.lower() == "baseline")
    rows["member"] = rows["member"].mask(baseline, BASELINE)
    parts = ["participant", "session", "run"]
    rows["observation"] = rows.groupby(parts, sort=False, dropna=False).ngroup()
    first = rows.drop_duplicates("observation")
    names = ["_".join(part for part in row if part is not None) for row in first[parts].itertuples(index=False)]
    rows["name"] = np.array(names, dtype=object)[rows["observation"]]
    twice = rows[rows.duplicated(["observation", "member"])]
    if len(twice):
        listed = twice["name"] + (" member " + twice["member"] if keys["member"] else "")
        raise TableError(
            f"{path}: more than one row of: {some(list(listed))}. Keep one of each, or distinguish them by the columns "
            "session_id, run and member."
        )
    return rows.rename(columns={"participant": "participant_id", "session": "session_id"})


def _labels(column: pd.Series, entity: str = "") -> pd.Series:
    """Labels without blanks, with the entity's prefix where there is one; None where missing."""
    known = {given: given.strip() for given in column.dropna().unique() if given.strip() not in MISSING}
    labels = {given: prefixed(label, entity) if entity else label for given, label in known.items()}
    return pd.Series([labels.get(given) for given in column], index=column.index, dtype=object)


def _fill_people(
    path: Path, table: pd.DataFrame, rows: pd.DataFrame, own: Mapping[str, str | None], people: People | None,
    notes: list[str],
) -> tuple[pd.DataFrame, dict[str, str]]:  # fmt: skip
    """Observations with age, sex and site, and why ages are missing."""
    frame = rows.drop_duplicates("observation", ignore_index=True)[["participant_id", "session_id", "name"]]
    frame, reasons = look_up_people(frame.rename(columns={"name": "observation"}), people, {})
    for key, column in own.items():
        if column is None:
            continue
        told = _one_each(path, key, _labels(table[column]), rows)
        if key == "age":
            reasons = {}
            frame["age"] = read_ages(path, column, told, list(frame["observation"]), reasons, notes)
        else:
            values = read_sexes(path, column, told, notes) if key == "sex" else told
            frame[key] = pd.Series(values, dtype=object)
    return frame, reasons


def _one_each(path: Path, key: str, values: pd.Series, rows: pd.DataFrame) -> list[str | None]:
    """What all rows of an observation say (sex, site: of a participant), if they agree; None where missing."""
    if key == "age":  # "30" and "30.0" are the same
        numbers = {text: pd.to_numeric(text, errors="coerce") for text in values.dropna().unique()}
        first: dict[object, str] = {}
        same = {text: first.setdefault(text if np.isnan(n) else n, text) for text, n in numbers.items()}
        values = values.map(same)
    owner = "observation" if key == "age" else "participant_id"
    known = rows[["participant_id", "observation"]].assign(value=values).dropna(subset="value")
    said = known.groupby(owner)["value"]
    contradicting = known[said.transform("nunique") > 1]
    if len(contradicting):
        people = contradicting.groupby("participant_id", sort=False)["value"].unique()
        listed = [f"{name} ({', '.join(sorted(values))})" for name, values in people.items()]
        raise TableError(
            f"{path}: more than one {key} of the same participant{' in one session' if key == 'age' else ''}: "
            f"{some(listed, '; ')}. Correct the table, or choose another column with --{key}-column."
        )
    one = said.first().to_dict()
    return [one.get(who) for who in rows.drop_duplicates("observation")[owner]]


def _feature_columns(
    table: pd.DataFrame, labels: Sequence[str], by_name: bool, notes: list[str]
) -> tuple[list[str], dict[str, str]]:
    """Names of the features, which are numbers from here on, and why others are ignored."""
    names, ignored = [], {}
    for name in [name for name in table.columns if name not in labels]:
        column = table[name]
        if column.dtype == bool:
            ignored[name] = "no numbers (true or false)"
        elif not pd.api.types.is_numeric_dtype(column):
            numbers = pd.to_numeric(column, errors="coerce")
            wrong = column[numbers.isna() & column.notna()]
            if column.notna().any() and numbers.notna().sum() < _MOSTLY * column.notna().sum():
                ignored[name] = f"no numbers (such as {str(wrong.iloc[0])!r})"
                continue
            table[name] = numbers
            if len(wrong):
                notes.append(
                    f"column {name!r}: {len(wrong)} values that are not numbers were taken as missing "
                    f"({some([repr(str(value)) for value in dict.fromkeys(wrong)])})."
                )
        if name not in ignored and by_name and (reason := reason_by_name(name)):
            ignored[name] = reason
        if name not in ignored:
            names.append(name)
    return names, ignored
