"""The consensus of many members and how they disagree; memory does not grow with their number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_array, vstack

from bids_varaug.segmentation.posterior import (
    SparsePosterior,
    add_background,
    check_same_box,
    label_slabs,
    load_posterior,
    save_posterior,
    split_slabs,
)
from bids_varaug.variability.maps import FLOAT32_BITS, significant_bits, unreliable, vote_entropy
from bids_varaug.variability.regions import ALL, group_members, mean_entropy, region_counts, suffix_of

_MAPS = {"entropy": np.float32, "std": np.float32, "sigbits": np.float32, "unreliable": np.bool_}


@dataclass(frozen=True)
class Fusion:
    """Consensus of an ensemble and how its members disagree about it, on the head box.

    Maps (X, Y, Z) of all perturbed members and, with ``_FAMILY`` after the name, of each family of two or more. With
    one member there is no spread: entropy and std are 0 and mean nothing.

    - entropy : float32, bit, of the votes
    - std : float32, of the posteriors of the consensus label (sample, n - 1)
    - sigbits : float32, bit, of the same posteriors; 24 where the members agree exactly
    - unreliable : bool, where less than `variability.maps.UNRELIABLE_BELOW` voted for the consensus label
    """

    mean: SparsePosterior  # mean posterior; its labels are the consensus, ties go to the lower class
    maps: dict[str, np.ndarray]


def fuse_members(paths: Sequence[Path], families: Sequence[str] | None = None) -> Fusion:
    """Average the posteriors of the perturbed members and measure how they differ.

    `paths` are one posterior file or more, see `segmentation.posterior`; `families` are those of the members, see
    `group_members` (None takes all for perturbed). `UserError` if a file is damaged, or boxes or classes differ.
    """
    groups = {ALL: list(range(len(paths)))} if families is None else group_members(families)
    groups = {group: members for group, members in groups.items() if group == ALL or len(members) > 1}
    labels = np.zeros(check_same_box(paths), np.uint8)
    maps: dict[str, np.ndarray] = {}
    for group in groups:
        maps |= {name + suffix_of(group): np.zeros(labels.shape, dtype) for name, dtype in _MAPS.items()}
        maps["sigbits" + suffix_of(group)] += FLOAT32_BITS
    rows = []
    for slabs in split_slabs(len(labels)):
        mean = _mean([paths[m] for m in groups[ALL]], slabs)
        labels[slabs] = mean.labels
        rows.append(mean.rows)
        voxels = mean.stored.reshape(mean.labels.shape)
        for name, values in _spread(paths, groups, slabs, mean).items():
            maps[name][slabs][voxels] = values
    return Fusion(SparsePosterior(labels, vstack(rows, format="csr")), maps)


def _mean(paths: Sequence[Path], slabs: slice) -> SparsePosterior:
    total: csr_array | float = 0.0
    for path in paths:
        member = load_posterior(path, slabs)
        total = member.rows.astype(np.float64) + total
    return SparsePosterior.from_rows(csr_array(total / len(paths), dtype=np.float32), member.labels.shape)


def _spread(
    paths: Sequence[Path], groups: Mapping[str, Sequence[int]], slabs: slice, mean: SparsePosterior
) -> dict[str, np.ndarray]:
    """Return the values of the maps, each (N,), at the voxels that the mean stores."""
    voxels = np.flatnonzero(mean.stored)
    consensus = mean.labels.ravel()[voxels]
    tallies = {group: _Tally(len(voxels), mean.rows.shape[1]) for group in groups}
    for m in groups[ALL]:
        member = load_posterior(paths[m], slabs)
        posterior = add_background(member.rows[voxels].toarray())
        values = posterior[np.arange(len(voxels)), consensus].astype(np.float64)
        for tally in (tallies[group] for group, members in groups.items() if m in members):
            tally.add(values, member.labels.ravel()[voxels])
    spreads = {group: tally.spread(consensus) for group, tally in tallies.items()}
    return {name + suffix_of(group): values for group, spread in spreads.items() for name, values in spread.items()}


class _Tally:
    """Votes of a group of members, and moments of their posterior of the consensus label (Welford's recurrence)."""

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
        std = np.sqrt(self.squares / max(1, self.n_members - 1))
        votes_for = self.votes[np.arange(len(consensus)), consensus]
        split = votes_for < self.n_members
        entropy = np.zeros(len(consensus), np.float32)
        entropy[split] = vote_entropy(self.votes[split].T, self.n_members)
        return {
            "entropy": entropy, "std": std, "sigbits": significant_bits(self.mean, std),
            "unreliable": unreliable(votes_for, self.n_members),
        }  # fmt: skip


class Summary(NamedTuple):
    """Files of what all members say together."""

    mean: Path  # mean posterior of the consensus, safetensors
    maps: Path  # `Fusion.maps`, .npz
    counts: Path  # volumes (M, K), intersections (M, M, K) int64 [voxels]; entropy_mean(_FAMILY) (K,) [bit], .npz


def summarise_members(
    paths: Sequence[Path], families: Sequence[str], folder: Path, family_maps: bool = False
) -> Summary:
    """Fuse the perturbed members (the baseline alone where there is none), and count all members.

    Parameters
    ----------
    paths, families : posterior file and family of every member
    folder : where the results go
    family_maps : whether to keep maps of each family too
    """
    files = Summary(folder / "mean.safetensors", folder / "maps.npz", folder / "counts.npz")
    fusion = fuse_members(paths, families)
    save_posterior(files.mean, fusion.mean)
    n_classes = fusion.mean.rows.shape[1]
    found = region_counts(label_slabs(paths), len(paths), n_classes)
    counts = {"volumes": found.volumes, "intersections": found.intersections}
    for name, values in fusion.maps.items():
        if name.startswith("entropy"):
            mean = mean_entropy(fusion.mean.labels, values, n_classes)
            counts[name.replace("entropy", "entropy_mean")] = mean
    maps = fusion.maps if family_maps else {name: fusion.maps[name] for name in _MAPS}
    for file, arrays in ((files.maps, maps), (files.counts, counts)):
        np.savez(file, **arrays)  # type: ignore[arg-type]  # as if arrays were allow_pickle
    return files
