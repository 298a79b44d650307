"""Structure by structure: volumes, overlap between members, and the tables of both."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Protocol

import numpy as np
import pandas as pd
from significantdigits import Error, Method, significant_digits

from bids_varaug.machine import compiled
from bids_varaug.variability.maps import FLOAT32_BITS

BASELINE_FAMILY = "ieee"
PROBABILITY = 0.95
CONFIDENCE = 0.95


class RegionLabel(Protocol):
    """What the tables need to know of a label."""

    index: int
    name: str


@dataclass(frozen=True)
class RegionCounts:
    """How many voxels each member gave each structure, and each pair of members agreed on.

    Attributes
    ----------
    volumes : (M, K) int64, voxels
    intersections : (M, M, K) int64, voxels with class k in both; symmetric, diagonal = `volumes`
    """

    volumes: np.ndarray
    intersections: np.ndarray


def region_counts(slabs: Iterable[np.ndarray], n_members: int, n_classes: int) -> RegionCounts:
    """Count volumes and overlaps while the members' labels pass by, slab after slab.

    Parameters
    ----------
    slabs : iterable of (M, n) uint8
        Labels (class index) of all members in the voxels of a slab; any number of slabs.
    n_members, n_classes : M, K

    Returns
    -------
    RegionCounts

    Raises
    ------
    ValueError
        If a slab has another number of members, or a label is not below `n_classes`.

    Examples
    --------
    >>> counts = region_counts([np.array([[0, 1, 1], [0, 0, 1]], dtype="uint8")], 2, 2)
    >>> counts.volumes.tolist(), counts.intersections[0, 1].tolist()
    ([[1, 2], [2, 1]], [1, 1])
    """
    agreed = np.zeros(n_classes, np.int64)
    pairs = np.zeros((n_members, n_members, n_classes), np.int64)
    for slab in slabs:
        slab = np.ascontiguousarray(slab, np.uint8).reshape(len(slab), -1)
        if len(slab) != n_members:
            raise ValueError(f"a slab of {len(slab)} members, not {n_members}")
        if slab.size and slab.max() >= n_classes:
            raise ValueError(f"label {slab.max()}, but there are {n_classes} classes")
        _count_pairs(slab, agreed, pairs)
    # Only the upper triangle was counted, and voxels on which all agree only once.
    for a, b in combinations(range(n_members), 2):
        pairs[b, a] = pairs[a, b]
    pairs += agreed
    members = np.arange(n_members)
    return RegionCounts(volumes=pairs[members, members].copy(), intersections=pairs)


@compiled()
def _count_pairs(slab, agreed, pairs):
    n_members = slab.shape[0]
    for v in range(slab.shape[1]):
        same = True
        for m in range(1, n_members):
            if slab[m, v] != slab[0, v]:
                same = False
                break
        if same:
            agreed[slab[0, v]] += 1
            continue
        for a in range(n_members):
            label = slab[a, v]
            for b in range(a, n_members):
                if slab[b, v] == label:
                    pairs[a, b, label] += 1


def pairwise_dice(counts: RegionCounts) -> np.ndarray:
    """Overlap of each structure between each two members.

    ``Dice = 2 |A and B| / (|A| + |B|)`` [1]_: 1 where two members gave a structure the same
    voxels, 0 where only one of them has it, NaN where neither has it.

    Returns
    -------
    (M, M, K) float64

    References
    ----------
    .. [1] Dice (1945), Ecology 26(3), 297-302.

    Examples
    --------
    >>> counts = region_counts([np.array([[0, 1, 1], [0, 0, 1]], dtype="uint8")], 2, 3)
    >>> pairwise_dice(counts)[0, 1].round(3).tolist()
    [0.667, 0.667, nan]
    """
    total = counts.volumes[:, None, :] + counts.volumes[None, :, :]
    with np.errstate(invalid="ignore"):
        return 2 * counts.intersections / np.where(total > 0, total, np.nan)


def volume_significant_bits(volumes: np.ndarray) -> np.ndarray:
    """Significant bits of each structure's volume over the members.

    ``significantdigits.significant_digits`` with the centred normality hypothesis (CNH), relative
    to the members' mean: the number of bits that a further member would share with the mean with
    a probability of 95 %, at a confidence of 95 % [1]_. The package's standard deviation divides
    by M; with M - 1 there would be ``log2(M / (M - 1)) / 2`` bits less (0.1 for 8 members). Limited
    to 0 ... 24 bits.

    Parameters
    ----------
    volumes : (M, K) any unit, perturbed members only

    Returns
    -------
    (K,) float64, bit; NaN with fewer than two members, or where no member has the structure

    References
    ----------
    .. [1] Sohier et al. (2021), Confidence intervals for stochastic arithmetic, ACM TOMS 47(2).
    """
    volumes = np.asarray(volumes, dtype=np.float64)
    bits = np.full(volumes.shape[1], np.nan)
    mean = volumes.mean(axis=0)
    present = mean > 0
    if len(volumes) < 2 or not present.any():
        return bits
    bits[present] = significant_digits(
        volumes[:, present],
        reference=mean[present],
        axis=0,
        error=Error.Relative,
        method=Method.CNH,
        probability=PROBABILITY,
        confidence=CONFIDENCE,
    )
    return np.clip(bits, 0.0, FLOAT32_BITS)


def mean_entropy(labels: np.ndarray, entropy: np.ndarray, n_classes: int) -> np.ndarray:
    """Mean vote entropy over the voxels of each consensus structure.

    Parameters
    ----------
    labels : (X, Y, Z) uint8, consensus
    entropy : (X, Y, Z) float32, bit

    Returns
    -------
    (K,) float64, bit; NaN where the consensus has no voxel of the structure

    Examples
    --------
    >>> mean_entropy(np.array([1, 1]), np.array([0.0, 1.0]), 3).tolist()
    [nan, 0.5, nan]
    """
    counts = np.bincount(labels.ravel(), minlength=n_classes)
    sums = np.bincount(labels.ravel(), weights=entropy.ravel(), minlength=n_classes)
    return sums / np.where(counts > 0, counts, np.nan)


def region_table(
    counts: RegionCounts,
    families: Sequence[str],
    labels: Sequence[RegionLabel],
    voxel_volume: float,
    entropy_mean: np.ndarray,
) -> pd.DataFrame:
    """Return the variability of each structure over the perturbed members.

    If all members are of the baseline family, they take the perturbed members' place; one
    member has a volume but no spread (NaN).

    Parameters
    ----------
    counts : of all members, in the order of `families`
    families : (M,) family of each member
    labels : K labels, background first; it is left out of the table
    voxel_volume : mm3
    entropy_mean : (K,) bit, see `mean_entropy`

    Returns
    -------
    DataFrame, one row per structure
        index, name, volume_mean [mm3], volume_std [mm3, n - 1], cv (std / mean), sigbits [bit],
        dice_min, dice_mean over all pairs of perturbed members, entropy_mean [bit], then
        cv_FAMILY, dice_min_FAMILY, dice_mean_FAMILY within each family. NaN where a value does not
        exist.
    """
    perturbed = _perturbed(families)
    n_classes = len(labels)
    volumes = counts.volumes[perturbed] * float(voxel_volume)
    alone = len(perturbed) < 2
    std = _spread(volumes)
    dice = pairwise_dice(counts)
    columns = {
        "index": [int(label.index) for label in labels],
        "name": [label.name for label in labels],
        "volume_mean": volumes.mean(axis=0),
        "volume_std": std,
        "cv": _variation(volumes),
        "sigbits": volume_significant_bits(volumes),
    }
    columns["dice_min"], columns["dice_mean"] = _dice_summary(dice, perturbed)
    columns["entropy_mean"] = np.full(n_classes, np.nan) if alone else entropy_mean
    for family in dict.fromkeys(families[m] for m in perturbed):
        if family == BASELINE_FAMILY:
            continue
        within = [m for m in perturbed if families[m] == family]
        columns[f"cv_{family}"] = _variation(counts.volumes[within])
        columns[f"dice_min_{family}"], columns[f"dice_mean_{family}"] = _dice_summary(dice, within)
    return pd.DataFrame(columns).iloc[1:].reset_index(drop=True)


def members_table(
    counts: RegionCounts,
    members: Sequence[str],
    families: Sequence[str],
    labels: Sequence[RegionLabel],
    voxel_volume: float,
) -> pd.DataFrame:
    """Return the volume of every structure by every member, baseline included.

    Returns
    -------
    DataFrame, one row per member and structure
        member, family, index, name, volume [mm3]
    """
    rows = [
        (member, family, int(label.index), label.name, float(count) * float(voxel_volume))
        for member, family, volumes in zip(members, families, counts.volumes, strict=True)
        for label, count in zip(labels[1:], volumes[1:], strict=True)
    ]
    return pd.DataFrame(rows, columns=["member", "family", "index", "name", "volume"])


def _perturbed(families: Sequence[str]) -> list[int]:
    perturbed = [m for m, family in enumerate(families) if family != BASELINE_FAMILY]
    return perturbed or list(range(len(families)))


def _spread(volumes: np.ndarray) -> np.ndarray:
    """Sample standard deviation over members (M, K); NaN for one member, which has none."""
    alone = len(volumes) < 2
    return np.full(volumes.shape[1], np.nan) if alone else volumes.std(axis=0, ddof=1)


def _variation(volumes: np.ndarray) -> np.ndarray:
    """Coefficient of variation over members (M, K); NaN where no member has the structure."""
    mean = volumes.mean(axis=0)
    return _spread(volumes) / np.where(mean > 0, mean, np.nan)


def _dice_summary(dice: np.ndarray, members: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Least and mean Dice over the pairs of `members` that have the structure at all, (K,)."""
    pairs = list(combinations(members, 2))
    if not pairs:
        nothing = np.full(dice.shape[2], np.nan)
        return nothing, nothing.copy()
    values = np.stack([dice[a, b] for a, b in pairs])
    known = ~np.isnan(values)
    count = known.sum(axis=0)
    least = np.where(known, values, np.inf).min(axis=0)
    mean = np.where(known, values, 0).sum(axis=0) / np.where(count > 0, count, np.nan)
    return np.where(count > 0, least, np.nan), mean
