"""Folds that never split a participant, or a site."""

from __future__ import annotations

import numpy as np
from sklearn.model_selection import GroupKFold

MIN_SITES = 3


def grouped_folds(groups: np.ndarray, n_folds: int, seed: int) -> np.ndarray:
    """Deal groups out to folds of nearly equal size, by chance.

    Parameters
    ----------
    groups : (R,) what a fold must not split
    n_folds : at most this many; fewer where there are fewer groups

    Returns
    -------
    (R,) int64
        The fold in which each row is held out, 0 ... n_folds - 1.

    Raises
    ------
    ValueError
        With fewer than two groups.

    Examples
    --------
    >>> folds = grouped_folds(np.array([0, 0, 1, 2]), 2, seed=0)
    >>> bool(folds[0] == folds[1]), sorted(set(folds.tolist()))
    (True, [0, 1])
    """
    n_folds = min(n_folds, len(np.unique(groups)))
    if n_folds < 2:
        raise ValueError("folds need at least two groups")
    fold = np.zeros(len(groups), np.int64)
    splitter = GroupKFold(n_folds, shuffle=True, random_state=seed)
    for k, (_, held_out) in enumerate(splitter.split(np.zeros(len(groups)), groups=groups)):
        fold[held_out] = k
    return fold


def known_sites(groups: np.ndarray, sites: np.ndarray | None) -> np.ndarray | None:
    """Site of each row as a number, if there are sites enough to hold some out.

    Parameters
    ----------
    groups : (R,) participant of each row
    sites : (R,) site of each row (None or "" where unknown), or None

    Returns
    -------
    (R,) int64 or None
        None with fewer than 3 sites, which are no sample of sites, or where a site is unknown.
        All rows of a participant have the site of the first, so that folds split neither.
    """
    if sites is None:
        return None
    named = [site if isinstance(site, str) else "" for site in sites]
    if "" in named or len(set(named)) < MIN_SITES:
        return None
    index = np.unique(named, return_inverse=True)[1]
    _, first, person = np.unique(groups, return_index=True, return_inverse=True)
    return index[first][person]


def participant_weights(groups: np.ndarray) -> np.ndarray:
    """Weight of each row so that the rows of one participant add up to 1, (R,) float64.

    Examples
    --------
    >>> participant_weights(np.array([4, 7, 7])).tolist()
    [1.0, 0.5, 0.5]
    """
    _, index, counts = np.unique(groups, return_inverse=True, return_counts=True)
    return 1.0 / counts[index]
