"""Images whose volumes, taken together, do not fit the others of a cohort."""

from __future__ import annotations

import numpy as np
from sklearn.covariance import ledoit_wolf

MIN_IMAGES = 10
CLIP = 2.5
OUTLYING = 3.5  # Iglewicz and Hoaglin (1993), How to detect and handle outliers
_MAD = 1.4826  # times the median absolute deviation: the standard deviation of a normal distribution


def robust_distances(volumes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How far each image lies from the others, and each of its structures from what the others predict.

    Logarithms of volumes become robust z-scores (median, median absolute deviation). Their covariance is that of the
    z-scores cut at +-`CLIP`, which outliers cannot move far (Raymaekers & Rousseeuw 2021), shrunk as Ledoit & Wolf
    (2004): fewer images than structures will do. Of the Mahalanobis distances, a robust z-score is returned; above
    `OUTLYING`, an image stands out. Of simulated normal images, 8 % do among 10, 4 % among 20, 0.5 % among 50.

    Parameters
    ----------
    volumes : (R, F) any unit; 0 counts as half the smallest other volume

    Returns
    -------
    (R,) float64, NaN with fewer than `MIN_IMAGES` images; (R, F) float64: z-score of each structure given all others,
    NaN for structures of which more than half have one volume

    Examples
    --------
    >>> volumes = 1000 * np.exp(0.1 * np.random.default_rng(0).standard_normal((30, 4)))
    >>> volumes[7, 2] /= 3
    >>> distances, deviations = robust_distances(volumes)
    >>> np.flatnonzero(distances > OUTLYING).tolist(), int(np.abs(deviations[7]).argmax())
    ([7], 2)
    """
    distances, deviations = np.full(len(volumes), np.nan), np.full(volumes.shape, np.nan)
    if len(volumes) < MIN_IMAGES:
        return distances, deviations
    smallest = np.where(volumes > 0, volumes, np.inf).min(axis=0)
    logs = np.log(np.where(volumes > 0, volumes, np.where(np.isfinite(smallest), smallest / 2, 1.0)))
    centred = logs - np.median(logs, axis=0)
    spread = _MAD * np.median(np.abs(centred), axis=0)
    known = spread > 1e-9
    if not known.any():
        return distances, deviations
    scores = centred[:, known] / spread[known]
    covariance, _ = ledoit_wolf(np.clip(scores, -CLIP, CLIP), assume_centered=True)
    precision = np.linalg.inv(covariance)
    pulls = scores @ precision
    deviations[:, known] = pulls / np.sqrt(np.diag(precision))
    distances = np.sqrt((pulls * scores).sum(axis=1))
    from_median = distances - np.median(distances)
    return from_median / max(_MAD * np.median(np.abs(from_median)), 1e-9), deviations
