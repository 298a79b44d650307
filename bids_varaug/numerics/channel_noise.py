"""Rounding noise that the elements of a channel share a model of, added in place by kernels.

Noise of an element is a standard deviation times g (see `noise`), plus what a whole channel shares,
then one last rounding as the rule says; a dither is left out where the noise of a sum of many terms
is there.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from bids_varaug.machine import compiled
from bids_varaug.numerics.bits import bits_of, float_of, like
from bids_varaug.numerics.last_rounding import finished
from bids_varaug.numerics.noise import SMALL
from bids_varaug.numerics.random_numbers import centred, line_key, random_word, remixed
from bids_varaug.numerics.rules import DITHER

_LINE = 512  # elements of one channel that one loop handles
_TOGETHER = 8  # channels that are handled with the same energies
# What the largest of two numbers plus 0.414 times the smaller exceeds the root of their squares by,
# in the middle of its range
HYPOTENUSE = 1.0412

# Inner loops must stay simple enough to become vector instructions: the presence of energy and
# companion is a constant there, and no two arrays overlap.


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
    run = _rows_serial if y.size <= SMALL else _rows_parallel
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
