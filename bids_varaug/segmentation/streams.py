"""Read and write posterior files a slab at a time.

A file is one of safetensors: ``labels`` (X, Y, Z) uint8; ``offsets`` (X + 1,) int64 and ``voxels``
(N,) int32 as of `posterior.SparsePosterior`; its rows as `packing.PackedRows` ``counts``,
``classes`` and ``values``; ``entries`` (X + 1,) int64, where those of each slab begin; and
``n_classes`` (1,) int64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from bids_varaug.errors import UserError
from bids_varaug.segmentation.packing import PackedRows, pack_rows, unpack_rows


@dataclass(frozen=True)
class PosteriorReader:
    """Slabs of one posterior file.

    The file is opened anew for each slab: it is mapped into memory, and pages once touched would
    otherwise count as memory of this process until the end.

    Attributes
    ----------
    path : the file
    shape : (X, Y, Z) of the head box
    n_classes : K
    offsets, entries : (X + 1,) int64
    metadata : str -> str, as written
    """

    path: Path
    shape: tuple[int, int, int]
    n_classes: int
    offsets: np.ndarray
    entries: np.ndarray
    metadata: dict[str, str]

    @classmethod
    def open(cls, path: Path) -> PosteriorReader:
        """Read what describes the file, not its contents.

        Raises
        ------
        UserError
            If the file is absent, damaged, or its tensors do not fit together.
        """
        path = Path(path)
        try:
            with safe_open(path, framework="numpy") as tensors:
                lengths = {
                    name: tensors.get_slice(name).get_shape()[0]
                    for name in ("voxels", "counts", "classes", "values")
                }
                shape = tuple(tensors.get_slice("labels").get_shape())
                offsets, entries = (tensors.get_tensor(name) for name in ("offsets", "entries"))
                n_classes = int(tensors.get_tensor("n_classes")[0])
                metadata = tensors.metadata() or {}
        except (SafetensorError, OSError, ValueError) as error:
            raise _damaged(path, str(error)) from error
        for starts, names in ((offsets, ("voxels", "counts")), (entries, ("classes", "values"))):
            if len(shape) != 3 or len(starts) != shape[0] + 1 or starts[0] != 0:
                raise _damaged(path, "its tensors do not fit together")
            if (np.diff(starts) < 0).any() or any(lengths[n] != starts[-1] for n in names):
                raise _damaged(path, "its offsets are not those of its rows")
        return cls(path, shape, n_classes, offsets, entries, metadata)

    def voxels(self, x: int) -> np.ndarray:
        """Return the stored places of slab `x`, (n,) int32, ascending."""
        return self._read(x, "voxels")[0]

    def slab(self, x: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return labels (Y * Z,) uint8, voxels (n,) int32, posterior (n, K) float32 of slab `x`."""
        labels, voxels, *packed = self._read(x, "labels", "voxels", *PackedRows._fields)
        return labels, voxels, unpack_rows(PackedRows(*packed), self.n_classes)

    def labels(self, x: int) -> np.ndarray:
        """Return the labels of slab `x`, (Y * Z,) uint8."""
        return self._read(x, "labels")[0]

    def _read(self, x: int, *names: str) -> list[np.ndarray]:
        slabs = np.arange(self.shape[0] + 1)
        starts = {"labels": slabs, "classes": self.entries, "values": self.entries}
        found = []
        try:
            with safe_open(self.path, framework="numpy") as tensors:
                for name in names:
                    start, stop = starts.get(name, self.offsets)[x : x + 2].tolist()
                    # safetensors refuses an empty slice at the end of a tensor.
                    part = tensors.get_slice(name)[start:stop] if start < stop else _EMPTY[name]
                    found.append(part.reshape(-1))
        except (SafetensorError, OSError) as error:
            raise _damaged(self.path, str(error)) from error
        return found


_EMPTY = {
    "voxels": np.empty(0, np.int32),
    "counts": np.empty(0, np.uint16),
    "classes": np.empty(0, np.uint8),
    "values": np.empty(0, np.float32),
}


def label_slabs(paths: Sequence[Path]) -> Iterator[np.ndarray]:
    """Yield the labels of all members slab by slab, (M, Y * Z) uint8, members in order.

    Raises
    ------
    UserError
        If a file is damaged, or the members' boxes differ.
    """
    readers = [PosteriorReader.open(path) for path in paths]
    check_same_box(readers)
    for x in range(readers[0].shape[0]):
        yield np.stack([reader.labels(x) for reader in readers])


def check_same_box(readers: Sequence[PosteriorReader]) -> None:
    """Raise UserError unless all files have the same box and classes."""
    first = readers[0]
    for reader in readers[1:]:
        if (reader.shape, reader.n_classes) != (first.shape, first.n_classes):
            raise UserError(
                f"{reader.path}: {reader.n_classes} classes on {reader.shape} voxels, but "
                f"{first.path.name} has {first.n_classes} on {first.shape}. Delete the work "
                "directory and run again."
            )


class PosteriorWriter:
    """Write one posterior file whose rows come slab by slab; until the last nothing is on disk.

    Parameters
    ----------
    path : the file to make
    shape : (X, Y, Z)
    n_classes : K
    metadata : str -> str
    """

    def __init__(self, path: Path, shape: Sequence[int], n_classes: int, metadata: dict[str, str]):
        self._path = Path(path)
        self._shape, self._n_classes = tuple(shape), n_classes
        self._metadata = metadata
        self._voxels: list[np.ndarray] = []
        self._packed: list[PackedRows] = []

    def write(self, voxels: np.ndarray, posterior: np.ndarray) -> None:
        """Append the rows (n, K) float32 of the next slab, and their places (n,) int32."""
        if posterior.shape != (len(voxels), self._n_classes):
            raise ValueError(f"rows {posterior.shape}, not {(len(voxels), self._n_classes)}")
        self._voxels.append(voxels)
        self._packed.append(pack_rows(posterior))

    def finish(self, labels: np.ndarray) -> None:
        """Write all, labels (X, Y, Z) uint8 too: aside first and renamed."""
        if len(self._packed) != self._shape[0] or labels.shape != self._shape:
            raise ValueError(f"{len(self._packed)} slabs, labels {labels.shape}: not {self._shape}")
        counts, classes, values = zip(*self._packed, strict=True)
        tensors = {
            "labels": labels,
            "offsets": _starts(self._voxels),
            "voxels": np.concatenate(self._voxels).astype(np.int32, copy=False),
            "entries": _starts(values),
            "n_classes": np.array([self._n_classes]),
            "counts": np.concatenate(counts),
            "classes": np.concatenate(classes),
            "values": np.concatenate(values),
        }
        partial = self._path.with_suffix(".partial")
        try:
            save_file(tensors, partial, self._metadata)
            partial.replace(self._path)
        finally:
            partial.unlink(missing_ok=True)


def _starts(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64)


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(
        f"{path}: this work file is damaged or absent ({reason}). Delete it and run again with "
        "the same work directory; it is made anew."
    )
