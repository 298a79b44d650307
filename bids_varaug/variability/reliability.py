"""Reliability of measures over repeated images of the same people."""

from __future__ import annotations

import numpy as np
from scipy.stats import f


def intraclass_correlation(values: np.ndarray, groups: np.ndarray, confidence: float = 0.95) -> dict[str, float]:
    """Consistency of single measurements of the same people, ICC(3,1).

    ``(BMS - EMS) / (BMS + (k - 1) EMS)``, with the mean squares between participants and of the residual of a two-way
    model, and the interval from the F distribution (Shrout & Fleiss 1979, Psychological Bulletin 86(2), 420-428).

    Of participants with several of the (R,) `values`, the first k in order are used, where k is the least number that
    any of them has; others are left out. Returns icc, low, high (of the confidence interval), n_participants,
    n_observations (k); NaN with fewer than two participants with several values, or without any variance.

    Examples
    --------
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
