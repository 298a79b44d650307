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

from bids_varaug.numerics.glances import flat_view
from bids_varaug.numerics.partial_sums import (
    WIDTH,
    follow_parallel,
    follow_serial,
    loop_of,
    products_parallel,
    products_serial,
    tasks_of,
)
from bids_varaug.numerics.rules import Rule

_SMALL = 2**15  # terms below which waking other threads takes longer than the work


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
    if shape[1] < min(shape[0], WIDTH):  # the many sums side by side
        operands, centres, out_view = (
            [v.swapaxes(0, 2) for v in operands], centres.swapaxes(1, 2), out.swapaxes(1, 2)
        )  # fmt: skip
    else:
        out_view = out
    flats, strides = zip(*map(flat_view, operands), strict=True)
    flats += (None,) * (2 - len(flats))
    strides = np.stack(strides * (3 - len(strides)))
    follow = follow_serial if x.size < _SMALL else follow_parallel
    follow(
        *flats, strides, x.shape[1], centres, x.dtype.type(scale * scale_other),
        loop_of(rule, x.dtype), tasks_of(out_view.shape[1:]), out_view,
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
    padded = np.zeros((len(weight), -(-n_out // WIDTH) * WIDTH), x.dtype)
    padded[:, :n_out] = weight * x.dtype.type(scales[1])
    x = np.ascontiguousarray(x * x.dtype.type(scales[0]))
    found = np.empty((3, x.shape[0], padded.shape[1]), x.dtype)
    small = x.size * n_out < 16 * _SMALL
    follow = products_serial if small else products_parallel
    follow(x, padded, loop_of(rule, x.dtype), found)
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
