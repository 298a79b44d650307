"""Smooth random fields, for the shape of heads and the shading of coils."""

from __future__ import annotations

import numpy as np


def smooth_field(
    rng: np.random.Generator, shape: tuple[int, int, int], length: float
) -> np.ndarray:
    """Gaussian random field: cubic B-splines with independent normal coefficients.

    Parameters
    ----------
    rng : numpy Generator
    shape : of the field, voxels
    length : distance of the knots, voxels; nothing finer than about this is in the field

    Returns
    -------
    `shape` float32, mean 0, variance 1 at every voxel
    """
    weights = [_spline_weights(n, length) for n in shape]
    field = rng.standard_normal([w.shape[1] for w in weights], dtype=np.float32)
    for axis, w in enumerate(weights):
        # One short sum per voxel and axis, in an order that does not depend on threads.
        knots = np.moveaxis(field, axis, 0)
        first = np.argmax(w > 0, axis=1)
        taps = np.arange(4)
        near = np.minimum(first[:, None] + taps, w.shape[1] - 1)
        share = np.take_along_axis(w, near, 1) * (first[:, None] + taps < w.shape[1])
        spread = sum(share[:, tap].reshape(-1, 1, 1) * knots[near[:, tap]] for tap in range(4))
        field = np.moveaxis(spread, 0, axis)
    return np.ascontiguousarray(field)


def _spline_weights(n: int, length: float) -> np.ndarray:
    """Weights (n, knots) float32 of the cubic B-splines at n voxels, sum of squares 1 per voxel."""
    knots = int(np.ceil((n - 1) / length)) + 4
    distance = np.abs(np.arange(n)[:, None] / length + 1.5 - np.arange(knots)[None])
    near = 2 / 3 - distance**2 + distance**3 / 2
    far = np.clip(2 - distance, 0, None) ** 3 / 6
    weights = np.where(distance < 1, near, far)
    return (weights / np.sqrt((weights**2).sum(1, keepdims=True))).astype(np.float32)
