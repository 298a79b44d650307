"""Sparse posteriors of many members and their consensus; memory does not grow with the number of members.

Only voxels that are not surely background are stored. A file that is absent or damaged is refused with a `UserError`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from scipy.sparse import csr_array, vstack

from bids_varaug.errors import UserError
from bids_varaug.variability.measures import (
    ALL,
    FLOAT32_BITS,
    calibrate,
    group_members,
    mean_entropy,
    posterior_entropy,
    region_counts,
    significant_bits,
    suffix_of,
    vote_entropy,
)

if TYPE_CHECKING:
    from bids_varaug.images.conform import Geometry


BACKGROUND_CUT = 1e-4
"""A voxel has a row unless its background probability exceeds 1 - BACKGROUND_CUT."""
SMALLEST = np.float32(2**-23)
"""Step between float32 probabilities near 1; no larger ones are stored."""
_SLABS_AT_ONCE = 8
_ROWS_AT_ONCE = 2**16  # with all their zeros


@dataclass(frozen=True)
class SparsePosterior:
    """Class probabilities on the head box.

    There is one row for each voxel, in C order. Class 0, the background, is left out: its probability is what a row
    lacks to 1, and an empty row is surely background.
    """

    labels: np.ndarray  # (X, Y, Z) uint8, most probable class
    rows: csr_array  # (X * Y * Z, K) float

    @classmethod
    def from_rows(cls, rows: csr_array, shape: tuple[int, ...]) -> SparsePosterior:
        """Label rows with their most probable classes, ties go to the lower class."""
        labels = np.zeros(rows.shape[0], np.uint8)
        stored = np.flatnonzero(np.diff(rows.indptr))
        for start in range(0, len(stored), _ROWS_AT_ONCE):
            part = stored[start : start + _ROWS_AT_ONCE]
            labels[part] = add_background(rows[part].toarray()).argmax(axis=1)
        return cls(labels.reshape(shape), rows)

    @property
    def stored(self) -> np.ndarray:
        """Which voxels have a row, (X * Y * Z,) bool."""
        return np.diff(self.rows.indptr) > 0

    @property
    def posterior(self) -> np.ndarray:
        """The stored rows with the background, (N, K) float32, sums to 1 over K."""
        return add_background(self.rows[self.stored].toarray())

    def to_native(self, geometry: Geometry, out: np.ndarray | None = None, temperature: float = 1.0) -> np.ndarray:
        """Return class indices on the image's own grid; see `images.conform.resample_posterior`."""
        from bids_varaug.images.conform import resample_posterior  # with torch, which fusing needs not

        return resample_posterior(self.stored, self.posterior, geometry, out, temperature)


def sparse_rows(posterior: np.ndarray, stored: np.ndarray) -> csr_array:
    """Return rows (V, K) without the background and what is no larger than `SMALLEST`.

    Of V voxels, those `stored` (V,) have a `posterior` (N, K) float32.

    >>> posterior = np.array([[0.25, 0, 0.75], [0.5, 0.5, 1e-9]], np.float32)
    >>> sparse_rows(posterior, np.array([True, False, True])).indices.tolist()
    [2, 1]
    """
    kept = posterior > SMALLEST
    kept[:, 0] = False
    counts = np.zeros(len(stored), np.int32)
    counts[stored] = np.count_nonzero(kept, axis=1)
    classes = kept.nonzero()[1].astype(np.int32)
    return csr_array((posterior[kept], classes, _starts(counts)), shape=(len(stored), posterior.shape[1]))


def add_background(rows: np.ndarray) -> np.ndarray:
    """Give rows (N, K), whose class 0 is empty, what they lack to 1 as background; in place."""
    rows[:, 0] = np.maximum(1 - rows.sum(axis=1), 0)
    return rows


def save_posterior(path: Path, sparse: SparsePosterior) -> None:
    """Write one safetensors file, aside first and renamed; up to 256 classes.

    ``labels`` and ``counts`` (entries of each row) are (X, Y, Z) uint8; ``classes`` uint8 and ``values`` float32 are
    those of all entries, and ``starts`` (X + 1,) int64 where those of each slab begin; ``n_classes`` stands in the
    metadata.
    """
    rows, shape = sparse.rows, sparse.labels.shape
    tensors = {
        "labels": sparse.labels,
        "counts": np.diff(rows.indptr).astype(np.uint8).reshape(shape),
        "classes": rows.indices.astype(np.uint8),
        "values": rows.data.astype(np.float32, copy=False),
        "starts": rows.indptr[:: shape[1] * shape[2]].astype(np.int64),
    }
    partial = path.with_suffix(".partial")
    try:
        save_file(tensors, partial, {"n_classes": str(rows.shape[1])})
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load_posterior(path: Path, slabs: slice = slice(None)) -> SparsePosterior:
    """Read what `save_posterior` wrote, or some slabs of it.

    The file is mapped into memory, and pages once touched count as memory of this process until it is closed: to need
    little memory, read a few slabs at a time.
    """
    with _open(path) as tensors:
        labels, counts = (tensors.get_slice(name)[slabs] for name in ("labels", "counts"))
        starts = tensors.get_tensor("starts")
        start, stop = starts[slabs][0], starts[1:][slabs][-1]
        values, classes = np.empty((2, 0), np.float32)
        if start < stop:  # safetensors refuses an empty slice at the end of a tensor
            values, classes = (tensors.get_slice(name)[start:stop] for name in ("values", "classes"))
        n_classes = int(tensors.metadata()["n_classes"])
        rows = csr_array((values, classes.astype(np.int32), _starts(counts.ravel())), (labels.size, n_classes))
        rows.check_format(full_check=True)
        if labels.shape != counts.shape or labels.ndim != 3 or rows.nnz != len(values) or labels.max() >= n_classes:
            raise ValueError("its tensors do not fit together")
    return SparsePosterior(labels, rows)


@contextmanager
def _open(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, framework="numpy") as tensors:
            yield tensors
    except (SafetensorError, OSError, ValueError, IndexError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: this work file is damaged or absent ({error}). Delete it and run again with the same work "
            "directory; it is made again."
        ) from error


def _starts(counts: np.ndarray) -> np.ndarray:
    """Where each row's entries begin, and where the last ends, (V + 1,) int32."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int32)], dtype=np.int32)


def check_same_box(paths: Sequence[Path]) -> tuple[int, int, int]:
    """Return the shape (X, Y, Z) of all posterior files; a `UserError` where boxes or classes differ."""
    boxes = []
    for path in paths:
        with _open(path) as tensors:
            shape = tuple(tensors.get_slice("labels").get_shape())
            boxes.append((shape, f"{tensors.metadata()['n_classes']} classes on {shape} voxels"))
        if boxes[-1] != boxes[0]:
            differ = f"{boxes[-1][1]}, but {paths[0].name} has {boxes[0][1]}"
            raise UserError(f"{path}: {differ}. Delete the work directory and run again.")
    return boxes[0][0]


def split_slabs(length: int) -> list[slice]:
    """Cut X slabs into parts that take little memory."""
    return [slice(x, min(x + _SLABS_AT_ONCE, length)) for x in range(0, length, _SLABS_AT_ONCE)]


def label_slabs(paths: Sequence[Path]) -> Iterator[np.ndarray]:
    """Yield the labels of all members, a few slabs at a time, (M, S * Y * Z) uint8."""
    for slabs in split_slabs(check_same_box(paths)[0]):
        members = []
        for path in paths:
            with _open(path) as tensors:
                members.append(tensors.get_slice("labels")[slabs].ravel())
        yield np.stack(members)


MAPS = ("entropy", "std", "sigbits", "total_entropy", "mutual_information")


@dataclass(frozen=True)
class Fusion:
    """Consensus of an ensemble and how unsure it is and its members are, on the head box.

    Maps (X, Y, Z) float32 of all perturbed members and, with ``_FAMILY`` after the name, of each family of two or more:

    - entropy : bit, of the votes
    - std : of the posteriors of the consensus label (sample, n - 1)
    - sigbits : bit, of the same posteriors; 24 where the members agree exactly
    - total_entropy : bit, of the mean posterior, calibrated
    - mutual_information : bit, total_entropy minus the mean entropy of the members' posteriors, each calibrated alike

    With one member there is no spread: entropy, std and mutual_information are 0 and mean nothing. A temperature above
    1, and the mean, do not commute: where mutual_information would be negative by that, it is 0.
    """

    mean: SparsePosterior  # mean posterior, not calibrated; its labels are the consensus, ties go to the lower class
    maps: dict[str, np.ndarray]
    soft_dice: np.ndarray  # (K,) of consensus and calibrated mean posterior, see `variability.expected_dice`


def fuse_members(
    paths: Sequence[Path], families: Sequence[str] | None = None, temperature: float = 1.0, family_maps: bool = False
) -> Fusion:
    """Average the posteriors of the perturbed members and measure how they differ.

    `paths` are one posterior file or more, see `save_posterior`; `families` are those of the members, see
    `group_members` (None takes all for perturbed); `temperature` is that of the ensemble. Of families all maps are made
    if `family_maps`, else the entropy alone. `UserError` if a file is damaged, or boxes or classes differ.
    """
    groups = {ALL: list(range(len(paths)))} if families is None else group_members(families)
    groups = {group: members for group, members in groups.items() if group == ALL or len(members) > 1}
    labels = np.zeros(check_same_box(paths), np.uint8)
    names = [n + suffix_of(g) for g in groups for n in (MAPS if g == ALL or family_maps else ("entropy",))]
    maps = {n: np.full(labels.shape, FLOAT32_BITS if n.startswith("sigbits") else 0.0, np.float32) for n in names}
    rows, overlap = [], np.zeros(())
    for slabs in split_slabs(len(labels)):
        total: csr_array | float = 0.0
        for m in groups[ALL]:
            total = load_posterior(paths[m], slabs).rows.astype(np.float64) + total
        mean = SparsePosterior.from_rows(csr_array(total / len(groups[ALL]), dtype=np.float32), labels[slabs].shape)
        labels[slabs] = mean.labels
        rows.append(mean.rows)
        voxels = mean.stored.reshape(mean.labels.shape)
        spread, expected = _spread(paths, groups, slabs, mean, temperature, family_maps)
        for name, values in spread.items():
            maps[name][slabs][voxels] = values
        overlap = overlap + expected
    inside, size, mass = overlap
    with np.errstate(invalid="ignore"):
        soft_dice = 2 * inside / np.where(size + mass > 0, size + mass, np.nan)
    return Fusion(SparsePosterior(labels, vstack(rows, format="csr")), maps, soft_dice)


def _spread(
    paths: Sequence[Path], groups: Mapping[str, Sequence[int]], slabs: slice, mean: SparsePosterior, temperature: float,
    family_maps: bool,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return the values of the maps, each (N,), at the voxels that the mean stores, and what makes up the soft Dice.

    That is (3, K), of each class: posterior within the consensus structure, voxels of that, posterior everywhere.
    """
    voxels = np.flatnonzero(mean.stored)
    consensus, n_classes = mean.labels.ravel()[voxels], mean.rows.shape[1]
    sizes = len(voxels), n_classes
    tally_of_all = _Tally(*sizes, temperature)
    tallies: dict[str, _Votes] = {
        group: tally_of_all if group == ALL else _Tally(*sizes, temperature) if family_maps else _Votes(*sizes)
        for group in groups
    }
    for m in groups[ALL]:
        member = load_posterior(paths[m], slabs)
        posterior, labels = add_background(member.rows[voxels].toarray()), member.labels.ravel()[voxels]
        entropy = posterior_entropy(calibrate(posterior, temperature))
        for tally in (tallies[group] for group, members in groups.items() if m in members):
            tally.add(labels, posterior, consensus, entropy)
    maps = {
        name + suffix_of(group): values
        for group, tally in tallies.items()
        for name, values in tally.maps(consensus).items()
    }
    calibrated = tally_of_all.calibrated
    inside = np.bincount(consensus, weights=calibrated[np.arange(len(voxels)), consensus], minlength=n_classes)
    size = np.bincount(consensus, minlength=n_classes)
    return maps, np.stack([inside, size, calibrated.sum(axis=0, dtype=np.float64)])


class _Votes:
    """Votes of a group of members."""

    def __init__(self, n_voxels: int, n_classes: int):
        self.n_members, self.voxels = 0, np.arange(n_voxels)
        self.votes = np.zeros((n_voxels, n_classes), np.uint16)

    def add(self, labels: np.ndarray, posterior: np.ndarray, consensus: np.ndarray, entropy: np.ndarray) -> None:
        """Count a member: its labels (N,), and for `_Tally` its posterior (N, K) and calibrated entropy (N,)."""
        self.n_members += 1
        self.votes[self.voxels, labels] += 1

    def maps(self, consensus: np.ndarray) -> dict[str, np.ndarray]:
        split = self.votes[self.voxels, consensus] < self.n_members
        entropy = np.zeros(len(consensus), np.float32)
        entropy[split] = vote_entropy(self.votes[split].T, self.n_members)
        return {"entropy": entropy}


class _Tally(_Votes):
    """Also the mean posterior, and moments of that of the consensus label (Welford's recurrence)."""

    def __init__(self, n_voxels: int, n_classes: int, temperature: float):
        super().__init__(n_voxels, n_classes)
        self.temperature = temperature
        self.mean, self.squares, self.entropy = np.zeros((3, n_voxels))
        self.total = np.zeros((n_voxels, n_classes), np.float32)

    def add(self, labels: np.ndarray, posterior: np.ndarray, consensus: np.ndarray, entropy: np.ndarray) -> None:
        super().add(labels, posterior, consensus, entropy)
        self.total += posterior
        self.entropy += entropy
        values = posterior[self.voxels, consensus].astype(np.float64)
        delta = values - self.mean
        self.mean += delta / self.n_members
        self.squares += delta * (values - self.mean)

    @cached_property
    def calibrated(self) -> np.ndarray:
        """Mean posterior (N, K) float32, when all members are added."""
        return calibrate(self.total / np.float32(self.n_members), self.temperature)

    def maps(self, consensus: np.ndarray) -> dict[str, np.ndarray]:
        std = np.sqrt(self.squares / max(1, self.n_members - 1))
        total = posterior_entropy(self.calibrated)
        information = np.maximum(total - self.entropy / self.n_members, 0)
        bits = significant_bits(self.mean, std)
        more = {"std": std, "sigbits": bits, "total_entropy": total, "mutual_information": information}
        return super().maps(consensus) | more


class Summary(NamedTuple):
    """Files of what all members say together."""

    mean: Path  # mean posterior of the consensus, safetensors
    maps: Path  # `Fusion.maps`, .npz
    # Volumes (M, K), intersections (M, M, K) int64 [voxels]; entropy_mean(_FAMILY), uncertainty_mean (K,) [bit];
    # soft_dice (K,), .npz
    counts: Path


def summarise_members(
    paths: Sequence[Path], families: Sequence[str], temperature: float, folder: Path, family_maps: bool = False
) -> Summary:
    """Fuse the perturbed members (the baseline alone where there is none), and count all members.

    `paths` and `families` are those of every member, `temperature` that of the ensemble; results go to `folder`, with
    maps of each family if wanted.
    """
    files = Summary(folder / "mean.safetensors", folder / "maps.npz", folder / "counts.npz")
    fusion = fuse_members(paths, families, temperature, family_maps)
    save_posterior(files.mean, fusion.mean)
    labels, n_classes = fusion.mean.labels, fusion.mean.rows.shape[1]
    found = region_counts(label_slabs(paths), len(paths), n_classes)
    uncertainty = mean_entropy(labels, fusion.maps["total_entropy"], n_classes)
    counts = {
        "volumes": found.volumes, "intersections": found.intersections,
        "soft_dice": fusion.soft_dice, "uncertainty_mean": uncertainty,
    }  # fmt: skip
    for name, values in fusion.maps.items():
        if name.startswith("entropy"):
            counts[name.replace("entropy", "entropy_mean")] = mean_entropy(labels, values, n_classes)
    maps = fusion.maps if family_maps else {name: fusion.maps[name] for name in MAPS}
    for file, arrays in ((files.maps, maps), (files.counts, counts)):
        np.savez(file, **arrays)  # type: ignore[arg-type]  # as if arrays were allow_pickle
    return files
