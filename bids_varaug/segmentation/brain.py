"""The mask of the brain: structures, and the fluid between them."""

from __future__ import annotations

import math

import numpy as np
from scipy.ndimage import distance_transform_edt, label

from bids_varaug.images.conform import Box, Geometry, bounds, extract, insert, resample_map

CLOSING_MM = 6.0  # half the width of a sulcus or fissure that the mask bridges
RIM_MM = 1.0  # of fluid around the cortex, so that none of it is cut off


def brain_mask(structures: np.ndarray, native: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Mask the brain on the image's own grid, (X, Y, Z) bool: one part without holes.

    `structures` (head box) and `native` (the image's own grid), bool, are the voxels of any structure. Depth is found
    on the network's grid, where that takes the same time whatever the image's, and interpolated; `native` is added.
    """
    depth = depth_of_brain(structures, geometry.voxel_size)
    return fill_holes(native | (resample_map(depth, geometry) > 0))


def depth_of_brain(
    structures: np.ndarray, voxel_size: float, radius: float = CLOSING_MM, rim: float = RIM_MM
) -> np.ndarray:
    """Distance to the first voxel outside [mm], float32, of a closed mask; 0 or less outside of it.

    The mask (X, Y, Z) bool, of isotropic voxels [mm], is closed by a ball of `radius` mm, which leaves a `rim` [mm].

    >>> plates = np.zeros((8, 9, 9), bool)
    >>> plates[[2, 5]] = True
    >>> (depth_of_brain(plates, 1.0, 2.0, 1.0)[:, 4, 4] > 0).astype(int).tolist()
    [0, 1, 1, 1, 1, 1, 1, 0]
    """
    if not structures.any():
        return np.zeros(structures.shape, np.float32)
    low, high = bounds(structures)
    margin = math.ceil(radius / voxel_size) + 1
    box = Box(tuple((low - margin).tolist()), tuple((high - low + 2 * margin).tolist()))
    reached = distance_transform_edt(~extract(structures, box), voxel_size) <= radius
    depth = distance_transform_edt(reached, voxel_size) - (radius - rim)
    return insert(depth.astype(np.float32), box, structures.shape)


def fill_holes(mask: np.ndarray) -> np.ndarray:
    """Keep the largest part of a mask (X, Y, Z) bool (neighbours share a face), and fill what it encloses."""
    if not mask.any():
        return mask
    low, high = bounds(mask)
    box = Box(tuple((low - 1).tolist()), tuple((high - low + 2).tolist()))
    parts, _ = label(extract(mask, box))
    around, _ = label(parts != np.bincount(parts[parts > 0]).argmax())
    return insert(around != around[0, 0, 0], box, mask.shape)
