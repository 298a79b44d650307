"""Prediction intervals that need no model of the errors, and the correction of age bias."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import t

BISECTIONS = 60
CONFIDENCE = 0.95
WORST_SHARE = 0.5  # of the slope: half the width of its confidence interval
LEAST_R2 = 0.5
WITHHELD = (
    "The correction of age bias is withheld, and brain_age_corrected and brain_age_gap are n/a: in training people its "
    f"slope is known to no better than {100 * WORST_SHARE:.0f} %, or corrected ages would miss by more than the mean "
    "age does."
)
"""What users are told."""


def cross_conformal_interval(
    fold_predictions: np.ndarray, residuals: np.ndarray, folds: np.ndarray, weights: np.ndarray, coverage: float
) -> np.ndarray:
    """Interval that contains a new value with a stated probability (CV+).

    ``lower = the level-th smallest of mu_k(i)(x) - R_i, upper = the level-th largest of mu_k(i)(x) + R_i``, where
    mu_k(i) is the model fitted without the fold of row i, and R_i the absolute error that it made on row i (Barber,
    Candes, Ramdas & Tibshirani 2021, Annals of Statistics 49(1), 486-507). If people are exchangeable, the coverage is
    at least ``2 coverage - 1``, and in practice about `coverage`. Rows of one participant share a weight of 1, so that
    a participant counts once (Lee, Barber & Willett 2023, arXiv:2306.06342).

    `fold_predictions`, (K, P), are of the model of each fold, for P new rows; residuals (>= 0), held-out folds (0 ...
    K - 1) and weights (R,) each. Returns (P, 2) float64, NaN where there are too few participants for this coverage
    (fewer than 9 for 0.9). Found by bisection, so that 40,000 residuals by 10,000 predictions are never a table.

    Examples
    --------
    >>> errors, one = np.arange(1.0, 20.0), np.ones(19)
    >>> cross_conformal_interval(np.zeros((1, 1)), errors, np.zeros(19, int), one, 0.9).tolist()
    [[-18.0, 18.0]]
    """
    needed = coverage * (weights.sum() + 1)
    if needed > weights.sum() + 1e-9:
        return np.full((fold_predictions.shape[1], 2), np.nan)
    ranked = []
    for k in range(len(fold_predictions)):
        rows = np.flatnonzero(folds == k)
        rows = rows[np.argsort(residuals[rows], kind="stable")]
        ranked.append((residuals[rows], np.concatenate([[0.0], np.cumsum(weights[rows])])))

    def upper(predictions: np.ndarray) -> np.ndarray:
        """Least value such that rows of a total weight of `needed` have ``mu(x) + R`` below it, (P,)."""
        low, high = predictions.min(axis=0) - 1e-9, predictions.max(axis=0) + residuals.max() + 1e-9
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            reached = np.zeros(predictions.shape[1])
            for row, (errors, cumulative) in zip(predictions, ranked, strict=True):
                reached += cumulative[np.searchsorted(errors, middle - row, side="right")]
            enough = reached >= needed - 1e-9
            low, high = np.where(enough, low, middle), np.where(enough, middle, high)
        return high

    return np.stack([-upper(-fold_predictions), upper(fold_predictions)], axis=1)


@dataclass(frozen=True)
class BiasCorrection:
    """Line through predictions against age, and its inverse.

    ``corrected = (predicted - intercept) / slope``, the line fitted to held-out predictions of training participants
    (de Lange & Cole 2020, NeuroImage: Clinical 26, 102229), and both NaN where the correction is withheld. Unlike
    corrections that subtract a line in the true age (Beheshti et al. 2019, NeuroImage: Clinical 24, 102063), it never
    sees the age that is being predicted: less bias, and usually a larger error.
    """

    slope: float
    intercept: float

    def apply(self, predicted: np.ndarray) -> np.ndarray:
        """Return corrected ages in years, of the shape of `predicted`."""
        return (predicted - self.intercept) / self.slope


def fit_correction(predicted: np.ndarray, age: np.ndarray, weights: np.ndarray) -> BiasCorrection:
    """Fit the line to held-out predictions of training participants, if they determine it well.

    With slope b and its standard error ``SE^2 = sum w e^2 / ((n - 2) sum w (age - mean)^2)``, e what the line misses
    and n participants, it is withheld (NaN) unless ``t(0.975, n - 2) SE <= b / 2`` (the interval of the slope, by which
    all is divided, is within half of it: Fieller's g is at most 1/4) and ``r^2 >= 1/2`` of prediction and age (e / b is
    otherwise more than the ages' own standard deviation, by which the mean age misses).
    """
    slope, intercept = weighted_line(age, predicted, weights)
    n = weights.sum()
    missed = np.average((predicted - intercept - slope * age) ** 2, weights=weights)
    spread = np.average((age - np.average(age, weights=weights)) ** 2, weights=weights)
    explained = slope**2 * spread
    if n > 2 and slope > 0 and explained >= LEAST_R2 * (explained + missed):
        half_width = t.ppf((1 + CONFIDENCE) / 2, n - 2) * np.sqrt(missed / spread / (n - 2))
        if half_width <= WORST_SHARE * slope:
            return BiasCorrection(slope, intercept)
    return BiasCorrection(float("nan"), float("nan"))


def weighted_line(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """Slope and intercept of the least-squares line of y on x; NaN if all x are equal."""
    if np.ptp(x) == 0:
        return float("nan"), float("nan")
    slope, intercept = np.polyfit(x, y, 1, w=np.sqrt(weights))
    return float(slope), float(intercept)
