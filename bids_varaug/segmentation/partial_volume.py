"""Volumes that count a voxel at a border for both of its structures, as FastSurfer's statistics do."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from bids_varaug.images.conform import Box, bounds, extract
from bids_varaug.machine import compiled

_REACH = 7  # of the window around a voxel, in which means are taken: 15 x 15 x 15 voxels
_EPSILON = 1e-6
_DIGITS = 1e10  # to which means are rounded


class Mixture(NamedTuple):
    """What voxels consist of, each (X, Y, Z): their own label by `share`, `neighbour` by the rest."""

    neighbour: np.ndarray  # int32, 0 where there is none
    share: np.ndarray  # float64, 1 inside of structures


def mix_at_borders(labels: np.ndarray, image: np.ndarray, counted: Collection[int]) -> Mixture:
    """Split the voxels at the borders of structures between two labels, by intensity.

    A voxel lies at a border where a voxel that shares a face has another label; labels that are not counted, and
    background (0), are one for this. Of the labels in the 3 x 3 x 3 voxels around it, whether counted or not, those are
    possible whose mean lies on the other side of its intensity than the mean of its own label; means are those of the
    15 x 15 x 15 voxels around it. The label with most voxels there is taken, of equals the lowest. The share
    ``(intensity - mean_other) / (mean_own - mean_other)`` is limited to 0 ... 1.

    Parameters
    ----------
    labels : (X, Y, Z) of any integer type, none negative
    image : (X, Y, Z) uint8, on the same grid
    counted : labels whose volumes are wanted, none of them 0

    References
    ----------
    FastSurfer 2.4.0-dev (commit 7c45785e), segstats.py, not in its legacy mode.
    """
    listed = np.zeros(max(int(labels.max()), *counted) + 1, bool)
    listed[list(counted)] = True
    neighbour, share = np.zeros(labels.shape, np.int32), np.ones(labels.shape)
    labels = np.ascontiguousarray(labels, labels.dtype.newbyteorder("="))  # numba refuses bytes in the other order
    _mix(labels, np.ascontiguousarray(image), listed, neighbour, share)
    return Mixture(neighbour, share)


def corrected_volumes(labels: np.ndarray, image: np.ndarray, counted: Sequence[int]) -> np.ndarray:
    """Return the volume of each of the counted labels, (K,) float64 [voxels]; arguments as of `mix_at_borders`."""
    found = np.isin(labels, counted)
    if not found.any():
        return np.zeros(len(counted))
    low, high = bounds(found)  # beyond the voxels around it, and their windows, nothing matters
    rim = _REACH + 1
    low, high = np.maximum(low - rim, 0), np.minimum(high + rim, labels.shape)
    box = Box(tuple(low.tolist()), tuple((high - low).tolist()))
    labels = extract(labels, box)
    neighbour, share = mix_at_borders(labels, extract(image, box), counted)
    n = max(int(labels.max()), *counted) + 1
    own = np.bincount(labels.ravel(), share.ravel(), n)
    return (own + np.bincount(neighbour.ravel(), 1 - share.ravel(), n))[list(counted)]


@compiled()
def _count(
    plane: int, sign: int, window: tuple[int, int, int, int], labels: np.ndarray, image: np.ndarray,
    counts: np.ndarray, sums: np.ndarray,
) -> None:  # fmt: skip
    """Add a plane of a window to counts and sums (whole numbers: exact in any order), or take it away."""
    x0, x1, y0, y1 = window
    for i in range(x0, x1):
        for j in range(y0, y1):
            label = labels[i, j, plane]
            counts[label] += sign
            sums[label] += sign * np.int64(image[i, j, plane])


@compiled()
def _is_border(labels: np.ndarray, listed: np.ndarray, x: int, y: int, z: int) -> bool:
    own = labels[x, y, z] if listed[labels[x, y, z]] else 0
    for axis in range(3):
        for step in (-1, 1):
            i, j, k = x + step * (axis == 0), y + step * (axis == 1), z + step * (axis == 2)
            if 0 <= i < labels.shape[0] and 0 <= j < labels.shape[1] and 0 <= k < labels.shape[2]:
                other = labels[i, j, k]
                if (other if listed[other] else 0) != own:
                    return True
    return False


@compiled()
def _mix(labels: np.ndarray, image: np.ndarray, listed: np.ndarray, neighbour: np.ndarray, share: np.ndarray) -> None:
    nx, ny, nz = labels.shape
    counts, sums = np.zeros(len(listed), np.int64), np.zeros(len(listed), np.int64)
    for x in range(nx):
        for y in range(ny):
            window = max(0, x - _REACH), min(nx, x + _REACH + 1), max(0, y - _REACH), min(ny, y + _REACH + 1)
            first = last = 0  # planes in the window, last excluded; none yet
            for z in range(nz):
                if not _is_border(labels, listed, x, y, z):
                    continue
                low, high = max(0, z - _REACH), min(nz, z + _REACH + 1)
                if low >= last:
                    counts[:] = 0
                    sums[:] = 0
                    first = last = low
                for plane in range(first, low):
                    _count(plane, -1, window, labels, image, counts, sums)
                for plane in range(last, high):
                    _count(plane, 1, window, labels, image, counts, sums)
                first, last = low, high
                own, value = labels[x, y, z], float(image[x, y, z])
                mean = np.rint(sums[own] / counts[own] * _DIGITS) / _DIGITS
                best, most, other = 0, 0, 0.0
                for i in range(max(0, x - 1), min(nx, x + 2)):
                    for j in range(max(0, y - 1), min(ny, y + 2)):
                        for k in range(max(0, z - 1), min(nz, z + 2)):
                            label = labels[i, j, k]
                            count = counts[label]
                            if label == own or count < most or (count == most and label >= best):
                                continue
                            there = np.rint(sums[label] / count * _DIGITS) / _DIGITS
                            if (mean - value) * (there - value) < 0:
                                best, most, other = label, count, there
                if most > 0 and abs(mean - other) > _EPSILON:
                    neighbour[x, y, z] = best
                    share[x, y, z] = min(max((value - other) / (mean - other), 0.0), 1.0)


def left_voxels(labels: np.ndarray, of: int, left: Sequence[int]) -> int:
    """Count the voxels of a label around which `left` labels fill more than a fifth of 7 x 7 x 7 voxels.

    So FastSurfer tells on which side hypointensities of the white matter lie.
    """
    mask = labels == of
    if not mask.any():
        return 0
    low, high = bounds(mask)
    box = Box(tuple((low - 3).tolist()), tuple((high - low + 6).tolist()))
    shares = ndimage.uniform_filter(np.isin(extract(labels, box), left).astype(float), 7)
    return int((shares[extract(mask, box)] > 1 / 5).sum())
