"""Conform by FastSurfer's rules, quirks included, so that its networks see what they see in FastSurfer.

The grid is a cube of voxels of one size, at most 1 mm, with axes right to left, up to down and back to front (LIA);
intensities are bytes. An image with an odd number of voxels along an axis comes to lie half a voxel off the grid and is
blurred, as in FastSurfer. Rules of commit 7c45785e (version 2.4.0-dev) of https://github.com/Deep-MI/FastSurfer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError, SpatialImage
from scipy.ndimage import affine_transform

from bids_varaug.images.conform import Box, Geometry, enclose, examine, head_box
from bids_varaug.images.load import read_t1w, standardise_volume

Sizes = Sequence[float] | np.ndarray
LIA = np.array([[-1, 0, 0], [0, 0, 1], [0, -1, 0]], np.float32)
"""Directions of the axes; column k is that of axis k."""
ONE_MM_FROM = 0.95  # mm; larger voxels become 1 mm
MIN_SIDE = 256
FINEST, COARSEST = 0.7, 1.5  # mm; the networks were trained with 0.7 to 1 mm
_RIM_MM = 5.0  # around the head
_BINS = 1000
_UPPER_SHARE = 0.001  # of the voxels that are not 0; may be brighter than the brightest byte


def target_grid(sizes: Sizes, shape: Sequence[int], voxel_size: float | None = None) -> tuple[float, int]:
    """Return voxel size [mm], rounded to float32, and side [voxels] of the grid.

    `sizes` [mm] and `shape` are those of the image; `voxel_size` asks for one in particular, instead of the smallest of
    the image, but at least one of 1 mm for all that is above 0.95 mm.

    >>> target_grid((1.2, 0.9375, 0.9375), (170, 256, 256))
    (0.9375, 256)
    """
    size = voxel_size
    if size is None:
        size = min(float(np.round(np.float32(min(sizes)), 4)), 1.0)
        size = 1.0 if size > ONE_MM_FROM else size
    if size == 1.0:
        return 1.0, MIN_SIDE
    field_of_view = max(float(s) * n for s, n in zip(sizes, shape, strict=True))
    return float(np.float32(size)), max(MIN_SIDE, math.ceil(math.trunc(field_of_view / size * 1e4) / 1e4))


def voxel_size_of(path: Path) -> float:
    """Voxel size [mm] that an image will have, by its header; 1 where that cannot be read, which is told later."""
    try:
        image = cast(SpatialImage, nib.load(path))
        return target_grid(image.header.get_zooms()[:3], image.shape[:3])[0]
    except (ImageFileError, HeaderDataError, OSError, ValueError, ZeroDivisionError):
        return 1.0


def is_conformed(data: np.ndarray, affine: np.ndarray, sizes: Sizes) -> bool:
    """Whether an image is taken as it is; arguments as of `conform`.

    As in FastSurfer, an image that is rotated by a little passes if its axes lean one way.
    """
    voxel_size, side = target_grid(sizes, data.shape)
    directions = affine[:3, :3] / voxel_size
    main = LIA != 0
    return bool(
        data.shape == (side,) * 3
        and data.dtype == np.uint8
        and np.allclose(np.linalg.norm(affine[:3, :3], axis=0), voxel_size, rtol=0, atol=1e-4)
        and (directions[~main] <= 1e-6).all()
        and (directions[main] * LIA[main] > 0).all()
    )


def robust_range(data: np.ndarray) -> tuple[float, float]:
    """Return the value that becomes 0, and the scale to bytes, for an image (X, Y, Z) of any real type.

    From the minimum to the brightest value but for 0.1 % of the voxels that are not 0, by a histogram of 1000 bins over
    the whole range: a single very bright voxel spoils it, as in FastSurfer.
    """
    counts, edges = np.histogram(data, bins=_BINS)
    below = np.concatenate([[0], np.cumsum(counts)])
    cutoff = data.size - int(_UPPER_SHARE * np.count_nonzero(np.abs(data) >= 1e-15))
    low, high = float(edges[0]), float(edges[int(np.argmax(below >= cutoff)) - 2])
    return low, 255 / (high - low) if high != low else 1.0


def conform(
    data: np.ndarray, affine: np.ndarray, sizes: Sizes, stored: np.dtype | None = None, whole_voxels: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Bring an image to FastSurfer's grid, linearly, and to bytes.

    Parameters
    ----------
    data : (X, Y, Z) of any real type
    affine : (4, 4) float64, voxel -> mm, RAS+ world
    sizes : of the voxels [mm], as in the header
    stored : type of the file, if it is not that of `data`; bytes are not rescaled
    whole_voxels : whether an image with an odd number of voxels along an axis is moved by half a voxel less than in
        FastSurfer, so that at its own voxel size and orientation it is not interpolated

    Returns
    -------
    data : (N, N, N) uint8
    affine : (4, 4) float32
    """
    if is_conformed(data, affine, sizes):
        return data, affine.astype(np.float32)
    voxel_size, side = target_grid(sizes, data.shape)
    target = np.eye(4, dtype=np.float32)
    target[:3, :3] = LIA * np.float32(voxel_size)
    centre = np.array(data.shape) // 2 if whole_voxels else np.array(data.shape) / 2
    middle = (affine @ [*centre, 1])[:3].astype(np.float32)
    target[:3, 3] = middle - target[:3, :3].astype(np.float64) @ np.full(3, side / 2)
    values = _resample(data.astype(np.float64), affine, target, side)
    if (stored or data.dtype) != np.uint8:
        empty = values == 0
        low, scale = robust_range(data)
        values -= low
        values *= scale
        values[empty] = 0
    return np.rint(np.clip(values, 0, 255, out=values), out=values).astype(np.uint8), target


def conform_labels(labels: np.ndarray, affine: np.ndarray, target: np.ndarray, side: int) -> np.ndarray:
    """Bring labels (X, Y, Z) of any integer type to the grid of their image, `target` of `conform`, by the nearest."""
    if labels.shape == (side,) * 3 and np.array_equal(target, affine.astype(np.float32)):
        return labels
    return _resample(labels, affine, target, side, order=0)


def _resample(data: np.ndarray, affine: np.ndarray, target: np.ndarray, side: int, order: int = 1) -> np.ndarray:
    # In these steps and types, or voxels halfway between two bytes are rounded to the other one.
    to_source = np.linalg.inv(np.linalg.inv(target) @ affine)
    return affine_transform(data, to_source, output_shape=(side,) * 3, order=order)


def prepare_volume(path: Path, trust: str | None = None, whole_voxels: bool = False) -> tuple[np.ndarray, Geometry]:
    """Read and conform a T1w image, see `conform`; raises as `load_t1w`.

    The volume is (N, N, N) uint8, whole; the box of the geometry is the part that holds the head and is segmented.
    """
    stored = read_t1w(path, trust)
    native = standardise_volume(stored)
    _, volume, warnings = examine(native, 1.0)
    data, affine = conform(stored.values, stored.affine, stored.sizes, stored.data.dtype, whole_voxels)
    voxel_size, side = target_grid(stored.sizes, stored.data.shape)
    grids = data.shape, affine.astype(np.float64), native.data.shape, native.affine
    warnings += tuple(_doubts(stored.sizes, stored.data.shape, side * voxel_size))
    return data, Geometry(voxel_size, _box_of_head(data, voxel_size), *grids, volume, warnings)


def _doubts(sizes: np.ndarray, shape: tuple[int, ...], side_mm: float) -> list[str]:
    extent = float(max(sizes * shape))
    found = {
        f"The field of view, {extent:.0f} mm, is larger than the {side_mm:.0f} mm that FastSurfer keeps: it is cut on "
        "both sides. If part of the brain is lost, crop the image first.": extent > side_mm + 0.5,
        f"Voxels of {min(sizes):.2g} mm are smaller than the {FINEST} mm of FastSurfer's training: memory and time "
        "grow with the grid, and its accuracy there is not known. Resample the image to 0.7 mm or more.":
            min(sizes) < 0.99 * FINEST,
        f"Voxels of {max(sizes):.2g} mm are larger than {COARSEST} mm: FastSurfer interpolates them to 1 mm or less, "
        "and was not trained with such images.": max(sizes) > 1.01 * COARSEST,
    }  # fmt: skip
    return [text for text, holds in found.items() if holds]


def _box_of_head(data: np.ndarray, voxel_size: float) -> Box:
    """Return the part of the grid that holds the head, down to the neck; all of it where nothing stands out."""
    upright = head_box(data[::-1, ::-1].transpose(0, 2, 1), voxel_size, 1)  # RAS
    (x, y, z), stop = upright.start, upright.stop
    side, rim = data.shape[0], round(_RIM_MM / voxel_size)
    low, high = np.array([side - stop[0], side - stop[2], y]), np.array([side - x, side - z, stop[1]])
    return enclose(low - rim, high + rim, data.shape, 1)
