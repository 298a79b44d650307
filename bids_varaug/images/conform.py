"""Between a T1w's own grid and the network's grid.

The network's ("conformed") grid has the image's own axes, flipped and permuted to the closest
RAS+ order but not rotated, one isotropic voxel size, and the image's field of view with the same
centre. Both ways are therefore separable: along each axis a voxel of one grid is a weighted sum
of a few voxels of the other (its "taps").
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import nibabel as nib
import numpy as np
from nibabel.orientations import (
    apply_orientation,
    inv_ornt_aff,
    io_orientation,
)
from scipy.ndimage import gaussian_filter1d

from bids_varaug.images.load import Volume, load_t1w

__all__ = ["Taps", "Volume", "axis_maps", "axis_taps", "conform", "load_t1w", "to_native_scalar"]

SAME_SIZE = 1e-3
"""Relative difference of voxel sizes below which an axis is left as it is."""
_FWHM_TO_SIGMA = 1 / (2 * math.sqrt(2 * math.log(2)))
# Affines are stored in float32: indices computed from them are good to about this many decimals.
_INDEX_DECIMALS = 4


@dataclass(frozen=True)
class Taps:
    """Each voxel of one axis as a weighted sum of voxels of another axis.

    Attributes
    ----------
    indices : (n, T) int64
    weights : (n, T) float32, rows sum to 1; 0 where there are fewer than T taps
    """

    indices: np.ndarray
    weights: np.ndarray

    @property
    def exact(self) -> bool:
        """True if each voxel is a copy of one other voxel."""
        return self.indices.shape[1] == 1

    def apply(self, data: np.ndarray, axis: int) -> np.ndarray:
        """Resample `data` along `axis`; a plain copy of values where the taps are exact."""
        if self.exact:
            return np.take(data, self.indices[:, 0], axis=axis)
        along = [1] * data.ndim
        along[axis] = -1
        total = None
        for index, weight in zip(self.indices.T, self.weights.T, strict=True):
            part = np.take(data, index, axis=axis) * weight.reshape(along)
            total = part if total is None else np.add(total, part, out=total)
        return total


def conform(volume: Volume, voxel_size: float) -> Volume:
    """Bring an image to the network's grid.

    Linear interpolation. Along axes that are coarsened from size `a` to `b`, a Gaussian of
    ``sigma = sqrt(b**2 - a**2) / 2.355`` mm is applied first, so that the width of the point
    spread function grows from one voxel size to the other [1]_. Beyond the outermost voxel
    centres the outermost values go on. Axes that have the voxel size already are only flipped and
    permuted, bit for bit.

    Parameters
    ----------
    volume : Volume, native grid
    voxel_size : float, mm

    Returns
    -------
    Volume
        RAS+ axes; ``ceil(field of view / voxel_size)`` voxels per axis, same centre.

    References
    ----------
    .. [1] Cardoso et al. (2015), Scale factor point spread function matching: beyond aliasing in
       image resampling, MICCAI.

    Examples
    --------
    >>> data = np.arange(8, dtype="float32").reshape(2, 2, 2)
    >>> mirrored = Volume(data, np.diag([-1.0, 1, 1, 1]), nib.Nifti1Header())
    >>> conform(mirrored, 1.0).data[:, 0, 0].tolist()
    [4.0, 0.0]
    """
    orientation = io_orientation(volume.affine)
    data = apply_orientation(volume.data, orientation)
    affine = volume.affine @ inv_ornt_aff(orientation, volume.data.shape)
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    ratios = np.where(np.abs(voxel_size / sizes - 1) < SAME_SIZE, 1.0, voxel_size / sizes)
    shape = tuple(
        n if ratio == 1 else max(1, math.ceil(n / ratio - 0.01))
        for n, ratio in zip(data.shape, ratios, strict=True)
    )
    # Index in the image of the grid's voxel 0, such that the two centres coincide.
    first = (np.array(data.shape) - 1) / 2 - ratios * (np.array(shape) - 1) / 2
    for axis in np.argsort(-ratios, kind="stable"):  # coarsen first: less to compute after it
        ratio = float(ratios[axis])
        if ratio == 1:
            continue
        if ratio > 1:
            sigma = _FWHM_TO_SIGMA * math.sqrt(ratio**2 - 1)
            data = gaussian_filter1d(data, sigma, axis=axis, mode="nearest", output=np.float32)
        taps = axis_taps(shape[axis], data.shape[axis], ratio, float(first[axis]))
        data = taps.apply(data, axis)
    grid = np.eye(4)
    grid[:3, :3] = np.diag(ratios)
    grid[:3, 3] = first
    data = np.ascontiguousarray(data, dtype=np.float32)
    affine = affine @ grid
    return Volume(data=data, affine=affine, header=nib.Nifti1Image(data, affine).header)


def to_native_scalar(
    data: np.ndarray,
    conformed_affine: np.ndarray,
    native_affine: np.ndarray,
    native_shape: tuple[int, int, int],
    order: int = 1,
) -> np.ndarray:
    """Bring a map from the network's grid back to the image's own grid.

    Where the grids differ by flips and permutations only, values are copied bit for bit.
    Otherwise, with `order` 1, a native voxel is the mean of linear interpolations at
    ``ceil(native size / network size)`` points along each axis, so that coarse native voxels
    average over what they contain; with `order` 0 it takes the nearest voxel.

    Parameters
    ----------
    data : (X, Y, Z) any real type, conformed grid
    conformed_affine, native_affine : (4, 4), voxel -> mm
    native_shape : shape of the image's own grid
    order : 0 for labels and masks, 1 for maps

    Returns
    -------
    `native_shape`, type of `data` if it was copied or `order` is 0, else float32

    Raises
    ------
    ValueError
        If the two grids do not share their axes, or `order` is not 0 or 1.
    """
    axes, scales, offsets = axis_maps(conformed_affine, native_affine)
    result = np.transpose(data, axes)
    for axis in np.argsort(-np.abs(scales), kind="stable"):
        taps = axis_taps(
            native_shape[axis],
            result.shape[axis],
            float(scales[axis]),
            float(offsets[axis]),
            samples=samples_per_voxel(float(scales[axis])),
            order=order,
        )
        if not taps.exact and result.dtype != np.float32:
            result = result.astype(np.float32)
        result = taps.apply(result, axis)
    return np.ascontiguousarray(result)


def axis_maps(
    conformed_affine: np.ndarray, native_affine: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Say how native voxel indices become conformed ones, axis by axis.

    Native axis `a` runs along conformed axis ``axes[a]``:
    ``conformed_index = scales[a] * native_index + offsets[a]``.

    Returns
    -------
    axes : (3,) int64
    scales, offsets : (3,) float64, conformed voxels

    Raises
    ------
    ValueError
        If the two grids do not share their axes.

    Examples
    --------
    >>> flipped = np.array([[-1., 0, 0, 9], [0, 0, 2, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
    >>> axes, scales, offsets = axis_maps(np.eye(4), flipped)
    >>> axes.tolist(), scales.tolist(), offsets.tolist()
    ([0, 2, 1], [-1.0, 1.0, 2.0], [9.0, 0.0, 0.0])
    """
    matrix = np.linalg.solve(np.asarray(conformed_affine, float), np.asarray(native_affine, float))
    linear = matrix[:3, :3]
    axes = np.abs(linear).argmax(axis=0)
    scales = linear[axes, range(3)]
    rest = linear.copy()
    rest[axes, range(3)] = 0
    if sorted(axes) != [0, 1, 2] or np.abs(rest).max() > 1e-3 * np.abs(scales).min():
        raise ValueError("the two grids do not share their axes; this is not a conformed image")
    return axes, scales, matrix[:3, 3][axes]


def samples_per_voxel(scale: float) -> int:
    """Return how many points per axis stand for a native voxel of `scale` network voxels."""
    return max(1, math.ceil(abs(scale) - SAME_SIZE))


def axis_taps(
    n_out: int, n_in: int, scale: float, offset: float, samples: int = 1, order: int = 1
) -> Taps:
    """Return the taps of ``out[i] = in[scale * i + offset]``.

    Parameters
    ----------
    n_out, n_in : voxels along the axis
    scale, offset : input voxels
    samples : points along each output voxel whose interpolations are averaged (`order` 1)
    order : 1 linear, 0 nearest

    Examples
    --------
    >>> axis_taps(2, 4, 2.0, 0.5, samples=1).weights.tolist()
    [[0.5, 0.5], [0.5, 0.5]]
    >>> axis_taps(3, 3, -1.0, 2.0).indices[:, 0].tolist()
    [2, 1, 0]
    """
    if order not in (0, 1):
        raise ValueError(f"order must be 0 or 1, not {order}")
    rows = np.arange(n_out)
    if order == 0:
        place = np.round(scale * rows + offset, _INDEX_DECIMALS)
        nearest = np.clip(np.floor(place + 0.5), 0, n_in - 1).astype(np.int64)
        return Taps(nearest[:, None], np.ones((n_out, 1), np.float32))
    matrix = np.zeros((n_out, n_in))
    for sample in range(samples):
        within = (sample + 0.5) / samples - 0.5
        place = np.round(scale * (rows + within) + offset, _INDEX_DECIMALS)
        place = np.clip(place, 0, n_in - 1)
        low = np.floor(place).astype(np.int64)
        high = np.minimum(low + 1, n_in - 1)
        matrix[rows, low] += (1 - (place - low)) / samples
        matrix[rows, high] += (place - low) / samples
    width = int((matrix > 0).sum(axis=1).max())
    indices = np.argsort(matrix <= 0, axis=1, kind="stable")[:, :width]
    weights = np.take_along_axis(matrix, indices, axis=1).astype(np.float32)
    return Taps(indices, weights)
