"""Scores of predicted ages, each participant counting once, with the uncertainty of each."""

from __future__ import annotations

import numpy as np

from bids_varaug.brainage.correction import weighted_line

CONFIDENCE = 0.95


def per_participant(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Mean over the observations of each participant.

    Parameters
    ----------
    values : (R, ...) float64
    groups : (R,)

    Returns
    -------
    (P, ...) float64, participants in sorted order
    """
    _, index, counts = np.unique(groups, return_inverse=True, return_counts=True)
    order = np.argsort(index, kind="stable")
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    sums = np.add.reduceat(values[order], starts, axis=0)
    return sums / counts.reshape(-1, *[1] * (values.ndim - 1))


def agreement_scores(
    predicted: np.ndarray, age: np.ndarray, weights: np.ndarray
) -> dict[str, float]:
    """Scores of one set of held-out predictions.

    Parameters
    ----------
    predicted, age : (R,) years
    weights : (R,), those of a participant add up to 1

    Returns
    -------
    dict
        mae, rmse [year]; r2 (1 - squared error / variance of age: 0 for the mean of these very
        ages, negative if worse); r (Pearson; NaN for a constant prediction); bias_slope (of
        predicted - age on age).
    """
    error = predicted - age
    mean = np.average(age, weights=weights)
    variance = np.average((age - mean) ** 2, weights=weights)
    squared = np.average(error**2, weights=weights)
    spread = predicted - np.average(predicted, weights=weights)
    predicted_variance = np.average(spread**2, weights=weights)
    covariance = np.average(spread * (age - mean), weights=weights)
    constant = predicted_variance <= 1e-18
    return {
        "mae": float(np.average(np.abs(error), weights=weights)),
        "rmse": float(np.sqrt(squared)),
        "r2": float(1 - squared / variance) if variance > 0 else float("nan"),
        "r": float("nan")
        if constant or variance == 0
        else float(covariance / np.sqrt(predicted_variance * variance)),
        "bias_slope": weighted_line(age, error, weights)[0],
    }


def bootstrap_interval(
    values: np.ndarray, rng: np.random.Generator, n_draws: int
) -> tuple[np.ndarray, np.ndarray]:
    """Limits (95 %, percentile) of means over participants drawn with replacement.

    Models are not fitted again: the interval is about which people were looked at, not about
    which people the models were trained on.

    Parameters
    ----------
    values : (P, A) float64, one column per quantity; the same people are drawn for all
    n_draws : number of samples

    Returns
    -------
    low, high : (A,) float64
    """
    n = len(values)
    means = np.empty((n_draws, values.shape[1]))
    for draw in range(n_draws):
        means[draw] = np.bincount(rng.integers(0, n, n), minlength=n) @ values / n
    tail = (1 - CONFIDENCE) / 2
    return np.quantile(means, tail, axis=0), np.quantile(means, 1 - tail, axis=0)


def sign_flip_p_values(
    differences: np.ndarray, rng: np.random.Generator, n_permutations: int
) -> np.ndarray:
    """Two-sided p-values that paired differences are symmetric about zero.

    The sign of each participant's difference is flipped by chance; the p-value is the share of
    flipped means at least as far from zero, the observed one counted in [1]_.

    Parameters
    ----------
    differences : (P, A) float64

    Returns
    -------
    (A,) float64
        1 where all differences are zero.

    References
    ----------
    .. [1] Phipson & Smyth (2010), Permutation p-values should never be zero, Statistical
       Applications in Genetics and Molecular Biology 9(1), 39.
    """
    observed = np.abs(differences.sum(axis=0))
    tolerance = 1e-9 * np.abs(differences).sum(axis=0)
    reached = np.ones(differences.shape[1])
    for _ in range(n_permutations):
        signs = rng.integers(0, 2, len(differences)) * 2.0 - 1.0
        reached += np.abs(signs @ differences) >= observed - tolerance
    return reached / (n_permutations + 1)
