"""Voxel-wise measures of how much the members of an ensemble disagree."""

from __future__ import annotations

import numpy as np

FLOAT32_BITS = 24.0
"""No result computed in float32 has more significant bits."""
UNRELIABLE_BELOW = 0.75
"""A voxel is unreliable where fewer than this share of the members chose the consensus label."""


def vote_entropy(votes: np.ndarray, n_members: int) -> np.ndarray:
    """Disagreement of the members about each voxel's label.

    Shannon entropy of the empirical label distribution (Gonzalez-Pepe et al. 2023, arXiv:2308.01939, there in nats),
    ``H = -sum_k p_k log2(p_k)`` with ``p_k = votes_k / n_members``: 0 where all agree, ``log2(n_members)`` where all
    differ.

    Parameters
    ----------
    votes : (K, ...) unsigned integer, how many members chose each of the K labels; sums to `n_members` over K

    Returns
    -------
    (...) float32, bit

    Raises
    ------
    ValueError
        If the votes do not sum to `n_members` everywhere.

    Examples
    --------
    >>> float(vote_entropy(np.array([[[[1]]], [[[1]]]], dtype="uint8"), 2)[0, 0, 0])
    1.0
    """
    votes = np.asarray(votes)
    if n_members < 1 or (votes.sum(axis=0, dtype=np.int64) != n_members).any():
        raise ValueError(f"the votes do not sum to {n_members} members in every voxel")
    shares = np.arange(1, n_members) / n_members
    terms = np.concatenate([[0.0], -shares * np.log2(shares), [0.0]])  # of 0, 1, ..., n votes
    entropy = np.zeros(votes.shape[1:])
    for count in votes:  # in a fixed order, class by class: the same bits every time
        entropy += terms[count]
    return entropy.astype(np.float32)


def significant_bits(mean: np.ndarray, sd: np.ndarray) -> np.ndarray:
    """How many leading bits of a value the perturbations leave alone.

    ``s = -log2(|sd / mean|)`` [1]_, limited to 0 (noise) ... 24 (float32 has no more; also where all members agree
    exactly). This is Parker's estimate without a confidence level; the ``significantdigits`` package subtracts from it
    a constant that depends on the number of members (2.0 bits for 8 members at 95 % probability and 95 % confidence)
    [2]_, see `regions.significant_bits_lower`. Without it, ensembles of different size can be compared.

    Parameters
    ----------
    mean, sd : (...) float, same unit

    Returns
    -------
    (...) float32, bit

    References
    ----------
    .. [1] Parker (1997), Monte Carlo arithmetic, UCLA CSD-970002.
    .. [2] Sohier et al. (2021), Confidence intervals for stochastic arithmetic, ACM TOMS 47(2).

    Examples
    --------
    >>> significant_bits(np.array([1.0, 1.0, 0.5]), np.array([0.25, 0.0, 4.0])).tolist()
    [2.0, 24.0, 0.0]
    """
    mean = np.abs(np.asarray(mean, dtype=np.float64))
    sd = np.asarray(sd, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        bits = -np.log2(sd / mean)
    bits = np.where(sd == 0, FLOAT32_BITS, bits)
    return np.clip(bits, 0.0, FLOAT32_BITS).astype(np.float32)


def unreliable(votes_for: np.ndarray, n_members: int) -> np.ndarray:
    """Voxels (...) bool, where a share below `UNRELIABLE_BELOW` of the members chose the consensus label.

    Parameters
    ----------
    votes_for : (...) integer, how many members chose it
    """
    return np.asarray(votes_for) / n_members < UNRELIABLE_BELOW
