"""Between a T1w's own grid and the network's grid.

The network's ("conformed") grid has one isotropic voxel size, RAS+ axes, and covers the image's
field of view with the same centre. Its axes are the image's own, flipped and permuted, where these
are within a few degrees of the scanner's; those of the scanner where the image is oblique.
"""

from __future__ import annotations

import math

import nibabel as nib
import numba
import numpy as np
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation
from scipy.ndimage import gaussian_filter1d

from bids_varaug.images.affine import is_oblique, voxel_sizes
from bids_varaug.images.load import Volume, load_t1w
from bids_varaug.machine import compiled

__all__ = ["Volume", "conform", "load_t1w", "to_native_scalar"]

SAME_SIZE = 1e-3
"""Relative difference of voxel sizes below which an axis is left as it is."""
_FWHM_TO_SIGMA = 1 / (2 * math.sqrt(2 * math.log(2)))
# Affines are stored in float32: indices computed from them are good to about this many decimals.
_INDEX_STEPS = 1e4


def conform(volume: Volume, voxel_size: float, straighten: bool = True) -> Volume:
    """Bring an image to the network's grid.

    Linear interpolation. Along axes that are coarsened from size `a` to `b`, a Gaussian of
    ``sigma = sqrt(b**2 - a**2) / 2.355`` mm is applied first, so that the width of the point
    spread function grows from one voxel size to the other [1]_. Beyond the outermost voxel
    centres the outermost values go on; what lies outside the image is air (0). Where all axes have
    the voxel size already and the image is not oblique, it is only flipped and permuted, bit for
    bit.

    Parameters
    ----------
    volume : Volume, native grid
    voxel_size : float, mm
    straighten : whether an oblique image (see `is_oblique`) is turned to the scanner's axes

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
    ratios = voxel_size / voxel_sizes(affine)
    ratios[np.abs(ratios - 1) < SAME_SIZE] = 1.0
    grid = np.diag([*ratios, 1.0])  # voxel of the grid -> voxel of the image
    if straighten and is_oblique(affine):
        grid[:3, :3] = np.linalg.inv(affine[:3, :3]) * voxel_size
    extents = np.abs(np.linalg.inv(grid[:3, :3])) @ data.shape  # of the image, voxels of the grid
    shape = tuple(max(1, math.ceil(n - 0.01)) for n in extents)
    grid[:3, 3] = (np.array(data.shape) - 1) / 2 - grid[:3, :3] @ (np.array(shape) - 1) / 2
    for axis in np.flatnonzero(ratios > 1):
        sigma = _FWHM_TO_SIGMA * math.sqrt(ratios[axis] ** 2 - 1)
        data = gaussian_filter1d(data, sigma, axis=axis, mode="nearest", output=np.float32)
    data = _resample(data, grid, shape)
    affine = affine @ grid
    header = nib.Nifti1Image(data, affine).header
    return Volume(data=data, affine=affine, header=header, warnings=volume.warnings)


def to_native_scalar(
    data: np.ndarray,
    conformed_affine: np.ndarray,
    native_affine: np.ndarray,
    native_shape: tuple[int, int, int],
    order: int = 1,
) -> np.ndarray:
    """Bring a map from the network's grid back to the image's own grid.

    With `order` 1, a native voxel is the mean of linear interpolations at ``ceil(native size /
    network size)`` points along each axis, so that coarse native voxels average over what they
    contain; with `order` 0 it takes the nearest voxel. Where the grids differ by flips and
    permutations only, values are copied bit for bit.

    Parameters
    ----------
    data : (X, Y, Z) any real type, conformed grid
    conformed_affine, native_affine : (4, 4), voxel -> mm
    native_shape : shape of the image's own grid
    order : 0 for labels and masks, 1 for maps

    Returns
    -------
    `native_shape`, float32; of the type of `data` with `order` 0
    """
    matrix, samples = native_to_conformed(conformed_affine, native_affine)
    if order == 0:
        return _resample(data, matrix, native_shape, nearest=True)
    return _resample(data.astype(np.float32, copy=False), matrix, native_shape, samples)


def native_to_conformed(
    conformed_affine: np.ndarray, native_affine: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the (4, 4) matrix from native to conformed voxel indices, and `samples`.

    These, (3,) int64, are how many points along each native axis stand for a native voxel.
    """
    matrix = np.linalg.solve(np.asarray(conformed_affine, float), np.asarray(native_affine, float))
    ratios = voxel_sizes(native_affine) / voxel_sizes(conformed_affine).mean()
    return matrix, np.maximum(1, np.ceil(ratios - SAME_SIZE)).astype(np.int64)


def _resample(
    data: np.ndarray,
    matrix: np.ndarray,
    shape: tuple[int, int, int],
    samples: np.ndarray | None = None,
    nearest: bool = False,
) -> np.ndarray:
    """Return `data` at ``matrix @ index``, 0 for voxels that have no part in the field of view."""
    out = np.zeros(tuple(int(n) for n in shape), data.dtype)
    samples = np.ones(3, np.int64) if samples is None else samples
    reach = (1 + np.abs(matrix[:3, :3]).sum(axis=1)) / 2
    _sample(np.ascontiguousarray(data), matrix[:3], samples, nearest, reach, out)
    return out


@compiled(parallel=True)
def _sample(data, matrix, samples, nearest, reach, out):
    n_x, n_y, n_z = data.shape
    count = np.float32(samples.prod())
    for i in numba.prange(out.shape[0]):
        for j in range(out.shape[1]):
            for k in range(out.shape[2]):
                total = np.float32(0)
                for point in range(samples.prod()):
                    x, y, z = place_of(matrix, i, j, k, point, samples)
                    if (
                        not -reach[0] < x < n_x - 1 + reach[0]
                        or not -reach[1] < y < n_y - 1 + reach[1]
                        or not -reach[2] < z < n_z - 1 + reach[2]
                    ):
                        continue
                    largest = np.float32(0)
                    for corner in range(8):
                        a, u = corner_of(x, n_x, corner & 1)
                        b, v = corner_of(y, n_y, corner >> 1 & 1)
                        c, w = corner_of(z, n_z, corner >> 2)
                        weight = u * v * w
                        if not nearest and weight > 0:
                            total += weight * data[a, b, c]
                        elif nearest and weight >= largest:  # of equals, the last
                            out[i, j, k], largest = data[a, b, c], weight
                if not nearest:
                    out[i, j, k] = total / count


@compiled()
def place_of(matrix, i, j, k, point, samples):
    """Place, on the other grid, of point number `point` of the ``prod(samples)`` of a voxel."""
    i += (point % samples[0] + 0.5) / samples[0] - 0.5
    j += (point // samples[0] % samples[1] + 0.5) / samples[1] - 0.5
    k += (point // samples[0] // samples[1] + 0.5) / samples[2] - 0.5
    x = matrix[0, 0] * i + matrix[0, 1] * j + matrix[0, 2] * k + matrix[0, 3]
    y = matrix[1, 0] * i + matrix[1, 1] * j + matrix[1, 2] * k + matrix[1, 3]
    z = matrix[2, 0] * i + matrix[2, 1] * j + matrix[2, 2] * k + matrix[2, 3]
    return _rounded(x), _rounded(y), _rounded(z)


@compiled()
def corner_of(x, n, upper):
    """Voxel below (or above) a place along an axis of `n` voxels, and its weight, float32."""
    x = min(max(x, 0.0), n - 1.0)
    low = int(x)
    share = x - low
    return (min(low + 1, n - 1), np.float32(share)) if upper else (low, np.float32(1 - share))


@compiled()
def _rounded(x):
    return math.floor(x * _INDEX_STEPS + 0.5) / _INDEX_STEPS
