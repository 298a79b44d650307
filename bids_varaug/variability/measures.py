"""How much the members of an ensemble disagree: voxel by voxel, and structure by structure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from significantdigits import Error, Method, significant_digits

from bids_varaug.machine import compiled
from bids_varaug.models.ensemble import BASELINE, Label

FLOAT32_BITS = 24.0
"""No result computed in float32 has more significant bits."""
FLOAT64_BITS = 53.0


def vote_entropy(votes: np.ndarray, n_members: int) -> np.ndarray:
    """Disagreement of the members about each voxel's label, (...) float32, bit.

    Shannon entropy of the empirical label distribution (Gonzalez-Pepe et al. 2023, arXiv:2308.01939, there in nats),
    ``H = -sum_k p_k log2(p_k)`` with ``p_k = votes_k / n_members``: 0 where all agree, ``log2(n_members)`` where all
    differ. `votes` (K, ...) unsigned integer say how many members chose each of the K labels; unless they sum to
    `n_members` over K everywhere, that is a ValueError.

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


def significant_bits(mean: np.ndarray, sd: np.ndarray, most: float = FLOAT32_BITS) -> np.ndarray:
    """How many leading bits of a value the perturbations leave alone, (...) float32, bit.

    ``s = -log2(|sd / mean|)``, limited to 0 (noise) ... `most` (float32 has 24; also where all members agree exactly).
    This is the estimate of Parker (1997, Monte Carlo arithmetic, UCLA CSD-970002) without a confidence level; the
    ``significantdigits`` package (Sohier et al. 2021, Confidence intervals for stochastic arithmetic, ACM TOMS 47(2))
    subtracts from it a constant that depends on the number of members, see `significant_bits_lower`. Without it,
    ensembles of different size can be compared. `mean` and `sd` (...) are of one unit.

    >>> significant_bits(np.array([1.0, 1.0, 0.5]), np.array([0.25, 0.0, 4.0])).tolist()
    [2.0, 24.0, 0.0]
    """
    mean = np.abs(np.asarray(mean, dtype=np.float64))
    sd = np.asarray(sd, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        bits = -np.log2(sd / mean)
    bits = np.where(sd == 0, most, bits)
    return np.clip(bits, 0.0, most).astype(np.float32)


def calibrate(posterior: np.ndarray, temperature: float) -> np.ndarray:
    """Return ``p^(1/T) / sum_k p_k^(1/T)`` of posteriors p, rows (N, K) float32: less sure where T is above 1.

    >>> calibrate(np.array([[0.64, 0.36, 0]], np.float32), 2.0).round(3).tolist()  # roots 0.8 and 0.6
    [[0.5709999799728394, 0.42899999022483826, 0.0]]
    """
    calibrated = np.array(posterior, np.float32)
    if temperature != 1:
        _temper(calibrated, np.float32(1 / temperature))
    return calibrated


@compiled()
def _temper(rows: np.ndarray, power: np.float32) -> None:
    for row in rows:
        total = 0.0
        for k in range(len(row)):
            if row[k] > 0:  # few are: a row has 32 classes, and three or four in doubt
                row[k] = row[k] ** power
                total += row[k]
        row /= np.float32(total)


def posterior_entropy(posterior: np.ndarray) -> np.ndarray:
    """Uncertainty about each voxel's label, ``H = -sum_k p_k log2(p_k)`` of rows (N, K) float32: (N,) float32, bit.

    Of the members' mean posterior it is the total uncertainty. The mean H of the members is what each of them is unsure
    of; the rest, the mutual information of label and member, is what they disagree about (Depeweg et al. 2018, ICML;
    Kendall & Gal 2017, NeurIPS; of ensembles Lakshminarayanan et al. 2017, NeurIPS).

    >>> posterior_entropy(np.array([[1, 0, 0], [0.5, 0.25, 0.25]], np.float32)).tolist()
    [0.0, 1.5]
    """
    entropy = np.zeros(len(posterior), np.float32)
    _sum_entropy(np.ascontiguousarray(posterior, np.float32), entropy)
    return entropy


@compiled()
def _sum_entropy(rows: np.ndarray, entropy: np.ndarray) -> None:
    for v in range(len(rows)):
        total = 0.0
        for p in rows[v]:
            if 0 < p < 1:
                total -= p * np.log2(p)
        entropy[v] = total


ALL = "all"
"""All perturbed members together, beside the names of the families."""
PROBABILITY = 0.95
CONFIDENCE = 0.95


@dataclass(frozen=True)
class RegionCounts:
    """Voxels that each member gave each structure, and that each two members agree on."""

    volumes: np.ndarray  # (M, K) int64
    intersections: np.ndarray  # (M, M, K) int64


def region_counts(slabs: Iterable[np.ndarray], n_members: int, n_classes: int) -> RegionCounts:
    """Count volumes and overlaps while the members' labels pass by, slab after slab.

    A slab is (M, n) uint8: the labels (class index) of all M members in n voxels. ValueError if one has another number
    of members, or a label that is not below `n_classes`.
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
    pairs = np.maximum(pairs, pairs.swapaxes(0, 1)) + agreed
    return RegionCounts(volumes=np.einsum("aak->ak", pairs).copy(), intersections=pairs)


@compiled()
def _count_pairs(slab: np.ndarray, agreed: np.ndarray, pairs: np.ndarray) -> None:
    n_members = slab.shape[0]
    for v in range(slab.shape[1]):
        for m in range(1, n_members):
            if slab[m, v] != slab[0, v]:
                break
        else:
            agreed[slab[0, v]] += 1
            continue
        for a in range(n_members):
            label = slab[a, v]
            for b in range(a, n_members):
                if slab[b, v] == label:
                    pairs[a, b, label] += 1


def pairwise_dice(counts: RegionCounts) -> np.ndarray:
    """Overlap of each structure between each two members, (M, M, K) float64.

    ``Dice = 2 |A and B| / (|A| + |B|)`` (Dice 1945, Ecology 26(3), 297-302): 1 where two members gave a structure the
    same voxels, 0 where only one of them has it, NaN where neither has it.

    >>> counts = region_counts([np.array([[0, 1, 1], [0, 0, 1]], dtype="uint8")], 2, 3)
    >>> pairwise_dice(counts)[0, 1].round(3).tolist()
    [0.667, 0.667, nan]
    """
    total = counts.volumes[:, None, :] + counts.volumes[None, :, :]
    with np.errstate(invalid="ignore"):
        return 2 * counts.intersections / np.where(total > 0, total, np.nan)


def group_members(families: Sequence[str]) -> dict[str, list[int]]:
    """Number the perturbed members: `ALL` together, then those of each family; the baseline only where it is alone.

    >>> group_members(["ieee", "mca", "mca", "seed"])
    {'all': [1, 2, 3], 'mca': [1, 2], 'seed': [3]}
    >>> group_members(["ieee"])
    {'all': [0]}
    """
    perturbed = [m for m, family in enumerate(families) if family != BASELINE]
    groups = {ALL: perturbed or list(range(len(families)))}
    for m in perturbed:
        groups.setdefault(families[m], []).append(m)
    return groups


def suffix_of(group: str) -> str:
    """Return what ends the names of a group's columns and maps: nothing, or ``_FAMILY``."""
    return "" if group == ALL else f"_{group}"


def significant_bits_lower(volumes: np.ndarray) -> np.ndarray:
    """Lower confidence bound of the significant bits of each structure's volume over the perturbed members.

    ``significantdigits.significant_digits`` with the centred normality hypothesis (CNH), relative to the members' mean:
    the number of bits that a further member would share with the mean with a probability of 95 %, at a confidence of
    95 % (Sohier et al. 2021, ACM TOMS 47(2)). It is `significant_bits` less a margin that depends on the number of
    members (2.0 bits for 8). The package's standard deviation divides by M; with M - 1 there would be
    ``log2(M / (M - 1)) / 2`` bits less (0.1 for 8 members). Limited to 0 ... 24 bits.

    `volumes` (M, K) are of any unit. Returns (K,) float64, NaN with fewer than two members, or where none has the
    structure.
    """
    volumes = np.asarray(volumes, dtype=np.float64)
    bits = np.full(volumes.shape[1], np.nan)
    mean = volumes.mean(axis=0)
    present = mean > 0
    if len(volumes) < 2 or not present.any():
        return bits
    bits[present] = significant_digits(
        volumes[:, present], reference=mean[present], axis=0, error=Error.Relative, method=Method.CNH,
        probability=PROBABILITY, confidence=CONFIDENCE,
    )  # fmt: skip
    return np.clip(bits, 0.0, FLOAT32_BITS)


def general_bits(values: np.ndarray) -> np.ndarray:
    """Whole bits that every one of M results shares with their mean, (...) float64, of `values` (M, ...).

    ``max k in 0 ... 53 such that |x_i / mean - 1| <= 2^-k for all i``: the ``General`` method of the significantdigits
    package, which assumes no distribution (Sohier et al. 2021, ACM TOMS 47(2)). 0 where the mean is 0 and not all are.

    >>> general_bits(np.array([[1.0, 2.0, 0.0], [1.25, 2.0, 0.0]])).tolist()
    [3.0, 53.0, 53.0]
    """
    mean = values[0] + np.mean(values - values[0], axis=0)  # exact where all are equal
    with np.errstate(divide="ignore", invalid="ignore"):
        farthest = np.abs(values - mean).max(axis=0)
        return bits_within(np.where(farthest == 0, 0.0, farthest / np.abs(mean)))


def bits_within(relative: np.ndarray) -> np.ndarray:
    """Whole bits, 0 to 53, that values share with a reference from which they are so far at most, relative to it."""
    with np.errstate(divide="ignore"):
        return np.clip(np.floor(-np.log2(relative)), 0.0, FLOAT64_BITS)


def mean_entropy(labels: np.ndarray, entropy: np.ndarray, n_classes: int) -> np.ndarray:
    """Mean of an entropy over the voxels of each consensus structure, (K,) float64, bit; NaN where there is none.

    `labels` (X, Y, Z) uint8 are the consensus, `entropy` (X, Y, Z) float32 is in bit.

    >>> mean_entropy(np.array([1, 1]), np.array([0.0, 1.0]), 3).tolist()
    [nan, 0.5, nan]
    """
    counts = np.bincount(labels.ravel(), minlength=n_classes)
    sums = np.bincount(labels.ravel(), weights=entropy.ravel(), minlength=n_classes)
    return sums / np.where(counts > 0, counts, np.nan)


def region_table(
    counts: RegionCounts,
    families: Sequence[str],
    labels: Sequence[Label],
    voxel_volume: float,
    entropy_means: Mapping[str, np.ndarray],
) -> pd.DataFrame:
    """Return the variability of each structure over the perturbed members, one row per structure.

    If all members are of the baseline family, they take the perturbed members' place; one member has a volume but no
    spread (NaN). Columns are index, name and the measures that ``data/templates/columns.tsv`` describes; then the same
    within each family, with ``_FAMILY`` after the name. NaN where a value does not exist, as all do in a family of one
    member.

    Parameters
    ----------
    counts : of all members
    families : (M,) family of each member
    labels : K labels, background first; it is left out of the table
    voxel_volume : mm3
    entropy_means : (K,) bit of each group of `group_members` with two members, see `mean_entropy`
    """
    columns = {"index": [int(label.index) for label in labels], "name": [label.name for label in labels]}
    dice = pairwise_dice(counts)
    nothing = np.full(len(labels), np.nan)
    for group, members in group_members(families).items():
        volumes = counts.volumes[members] * float(voxel_volume)
        mean, alone = volumes.mean(axis=0), len(members) < 2
        present = np.where(mean > 0, mean, np.nan)
        std = nothing if alone else volumes.std(axis=0, ddof=1)
        pairs = dice[np.ix_(members, members)][np.triu_indices(len(members), 1)]  # (pairs, K)
        n_pairs = (~np.isnan(pairs)).sum(axis=0)  # that have the structure at all
        measures = {
            "volume_mean": nothing if alone and group != ALL else mean,
            "volume_std": std,
            "cv": std / present,
            "sigbits": np.where(np.isnan(std / present), np.nan, significant_bits(mean, std)),
            "sigbits_lower": significant_bits_lower(volumes),
            "dice_min": np.fmin.reduce(pairs, axis=0, initial=np.nan),
            "dice_mean": np.nansum(pairs, axis=0) / np.where(n_pairs > 0, n_pairs, np.nan),
            "entropy_mean": nothing if alone else entropy_means[group],
        }
        columns |= {name + suffix_of(group): values for name, values in measures.items()}
    return pd.DataFrame(columns).iloc[1:].reset_index(drop=True)


def members_table(
    counts: RegionCounts, members: Sequence[str], families: Sequence[str], labels: Sequence[Label], voxel_volume: float
) -> pd.DataFrame:
    """Return a row for every member, baseline included, and structure: member, family, index, name, volume [mm3]."""
    structures = pd.DataFrame({"index": [label.index for label in labels], "name": [label.name for label in labels]})
    tables = [
        structures.assign(member=member, family=family, volume=volumes * float(voxel_volume))[1:]
        for member, family, volumes in zip(members, families, counts.volumes, strict=True)
    ]
    return pd.concat(tables, ignore_index=True)[["member", "family", "index", "name", "volume"]]
