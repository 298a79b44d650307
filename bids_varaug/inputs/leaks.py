"""Columns of numbers that are no measures of the brain: ages, identifiers, counters."""

from __future__ import annotations

import csv
import re
import unicodedata
from collections.abc import Mapping
from importlib.resources import files

import numpy as np
import pandas as pd

from bids_varaug.inputs.tables import plain_name

with (files("bids_varaug") / "data" / "column_words.tsv").open(encoding="utf-8") as _stream:
    _WORDS = pd.read_csv(_stream, sep="\t", quoting=csv.QUOTE_NONE).groupby("meaning")["pattern"].agg("|".join)
# Patterns of words by meaning, in small letters without accents. A name with a word of "age" (also of its prediction),
# or that begins as one of "birth", is no measure of the brain; neither is one of known words alone, at least one of
# them of a "person" or a row. "short" ones are no parts of words. "Left-Hippocampus" has others, and "Cartilage" holds
# no word "age".
_PERSON, _FILLER, _SHORT = _WORDS[["person", "filler", "short"]]
# A single letter is no part of a word, and L and R are sides.
_KNOWN = re.compile(f"(?:{_PERSON}|{_FILLER})+|{_SHORT}|[a-km-qs-z]")
_HOLDS_PERSON = re.compile(f"(?:{_FILLER})*(?:{_PERSON})(?:{_PERSON}|{_FILLER})*|{_SHORT}")
_TELLS_AGE = re.compile(
    rf"(?:{_PERSON}|{_FILLER})*(?:(?:{_WORDS['age']})(?:{_WORDS['age']}|{_PERSON}|{_FILLER})*|(?:{_WORDS['birth']})\w*)"
)
_YEARS = np.arange(1900, 2036)

MIN_PEOPLE = 5  # fewer follow anything by chance
MIN_COUNTED = 10
_SURE = 3.0  # standard errors


def reason_by_name(name: str) -> str | None:
    """Why a column is no measure of the brain, by the words of its name; None where it may be.

    Words are told apart by capitals, digits, blanks and punctuation; "scanage" is two of them. Accents do not count.

    >>> reason_by_name("ScanAge"), reason_by_name("subject_number"), reason_by_name("Accessory_vol")
    ('tells the age', 'describes the person or the row, not the brain', None)
    """
    letters = (c for c in unicodedata.normalize("NFKD", name) if not unicodedata.combining(c))
    name = unicodedata.normalize("NFC", "".join(letters))
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", name)
    for text in (apart, name, plain_name(name)):
        words = [word.lower() for word in re.findall(r"[^\W\d_]+", text)]
        if any(_TELLS_AGE.fullmatch(word) for word in words):
            return "tells the age"
        if all(_KNOWN.fullmatch(w) for w in words) and (
            any(_HOLDS_PERSON.fullmatch(w) for w in words) or not plain_name(name)
        ):
            return "describes the person or the row, not the brain"
    return None


def reasons_by_value(values: pd.DataFrame, people: pd.DataFrame) -> Mapping[str, str]:
    """Why columns are no measures of the brain, by their values, whatever their names.

    A column *follows age* if its correlation with age, with its logarithm or its square (Pearson) or with its ranks
    (Spearman) is above 0.99, and above 0.95 with near certainty: the lower bound ``tanh(atanh(r) - 3 SE)``, with
    Fisher's ``SE = 1 / sqrt(n - 3)``, for ranks 1.22 times as large (Bonett & Wright 2000) and r less what an exchange
    of two neighbours costs, n the number of people. Five are enough for a copy of the age; one that merely rises with
    it needs 14, as a few people's volumes are in the order of their ages by chance. It *counts* if its values are whole
    numbers, each there once and all the same step apart (from 10 people), or nearly all numbers of a range (from 20),
    or number each one's sessions. It *is a year* if at least 95 % are whole numbers from 1900 to 2035, three different
    ones or more.
    `values` has a row per observation, `people` the columns participant_id and age [year], as of `Cohort`.
    """
    reasons = {}
    for name in values:
        column = values[name].to_numpy(np.float64)
        known = np.isfinite(column)
        ages = people["age"].to_numpy(np.float64)
        who = people["participant_id"].to_numpy(str)
        aged = known & np.isfinite(ages)
        if _follows(column[aged], ages[aged], len(set(who[aged]))):
            reasons[name] = "is almost a function of age"
        elif _counts(column[known], who[known]):
            reasons[name] = "counts people, rows or sessions"
        else:
            years = np.isin(column[known], _YEARS)
            if len(np.unique(column[known][years])) > 2 and years.mean() >= 0.95:
                reasons[name] = "is a year"
    return reasons


def _follows(column: np.ndarray, age: np.ndarray, n: int) -> bool:
    if n < MIN_PEOPLE or np.ptp(column) == 0 or np.ptp(age) == 0:
        return False
    scales = (age, age**2, np.log1p(np.maximum(age, 0)))
    linear = max(abs(np.corrcoef(column, scale)[0, 1]) for scale in scales)
    ranked = abs(np.corrcoef(pd.Series(column).rank(), pd.Series(age).rank())[0, 1])
    return _certain(linear, n) or _certain(ranked - 12 / (n * (n**2 - 1)), n, 1.22)


def _certain(r: float, n: int, inflation: float = 1.0) -> bool:
    lower = np.arctanh(min(r, 1 - 1e-15)) - _SURE * inflation / np.sqrt(n - 3)
    return r > 0.99 and np.tanh(lower) > 0.95


def _counts(column: np.ndarray, who: np.ndarray) -> bool:
    if (column != np.round(column)).any() or len(set(who)) < MIN_PEOPLE:
        return False
    groups = pd.Series(column).groupby(who)
    place = groups.rank(method="first").to_numpy() + column.min() - 1
    if (place == column).all() and (groups.size() > 1).sum() >= MIN_PEOPLE:
        return True
    once = groups.first().to_numpy() if (groups.nunique() == 1).all() else column
    steps = np.diff(np.sort(once))
    even = len(groups) >= MIN_COUNTED and (steps == steps[0]).all()
    dense = len(groups) >= 2 * MIN_COUNTED and np.ptp(once) < 1.5 * len(once)
    return bool((steps > 0).all() and (even or dense))
