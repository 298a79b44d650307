"""Ages as tables give them, in years."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bids_varaug.inputs.tables import TableError, plain_name

# Lengths of the Julian year, as UCUM has them.
YEARS_PER = {"years": 1.0, "months": 1 / 12, "weeks": 7 / 365.25, "days": 1 / 365.25}
OLDEST = 120.0  # years; more is a code such as 999, or another unit

_SPELLINGS = {
    "years": ("years", "year", "yrs", "yr", "y", "a", "annum", "yo", "yearsold", "ageinyears"),
    "months": ("months", "month", "mos", "mo", "mon", "mths", "mth", "m", "monthsold"),
    "weeks": ("weeks", "week", "wks", "wk", "w", "weeksold"),
    "days": ("days", "day", "d", "daysold"),
}
_UNIT_OF = {spelling: unit for unit, names in _SPELLINGS.items() for spelling in names}
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")  # of age_months, AgeMonths
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
    own = _UNIT_OF.get(plain_name(match["unit"])) if match and match["unit"] else unit
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
    entry = column_entry(read_sidecar(sidecar), column)
    given = next((entry[key] for key in entry if plain_name(str(key)) in ("units", "unit")), None)
    if given not in (None, "", "n/a"):
        unit = _UNIT_OF.get(plain_name(str(given)))
        if unit is None:
            raise TableError(
                f"{sidecar}: Units {given!r} of {column!r} is not known. Write years, months, "
                "weeks or days."
            )
        return unit
    last = (_WORD.findall(column) or [""])[-1].lower()
    # One letter of a name is not enough to go by.
    return _UNIT_OF.get(last, "years") if len(last) > 1 else "years"


def read_sidecar(path: Path) -> dict:
    """Content of a JSON sidecar; empty where there is no file.

    Raises
    ------
    TableError
        If it is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        raise TableError(f"{path}: cannot read it as JSON ({error}). Mend or remove it.") from error
    return content if isinstance(content, dict) else {}


def column_entry(sidecar: Mapping, column: str) -> Mapping:
    """What a sidecar says about a column, whose name may differ in case; empty where nothing."""
    for name, entry in sidecar.items():
        if plain_name(str(name)) == plain_name(column) and isinstance(entry, Mapping):
            return entry
    return {}
