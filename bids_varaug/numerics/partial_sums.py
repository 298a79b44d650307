"""Compiled loops that follow the partial sums of sums and of sums of products.

Squares are those of 2^E for numbers in [2^E, 2^(E+1)): a quarter of 4^e. Adding 0 rounds nothing,
nor does the first term of a lane, but by some rules (`Rule.rounds_exact`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from bids_varaug.machine import compiled
from bids_varaug.numerics.bits import bits_of, float_of, like
from bids_varaug.numerics.rules import Rule

WIDTH = 8  # sums that are followed side by side, as vector instructions
_EXPONENTS = {4: np.int32(0x7F800000), 8: np.int64(0x7FF0000000000000)}
_SQUARES, _ENERGY, _COUNT, _LANES = range(4)  # rows of the state of `WIDTH` sums
_PACKED, _SHARED, _STRIDED = range(3)
_RUN = 4096  # terms whose squares are added up in the terms' own format


class Loop(NamedTuple):
    """How compiled loops follow sums."""

    exponent_mask: np.integer
    rounds_exact: np.integer  # 0 or 1, see `Rule`
    lanes: int


def loop_of(rule: Rule, dtype: np.dtype) -> Loop:
    """Return what a rule means for loops over arrays of a dtype (float32 or float64)."""
    return Loop(_EXPONENTS[dtype.itemsize], np.int8(rule.rounds_exact), rule.lanes)


@compiled()
def _power(value, exponent_mask):
    return float_of(like(bits_of(value) & exponent_mask, exponent_mask))


@intrinsic(prefer_literal=True)
def _add_run(
    typing_context, x, place, step, stride, other, place_other, step_other, stride_other,
    centres, factor, width, first, n_terms, how, state, layout, layout_other, is_single,
):  # fmt: skip
    """Add terms `first` to `first + n_terms` to each of `WIDTH` sums, as vector instructions.

    Written out, since numba makes scalar ones of such a loop. Term i of sum b is `factor` times
    ``x[place + i step + b stride]`` or, where there is another array,
    ``(x[...] - centres[0, b]) (other[...] - centres[1, b])``. Sums from `width` on repeat the
    first. ``state``, (R, WIDTH), holds squares of 2^E, energy, count, then the partial sums of
    each lane.

    Literals: a layout is `_PACKED` where the stride is 1 and `width` is `WIDTH`, `_SHARED` where
    the stride is 0, else `_STRIDED`; `is_single` says that there is one lane.
    """
    has_other, single = other is not types.none, is_single.literal_value
    layouts = layout.literal_value, layout_other.literal_value
    signature = types.void(
        x, place, step, stride, other, place_other, step_other, stride_other, centres, factor,
        width, first, n_terms, how, state, layout, layout_other, is_single,
    )  # fmt: skip

    def build(context, builder, signature, arguments):
        (x_, place_, step_, stride_, other_, place_o, step_o, stride_o, centres_, factor_,
         width_, first_, n_, how_, state_, *_) = arguments  # fmt: skip
        index = place_.type
        element, align = context.get_value_type(x.dtype), x.dtype.bitwidth // 8
        vector = ir.VectorType(element, WIDTH)
        mask, rounds_exact, lanes = (builder.extract_value(how_, i) for i in range(3))
        integers = ir.VectorType(mask.type, WIDTH)
        flags = ir.VectorType(ir.IntType(1), WIDTH)
        zeros, ones = (ir.Constant(vector, [value] * WIDTH) for value in (0.0, 1.0))

        def data(array_type, array):
            return context.make_array(array_type)(context, builder, array).data

        def row(array_type, array, number):
            start = builder.mul(number, ir.Constant(index, WIDTH))
            where = builder.gep(data(array_type, array), [start])
            return builder.bitcast(where, vector.as_pointer())

        def load(where):
            return builder.load(where, align=align)

        def store(value, where):
            builder.store(value, where, align=align)

        def filled(scalar, vector_type):
            return gathered([scalar] * WIDTH, vector_type)

        def gathered(scalars, vector_type):
            result = ir.Constant(vector_type, ir.Undefined)
            for b, scalar in enumerate(scalars):
                result = builder.insert_element(result, scalar, ir.Constant(ir.IntType(32), b))
            return result

        def offsets(stride):
            sums = [ir.Constant(index, b) for b in range(WIDTH)]
            inside = [builder.icmp_signed("<", b, width_) for b in sums]
            return [
                builder.select(i, builder.mul(b, stride), ir.Constant(index, 0))
                for i, b in zip(inside, sums, strict=True)
            ]

        def terms_at(pointer, start, layout, offset):
            if layout == _PACKED:
                where = builder.gep(pointer, [start])
                return load(builder.bitcast(where, vector.as_pointer()))
            if layout == _SHARED:
                return filled(load(builder.gep(pointer, [start])), vector)
            places = [builder.gep(pointer, [builder.add(start, o)]) for o in offset]
            return gathered([load(p) for p in places], vector)

        pointer, offset = data(x, x_), offsets(stride_)
        if has_other:
            pointer_o, offset_o = data(other, other_), offsets(stride_o)
            centre, centre_o = (
                load(row(centres, centres_, ir.Constant(index, i))) for i in range(2)
            )
        mask, factor = filled(mask, integers), filled(factor_, vector)
        counted = range(_LANES + 1 if single else _LANES)
        kept = [row(state, state_, ir.Constant(index, i)) for i in counted]
        registers = [cgutils.alloca_once_value(builder, load(where)) for where in kept]
        with cgutils.for_range(builder, n_) as loop:
            number = builder.add(first_, loop.index)
            start = builder.add(place_, builder.mul(number, step_))
            terms = terms_at(pointer, start, layouts[0], offset)
            if has_other:
                start = builder.add(place_o, builder.mul(number, step_o))
                others = terms_at(pointer_o, start, layouts[1], offset_o)
                others = builder.fsub(others, centre_o)
                terms = builder.fmul(builder.fsub(terms, centre), others)
            terms = builder.fmul(terms, factor)
            if single:
                partial = registers[_LANES]
            else:
                lane = builder.and_(number, builder.sub(lanes, ir.Constant(index, 1)))
                partial = row(state, state_, builder.add(lane, ir.Constant(index, _LANES)))
            before = load(partial)
            after = builder.fadd(before, terms)
            store(after, partial)
            power = builder.and_(builder.bitcast(after, integers), mask)
            power = builder.bitcast(power, vector)
            later = builder.icmp_signed(">=", number, lanes)
            every = builder.and_(builder.trunc(rounds_exact, ir.IntType(1)), later)
            every = filled(every, flags)
            present = builder.or_(every, builder.fcmp_unordered("!=", terms, zeros))
            was = builder.or_(every, builder.fcmp_unordered("!=", before, zeros))
            grown = (
                builder.select(builder.and_(present, was), builder.fmul(power, power), zeros),
                builder.fmul(terms, terms),
                builder.select(present, ones, zeros),
            )
            for register, value in zip(registers, grown, strict=False):
                store(builder.fadd(load(register), value), register)
        for register, where in zip(registers, kept, strict=True):
            store(load(register), where)
        return context.get_dummy_value()

    return signature, build


@compiled()
def _join(partial, n_terms, sums, how):
    """Add the lanes (L, B) pairwise, those that have terms."""
    joined, n = partial.shape[0] // 2, min(partial.shape[0], n_terms)
    while joined >= 1:
        for lane in range(n - joined):
            for b in range(sums.size):
                value = partial[lane, b] + partial[lane + joined, b]
                inexact = partial[lane, b] != 0 and partial[lane + joined, b] != 0
                if inexact or how.rounds_exact:
                    unit = np.float64(_power(value, how.exponent_mask))
                    sums[b] += unit * unit
                partial[lane, b] = value
        n, joined = min(n, joined), joined // 2


@compiled()
def _follow_task(x, other, strides, n_terms, given, factor, how, task, out):
    a, start, stop = task
    width = stop - start
    state, centres = np.zeros((_LANES + how.lanes, WIDTH), x.dtype), np.zeros((2, WIDTH), x.dtype)
    centres[:, :width] = given[:, a, start:stop]
    step, stride = strides[0, 1], strides[0, 2]
    step_other, stride_other = strides[1, 1], strides[1, 2]
    at = a * strides[0, 0] + start * stride
    at_other = a * strides[1, 0] + start * stride_other
    packed = width == WIDTH and stride == 1
    packed_other = width == WIDTH and stride_other == 1
    for first in range(0, n_terms, _RUN):
        n = min(_RUN, n_terms - first)
        if how.lanes > 1:
            _add_run(
                x, at, step, stride, other, at_other, step_other, stride_other, centres, factor,
                width, first, n, how, state, _STRIDED, _STRIDED, False,
            )  # fmt: skip
        elif packed and packed_other:
            _add_run(
                x, at, step, stride, other, at_other, step_other, stride_other, centres, factor,
                width, first, n, how, state, _PACKED, _PACKED, True,
            )  # fmt: skip
        elif stride == 0 and packed_other:
            _add_run(
                x, at, step, stride, other, at_other, step_other, stride_other, centres, factor,
                width, first, n, how, state, _SHARED, _PACKED, True,
            )  # fmt: skip
        else:
            _add_run(
                x, at, step, stride, other, at_other, step_other, stride_other, centres, factor,
                width, first, n, how, state, _STRIDED, _STRIDED, True,
            )  # fmt: skip
        for b in range(width):
            out[0, a, start + b] += state[_SQUARES, b]
            out[1, a, start + b] += state[_ENERGY, b]
            out[3, a, start + b] += state[_COUNT, b]
        state[:_LANES] = 0
    _join(state[_LANES:], n_terms, out[0, a, start:stop], how)
    out[2, a, start:stop] = state[_LANES, :width]


@compiled(parallel=True)
def follow_parallel(x, other, strides, n_terms, given, factor, how, tasks, out):
    """Follow sums; see `follow_serial`."""
    for t in prange(len(tasks)):
        _follow_task(x, other, strides, n_terms, given, factor, how, tasks[t], out)


@compiled()
def follow_serial(x, other, strides, n_terms, given, factor, how, tasks, out):
    """Follow sums.

    Parameters
    ----------
    x : memory of an array (A, n, B), float32 or float64
    other : that of a second one, or None
    strides : (2, 3) int64, of both, in elements
    n_terms : n
    given : (2, A, B), what is subtracted from the two; of one array nothing is
    factor : of the terms, dtype of x
    how : Loop
    tasks : (T, 3) int64, of `tasks_of`
    out : (4, A, B) float64: squares of 2^E, energy, total and count are added to it
    """
    for t in range(len(tasks)):
        _follow_task(x, other, strides, n_terms, given, factor, how, tasks[t], out)


def tasks_of(shape: tuple[int, int]) -> np.ndarray:
    """(T, 3): rows and columns of the sums that are followed side by side."""
    starts = range(0, shape[1], WIDTH)
    rows = [(a, b, min(b + WIDTH, shape[1])) for a in range(shape[0]) for b in starts]
    return np.array(rows, np.int64).reshape(-1, 3)


@compiled()
def products_row(x, weight, how, squares, energy, total):
    """Follow the sums of products of x (K,) with each column of weight (K, O).

    O is a multiple of `WIDTH`. The rest, (O,), is filled: squares of 2^E of the partial sums, sums
    of squared products, results.
    """
    n_out, weights = weight.shape[1], weight.ravel()
    state, centres = np.zeros((_LANES + how.lanes, WIDTH), x.dtype), np.zeros((2, WIDTH), x.dtype)
    one = like(1.0, x[0])
    for start in range(0, n_out, WIDTH):
        state[:] = 0
        if how.lanes > 1:
            _add_run(
                x, 0, 1, 0, weights, start, n_out, 1, centres, one, WIDTH, 0, x.size, how,
                state, _SHARED, _PACKED, False,
            )  # fmt: skip
        else:
            _add_run(
                x, 0, 1, 0, weights, start, n_out, 1, centres, one, WIDTH, 0, x.size, how,
                state, _SHARED, _PACKED, True,
            )  # fmt: skip
        part = slice(start, start + WIDTH)
        squares[part], energy[part] = state[_SQUARES], state[_ENERGY]
        _join(state[_LANES:], x.size, squares[part], how)
        total[part] = state[_LANES]


@compiled(parallel=True)
def products_parallel(x, weight, how, found):
    """Do so for each row of x (S, K); found is (3, S, O)."""
    for row in prange(x.shape[0]):
        products_row(x[row], weight, how, found[0, row], found[1, row], found[2, row])


@compiled()
def products_serial(x, weight, how, found):
    """Do so in one thread."""
    for row in range(x.shape[0]):
        products_row(x[row], weight, how, found[0, row], found[1, row], found[2, row])
