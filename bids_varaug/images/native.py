"""The posterior of a head box on the T1w's own grid."""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np

from bids_varaug.images.conform import corner_of, native_to_conformed, place_of
from bids_varaug.images.crop import Box, insert
from bids_varaug.machine import compiled

POSTERIOR_SCALE = 1 / 255
"""Value of one step of a stored posterior (the NIfTI's ``scl_slope``)."""


@dataclass(frozen=True)
class NativePosterior:
    """A segmentation on the image's own grid.

    Attributes
    ----------
    labels : (X, Y, Z) uint8, class index k of the most probable class, ties to the lower index
    posterior : (X, Y, Z, K) uint8 or None, probability * 255, rounded; good to 1/510
    """

    labels: np.ndarray
    posterior: np.ndarray | None


def resample_posterior(
    offsets: np.ndarray,
    voxels: np.ndarray,
    posterior: np.ndarray,
    box: Box,
    conformed_shape: tuple[int, int, int],
    conformed_affine: np.ndarray,
    native_affine: np.ndarray,
    native_shape: tuple[int, int, int],
    with_posterior: bool = True,
    out: np.ndarray | None = None,
    temperature: float = 1.0,
) -> NativePosterior:
    """Bring a sparse posterior from the head box to the image's own grid.

    A native voxel is the trilinear mix of the posteriors of the 8 network voxels around it; a
    native voxel larger than the network's is the mean of ``ceil(native size / network size)``
    such mixes along each axis. Voxels that are not stored, or lie outside the box, count as
    background. Where the grids differ by flips and permutations only, rows are copied. Labels are
    those of the mix; its probabilities p become p^(1/T), scaled to sum to 1, which moves no label.
    The same bits for any number of threads.

    Parameters
    ----------
    offsets : (X + 1,) int64, rows of slab x of the box are ``offsets[x]:offsets[x + 1]``
    voxels : (N,) int32, flat index ``y * Z + z`` within the slab
    posterior : (N, K) float32, sums to 1 over K
    box : the head box in the conformed grid; ``box.shape`` is (X, Y, Z)
    conformed_shape, conformed_affine : the network's grid
    native_affine, native_shape : the image's own grid
    with_posterior : if False, only labels are made
    out : (*native_shape, K) uint8, optional
        Where to write the posterior, for example a `numpy.memmap` where it would not fit in
        memory (32 classes at 512^3 voxels are 4.3 GB). It must hold zeros.
    temperature : T, above 1 to make the posterior less sure

    Returns
    -------
    NativePosterior

    Raises
    ------
    ValueError
        If the arrays' sizes do not fit together.
    """
    n_classes = posterior.shape[1]
    native_shape = tuple(int(n) for n in native_shape)
    if len(offsets) != box.shape[0] + 1 or not offsets[-1] == len(voxels) == len(posterior):
        raise ValueError("offsets, voxels, posterior and box do not belong together")
    matrix, samples = native_to_conformed(conformed_affine, native_affine)
    rows = np.full((box.shape[0], box.shape[1] * box.shape[2]), -1, np.int32)
    rows[np.repeat(np.arange(box.shape[0]), np.diff(offsets)), voxels] = np.arange(len(voxels))
    row_of = insert(rows.reshape(box.shape), box, conformed_shape, fill=-1)
    labels = np.zeros(native_shape, np.uint8)
    if not with_posterior:
        out = np.zeros((1, 1, 1, n_classes), np.uint8)
    elif out is None:
        out = np.zeros((*native_shape, n_classes), np.uint8)
    elif out.shape != (*native_shape, n_classes) or out.dtype != np.uint8:
        raise ValueError(f"out must be uint8 of shape {(*native_shape, n_classes)}")
    posterior = np.ascontiguousarray(posterior, np.float32)
    power = np.float32(1 / temperature)
    _mix(row_of, posterior, matrix[:3], samples, labels, out, with_posterior, power)
    return NativePosterior(labels=labels, posterior=out if with_posterior else None)


@compiled(parallel=True)
def _mix(row_of, posterior, matrix, samples, labels, out, with_posterior, power):
    n_classes = posterior.shape[1]
    n_points = samples.prod()
    for i in numba.prange(labels.shape[0]):
        mix = np.empty(n_classes, dtype=np.float32)
        for j in range(labels.shape[1]):
            for k in range(labels.shape[2]):
                stored = False
                mix[:] = np.float32(0)
                for point in range(n_points):
                    x, y, z = place_of(matrix, i, j, k, point, samples)
                    for corner in range(8):
                        a, u = corner_of(x, row_of.shape[0], corner & 1)
                        b, v = corner_of(y, row_of.shape[1], corner >> 1 & 1)
                        c, w = corner_of(z, row_of.shape[2], corner >> 2)
                        weight = u * v * w / np.float32(n_points)
                        if weight == 0:
                            continue
                        row = row_of[a, b, c]
                        if row < 0:
                            mix[0] += weight
                        else:
                            stored = True
                            for n in range(n_classes):
                                mix[n] += weight * posterior[row, n]
                if stored:
                    best = 0
                    for n in range(1, n_classes):
                        if mix[n] > mix[best]:
                            best = n
                    labels[i, j, k] = best
                    if with_posterior:
                        if power != 1:
                            _temper(mix, power)
                        for n in range(n_classes):
                            scaled = mix[n] * np.float32(255) + np.float32(0.5)
                            out[i, j, k, n] = np.uint8(min(scaled, np.float32(255)))
                elif with_posterior:
                    out[i, j, k, 0] = 255


@compiled()
def _temper(probabilities, power):
    """Raise probabilities (K,) to a power and scale them to sum to 1, in place."""
    total = np.float32(0)
    for n in range(len(probabilities)):
        if probabilities[n] > 0:
            probabilities[n] = probabilities[n] ** power
            total += probabilities[n]
    for n in range(len(probabilities)):
        probabilities[n] /= total
