"""One head on one grid, or on two that lie a voxel apart, to depend less on where it lies."""

from __future__ import annotations

import numpy as np

from bids_varaug.compiled import compiled
from bids_varaug.models.unet import UNet
from bids_varaug.segmentation.posterior import SparsePosterior
from bids_varaug.segmentation.predict import segment_volume


def segment_on_grids(network: UNet, image: np.ndarray, n_grids: int = 1) -> SparsePosterior:
    """Return the mean of the class posteriors on one or two grids.

    The network's body works on blocks of 2x2x2 voxels. The second grid lies one voxel further along
    each axis, so that the blocks are others; more grids would repeat these along an axis. Voxels
    of the first plane along an axis, which the second lacks, have the posterior of the first.

    Parameters
    ----------
    network, image : as of `segment_volume`
    n_grids : 1 or 2

    Returns
    -------
    SparsePosterior
        On the grid of `image`; a voxel is stored if it is on either grid.

    Raises
    ------
    ValueError
        If `n_grids` is neither 1 nor 2; as of `segment_volume`.
    """
    if n_grids not in (1, 2):
        raise ValueError(f"{n_grids} grids: there are two ways to cut an axis into pairs of voxels")
    here = segment_volume(network, image)
    if n_grids == 1:
        return here
    moved = np.pad(image[1:, 1:, 1:], [(0, 1)] * 3, mode="edge")
    return _average(here, segment_volume(network, moved))


def _average(here: SparsePosterior, moved: SparsePosterior) -> SparsePosterior:
    """Mean of a posterior and one on a grid that lies a voxel further along each axis."""
    shape, n_classes = here.labels.shape, here.posterior.shape[1]
    rows_here, rows_moved = _rows(here), _rows(moved)
    rows_back = np.full(shape, -1, np.int32)
    rows_back[1:, 1:, 1:] = rows_moved[:-1, :-1, :-1]
    stored = (rows_here >= 0) | (rows_back >= 0)
    on_both = np.zeros(shape, bool)
    on_both[1:, 1:, 1:] = True
    mean = np.empty((np.count_nonzero(stored), n_classes), np.float32)
    rows = (values[stored] for values in (rows_here, rows_back, on_both))
    _fill_mean(mean, here.posterior, moved.posterior, *rows)
    labels = np.zeros(shape, np.uint8)
    labels[stored] = mean.argmax(axis=1)
    by_slab = stored.reshape(shape[0], -1)
    return SparsePosterior(
        labels=labels,
        offsets=np.concatenate([[0], np.cumsum(by_slab.sum(axis=1))]).astype(np.int64),
        voxels=by_slab.nonzero()[1].astype(np.int32),
        posterior=mean,
    )


def _rows(sparse: SparsePosterior) -> np.ndarray:
    """Return the row of each voxel's posterior, -1 where none is stored: (X, Y, Z) int32."""
    rows = np.full(sparse.labels.shape, -1, np.int32)
    slabs = np.repeat(np.arange(len(rows)), np.diff(sparse.offsets))
    rows.reshape(len(rows), -1)[slabs, sparse.voxels] = np.arange(len(sparse.voxels))
    return rows


@compiled()
def _fill_mean(mean, here, moved, rows_here, rows_moved, on_both):
    """Average row by row; what has no row (-1) is background for sure."""
    for u in range(mean.shape[0]):
        for k in range(mean.shape[1]):
            background = np.float32(1.0 if k == 0 else 0.0)
            value = here[rows_here[u], k] if rows_here[u] >= 0 else background
            if on_both[u]:
                other = moved[rows_moved[u], k] if rows_moved[u] >= 0 else background
                value = np.float32(0.5) * (value + other)
            mean[u, k] = value
