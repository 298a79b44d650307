"""One head on one grid, or on two that lie a voxel apart, to depend less on where it lies."""

from __future__ import annotations

import numpy as np

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
    places = _places(here)
    inside = _inside(_places(moved), shape, stop=1)  # what lies beyond the image when moved back
    # Of a place that is counted through all axes, the next one along each of them.
    places_moved = _places(moved)[inside] + shape[1] * shape[2] + shape[2] + 1
    union = np.union1d(places, places_moved)
    mean = np.zeros((len(union), n_classes), np.float32)
    mean[:, 0] = 1  # background for sure, where a grid stores nothing
    mean[np.searchsorted(union, places)] = here.posterior
    on_both = _inside(union, shape, start=1)
    mean[on_both] *= 0.5
    other = np.searchsorted(union, places_moved)
    mean[other] += 0.5 * moved.posterior[inside]
    on_both[other] = False
    mean[on_both, 0] += 0.5
    labels = np.zeros(shape, np.uint8)
    labels.reshape(-1)[union] = mean.argmax(axis=1)
    size = shape[1] * shape[2]
    return SparsePosterior(
        labels=labels,
        offsets=np.searchsorted(union, size * np.arange(shape[0] + 1)).astype(np.int64),
        voxels=(union % size).astype(np.int32),
        posterior=mean,
    )


def _places(sparse: SparsePosterior) -> np.ndarray:
    """Place of each stored voxel, counted through all axes: (N,) int64, ascending."""
    size = sparse.labels.shape[1] * sparse.labels.shape[2]
    slab = np.repeat(np.arange(sparse.labels.shape[0]), np.diff(sparse.offsets))
    return slab * size + sparse.voxels


def _inside(places: np.ndarray, shape: tuple[int, ...], start: int = 0, stop: int = 0):
    """Whether each place lies `start` and `stop` planes from the ends of all axes, (N,) bool."""
    indices = np.unravel_index(places, shape)
    return np.logical_and.reduce(
        [(i >= start) & (i < n - stop) for i, n in zip(indices, shape, strict=True)]
    )
