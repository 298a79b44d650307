"""The mask of the brain: structures, and the fluid between them."""

from __future__ import annotations

import math

import numpy as np
from scipy.ndimage import distance_transform_edt, label

from bids_varaug.images.conform import Box, Geometry, bounds, extract, insert, resample_map

CLOSING_MM = 6.0  # half the width of a sulcus or fissure that the mask bridges


def brain_mask(structures: np.ndarray, native: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Mask the brain on the image's own grid, (X, Y, Z) bool: one part without holes.

    `structures` (head box) and `native` (the image's own grid), bool, are the voxels of any structure. The former are
    closed (see `close_sulci`) on the network's grid, where that takes the same time whatever the image's; the latter
    are added.
    """
    closed = close_sulci(structures, geometry.voxel_size)
    return fill_holes(native | (resample_map(closed.astype(np.float32), geometry) >= 0.5))


def close_sulci(structures: np.ndarray, voxel_size: float, radius: float = CLOSING_MM) -> np.ndarray:
    """Close a mask (X, Y, Z) bool, of isotropic voxels [mm], by a ball of `radius` mm.

    >>> plates = np.zeros((6, 9, 9), bool)
    >>> plates[[1, 4]] = True
    >>> close_sulci(plates, 1.0, 2.0)[:, 4, 4].astype(int).tolist()
    [0, 1, 1, 1, 1, 0]
    """
    if not structures.any():
        return structures
    low, high = bounds(structures)
    rim = math.ceil(radius / voxel_size) + 1
    box = Box(tuple((low - rim).tolist()), tuple((high - low + 2 * rim).tolist()))
    reached = distance_transform_edt(~extract(structures, box), voxel_size) <= radius
    closed = distance_transform_edt(reached, voxel_size) > radius
    return insert(closed, box, structures.shape) | structures


def fill_holes(mask: np.ndarray) -> np.ndarray:
    """Keep the largest part of a mask (X, Y, Z) bool (neighbours share a face), and fill what it encloses."""
    if not mask.any():
        return mask
    low, high = bounds(mask)
    box = Box(tuple((low - 1).tolist()), tuple((high - low + 2).tolist()))
    parts, _ = label(extract(mask, box))
    around, _ = label(parts != np.bincount(parts[parts > 0]).argmax())
    return insert(around != around[0, 0, 0], box, mask.shape)
