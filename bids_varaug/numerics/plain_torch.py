"""Noise as plain torch operators, for devices that have no kernel of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from bids_varaug.numerics.rules import DITHER, STOCHASTIC, Rule

if TYPE_CHECKING:
    from bids_varaug.numerics.perturb import ChannelNoise

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# Bits of the exponent, for each format
EXPONENTS = {
    torch.float16: 0x7C00,
    torch.bfloat16: 0x7F80,
    torch.float32: 0x7F800000,
    torch.float64: 0x7FF0000000000000,
}


def round_(tensor: torch.Tensor, rule: Rule, stream: int) -> None:
    """As `perturb.round_`."""
    _finish(tensor, None, rule, stream)


def perturb_(tensor: torch.Tensor, deviation: torch.Tensor, rule: Rule, stream: int) -> None:
    """As `perturb.perturb_`."""
    rng = torch.Generator(tensor.device).manual_seed(_torch_seed(stream, 1))
    draws = torch.randn(tensor.shape, generator=rng, device=tensor.device, dtype=tensor.dtype)
    _finish(tensor, draws * deviation, rule, stream)


def perturb_channels_(tensor, given: ChannelNoise, rule: Rule, stream: int) -> None:
    """As `perturb.perturb_channels_`."""
    y = tensor.detach()

    columns = torch.as_tensor(given.columns(), dtype=y.dtype, device=y.device)
    offset, alpha, beta, slope, intercept = columns.reshape(5, 1, -1, 1, 1, 1)
    deviation = alpha * (y - offset).abs()
    if given.energy is not None:
        root = given.energy.clamp_min(0).sqrt().to(y.dtype)
        for axis in (2, 3, 4):
            index = torch.arange(y.shape[axis], device=y.device) >> given.shift
            root = root.index_select(axis, index)
        deviation = torch.hypot(deviation, beta * root)
    rng = torch.Generator(y.device).manual_seed(_torch_seed(stream, 1))
    added = torch.randn(y.shape, generator=rng, device=y.device, dtype=y.dtype) * deviation
    added += slope * (y if given.companion is None else given.companion) + intercept
    _finish(tensor, added, rule, stream)


def _torch_seed(stream: int, number: int) -> int:
    return (stream ^ (number * 0x9E3779B97F4A7C15)) & (2**63 - 1)


def _finish(tensor, added, rule: Rule, stream: int) -> None:
    y = tensor.detach()
    integer = _INTEGERS[y.element_size()]
    dense = y.contiguous()
    bits = dense.view(integer).to(torch.int64)
    magnitude_mask = (1 << (8 * y.element_size() - 1)) - 1
    exponent_mask, grid_mask = EXPONENTS[y.dtype], (1 << rule.grid_bits) - 1
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
