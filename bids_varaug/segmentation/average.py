"""The mean of a network's posteriors on several grids: less depends on where the head lies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bids_varaug.machine import compiled
from bids_varaug.segmentation.grids import Offset
from bids_varaug.segmentation.streams import PosteriorReader, PosteriorWriter, check_same_box

_NOT_STORED, _NOT_ON_GRID = -1, -2  # in the place of a row's number


def average_grids(
    paths: Sequence[Path],
    grids: Sequence[Offset],
    mean_path: Path,
    shift_path: Path,
    metadata: dict[str, str] | None = None,
) -> None:
    """Average a network's posteriors on several grids, a slab at a time.

    A voxel that a grid lacks (of the first plane along an axis) has the mean of the others.

    Parameters
    ----------
    paths : posteriors of the image moved by `move_to_grid`
    grids : the offset of each, none of the first
    mean_path : where the mean goes, on the first grid; a voxel is stored if it is on any
    shift_path : where the mean minus the first goes, of the same voxels in the same layout
    metadata : str -> str, kept in both files

    Raises
    ------
    UserError
        If a file is damaged, or the boxes or classes differ.
    """
    readers = [PosteriorReader.open(path) for path in paths]
    check_same_box(readers)
    shape, n_classes = readers[0].shape, readers[0].n_classes
    labels = np.zeros((shape[0], shape[1] * shape[2]), np.uint8)
    means, shifts = (
        PosteriorWriter(path, shape, n_classes, metadata or {}) for path in (mean_path, shift_path)
    )
    parts = list(zip(readers, grids, strict=True))
    for x in range(shape[0]):
        numbers = [_row_numbers(*part, x) for part in parts]
        voxels = np.flatnonzero(np.max(numbers, axis=0) >= 0).astype(np.int32)
        total = np.zeros((len(voxels), n_classes))
        counts = np.zeros((len(voxels), 1))
        for (reader, offset), rows_of in zip(parts, numbers, strict=True):
            if x >= offset[0]:
                _add_grid(total, counts, reader.slab(x - offset[0])[2], rows_of[voxels])
            if reader is readers[0]:
                first = total.copy()
        mean = (total / counts).astype(np.float32)
        labels[x, voxels] = mean.argmax(axis=1)
        means.write(voxels, mean)
        shifts.write(voxels, (mean - first).astype(np.float32))
    for writer in (means, shifts):
        writer.finish(labels.reshape(shape))


def _row_numbers(reader: PosteriorReader, offset: Offset, x: int) -> np.ndarray:
    """Return, for each place of slab x of the first grid, its row in the reader's, (Y * Z,) int."""
    _, n_y, n_z = reader.shape
    here = np.full((n_y, n_z), _NOT_ON_GRID)
    if x >= offset[0]:
        there = np.full(n_y * n_z, _NOT_STORED)
        voxels = reader.voxels(x - offset[0])
        there[voxels] = np.arange(len(voxels))
        inside = there.reshape(n_y, n_z)[: n_y - offset[1], : n_z - offset[2]]
        here[offset[1] :, offset[2] :] = inside
    return here.ravel()


@compiled()
def _add_grid(total, counts, rows, numbers):
    """Add the rows of one grid to the sums; what a grid does not store is background for sure."""
    for u in range(len(numbers)):
        if numbers[u] == _NOT_ON_GRID:
            continue
        counts[u, 0] += 1
        if numbers[u] == _NOT_STORED:
            total[u, 0] += 1
        else:
            for k in range(total.shape[1]):
                total[u, k] += rows[numbers[u], k]
