"""How much rounding noise a sum carries: that of all its partial sums.

A sum of K terms rounds each partial sum s_i, a sum of products each product p_i too. To first order
the errors add up, and the variance of the result is

    ``4^-t (c_s T + c_p P)``,   ``T = sum_i 4^e(s_i)``,   ``P = sum_i 4^e(p_i)``,

with e(x) the exponent of x, t the virtual precision and c_s, c_p the variances of one rounding
(`rules.Rule`). Where T is too costly for each element, partial sums are taken for a Brownian bridge
from 0 to the result y (`bridge`), which needs only y and the energy ``E = sum_i p_i^2``, and a
factor makes up for order and structure of the terms: measured on a sample of elements, for which T
and P are computed in full.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass
from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.extending import intrinsic

from bids_varaug.compiled import compiled
from bids_varaug.numerics.glances import flat_view
from bids_varaug.numerics.noise import bits_of, float_of, like
from bids_varaug.numerics.rules import Rule

_EXPONENTS = {4: np.int32(0x7F800000), 8: np.int64(0x7FF0000000000000)}
_SMALL = 2**15  # terms below which waking other threads takes longer than the work
_WIDTH = 8  # sums that are followed side by side, as vector instructions
_SQUARES, _ENERGY, _COUNT, _CENTRE, _OTHER_CENTRE, _LANES = range(6)  # rows of their state
_RUN = 4096  # terms whose squares are added up in the terms' own format


def bridge(n_terms, lanes: int = 1):
    """Return a, b so that ``sum_i s_i^2`` is about ``a y^2 + b E`` for exchangeable terms.

    Partial sum i has mean ``y i / K`` and variance ``i (K - i) / K`` times that of the terms. With
    lanes, each is a bridge over K / lanes terms, and the tree that joins them follows.

    Parameters
    ----------
    n_terms : K, a number or an array
    lanes : a power of two

    Examples
    --------
    >>> a, b = bridge(1000)
    >>> round(a / 1000, 3), round(b / 1000, 3)
    (0.334, 0.167)
    """
    is_number = isinstance(n_terms, int | float)
    lanes = max(1, min(lanes, int(n_terms if is_number else n_terms.max())))
    k = max(n_terms / lanes, 1.0) if is_number else np.maximum(n_terms / lanes, 1.0)
    a = (k / 3 + 1 / 3) / lanes
    b = (1 - 1 / lanes) * (k / 3) + (k - 1 / k) / 6
    joined = lanes // 2
    while joined >= 1:
        a += 1 / joined
        b += 1 - 1 / joined
        joined //= 2
    return a, b


def modelled_variance(y, energy, n_terms: float, rule: Rule):
    """Return the variance of sums of products from results and energies, by `bridge`.

    Parameters
    ----------
    y, energy : arrays or tensors that broadcast
    n_terms : K
    rule : how instructions round

    Returns
    -------
    as y and energy broadcast
    """
    a, b = bridge(n_terms, rule.lanes)
    c_sum, c_product = rule.of_partial_sum, rule.of_product
    return rule.per_energy * (c_sum * a * y**2 + (c_sum * b + c_product) * energy)


class Loop(NamedTuple):
    """How compiled loops follow sums."""

    exponent_mask: np.integer
    rounds_exact: np.integer  # 0 or 1, see `Rule`
    lanes: int


def _loop(rule: Rule, dtype: np.dtype) -> Loop:
    return Loop(_EXPONENTS[dtype.itemsize], np.int8(rule.rounds_exact), rule.lanes)


@dataclass(frozen=True)
class Walk:
    """What following the partial sums tells, all float64 and of the sums' shape.

    `sums` and `products` are the variances that come from rounding partial sums and products;
    `total` is the sum, `energy` the sum of squares, `count` the number of terms that change it:
    those that are not 0 or, where exact results are rounded too, all.
    """

    sums: np.ndarray
    products: np.ndarray
    total: np.ndarray
    energy: np.ndarray
    count: np.ndarray

    @property
    def variance(self) -> np.ndarray:
        """Variance of the sum."""
        return self.sums + self.products

    @classmethod
    def stacked(cls, walks) -> Walk:
        """Several of one shape along a new first axis."""
        return cls(*(np.stack(values) for values in zip(*map(astuple, walks), strict=True)))

    def reshape(self, shape) -> Walk:
        """The same in another shape."""
        return Walk(*(np.reshape(v, shape) for v in astuple(self)))


def unthinned(thin: Walk, step: int, total, rule: Rule) -> Walk:
    """Tell from every `step`-th term what following all terms would tell, roughly.

    Partial sums of thinned terms show a drift of the terms well, but wander more than those of all
    terms do where terms are independent. What they exceed the expectation for independent terms by,
    less one standard error, counts as drift: of all sums together, or of each where the drift is
    large.

    Parameters
    ----------
    thin : of every `step`-th term
    total : the sums of all terms, same shape; None: as the thinned ones say
    """
    energy, count = thin.energy * step, thin.count * step
    if total is None:  # the square of a thinned sum is too large by what thinning adds
        total = thin.total * step
        square = np.maximum(total**2 - (step - 1) * energy, energy)
    else:
        square = total**2
    n_terms = np.maximum(count, 1.0)
    a, b = bridge(n_terms, rule.lanes)
    coefficient = rule.per_energy * rule.of_partial_sum
    seen = thin.sums * float(step) ** 3
    spread = np.maximum(energy - square / n_terms, 0) * (n_terms / rule.lanes)
    independent = coefficient * (a * square + step / 2 * spread)
    model = coefficient * (a * square + b * energy)
    excess = seen - independent
    drift = max(excess.sum() - math.sqrt((excess**2).sum()), 0.0)
    pooled = model * (1 + drift / max(model.sum(), 1e-300))
    own = model + np.maximum(excess, 0)
    share = np.clip((seen.sum() / max(independent.sum(), 1e-300) - 1.5) / 2, 0, 1)
    return Walk(share * own + (1 - share) * pooled, thin.products * step, total, energy, count)


def follow_sums(
    x: np.ndarray,
    rule: Rule,
    other: np.ndarray | None = None,
    centre: np.ndarray | None = None,
    other_centre: np.ndarray | None = None,
) -> Walk:
    """Follow the partial sums over the middle axis of x, or of ``(x - centre) (other - centre)``.

    Parameters
    ----------
    x : (A, n, B), float32 or float64, any strides
    rule : how instructions round
    other : same shape and dtype; None: plain sums of x
    centre, other_centre : (A, B), or None for 0; with `other` only

    Returns
    -------
    Walk
        (A, B)
    """
    shape = (x.shape[0], x.shape[2])
    scale, scale_other = _rough_scale(x), 1.0 if other is None else _rough_scale(other)
    centres = np.zeros((2, *shape), x.dtype)
    for row, given in zip(centres, (centre, other_centre), strict=True):
        if given is not None:
            row[:] = given
    out = np.zeros((4, *shape))
    operands = (x,) if other is None else (x, other)
    if shape[1] < min(shape[0], _WIDTH):  # the many sums side by side
        operands, centres, out_view = (
            [v.swapaxes(0, 2) for v in operands], centres.swapaxes(1, 2), out.swapaxes(1, 2)
        )  # fmt: skip
    else:
        out_view = out
    flats, strides = zip(*map(flat_view, operands), strict=True)
    flats += (None,) * (2 - len(flats))
    strides = np.stack(strides * (3 - len(strides)))
    follow = _follow_serial if x.size < _SMALL else _follow_parallel
    follow(
        *flats, strides, x.shape[1], centres, x.dtype.type(scale * scale_other),
        _loop(rule, x.dtype), _tasks(out_view.shape[1:]), out_view,
    )  # fmt: skip
    sums, energy, total = out[0], out[1], out[2]
    squared = (scale * scale_other) ** 2
    sums = rule.of_partial_sum * sums * (4 * rule.unit / squared)
    energy = energy / squared
    products = (
        np.zeros_like(energy) if other is None else rule.of_product * rule.per_energy * energy
    )
    return Walk(sums, products, total / (scale * scale_other), energy, out[3])


def follow_products(x: np.ndarray, weight: np.ndarray, rule: Rule) -> Walk:
    """Follow the partial sums of each element of a matrix product.

    Parameters
    ----------
    x : (S, K), float32 or float64
    weight : (K, O), same dtype
    rule : how instructions round

    Returns
    -------
    Walk
        (S, O); without `count`
    """
    scales = _scale(x), _scale(weight)
    n_out, scale = weight.shape[1], math.prod(scales)
    padded = np.zeros((len(weight), -(-n_out // _WIDTH) * _WIDTH), x.dtype)
    padded[:, :n_out] = weight * x.dtype.type(scales[1])
    x = np.ascontiguousarray(x * x.dtype.type(scales[0]))
    found = np.empty((3, x.shape[0], padded.shape[1]), x.dtype)
    small = x.size * n_out < 16 * _SMALL
    follow = _follow_products_serial if small else _follow_products
    follow(x, padded, _loop(rule, x.dtype), found)
    squares, energy, total = found[:, :, :n_out].astype("f8")
    sums = rule.of_partial_sum * squares * (4 * rule.unit / scale**2)
    energy /= scale**2
    products = rule.of_product * rule.per_energy * energy
    return Walk(sums, products, total / scale, energy, np.full_like(energy, np.nan))


def _scale(x: np.ndarray) -> float:
    """A power of two that brings the largest magnitude near 1: it changes nothing but keeps
    squares of small numbers from underflow.
    """
    largest = float(np.abs(x).max(initial=0))
    return 2.0 ** -math.frexp(largest)[1] if 0 < largest < math.inf else 1.0


def _rough_scale(x: np.ndarray) -> float:
    """The same from some of the terms."""
    scale = _scale(x[:, :: max(1, x.shape[1] // 64)])
    return scale if scale != 1.0 or x.size < _SMALL else _scale(x)


def _tasks(shape) -> np.ndarray:
    """(T, 3): rows and columns of the sums that are followed side by side."""
    starts = range(0, shape[1], _WIDTH)
    rows = [(a, b, min(b + _WIDTH, shape[1])) for a in range(shape[0]) for b in starts]
    return np.array(rows, np.int64).reshape(-1, 3)


# --------------------------------------------------------------------------------------------------
# Loops. Squares are those of 2^E for numbers in [2^E, 2^(E+1)): a quarter of 4^e. Adding 0 rounds
# nothing, nor does the first term of a lane, but by some rules (`Rule.rounds_exact`).


@compiled()
def _power(value, exponent_mask):
    return float_of(like(bits_of(value) & exponent_mask, exponent_mask))


@intrinsic
def _add_terms(
    typing_context, x, start, other, start_other, state, base, lane, factor, mask, always
):
    """Add one term to each of `_WIDTH` sums, as vector instructions.

    Written out, since numba makes scalar ones of such a loop. Terms are ``x[start:]`` times
    ``other[start_other:]``, which may be None. ``state[base:]`` holds rows of `_WIDTH` numbers:
    squares of 2^E, energy, count, the two centres, then the partial sums of each lane; those of
    this lane are at ``state[lane:]``. Where `always` is not 0, adding to 0, or 0, counts too.
    """
    signature = types.void(x, start, other, start_other, state, base, lane, factor, mask, always)

    def build(context, builder, signature, arguments):
        element = context.get_value_type(x.dtype)
        vector = ir.VectorType(element, _WIDTH)
        integers = ir.VectorType(arguments[8].type, _WIDTH)

        def pointer(array_type, array, place):
            data = context.make_array(array_type)(context, builder, array).data
            return builder.bitcast(builder.gep(data, [place]), vector.as_pointer())

        def load(where):
            return builder.load(where, align=x.dtype.bitwidth // 8)

        def row(number):
            place = builder.add(arguments[5], context.get_constant(types.intp, number * _WIDTH))
            return pointer(state, arguments[4], place)

        def same(scalar, vector):
            filled = ir.Constant(vector, ir.Undefined)
            for place in range(_WIDTH):
                index = ir.Constant(ir.IntType(32), place)
                filled = builder.insert_element(filled, scalar, index)
            return filled

        def add(where, value):
            builder.store(builder.fadd(load(where), value), where, align=x.dtype.bitwidth // 8)

        zeros, ones = (ir.Constant(vector, [value] * _WIDTH) for value in (0.0, 1.0))
        terms = load(pointer(x, arguments[0], arguments[1]))
        if other is not types.none:
            others = load(pointer(other, arguments[2], arguments[3]))
            others = builder.fsub(others, load(row(_OTHER_CENTRE)))
            terms = builder.fmul(builder.fsub(terms, load(row(_CENTRE))), others)
        terms = builder.fmul(terms, same(arguments[7], vector))
        partial = pointer(state, arguments[4], arguments[6])
        before = load(partial)
        after = builder.fadd(before, terms)
        builder.store(after, partial, align=x.dtype.bitwidth // 8)
        bits = builder.and_(builder.bitcast(after, integers), same(arguments[8], integers))
        power = builder.bitcast(bits, vector)
        every = builder.trunc(arguments[9], ir.IntType(1))
        every = same(every, ir.VectorType(ir.IntType(1), _WIDTH))
        present = builder.or_(every, builder.fcmp_unordered("!=", terms, zeros))
        was = builder.or_(every, builder.fcmp_unordered("!=", before, zeros))
        inexact = builder.and_(present, was)
        squares = builder.fmul(power, power)
        add(row(_SQUARES), builder.select(inexact, squares, zeros))
        add(row(_ENERGY), builder.fmul(terms, terms))
        add(row(_COUNT), builder.select(present, ones, zeros))
        return context.get_dummy_value()

    return signature, build


@compiled()
def _gather(flat, start, stride, width, row):
    for b in range(width):
        row[b] = flat[start + b * stride]


@compiled()
def _join(partial, n_terms, sums, how):
    """Add the lanes (L, B) pairwise, those that have terms."""
    joined, n = partial.shape[0] // 2, min(partial.shape[0], n_terms)
    while joined >= 1:
        for lane in range(n - joined):
            for b in range(partial.shape[1]):
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
    lanes, mask = how.lanes, how.exponent_mask
    state = np.zeros((_LANES + lanes) * _WIDTH, x.dtype)
    terms, others = np.zeros(_WIDTH, x.dtype), np.zeros(_WIDTH, x.dtype)
    for b in range(width):
        state[_CENTRE * _WIDTH + b] = given[0, a, start + b]
        state[_OTHER_CENTRE * _WIDTH + b] = given[1, a, start + b]
    place, step, stride = a * strides[0, 0] + start * strides[0, 2], strides[0, 1], strides[0, 2]
    place_other, step_other = a * strides[1, 0] + start * strides[1, 2], strides[1, 1]
    as_it_is = width == _WIDTH and stride == 1 and (other is None or strides[1, 2] == 1)
    for begin in range(0, n_terms, _RUN):
        for i in range(begin, min(begin + _RUN, n_terms)):
            lane = (_LANES + (i & (lanes - 1))) * _WIDTH
            always = how.rounds_exact if i >= lanes else np.int8(0)
            if as_it_is:
                _add_terms(x, place, other, place_other, state, 0, lane, factor, mask, always)
            else:
                _gather(x, place, stride, width, terms)
                if other is None:
                    _add_terms(terms, 0, other, 0, state, 0, lane, factor, mask, always)
                else:
                    _gather(other, place_other, strides[1, 2], width, others)
                    _add_terms(terms, 0, others, 0, state, 0, lane, factor, mask, always)
            place += step
            place_other += step_other
        for b in range(width):
            out[0, a, start + b] += state[_SQUARES * _WIDTH + b]
            out[1, a, start + b] += state[_ENERGY * _WIDTH + b]
            out[3, a, start + b] += state[_COUNT * _WIDTH + b]
        state[: 3 * _WIDTH] = 0
    partial = state[_LANES * _WIDTH :].reshape(lanes, _WIDTH)[:, :width]
    _join(partial, n_terms, out[0, a, start:stop], how)
    for b in range(width):
        out[2, a, start + b] = partial[0, b]


@compiled(parallel=True)
def _follow_parallel(x, other, strides, n_terms, given, factor, how, tasks, out):
    for t in prange(len(tasks)):
        _follow_task(
            x, other, strides, n_terms, given, factor, how, tasks[t], out
        )  # fmt: skip


@compiled()
def _follow_serial(x, other, strides, n_terms, given, factor, how, tasks, out):
    for t in range(len(tasks)):
        _follow_task(
            x, other, strides, n_terms, given, factor, how, tasks[t], out
        )  # fmt: skip


@compiled()
def _products_row(x, weight, how, squares, energy, total):
    n_out = weight.shape[1]
    lanes, mask = how.lanes, how.exponent_mask
    weights, size = weight.ravel(), (_LANES + lanes) * _WIDTH
    state = np.zeros(n_out // _WIDTH * size, x.dtype)
    for k in range(x.size):
        lane = (_LANES + (k & (lanes - 1))) * _WIDTH
        always = how.rounds_exact if k >= lanes else np.int8(0)
        start = k * n_out
        if x[k] != 0 or how.rounds_exact:
            for base in range(0, state.size, size):
                _add_terms(
                    weights, start, None, 0, state, base, base + lane, x[k], mask, always
                )  # fmt: skip
                start += _WIDTH
    for block in range(n_out // _WIDTH):
        own = state[block * size : (block + 1) * size].reshape(-1, _WIDTH)
        part = slice(block * _WIDTH, (block + 1) * _WIDTH)
        squares[part], energy[part] = own[_SQUARES], own[_ENERGY]
        _join(own[_LANES:], x.size, squares[part], how)
        total[part] = own[_LANES]


@compiled(parallel=True)
def _follow_products(x, weight, how, found):
    for row in prange(x.shape[0]):
        _products_row(
            x[row], weight, how, found[0, row], found[1, row], found[2, row]
        )  # fmt: skip


@compiled()
def _follow_products_serial(x, weight, how, found):
    for row in range(x.shape[0]):
        _products_row(
            x[row], weight, how, found[0, row], found[1, row], found[2, row]
        )  # fmt: skip
