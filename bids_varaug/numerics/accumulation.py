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

import numpy as np
from numba import prange

from bids_varaug.compiled import compiled
from bids_varaug.numerics.noise import bits_of, float_of, like
from bids_varaug.numerics.rules import Rule

_EXPONENTS = {4: np.int32(0x7F800000), 8: np.int64(0x7FF0000000000000)}
_SMALL = 2**15  # terms below which waking other threads takes longer than the work
_WIDTH = 16  # sums that are followed side by side
_RUN = 4096  # terms whose squares are added up in the terms' own format


def bridge(n_terms: float, lanes: int = 1) -> tuple[float, float]:
    """Return a, b so that ``sum_i s_i^2`` is about ``a y^2 + b E`` for exchangeable terms.

    Partial sum i has mean ``y i / K`` and variance ``i (K - i) / K`` times that of the terms. With
    lanes, each is a bridge over K / lanes terms, and the tree that joins them follows.

    Examples
    --------
    >>> a, b = bridge(1000)
    >>> round(a / 1000, 3), round(b / 1000, 3)
    (0.334, 0.167)
    """
    lanes = max(1, min(lanes, int(n_terms)))
    k = max(n_terms / lanes, 1.0)
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


@dataclass(frozen=True)
class Walk:
    """What following the partial sums tells, all float64 and of the sums' shape.

    `sums` and `products` are the variances that come from rounding partial sums and products;
    `total` is the sum, `energy` the sum of squares.
    """

    sums: np.ndarray
    products: np.ndarray
    total: np.ndarray
    energy: np.ndarray

    @property
    def variance(self) -> np.ndarray:
        """Variance of the sum."""
        return self.sums + self.products

    def reshape(self, shape) -> Walk:
        """The same in another shape."""
        return Walk(*(np.reshape(v, shape) for v in astuple(self)))


def unthinned(thin: Walk, step: int, n_terms: int, total, rule: Rule) -> Walk:
    """Tell from every `step`-th term what following all n terms would tell, roughly.

    Partial sums of thinned terms show a drift of the terms well, but wander more than those of all
    terms do where terms are independent. What they exceed the expectation for independent terms by
    counts as drift: of all sums together, or of each where the drift is large.

    Parameters
    ----------
    thin : of every `step`-th term
    total : the sums of all terms, same shape; None: as the thinned ones say
    """
    total = thin.total * step if total is None else total
    energy = thin.energy * step
    a, b = bridge(n_terms, rule.lanes)
    coefficient = rule.per_energy * rule.of_partial_sum
    seen = thin.sums * float(step) ** 3
    spread = np.maximum(energy - total**2 / n_terms, 0) * (n_terms / rule.lanes)
    independent = coefficient * (a * total**2 + step / 2 * spread)
    model = coefficient * (a * total**2 + b * energy)
    excess = seen - independent
    pooled = model * (1 + max(excess.sum(), 0.0) / max(model.sum(), 1e-300))
    own = model + np.maximum(excess, 0)
    share = np.clip((seen.sum() / max(independent.sum(), 1e-300) - 1.5) / 2, 0, 1)
    return Walk(share * own + (1 - share) * pooled, thin.products * step, total, energy)


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
    scale, scale_other = _rough_scale(x), 1.0
    out = np.zeros((4, *shape))
    small = x.size < _SMALL
    tasks = _tasks(shape)
    exponent_mask = _EXPONENTS[x.dtype.itemsize]
    if other is None:
        follow = _follow_terms_serial if small else _follow_terms
        follow(x, x.dtype.type(scale), rule.lanes, exponent_mask, tasks, out)
    else:
        scale_other = _rough_scale(other)
        centres = np.zeros((2, *shape), x.dtype)
        for row, given in zip(centres, (centre, other_centre), strict=True):
            if given is not None:
                row[:] = given
        factor = x.dtype.type(scale * scale_other)
        follow = _follow_pairs_serial if small else _follow_pairs
        follow(x, other, centres, factor, rule.lanes, exponent_mask, tasks, out)
    sums, energy, total = out[0], out[1], out[2]
    squared = (scale * scale_other) ** 2
    sums = rule.of_partial_sum * sums * (4 * rule.unit / squared)
    energy = energy / squared
    products = 0 * energy if other is None else rule.of_product * rule.per_energy * energy
    return Walk(sums, products, total / (scale * scale_other), energy)


def products_variance(x: np.ndarray, weight: np.ndarray, rule: Rule) -> np.ndarray:
    """Return the variance of each element of a matrix product, from all partial sums.

    Parameters
    ----------
    x : (S, K), float32 or float64
    weight : (K, O), same dtype
    rule : how instructions round

    Returns
    -------
    (S, O) float64
    """
    scales = _scale(x), _scale(weight)
    x, weight = (np.ascontiguousarray(a * s) for a, s in zip((x, weight), scales, strict=True))
    squares = np.empty((2, x.shape[0], weight.shape[1]), x.dtype)
    small = x.size * weight.shape[1] < 16 * _SMALL
    follow = _follow_products_serial if small else _follow_products
    follow(x, weight, rule.lanes, _EXPONENTS[x.dtype.itemsize], squares)
    sums, products = squares.astype("f8")
    variance = rule.of_partial_sum * sums + rule.of_product * products
    return variance * (4 * rule.unit / math.prod(scales) ** 2)


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
# nothing, nor does the first term of a lane.


@compiled()
def _power(value, exponent_mask):
    return float_of(like(bits_of(value) & exponent_mask, exponent_mask))


@compiled()
def _add_terms(terms, partial, sums, energy, exponent_mask):
    """One term of each sum, side by side."""
    zero, one = like(0.0, terms[0]), like(1.0, terms[0])
    for b in range(terms.size):
        term, before = terms[b], partial[b]
        value = before + term
        partial[b] = value
        unit = _power(value, exponent_mask)
        inexact = (one if term != zero else zero) * (one if before != zero else zero)
        sums[b] += unit * unit * inexact
        energy[b] += term * term


@compiled()
def _join(partial, sums, exponent_mask):
    """Add the lanes (L, B) pairwise."""
    joined = partial.shape[0] // 2
    while joined >= 1:
        for lane in range(joined):
            for b in range(partial.shape[1]):
                if partial[lane + joined, b] != 0:
                    value = partial[lane, b] + partial[lane + joined, b]
                    if partial[lane, b] != 0:
                        unit = np.float64(_power(value, exponent_mask))
                        sums[b] += unit * unit
                    partial[lane, b] = value
        joined //= 2


@compiled()
def _terms_task(x, scale, lanes, exponent_mask, task, out):
    a, start, stop = task
    width = stop - start
    partial = np.zeros((lanes, width), x.dtype)
    sums, energy = np.zeros(width, x.dtype), np.zeros(width, x.dtype)
    terms = np.zeros(width, x.dtype)
    for begin in range(0, x.shape[1], _RUN):
        for i in range(begin, min(begin + _RUN, x.shape[1])):
            for b in range(width):
                terms[b] = x[a, i, start + b] * scale
            _add_terms(terms, partial[i & (lanes - 1)], sums, energy, exponent_mask)
        for b in range(width):
            out[0, a, start + b] += sums[b]
            out[1, a, start + b] += energy[b]
            sums[b] = energy[b] = 0
    _join(partial, out[0, a, start:stop], exponent_mask)
    for b in range(width):
        out[2, a, start + b] = partial[0, b]


@compiled()
def _pairs_task(x, other, centres, factor, lanes, exponent_mask, task, out):
    a, start, stop = task
    width = stop - start
    partial = np.zeros((lanes, width), x.dtype)
    sums, energy = np.zeros(width, x.dtype), np.zeros(width, x.dtype)
    terms = np.zeros(width, x.dtype)
    centre, other_centre = centres[0, a, start:stop], centres[1, a, start:stop]
    for begin in range(0, x.shape[1], _RUN):
        for i in range(begin, min(begin + _RUN, x.shape[1])):
            for b in range(width):
                difference = other[a, i, start + b] - other_centre[b]
                terms[b] = (x[a, i, start + b] - centre[b]) * difference * factor
            _add_terms(terms, partial[i & (lanes - 1)], sums, energy, exponent_mask)
        for b in range(width):
            out[0, a, start + b] += sums[b]
            out[1, a, start + b] += energy[b]
            sums[b] = energy[b] = 0
    _join(partial, out[0, a, start:stop], exponent_mask)
    for b in range(width):
        out[2, a, start + b] = partial[0, b]


@compiled(parallel=True)
def _follow_terms(x, scale, lanes, exponent_mask, tasks, out):
    for t in prange(len(tasks)):
        _terms_task(x, scale, lanes, exponent_mask, tasks[t], out)


@compiled()
def _follow_terms_serial(x, scale, lanes, exponent_mask, tasks, out):
    for t in range(len(tasks)):
        _terms_task(x, scale, lanes, exponent_mask, tasks[t], out)


@compiled(parallel=True)
def _follow_pairs(x, other, centres, factor, lanes, exponent_mask, tasks, out):
    for t in prange(len(tasks)):
        _pairs_task(x, other, centres, factor, lanes, exponent_mask, tasks[t], out)


@compiled()
def _follow_pairs_serial(x, other, centres, factor, lanes, exponent_mask, tasks, out):
    for t in range(len(tasks)):
        _pairs_task(x, other, centres, factor, lanes, exponent_mask, tasks[t], out)


@compiled()
def _add_products(factor, weights, partial, sums, products, exponent_mask):
    zero, one = like(0.0, factor), like(1.0, factor)
    for c in range(weights.size):
        product, before = factor * weights[c], partial[c]
        unit = _power(product, exponent_mask)
        products[c] += unit * unit
        value = before + product
        partial[c] = value
        unit = _power(value, exponent_mask)
        inexact = (one if product != zero else zero) * (one if before != zero else zero)
        sums[c] += unit * unit * inexact


@compiled()
def _products_row(x, weight, lanes, exponent_mask, sums, products):
    partial = np.zeros((lanes, weight.shape[1]), x.dtype)
    sums[:] = 0
    products[:] = 0
    for k in range(x.size):
        if x[k] != 0:
            lane = partial[k & (lanes - 1)]
            _add_products(x[k], weight[k], lane, sums, products, exponent_mask)
    _join(partial, sums, exponent_mask)


@compiled(parallel=True)
def _follow_products(x, weight, lanes, exponent_mask, squares):
    for row in prange(x.shape[0]):
        _products_row(x[row], weight, lanes, exponent_mask, squares[0, row], squares[1, row])


@compiled()
def _follow_products_serial(x, weight, lanes, exponent_mask, squares):
    for row in range(x.shape[0]):
        _products_row(x[row], weight, lanes, exponent_mask, squares[0, row], squares[1, row])
