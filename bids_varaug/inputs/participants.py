"""Who the participants are: age, sex and site from participants.tsv and the sessions' tables."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from bids_varaug.errors import NoInputError
from bids_varaug.inputs.scans import datalad_command
from bids_varaug.inputs.tables import (
    MISSING,
    TableError,
    TextTable,
    find_column,
    plain_name,
    read_text_table,
    some,
)

DEFAULT_COLUMNS = {"age": "age", "sex": "sex", "site": "site"}
USUAL_COLUMNS = {
    "age": ("age_at_scan", "age_at_mri", "scan_age", "age_years", "age_in_years"),
    "sex": ("gender", "biological_sex", "sex_at_birth"),
    "site": (
        "site_id", "scan_site", "scanner_site", "scanning_site", "acquisition_site", "mri_site",
        "study_site", "site_name", "center", "centre", "center_id", "centre_id", "institution",
        "institution_name", "scanner", "scanner_id",
    ),
}  # fmt: skip
SESSION_COLUMNS = ("session_id", "session", "ses", "session_label")
VISIT_COLUMNS = ("visit", "visit_id", "visit_name", "wave", "timepoint", "timepoint_id", "tp")
FLAGS = {"age": "--age-column", "sex": "--sex-column", "site": "--site-column"}

_SEX_OF = dict.fromkeys("f female woman girl w".split(), "F")
_SEX_OF |= dict.fromkeys("m male man boy".split(), "M")
_SEX_OF |= dict.fromkeys("o other intersex nonbinary diverse".split(), "O")
_COLUMNS = ["participant_id", "session_id", "age", "sex", "site"]


@dataclass(frozen=True)
class Person:
    """What is known of a participant at a session; `reason` says why `age` is NaN."""

    age: float
    sex: str | None
    site: str | None
    reason: str = ""


@dataclass(frozen=True, eq=False)
class People:
    """Participants of a dataset.

    Parameters
    ----------
    table : one row per participant and, where sessions have an age of their own, per session:
        `participant_id` (``sub-01``), `session_id` (``ses-1``; None for all other sessions),
        `age` in years (float64, NaN where there is none), `sex` ("F", "M", "O" or None), `site`
        (str or None)
    left_out : why an age is missing, by participant (``sub-01``) or session (``sub-01_ses-1``)
    notes : what was taken otherwise than as it stands ("89+" as 89, ...)
    source : the file, as messages name it
    """

    table: pd.DataFrame
    left_out: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    source: str = "participants.tsv"

    def find(self, participant_id: str, session_id: str | None = None) -> Person | None:
        """Person at that session, else at any; None where the participant is not listed."""
        anyway = self._persons.get((participant_id, None))
        return self._persons.get((participant_id, session_id), anyway)

    @property
    def participants(self) -> list[str]:
        """Participants in the order of the file."""
        return list(dict.fromkeys(self.table["participant_id"]))

    @cached_property
    def _persons(self) -> dict[tuple[str, str | None], Person]:
        return {
            (participant, session): Person(
                *known, reason=self.left_out.get(_name(participant, session), "")
            )
            for participant, session, *known in self.table[_COLUMNS].itertuples(index=False)
        }


def read_people(
    bids_dir: Path,
    *,
    age_column: str = "age",
    sex_column: str = "sex",
    site_column: str = "site",
    require_age: bool = True,
    only: str | None = None,
) -> People:
    """Read participants.tsv, its sidecar, and the sessions' tables that have ages.

    Ages are in years unless ``participants.json`` gives other Units or the column's name ends in
    one. The age in ``sub-*/sub-*_sessions.tsv``, where there is one, goes before that of
    participants.tsv. Columns are found in any case; where `sex_column` and so on are the defaults
    and absent, the usual names are tried (gender, scanner_site, ...). Codes of the sex are read
    where their meaning is plain, or where ``Levels`` of the sidecar explain them.

    Parameters
    ----------
    bids_dir : Path
        A raw dataset; images are not looked at.
    age_column, sex_column, site_column : str
    require_age : False to read whoever is there, with or without age
    only : read the table of sessions of this participant (``sub-01``) and of nobody else

    Raises
    ------
    NoInputError
        If there is no participants.tsv (unless `require_age` is False: then there are no people).
    TableError
        If a table or sidecar is damaged; a participant is listed twice, or in two sites; the age
        column is absent and required, or a column that was asked for by name is.
    """
    path = Path(bids_dir) / "participants.tsv"
    if not path.is_file():
        if not require_age:
            return People(_table([]))
        fetch = f" To fetch it: {datalad_command(path.parent, [path.name])}"
        raise NoInputError(
            f"{path}: is not there. The group level needs it, with the columns participant_id and "
            f"age (sex and site are optional).{fetch if path.is_symlink() else ''}"
        )
    table = read_text_table(path)
    sidecar = path.with_suffix(".json")
    participants = _participants(table)
    wanted = {"age": age_column, "sex": sex_column, "site": site_column}
    columns = {key: choose_column(table, key, name) for key, name in wanted.items()}
    if columns["age"] is None and require_age:
        raise missing_age_column(table, age_column)
    sites = table.column(columns["site"]) if columns["site"] else [None] * len(participants)
    _check_sites(path, participants, sites)
    sessions = _session_column(table, participants)
    names = list(map(_name, participants, sessions))
    _check_unique(path, names)
    notes: list[str] = []
    sexes = read_sexes(table, columns["sex"], sidecar, notes)
    left_out: dict[str, str] = {}
    ages = read_ages(table, columns["age"], sidecar, names, left_out, notes)
    people = list(zip(participants, sessions, ages, sexes, sites, strict=True))
    rows = {row[:2]: row for row in people}
    first = {row[0]: row for row in reversed(people)}
    for participant in sorted({only} & first.keys() if only else first):
        tsv = Path(bids_dir, participant, f"{participant}_sessions.tsv")
        for session, age in _session_ages(tsv, age_column, left_out, notes):
            rows[participant, session] = (participant, session, age, *first[participant][3:])
            if not math.isnan(age):
                left_out.pop(participant, None)
    return People(_table(rows.values()), left_out, tuple(notes))


def choose_column(table: TextTable, key: str, wanted: str) -> str | None:
    """Column of the age, sex or site (`key`) in a table; None where it has none.

    Raises
    ------
    TableError
        If a name other than the default was asked for and is absent.
    """
    by_default = wanted == DEFAULT_COLUMNS[key]
    found = find_column(table.columns, wanted, USUAL_COLUMNS[key] if by_default else ())
    if found is None and not by_default:
        raise _missing_column(table, f"{wanted!r} ({FLAGS[key]})")
    return found


def missing_age_column(table: TextTable, wanted: str) -> TableError:
    """Error that says which columns there are."""
    return _missing_column(table, repr(wanted), " Name the one of the ages with --age-column.")


def _missing_column(table: TextTable, wanted: str, hint: str = "") -> TableError:
    return TableError(
        f"{table.path}: no column {wanted}. It has: {', '.join(table.columns)}.{hint}"
    )


def read_ages(
    table: TextTable,
    column: str | None,
    sidecar: Path,
    names: Sequence[str],
    left_out: dict[str, str],
    notes: list[str],
) -> list[float]:
    """Ages in years, NaN where there is none; why, goes to `left_out`, what was capped to `notes`.

    Parameters
    ----------
    names : of the rows, for messages
    """
    if column is None:
        return [math.nan] * len(table.rows)
    unit = age_unit(column, sidecar)
    if unit != "years":
        notes.append(f"{table.path.name}: ages in {unit} were turned into years.")
    ages, capped = [], []
    for name, value in zip(names, table.column(column), strict=True):
        age = parse_age(value, unit)
        ages.append(age.years)
        if age.reason:
            left_out[name] = f"{table.path.name}, column {column!r}: {age.reason}"
        if age.capped:
            capped.append(f"{name} ({value})")
    if capped:
        notes.append(f"{table.path.name}: lower bounds were taken as ages: {some(capped)}.")
    return ages


def read_sexes(
    table: TextTable, column: str | None, sidecar: Path, notes: list[str]
) -> list[str | None]:
    """Sexes ("F", "M", "O"), None where missing or where a code could mean either."""
    if column is None:
        return [None] * len(table.rows)
    levels = sidecar_value(sidecar, column, "levels")
    explained = {}
    for code, meaning in levels.items() if isinstance(levels, dict) else ():
        text = meaning.get("Description") if isinstance(meaning, dict) else meaning
        explained[str(code)] = _SEX_OF.get(plain_name(str(text)))
    values = table.column(column)
    sexes = [
        None if value is None else explained.get(value) or _SEX_OF.get(plain_name(value))
        for value in values
    ]
    unclear = Counter(v for v, sex in zip(values, sexes, strict=True) if v and sex is None)
    if unclear:
        notes.append(
            f"{table.path.name}: {column!r} has codes of unknown meaning, taken as missing: "
            f"{some([f'{value!r} ({count})' for value, count in unclear.items()])}. Explain them "
            f"as Levels in {sidecar.name}."
        )
    return sexes


def prefixed(label: str, entity: str = "sub") -> str:
    """Label with its prefix, in small letters.

    Examples
    --------
    >>> prefixed("01"), prefixed("SUB-01"), prefixed("1", "ses")
    ('sub-01', 'sub-01', 'ses-1')
    """
    return f"{entity}-{re.sub(f'^{entity}-', '', label, flags=re.IGNORECASE)}"


def _participants(table: TextTable) -> list[str]:
    column = find_column(table.columns, "participant_id")
    if column is None:
        raise _missing_column(table, "'participant_id'")
    labels = table.column(column)
    without = [f"row {at + 1}" for at, label in enumerate(labels) if label is None]
    if without:
        raise TableError(f"{table.path}: no participant_id in {some(without)}.")
    return [prefixed(label) for label in labels]


def _session_column(table: TextTable, participants: list[str]) -> list[str | None]:
    """Sessions of a participants.tsv with a row per session, which some datasets have."""
    column = find_column(table.columns, SESSION_COLUMNS[0], SESSION_COLUMNS + VISIT_COLUMNS)
    # Where nobody has two rows, a column called "session" may as well count them.
    if column is None or column != "session_id" and len(set(participants)) == len(participants):
        return [None] * len(participants)
    return [None if s is None else prefixed(s, "ses") for s in table.column(column)]


def _name(participant: str, session: str | None) -> str:
    return participant if session is None else f"{participant}_{session}"


def _check_sites(path: Path, participants: list[str], sites: list[str | None]) -> None:
    at: dict[str, set[str]] = {}
    for participant, site in zip(participants, sites, strict=True):
        at.setdefault(participant, set()).update([site] if site else [])
    two = [f"{name} ({', '.join(sorted(found))})" for name, found in at.items() if len(found) > 1]
    if two:
        raise TableError(
            f"{path}: in more than one site: {some(two)}. A participant belongs to one site; "
            "give people scanned at several sites one of them, or different ids."
        )


def _check_unique(path: Path, names: list[str]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        hint = "Keep one row of each, or name the column that tells the rows apart session_id."
        raise TableError(f"{path}: listed more than once: {some(twice)}. {hint}")


def _session_ages(tsv: Path, age_column: str, left_out, notes) -> list[tuple[str, float]]:
    """Sessions whose age the table tells, well or not; sessions of missing age are not named."""
    if not os.path.isfile(tsv):
        return []
    table = read_text_table(tsv)
    ages_in = find_column(table.columns, age_column, USUAL_COLUMNS["age"])
    sessions_in = find_column(table.columns, SESSION_COLUMNS[0], SESSION_COLUMNS)
    if ages_in is None or sessions_in is None:
        return []
    sidecar = tsv.with_suffix(".json")
    if not sidecar.is_file():
        sidecar = tsv.parents[1] / "sessions.json"  # inherited
    needed = [table.columns.index(name) for name in (sessions_in, ages_in)]
    told = [row for row in table.rows if not any(row[at] in MISSING for at in needed)]
    table = TextTable(tsv, table.columns, told)
    sessions = [prefixed(session, "ses") for session in table.column(sessions_in)]
    names = [_name(tsv.parent.name, session) for session in sessions]
    _check_unique(tsv, names)
    for name in names:
        left_out.pop(name, None)  # what participants.tsv lacks is told here
    ages = read_ages(table, ages_in, sidecar, names, left_out, notes)
    return list(zip(sessions, ages, strict=True))


def _table(rows: Iterable[tuple]) -> pd.DataFrame:
    return pd.DataFrame(list(rows), columns=_COLUMNS, dtype=object).astype({"age": "float64"})


# Lengths of the Julian year, as UCUM has them.
YEARS_PER = {"years": 1.0, "months": 1 / 12, "weeks": 7 / 365.25, "days": 1 / 365.25}
OLDEST = 120.0  # years; more is a code such as 999, or another unit

_UNIT_OF = dict.fromkeys("years year yrs yr y a annum yo".split(), "years")
_UNIT_OF |= dict.fromkeys("jahre jahren ans annees anni anos jaar".split(), "years")
_UNIT_OF |= dict.fromkeys(
    "months month mos mo mon mths mth m monate monaten mois".split(), "months"
)
_UNIT_OF |= dict.fromkeys("weeks week wks wk w wochen semaines".split(), "weeks")
_UNIT_OF |= dict.fromkeys("days day d tage tagen jours".split(), "days")
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")  # of age_months, AgeMonths
# What may stand before a unit: "Age at scan, in completed years"; not "light years", "5-year bins".
_BEFORE = re.compile(
    r"(\W|\b(ages?|alter|edad|as|at|of|in|en|the|time|date|scan\w*|mri|session|visit|numbers?|units?|"
    r"subjects?|participa\w*|s|is|full|whole|complete\w*|calendar|decimal|exact|chronological)\b)*"
)
# What makes another quantity of it: "year of birth", "years since diagnosis", "years - 50".
_OTHER = re.compile(
    r"^\W*(of (?!age)|(since|after|before|until|till|post)\b)|^ *(from|to (?!the|near|one|two|\d))|"
    r"^\W{0,3}[-+−–] *\d|[*×·÷^]|/ *\d|\bx *\d|\b(birth|born|bins?\b|group|categor|decade|log|"
    r"minus|times|divid|multipl|scor|standardi|normali|cente?red|educ|diagnos|onset|durati|predict|brain)"
)
_NUMBER = re.compile(
    r"(?P<more>>=?|≥)?\s*(?P<number>[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?)\s*(?P<plus>\+)?"
    r"\s*(?P<unit>[a-z][a-z ]*)?",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Age:
    """An age in years, or why there is none.

    `years` is NaN where `reason` is given; `capped` says that the value was a lower bound ("89+").
    """

    years: float
    reason: str = ""
    capped: bool = False


def parse_age(value: str | None, unit: str = "years") -> Age:
    """Read one value of a column of ages.

    Parameters
    ----------
    value : str or None
        A number, which may be followed by its own unit ("034Y" as in DICOM, "18 months") or be a
        lower bound ("89+", ">89"), of which the bound is taken.
    unit : str
        Of numbers without one: a key of `YEARS_PER`.

    Examples
    --------
    >>> parse_age("30", "months").years, parse_age("89+").years, parse_age("034Y").years
    (2.5, 89.0, 34.0)
    >>> parse_age("young").reason
    "'young' is no number"
    """
    if value is None:
        return Age(math.nan, "no age (n/a)")
    match = _NUMBER.fullmatch(value.strip())
    own = _read_unit(match["unit"]) if match and match["unit"] else unit
    if match is None or own is None:
        return Age(math.nan, f"{value!r} is no number")
    years = float(match["number"]) * YEARS_PER[own]
    if not 0 <= years <= OLDEST:
        return Age(math.nan, f"{value!r} is no age in {own} (0 to {OLDEST:g} years)")
    return Age(years, capped=bool(match["more"] or match["plus"]))


def age_unit(column: str, sidecar: Path) -> str:
    """Unit of a column of ages: a key of `YEARS_PER`.

    ``Units`` of the column in the JSON sidecar; else what the column's name ends in
    ("age_months"); else years, as BIDS says.

    Parameters
    ----------
    column : str
        As the table spells it.
    sidecar : Path
        Need not exist.

    Raises
    ------
    TableError
        If the sidecar is damaged or names a unit that is not known.
    """
    given = sidecar_value(sidecar, column, "units", "unit")
    if given not in (None, "", "n/a"):
        if (unit := _read_unit(str(given))) is None:
            raise TableError(
                f"{sidecar}: Units {given!r} of {column!r} is not known. Write years, months, "
                "weeks or days."
            )
        return unit
    words = [word.lower() for word in _WORD.findall(column)]
    # One letter of a name is not enough to go by; a singular ("age_day1") only at its end.
    told = [w for w in words[:-1] if w in YEARS_PER] + [w for w in words[-1:] if len(w) > 1]
    return next((_UNIT_OF[word] for word in reversed(told) if word in _UNIT_OF), "years")


def _read_unit(text: str) -> str | None:
    """The first unit of a text; None where the rest makes another quantity or unit of it."""
    if (plain := re.sub("^agein|old$", "", plain_name(text))) in _UNIT_OF:
        return _UNIT_OF[plain]
    skipped = r"(since|from|date of) birth|(the|same|scan) (day|month)\b|\(s\)|_"
    text = re.sub(skipped, " ", text.lower())
    words = re.finditer(r"[^\W\d_]([^\W\d_]|[\u0300-\u036f])+", text)
    units = {w.span(): _UNIT_OF[n] for w in words if (n := plain_name(w[0])) in _UNIT_OF}
    start, end = next(iter(units), (0, 0))
    told = len(set(units.values())) == 1 and _BEFORE.fullmatch(text[:start])
    return units[start, end] if told and not _OTHER.search(text[end:]) else None


def sidecar_value(path: Path, column: str, *keys: str) -> Any:
    """What a JSON sidecar says of a column under one of `keys`, in any case; None where nothing.

    Raises
    ------
    TableError
        If the sidecar is there and damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise TableError(f"{path}: cannot read it as JSON ({error}). Mend or remove it.") from error
    for wanted in ([plain_name(column)], keys):
        items = content.items() if isinstance(content, dict) else ()
        content = next((value for name, value in items if plain_name(name) in wanted), None)
    return content
