"""Age bias: the young are predicted too old and the old too young."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import t

CONFIDENCE = 0.95
WORST_SHARE = 0.5  # of the slope: half the width of its confidence interval
LEAST_R2 = 0.5
WITHHELD = (
    "The correction of age bias is withheld, and brain_age_corrected and brain_age_gap are n/a: in "
    f"training people its slope is known to no better than {100 * WORST_SHARE:.0f} %, or corrected "
    "ages would miss by more than the mean age does."
)
"""What users are told."""


@dataclass(frozen=True)
class BiasCorrection:
    """Line through predictions against age, and its inverse.

    ``corrected = (predicted - intercept) / slope``, the line fitted to held-out predictions of
    training participants [1]_. Unlike corrections that subtract a line in the true age [2]_, it
    never sees the age that is being predicted, so that the corrected error is an honest one: less
    bias, and usually a larger error.

    Attributes
    ----------
    slope, intercept : of predicted on true age; NaN where the correction is withheld, and then so
        is what is corrected

    References
    ----------
    .. [1] de Lange & Cole (2020), Commentary: Correction procedures in brain-age prediction,
       NeuroImage: Clinical 26, 102229.
    .. [2] Beheshti et al. (2019), Bias-adjustment in neuroimaging-based brain age frameworks,
       NeuroImage: Clinical 24, 102063.
    """

    slope: float
    intercept: float

    def apply(self, predicted: np.ndarray) -> np.ndarray:
        """Return corrected ages in years, of the shape of `predicted`."""
        return (predicted - self.intercept) / self.slope


def fit_correction(predicted: np.ndarray, age: np.ndarray, weights: np.ndarray) -> BiasCorrection:
    """Fit the line to held-out predictions of training participants, if they tell it well.

    With slope b and its standard error ``SE^2 = sum w e^2 / ((n - 2) sum w (age - mean)^2)``, e
    what the line misses and n participants, it is withheld (NaN) unless both hold:

    - ``t(0.975, n - 2) SE <= b / 2``: the confidence interval of the slope, which all corrected
      ages are divided by, is within half of it and far from 0 (Fieller's g is at most 1/4).
    - ``r^2 >= 1/2`` of prediction and age: what the line misses is divided by b too, to e / b,
      and below this r^2 that is more than the ages' own standard deviation, by which the mean
      age misses.

    Parameters
    ----------
    predicted, age : (R,) years
    weights : (R,), 1 in all per participant
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
    x_mean, y_mean = np.average(x, weights=weights), np.average(y, weights=weights)
    variance = np.average((x - x_mean) ** 2, weights=weights)
    if not variance > 0:
        return float("nan"), float("nan")
    slope = np.average((x - x_mean) * (y - y_mean), weights=weights) / variance
    return float(slope), float(y_mean - slope * x_mean)
