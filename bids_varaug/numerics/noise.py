"""Rounding noise, added to arrays in place by compiled kernels.

Noise of an element is a standard deviation times g, plus what a whole channel shares, then one last
rounding as the rule says; a dither is left out where the noise of a sum of many terms is there. g
has mean 0, variance 1 and a nearly normal distribution (the sum of four uniform bytes: excess
kurtosis -0.3, nothing beyond 3.45). Random numbers are a hash of the stream and the element's place
in memory: they do not depend on the number of threads.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numba import prange, types
from numba.core import cgutils  # noqa: F401 (numba's intrinsics need it loaded)
from numba.extending import intrinsic

from bids_varaug.compiled import compiled
from bids_varaug.numerics.rules import DITHER, STOCHASTIC, Rule

_BLOCK = 8192
_LINE = 512  # elements of one channel that one loop handles
_TOGETHER = 8  # channels that are handled with the same energies
_SMALL = 4 * _BLOCK  # elements below which waking other threads takes longer than the work
BYTES_SD = 147.8011276006757  # of the sum of four uniform bytes; its mean is 510
# What the largest of two numbers plus 0.414 times the smaller exceeds the root of their squares by,
# in the middle of its range
HYPOTENUSE = 1.0412
_BITS = {types.float32: types.int32, types.float64: types.int64}
_FLOATS = {bits: floating for floating, bits in _BITS.items()}


class Finish(NamedTuple):
    """The last rounding, as compiled code takes it; integers and floats of the array's width."""

    kind: int
    width: np.floating  # of the dither, in units of 2^E for a number in [2^E, 2^(E+1))
    exponent_mask: np.integer
    grid_mask: np.integer  # the bits below the virtual precision
    tame: np.integer  # exponents below this one are far from overflow
    most: np.floating  # a change that takes no finite number to infinity


# Bits of the exponent, for each width
_EXPONENTS = {2: 0x7C00, 4: 0x7F800000, 8: 0x7FF0000000000000}
LARGE = 2.0**60
_TAME = {4: (127 + 60) << 23, 8: (1023 + 60) << 52}  # the bits of `LARGE`
# Less than half of the last place of the largest number
_MOST = {4: 2.0 ** (127 - 25), 8: 2.0 ** (1023 - 54)}


@lru_cache
def finish(rule: Rule, dtype: np.dtype) -> Finish:
    """Return what a rule means for arrays of a dtype (float32 or float64)."""
    integer = {4: np.int32, 8: np.int64}[dtype.itemsize]
    return Finish(
        rule.kind,
        dtype.type(rule.width * 2.0 ** (1 - rule.digits)),
        integer(_EXPONENTS[dtype.itemsize]),
        integer((1 << rule.grid_bits) - 1),
        integer(_TAME[dtype.itemsize]),
        dtype.type(_MOST[dtype.itemsize]),
    )


# --------------------------------------------------------------------------------------------------
# Scalars


@intrinsic
def bits_of(typing_context, value):
    """The bits of a float as an integer of its width."""
    target = _BITS[value]

    def build(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], context.get_value_type(target))

    return target(value), build


@intrinsic
def float_of(typing_context, bits):
    """The float of these bits."""
    target = _FLOATS[bits]

    def build(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], context.get_value_type(target))

    return target(bits), build


@intrinsic
def like(typing_context, value, template):
    """The value, in the template's type: numba widens 32-bit arithmetic otherwise."""

    def build(context, builder, signature, arguments):
        return context.cast(builder, arguments[0], value, template)

    return template(value, template), build


@compiled()
def line_key(stream, line):
    """64 random bits for one line of memory: a step of SplitMix64 (Steele et al. 2014)."""
    word = stream + np.uint64(line + 1) * np.uint64(0x9E3779B97F4A7C15)
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))


@compiled()
def random_word(place, first, second):
    """32 random bits: a hash of an element's place in its line and the line's two keys.

    Two rounds of xorshift-multiply (constants by Ettinger's search, `lowbias32`), the second key
    between them. Every step is cast to 32 bits, else numba computes with 64 and the loop is four
    times as slow.
    """
    word = np.uint32(np.uint32(place) + np.uint32(first))
    word = np.uint32(word ^ np.uint32(word >> np.uint32(16)))
    word = np.uint32(np.uint32(word * np.uint32(0x21F0AAAD)) + np.uint32(second))
    word = np.uint32(word ^ np.uint32(word >> np.uint32(15)))
    word = np.uint32(word * np.uint32(0xD35A2D97))
    return np.uint32(word ^ np.uint32(word >> np.uint32(15)))


@compiled()
def remixed(word, key):
    """A second word from the first."""
    word = np.uint32(np.uint32(word ^ key) * np.uint32(0x9E3779B1))
    return np.uint32(word ^ np.uint32(word >> np.uint32(15)))


@compiled()
def centred(word, template):
    """A number of mean 0 and standard deviation `BYTES_SD`, in the template's type."""
    mask = np.uint32(0x00FF00FF)
    odd = np.uint32(np.uint32(word >> np.uint32(8)) & mask)
    pairs = np.uint32(np.uint32(word & mask) + odd)
    total = np.uint32(np.uint32(pairs & np.uint32(0xFFFF)) + np.uint32(pairs >> np.uint32(16)))
    return like(np.int32(np.int32(total) - np.int32(510)), template)


@compiled()
def standard(word, template):
    """Draw g of mean 0 and variance 1 from 32 random bits, in the template's type."""
    return centred(word, template) * like(1 / BYTES_SD, template)


@compiled()
def dithered(y, noise, word, how):
    """Y plus noise plus dither, rounded; infinity and NaN as they are, finite numbers finite."""
    power = float_of(like(bits_of(y) & how.exponent_mask, how.exponent_mask))
    dither = like(np.int32(word), y) * like(2.0**-32, y)
    change = noise + dither * (how.width * power)
    result = y + change
    # Infinity less infinity is not 0. Not a choice between y and the result: that becomes a masked
    # store, which takes ten times as long. Adding -0 keeps the sign of a zero.
    zero = like(0.0, y)
    return y + (change if (result - result == zero) & (change != zero) else -zero)


@compiled()
def gridded(y, noise, word, how):
    """Y plus noise, rounded to the grid of the virtual precision; else as `dithered`."""
    # On integers: magnitudes are ordered like their bits, also from one binade to the next
    zero = like(0.0, y)
    shifted = bits_of(y + (noise if noise != zero else -zero))
    sign = like(shifted & ~_magnitude_mask(shifted), shifted)
    magnitude = like(shifted & _magnitude_mask(shifted), shifted)
    draw = like(_wide(word, shifted), shifted)
    if how.kind == STOCHASTIC:
        magnitude = like(magnitude + (draw & how.grid_mask), shifted)
        magnitude = like(magnitude & ~how.grid_mask, shifted)
    elif magnitude > how.grid_mask:  # up-down
        step = like(how.grid_mask + 1, shifted)
        magnitude = like(magnitude + (step >> 1), shifted)
        magnitude = like(magnitude & ~how.grid_mask, shifted)
        magnitude = like(magnitude + (step if draw & step else -step), shifted)
    result = float_of(like(sign | magnitude, shifted))
    return result if result - result == zero and y - y == zero else y


@compiled()
def finished(y, noise, word, how):
    """Y plus noise, with the last rounding as the rule says."""
    return dithered(y, noise, word, how) if how.kind == DITHER else gridded(y, noise, word, how)


@compiled()
def _magnitude_mask(bits):
    return like(~(like(1, bits) << like(8 * _size_of(bits) - 1, bits)), bits)


@intrinsic
def _size_of(typing_context, bits):
    """Bytes of an integer."""
    n_bytes = bits.bitwidth // 8

    def build(context, builder, signature, arguments):
        return context.get_constant(types.int64, n_bytes)

    return types.int64(bits), build


@compiled()
def _wide(word, bits):
    """As many random bits as the template has: the word, mixed once more for the upper half."""
    high = np.int64(random_word(word, 0x6A09E667, 0))
    return (high << 32) ^ np.int64(word) if _size_of(bits) == 8 else np.int64(word)


# --------------------------------------------------------------------------------------------------
# Loops


# Inner loops must stay simple enough to become vector instructions: the kind of rounding and the
# presence of energy and companion are constants there, and no two arrays overlap.


@compiled()
def _round_line(y, key, how, dither):
    first, second = np.uint32(key), np.uint32(key >> np.uint64(32))
    for i in range(y.size):
        word = random_word(i, first, second)
        zero = like(0.0, y[i])
        y[i] = dithered(y[i], zero, word, how) if dither else gridded(y[i], zero, word, how)


@compiled()
def _round_block(y, block, stream, how):
    line = y[block * _BLOCK : min(y.size, (block + 1) * _BLOCK)]
    key = line_key(stream, block)
    if how.kind == DITHER:
        _round_line(line, key, how, True)
    else:
        _round_line(line, key, how, False)


@compiled(parallel=True)
def _round_parallel(y, stream, how):
    for block in prange((y.size + _BLOCK - 1) // _BLOCK):
        _round_block(y, block, stream, how)


@compiled()
def _round_serial(y, stream, how):
    for block in range((y.size + _BLOCK - 1) // _BLOCK):
        _round_block(y, block, stream, how)


def round_flat(y: np.ndarray, stream: np.uint64, how: Finish) -> None:
    """Round each element of y (n,) once."""
    (_round_serial if y.size <= _SMALL else _round_parallel)(y, stream, how)


@compiled()
def _perturb_line(y, deviation, key, how, dither):
    first, second = np.uint32(key), np.uint32(key >> np.uint64(32))
    for i in range(y.size):
        word = random_word(i, first, second)
        noise = deviation[i] * standard(word, y[i])
        word = remixed(word, second)
        y[i] = dithered(y[i], noise, word, how) if dither else gridded(y[i], noise, word, how)


@compiled()
def _perturb_block(y, deviation, block, stream, how):
    part = slice(block * _BLOCK, min(y.size, (block + 1) * _BLOCK))
    key = line_key(stream, block)
    if how.kind == DITHER:
        _perturb_line(y[part], deviation[part], key, how, True)
    else:
        _perturb_line(y[part], deviation[part], key, how, False)


@compiled(parallel=True)
def _perturb_parallel(y, deviation, stream, how):
    for block in prange((y.size + _BLOCK - 1) // _BLOCK):
        _perturb_block(y, deviation, block, stream, how)


@compiled()
def _perturb_serial(y, deviation, stream, how):
    for block in range((y.size + _BLOCK - 1) // _BLOCK):
        _perturb_block(y, deviation, block, stream, how)


def perturb_flat(y: np.ndarray, deviation: np.ndarray, stream: np.uint64, how: Finish) -> None:
    """Add noise of standard deviation `deviation` (n,) to y (n,) and round once."""
    (_perturb_serial if y.size <= _SMALL else _perturb_parallel)(y, deviation, stream, how)


@compiled(fastmath={"contract"})
def _deviation(y, offset, alpha, part):
    """sqrt(a^2 + b^2) within 4 %, b = part >= 0: a third of the time of a loop with the root."""
    a = abs(alpha * (y - offset))
    return max(a, part) + like(0.41421, y) * min(a, part)


@compiled()
def _root(energy):
    return np.sqrt(max(energy, like(0.0, energy)))


@compiled()
def _is_tame(values, how):
    """Whether all magnitudes are below `LARGE`."""
    largest = like(0, how.exponent_mask)
    for i in range(values.size):
        exponent = like(bits_of(values[i]) & how.exponent_mask, how.exponent_mask)
        largest = like(exponent if exponent > largest else largest, how.exponent_mask)
    return largest < how.tame


# Where energies, companions and what a channel shares are tame. Of numbers that are not, the
# change is bounded: finite ones stay finite, and infinity and NaN stay by themselves.
# Contracted: multiplying and adding is one instruction.


@compiled()
def _bounded(change, how):
    """NaN, which infinity less infinity is, becomes a number."""
    change = change if change > -how.most else -how.most
    return change if change < how.most else how.most


@compiled(fastmath={"contract"})
def _dither(y, word, how):
    power = float_of(like(bits_of(y) & how.exponent_mask, how.exponent_mask))
    return like(np.int32(word), y) * like(2.0**-32, y) * (how.width * power)


@compiled(fastmath={"contract"})
def _row_without_energy(y, columns, start, first, second, how):
    offset, alpha, slope, intercept = columns[0], columns[1], columns[3], columns[4]
    for c in range(y.size):
        word = random_word(start + np.uint32(c), first, second)
        noise = alpha[c] * (y[c] - offset[c]) * centred(word, y[c])
        noise += slope[c] * y[c] + intercept[c]
        y[c] += _bounded(noise + _dither(y[c], remixed(word, second), how), how)


@compiled(fastmath={"contract"})
def _row_with_others(y, others, columns, start, first, second, how):
    offset, alpha, slope, intercept = columns[0], columns[1], columns[3], columns[4]
    for c in range(y.size):
        word = random_word(start + np.uint32(c), first, second)
        noise = alpha[c] * (y[c] - offset[c]) * centred(word, y[c])
        noise += slope[c] * others[c] + intercept[c]
        y[c] += _bounded(noise + _dither(y[c], remixed(word, second), how), how)


@compiled(fastmath={"contract"})
def _row_with_energies(y, columns, energies, are_roots, start, first, second, how):
    offset, alpha, beta = columns[0], columns[1], columns[2]
    for c in range(y.size):
        word = random_word(start + np.uint32(c), first, second)
        root = energies[c] if are_roots else _root(energies[c])
        noise = _deviation(y[c], offset[c], alpha[c], beta[c] * root)
        y[c] += _bounded(noise * centred(word, y[c]), how)


@compiled()
def _row(y, others, columns, energies, are_roots, start, first, second, how):
    """Everything at once, slowly: companion, energy, any rounding."""
    for c in range(y.size):
        word = random_word(start + np.uint32(c), first, second)
        root = like(0.0, y[c])
        if energies.size > 0:
            root = energies[c] if are_roots else _root(energies[c])
        noise = _deviation(y[c], columns[0, c], columns[1, c], columns[2, c] * root)
        noise *= centred(word, y[c])
        other = others[c] if others.size > 0 else y[c]
        noise += columns[3, c] * other + columns[4, c]
        y[c] = finished(y[c], noise, remixed(word, second), how)


@compiled()
def _perturb_row(y, others, columns, energies, are_roots, calm, start, first, second, how):
    """Choose the loop."""
    are_tame = _is_tame(others, how) and (are_roots or _is_tame(energies, how))
    is_simple = calm and are_tame and how.kind == DITHER
    if not is_simple or (others.size > 0 and energies.size > 0):
        _row(y, others, columns, energies, are_roots, start, first, second, how)
    elif others.size > 0:
        _row_with_others(y, others, columns, start, first, second, how)
    elif energies.size == 0:
        _row_without_energy(y, columns, start, first, second, how)
    elif are_roots:
        _row_with_energies(y, columns, energies, True, start, first, second, how)
    else:
        _row_with_energies(y, columns, energies, False, start, first, second, how)


@compiled()
def _perturb_run(y, others, columns, energies, are_roots, calm, start, key, how):
    """Elements that follow each other in memory, `columns` many at once."""
    first, second = np.uint32(key), np.uint32(key >> np.uint64(32))
    length = columns.shape[1]
    for begin in range(0, y.size, length):
        part = slice(begin, min(begin + length, y.size))
        place = np.uint32(start + np.uint32(begin))
        other = others[part] if others.size > 0 else others
        energy = energies[part] if energies.size > 0 else energies
        _perturb_row(y[part], other, columns, energy, are_roots, calm, place, first, second, how)


@compiled()
def _spread(values, times, out):
    """Repeat each value, as far as there is room."""
    for k in range(values.size):
        out[k * times : min((k + 1) * times, out.size)] = values[k]


@compiled()
def _perturb_rows_task(y, others, energies, columns, grid, coarse, shift, calm, stream, how, task):
    """Lines of memory that see the same coarse energies."""
    n_lines, length = grid[2], grid[3] * grid[4]
    n_groups = ((n_lines - 1) >> shift) + 1
    slab, group = task // n_groups, task % n_groups
    are_roots = coarse.size > 0
    energy = np.empty(length if are_roots else 0, y.dtype)
    if are_roots:
        n, i = slab // grid[1], slab % grid[1]
        _spread(coarse[n, i >> shift, group], grid[4] << shift, energy)
    for j in range(group << shift, min(n_lines, (group + 1) << shift)):
        line = slab * n_lines + j
        part = slice(line * length, (line + 1) * length)
        other = others[part] if others.size > 0 else others
        own = energies[part] if energies.size > 0 else energy
        key = line_key(stream, line)
        _perturb_run(y[part], other, columns, own, are_roots, calm, np.uint32(0), key, how)


@compiled(parallel=True)
def _rows_parallel(y, others, energies, columns, grid, coarse, shift, calm, stream, how):
    for task in prange(grid[0] * grid[1] * (((grid[2] - 1) >> shift) + 1)):
        _perturb_rows_task(
            y, others, energies, columns, grid, coarse, shift, calm, stream, how, task
        )  # fmt: skip


@compiled()
def _rows_serial(y, others, energies, columns, grid, coarse, shift, calm, stream, how):
    for task in range(grid[0] * grid[1] * (((grid[2] - 1) >> shift) + 1)):
        _perturb_rows_task(
            y, others, energies, columns, grid, coarse, shift, calm, stream, how, task
        )  # fmt: skip


def perturb_rows(y, others, energies, columns, grid, coarse, shift, calm, stream, how) -> None:
    """Add noise to channels that lie next to each other in memory.

    Parameters
    ----------
    y : (P C,), P voxels in the order of `grid`
    others : (P C,), the companion, or (0,): y itself
    energies : (P C,) energy of each sum's terms, or (0,)
    columns : (5, m C): offset, alpha, beta, slope, intercept of each channel, repeated for the m
        voxels handled at once. The noise of an element is
        ``intercept + slope companion + sqrt((alpha (y - offset))^2 + beta^2 energy) g``; alpha and
        beta are divided by `BYTES_SD`, and by `HYPOTENUSE` if there is an energy
    grid : (N, X, Y, Z, C), int64; N X Y Z = P
    coarse : (N, X', Y', Z'), root of the energy for all channels; a voxel looks at its coordinates
        shifted right by `shift` bits; or empty
    calm : whether no noise of tame numbers is large
    """
    run = _rows_serial if y.size <= _SMALL else _rows_parallel
    run(y, others, energies, columns, grid, coarse, shift, calm, stream, how)


@compiled(parallel=True)
def perturb_planes(y, others, energies, columns, grid, coarse, shift, calm, stream, how):
    """Do the same where voxels of a channel lie next to each other: arrays (N, C, X Y Z).

    `columns` is (5, C).
    """
    n_x, n_y, n_z, n_channels = grid[1], grid[2], grid[3], grid[4]
    n_groups = ((n_x - 1) >> shift) + 1
    n_blocks = (n_channels + _TOGETHER - 1) // _TOGETHER
    are_roots = coarse.size > 0
    for task in prange(grid[0] * n_blocks * n_groups):
        n, block, group = (
            task // (n_blocks * n_groups),
            task // n_groups % n_blocks,
            task % n_groups,
        )
        energy = np.empty(n_y * n_z if are_roots else 0, y.dtype)
        if are_roots:
            lines = energy.reshape(n_y, n_z)
            for j in range(n_y):
                if j >> shift << shift == j:
                    _spread(coarse[n, group, j >> shift], 1 << shift, lines[j])
                else:
                    lines[j] = lines[j - 1]
        own = np.empty((5, min(_LINE, n_y * n_z)), y.dtype)
        for c in range(block * _TOGETHER, min((block + 1) * _TOGETHER, n_channels)):
            key = line_key(stream, n * n_channels + c)
            for k in range(5):
                own[k] = columns[k, c]
            for i in range(group << shift, min(n_x, (group + 1) << shift)):
                part = slice(i * n_y * n_z, (i + 1) * n_y * n_z)
                other = others[n, c, part] if others.size > 0 else energy[0:0]
                squares = energies[n, c, part] if energies.size > 0 else energy
                start = np.uint32(i * n_y * n_z)
                _perturb_run(y[n, c, part], other, own, squares, are_roots, calm, start, key, how)


@compiled(parallel=True)
def round_halves(bits, exponent_mask, grid_mask, width, kind, stream):
    """Round 16-bit floats, given as int16 (n,), once; they came out of wider arithmetic."""
    for block in prange((bits.size + _BLOCK - 1) // _BLOCK):
        key = line_key(stream, block)
        start = block * _BLOCK
        for i in range(start, min(bits.size, start + _BLOCK)):
            word = random_word(i - start, key, key >> np.uint64(32))
            magnitude = np.int32(bits[i]) & np.int32(0x7FFF)
            moved = magnitude
            if kind == DITHER:
                moved += np.int32(np.rint(np.float32(np.int32(word)) * np.float32(2**-32) * width))
            elif kind == STOCHASTIC:
                moved = (magnitude + (np.int32(word) & grid_mask)) & ~grid_mask
            else:
                moved = (magnitude + ((grid_mask + 1) >> 1)) & ~grid_mask
                moved += (grid_mask + 1) if word & np.uint32(0x80000000) else -(grid_mask + 1)
            if 0 < magnitude < exponent_mask and 0 < moved < exponent_mask:
                bits[i] = np.int16(moved | (np.int32(bits[i]) & np.int32(-0x8000)))
