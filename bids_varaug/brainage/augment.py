"""Numerical augmentation: the members' versions of a participant as further training rows.

Every augmentation keeps each participant's weight and, but for ``none``, the participant's centre (the mean of the
members); they differ in how the copies scatter around it:

``none``
    one row, the unperturbed baseline.
``mean``
    one row, the mean of the members: less numerical noise, but no augmentation.
``members``
    one row per member.
``analytic``
    the same for linear models in closed form: copies that scatter with covariance C_i around their mean add
    ``sum_i w_i C_i`` to the normal equations (Bishop 1995, Neural Computation 7(1), 108-116). Features must be
    transformed (log, ratios) before their covariance is taken. Kernel models have no such form: ``bayesian_ridge`` is
    fitted in their place.
``jitter``
    control: Gaussian noise of the same total variance for each participant, equal in and independent over the
    standardised features: the effect of regularisation alone.
``shuffled``
    control: the deviations of another participant; equals ``members`` for linear models.

Linear models are never fitted to copies, but to the sums of `augmentation_covariance`, whatever the augmentation.
"""

from __future__ import annotations

import numpy as np

from bids_varaug.brainage.cohort import Cohort
from bids_varaug.errors import UserError

AUGMENTATIONS = ("none", "mean", "members", "analytic", "jitter", "shuffled")
CONTROLS = ("jitter", "shuffled")
"""Augmentations by noise of another origin: what others are compared with, never chosen."""
USES_MEMBERS = ("members", "analytic", "jitter", "shuffled")
BLOCK = 2048


def centers(cohort: Cohort, augmentation: str) -> np.ndarray:
    """Return the baseline or mean of the members, (R, F) float64; a UserError says that there are no members."""
    if augmentation == "none":
        return cohort.baseline
    if cohort.members is None:
        raise UserError(
            f"augmentation {augmentation!r} needs the features of at least two members, and these features have one "
            "value per observation. Use --augmentation none, or a table with a member column."
        )
    return cohort.members.mean(axis=1)


def augmented_members(
    members: np.ndarray, weights: np.ndarray, groups: np.ndarray, augmentation: str, rng: np.random.Generator
) -> np.ndarray:
    """Return the members, or what a control puts in their place: (R, M, F) with the same mean over M.

    `weights` and `groups` are the weight and the participant of each observation, (R,) each.
    """
    if augmentation not in CONTROLS:
        return members
    center = members.mean(axis=1, keepdims=True)
    if augmentation == "shuffled":
        return center + (members - center)[_other_participants(groups, rng)]
    return center + _isotropic(members - center, center[:, 0], weights, rng)


def draw_rows(
    members: np.ndarray, weights: np.ndarray, max_rows: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One training row per member, or per member drawn at random where there are more than `max_rows`.

    Returns (N, F) features, observation by observation, the same number of rows for each; the observation of each row,
    (N,); weights, (N,), those of an observation's rows add up to its own.
    """
    n, n_members, n_features = members.shape
    kept = max(1, min(n_members, max_rows // n))
    if kept < n_members:
        drawn = rng.permuted(np.tile(np.arange(n_members), (n, 1)), axis=1)[:, :kept]
        members = np.take_along_axis(members, np.sort(drawn, axis=1)[:, :, None], axis=1)
    return members.reshape(n * kept, n_features), np.repeat(np.arange(n), kept), np.repeat(weights / kept, kept)


def augmentation_covariance(
    members: np.ndarray, weights: np.ndarray, augmentation: str, scale: np.ndarray
) -> np.ndarray:
    """What an augmentation adds to the weighted scatter of (R, M, F) members' means, in units of (F,) `scale`; (F, F).

    For ``jitter`` the expectation of what `augmented_members` draws.
    """
    covariance = summed_covariances(members, weights) / np.outer(scale, scale)
    return np.eye(len(scale)) * np.trace(covariance) / len(scale) if augmentation == "jitter" else covariance


def rows_of_moments(moments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All that a linear model learns from any number of rows (1, z), z of D values, from 2 D rows of equal weight.

    `moments`, (1 + D, 1 + D), is the rows' weighted ``sum w (1, z)' (1, z)``. Returns (2 D, D) rows with these
    moments, and (2 D,) weights.

    Examples
    --------
    >>> rows, weights = rows_of_moments(np.array([[4.0, 8.0], [8.0, 52.0]]))
    >>> rows.round(6).tolist(), weights.tolist()
    ([[5.0], [-1.0]], [2.0, 2.0])
    """
    weight, mean, n = moments[0, 0], moments[0, 1:] / moments[0, 0], len(moments) - 1
    values, axes = np.linalg.eigh(moments[1:, 1:] / weight - np.outer(mean, mean))  # a root, singular or not
    root = (axes * np.sqrt(n * np.clip(values, 0, None))).T
    return np.concatenate([mean + root, mean - root]), np.full(2 * n, weight / (2 * n))


def summed_covariances(members: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Sum over R observations of the members' covariances (1 / M), weighted; (R, M, F), (R,) to (F, F).

    Goes through the observations in blocks, without a copy of all deviations.

    Examples
    --------
    >>> summed_covariances(np.array([[[1.0], [3.0]]]), np.array([0.5])).tolist()
    [[0.5]]
    """
    n_members, n_features = members.shape[1:]
    total = np.zeros((n_features, n_features))
    for start in range(0, len(members), BLOCK):
        block = members[start : start + BLOCK]
        deviations = block - block.mean(axis=1, keepdims=True)
        deviations *= np.sqrt(weights[start : start + BLOCK] / n_members)[:, None, None]
        deviations = deviations.reshape(-1, n_features)
        total += deviations.T @ deviations
    return total


def _isotropic(deviations: np.ndarray, center: np.ndarray, weights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Gaussian deviations with the total standardised variance of the given ones, (R, M, F)."""
    mean = np.average(center, axis=0, weights=weights)
    scale = np.sqrt(np.average((center - mean) ** 2, axis=0, weights=weights))
    varies = scale > 0
    variance = np.square(deviations[:, :, varies] / scale[varies]).mean(axis=(1, 2))
    n_members = deviations.shape[1]
    noise = rng.standard_normal(deviations.shape)
    noise -= noise.mean(axis=1, keepdims=True)
    # Centred noise has lost a degree of freedom.
    noise *= np.sqrt(n_members / (n_members - 1) * variance)[:, None, None]
    return noise * np.where(varies, scale, 0.0)


def _other_participants(groups: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """For each observation, one of another participant: people in random order give to their neighbour; (R,) int64."""
    people, index = np.unique(groups, return_inverse=True)
    order = rng.permutation(len(people))
    donor = np.empty(len(people), np.int64)
    donor[order] = np.roll(order, 1)
    by_person = np.argsort(index, kind="stable")
    starts, counts = np.searchsorted(index[by_person], donor[index]), np.bincount(index)[donor[index]]
    return by_person[starts + rng.integers(counts)]
