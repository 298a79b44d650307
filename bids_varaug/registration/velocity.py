"""Diffeomorphisms from stationary velocity fields, and their fit to a posterior.

A velocity is a cubic B-spline on a grid of every other voxel of the template's (4 mm). Its exponential, by scaling and
squaring (Arsigny et al. 2006, MICCAI), is the deformation; that of the negative velocity is its inverse. A network that
predicts the coefficients takes the place of zeros as `start`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import maximum_filter

from bids_varaug.machine import compiled

STEPS_OF_FIT = 4
STEPS = 7
"""Squarings: the velocity is divided by two to this power."""
SMOOTHNESS = 30.0
"""Weight of the mean squared gradient of the displacement, against one minus the mean Dice."""
LEARNING_RATE = 0.8
"""Knots per iteration at first; it falls to 0 linearly, and with it the roughness that Adam's steps leave."""
MARGIN = 4
"""Voxels around the template's brain in which the fit looks at the head."""
VISCOSITY = 2.0
"""Standard deviation of the Gaussian, in knots and cut at three, that smooths the steps of the fit."""
_SPLINE = (1 / 6, 4 / 6, 1 / 6)  # cubic B-spline at its knots
_HALVES = (1 / 48, 8 / 48, 23 / 48, 32 / 48, 23 / 48, 8 / 48, 1 / 48)  # and between them


def coefficient_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the coefficients of a grid, all of whose sides are odd.

    >>> coefficient_shape((97, 115, 97))
    (3, 49, 58, 49)
    """
    if any(side % 2 == 0 for side in shape):
        raise ValueError(f"grid of {shape} voxels: sides must be odd")
    return (3, *(side // 2 + 1 for side in shape))


def spline_velocity(coefficients: torch.Tensor, fine: bool = False) -> torch.Tensor:
    """Velocity at the knots, or on the template's grid (`fine`); in and out (3, X, Y, Z), voxels of the knots' grid."""
    return _convolve(coefficients, _HALVES, 2) if fine else _convolve(coefficients, _SPLINE)


def _convolve(field: torch.Tensor, weights: Sequence[float], factor: int = 1) -> torch.Tensor:
    """Convolve (3, X, Y, Z) along each axis, with zeros beyond the edge; onto a grid finer by a factor."""
    field = field[:, None]
    for axis in range(3):
        along = [n if a == axis else 1 for a, n in enumerate([len(weights)] * 3)]
        kernel = torch.tensor(weights, dtype=field.dtype).reshape(1, 1, *along)
        padding = [n // 2 for n in along]
        if factor == 1:
            field = F.conv3d(field, kernel, padding=padding)
        else:
            stride = [factor if a == axis else 1 for a in range(3)]
            field = F.conv_transpose3d(field, kernel, stride=stride, padding=padding)
    return field[:, 0]


def integrate(velocity: torch.Tensor, steps: int = STEPS) -> torch.Tensor:
    """Displacement of the exponential of a velocity, both (3, X, Y, Z) in voxels: point x goes to x + u(x)."""
    displacement = velocity / 2**steps
    for _ in range(steps):
        displacement = displacement + warp(displacement, displacement)
    return displacement


def warp(field: torch.Tensor, displacement: torch.Tensor) -> torch.Tensor:
    """Values (C, X, Y, Z) of a field at x + u(x), u (3, X, Y, Z) in voxels; beyond the edge its values go on."""
    shape = displacement.shape[1:]
    axes = [torch.arange(n, dtype=displacement.dtype) for n in shape]
    points = torch.stack(torch.meshgrid(*axes, indexing="ij")) + displacement
    scaled = [2 * points[a] / (shape[a] - 1) - 1 for a in (2, 1, 0)]  # torch counts axes from the last
    grid = torch.stack(scaled, dim=-1)[None]
    return F.grid_sample(field[None], grid, padding_mode="border", align_corners=True)[0]


def upsample(field: torch.Tensor) -> torch.Tensor:
    """Bring a field (3, X, Y, Z) from the knots to the template's grid, linearly; its unit becomes that voxel."""
    shape = [2 * (n - 1) + 1 for n in field.shape[1:]]
    return 2 * F.interpolate(field[None], shape, mode="trilinear", align_corners=True)[0]


def smoothness(displacement: torch.Tensor) -> torch.Tensor:
    """Mean squared gradient of a displacement (3, X, Y, Z), over its voxels, axes and components."""
    return torch.stack([torch.diff(displacement, dim=axis).square().mean() for axis in (1, 2, 3)]).mean()


def fit_velocity(
    moving: np.ndarray, labels: np.ndarray, n_iterations: int, start: np.ndarray | None = None
) -> np.ndarray:
    """Coefficients of the velocity that brings a head's posterior onto the template's labels.

    Minimises one minus the mean soft Dice of the structures plus `SMOOTHNESS` times `smoothness`, with Adam. On one
    thread: the bits do not depend on the number of processors.

    Parameters
    ----------
    moving : (X, Y, Z, K) uint8, the posterior of a head after its affine, on the template's grid, times 255
    labels : (X, Y, Z) uint8, classes of the template
    start : coefficients to begin with (see `coefficient_shape`), of a network for example; default zeros

    Returns
    -------
    (3, x, y, z) float32, voxels of the grid of knots
    """
    steps = torch.zeros(coefficient_shape(labels.shape), requires_grad=True)
    first = torch.zeros(steps.shape) if start is None else torch.from_numpy(start)
    gaussian = np.exp(-0.5 * (np.arange(-3, 4) / VISCOSITY) ** 2)
    gaussian = (gaussian / gaussian.sum()).tolist()
    voxels = voxels_near(labels)
    classes = labels[tuple(voxels.T)]
    moving = moving / np.float32(255)
    optimiser = torch.optim.Adam([steps], lr=LEARNING_RATE)
    index = torch.from_numpy(voxels.astype(np.int64))
    for iteration in range(n_iterations):
        optimiser.param_groups[0]["lr"] = LEARNING_RATE * (1 - iteration / n_iterations)
        optimiser.zero_grad()
        displacement = integrate(spline_velocity(first + _convolve(steps, gaussian)), STEPS_OF_FIT)
        fine = upsample(displacement)
        points = index.T + fine[:, index[:, 0], index[:, 1], index[:, 2]]
        _, gradient = dice_gradient(moving, classes, points.detach().numpy())
        torch.autograd.backward([SMOOTHNESS * smoothness(displacement), points], [None, torch.from_numpy(gradient)])
        optimiser.step()
    with torch.no_grad():
        return (first + _convolve(steps, gaussian)).numpy()


def voxels_near(labels: np.ndarray) -> np.ndarray:
    """Indices (N, 3) int32 of the voxels within `MARGIN` of a structure."""
    near = maximum_filter((labels > 0).view(np.uint8), size=2 * MARGIN + 1)
    return np.argwhere(near).astype(np.int32)


def dice_gradient(moving: np.ndarray, classes: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Soft Dice of each structure, and the gradient of one minus their mean with respect to the points.

    ``Dice_k = 2 sum_v p_k(x_v) [c_v = k] / (sum_v p_k(x_v) + sum_v [c_v = k])``; structures that the template lacks do
    not count. `moving` (X, Y, Z, K) is interpolated linearly at `points` (3, N), voxels, which belong to template
    voxels of `classes` (N,). Returns (K,) float64, NaN for those that do not count, and (3, N) float32.
    """
    n_classes = moving.shape[3]
    sums, overlaps = np.zeros((2, n_classes))
    _sample_sums(moving, classes, points, sums, overlaps)
    sizes = np.bincount(classes, minlength=n_classes).astype(np.float64)
    counted = sizes > 0
    counted[0] = False
    total = np.where(counted, sums + sizes, 1.0)
    dice = np.where(counted, 2 * overlaps / total, np.nan)
    # d(1 - mean Dice) / dp_k(x_v) = -(2 [c_v = k] - Dice_k) / total_k / number of structures
    scale = np.where(counted, 1 / total / max(counted.sum(), 1), 0.0)
    gradient = np.empty(points.shape, np.float32)
    everywhere = (np.nan_to_num(dice) * scale).astype(np.float32)
    _slopes(moving, classes, points, everywhere, (2 * scale).astype(np.float32), gradient)
    return dice, gradient


@compiled()
def _locate(
    points: np.ndarray, n: int, shape: tuple[int, ...], low: np.ndarray, step: np.ndarray, share: np.ndarray
) -> None:
    """Fill in the lower corner of the cell of a point, steps to the next voxels (0 at the edge), and their shares."""
    for axis in range(3):
        x = min(max(points[axis, n], np.float32(0)), np.float32(shape[axis] - 1))
        low[axis] = int(x)
        step[axis] = 1 if low[axis] < shape[axis] - 1 else 0
        share[axis] = x - low[axis]


@compiled()
def _sample_sums(
    moving: np.ndarray, classes: np.ndarray, points: np.ndarray, sums: np.ndarray, overlaps: np.ndarray
) -> None:
    n_classes = moving.shape[3]
    mix = np.empty(n_classes, np.float32)
    low, step, share = np.zeros(3, np.int64), np.zeros(3, np.int64), np.zeros(3, np.float32)
    for n in range(points.shape[1]):
        _locate(points, n, moving.shape[:3], low, step, share)
        mix[:] = np.float32(0)
        for corner in range(8):
            i, j, k = corner & 1, corner >> 1 & 1, corner >> 2
            weight = np.float32(1)
            weight *= share[0] if i else np.float32(1) - share[0]
            weight *= share[1] if j else np.float32(1) - share[1]
            weight *= share[2] if k else np.float32(1) - share[2]
            row = moving[low[0] + i * step[0], low[1] + j * step[1], low[2] + k * step[2]]
            for c in range(n_classes):
                mix[c] += weight * row[c]
        for c in range(n_classes):
            sums[c] += mix[c]
        overlaps[classes[n]] += mix[classes[n]]


@compiled()
def _slopes(
    moving: np.ndarray, classes: np.ndarray, points: np.ndarray, everywhere: np.ndarray, at_label: np.ndarray,
    gradient: np.ndarray,
) -> None:  # fmt: skip
    """Gradient of ``sum_k everywhere_k p_k(x) - at_label_c p_c(x)`` for each point, whose label is c."""
    n_classes = moving.shape[3]
    value = np.empty(8, np.float32)
    low, step, share = np.zeros(3, np.int64), np.zeros(3, np.int64), np.zeros(3, np.float32)
    for n in range(points.shape[1]):
        _locate(points, n, moving.shape[:3], low, step, share)
        label = classes[n]
        for corner in range(8):
            i, j, k = corner & 1, corner >> 1 & 1, corner >> 2
            row = moving[low[0] + i * step[0], low[1] + j * step[1], low[2] + k * step[2]]
            total = -at_label[label] * row[label]
            for c in range(n_classes):
                total += everywhere[c] * row[c]
            value[corner] = total
        for axis in range(3):
            bit = 1 << axis
            slope = np.float32(0)
            for corner in range(8):
                if not corner & bit:
                    weight = np.float32(1)
                    for other in range(3):
                        if other != axis:
                            weight *= share[other] if corner & (1 << other) else np.float32(1) - share[other]
                    slope += weight * (value[corner | bit] - value[corner])
            gradient[axis, n] = slope


def displacement_of(coefficients: np.ndarray, inverse: bool = False) -> np.ndarray:
    """Displacement (3, X, Y, Z) float32 on the template's grid, in its voxels, of a velocity or of its inverse."""
    with torch.no_grad():
        velocity = 2 * spline_velocity(torch.from_numpy(coefficients).double(), fine=True)
        return integrate(-velocity if inverse else velocity).float().numpy()


def jacobian_determinants(displacement: np.ndarray) -> np.ndarray:
    """Determinants (X - 2, Y - 2, Z - 2) float32, inside the edge, of the Jacobian of x + u(x), u (3, X, Y, Z) voxels.

    Where one is not positive, the deformation folds.

    >>> float(jacobian_determinants(np.zeros((3, 3, 3, 3)))[0, 0, 0])
    1.0
    """
    inside = [slice(1, -1)] * 3
    jacobian = np.empty((*(n - 2 for n in displacement.shape[1:]), 3, 3), np.float32)
    for component in range(3):
        for axis in range(3):
            ahead, behind = list(inside), list(inside)
            ahead[axis], behind[axis] = slice(2, None), slice(None, -2)
            u = displacement[component]
            jacobian[..., component, axis] = (u[tuple(ahead)] - u[tuple(behind)]) / 2 + (component == axis)
    return np.linalg.det(jacobian)
