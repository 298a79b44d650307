"""Looks at some of an operator's operands: what a sample of results is made of, and energies.

CPU tensors of any strides are read by compiled loops: the many small steps that torch's operators
would take cost as much as rounding all results. Other devices take those steps.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numba import prange

from bids_varaug.machine import compiled

_LARGE = 2**15  # voxels from which on every fourth of a line is enough
_ROWS = 256  # that one task handles
_SMALL = 2**13  # voxels below which waking other threads takes longer than the work


class Geometry(NamedTuple):
    """Of a convolution over three axes."""

    stride: tuple[int, int, int]
    padding: tuple[int, int, int]
    dilation: tuple[int, int, int]


def flat_view(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The memory that an array looks at, from its first element on, and strides in elements."""
    strides = np.array(x.strides, np.int64) // x.itemsize
    extent = 1 + int(strides @ (np.array(x.shape) - 1)) if x.size else 0
    return np.lib.stride_tricks.as_strided(x, (extent,), (x.itemsize,)), strides


# --------------------------------------------------------------------------------------------------
# Patches


def gather_patches(
    x: torch.Tensor, places: np.ndarray, kernel: tuple[int, ...], geometry: Geometry
) -> np.ndarray:
    """What lies under the kernel, for some voxels of a convolution's result.

    Parameters
    ----------
    x : (N, C, X, Y, Z), float32 or float64
    places : (S, 4) int64: sample and voxel of the result
    kernel : KX, KY, KZ

    Returns
    -------
    (S, C KX KY KZ), dtype of x; 0 where the kernel lies on padding
    """
    if x.device.type != "cpu":
        return _gather_with_torch(x, places, kernel, geometry)
    values = x.detach().numpy()
    found = np.zeros((len(places), x.shape[1], *kernel), values.dtype)
    sizes = np.array(x.shape, np.int64)
    _gather(*flat_view(values), sizes, places, np.array(geometry, np.int64), found)
    return found.reshape(len(places), -1)


@compiled()
def _gather(flat, strides, sizes, places, geometry, found):
    stride, padding, dilation = geometry
    for s in range(len(places)):
        corner = places[s, 1:] * stride - padding
        for i in range(found.shape[2]):
            for j in range(found.shape[3]):
                for k in range(found.shape[4]):
                    x = corner[0] + i * dilation[0]
                    y = corner[1] + j * dilation[1]
                    z = corner[2] + k * dilation[2]
                    if 0 <= x < sizes[2] and 0 <= y < sizes[3] and 0 <= z < sizes[4]:
                        start = places[s, 0] * strides[0]
                        start += x * strides[2] + y * strides[3] + z * strides[4]
                        for c in range(sizes[1]):
                            found[s, c, i, j, k] = flat[start + c * strides[1]]


def _gather_with_torch(x, places, kernel, geometry: Geometry) -> np.ndarray:
    places = torch.from_numpy(places).to(x.device)
    index, inside = [places[:, 0].reshape(-1, 1, 1, 1)], torch.ones((), device=x.device)
    for axis, size in enumerate(kernel):
        taps = torch.arange(size, device=x.device) * geometry.dilation[axis]
        place = places[:, 1 + axis, None] * geometry.stride[axis] - geometry.padding[axis] + taps
        shape = [-1, 1, 1, 1]
        shape[1 + axis] = size
        inside = inside * ((place >= 0) & (place < x.shape[2 + axis])).reshape(shape)
        index.append(place.clamp(0, x.shape[2 + axis] - 1).reshape(shape))
    patches = x.detach().movedim(1, -1)[tuple(index)] * inside[..., None].to(x.dtype)
    return patches.movedim(-1, 1).reshape(len(places), -1).cpu().numpy()


def some_rows(a: torch.Tensor, rows: np.ndarray, columns: slice) -> np.ndarray:
    """``a[rows, columns]`` as an array."""
    if a.device.type == "cpu":
        return a.detach().numpy()[rows, columns]
    return a.detach()[torch.from_numpy(rows).to(a.device), columns].cpu().numpy()


def some_elements(x: torch.Tensor, places: np.ndarray) -> np.ndarray:
    """Elements of x at places (S, x.dim()), as an array (S,)."""
    if x.device.type == "cpu":
        return x.detach().numpy()[tuple(places.T)]
    return x.detach()[tuple(torch.from_numpy(places).to(x.device).T)].cpu().numpy()


# --------------------------------------------------------------------------------------------------
# Energies


def coarse_energy(x: torch.Tensor, shape, stride) -> tuple[torch.Tensor, int]:
    """Sum of squares over channels, at some voxels of a grid that is coarser by a power of two.

    Parameters
    ----------
    x : (N, C, X, Y, Z)
    shape : of the grid that looks at the energy
    stride : voxels of x per voxel of that grid

    Returns
    -------
    energy : (N, 1, X', Y', Z')
    shift : voxel v of `shape` looks at ``v >> shift``
    """
    shift = 0 if min(shape) < 4 else 1 if math.prod(shape) < _LARGE else 2
    steps = [s << shift for s in stride]
    index = [
        np.minimum(np.arange(((n - 1) >> shift) + 1) * step + step // 2, size - 1)
        for n, step, size in zip(shape, steps, x.shape[2:], strict=True)
    ]
    x = x.detach()
    if x.device.type != "cpu":
        for axis, places in enumerate(index):
            x = x.index_select(2 + axis, torch.from_numpy(places).to(x.device))
        x = x.movedim(1, -1)
        return torch.linalg.vecdot(x, x)[:, None], shift
    values = x.numpy()
    energy = np.zeros((len(x), *map(len, index)), values.dtype)
    run = _sum_squares_serial if energy.size < _SMALL else _sum_squares_parallel
    run(*flat_view(values), x.shape[1], *index, energy)
    return torch.from_numpy(energy)[:, None], shift


@compiled(fastmath={"reassoc"})  # else no vector instructions
def _sum_squares(flat, strides, n_channels, start, y, z, energy):
    for j in range(len(y)):
        line = start + y[j] * strides[3]
        if strides[1] == 1:
            for k in range(len(z)):
                first, total = line + z[k] * strides[4], energy[j, k]
                for c in range(first, first + n_channels):
                    total += flat[c] * flat[c]
                energy[j, k] = total
        else:
            for c in range(n_channels):
                for k in range(len(z)):
                    value = flat[line + c * strides[1] + z[k] * strides[4]]
                    energy[j, k] += value * value


@compiled(parallel=True)
def _sum_squares_parallel(flat, strides, n_channels, x, y, z, energy):
    for task in prange(len(energy) * len(x)):
        n, i = task // len(x), task % len(x)
        start = n * strides[0] + x[i] * strides[2]
        _sum_squares(flat, strides, n_channels, start, y, z, energy[n, i])


@compiled()
def _sum_squares_serial(flat, strides, n_channels, x, y, z, energy):
    for n in range(len(energy)):
        for i in range(len(x)):
            start = n * strides[0] + x[i] * strides[2]
            _sum_squares(flat, strides, n_channels, start, y, z, energy[n, i])


def mean_square(x: torch.Tensor) -> np.ndarray:
    """Of each channel, over some of the voxels.

    Parameters
    ----------
    x : (N, C, X, Y, Z)

    Returns
    -------
    (C,) float64
    """
    most = max(2**16 // x.shape[1], 2**10)
    step = max(1, math.floor((math.prod(x.shape[2:]) / most) ** (1 / 3) + 0.5))
    x = x.detach()[:, :, ::step, ::step, ::step]
    if x.device.type != "cpu":
        return x.square().mean((0, 2, 3, 4), dtype=torch.float64).cpu().numpy()
    total = np.zeros(x.shape[1])
    _add_squares(*flat_view(x.numpy()), np.array(x.shape, np.int64), total)
    return total * (x.shape[1] / x.numel())


@compiled(fastmath={"reassoc"})
def _add_squares(flat, strides, shape, total):
    for n in range(shape[0]):
        for i in range(shape[2]):
            for j in range(shape[3]):
                line = n * strides[0] + i * strides[2] + j * strides[3]
                if strides[1] == 1:
                    for k in range(shape[4]):
                        start = line + k * strides[4]
                        for c in range(shape[1]):
                            total[c] += np.float64(flat[start + c]) ** 2
                else:
                    for c in range(shape[1]):
                        for k in range(shape[4]):
                            value = flat[line + c * strides[1] + k * strides[4]]
                            total[c] += np.float64(value) ** 2


def row_energy(a: torch.Tensor, most: int = 256) -> torch.Tensor:
    """Sum of squares of each row, from at most twice `most` of its elements.

    Parameters
    ----------
    a : (M, K)

    Returns
    -------
    (M, 1), dtype of a
    """
    k = a.shape[1]
    a = a.detach()[:, :: max(1, k // most)]
    if a.device.type != "cpu":
        return a.square().mean(1, keepdim=True) * k
    flat, strides = flat_view(a.numpy())
    energy = np.zeros(len(a), flat.dtype)
    if a.numel() < 4 * _LARGE:
        row_energies(flat, strides, a.shape[1], 0, energy)
    else:
        _row_energies_parallel(flat, strides, a.shape[1], energy)
    return torch.from_numpy(energy * energy.dtype.type(k / a.shape[1]))[:, None]


@compiled(fastmath={"reassoc"})
def row_energies(flat, strides, n, first, energy):
    """Of the rows from the first on, in the order of memory."""
    if strides[1] == 1:
        for row in range(len(energy)):
            start, total = (first + row) * strides[0], energy[row]
            for i in range(start, start + n):
                total += flat[i] * flat[i]
            energy[row] = total
    elif strides[0] == 1:
        for i in range(n):
            terms = flat[first + i * strides[1] :]
            for row in range(len(energy)):
                energy[row] += terms[row] * terms[row]
    else:
        for i in range(n):
            for row in range(len(energy)):
                value = flat[(first + row) * strides[0] + i * strides[1]]
                energy[row] += value * value


@compiled(parallel=True)
def _row_energies_parallel(flat, strides, n, energy):
    for task in prange((len(energy) + _ROWS - 1) // _ROWS):
        part = slice(task * _ROWS, min((task + 1) * _ROWS, len(energy)))
        row_energies(flat, strides, n, task * _ROWS, energy[part])
