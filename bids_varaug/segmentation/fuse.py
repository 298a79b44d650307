"""The consensus of many members and how they disagree; memory does not grow with their number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from scipy.sparse import vstack

from bids_varaug.segmentation.posterior import (
    SparsePosterior,
    add_background,
    label_slabs,
    load_labels,
    load_posterior,
    save_posterior,
    split_slabs,
    sum_rows,
)
from bids_varaug.variability.maps import (
    FLOAT32_BITS,
    sample_std,
    significant_bits,
    unreliable,
    vote_entropy,
    vote_share,
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
    share : (X, Y, Z) float32, share of the group that voted for the consensus label
    """

    entropy: np.ndarray
    std: np.ndarray
    sigbits: np.ndarray
    share: np.ndarray

    @property
    def unreliable(self) -> np.ndarray:
        """Where `share` is below `variability.maps.UNRELIABLE_BELOW`, (X, Y, Z) bool."""
        return unreliable(self.share)


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
    parts = [_fuse_slabs(paths, groups, slabs) for slabs in split_slabs(paths[0])]
    mean = SparsePosterior(
        np.concatenate([mean.labels for mean, _ in parts]),
        vstack([mean.rows for mean, _ in parts], format="csr"),
    )
    maps = [field.name for field in fields(Spread)]
    return Fusion(mean, {
        group: Spread(*(np.concatenate([getattr(s[group], m) for _, s in parts]) for m in maps))
        for group in groups
    })  # fmt: skip


def _fuse_slabs(
    paths: Sequence[Path], groups: Mapping[str, Sequence[int]], slabs: slice
) -> tuple[SparsePosterior, dict[str, Spread]]:
    shape = load_labels(paths[0], slabs).shape
    rows = sum_rows([paths[m] for m in groups[ALL]], slabs)
    rows.data /= len(groups[ALL])
    mean = SparsePosterior.from_rows(rows.astype(np.float32), shape)
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
    return mean, {
        group: Spread(*(_place(v, voxels, shape, a) for v, a in tally.maps(consensus)))
        for group, tally in tallies.items()
    }


def _of_label(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Take from (N, K) values those of the labels (N,)."""
    return np.take_along_axis(values, labels[:, None].astype(np.int64), axis=1)[:, 0]


def _place(
    values: np.ndarray, voxels: np.ndarray, shape: tuple[int, ...], elsewhere: float
) -> np.ndarray:
    whole = np.full(np.prod(shape), elsewhere, np.float32)
    whole[voxels] = values
    return whole.reshape(shape)


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

    def maps(self, consensus: np.ndarray) -> list[tuple[np.ndarray, float]]:
        """What `Spread` holds, (N,), with what it is where nobody stores a voxel: all agree."""
        std = sample_std(self.squares, self.n_members)
        return [
            (vote_entropy(self.votes.T, self.n_members), 0.0),
            (std, 0.0),
            (significant_bits(self.mean, std), FLOAT32_BITS),
            (vote_share(_of_label(self.votes, consensus), self.n_members), 1.0),
        ]


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
            for name in ("entropy", "std", "sigbits", "unreliable"):
                maps[name + suffix_of(group)] = getattr(spread, name)
        arrays["entropy_mean" + suffix_of(group)] = mean_entropy(
            fusion.mean.labels, spread.entropy, n_classes
        )
    return MembersSummary(maps, arrays)
