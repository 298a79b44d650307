"""The last rounding of a number that a kernel has in hand, after noise was added to it."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from bids_varaug.machine import compiled
from bids_varaug.numerics.bits import bits_of, float_of, like, size_of
from bids_varaug.numerics.random_numbers import wide
from bids_varaug.numerics.rules import DITHER, STOCHASTIC, Rule

# Bits of the exponent, for each width
_EXPONENTS = {2: 0x7C00, 4: 0x7F800000, 8: 0x7FF0000000000000}
LARGE = 2.0**60
_TAME = {4: (127 + 60) << 23, 8: (1023 + 60) << 52}  # the bits of `LARGE`
# Less than half of the last place of the largest number
_MOST = {4: 2.0 ** (127 - 25), 8: 2.0 ** (1023 - 54)}


class Finish(NamedTuple):
    """The last rounding, as compiled code takes it; integers and floats of the array's width."""

    kind: int
    width: np.floating  # of the dither, in units of 2^E for a number in [2^E, 2^(E+1))
    exponent_mask: np.integer
    grid_mask: np.integer  # the bits below the virtual precision
    tame: np.integer  # exponents below this one are far from overflow
    most: np.floating  # a change that takes no finite number to infinity


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
    draw = like(wide(word, shifted), shifted)
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
    return like(~(like(1, bits) << like(8 * size_of(bits) - 1, bits)), bits)
