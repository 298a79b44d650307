"""Numerical augmentation: the members' versions of a participant as further training rows.

Every augmentation keeps each participant's weight and, but for ``none``, the participant's centre
(the mean of the members); they differ in how the copies scatter around it:

``none``
    one row, the unperturbed baseline.
``mean``
    one row, the mean of the members: less numerical noise, but no augmentation.
``members``
    one row per member.
``analytic``
    the same for linear models in closed form: copies that scatter with covariance C_i around
    their mean add ``sum_i w_i C_i`` to the ridge penalty [1]_, with no row more than ``mean``.
    Features are standardised, so the penalty is ``S^-1 (sum_i w_i C_i) S^-1`` there, and S
    contains the scatter too; the scale of age does not matter, as copies share one age. Features
    must be transformed (log, ratios) before their covariance is taken. Kernel models have no
    such form: with ``svr`` and ``gpr`` it fits ``bayesian_ridge``, with ``auto`` the better of
    the linear models, and says so in `chosen`.
``jitter``
    control: Gaussian noise in place of the members' deviations, of the same total variance for
    each participant in standardised features, equal in and independent over them: what mere
    regularisation does.
``shuffled``
    control: the deviations of another participant. Of a linear model only the sum of all
    covariances matters (see ``analytic``), so that on one set of participants this control
    equals ``members`` there; it tells them apart for kernel models.

References
----------
.. [1] Bishop (1995), Training with noise is equivalent to Tikhonov regularization, Neural
   Computation 7(1), 108-116.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bids_varaug.brainage.cohort import Cohort
from bids_varaug.brainage.study import AUGMENTATIONS
from bids_varaug.errors import UserError

ROW_AUGMENTATIONS = ("members", "jitter", "shuffled")
USES_MEMBERS = ("members", "analytic", "jitter", "shuffled")
BLOCK = 2048


@dataclass(frozen=True, eq=False)
class Rows:
    """Training rows made from observations.

    Attributes
    ----------
    x : (N, F) float64 features
    owner : (N,) int64, index of the observation that each row is a version of
    weights : (N,) float64; those of an observation's rows add up to its weight
    """

    x: np.ndarray
    owner: np.ndarray
    weights: np.ndarray


def check_augmentation(cohort: Cohort, augmentation: str) -> None:
    """Raise a UserError if this cohort cannot be augmented that way."""
    if augmentation not in AUGMENTATIONS:
        raise ValueError(f"no such augmentation: {augmentation}")
    if augmentation != "none" and cohort.members is None:
        raise UserError(
            f"augmentation {augmentation!r} needs the features of at least two members, and "
            "these features have one value per observation. Use --augmentation none, or a table "
            "with a member column."
        )


def centers(cohort: Cohort, augmentation: str) -> np.ndarray:
    """Return the one row that stands for each observation: baseline, or mean of the members.

    Returns
    -------
    (R, F) float64
    """
    check_augmentation(cohort, augmentation)
    return cohort.baseline if augmentation == "none" else cohort.members.mean(axis=1)


def summed_covariances(
    members: np.ndarray, weights: np.ndarray, rows: np.ndarray | None = None
) -> np.ndarray:
    """Weighted sum of the covariances (1 / M) of the members' features over observations.

    Goes through the observations in blocks, without a copy of all deviations.

    Parameters
    ----------
    members : (R, M, F) float64
    weights : (R,) float64
    rows : indices of the observations to sum over, all if not given

    Returns
    -------
    (F, F) float64, square of the features' unit

    Examples
    --------
    >>> summed_covariances(np.array([[[1.0], [3.0]]]), np.array([0.5])).tolist()
    [[0.5]]
    """
    n_members, n_features = members.shape[1:]
    rows = np.arange(len(members)) if rows is None else rows
    total = np.zeros((n_features, n_features))
    for start in range(0, len(rows), BLOCK):
        block = rows[start : start + BLOCK]
        deviations = members[block]
        deviations = deviations - deviations.mean(axis=1, keepdims=True)
        deviations *= np.sqrt(weights[block] / n_members)[:, None, None]
        deviations = deviations.reshape(-1, n_features)
        total += deviations.T @ deviations
    return total


def augmented_rows(
    members: np.ndarray,
    weights: np.ndarray,
    groups: np.ndarray,
    augmentation: str,
    rng: np.random.Generator,
    max_rows: int | None = None,
) -> Rows:
    """Return the rows that ``members`` or one of its controls trains on.

    Parameters
    ----------
    members : (R, M, F) float64
    weights : (R,) of the observations
    groups : (R,) participant of each observation
    augmentation : "members", "jitter" or "shuffled"
    max_rows : draw at most so many in all, the same number of members for each observation

    Returns
    -------
    Rows
        R x M of them, observation by observation, or fewer with `max_rows`.

    Raises
    ------
    ValueError
        If the augmentation makes no rows, or ``shuffled`` has no other participant.
    """
    n, n_members, n_features = members.shape
    center = members.mean(axis=1, keepdims=True)
    if augmentation == "members":
        x = members
    elif augmentation == "jitter":
        x = center + _isotropic(members - center, center[:, 0], weights, rng)
    elif augmentation == "shuffled":
        donors = _other_participants(groups, rng)
        x = center + (members - center)[donors]
    else:
        raise ValueError(f"{augmentation} makes no rows")
    kept = n_members if max_rows is None else max(1, min(n_members, max_rows // n))
    if kept < n_members:
        drawn = rng.permuted(np.tile(np.arange(n_members), (n, 1)), axis=1)[:, :kept]
        x = np.take_along_axis(x, np.sort(drawn, axis=1)[:, :, None], axis=1)
    return Rows(
        x=x.reshape(n * kept, n_features),
        owner=np.repeat(np.arange(n), kept),
        weights=np.repeat(weights / kept, kept),
    )


def _isotropic(
    deviations: np.ndarray, center: np.ndarray, weights: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Gaussian deviations with the total standardised variance of the given ones, (R, M, F)."""
    mean = np.average(center, axis=0, weights=weights)
    scale = np.sqrt(np.average((center - mean) ** 2, axis=0, weights=weights))
    varies = scale > 0
    variance = np.square(deviations[:, :, varies] / scale[varies]).mean(axis=1).mean(axis=1)
    n_members = deviations.shape[1]
    noise = rng.standard_normal(deviations.shape)
    noise -= noise.mean(axis=1, keepdims=True)
    # Centred noise has lost a degree of freedom.
    noise *= np.sqrt(n_members / (n_members - 1) * variance)[:, None, None]
    return noise * np.where(varies, scale, 0.0)


def _other_participants(groups: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """For each observation, one of another participant, (R,) int64.

    Participants in random order give to their neighbour: nobody keeps the own, each gives once.
    """
    people, index = np.unique(groups, return_inverse=True)
    if len(people) < 2:
        raise ValueError("shuffled needs at least two participants")
    order = rng.permutation(len(people))
    donor = np.empty(len(people), np.int64)
    donor[order] = np.roll(order, 1)
    by_person = [np.flatnonzero(index == person) for person in range(len(people))]
    return np.array([rng.choice(by_person[donor[person]]) for person in index], dtype=np.int64)
