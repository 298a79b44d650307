"""Age bias: the young are predicted too old and the old too young."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LEAST_SLOPE = 0.1


@dataclass(frozen=True)
class BiasCorrection:
    """Line through predictions against age, and its inverse.

    ``corrected = (predicted - intercept) / slope``, the line fitted to held-out predictions of
    training participants [1]_. Unlike corrections that subtract a line in the true age [2]_, it
    never sees the age that is being predicted, so that the corrected error is an honest one: less
    bias, and usually a larger error.

    Attributes
    ----------
    slope, intercept : of predicted on true age; NaN where the slope is below 0.1 (a model that
        predicts next to nothing cannot be corrected), and then so is what is corrected

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
    """Fit the line to held-out predictions of training participants.

    Parameters
    ----------
    predicted, age : (R,) years
    weights : (R,)
    """
    slope, intercept = weighted_line(age, predicted, weights)
    if not slope >= LEAST_SLOPE:
        return BiasCorrection(float("nan"), float("nan"))
    return BiasCorrection(slope, intercept)


def weighted_line(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """Slope and intercept of the least-squares line of y on x; NaN if all x are equal."""
    x_mean, y_mean = np.average(x, weights=weights), np.average(y, weights=weights)
    variance = np.average((x - x_mean) ** 2, weights=weights)
    if not variance > 0:
        return float("nan"), float("nan")
    slope = np.average((x - x_mean) * (y - y_mean), weights=weights) / variance
    return float(slope), float(y_mean - slope * x_mean)
