"""Read and write posterior files a slab at a time (layout: `segmentation.posterior`)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from bids_varaug.errors import UserError

_TYPES = {"U8": np.dtype("u1"), "I32": np.dtype("<i4"), "I64": np.dtype("<i8"),
          "F32": np.dtype("<f4")}  # fmt: skip


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
    offsets : (X + 1,) int64
    metadata : str -> str, as written
    """

    path: Path
    shape: tuple[int, int, int]
    n_classes: int
    offsets: np.ndarray
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
                shape = tuple(tensors.get_slice("labels").get_shape())
                n_voxels = tensors.get_slice("voxels").get_shape()
                n_rows, n_classes = tensors.get_slice("posterior").get_shape()
                offsets = tensors.get_tensor("offsets")
                metadata = tensors.metadata() or {}
        except (SafetensorError, OSError, ValueError) as error:
            raise _damaged(path, str(error)) from error
        if len(shape) != 3 or len(offsets) != shape[0] + 1 or n_voxels != [n_rows]:
            raise _damaged(path, "its tensors do not fit together")
        if offsets[0] != 0 or offsets[-1] != n_rows or (np.diff(offsets) < 0).any():
            raise _damaged(path, "its offsets are not those of its rows")
        return cls(path, shape, n_classes, offsets, metadata)

    def voxels(self, x: int) -> np.ndarray:
        """Return the stored places of slab `x`, (n,) int32, ascending."""
        return self._rows("voxels", x)

    def slab(self, x: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return labels (Y * Z,) uint8, voxels (n,) int32, posterior (n, K) float32 of slab `x`."""
        labels = self._read("labels", x, x + 1).reshape(-1)
        return labels, self._rows("voxels", x), self._rows("posterior", x)

    def labels(self, x: int) -> np.ndarray:
        """Return the labels of slab `x`, (Y * Z,) uint8."""
        return self._read("labels", x, x + 1).reshape(-1)

    def _rows(self, name: str, x: int) -> np.ndarray:
        start, stop = int(self.offsets[x]), int(self.offsets[x + 1])
        if start == stop:  # safetensors refuses an empty slice at the end of a tensor
            shape = (0, self.n_classes) if name == "posterior" else (0,)
            return np.empty(shape, np.float32 if name == "posterior" else np.int32)
        return self._read(name, start, stop)

    def _read(self, name: str, start: int, stop: int) -> np.ndarray:
        try:
            with safe_open(self.path, framework="numpy") as tensors:
                return tensors.get_slice(name)[start:stop]
        except (SafetensorError, OSError) as error:
            raise _damaged(self.path, str(error)) from error


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
    """Write one posterior file whose rows come slab by slab.

    Use as a context manager: the file gets its name when all is written, and nothing is left
    behind if it is not.

    Parameters
    ----------
    path : the file to make
    offsets : (X + 1,) int64
    n_classes : K
    shape : (X, Y, Z)
    metadata : str -> str
    """

    def __init__(
        self,
        path: Path,
        offsets: np.ndarray,
        n_classes: int,
        shape: tuple[int, int, int],
        metadata: dict[str, str],
    ):
        self._path = Path(path)
        self._partial = self._path.with_suffix(".partial")
        n_rows = int(offsets[-1])
        self._header = safetensors_header(
            {
                "offsets": ("I64", (len(offsets),)),
                "posterior": ("F32", (n_rows, n_classes)),
                "voxels": ("I32", (n_rows,)),
                "labels": ("U8", tuple(shape)),
            },
            metadata,
        )
        self._offsets = np.ascontiguousarray(offsets, "<i8")
        self._row_shape = (n_rows, n_classes)
        self._written = 0

    def __enter__(self) -> PosteriorWriter:
        """Open the file under a provisional name."""
        self._stream = self._partial.open("wb")
        self._stream.write(self._header)
        self._stream.write(self._offsets.data)
        return self

    def write(self, posterior: np.ndarray) -> None:
        """Append the rows (n, K) float32 of the next slab."""
        if posterior.shape[1:] != self._row_shape[1:]:
            raise ValueError(f"rows of {posterior.shape[1:]} classes, not {self._row_shape[1:]}")
        self._stream.write(np.ascontiguousarray(posterior, "<f4").data)
        self._written += len(posterior)

    def finish(self, voxels: np.ndarray, labels: np.ndarray) -> None:
        """Write the rest, (N,) int32 and (X, Y, Z) uint8, and give the file its name."""
        if self._written != self._row_shape[0] or len(voxels) != self._row_shape[0]:
            raise ValueError(f"{self._written} rows written, {self._row_shape[0]} announced")
        self._stream.write(np.ascontiguousarray(voxels, "<i4").data)
        self._stream.write(np.ascontiguousarray(labels, "u1").data)
        self._stream.close()
        self._partial.replace(self._path)

    def __exit__(self, *_: object) -> None:
        """Close, and remove what was not finished."""
        self._stream.close()
        self._partial.unlink(missing_ok=True)


def safetensors_header(
    tensors: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]
) -> bytes:
    """Return the head of a safetensors file whose tensors follow in the order given.

    Parameters
    ----------
    tensors : name -> (type, shape), type one of U8, I32, I64, F32; widest first (alignment)
    metadata : str -> str

    References
    ----------
    https://huggingface.co/docs/safetensors: 8 bytes length, JSON padded by spaces, data.
    """
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    start = 0
    for name, (kind, shape) in tensors.items():
        stop = start + int(np.prod(shape, dtype=np.int64)) * _TYPES[kind].itemsize
        entries[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(
        f"{path}: this work file is damaged or absent ({reason}). Delete it and run again with "
        "the same work directory; it is made anew."
    )
