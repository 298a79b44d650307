"""Rounding noise of single elements, added to arrays in place by compiled kernels.

Noise of an element is a standard deviation times g, then one last rounding as the rule says. g has
mean 0, variance 1 and a nearly normal distribution (the sum of four uniform bytes: excess kurtosis
-0.3, nothing beyond 3.45).
"""

from __future__ import annotations

import numpy as np
from numba import prange

from bids_varaug.machine import compiled
from bids_varaug.numerics.bits import like
from bids_varaug.numerics.last_rounding import Finish, dithered, gridded
from bids_varaug.numerics.random_numbers import line_key, random_word, remixed, standard
from bids_varaug.numerics.rules import DITHER, STOCHASTIC, UP_DOWN

_BLOCK = 8192
SMALL = 4 * _BLOCK  # elements below which waking other threads takes longer than the work

# Inner loops must stay simple enough to become vector instructions: the kind of rounding is a
# constant there, and no two arrays overlap.


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
    (_round_serial if y.size <= SMALL else _round_parallel)(y, stream, how)


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
    (_perturb_serial if y.size <= SMALL else _perturb_parallel)(y, deviation, stream, how)


@compiled()
def _round_half_line(bits, key, exponent_mask, grid_mask, width, kind):
    first, second = np.uint32(key), np.uint32(key >> np.uint64(32))
    for i in range(bits.size):
        word = random_word(i, first, second)
        old = np.int32(bits[i])
        magnitude = np.int32(old & np.int32(0x7FFF))
        if kind == DITHER:
            share = np.float32(np.float32(np.int32(word)) * np.float32(2**-32))
            moved = np.int32(magnitude + np.int32(np.rint(share * width)))
        elif kind == STOCHASTIC:
            moved = np.int32(magnitude + np.int32(np.int32(word) & grid_mask))
            moved = np.int32(moved & ~grid_mask)
        else:  # up-down
            step = np.int32(grid_mask + np.int32(1))
            moved = np.int32(np.int32(magnitude + np.int32(step >> np.int32(1))) & ~grid_mask)
            moved = np.int32(moved + (step if word & np.uint32(0x80000000) else np.int32(-step)))
        finite = (magnitude > 0) & (magnitude < exponent_mask)
        finite &= (moved > 0) & (moved < exponent_mask)
        # Not a choice between old and new: that becomes a masked store, eight times as long
        change = np.int32(np.int32(moved - magnitude) & np.int32(-np.int32(finite)))
        bits[i] = np.int16(np.int32(old + change))


@compiled(parallel=True)
def round_halves(bits, exponent_mask, grid_mask, width, kind, stream):
    """Round 16-bit floats, given as int16 (n,), once; they came out of wider arithmetic."""
    for block in prange((bits.size + _BLOCK - 1) // _BLOCK):
        line = bits[block * _BLOCK : min(bits.size, (block + 1) * _BLOCK)]
        key = line_key(stream, block)
        if kind == DITHER:
            _round_half_line(line, key, exponent_mask, grid_mask, width, DITHER)
        elif kind == STOCHASTIC:
            _round_half_line(line, key, exponent_mask, grid_mask, width, STOCHASTIC)
        else:
            _round_half_line(line, key, exponent_mask, grid_mask, width, UP_DOWN)
