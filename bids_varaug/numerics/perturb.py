"""Perturb tensors in place, whatever their device and memory layout.

CPU tensors are handed to the compiled kernels of `noise`; other devices run the same arithmetic
as torch operators, with other random numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from bids_varaug.numerics import noise
from bids_varaug.numerics.rules import DITHER, STOCHASTIC, Rule

_TILE = 1024  # elements handled by one loop that becomes vector instructions
_LINE = 256  # the same where all are of one channel, each of which has its own columns
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# Bits of the exponent, for each format
_EXPONENTS = {
    torch.float16: 0x7C00,
    torch.bfloat16: 0x7F80,
    torch.float32: 0x7F800000,
    torch.float64: 0x7FF0000000000000,
}


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
        _finish_with_torch(tensor, None, rule, stream)
    elif tensor.element_size() == 2:
        with _Flat(tensor) as flat:
            noise.round_halves(
                flat.view(torch.int16).numpy(), np.int32(_EXPONENTS[tensor.dtype]),
                np.int32((1 << rule.grid_bits) - 1), np.float32(rule.width), rule.kind,
                np.uint64(stream),
            )  # fmt: skip
    else:
        with _Flat(tensor) as flat:
            values = flat.numpy()
            noise.round_flat(values, np.uint64(stream), noise.finish(rule, values.dtype))


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
        rng = torch.Generator(tensor.device).manual_seed(_torch_seed(stream, 1))
        draws = torch.randn(tensor.shape, generator=rng, device=tensor.device, dtype=tensor.dtype)
        _finish_with_torch(tensor, draws * deviation, rule, stream)
        return
    with _Flat(tensor) as flat:
        values = flat.numpy()
        if flat.reordered:
            ordered = torch.empty_like(tensor.detach()).copy_(deviation)
            deviations = ordered.as_strided(flat.shape, (1,)).numpy()
        else:
            deviations = deviation.contiguous().reshape(-1).numpy()
        noise.perturb_flat(values, deviations, np.uint64(stream), noise.finish(rule, values.dtype))


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
        _perturb_channels_with_torch(tensor, given, rule, stream)
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
    columns = _columns(given, c).astype(dtype)
    grid = np.array([n, *space, c], np.int64)
    how = noise.finish(rule, dtype)
    if channels_last:
        columns = np.tile(columns, max(1, _TILE // c))
        arrays = [t.movedim(1, -1).reshape(-1).numpy() for t in (dense, companion, energies)]
        run = noise.perturb_rows
    else:
        columns = np.repeat(columns.T[:, :, None], min(_LINE, space[1] * space[2]), axis=2)
        arrays = [
            t.reshape(len(t), c, math.prod(space)).numpy() for t in (dense, companion, energies)
        ]
        run = noise.perturb_planes
    run(*arrays, columns, grid, coarse, given.shift, np.uint64(stream), how)
    if dense is not y:
        y.copy_(dense)


def _columns(given: ChannelNoise, n_channels: int) -> np.ndarray:
    """(5, C) float64 for the kernels: offset, alpha, beta, slope, intercept."""
    zeros = np.zeros(n_channels)
    offset, linear, slope, intercept = (
        zeros if v is None else v
        for v in (given.offset, given.linear, given.slope, given.intercept)
    )
    # The kernels' g is that of whole numbers, their root one of larger and smaller part.
    exceeds = noise.BYTES_SD * (noise.HYPOTENUSE if given.energy is not None else 1.0)
    alpha, beta = (np.sqrt(np.maximum(v, 0)) / exceeds for v in (given.quadratic, linear))
    return np.stack([offset, alpha, beta, slope, intercept])


class _Flat:
    """The elements of a CPU tensor as one array in memory order, written back on leaving."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor.detach()
        self.dense = self.tensor
        if not _is_dense(self.dense):
            self.dense = self.tensor.contiguous()

    def __enter__(self) -> torch.Tensor:
        flat = self.dense.as_strided((self.dense.numel(),), (1,))
        flat.reordered = not self.dense.is_contiguous()
        return flat

    def __exit__(self, *failure) -> None:
        if self.dense is not self.tensor:
            self.tensor.copy_(self.dense)


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill one block of memory without gaps or overlaps, in any order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


# --------------------------------------------------------------------------------------------------
# Devices without a kernel of their own


def _torch_seed(stream: int, number: int) -> int:
    return (stream ^ (number * 0x9E3779B97F4A7C15)) & (2**63 - 1)


def _finish_with_torch(tensor, added, rule: Rule, stream: int) -> None:
    y = tensor.detach()
    integer = _INTEGERS[y.element_size()]
    dense = y.contiguous()
    bits = dense.view(integer).to(torch.int64)
    magnitude_mask = (1 << (8 * y.element_size() - 1)) - 1
    exponent_mask, grid_mask = _EXPONENTS[y.dtype], (1 << rule.grid_bits) - 1
    rng = torch.Generator(y.device).manual_seed(_torch_seed(stream, 2))
    moved = dense if added is None else dense + added
    if rule.kind == DITHER and y.element_size() > 2:
        dither = torch.rand(y.shape, generator=rng, device=y.device, dtype=y.dtype) - 0.5
        power = (bits & exponent_mask).to(integer).view(y.dtype)
        rounded = moved + dither * (rule.width * 2.0 ** (1 - rule.digits)) * power
        rounded = rounded.view(integer).to(torch.int64)
    else:
        shifted = moved.view(integer).to(torch.int64)
        sign, magnitude = shifted & ~magnitude_mask, shifted & magnitude_mask
        if rule.kind == DITHER:
            dither = torch.rand(y.shape, generator=rng, device=y.device) - 0.5
            magnitude = magnitude + torch.round(dither * rule.width).to(torch.int64)
        elif rule.kind == STOCHASTIC:
            draw = torch.randint(0, 1 << rule.grid_bits, y.shape, generator=rng, device=y.device)
            magnitude = (magnitude + draw) & ~grid_mask
        else:
            step = grid_mask + 1
            up = torch.randint(0, 2, y.shape, generator=rng, device=y.device)
            nearest = (magnitude + step // 2) & ~grid_mask
            magnitude = torch.where(magnitude > grid_mask, nearest + step * (2 * up - 1), magnitude)
        rounded = sign | magnitude
    result = rounded.to(integer).view(y.dtype)
    keep = ~torch.isfinite(dense) | ~torch.isfinite(result)
    if added is None:
        keep |= dense == 0
    y.copy_(torch.where(keep, dense, result))


def _perturb_channels_with_torch(tensor, given: ChannelNoise, rule: Rule, stream: int) -> None:
    y = tensor.detach()

    def column(values):
        return torch.as_tensor(values, dtype=y.dtype, device=y.device).reshape(1, -1, 1, 1, 1)

    distance = y if given.offset is None else y - column(given.offset)
    deviation = (column(np.sqrt(np.maximum(given.quadratic, 0))) * distance).abs()
    if given.energy is not None:
        root = given.energy.clamp_min(0).sqrt().to(y.dtype)
        for axis in (2, 3, 4):
            index = torch.arange(y.shape[axis], device=y.device) >> given.shift
            root = root.index_select(axis, index)
        deviation = torch.hypot(deviation, column(np.sqrt(np.maximum(given.linear, 0))) * root)
    rng = torch.Generator(y.device).manual_seed(_torch_seed(stream, 1))
    added = torch.randn(y.shape, generator=rng, device=y.device, dtype=y.dtype) * deviation
    if given.slope is not None:
        companion = y if given.companion is None else given.companion
        added += column(given.slope) * companion
    if given.intercept is not None:
        added += column(given.intercept)
    _finish_with_torch(tensor, added, rule, stream)
