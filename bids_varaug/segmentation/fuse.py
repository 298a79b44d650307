"""One consensus from many members, a slab at a time: memory does not grow with their number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bids_varaug.machine import compiled
from bids_varaug.segmentation.streams import PosteriorReader, PosteriorWriter, check_same_box
from bids_varaug.variability.maps import (
    FLOAT32_BITS,
    entropy_terms,
    sample_std,
    significant_bits,
    unreliable,
    vote_share,
)


@dataclass(frozen=True)
class Fusion:
    """Consensus of an ensemble and its voxel-wise spread, on the head box.

    With one member there is no spread: `entropy` and `std` are 0 and mean nothing.

    Attributes
    ----------
    labels : (X, Y, Z) uint8, class of the largest mean posterior, ties to the lower class
    entropy : (X, Y, Z) float32, bit, of the members' votes
    std : (X, Y, Z) float32, of the members' posteriors of the consensus label (sample, n - 1)
    sigbits : (X, Y, Z) float32, bit, of the same posteriors; 24 where the members agree exactly
    share : (X, Y, Z) float32, share of the members that voted for the consensus label
    unreliable : (X, Y, Z) bool, `share` below `variability.maps.UNRELIABLE_BELOW`
    n_members : int
    """

    labels: np.ndarray
    entropy: np.ndarray
    std: np.ndarray
    sigbits: np.ndarray
    share: np.ndarray
    unreliable: np.ndarray
    n_members: int


def fuse_members(
    paths: Sequence[Path], out_path: Path, metadata: dict[str, str] | None = None
) -> Fusion:
    """Average the posteriors of the members and measure how they differ.

    A voxel that a member does not store counts as surely background for that member. Means and
    squared deviations are accumulated in float64 in the order of `paths` (Welford). One thread:
    the time goes into reading, and threads that wait for each other at every slab on busy cores
    made it five times slower.

    Parameters
    ----------
    paths : posterior files of the members (see `segmentation.posterior`)
    out_path : where the mean posterior goes, in the same layout; a voxel is stored if any member
        stores it
    metadata : str -> str, kept in that file

    Returns
    -------
    Fusion

    Raises
    ------
    ValueError
        If there is no path.
    UserError
        If a file is damaged, or the members' boxes or classes differ.
    """
    if not paths:
        raise ValueError("no member to fuse")
    readers = [PosteriorReader.open(path) for path in paths]
    first = readers[0]
    check_same_box(readers)
    shape, n_slab = first.shape, first.shape[1] * first.shape[2]
    labels = np.zeros((shape[0], n_slab), np.uint8)
    maps = {
        "entropy": np.zeros(labels.shape, np.float32),
        "std": np.zeros(labels.shape, np.float32),
        "sigbits": np.full(labels.shape, FLOAT32_BITS, np.float32),
        "share": np.ones(labels.shape, np.float32),
    }
    note = {"members": str(len(paths))} | (metadata or {})
    writer = PosteriorWriter(out_path, shape, first.n_classes, note)
    for x in range(shape[0]):
        slab = _fuse_slab(readers, x, n_slab)
        labels[x, slab.voxels] = slab.labels
        for name, values in maps.items():
            values[x, slab.voxels] = getattr(slab, name)
        writer.write(slab.voxels, slab.mean)
    writer.finish(labels.reshape(shape))
    maps = {name: values.reshape(shape) for name, values in maps.items()}
    return Fusion(
        labels=labels.reshape(shape),
        unreliable=unreliable(maps["share"]),
        n_members=len(paths),
        **maps,
    )


@dataclass(frozen=True)
class _Slab:
    """The fused voxels of one slab: mean (U, K) float32, the rest (U,)."""

    voxels: np.ndarray
    mean: np.ndarray
    labels: np.ndarray
    entropy: np.ndarray
    std: np.ndarray
    sigbits: np.ndarray
    share: np.ndarray


def _fuse_slab(readers: Sequence[PosteriorReader], x: int, n_slab: int) -> _Slab:
    any_stored = np.zeros(n_slab, bool)
    for reader in readers:
        any_stored[reader.voxels(x)] = True
    voxels = np.flatnonzero(any_stored).astype(np.int32)
    n_classes, n_members = readers[0].n_classes, len(readers)
    mean = np.zeros((len(voxels), n_classes))
    squares = np.zeros((len(voxels), n_classes))
    votes = np.zeros((len(voxels), n_classes), np.uint16)
    row_of = np.empty(n_slab, np.int32)
    for count, reader in enumerate(readers, start=1):
        chosen, places, rows = reader.slab(x)
        row_of[:] = -1
        row_of[places] = np.arange(len(places), dtype=np.int32)
        _add_member(mean, squares, votes, voxels, row_of, rows, chosen, count)
    mean = mean.astype(np.float32)
    label, entropy, square, votes_for = _summarise(mean, squares, votes, entropy_terms(n_members))
    std = sample_std(square, n_members)
    here = np.take_along_axis(mean, label[:, None].astype(np.int64), axis=1)[:, 0]
    return _Slab(
        voxels=voxels,
        mean=mean,
        labels=label,
        entropy=entropy,
        std=std.astype(np.float32),
        sigbits=significant_bits(here, std),
        share=vote_share(votes_for, n_members),
    )


@compiled()
def _add_member(mean, squares, votes, voxels, row_of, rows, chosen, count):
    """Add the `count`-th member to the running mean, squared deviations (Welford) and votes."""
    n_classes = mean.shape[1]
    for u in range(len(voxels)):
        row = row_of[voxels[u]]
        votes[u, chosen[voxels[u]]] += 1
        for k in range(n_classes):
            if row >= 0:
                value = np.float64(rows[row, k])
            else:
                value = 1.0 if k == 0 else 0.0
            delta = value - mean[u, k]
            if delta != 0:
                mean[u, k] += delta / count
                squares[u, k] += delta * (value - mean[u, k])


@compiled()
def _summarise(mean, squares, votes, terms):
    """Per voxel: consensus label, vote entropy, its squared deviations, its votes."""
    n_voxels, n_classes = mean.shape
    label = np.empty(n_voxels, np.uint8)
    entropy = np.empty(n_voxels, np.float32)
    square = np.empty(n_voxels, np.float64)
    votes_for = np.empty(n_voxels, np.uint16)
    for u in range(n_voxels):
        best = 0
        total = 0.0
        for k in range(n_classes):
            if mean[u, k] > mean[u, best]:
                best = k
            total += terms[votes[u, k]]
        label[u] = best
        entropy[u] = total
        square[u] = squares[u, best]
        votes_for[u] = votes[u, best]
    return label, entropy, square, votes_for
