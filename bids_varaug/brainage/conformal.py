"""Prediction intervals that keep their promise without a model of the errors."""

from __future__ import annotations

import numpy as np

BISECTIONS = 60


def cross_conformal_limits(
    fold_predictions: np.ndarray,
    residuals: np.ndarray,
    folds: np.ndarray,
    weights: np.ndarray,
    coverage: float,
) -> np.ndarray:
    """Limits between which a new value lies with a stated probability (CV+).

    ``lower = the level-th smallest of mu_k(i)(x) - R_i, upper = the level-th largest of
    mu_k(i)(x) + R_i``, where mu_k(i) is the model fitted without the fold of row i, and R_i the
    absolute error that it made on row i [1]_. If people are exchangeable, the coverage is at least
    ``2 coverage - 1``, and in practice about `coverage`. Rows of one participant share a weight
    of 1, so that a participant counts once [2]_.

    Found by bisection, so that 40,000 residuals by 10,000 predictions are never a table.

    Parameters
    ----------
    fold_predictions : (K, P) of the model of each fold, for P new rows
    residuals : (R,) >= 0
    folds : (R,) held-out fold of each residual, 0 ... K - 1
    weights : (R,), those of one participant add up to 1
    coverage : 0 ... 1

    Returns
    -------
    (P, 2) float64
        NaN where there are too few participants for this coverage (fewer than 9 for 0.9).

    References
    ----------
    .. [1] Barber, Candes, Ramdas & Tibshirani (2021), Predictive inference with the jackknife+,
       Annals of Statistics 49(1), 486-507.
    .. [2] Lee, Barber & Willett (2023), Distribution-free inference with hierarchical data,
       arXiv:2306.06342.

    Examples
    --------
    >>> errors, one = np.arange(1.0, 20.0), np.ones(19)
    >>> cross_conformal_limits(np.zeros((1, 1)), errors, np.zeros(19, int), one, 0.9).tolist()
    [[-18.0, 18.0]]
    """
    total = weights.sum()
    needed = coverage * (total + 1)
    limits = np.full((fold_predictions.shape[1], 2), np.nan)
    if needed > total + 1e-9:
        return limits
    ranked = []
    for k in range(len(fold_predictions)):
        rows = np.flatnonzero(folds == k)
        rows = rows[np.argsort(residuals[rows], kind="stable")]
        ranked.append((residuals[rows], np.concatenate([[0.0], np.cumsum(weights[rows])])))
    limits[:, 1] = _upper(fold_predictions, ranked, needed)
    limits[:, 0] = -_upper(-fold_predictions, ranked, needed)
    return limits


def _upper(predictions: np.ndarray, ranked: list, needed: float) -> np.ndarray:
    """Least t such that rows of a total weight of `needed` have ``mu(x) + R <= t``, (P,)."""
    largest = max(residuals[-1] for residuals, _ in ranked if len(residuals))
    low, high = predictions.min(axis=0) - 1e-9, predictions.max(axis=0) + largest + 1e-9
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        reached = np.zeros(predictions.shape[1])
        for row, (residuals, cumulative) in zip(predictions, ranked, strict=True):
            reached += cumulative[np.searchsorted(residuals, middle - row, side="right")]
        enough = reached >= needed - 1e-9
        high = np.where(enough, middle, high)
        low = np.where(enough, low, middle)
    return high
