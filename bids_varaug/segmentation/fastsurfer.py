"""What FastSurfer does to labels after its networks: cortex to hemispheres, brain mask, reduced labels, islands.

Label maps are (X, Y, Z) of FreeSurfer ids on FastSurfer's grid; arguments are left as they are. Rules, constants and
the order of steps are those of FastSurfer 2.4.0-dev (commit 7c45785e); distances are in voxels there, not in mm.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy import ndimage

from bids_varaug.models.fastsurfer_labels import RIGHT

WHITE = LEFT_WHITE, RIGHT_WHITE = 2, 41
CORTEX = LEFT_CORTEX, RIGHT_CORTEX = 3, 42
SHARED = (
    1003, 1006, 1007, 1008, 1009, 1011, 1015, 1018, 1019, 1020, 1025, 1026, 1027, 1028, 1029, 1030, 1031, 1034, 1035,
)  # fmt: skip
"""Parcels whose connected parts go to the side whose white matter is nearer."""
BY_VOXEL = (1011, 1019, 1026, 1029)
"""Parcels whose voxels go to the side that has more white matter around them."""
BESIDE_THE_EYES = (1012, 2012, 1019, 2019)
"""Parcels that the brain mask takes as they are: grown, they would reach the optic nerves."""
_SIDE_SIGMA, _ISLAND_SIGMA = 3.0, 1.5
_CUBE = np.ones((3, 3, 3), bool)
Box = tuple[slice, ...]


def split_hemispheres(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tell left from right parcels of the cortex where the networks have one class for both.

    Returns the ids, and which voxels have more white matter of the right side around them, (X, Y, Z) bool. Where the
    white matter of a side is missing, all parcels stay left ones (FastSurfer fails).
    """
    result, right = ids.copy(), np.zeros(ids.shape, bool)
    if not all((ids == white).any() for white in WHITE):
        return result, right
    left_centre, right_centre = (_centre_of_largest(ids == white) for white in WHITE)
    for parcel in SHARED:
        for box, part in _parts(ids == parcel):
            centre = _centre(part, box)
            if np.linalg.norm(centre - right_centre) < np.linalg.norm(centre - left_centre):
                result[box][part] = parcel + RIGHT
    around = _grow(_bounds(ids > 0), ids.shape, round(4 * _SIDE_SIGMA))  # beyond, the filter gives 0
    left_share, right_share = (
        ndimage.gaussian_filter(1000.0 * (ids[around] == white), _SIDE_SIGMA) for white in WHITE
    )
    right[around] = right_share > left_share
    for parcel in BY_VOXEL:
        either = (result == parcel) | (result == parcel + RIGHT)
        result[either] = parcel + RIGHT * right[either].astype(result.dtype)
    return result, right


def brain_mask(ids: np.ndarray) -> np.ndarray:
    """Return the brain without holes at its surface, (X, Y, Z) bool: the labels, grown and shrunk, one part."""
    mask = (ids > 0) & ~np.isin(ids, BESIDE_THE_EYES)
    mask = ndimage.binary_erosion(ndimage.binary_dilation(mask, _CUBE, 5), _CUBE, 4)
    return _largest(mask) | np.isin(ids, BESIDE_THE_EYES)


def reduce_to_aseg(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Give all parcels of a hemisphere the id of its cortex, and what is not in the mask (X, Y, Z) bool that of air."""
    result = np.where(ids >= RIGHT, LEFT_CORTEX, ids).astype(ids.dtype)
    result[ids >= 2 * RIGHT] = RIGHT_CORTEX
    result[~mask] = 0
    return result


def flip_islands(aseg: np.ndarray) -> np.ndarray:
    """Give islands of white matter within the other hemisphere to it, voxel by voxel; takes reduced labels."""
    result = aseg.copy()
    sides = np.isin(aseg, (RIGHT_WHITE, RIGHT_CORTEX)).astype(float) - np.isin(aseg, (LEFT_WHITE, LEFT_CORTEX))
    side = ndimage.gaussian_filter(sides, _ISLAND_SIGMA, mode="nearest")
    for white, other, sign in ((LEFT_WHITE, RIGHT_WHITE, 1), (RIGHT_WHITE, LEFT_WHITE, -1)):
        mask = aseg == white
        result[mask & ~_largest(mask) & (sign * side > 0)] = other
    return result


def _parts(mask: np.ndarray) -> Iterator[tuple[Box, np.ndarray]]:
    """Yield each connected part (corners connect) of a mask: the box around it, and itself in this box."""
    if not mask.any():
        return
    around = _bounds(mask)
    parts, _ = ndimage.label(mask[around], _CUBE)
    for number, box in enumerate(ndimage.find_objects(parts), start=1):
        shifted = tuple(slice(s.start + a.start, s.stop + a.start) for s, a in zip(box, around, strict=True))
        yield shifted, parts[box] == number


def _size(found: tuple[Box, np.ndarray]) -> int:
    return int(np.count_nonzero(found[1]))


def _largest(mask: np.ndarray) -> np.ndarray:
    result = np.zeros(mask.shape, bool)
    if mask.any():
        box, part = max(_parts(mask), key=_size)
        result[box] = part
    return result


def _centre(part: np.ndarray, box: Box) -> np.ndarray:
    return np.argwhere(part).mean(axis=0) + [side.start for side in box]


def _centre_of_largest(mask: np.ndarray) -> np.ndarray:
    box, part = max(_parts(mask), key=_size)
    return _centre(part, box)


def _bounds(mask: np.ndarray) -> Box:
    return ndimage.find_objects(mask.view(np.uint8))[0]


def _grow(box: Box, shape: tuple[int, ...], by: int) -> Box:
    return tuple(slice(max(0, s.start - by), min(n, s.stop + by)) for s, n in zip(box, shape, strict=True))
