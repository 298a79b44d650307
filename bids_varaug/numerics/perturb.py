"""Perturb tensors in place, whatever their device and memory layout.

CPU tensors are handed to the compiled kernels of `noise`, CUDA tensors to that of `triton_kernel`
where Triton is installed; `plain_torch` is for the rest. The arithmetic is the same, the random
numbers are others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from importlib import import_module

import numpy as np
import torch

from bids_varaug.numerics import noise, plain_torch
from bids_varaug.numerics.channel_noise import HYPOTENUSE, perturb_planes, perturb_rows
from bids_varaug.numerics.dense import Flat
from bids_varaug.numerics.last_rounding import LARGE, finish
from bids_varaug.numerics.plain_torch import EXPONENTS
from bids_varaug.numerics.random_numbers import BYTES_SD
from bids_varaug.numerics.rules import Rule

TILE = 1024  # elements handled by one loop that becomes vector instructions


@dataclass(frozen=True)
class ChannelNoise:
    """Noise whose strength depends on channel and place.

    Variance of an element y of channel c: ``quadratic_c (y - offset_c)^2 + linear_c energy``, plus
    ``intercept_c + slope_c companion``, the same numbers for a whole channel.

    Parameters
    ----------
    quadratic, linear, offset, slope, intercept : (C,) float64
    energy : of each element, shape of the perturbed tensor; or (N, 1, X', Y', Z') for all
        channels, that of voxel x at ``x >> shift``; or None for 0
    shift : bits
    companion : tensor of the perturbed one's shape, or None for the perturbed tensor itself
    """

    quadratic: np.ndarray
    linear: np.ndarray | None = None
    offset: np.ndarray | None = None
    energy: torch.Tensor | None = None
    shift: int = 0
    slope: np.ndarray | None = None
    intercept: np.ndarray | None = None
    companion: torch.Tensor | None = None

    def columns(self) -> np.ndarray:
        """(5, C) float64: offset, roots of quadratic and linear, slope, intercept; 0 for None."""
        given = (self.offset, self.quadratic, self.linear, self.slope, self.intercept)
        zeros = np.zeros(len(self.quadratic))
        columns = np.stack([zeros if v is None else v for v in given])
        columns[1:3] = np.sqrt(np.maximum(columns[1:3], 0))
        return columns


def round_(tensor: torch.Tensor, rule: Rule, stream: int) -> None:
    """Round each element once, in place.

    Zeros, infinities and NaN stay what they are, finite numbers stay finite. Subnormal numbers
    stay too under a dither. Any strides.

    Parameters
    ----------
    tensor : float16, bfloat16, float32 or float64
    rule : of the tensor's format
    stream : names the random numbers, 64 bits
    """
    if not tensor.numel():
        return
    if tensor.device.type != "cpu":
        _elsewhere(tensor).round_(tensor, rule, stream)
    elif tensor.element_size() == 2:
        with Flat(tensor) as flat:
            noise.round_halves(
                flat.values.view(torch.int16).numpy(), np.int32(EXPONENTS[tensor.dtype]),
                np.int32((1 << rule.grid_bits) - 1), np.float32(rule.width), rule.kind,
                np.uint64(stream),
            )  # fmt: skip
    else:
        with Flat(tensor) as flat:
            values = flat.values.numpy()
            noise.round_flat(values, np.uint64(stream), finish(rule, values.dtype))


def perturb_(tensor: torch.Tensor, deviation: torch.Tensor, rule: Rule, stream: int) -> None:
    """Add noise of a given standard deviation to each element, then round once, in place.

    Parameters
    ----------
    tensor : float32 or float64
    deviation : same shape, dtype and device
    rule : of the tensor's format
    stream : names the random numbers, 64 bits
    """
    if not tensor.numel():
        return
    if tensor.device.type != "cpu":
        _elsewhere(tensor).perturb_(tensor, deviation, rule, stream)
        return
    with Flat(tensor) as flat:
        values, deviations = flat.values.numpy(), flat.like(deviation).numpy()
        noise.perturb_flat(values, deviations, np.uint64(stream), finish(rule, values.dtype))


def perturb_channels_(tensor: torch.Tensor, given: ChannelNoise, rule: Rule, stream: int) -> None:
    """Add noise as `ChannelNoise` describes it, then round once, in place.

    Parameters
    ----------
    tensor : (N, C, X, Y, Z), float32 or float64
    given : strength of the noise
    rule : of the tensor's format
    stream : names the random numbers, 64 bits
    """
    if not tensor.numel():
        return
    if tensor.device.type != "cpu":
        _elsewhere(tensor).perturb_channels_(tensor, given, rule, stream)
        return
    y = tensor.detach()
    channels_last = y.movedim(1, -1).is_contiguous()
    layout = torch.channels_last_3d if channels_last else torch.contiguous_format
    dense = y if channels_last else y.contiguous()
    n, c, *space = y.shape
    dtype = dense.numpy().dtype
    coarse, energies, companion = np.empty((0, 1, 1, 1), dtype), dense[:0], dense[:0]
    if given.energy is not None and given.energy.shape == y.shape:
        energies = given.energy.to(y.dtype).contiguous(memory_format=layout)
    elif given.energy is not None:
        root = given.energy[:, 0].clamp_min(0).sqrt_()
        coarse = root.to(y.dtype).contiguous().numpy()
    if given.companion is not None:
        companion = given.companion.detach().contiguous(memory_format=layout)
    columns = given.columns()
    # The kernels' g is that of whole numbers, their root one of larger and smaller part
    columns[1:3] /= BYTES_SD * (HYPOTENUSE if given.energy is not None else 1.0)
    columns = columns.astype(dtype)
    calm = _is_calm(columns, coarse)
    grid = np.array([n, *space, c], np.int64)
    how = finish(rule, dtype)
    if channels_last:
        columns = np.tile(columns, max(1, TILE // c))
        arrays = [t.movedim(1, -1).reshape(-1).numpy() for t in (dense, companion, energies)]
        run = perturb_rows
    else:
        arrays = [
            t.reshape(len(t), c, math.prod(space)).numpy() for t in (dense, companion, energies)
        ]
        run = perturb_planes
    run(*arrays, columns, grid, coarse, given.shift, calm, np.uint64(stream), how)
    if dense is not y:
        y.copy_(dense)


def _is_calm(columns: np.ndarray, coarse: np.ndarray) -> bool:
    """Whether the noise of numbers and energies below `LARGE` is far from overflow."""
    offset, alpha, beta, slope, intercept = np.abs(columns).max(axis=1, initial=0)
    shared = beta * coarse.max(initial=0)
    factors = max(alpha, beta, slope) < 1
    return bool(factors and max(offset, shared, intercept) < LARGE)


def _elsewhere(tensor: torch.Tensor):
    """The module that perturbs tensors of other devices than the CPU."""
    if tensor.is_cuda and _triton_kernel() is not None:
        return _triton_kernel()
    return plain_torch


@cache
def _triton_kernel():
    try:
        return import_module("bids_varaug.numerics.triton_kernel")
    except ImportError:  # no Triton
        return None
