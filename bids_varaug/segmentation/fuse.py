"""The consensus of many members and how they disagree; memory does not grow with their number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.sparse import vstack

from bids_varaug.segmentation.posterior import (
    SparsePosterior,
    add_background,
    check_same_box,
    label_slabs,
    load_posterior,
    save_posterior,
    split_slabs,
)
from bids_varaug.variability.maps import (
    FLOAT32_BITS,
    sample_std,
    significant_bits,
    unreliable,
    vote_entropy,
)
from bids_varaug.variability.regions import (
    ALL,
    group_members,
    mean_entropy,
    region_counts,
    suffix_of,
)


@dataclass(frozen=True)
class Spread:
    """How the members of a group disagree about the consensus, on the head box.

    With one member there is no spread: `entropy` and `std` are 0 and mean nothing.

    Attributes
    ----------
    entropy : (X, Y, Z) float32, bit, of the group's votes
    std : (X, Y, Z) float32, of the group's posteriors of the consensus label (sample, n - 1)
    sigbits : (X, Y, Z) float32, bit, of the same posteriors; 24 where the members agree exactly
    unreliable : (X, Y, Z) bool, where less than `variability.maps.UNRELIABLE_BELOW` of the group
        voted for the consensus label
    """

    entropy: np.ndarray
    std: np.ndarray
    sigbits: np.ndarray
    unreliable: np.ndarray

    @classmethod
    def none(cls, shape: tuple[int, ...]) -> Spread:
        """Return that of members that agree everywhere."""
        full = np.full(shape, FLOAT32_BITS, np.float32)
        return cls(np.zeros(shape, np.float32), np.zeros(shape, np.float32), full,
                   np.zeros(shape, bool))  # fmt: skip


@dataclass(frozen=True)
class Fusion:
    """Consensus of an ensemble and its spread.

    Attributes
    ----------
    mean : mean posterior; its labels are the consensus, ties go to the lower class
    spread : of `ALL` members, and of each family with two members or more
    """

    mean: SparsePosterior
    spread: Mapping[str, Spread]


def fuse_members(paths: Sequence[Path], families: Sequence[str] | None = None) -> Fusion:
    """Average the posteriors of the perturbed members and measure how they differ.

    Parameters
    ----------
    paths : (M,) posterior files, see `segmentation.posterior`
    families : (M,) family of each, see `group_members`; None takes all for perturbed

    Raises
    ------
    ValueError
        If there is no path.
    UserError
        If a file is damaged, or the members' boxes or classes differ.
    """
    if not paths:
        raise ValueError("no member to fuse")
    groups = {ALL: range(len(paths))} if families is None else group_members(families)
    groups = {group: m for group, m in groups.items() if group == ALL or len(m) > 1}
    labels = np.zeros(check_same_box(paths), np.uint8)
    spread = {group: Spread.none(labels.shape) for group in groups}
    rows = []
    for slabs in split_slabs(len(labels)):
        mean, tallies = _fuse_slabs(paths, groups, slabs)
        labels[slabs] = mean.labels
        rows.append(mean.rows)
        voxels = mean.stored.reshape(mean.labels.shape)
        for group, tally in tallies.items():
            for name, values in tally.spread(mean.labels[voxels]).items():
                getattr(spread[group], name)[slabs][voxels] = values
    return Fusion(SparsePosterior(labels, vstack(rows, format="csr")), spread)


def _fuse_slabs(
    paths: Sequence[Path], groups: Mapping[str, Sequence[int]], slabs: slice
) -> tuple[SparsePosterior, dict[str, _Tally]]:
    total = 0
    for m in groups[ALL]:
        member = load_posterior(paths[m], slabs)
        total = member.rows.astype(np.float64) + total
    rows = (total / len(groups[ALL])).astype(np.float32)
    mean = SparsePosterior.from_rows(rows, member.labels.shape)
    voxels = np.flatnonzero(mean.stored)
    consensus = mean.labels.ravel()[voxels]
    tallies = {group: _Tally(len(voxels), rows.shape[1]) for group in groups}
    for m in groups[ALL]:
        member = load_posterior(paths[m], slabs)
        posterior = add_background(member.rows[voxels].toarray())
        values = _of_label(posterior, consensus).astype(np.float64)
        for group, tally in tallies.items():
            if m in groups[group]:
                tally.add(values, member.labels.ravel()[voxels])
    return mean, tallies


def _of_label(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Take from (N, K) values those of the labels (N,)."""
    return np.take_along_axis(values, labels[:, None].astype(np.int64), axis=1)[:, 0]


class _Tally:
    """Votes of a group of members, and moments of their posterior of the consensus label.

    Members come one after another (Welford's recurrence), so that memory does not grow.
    """

    def __init__(self, n_voxels: int, n_classes: int):
        self.n_members = 0
        self.mean, self.squares = np.zeros((2, n_voxels))
        self.votes = np.zeros((n_voxels, n_classes), np.uint16)

    def add(self, values: np.ndarray, labels: np.ndarray) -> None:
        self.n_members += 1
        delta = values - self.mean
        self.mean += delta / self.n_members
        self.squares += delta * (values - self.mean)
        self.votes[np.arange(len(labels)), labels] += 1

    def spread(self, consensus: np.ndarray) -> dict[str, np.ndarray]:
        """Return the values of `Spread`, each (N,)."""
        std = sample_std(self.squares, self.n_members)
        votes_for = _of_label(self.votes, consensus)
        split = votes_for < self.n_members
        entropy = np.zeros(len(consensus), np.float32)
        entropy[split] = vote_entropy(self.votes[split].T, self.n_members)
        return {
            "entropy": entropy,
            "std": std,
            "sigbits": significant_bits(self.mean, std),
            "unreliable": unreliable(votes_for, self.n_members),
        }


@dataclass(frozen=True)
class MembersSummary:
    """Arrays on the head box, and counts per member and class.

    Attributes
    ----------
    maps : entropy [bit], std, sigbits [bit] (X, Y, Z) float32; unreliable (X, Y, Z) bool; with
        ``_FAMILY`` after the name within a family
    counts : volumes (M, K) and intersections (M, M, K) int64, voxels; entropy_mean and
        entropy_mean_FAMILY (K,) bit
    """

    maps: dict[str, np.ndarray]
    counts: dict[str, np.ndarray]


def summarise_members(
    paths: Sequence[Path], families: Sequence[str], mean_path: Path, family_maps: bool = False
) -> MembersSummary:
    """Fuse the perturbed members (the baseline alone where there is none), and count all members.

    Parameters
    ----------
    paths : posterior file of every member
    families : (M,) family of each
    mean_path : where the mean posterior of the consensus goes
    family_maps : whether to return maps of each family too
    """
    fusion = fuse_members(paths, families)
    save_posterior(mean_path, fusion.mean, {})
    n_classes = fusion.mean.rows.shape[1]
    counts = region_counts(label_slabs(paths), len(paths), n_classes)
    maps = {}
    arrays = {"volumes": counts.volumes, "intersections": counts.intersections}
    for group, spread in fusion.spread.items():
        if group == ALL or family_maps:
            maps |= {name + suffix_of(group): values for name, values in vars(spread).items()}
        arrays["entropy_mean" + suffix_of(group)] = mean_entropy(fusion.mean.labels, spread.entropy, n_classes)
    return MembersSummary(maps, arrays)
