"""Repeated images of the same people: how reliable is a measure, and is a change of volume real?

A change between sessions could be numerical noise or that of a scan. Members differ in the level of a volume more than
in its change: the change is taken within each member.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from scipy.stats import f, t

CONFIDENCE = 0.95


def paired_changes(
    people: pd.DataFrame, names: Sequence[str], volumes: np.ndarray, sessions: Mapping[str, Sequence[str]]
) -> pd.DataFrame:
    """Change of every structure from a person's first session to each later one, in percent of the first.

    With v the mean volume over the images of a session, for each member m: ``c_m = 100 (v_m / v_m,first - 1)``. change
    is the mean of c_m over members and sd_num their standard deviation (M - 1). What could be chance, 95 %::

        detectable_num    = t(M - 1) sd_num
        detectable_rescan = t(df) sd_scan sqrt(1 / n_first + 1 / n)

    sd_scan is that of `rescan_noise`, n the number of images of a session. A change is ``beyond`` where it is larger
    than both, as far as they are known; else ``within``.

    Parameters
    ----------
    people : one row per image: participant_id, session_id, observation
    names : of the F structures
    volumes : (R, M, F) any unit, of the perturbed members (of the one there is)
    sessions : in order in time, of participants with several

    Returns
    -------
    DataFrame, a row per participant, later session and structure
        participant_id, session_id, first_session, name, change, sd_num, detectable_num, detectable_rescan [%], mark
        (None where nothing is known); NaN where the structure is absent, or there is no such spread
    """
    n_members = volumes.shape[1]
    sd_scan, freedom = rescan_noise(people, volumes.mean(axis=1))
    rows = people.groupby(["participant_id", "session_id"]).indices
    tables = []
    for participant, (first, *later) in sessions.items():
        with np.errstate(invalid="ignore", divide="ignore"):
            start = volumes[rows[participant, first]].mean(axis=0)
            for session in later:
                now = rows[participant, session]
                change = 100 * (volumes[now].mean(axis=0) / np.where(start > 0, start, np.nan) - 1)
                sd = change.std(axis=0, ddof=1) if n_members > 1 else np.full(len(names), np.nan)
                scan = sd_scan * np.sqrt(1 / len(rows[participant, first]) + 1 / len(now))
                columns = {
                    "change": change.mean(axis=0), "sd_num": sd,
                    "detectable_num": _quantile(n_members - 1) * sd,
                    "detectable_rescan": _quantile(freedom) * scan,
                }  # fmt: skip
                ids = {"participant_id": participant, "session_id": session, "first_session": first, "name": names}
                tables.append(pd.DataFrame(ids | columns))
    if not tables:
        return pd.DataFrame()
    table = pd.concat(tables, ignore_index=True)
    least = table[["detectable_num", "detectable_rescan"]].max(axis=1)
    mark = np.where(table["change"].abs() > least, "beyond", "within")
    return table.assign(mark=pd.Series(mark, dtype=object).where(least.notna() & table["change"].notna(), None))


def rescan_noise(people: pd.DataFrame, volumes: np.ndarray) -> tuple[np.ndarray, int]:
    """Standard deviation of one scan, (F,) in percent, and its degrees of freedom, from repeated scans of a session.

    Pooled over images whose names differ by ``run`` alone; NaN where nobody was scanned twice.
    """
    alike = people["observation"].str.replace(r"_run-[0-9]+", "", regex=True)
    squares, freedom = np.zeros(volumes.shape[1]), 0
    for rows in pd.Series(np.arange(len(people))).groupby(alike.to_numpy()).agg(list):
        if len(rows) > 1:
            mean = volumes[rows].mean(axis=0)
            squares += np.nansum(np.square(volumes[rows] / np.where(mean > 0, mean, np.nan) - 1), axis=0)
            freedom += len(rows) - 1
    return 100 * np.sqrt(squares / (freedom or np.nan)), freedom


def summarise_changes(changes: pd.DataFrame) -> pd.DataFrame:
    """Row per structure of `paired_changes`.

    name, n (changes), change (mean), sd_num (root mean square), detectable_num, detectable_rescan (medians), n_beyond.
    """
    by_name = changes.assign(square=changes["sd_num"] ** 2).groupby("name", sort=False)
    table = by_name.agg(
        n=("change", "count"), change=("change", "mean"), square=("square", "mean"),
        detectable_num=("detectable_num", "median"), detectable_rescan=("detectable_rescan", "median"),
        n_beyond=("mark", lambda marks: (marks == "beyond").sum()),
    )  # fmt: skip
    table.insert(2, "sd_num", np.sqrt(table.pop("square")))
    return table.reset_index()


def _quantile(freedom: int) -> float:
    return float(t.ppf((1 + CONFIDENCE) / 2, freedom)) if freedom > 0 else np.nan


def intraclass_correlation(values: np.ndarray, groups: np.ndarray, confidence: float = 0.95) -> dict[str, float]:
    """Consistency of single measurements of the same people, ICC(3,1).

    ``(BMS - EMS) / (BMS + (k - 1) EMS)``, with the mean squares between participants and of the residual of a two-way
    model, and the interval from the F distribution (Shrout & Fleiss 1979, Psychological Bulletin 86(2), 420-428).

    Of participants with several of the (R,) `values`, the first k in order are used, where k is the least number that
    any of them has; others are left out. Returns icc, low, high (of the confidence interval), n_participants,
    n_observations (k); NaN with fewer than two participants with several values, or without any variance.

    >>> values, groups = np.array([1.0, 2.0, 5.0, 6.0, 9.0, 10.0]), np.array([0, 0, 1, 1, 2, 2])
    >>> intraclass_correlation(values, groups)["icc"]
    1.0
    """
    people, counts = np.unique(groups, return_counts=True)
    people = people[counts > 1]
    n, k = len(people), int(counts[counts > 1].min(initial=len(groups)))
    found = {"icc": np.nan, "low": np.nan, "high": np.nan, "n_participants": n, "n_observations": k}
    if n < 2:
        return found
    table = np.stack([values[groups == person][:k] for person in people])
    means = table.mean(axis=1, keepdims=True)
    between = k * means.var(ddof=1)
    error = np.square(table - means - table.mean(axis=0) + table.mean()).sum() / ((n - 1) * (k - 1))
    error = 0.0 if error < 1e-20 * np.square(table).mean() else error  # what rounding leaves of zero
    if not between + (k - 1) * error > 0:
        return found
    freedom, tail = (n - 1, (n - 1) * (k - 1)), (1 + confidence) / 2
    with np.errstate(divide="ignore"):
        ratio = np.divide(between, error)
    low, high = ratio / f.ppf(tail, *freedom), ratio * f.ppf(tail, *freedom[::-1])
    icc, low, high = (1 - k / (r + k - 1) for r in (ratio, low, high))  # (r - 1) / (r + k - 1), 1 for infinite r
    return found | {"icc": float(icc), "low": float(low), "high": float(high)}
