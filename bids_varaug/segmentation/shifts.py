"""Sub-voxel shifts (test-time augmentation), for ensembles whose members share a trunk.

The network's body works on blocks of 2x2x2 voxels: a head that lies a voxel further along some axes is cut into other
blocks. There are eight such grids. The mean of a network's posteriors on several depends less on where the head lies.
Members that share most of their training move nearly alike. What several grids change in the baseline is therefore
added to the other members too: a control variate, which costs the passes of one member and keeps what they differ by.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
from scipy.sparse import csr_array, diags_array, vstack

from bids_varaug.segmentation.fuse import SparsePosterior, check_same_box, load_posterior, save_posterior

Offset = tuple[int, int, int]

# Each choice holds both cuts of an axis equally often, and that of four both cuts of each pair of axes (half a
# factorial design).
GRIDS: dict[int, tuple[Offset, ...]] = {
    1: ((0, 0, 0),),
    2: ((0, 0, 0), (1, 1, 1)),
    4: ((0, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 0)),
    8: tuple((x, y, z) for x, y, z in product((0, 1), repeat=3)),
}


def move_to_grid(image: np.ndarray, offset: Offset) -> np.ndarray:
    """Return an image (X, Y, Z) on the grid that lies `offset` voxels (0 or 1) further along each axis.

    Its voxel v is voxel v + `offset` of `image`; the plane that would lie beyond the last repeats it.

    >>> move_to_grid(np.arange(4).reshape(4, 1, 1), (1, 0, 0)).ravel().tolist()
    [1, 2, 3, 3]
    """
    inside = image[tuple(slice(start, None) for start in offset)]
    return np.pad(inside, [(0, start) for start in offset], mode="edge")


def average_grids(paths: Sequence[Path], grids: Sequence[Offset], mean_path: Path, shift_path: Path) -> None:
    """Average a network's posteriors on several grids.

    A voxel that a grid lacks (of the first plane along an axis) has the mean of the others.

    Parameters
    ----------
    paths : posteriors of the image moved by `move_to_grid`
    grids : the offset of each, none of the first
    mean_path : where the mean goes, on the first grid; a voxel is stored if it is on any
    shift_path : where the mean minus the first goes
    """
    shape = check_same_box(paths)
    first = load_posterior(paths[0]).rows
    total, n_grids = first.astype(np.float64), np.ones(first.shape[0])
    for path, offset in zip(paths[1:], grids[1:], strict=True):
        place = _place_on_first(shape, offset)
        # A copy, because a sum is a view of an array of twice its size.
        total = (_move_rows(load_posterior(path).rows, place).astype(np.float64) + total).copy()
        n_grids += place < len(place)
    rows = (diags_array(1 / n_grids) @ total).astype(np.float32)
    mean = SparsePosterior.from_rows(rows, shape)
    save_posterior(mean_path, mean)
    save_posterior(shift_path, SparsePosterior(mean.labels, csr_array(rows - first)))


def _place_on_first(shape: tuple[int, ...], offset: Offset) -> np.ndarray:
    """Voxel of a grid at each voxel of the first, (X * Y * Z,) int; their number where it lacks it.

    >>> _place_on_first((3, 1, 1), (1, 0, 0)).tolist()
    [3, 0, 1]
    """
    numbers = np.arange(np.prod(shape)).reshape(shape)
    place = np.full(shape, numbers.size)
    inside = tuple(slice(side - start) for side, start in zip(shape, offset, strict=True))
    place[tuple(slice(start, None) for start in offset)] = numbers[inside]
    return place.ravel()


def _move_rows(rows: csr_array, place: np.ndarray) -> csr_array:
    nothing = csr_array((1, rows.shape[1]), dtype=rows.dtype)
    return vstack([rows, nothing], format="csr")[place]


def shift_posterior(sparse: SparsePosterior, shift: SparsePosterior) -> SparsePosterior:
    """Add a change of the posterior, as of `average_grids`, whose labels do not count.

    Below 0 is set to 0, and what is left scaled to sum to 1. A voxel is stored if it is in either.
    """
    moved = csr_array(sparse.rows + shift.rows)
    background = np.maximum(1 - moved.sum(axis=1), 0)
    moved.data = np.maximum(moved.data, 0)
    moved.eliminate_zeros()
    total = moved.sum(axis=1) + background
    rows = csr_array(diags_array(1 / total) @ moved, dtype=np.float32)
    return SparsePosterior.from_rows(rows, sparse.labels.shape)
