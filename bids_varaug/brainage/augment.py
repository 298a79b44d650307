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
    ``sum_i w_i C_i`` to the normal equations, as does the Cholesky factor of that sum, appended to the centred design
    as 2 F pseudo-rows (Bishop 1995, Neural Computation 7(1), 108-116). Features must be transformed (log, ratios)
    before their covariance is taken. Kernel models have no such form: ``bayesian_ridge`` is fitted in their place.
``jitter``
    control: Gaussian noise in place of the members' deviations, of the same total variance for each participant in
    standardised features, equal in and independent over them: the effect of regularisation alone.
``shuffled``
    control: the deviations of another participant. Of a linear model only the sum of all covariances matters, so that
    on one set of participants this control equals ``members`` there; it differs for kernel models.
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
PSEUDO_WEIGHT = 1e-9  # of a pseudo-row: none to speak of in means and counts


def check_augmentation(cohort: Cohort, augmentation: str) -> None:
    """Raise a UserError if this cohort cannot be augmented that way."""
    if augmentation != "none" and cohort.members is None:
        raise UserError(
            f"augmentation {augmentation!r} needs the features of at least two members, and these features have one "
            "value per observation. Use --augmentation none, or a table with a member column."
        )


def centers(cohort: Cohort, augmentation: str) -> np.ndarray:
    """Return the one row that stands for each observation: baseline, or mean of the members; (R, F) float64."""
    check_augmentation(cohort, augmentation)
    return cohort.baseline if augmentation == "none" or cohort.members is None else cohort.members.mean(axis=1)


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


def pseudo_rows(members: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows that add the members' summed covariance, and nothing else, to the normal equations of a linear model.

    For ``sum_i w_i C_i = L L'`` and the weighted mean c of all rows they are ``c + L_f / sqrt(2 e)`` and
    ``c - L_f / sqrt(2 e)``, each with a small weight e; their target is the mean. A model that is fitted to the means
    of the members and to these rows is then that of all members as rows.

    Returns (2 F, F) rows and (2 F,) weights, for (R, M, F) members and (R,) weights.
    """
    center = np.average(members.mean(axis=1), axis=0, weights=weights)
    values, axes = np.linalg.eigh(summed_covariances(members, weights))  # a Cholesky factor that may be singular
    factor = (axes * np.sqrt(np.clip(values, 0, None))).T / np.sqrt(2 * PSEUDO_WEIGHT)
    return np.concatenate([center + factor, center - factor]), np.full(2 * len(factor), PSEUDO_WEIGHT)


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
