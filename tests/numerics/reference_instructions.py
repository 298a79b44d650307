"""Compiled floating-point instructions with Monte Carlo rounding, and the loops over them.

Scalars first (random numbers, error-free transformations, one rounding, one function per
instruction), then the loops that `reference` calls. Everything is in one file because numba's
cache notices changes only in the file of the function that is called.

Numbers travel as float64, whatever the format: float32 values are exact in it. The exact result of
an instruction is a pair ``hi + lo`` with ``|lo| <= ulp(hi) / 2``, from error-free transformations
[1]_, so that float32 and float64 share one rounding.

References
----------
.. [1] Muller et al. (2018), Handbook of Floating-Point Arithmetic, chapter 4: TwoSum, Fast2Sum,
   and Dekker's product with Veltkamp's splitting.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from bids_varaug.machine import compiled

IEEE, RR, PB, MCA, SR, UD, CESTAC = range(7)
MODES = ("ieee", "rr", "pb", "mca", "sr", "ud", "cestac")  # in the order of the numbers above

ADD, MULTIPLY, DIVIDE, SQRT, EXP, MULTIPLY_ADD = range(6)


class Rounding(NamedTuple):
    """How to round, as the compiled code takes it."""

    mode: int
    precision: int  # virtual precision t, bits
    digits: int  # of the format: 24 or 53
    smallest: int  # the smallest subnormal number of the format is 2^smallest
    counter: np.ndarray  # (1,) uint64, moves on by one step per random number


# --------------------------------------------------------------------------------------------------
# Random numbers


@compiled(error_model="numpy")
def uniform(counter):
    """Uniform in [0, 1) with 53 bits: SplitMix64 (Steele et al. 2014, OOPSLA)."""
    counter[0] += np.uint64(0x9E3779B97F4A7C15)
    word = counter[0]
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    word = word ^ (word >> np.uint64(31))
    return np.float64(word >> np.uint64(11)) * 2.0**-53


# --------------------------------------------------------------------------------------------------
# Error-free transformations


@compiled(error_model="numpy")
def two_sum(a, b):
    """Sum and its error (Knuth)."""
    total = a + b
    shadow = total - a
    return total, (a - (total - shadow)) + (b - shadow)


@compiled(error_model="numpy")
def fast_two_sum(a, b):
    """Sum and its error, for |a| >= |b| (Dekker)."""
    total = a + b
    return total, b - (total - a)


@compiled(error_model="numpy")
def two_product(a, b):
    """Product and its error; error 0 where the splitting overflows (factors above 2^996)."""
    product = a * b
    scaled = 134217729.0 * a  # 2^27 + 1
    a_high = scaled - (scaled - a)
    a_low = a - a_high
    scaled = 134217729.0 * b
    b_high = scaled - (scaled - b)
    b_low = b - b_high
    error = ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low
    return product, error if math.isfinite(error) else 0.0


# --------------------------------------------------------------------------------------------------
# Rounding


@compiled(error_model="numpy")
def to_format(value, how):
    """Round to the nearest number of the format."""
    return np.float64(np.float32(value)) if how.digits == 24 else value


@compiled(error_model="numpy")
def perturbed(a, how):
    """An operand as the instruction sees it: hi, lo."""
    if (how.mode != PB and how.mode != MCA) or a == 0.0 or not math.isfinite(a):
        return a, 0.0
    unit = math.ldexp(1.0, max(math.frexp(a)[1] - how.precision, how.smallest))
    return two_sum(a, unit * (uniform(how.counter) - 0.5))


@compiled(error_model="numpy")
def rounded(hi, lo, shift, how):
    """Round the exact result (hi + lo) 2^shift of an instruction.

    With `shift`, results and errors too large or small for float64 can be handed over.
    """
    # One random number per rounding, used or not: the stream does not depend on the data.
    mode = how.mode
    draw = 0.0 if mode in (IEEE, PB) else uniform(how.counter)
    if hi == 0.0 or not math.isfinite(hi):
        return hi
    if mode == PB:
        return to_format(math.ldexp(hi, shift), how)
    mantissa, exponent = math.frexp(hi)
    if abs(mantissa) == 0.5 and mantissa * lo < 0:  # a power of two less a bit: the binade below
        exponent -= 1
    # Unit in the last place 2^(e-t) at the virtual precision, in units of 2^shift
    smallest = min(how.smallest - shift, 1023)
    unit = math.ldexp(1.0, max(exponent - how.precision, smallest))
    place = hi / unit
    steps = np.floor(place)
    lo /= unit
    fraction = (place - steps) + lo
    above_half = ((place - steps) - 0.5) + lo  # of the right sign even where fraction is rounded
    if mode in (IEEE, UD):
        if above_half > 0 or (above_half == 0 and steps % 2 != 0):
            steps += 1
        if mode == UD:
            # One step of the last bit: half as wide below a power of two.
            away = 1.0 if steps > 0 else -1.0
            if draw < 0.5:
                steps += away
            elif abs(steps) == 2.0 ** (how.precision - 1) and unit > math.ldexp(1.0, smallest):
                steps -= 0.5 * away
            else:
                steps -= away
    elif mode == MCA or (mode == RR and fraction != 0):
        steps += fraction + (draw - 0.5)
    elif fraction != 0:  # SR, CESTAC
        if fraction < 0:
            steps -= 1
            fraction += 1
        if draw < (fraction if mode == SR else 0.5):
            steps += 1
    return math.copysign(to_format(math.ldexp(steps * unit, shift), how), hi)


# --------------------------------------------------------------------------------------------------
# Instructions


@compiled(error_model="numpy")
def add(a, b, how):
    """Instruction ``a + b``."""
    a, a_low = perturbed(a, how)
    b, b_low = perturbed(b, how)
    hi, lo = two_sum(a, b)
    if not math.isfinite(hi):
        return rounded(hi, 0.0, 0, how)
    lo += a_low + b_low
    if lo != 0.0:  # else the sign of -0 would be lost
        hi, lo = two_sum(hi, lo)
    return rounded(hi, lo, 0, how)


@compiled(error_model="numpy")
def multiply(a, b, how):
    """Instruction ``a b``."""
    a, a_low = perturbed(a, how)
    b, b_low = perturbed(b, how)
    if how.digits == 24 or a == 0.0 or b == 0.0 or not math.isfinite(a * b):
        return rounded(a * b, 0.0, 0, how)  # 24-bit factors: exact; perturbed ones: to 53 bits
    a, a_exponent = math.frexp(a)
    b, b_exponent = math.frexp(b)
    hi, lo = two_product(a, b)
    lo += a * math.ldexp(b_low, -b_exponent) + math.ldexp(a_low, -a_exponent) * b
    hi, lo = fast_two_sum(hi, lo)
    return rounded(hi, lo, a_exponent + b_exponent, how)


@compiled(error_model="numpy")
def multiply_add(a, b, c, how):
    """One instruction ``a b + c``, rounded once."""
    a, a_low = perturbed(a, how)
    b, b_low = perturbed(b, how)
    c, c_low = perturbed(c, how)
    product, error = (a * b, 0.0) if how.digits == 24 else two_product(a, b)
    hi, lo = two_sum(product, c)
    if not math.isfinite(hi):
        return rounded(hi, 0.0, 0, how)
    lo += error + (c_low + a * b_low + a_low * b)
    if lo != 0.0:
        hi, lo = two_sum(hi, lo)
    return rounded(hi, lo, 0, how)


@compiled(error_model="numpy")
def divide(a, b, how):
    """Instruction ``a / b``."""
    a, a_low = perturbed(a, how)
    b, b_low = perturbed(b, how)
    if a == 0.0 or b == 0.0 or not (math.isfinite(a) and math.isfinite(b)):
        return rounded(a / b, 0.0, 0, how)
    a, a_exponent = math.frexp(a)
    b, b_exponent = math.frexp(b)
    quotient = a / b
    product, error = two_product(quotient, b)
    error += quotient * math.ldexp(b_low, -b_exponent) - math.ldexp(a_low, -a_exponent)
    hi, lo = fast_two_sum(quotient, ((a - product) - error) / b)
    return rounded(hi, lo, a_exponent - b_exponent, how)


@compiled(error_model="numpy")
def sqrt(a, how):
    """Instruction ``sqrt(a)``."""
    a, a_low = perturbed(a, how)
    if not (0.0 < a < math.inf):
        return rounded(np.sqrt(a), 0.0, 0, how)
    half = math.frexp(a)[1] // 2
    a = math.ldexp(a, -2 * half)
    root = np.sqrt(a)
    square, error = two_product(root, root)
    error -= math.ldexp(a_low, -2 * half)
    lo = ((a - square) - error) / (2 * root)
    lo *= 1 - 2.0**-53  # the next term is negative; without it there could be ties, and are none
    hi, lo = fast_two_sum(root, lo)
    return rounded(hi, lo, half, how)


@compiled(error_model="numpy")
def exp(a, how):
    """Instruction ``exp(a)``.

    By argument reduction and Taylor series in double-double: the same bits on any machine.
    """
    a, a_low = perturbed(a, how)
    if a == 0.0 or not math.isfinite(a):
        return rounded(1.0 if a == 0.0 else (0.0 if a < 0 else a), 0.0, 0, how)
    if abs(a) > 746.0:
        return rounded(0.0 if a < 0 else math.inf, 0.0, 0, how)
    doublings = np.rint(a * 1.4426950408889634)
    # ln 2 in three parts; the first has trailing zeros, so that its multiples are exact
    hi, lo = two_sum(a, -doublings * 6.93147180369123816490e-01)
    product, error = two_product(doublings, 1.90821492927058770002e-10)
    hi, error_of_sum = two_sum(hi, -product)
    lo += a_low + error_of_sum - error - doublings * 1.1612227229362532e-26
    hi, lo = two_sum(hi, lo)
    hi /= 64.0
    lo /= 64.0
    series, series_low = 1.0, 0.0
    for k in range(13, 0, -1):  # Horner: 1 + x/k (...)
        product, error = two_product(series, hi)
        error += series * lo + series_low * hi
        term = product / k
        back, back_error = two_product(term, float(k))
        term_low = (((product - back) - back_error) + error) / k
        series, series_low = two_sum(1.0, term)
        series, series_low = fast_two_sum(series, series_low + term_low)
    for _ in range(6):
        product, error = two_product(series, series)
        series, series_low = fast_two_sum(product, error + 2 * series * series_low)
    return rounded(series, series_low, int(doublings), how)


# --------------------------------------------------------------------------------------------------
# Loops


@compiled(error_model="numpy")
def elementwise(operation, a, b, c, out, how):
    """All (n,) float64; `operation` is one of the constants above, `b` and `c` may be unused."""
    for i in range(a.size):
        if operation == ADD:
            out[i] = add(a[i], b[i], how)
        elif operation == MULTIPLY:
            out[i] = multiply(a[i], b[i], how)
        elif operation == DIVIDE:
            out[i] = divide(a[i], b[i], how)
        elif operation == SQRT:
            out[i] = sqrt(a[i], how)
        elif operation == EXP:
            out[i] = exp(a[i], how)
        else:
            out[i] = multiply_add(a[i], b[i], c[i], how)


@compiled(error_model="numpy")
def joined(partial, n, how):
    """Sum of the first `n` lanes: the upper half is added to the lower one until one is left."""
    half = partial.size // 2
    while half >= 1:
        for i in range(n - half):
            partial[i] = add(partial[i], partial[i + half], how)
        n = min(n, half)
        half //= 2
    return partial[0]


@compiled(error_model="numpy")
def sum_rows(x, partial, out, how):
    """(R, n) -> (R,); `partial` is (lanes,) working memory."""
    lanes = partial.size
    for row in range(x.shape[0]):
        partial[0] = 0.0
        for i in range(x.shape[1]):
            lane = i & (lanes - 1)
            partial[lane] = x[row, i] if i < lanes else add(partial[lane], x[row, i], how)
        out[row] = joined(partial, min(lanes, x.shape[1]), how)


@compiled(error_model="numpy")
def dot_rows(x, y, every_pair, partial, fma, out, how):
    """(R, n), (S, n) -> (R, S) with `every_pair`; else (R, n), (R, n) -> (R, 1)."""
    lanes = partial.size
    n = x.shape[1]
    for row in range(x.shape[0]):
        for column in range(out.shape[1]):
            other = column if every_pair else row
            partial[0] = 0.0
            for i in range(n):
                lane = i & (lanes - 1)
                if fma and i >= lanes:
                    partial[lane] = multiply_add(x[row, i], y[other, i], partial[lane], how)
                else:
                    product = multiply(x[row, i], y[other, i], how)
                    partial[lane] = product if i < lanes else add(partial[lane], product, how)
            out[row, column] = joined(partial, min(lanes, n), how)
