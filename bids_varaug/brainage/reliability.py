"""Agreement of repeated scans of the same people."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import f as f_distribution


@dataclass(frozen=True)
class Agreement:
    """Intraclass correlation with its 95 % confidence interval, and what it was computed from."""

    icc: float
    low: float
    high: float
    n_participants: int
    n_observations: int


def intraclass_correlation(
    values: np.ndarray, groups: np.ndarray, confidence: float = 0.95
) -> Agreement:
    """Consistency of single measurements, ICC(3,1).

    ``(BMS - EMS) / (BMS + (k - 1) EMS)``, with the mean squares between participants and of the
    residual of a two-way model, and the interval from the F distribution [1]_.

    Parameters
    ----------
    values : (R,) float64
    groups : (R,) participant of each value; of participants with several, the first k in order
        are used, where k is the least number that any of them has; others are left out

    Returns
    -------
    Agreement
        NaN with fewer than two participants with several values, or without any variance.

    References
    ----------
    .. [1] Shrout & Fleiss (1979), Intraclass correlations: uses in assessing rater reliability,
       Psychological Bulletin 86(2), 420-428.

    Examples
    --------
    >>> values, groups = np.array([1.0, 2.0, 5.0, 6.0, 9.0, 10.0]), np.array([0, 0, 1, 1, 2, 2])
    >>> intraclass_correlation(values, groups).icc
    1.0
    """
    people, counts = np.unique(groups, return_counts=True)
    people = people[counts > 1]
    nothing = float("nan")
    k = int(counts[counts > 1].min()) if len(people) else 0
    if len(people) < 2:
        return Agreement(nothing, nothing, nothing, len(people), k)
    table = np.stack([values[groups == person][:k] for person in people])
    n = len(table)
    grand = table.mean()
    between = k * np.square(table.mean(axis=1) - grand).sum() / (n - 1)
    residual = table - table.mean(axis=1, keepdims=True) - table.mean(axis=0) + grand
    error = np.square(residual).sum() / ((n - 1) * (k - 1))
    # Rounding leaves some of a residual that is zero.
    error = 0.0 if error < 1e-20 * np.square(table).mean() else error
    if not between + (k - 1) * error > 0:
        return Agreement(nothing, nothing, nothing, n, k)
    icc = (between - error) / (between + (k - 1) * error)
    if error == 0:
        return Agreement(float(icc), float(icc), float(icc), n, k)
    ratio, freedom = between / error, ((n - 1), (n - 1) * (k - 1))
    tail = 1 - (1 - confidence) / 2
    low = ratio / f_distribution.ppf(tail, *freedom)
    high = ratio * f_distribution.ppf(tail, *freedom[::-1])
    low, high = ((value - 1) / (value + k - 1) for value in (low, high))
    return Agreement(float(icc), float(low), float(high), n, k)
