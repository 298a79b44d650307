"""Random rounding and noise, added to tensors in place.

One compiled kernel for the CPU, plain torch for every other device. Noise of an element is two uncorrelated terms of
one hash (`two_sums`), then one last rounding as the specification says. It is nearly normal: excess kurtosis -0.3 and
nothing beyond 3.45 standard deviations where one term prevails, -0.6 and 2.45 where both are equal. The hashes are of
seed, call and place: they depend neither on the number of threads nor on what was drawn before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from numba import prange, types
from numba.extending import overload
from numba.np.numpy_support import as_dtype
from numba.np.ufunc.parallel import get_thread_count

from bids_varaug.machine import compiled
from bids_varaug.numerics.specification import (
    DITHER,
    MEAN_SQUARE_ULP,
    RANDOM,
    STOCHASTIC,
    UP_DOWN,
    RoundingSpecification,
)

GENERATOR = 3
"""Version of the streams: the same seed gives other bits under another one."""

_BYTES_SD = 147.8011276006757  # of the sum of four uniform bytes; its mean is 510
_CHUNK = 1024  # elements with one key, handled by one loop that becomes vector instructions
_CHUNKS = 8  # that one task handles
_SMALL = 2**15  # elements below which waking other threads takes longer than the work
_STEPS = 4  # DITHER for 16-bit floats, which compiled code knows as integers alone
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# Bits of the exponent, and the smallest number that is not subnormal
EXPONENTS = {
    torch.float16: (0x7C00, 0x0400),
    torch.bfloat16: (0x7F80, 0x0080),
    torch.float32: (0x7F800000, 0x00800000),
    torch.float64: (0x7FF0000000000000, 0x0010000000000000),
}


# ----------------------------------------------------------------------------------------------------------------------
# Random numbers. Every step is cast to 32 bits, else numba computes with 64 and the loop is four times as slow.


@compiled()
def chunk_key(stream, chunk):
    """64 random bits for one chunk of memory: a step of SplitMix64 (Steele et al. 2014, OOPSLA)."""
    word = stream + np.uint64(chunk + 1) * np.uint64(0x9E3779B97F4A7C15)
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))


@compiled(forceinline=True)
def random_word(place, first, second):
    """32 random bits: a keyed hash of an element's place in its chunk.

    Two rounds of xorshift-multiply, the constants from Ettinger's search of 2022 (bias 0.11, the best of two rounds),
    the second half of the key between them.
    """
    word = np.uint32(np.uint32(place) + np.uint32(first))
    word = np.uint32(np.uint32(word ^ np.uint32(word >> np.uint32(16))) * np.uint32(0x21F0AAAD))
    word = np.uint32(word + np.uint32(second))
    word = np.uint32(np.uint32(word ^ np.uint32(word >> np.uint32(15))) * np.uint32(0x735A2D97))
    return np.uint32(word ^ np.uint32(word >> np.uint32(15)))


@compiled(forceinline=True)
def two_sums(word):
    """Two integers of mean 0 and standard deviation `_BYTES_SD`, uncorrelated.

    Of the word's bytes a, b, c, d: ``a + b + c + d - 510`` and ``a + b - c - d``.
    """
    mask, shift = np.uint32(0x00FF00FF), np.int32(16)
    pairs = np.int32(np.uint32(np.uint32(word & mask) + np.uint32(np.uint32(word >> np.uint32(8)) & mask)))
    low = np.int32(pairs << shift)
    total = np.int32(np.int32(np.int32(pairs + low) >> shift) - np.int32(510))
    return total, np.int32(np.int32(pairs - low) >> shift)


# ----------------------------------------------------------------------------------------------------------------------
# The last rounding


class LastRounding(NamedTuple):
    """The last rounding, as compiled code takes it; integers and floats of the numbers' own width."""

    kind: int
    width: np.floating  # of the dither, in numbers of the format
    dither: np.floating  # that is one term of noise, of a number from 1 to 2, over `_BYTES_SD`
    ulp: np.floating  # of 1
    step: np.integer  # from one number of the virtual precision to the next
    top: np.integer  # bits of the exponent
    low: np.integer  # the smallest number that is not subnormal
    magnitudes: np.integer  # all bits but the sign


@lru_cache
def last_rounding(spec: RoundingSpecification, dtype: torch.dtype) -> LastRounding:
    """What a specification means for numbers of a format."""
    integer: type[np.integer] = np.int64 if dtype.itemsize == 8 else np.int32
    real: type[np.floating] = np.float64 if dtype.itemsize == 8 else np.float32
    kind = _STEPS if spec.kind == DITHER and dtype.itemsize == 2 else spec.kind
    magnitudes = integer(2 ** (8 * dtype.itemsize - 1) - 1)
    top, low = map(integer, EXPONENTS[dtype])
    ulp = real(2.0 ** (1 - spec.digits))
    variance = spec.rounded_variance - 1 / 12 if spec.width else 0.0  # rounding to the format adds 1/12
    dither = real(variance**0.5 * float(ulp) / _BYTES_SD)
    return LastRounding(kind, real(spec.width), dither, ulp, integer(spec.step), top, low, magnitudes)


def like(value: Any, template: Any) -> Any:
    """Return the value in the template's type: numba widens 32-bit arithmetic otherwise."""
    return type(template)(value)


@overload(like, strict=False)
def _like(value: types.Type, template: types.Type) -> Callable:
    kind = as_dtype(template).type
    return lambda value, template: kind(value)


def bits_of(value: Any) -> Any:
    """Return the bits of a float, or of an array of floats, as integers of their width."""
    return value.view(f"i{value.itemsize}")


@overload(bits_of, strict=False)
def _bits_of(value: types.Type) -> Callable:
    if isinstance(value, types.Array):
        integer = np.int32 if value.dtype == types.float32 else np.int64
        return lambda value: value.view(integer)
    if value == types.float32:
        return lambda value: np.float32(value).view(np.int32)
    return lambda value: np.float64(value).view(np.int64)


def float_of(bits: Any) -> Any:
    """Return the float of these bits."""
    return bits.view(f"f{bits.itemsize}")


@overload(float_of, strict=False)
def _float_of(bits: types.Type) -> Callable:
    if bits == types.int32:
        return lambda bits: np.int32(bits).view(np.float32)
    return lambda bits: np.int64(bits).view(np.float64)


@compiled(forceinline=True)
def unless_infinite(bits, moved, how):
    """Bits of the number it moved to, or of the number itself where either is infinite or NaN."""
    finite = like(like(moved & how.top, bits) != how.top, bits)
    return like(bits + like(like(moved - bits, bits) & like(-finite, bits), bits), bits)


@compiled(forceinline=True)
def rounded(bits, word, fraction, kind, how):
    """Bits of a number, rounded; `fraction` of a step of the format had been rounded away, or is 0.

    A dither is added; else the number moves by whole steps of its format, as magnitudes are ordered like their bits.
    `kind` is `how.kind` as a constant.
    """
    step, one = how.step, like(1, how.step)
    share = like(like(np.int32(word), fraction) * like(2.0**-32, fraction), fraction)
    if kind == DITHER:
        power = float_of(like(bits & like(how.top | like(~how.magnitudes, step), step), step))  # 0 if subnormal
        dither = like(fraction + share * how.width, fraction) * (power * how.ulp)
        return unless_infinite(bits, bits_of(like(float_of(bits) + dither, fraction)), how)
    magnitude = like(bits & how.magnitudes, step)
    if kind == _STEPS:
        moved = like(magnitude + like(np.rint(like(fraction + share * how.width, fraction)), step), step)
    elif kind == STOCHASTIC:
        draw = like((share + like(0.5, fraction)) * like(step, fraction), step)
        moved = like(like(magnitude + draw, step) & like(-step, step), step)
    elif kind == UP_DOWN:
        moved = like(like(magnitude + like(step >> one, step), step) & like(-step, step), step)
        moved = like(moved + (step if share >= 0 else like(-step, step)), step)
    elif step > one:
        below = like(magnitude & like(-step, step), step)
        up = step if share >= 0 and magnitude != below else like(0, step)
        moved = like(below + up, step)
    elif fraction != 0:  # what was rounded away tells where the two neighbours are
        below = like(magnitude + like(np.floor(fraction), step), step)
        moved = like(below + (one if share >= 0 else like(0, step)), step)
    else:  # it may be on either side; a variance of 1/4
        up, down = share >= like(0.375, fraction), share < like(-0.375, fraction)
        moved = like(magnitude + like(like(up, step) - like(down, step), step), step)
    normal = (magnitude >= how.low) & (magnitude < how.top) & (moved > 0) & (moved < how.top)
    return like(bits + like(like(moved - magnitude, step) & like(-like(normal, step), step), step), step)


# ----------------------------------------------------------------------------------------------------------------------
# Kernels. Loops must stay simple enough to become vector instructions: the kind of rounding and the presence of other
# arrays are constants there, and no choice is between an old and a new number (that becomes a masked store, eight times
# as slow).


@compiled(forceinline=True)
def _round_chunk(bits, first, second, kind, how):
    zero = like(0, how.width)
    for i in range(bits.size):
        bits[i] = rounded(like(bits[i], how.step), random_word(i, first, second), zero, kind, how)


@compiled()
def _round_known_chunk(bits, fractions, first, second, how):
    """Where it is known what was rounded away: under equal odds exact results stay."""
    for i in range(bits.size):
        word, old = random_word(i, first, second), like(bits[i], how.step)
        if how.kind == DITHER or how.kind == _STEPS or how.kind != RANDOM or fractions[i] != 0:
            bits[i] = rounded(old, word, fractions[i], how.kind, how)


@compiled()
def _round_loop(bits, first, second, how):
    """Choose the loop."""
    if how.kind == DITHER:
        _round_chunk(bits, first, second, DITHER, how)
    elif how.kind == _STEPS:
        _round_chunk(bits, first, second, _STEPS, how)
    elif how.kind == STOCHASTIC:
        _round_chunk(bits, first, second, STOCHASTIC, how)
    elif how.kind == UP_DOWN:
        _round_chunk(bits, first, second, UP_DOWN, how)
    else:
        _round_chunk(bits, first, second, RANDOM, how)


def _round_array(bits, fractions, stream, how):
    length = _CHUNK * _CHUNKS
    for chunk in prange((bits.size + length - 1) // length):
        part = slice(chunk * length, min(bits.size, (chunk + 1) * length))
        key = chunk_key(stream, chunk)
        first, second = np.uint32(key), np.uint32(key >> np.uint64(32))
        if fractions.size > 0:
            _round_known_chunk(bits[part], fractions[part], first, second, how)
        else:
            _round_loop(bits[part], first, second, how)


@compiled(fastmath={"contract"}, forceinline=True)
def _noise_chunk(y, other, columns, roots, first, second, has_quadratic, has_roots, has_other, how):
    """Noise of one chunk: two terms of one random word, and what it has in common with others."""
    quadratic, offset, linear, slope, intercept = columns[0], columns[1], columns[2], columns[3], columns[4]
    one = how.width
    for i in range(y.size):
        total, difference = two_sums(random_word(i, first, second))
        bits = bits_of(y[i])
        dither = like(how.dither * float_of(like(bits & how.top, bits)), one)
        if has_quadratic:
            noise = like(total, one) * like(quadratic[i] * like(y[i] - offset[i], one), one)
        else:
            noise = like(total, one) * dither
        noise += like(difference, one) * (like(linear[i] * roots[i], one) if has_roots else dither)
        if has_other or not has_roots:
            noise += slope[i] * (other[i] if has_other else y[i]) + intercept[i]
        y[i] = float_of(unless_infinite(bits, bits_of(like(y[i] + noise, one)), how))


@compiled()
def _noise_loop(y, other, columns, roots, first, second, has_quadratic, how):
    """Choose the loop."""
    if not has_quadratic:
        _noise_chunk(y, other, columns, roots, first, second, False, True, False, how)
    elif roots.size > 0 and other.size > 0:
        _noise_chunk(y, other, columns, roots, first, second, True, True, True, how)
    elif roots.size > 0:
        _noise_chunk(y, other, columns, roots, first, second, True, True, False, how)
    elif other.size > 0:
        _noise_chunk(y, other, columns, roots, first, second, True, False, True, how)
    else:
        _noise_chunk(y, other, columns, roots, first, second, True, False, False, how)
    if how.kind != DITHER:
        _round_loop(bits_of(y), second, first, how)


@compiled()
def _fill(array, value):
    for i in range(array.size):
        array[i] = value


@compiled()
def _fill_roots(array, squares):
    for i in range(squares.size):
        array[i] = np.sqrt(squares[i] if squares[i] > 0 else 0.0)


def _noise_array(y, other, columns, squares, n_columns, length, inner, has_quadratic, stream, how):
    """Noise of lines of memory, each of one column, or (`inner`) each the row of all columns, several times.

    `squares` are of each place: of a line's places, which all lines share, or of each row.
    """
    per_line = 1 if inner else (length + _CHUNK - 1) // _CHUNK
    n_chunks = (y.size + length - 1) // length * per_line
    size = min(length, y.size) if inner else min(length, _CHUNK)
    for task in prange((n_chunks + _CHUNKS - 1) // _CHUNKS):
        mine, filled = columns if inner else np.empty((5, size), y.dtype), -1
        roots = np.empty(size if squares.size > 0 else 0, y.dtype)
        for chunk in range(task * _CHUNKS, min((task + 1) * _CHUNKS, n_chunks)):
            key = chunk_key(stream, chunk)
            first, second = np.uint32(key), np.uint32(key >> np.uint64(32))
            line, begin = chunk // per_line, chunk % per_line * _CHUNK
            start, n = line * length + begin, min(size, length - begin)
            if inner:
                n = min(length, y.size - start)
                for row in range(n // n_columns if squares.size > 0 else 0):
                    square = squares[start // n_columns + row]
                    _fill(roots[row * n_columns : (row + 1) * n_columns], like(np.sqrt(max(square, 0.0)), how.width))
            else:
                if squares.size > 0:
                    where = line // n_columns * length + begin
                    _fill_roots(roots, squares[where : where + n])
                if line != filled:
                    filled = line
                    for k in range(5):
                        _fill(mine[k], columns[k, line % n_columns])
            companion = other[start : start + n] if other.size > 0 else other
            _noise_loop(y[start : start + n], companion, mine, roots, first, second, has_quadratic, how)


def _serial_or_parallel(function: Callable) -> Callable:
    serial, parallel = compiled()(function), compiled(parallel=True)(function)

    def run(array: np.ndarray, *arguments: Any) -> None:
        if array.size <= _SMALL:
            serial(array, *arguments)
        else:
            with torch_threads():
                parallel(array, *arguments)

    return run


@contextmanager
def torch_threads() -> Iterator[None]:
    """Let numba's parallel loops use as many threads as torch does."""
    before, wanted = numba.get_num_threads(), min(torch.get_num_threads(), get_thread_count())
    if before == wanted:
        yield
        return
    numba.set_num_threads(wanted)
    try:
        yield
    finally:
        numba.set_num_threads(before)


_round_memory, _memory_noise = _serial_or_parallel(_round_array), _serial_or_parallel(_noise_array)


# ----------------------------------------------------------------------------------------------------------------------
# Tensors


@dataclass(frozen=True)
class ChannelNoise:
    """Noise whose strength depends on channel and place.

    Variance of an element y of channel c: ``quadratic_c (y - offset_c)^2 + linear_c energy``, plus
    ``intercept_c + slope_c companion``, the same numbers for a whole channel.

    Parameters
    ----------
    quadratic, linear, offset, slope, intercept : (C,) float64
    energy : of each place, (N, X, Y, Z), the same for all channels, or None for 0
    companion : tensor of the perturbed one's shape, or None for the perturbed tensor itself
    """

    quadratic: np.ndarray
    linear: np.ndarray | None = None
    offset: np.ndarray | None = None
    energy: torch.Tensor | None = None
    slope: np.ndarray | None = None
    intercept: np.ndarray | None = None
    companion: torch.Tensor | None = None

    def columns(self) -> np.ndarray:
        """(5, C) float64: quadratic, offset, linear, slope, intercept; 0 for None."""
        given = (self.quadratic, self.offset, self.linear, self.slope, self.intercept)
        zeros = np.zeros(len(self.quadratic))
        columns = np.stack([zeros if v is None else v for v in given])
        columns[[0, 2]] = np.maximum(columns[[0, 2]], 0)
        return columns


def in_memory_order(tensor: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """Return the tensor with its axes in the order of memory, and that order."""
    order = list(range(tensor.dim()))
    if not tensor.is_contiguous():
        order.sort(key=tensor.stride().__getitem__, reverse=True)
    return tensor.detach().permute(order), order


def round_(
    tensor: torch.Tensor, spec: RoundingSpecification, stream: int, fraction: torch.Tensor | None = None
) -> None:
    """Round each element once, in place.

    Zeros, subnormal numbers, infinities and NaN stay what they are, finite numbers stay finite. Any strides.

    Parameters
    ----------
    tensor : float16, bfloat16, float32 or float64
    spec : of the tensor's format
    stream : names the random numbers, 64 bits
    fraction : what is known to have been rounded away, away from 0 positive, in steps of the format; same shape
    """
    if not tensor.numel():
        return
    if tensor.device.type != "cpu":
        torch_round_(tensor, spec, stream, fraction)
        return
    ordered, order = in_memory_order(tensor)
    dense = ordered.contiguous()
    how = last_rounding(spec, tensor.dtype)
    fractions = np.empty(0, how.width.dtype)
    if fraction is not None:
        fractions = fraction.permute(order).reshape(-1).to(torch.from_numpy(fractions).dtype).numpy()
    bits = dense.reshape(-1).view(_INTEGERS[tensor.element_size()]).numpy()
    _round_memory(bits, fractions, np.uint64(stream), how)
    if dense is not ordered:
        ordered.copy_(dense)


def perturb_(
    tensor: torch.Tensor, variance: torch.Tensor | np.ndarray, spec: RoundingSpecification, stream: int
) -> None:
    """Add noise to each element, then round once, in place.

    Parameters
    ----------
    tensor : float32 or float64, any strides
    variance : of the noise, a shape that fits; below 0 counts as 0; elements where it is infinite or NaN stay
    spec : of the tensor's format
    stream : names the random numbers, 64 bits
    """
    if not tensor.numel():
        return
    variance = torch.as_tensor(variance, dtype=torch.float64, device=tensor.device).detach().expand(tensor.shape)
    if tensor.device.type != "cpu":
        torch_perturb_(tensor, variance.clamp_min(0).sqrt().to(tensor.dtype), 0.0, spec, stream)
        return
    ordered, order = in_memory_order(tensor)
    dense = ordered.contiguous()
    values, squares = dense.reshape(-1).numpy(), variance.permute(order).reshape(-1).numpy()
    columns = np.zeros((5, 1), values.dtype)
    columns[2] = 1 / _BYTES_SD
    how = last_rounding(spec, tensor.dtype)
    _memory_noise(values, values[:0], columns, squares, 1, values.size, False, False, np.uint64(stream), how)
    if dense is not ordered:
        ordered.copy_(dense)


def perturb_channels_(tensor: torch.Tensor, noise: ChannelNoise, spec: RoundingSpecification, stream: int) -> None:
    """Add noise as `ChannelNoise` describes it, then round once, in place.

    Parameters
    ----------
    tensor : (N, C, X, Y, Z), float32 or float64
    noise : its strength
    spec : of the tensor's format
    stream : names the random numbers, 64 bits
    """
    if not tensor.numel():
        return
    y = tensor.detach()
    if y.device.type != "cpu":
        of_channels = torch.as_tensor(noise.columns(), dtype=y.dtype, device=y.device)
        quadratic, offset, linear, slope, intercept = of_channels.reshape(5, 1, -1, 1, 1, 1)
        deviation = quadratic.sqrt() * (y - offset).abs()
        if noise.energy is not None:
            of_places = noise.energy[:, None].clamp_min(0).sqrt().to(y.dtype)
            deviation = torch.hypot(deviation, linear.sqrt() * of_places)
        common = slope * (y if noise.companion is None else noise.companion) + intercept
        torch_perturb_(tensor, deviation, common, spec, stream)
        return
    channels_last = y.movedim(1, -1).is_contiguous() and y.shape[1] > 1
    layout = torch.channels_last_3d if channels_last else torch.contiguous_format
    dense = y if channels_last else y.contiguous()
    values = dense.movedim(1, -1).reshape(-1).numpy() if channels_last else dense.reshape(-1).numpy()
    columns, n_columns = noise.columns(), y.shape[1]
    how = last_rounding(spec, y.dtype)
    columns[[0, 2]] = np.sqrt(columns[[0, 2]]) / _BYTES_SD
    squares, companion = np.empty(0), values[:0]
    if noise.energy is not None:  # the dither is part of the first term
        columns[0] = np.hypot(columns[0], MEAN_SQUARE_ULP**0.5 / 2 * float(how.dither))
        squares = noise.energy.double().reshape(-1).numpy()
    if noise.companion is not None or (noise.energy is not None and noise.slope is not None):
        other = y.clone() if noise.companion is None else noise.companion.detach()
        other = other.contiguous(memory_format=layout)
        companion = (other.movedim(1, -1) if channels_last else other).reshape(-1).numpy()
    length = y[0, 0].numel()
    if channels_last:  # several voxels at once
        columns = np.tile(columns, max(1, _CHUNK // n_columns))
        length = columns.shape[1]
    columns = columns.astype(values.dtype)
    _memory_noise(
        values, companion, columns, squares, n_columns, length, channels_last, True, np.uint64(stream), how
    )  # fmt: skip
    if dense is not y:
        y.copy_(dense)


# ----------------------------------------------------------------------------------------------------------------------
# Other devices


def torch_perturb_(
    tensor: torch.Tensor,
    deviation: torch.Tensor,
    common: torch.Tensor | float,
    spec: RoundingSpecification,
    stream: int,
) -> None:
    """Add noise of a standard deviation and what is common, then round, with plain torch operators."""
    y = tensor.detach()
    draws = torch.randn(y.shape, generator=_generator(y, stream, 1), device=y.device, dtype=y.dtype)
    moved = y + (draws * deviation + common)
    y.copy_(torch.where(torch.isfinite(moved), moved, y))
    torch_round_(y, spec, stream)


def torch_round_(
    tensor: torch.Tensor, spec: RoundingSpecification, stream: int, fraction: torch.Tensor | None = None
) -> None:
    """Round each element once, as `rounded` does, with plain torch operators."""
    y = tensor.detach()
    dense, (top, low) = y.contiguous(), EXPONENTS[y.dtype]
    bits = dense.view(_INTEGERS[y.element_size()]).to(torch.int64)
    magnitude = bits & (2 ** (8 * y.element_size() - 1) - 1)
    share = torch.rand(y.shape, generator=_generator(y, stream, 2), device=y.device, dtype=torch.float64) - 0.5
    step, known = spec.step, torch.zeros_like(share) if fraction is None else fraction.double()
    if spec.kind == DITHER and y.element_size() > 2:
        power = (bits & ~(2**spec.digits // 2 - 1)).to(_INTEGERS[y.element_size()]).view(y.dtype)
        dither = (known + share * spec.width).to(y.dtype) * (power * 2.0 ** (1 - spec.digits))
        moved = (dense + dither).view(_INTEGERS[y.element_size()]).to(torch.int64)
        moved = moved & (2 ** (8 * y.element_size() - 1) - 1)
    elif spec.kind == DITHER:
        moved = magnitude + torch.round(known + share * spec.width).to(torch.int64)
    elif spec.kind == STOCHASTIC:
        moved = (magnitude + ((share + 0.5) * step).to(torch.int64)) & -step
    elif spec.kind == UP_DOWN:
        moved = ((magnitude + step // 2) & -step) + torch.where(share >= 0, step, -step)
    elif step > 1:
        below = magnitude & -step
        moved = below + step * ((share >= 0) & (magnitude != below))
    elif fraction is not None:
        moved = magnitude + torch.where(known == 0, 0, known.floor() + (share >= 0)).to(torch.int64)
    else:
        moved = magnitude + (share >= 0.375).to(torch.int64) - (share < -0.375).to(torch.int64)
    normal = (magnitude >= low) & (magnitude < top) & (moved > 0) & (moved < top)
    result = (bits + (moved - magnitude) * normal).to(_INTEGERS[y.element_size()]).view(y.dtype)
    y.copy_(result)


def _generator(tensor: torch.Tensor, stream: int, number: int) -> torch.Generator:
    seed = (stream ^ (number * 0x9E3779B97F4A7C15)) & (2**63 - 1)
    return torch.Generator(tensor.device).manual_seed(seed)
