"""Rounding noise on GPUs: the arithmetic of `noise` as one Triton kernel.

One pass over memory where plain torch takes a dozen. Random numbers are Philox's (Salmon et al.
2011), a function of the stream and the element's place in memory. Imported only where Triton is
installed; with ``TRITON_INTERPRET=1`` it runs on CPU tensors too, slowly, which is how it is tested
without a GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import triton
import triton.language as tl

from bids_varaug.numerics import plain_torch
from bids_varaug.numerics.dense import Flat
from bids_varaug.numerics.rules import Rule

if TYPE_CHECKING:
    from bids_varaug.numerics.perturb import ChannelNoise

BLOCK = 1024  # elements that one program handles
# What `energy` holds
_NOTHING, _COARSE_ROOTS, _ENERGIES, _DEVIATIONS = range(4)


@triton.jit(do_not_specialize=["stream"])
def _perturb(
    y_pointer, others_pointer, energy_pointer, columns_pointer, stream, n_elements, n_channels, n_x,
    n_y, n_z, coarse_x, coarse_y, coarse_z, width, SHIFT: tl.constexpr, KIND: tl.constexpr,
    GRID_BITS: tl.constexpr, WHAT: tl.constexpr, HAS_OTHERS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, IS_DOUBLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < n_elements
    y = tl.load(y_pointer + place, mask=inside, other=0.0)
    n_voxels = n_x * n_y * n_z
    if CHANNELS_LAST:
        channel, voxel = place % n_channels, place // n_channels
        image, voxel = voxel // n_voxels, voxel % n_voxels
    else:
        channel, voxel = (place // n_voxels) % n_channels, place % n_voxels
        image = place // (n_voxels * n_channels)
    offset = tl.load(columns_pointer + channel, mask=inside, other=0.0)
    alpha = tl.load(columns_pointer + n_channels + channel, mask=inside, other=0.0)
    beta = tl.load(columns_pointer + 2 * n_channels + channel, mask=inside, other=0.0)
    slope = tl.load(columns_pointer + 3 * n_channels + channel, mask=inside, other=0.0)
    intercept = tl.load(columns_pointer + 4 * n_channels + channel, mask=inside, other=0.0)

    root = tl.zeros_like(y)
    if WHAT == 1:
        x, rest = voxel // (n_y * n_z), voxel % (n_y * n_z)
        line = (image * coarse_x + (x >> SHIFT)) * coarse_y + ((rest // n_z) >> SHIFT)
        where = line * coarse_z + ((rest % n_z) >> SHIFT)
        root = tl.load(energy_pointer + where, mask=inside, other=0.0)
    elif WHAT == 2:
        root = tl.sqrt(tl.maximum(tl.load(energy_pointer + place, mask=inside, other=0.0), 0.0))
    elif WHAT == 3:
        root = tl.load(energy_pointer + place, mask=inside, other=0.0)
    own, part = alpha * (y - offset), beta * root
    first, second, third, fourth = tl.randint4x(stream, place)
    # Box-Muller
    uniform = (tl.uint_to_uniform_float(first), tl.uint_to_uniform_float(second))
    radius = tl.sqrt(-2.0 * tl.log(tl.maximum(uniform[0], 1.0e-7)))
    draw = (radius * tl.cos(6.283185307179586 * uniform[1])).to(y.dtype)
    companion = y
    if HAS_OTHERS:
        companion = tl.load(others_pointer + place, mask=inside, other=0.0)
    noise = tl.sqrt(own * own + part * part) * draw + slope * companion + intercept

    if IS_DOUBLE:
        integer: tl.constexpr = tl.int64
        sign_bit: tl.constexpr = -0x8000000000000000
        exponents: tl.constexpr = 0x7FF0000000000000
        word = (third.to(tl.int64) << 32) | (fourth.to(tl.int64) & 0xFFFFFFFF)
    else:
        integer: tl.constexpr = tl.int32
        sign_bit: tl.constexpr = -0x80000000
        exponents: tl.constexpr = 0x7F800000
        word = third.to(tl.int32, bitcast=True)
    if KIND == 0:  # `rules.DITHER`
        power = (y.to(integer, bitcast=True) & exponents).to(y.dtype, bitcast=True)
        dither = third.to(tl.int32, bitcast=True).to(y.dtype) * (1.0 / 4294967296.0)
        change = noise + dither * (power * width)
        result = tl.where(change == 0, y, y + change)
    else:
        step: tl.constexpr = 1 << GRID_BITS
        moved = tl.where(noise == 0, y, y + noise).to(integer, bitcast=True)
        sign, magnitude = moved & sign_bit, moved & ~sign_bit
        if KIND == 1:  # `rules.STOCHASTIC`
            magnitude = (magnitude + (word & (step - 1))) & ~(step - 1)
        else:  # up-down
            nearest = (magnitude + (step >> 1)) & ~(step - 1)
            nearest += tl.where((word & step) != 0, step, -step)
            magnitude = tl.where(magnitude > step - 1, nearest, magnitude)
        result = (sign | magnitude).to(y.dtype, bitcast=True)
    # Infinity and NaN stay, finite numbers stay finite
    result = tl.where(result - result == 0, result, y)
    tl.store(y_pointer + place, result, mask=inside)


def round_(tensor: torch.Tensor, rule: Rule, stream: int) -> None:
    """As `perturb.round_`."""
    if tensor.element_size() == 2:  # rare
        plain_torch.round_(tensor, rule, stream)
        return
    with Flat(tensor) as flat:
        _launch(flat.values, np.zeros((5, 1)), (1, 1, 1, flat.values.numel()), rule, stream)


def perturb_(tensor: torch.Tensor, deviation: torch.Tensor, rule: Rule, stream: int) -> None:
    """As `perturb.perturb_`."""
    with Flat(tensor) as flat:
        grid, columns = (1, 1, 1, flat.values.numel()), np.array([[0.0], [0], [1], [0], [0]])
        energy = flat.like(deviation)
        _launch(flat.values, columns, grid, rule, stream, what=_DEVIATIONS, energy=energy)


def perturb_channels_(tensor, given: ChannelNoise, rule: Rule, stream: int) -> None:
    """As `perturb.perturb_channels_`."""
    y = tensor.detach()
    channels_last = y.movedim(1, -1).is_contiguous()
    layout = torch.channels_last_3d if channels_last else torch.contiguous_format

    def in_order(values):
        return values.detach().to(y.dtype).contiguous(memory_format=layout)

    options = {"channels_last": channels_last, "shift": given.shift}
    if given.energy is not None and given.energy.shape == y.shape:
        options |= {"what": _ENERGIES, "energy": in_order(given.energy)}
    elif given.energy is not None:
        roots = given.energy[:, 0].clamp_min(0).sqrt().to(y.dtype).contiguous()
        options |= {"what": _COARSE_ROOTS, "energy": roots, "coarse": roots.shape[1:]}
    if given.companion is not None:
        options["companion"] = in_order(given.companion)
    dense = y if channels_last else y.contiguous()
    _launch(dense, given.columns(), y.shape[1:], rule, stream, **options)
    if dense is not y:
        y.copy_(dense)


def _launch(
    y, columns, grid, rule: Rule, stream: int, *, what=_NOTHING, energy=None, coarse=(1, 1, 1),
    shift=0, companion=None, channels_last=False,
) -> None:  # fmt: skip
    # Of 63 bits always: the number's size would choose another kernel
    key = (stream & (2**62 - 1)) | 2**62
    columns = torch.as_tensor(columns, dtype=y.dtype, device=y.device).contiguous()
    _perturb[(triton.cdiv(y.numel(), BLOCK),)](
        y, y if companion is None else companion, y if energy is None else energy, columns, key,
        y.numel(), *grid, *coarse, rule.width * 2.0 ** (1 - rule.digits), SHIFT=shift,
        KIND=rule.kind, GRID_BITS=rule.grid_bits, WHAT=what, HAS_OTHERS=companion is not None,
        CHANNELS_LAST=channels_last, IS_DOUBLE=y.dtype == torch.float64, BLOCK=BLOCK,
    )  # fmt: skip
