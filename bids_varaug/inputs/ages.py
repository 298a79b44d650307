"""Ages as tables give them, in years."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bids_varaug.inputs.tables import TableError, plain_name

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
