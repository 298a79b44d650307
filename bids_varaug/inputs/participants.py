"""Who the participants are: age, sex and site from participants.tsv and the sessions' tables, and sessions in time."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from bids_varaug.errors import NoInputError, UserError
from bids_varaug.inputs.scans import datalad_command, natural_key
from bids_varaug.inputs.tables import TableError, find_column, plain_name, prefixed, read_text_table, some

USUAL_COLUMNS = {
    "age": "age_at_scan age_at_mri scan_age age_years age_in_years".split(),
    "sex": "gender biological_sex sex_at_birth".split(),
    "site": "site_id scan_site scanner_site scanning_site acquisition_site mri_site study_site site_name center centre "
    "center_id centre_id institution institution_name scanner scanner_id".split(),
}
SESSION_COLUMNS = ("session_id", "session", "ses", "session_label")
VISIT_COLUMNS = ("visit", "visit_id", "visit_name", "wave", "timepoint", "timepoint_id", "tp")

_SEXES = {"F": "f female woman girl w", "M": "m male man boy", "O": "o other intersex nonbinary diverse"}
_SEX_OF = {word: sex for sex, words in _SEXES.items() for word in words.split()}
_COLUMNS = ["participant_id", "session_id", "age", "sex", "site"]

OLDEST = 120.0  # years; more is a code such as 999, or another unit
# Length in (Julian) years, as UCUM has it, and spellings.
_UNITS = {
    "years": (1.0, "years year yrs yr y a annum yo jahre jahren ans annees anni anos jaar"),
    "months": (1 / 12, "months month mo mos mon mths mth m monate monaten mois"),
    "weeks": (7 / 365.25, "weeks week wks wk w wochen semaines"),
    "days": (1 / 365.25, "days day d tage tagen jours"),
}
_UNIT_OF = {word: unit for unit, (_, words) in _UNITS.items() for word in words.split()}
# What may stand beside a unit: "Age at scan, in completed years"; not "light years", "years since diagnosis".
_FILLER = re.compile(
    r"\b((since|date of) birth|of age|(time|day|date|numbers?) of|ages?|alter|edad|old|as|at|in|en|on|the|same|time|"
    r"scan\w*|mri|first|session|visit|units?|is|full|whole|complete\w*|calendar|decimal|exact|chronological)\b"
)
# What makes another quantity of it in a comment: "year (of birth)", "years, mean-centered".
_OTHER = re.compile(
    r"birth|born|bins?\b|group|categor|decade|log|minus|plus|times|divid|multipl|scor|standardi|normali|cente?red|educ|"
    r"diagnos|onset|durati|predict|brain|since|after|before|until|[*×·÷^/+]|(?<!\d)[-−–] *\d"
)
_NUMBER = re.compile(
    r"(?i)(?P<more>>=?|≥)?\s*(?P<number>[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?)\s*(?P<plus>\+)?\s*(?P<unit>[a-z][a-z ]*)?"
)


class Person(NamedTuple):
    """What is known of a participant at a session; `reason` says why `age` is NaN."""

    age: float
    sex: str | None
    site: str | None
    reason: str = ""


@dataclass(frozen=True, eq=False)
class People:
    """Participants of a dataset.

    `table` has one row per participant and, where sessions have an age of their own, per session: `participant_id`
    (``sub-01``), `session_id` (``ses-1``; None for all other sessions), `age` in years (float64, NaN where there is
    none), `sex` ("F", "M", "O" or None), `site` (str or None).
    """

    table: pd.DataFrame
    left_out: dict[str, str] = field(default_factory=dict)  # why an age is missing, by ``sub-01`` or ``sub-01_ses-1``
    notes: tuple[str, ...] = ()  # values that were interpreted ("89+" as 89, ...)
    source: str = "participants.tsv"  # as messages name it

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
        rows = self.table[_COLUMNS].itertuples(index=False, name=None)
        return {
            (participant, session): Person(age, sex, site, self.left_out.get(_name(participant, session), ""))
            for participant, session, age, sex, site in rows
        }


NOBODY = People(pd.DataFrame(columns=_COLUMNS))


def read_people(
    bids_dir: Path, *, age_column: str = "age", sex_column: str = "sex", site_column: str = "site",
    require_age: bool = True, only: str | None = None,
) -> People:  # fmt: skip
    """Read participants.tsv, its sidecar, and the sessions' tables that have ages, which take precedence.

    See `choose_column`, `read_ages` and `read_sexes` for what columns and values are understood. Without `require_age`,
    whoever is there is read, with or without age, and nobody where there is no participants.tsv; else that is a
    `NoInputError`. What is damaged, lacks a column or contradicts itself is a `TableError`. `only` this participant's
    (``sub-01``) table of sessions is read.
    """
    path = Path(bids_dir) / "participants.tsv"
    if not path.is_file():
        if not require_age:
            return NOBODY
        fetch = f" To fetch it: {datalad_command(path.parent, [path.name])}" if path.is_symlink() else ""
        need = "Brain age needs it, with the columns participant_id and age (sex and site are optional)"
        raise NoInputError(f"{path}: not found. {need}.{fetch}")
    table = read_text_table(path)
    age, sex, site = (
        choose_column(path, table.columns, key, name, required=require_age and key == "age")
        for key, name in {"age": age_column, "sex": sex_column, "site": site_column}.items()
    )
    if (column := find_column(table.columns, "participant_id")) is None:
        raise _missing_column(path, table.columns, "participant_id")
    if without := [f"row {at + 1}" for at, label in enumerate(table[column]) if label is None]:
        raise TableError(f"{path}: no participant_id in {some(without)}.")
    participants = [prefixed(label) for label in table[column]]
    sessions = _sessions(table, participants)
    nothing: list[Any] = [None] * len(table)
    sites = list(table[site]) if site else nothing
    at = pd.Series(sites, participants, dtype=object).dropna().groupby(level=0).unique()
    if two := [f"{name} ({', '.join(sorted(found))})" for name, found in at.items() if len(found) > 1]:
        raise TableError(
            f"{path}: more than one site: {some(two)}. A participant belongs to one site; give people scanned at "
            "several sites one of them, or different ids."
        )
    names = list(map(_name, participants, sessions))
    _check_unique(path, names)
    notes: list[str] = []
    left_out: dict[str, str] = {}
    sexes = read_sexes(path, sex, table[sex], notes) if sex else nothing
    ages = read_ages(path, age, table[age], names, left_out, notes) if age else nothing
    people = list(zip(participants, sessions, ages, sexes, sites, strict=True))
    rows = {person[:2]: person for person in people}
    anyway = {person[0]: person for person in reversed(people)}
    for participant in sorted({only} & anyway.keys() if only else anyway):
        tsv = Path(bids_dir, participant, f"{participant}_sessions.tsv")
        for session, years in _session_ages(tsv, age_column, left_out, notes).items():
            rows[participant, session] = (participant, session, years, *anyway[participant][3:])
            if not math.isnan(years):
                left_out.pop(participant, None)
    everybody = pd.DataFrame(list(rows.values()), columns=_COLUMNS, dtype=object)
    return People(everybody.astype({"age": "float64"}), left_out, tuple(notes))


def choose_column(path: Path, columns: Sequence[str], key: str, wanted: str, required: bool = False) -> str | None:
    """Column of the age, sex or site (`key`) in a table, see `find_column`; None where it has none.

    Where `wanted` is the default, which is `key`, the usual names are tried too (gender, scanner_site, ...). Raises
    `TableError` if the column is absent, and is required or was asked for by another name than the default.
    """
    found = find_column(columns, wanted, USUAL_COLUMNS[key] if wanted == key else ())
    if found is None and (required or wanted != key):
        raise _missing_column(path, columns, wanted, f" Choose one with --{key}-column.")
    return found


def read_ages(
    path: Path, column: str, values: Iterable[str | None], names: Sequence[str], left_out: dict[str, str],
    notes: list[str], sidecar: Path | None = None,
) -> list[float]:  # fmt: skip
    """Read a column of ages in years; NaN where the age is missing, with the reason in `left_out`, by name of the row.

    The unit is that of an age itself ("034Y"), else that of the sidecar (by default the table's), else that in the
    column's name, else years. `notes` takes conversions and lower bounds ("89+") that were taken as ages. Raises
    `TableError` if the sidecar is damaged or names a unit that is not known.
    """
    unit = _age_unit(column, sidecar or path.with_suffix(".json"))
    if unit != "years":
        notes.append(f"{path.name}: ages in {unit} were converted to years.")
    ages, bounds = [], []
    for name, value in zip(names, values, strict=True):
        try:
            age, is_bound = _parse_age(value, unit)
        except ValueError as error:
            age, is_bound = math.nan, False
            left_out[name] = f"{path.name}, column {column!r}: {error}"
        ages.append(age)
        bounds += [f"{name} ({value})"] * is_bound
    if bounds:
        notes.append(f"{path.name}: lower bounds were taken as ages: {some(bounds)}.")
    return ages


def _parse_age(value: str | None, unit: str) -> tuple[float, bool]:
    """One age in years, and whether it is a lower bound; a ValueError says why it is none.

    >>> _parse_age("30", "months"), _parse_age("89+", "years"), _parse_age("034Y", "years")
    ((2.5, False), (89.0, True), (34.0, False))
    """
    if value is None:
        raise ValueError("no age (n/a)")
    match = _NUMBER.fullmatch(value.strip())
    own = _read_unit(match["unit"]) if match and match["unit"] else unit
    if match is None or own is None:
        raise ValueError(f"{value!r} is not a number")
    years = float(match["number"]) * _UNITS[own][0]
    if not 0 <= years <= OLDEST:
        raise ValueError(f"{value!r} is not an age in {own} (0 to {OLDEST:g} years)")
    return years, bool(match["more"] or match["plus"])


def _age_unit(column: str, sidecar: Path) -> str:
    """Units of the sidecar; else the name's ("age_months"); else years."""
    given = _sidecar_value(sidecar, column, "units", "unit")
    if given not in (None, "", "n/a"):
        if (unit := _read_unit(str(given))) is None:
            known = "Write years, months, weeks or days."
            raise TableError(f"{sidecar}: Units {given!r} of {column!r} is not known. {known}")
        return unit
    words = [word.lower() for word in re.findall("[A-Z]?[a-z]+|[A-Z]+", column)]  # age_months, AgeMonths
    # One letter of a name is not enough to go by; a singular ("age_day1") only at its end.
    candidates = [w for w in words[:-1] if w in _UNITS] + [w for w in words[-1:] if len(w) > 1]
    return next((_UNIT_OF[word] for word in reversed(candidates) if word in _UNIT_OF), "years")


def _read_unit(text: str) -> str | None:
    """The unit that a text begins with; None where the rest makes another quantity or unit of it."""
    text = _FILLER.sub("", text.lower().replace("_", " ")).lstrip(" ([,.;:")
    head, *comments = re.split(r"[(\[,.;:]", text)
    unit, comment = _UNIT_OF.get(plain_name(head)), " ".join(comments)
    others = {_UNIT_OF.get(word, unit) for word in re.findall(r"[^\W\d_]{2,}", comment)} - {unit}
    return None if others or _OTHER.search(comment) else unit


def read_sexes(path: Path, column: str, values: Sequence[str | None], notes: list[str]) -> list[str | None]:
    """Read a column of sexes: "F", "M", "O"; None where missing or where a code could mean either.

    Codes are read where their meaning is plain, or where ``Levels`` of the table's JSON sidecar explain them. `notes`
    takes those of unknown meaning. Raises `TableError` if the sidecar is damaged.
    """
    levels = _sidecar_value(path.with_suffix(".json"), column, "levels")
    explained = {}
    for code, meaning in levels.items() if isinstance(levels, dict) else ():
        text = meaning.get("Description") if isinstance(meaning, dict) else meaning
        explained[code] = _SEX_OF.get(plain_name(str(text)))
    counts = Counter(value for value in values if value is not None)
    sex_of = {code: explained.get(code) or _SEX_OF.get(plain_name(code)) for code in counts}
    if unclear := [f"{code!r} ({n})" for code, n in counts.items() if sex_of[code] is None]:
        notes.append(
            f"{path.name}: {column!r} has codes of unknown meaning, taken as missing: {some(unclear)}. Explain them as "
            f"Levels in {path.with_suffix('.json').name}."
        )
    return [value and sex_of[value] for value in values]


def _sidecar_value(path: Path, column: str, *keys: str) -> Any:
    """What a JSON sidecar says of a column under one of `keys`, in any case; None where nothing."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise TableError(f"{path}: not readable JSON ({error}). Correct or remove it.") from error
    for wanted in ([plain_name(column)], keys):
        items = content.items() if isinstance(content, dict) else ()
        content = next((value for name, value in items if plain_name(name) in wanted), None)
    return content


def _name(participant: str, session: str | None) -> str:
    return participant if session is None else f"{participant}_{session}"


def _missing_column(path: Path, columns: Sequence[str], wanted: str, hint: str = "") -> TableError:
    return TableError(f"{path}: no column {wanted!r}. It has: {', '.join(columns)}.{hint}")


def _sessions(table: pd.DataFrame, participants: list[str]) -> list[str | None]:
    """Sessions of a participants.tsv with a row per session, which some datasets have."""
    column = find_column(table.columns, SESSION_COLUMNS[0], SESSION_COLUMNS + VISIT_COLUMNS)
    # Where nobody has two rows, a column called "session" may as well count them.
    if column is None or (column != "session_id" and len(set(participants)) == len(participants)):
        return [None] * len(participants)
    return [label and prefixed(label, "ses") for label in table[column]]


def _session_ages(tsv: Path, age_column: str, left_out: dict[str, str], notes: list[str]) -> dict[str, float]:
    """Ages by session, NaN where one cannot be read; sessions without one are left out."""
    if not tsv.is_file():
        return {}
    try:
        table = read_text_table(tsv)
    except TableError as error:
        notes.append(f"{error} Ages were not looked for there.")
        return {}
    age = find_column(table.columns, age_column, USUAL_COLUMNS["age"])
    session = find_column(table.columns, SESSION_COLUMNS[0], SESSION_COLUMNS)
    if age is None or session is None:
        return {}
    table = table.dropna(subset=[session, age])
    sessions = [prefixed(label, "ses") for label in table[session]]
    names = [_name(tsv.parent.name, label) for label in sessions]
    _check_unique(tsv, names)
    for name in names:
        left_out.pop(name, None)  # not missing after all
    own, inherited = tsv.with_suffix(".json"), tsv.parents[1] / "sessions.json"
    sidecar = own if own.is_file() else inherited
    return dict(zip(sessions, read_ages(tsv, age, table[age], names, left_out, notes, sidecar), strict=True))


def _check_unique(path: Path, names: list[str]) -> None:
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise TableError(
            f"{path}: listed more than once: {some(twice)}. Keep one row of each, or name the column that "
            "distinguishes the rows session_id."
        )


def order_sessions(bids_dir: Path, participant: str, sessions: Sequence[str]) -> dict[str, float]:
    """Sessions (``ses-1``) of a participant (``sub-01``) in order, each with its days since the first.

    They are ordered by ``acq_time`` (ISO 8601) of ``sub-01_sessions.tsv``, else of the T1w images in
    ``sub-01_ses-1_scans.tsv``. Unless all have one, they are ordered by label, and days are NaN.
    """
    times: dict[str, pd.Timestamp] = {}
    for session, text in _acquisition_times(bids_dir / participant, sessions):
        time = pd.to_datetime(text, format="ISO8601", utc=True, errors="coerce")
        if not pd.isna(time):
            times[session] = min(time, times.get(session, time))
    by_label = sorted(sessions, key=natural_key)
    if not set(sessions) <= times.keys():
        return dict.fromkeys(by_label, float("nan"))
    ordered = sorted(by_label, key=times.__getitem__)
    return {session: (times[session] - times[ordered[0]]).total_seconds() / 86400 for session in ordered}


def _acquisition_times(folder: Path, sessions: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Session and time as written; those of the scans only where the table of sessions has none."""
    table = _read_times(folder / f"{folder.name}_sessions.tsv")
    column = find_column(table.columns, SESSION_COLUMNS[0], SESSION_COLUMNS)
    found: dict[str, set[str]] = {}
    if column and "acq_time" in table:
        for label, text in table[[column, "acq_time"]].dropna().to_numpy():
            found.setdefault(prefixed(label, "ses"), set()).add(text)
        yield from ((label, texts.pop()) for label, texts in list(found.items()) if len(texts) == 1)
    for label in set(sessions) - found.keys():
        scans = _read_times(folder / label / f"{folder.name}_{label}_scans.tsv")
        if {"filename", "acq_time"} <= set(scans):
            images = scans[scans["filename"].str.contains("_T1w.", regex=False, na=False)]
            yield from ((label, text) for text in images["acq_time"].dropna())


def _read_times(path: Path) -> pd.DataFrame:
    try:
        return read_text_table(path) if path.is_file() else pd.DataFrame()
    except UserError:
        return pd.DataFrame()  # as without a table: the caller says that there are no dates
