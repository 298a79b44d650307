"""Noise of softmax and log-softmax, forward and backward.

The reference computes, each operation one rounding, ``d = x - max(x)``, ``q = exp(d)``,
``p = q / total(q)``. Rounding d, which is up to 100 times larger than 1, changes q by a relative
error of that many ulps: it outweighs the rest. Errors of the total are shared by a row.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numba import prange

from bids_varaug.machine import compiled
from bids_varaug.numerics.bits import bits_of, float_of, like
from bids_varaug.numerics.last_rounding import finish, finished
from bids_varaug.numerics.perturb import perturb_
from bids_varaug.numerics.random_numbers import line_key, random_word, remixed, standard
from bids_varaug.numerics.reductions import draws
from bids_varaug.numerics.rules import Rule


class Coefficients(NamedTuple):
    """Absolute variances: `of_ulp` per squared ulp 4^e, `of_value` per squared value.

    `of_sum` and `of_product` are those of a partial sum and a product, per squared ulp.
    """

    of_sum: np.float32
    of_product: np.float32
    of_ulp: np.float32
    of_value: np.float32
    lanes: int


def _coefficients(rule: Rule) -> Coefficients:
    values = (
        rule.of_partial_sum * rule.unit,
        rule.of_product * rule.unit,
        rule.of_partial_sum * rule.unit,
        rule.of_partial_sum * rule.per_energy,
    )
    return Coefficients(*map(np.float32, values), rule.lanes)


def perturb_softmax(y: torch.Tensor, dim: int, is_log: bool, rule: Rule, stream: int) -> None:
    """Perturb the result of softmax (or log-softmax) along `dim`, in place.

    Parameters
    ----------
    y : float32 or float64
    """
    if y.device.type != "cpu":
        _perturb_with_torch(y, dim, is_log, rule, stream)
        return
    rows, write_back = _rows(y, dim)
    values = rows.numpy()
    _softmax_rows(
        values, is_log, _coefficients(rule), np.uint64(stream), finish(rule, values.dtype)
    )
    write_back()


def perturb_softmax_gradient(
    dx: torch.Tensor, gradient, y, dim: int, is_log: bool, rule: Rule, stream: int
) -> None:
    """Perturb the gradient of softmax (or log-softmax) with respect to its input, in place.

    ``dx = y (gradient - total(gradient y))``, or ``gradient - exp(y) total(gradient)``.

    Parameters
    ----------
    dx, gradient, y : one shape, float32 or float64
    """
    if dx.device.type != "cpu":
        perturb_(dx, dx.abs() * float(np.sqrt(3 * rule.of_result * rule.per_energy)), rule, stream)
        return
    rows, write_back = _rows(dx, dim)
    values = rows.numpy()
    others = [t.detach().movedim(dim, -1).reshape(rows.shape).numpy() for t in (gradient, y)]
    _gradient_rows(
        values, *others, is_log, _coefficients(rule), np.uint64(stream), finish(rule, values.dtype)
    )
    write_back()


def _rows(y: torch.Tensor, dim: int):
    """(..., n, ...) -> (R, n) and what writes it back where it is a copy."""
    moved = y.detach().movedim(dim, -1) if y.dim() else y.detach().reshape(1)
    rows = moved.reshape(-1, moved.shape[-1])
    if rows.data_ptr() == moved.data_ptr():
        return rows, lambda: None
    return rows, lambda: moved.copy_(rows.reshape(moved.shape))


_ROWS = 64  # that one task handles


@compiled()
def _exp2(x):
    """2^x to 3e-4, for weights of variances: the loop becomes vector instructions."""
    x = max(x, np.float32(-126))
    whole = np.floor(x)
    f = x - whole
    power = float_of(np.int32(np.int32(np.int32(whole) + np.int32(127)) << np.int32(23)))
    f = np.float32(1) + f * (
        np.float32(0.69543) + f * (np.float32(0.22693) + f * np.float32(0.07739))
    )
    return power * f


@compiled()
def _log2(x):
    """log2(x) to 2e-3 for positive x; -127 for 0."""
    bits = bits_of(x)
    exponent = np.float32(np.int32(bits >> np.int32(23)) - np.int32(127))
    m = float_of(np.int32(np.int32(bits & np.int32(0x7FFFFF)) | np.int32(0x3F800000)))
    return exponent + (
        np.float32(-2.13396) + m * (np.float32(3.01098) + m * (
            np.float32(-1.02963) + m * np.float32(0.15394)))
    )  # fmt: skip


@compiled()
def _square_ulp(x):
    """4^e of x = m 2^e, 0.5 <= m < 1."""
    unit = np.float32(2) * float_of(np.int32(bits_of(x) & np.int32(0x7F800000)))
    return unit * unit


@compiled()
def _follow(terms, lanes):
    """Total of the terms, in lanes, and the squared ulps of its inexact partial sums."""
    partial = np.zeros(lanes, np.float64)
    ulps = 0.0
    for i in range(terms.size):
        before = partial[i & (lanes - 1)]
        value = before + terms[i]
        partial[i & (lanes - 1)] = value
        ulps += _square_ulp_if(value, before != 0 and terms[i] != 0)
    joined = lanes // 2
    while joined >= 1:
        for lane in range(joined):
            value = partial[lane] + partial[lane + joined]
            ulps += _square_ulp_if(value, partial[lane] != 0 and partial[lane + joined] != 0)
            partial[lane] = value
        joined //= 2
    return partial[0], ulps


@compiled()
def _square_ulp_if(value, inexact):
    power = float_of(bits_of(value) & np.int64(0x7FF0000000000000))
    return 4.0 * power * power if inexact else 0.0


@compiled(fastmath={"reassoc"})
def _sum(values):
    """In any order."""
    total = values[0] * 0
    for value in values:
        total += value
    return total


@compiled(fastmath={"reassoc"})
def _sum_squares(values):
    """In any order, float64."""
    total = 0.0
    for value in values:
        total += np.float64(value) * np.float64(value)
    return total


@compiled()
def _softmax_row(y, is_log, k, key, how, distance, power, relative):
    """One row; the last three arrays are working memory of its length, float32."""
    first, second = np.uint32(key), np.uint32(key >> np.uint64(32))
    n, one = y.size, np.float32(1)
    top = y[0]
    for i in range(1, n):
        top = max(top, y[i])
    scale = np.float32(1.4426950408889634)
    if is_log:
        for i in range(n):
            distance[i] = np.float32(y[i] - top) * scale
            power[i] = _exp2(distance[i])
    else:  # q = exp(x - max) = p / max(p)
        inverse = one / np.float32(top)
        for i in range(n):
            power[i] = np.float32(y[i]) * inverse
            distance[i] = _log2(power[i])
    of_ulp, of_value = np.sqrt(k.of_ulp), np.sqrt(k.of_value)
    for i in range(n):
        word = random_word(np.uint32(2 * i), first, second)
        unit = np.sqrt(_square_ulp(distance[i] * np.float32(0.6931472)))
        of_distance = of_ulp * unit * standard(word, one)
        of_power = of_value * standard(remixed(word, second), one)
        inexact = one if distance[i] != np.float32(0) else np.float32(0)
        shared = power[i] * (of_distance + of_power) * inexact
        relative[i] = (of_distance if is_log else of_distance + of_power) * inexact
        distance[i] = shared
    total, ulps, shared = power[0], np.float32(0), _sum(distance)
    for i in range(1, n):
        total += power[i]
        ulps += _square_ulp(total)
    if k.lanes > 1:
        ulps = np.float32(_follow(power, k.lanes)[1])
    word = random_word(np.uint32(2 * n), first, second)
    shared = (shared + np.sqrt(k.of_sum * ulps) * standard(word, one)) / total
    if is_log:  # the logarithm of the total is -max(y)
        unit = np.sqrt(_square_ulp(np.float32(top)))
        shared += of_ulp * unit * standard(remixed(word, second), one)
    for i in range(n):
        word = random_word(np.uint32(2 * i + 1), first, second)
        noise = like(relative[i] - shared, y[i])
        noise = noise if is_log else noise * y[i]
        y[i] = finished(y[i], noise, word, how)


@compiled(parallel=True)
def _softmax_rows(y, is_log, k, stream, how):
    n = y.shape[1]
    for task in prange((len(y) + _ROWS - 1) // _ROWS):
        memory = np.empty((3, n), np.float32)
        for row in range(task * _ROWS, min(len(y), (task + 1) * _ROWS)):
            key = line_key(stream, row)
            _softmax_row(y[row], is_log, k, key, how, memory[0], memory[1], memory[2])


@compiled()
def _gradient_row(dx, gradient, y, is_log, k, key, how, factor, terms):
    first, second = np.uint32(key), np.uint32(key >> np.uint64(32))
    n, one = dx.size, like(1.0, dx[0])
    for i in range(n):
        factor[i] = like(_exp2(np.float32(y[i]) * np.float32(1.442695)), one) if is_log else y[i]
        terms[i] = gradient[i] if is_log else gradient[i] * y[i]
    total, ulps, products = terms[0], 0.0, _sum_squares(terms)
    for i in range(1, n):
        total += terms[i]
        if terms[i] != 0:
            ulps += np.float64(total) * np.float64(total)
    # Squares times their mean squared ulp: the same on average, and without underflow
    ratio = k.of_value / k.of_ulp
    if k.lanes > 1:
        ulps = _follow(terms, k.lanes)[1] / ratio
    variance = k.of_sum * ratio * ulps + (0.0 if is_log else k.of_product * ratio * products)
    word = random_word(np.uint32(2 * n), first, second)
    shared = like(np.sqrt(variance), one) * standard(word, one)
    of_value = like(np.sqrt(k.of_value), one)
    for i in range(n):
        word = random_word(np.uint32(2 * i), first, second)
        if is_log:  # g - p total(g): p and its product with the total are rounded
            own = like(1.4142135, one) * of_value * factor[i] * total
        else:  # y (g - total): the difference is rounded
            own = of_value * factor[i] * (gradient[i] - total)
        noise = own * standard(word, one) - factor[i] * shared
        dx[i] = finished(dx[i], noise, remixed(word, second), how)


@compiled(parallel=True)
def _gradient_rows(dx, gradient, y, is_log, k, stream, how):
    n = dx.shape[1]
    for task in prange((len(dx) + _ROWS - 1) // _ROWS):
        memory = np.empty((2, n), dx.dtype)
        for row in range(task * _ROWS, min(len(dx), (task + 1) * _ROWS)):
            key = line_key(stream, row)
            _gradient_row(dx[row], gradient[row], y[row], is_log, k, key, how, memory[0], memory[1])


def _perturb_with_torch(y, dim, is_log, rule: Rule, stream: int) -> None:
    """Forward on other devices: the same model, errors of the total by its usual size."""
    values = y.detach()
    top = values.amax(dim, keepdim=True)
    distance = values - top if is_log else torch.log(values / top)
    power = torch.exp(distance)
    total = power.sum(dim, keepdim=True)
    _, exponent = torch.frexp(distance)
    k = _coefficients(rule)
    own = k.of_ulp * torch.exp2(2.0 * exponent.to(y.dtype)) + (0 if is_log else k.of_value)
    own = torch.where(distance == 0, 0.0, own)
    n = y.shape[dim]
    of_total = (power**2 * (own + is_log * k.of_value)).sum(dim, keepdim=True) / total**2
    of_total = of_total + k.of_value * n / 3
    shared = torch.as_tensor(draws(stream, tuple(total.shape)), dtype=y.dtype, device=y.device)
    common = -shared * of_total.sqrt()
    values += common if is_log else common * values
    deviation = own.sqrt() if is_log else own.sqrt() * values.abs()
    perturb_(y, torch.nan_to_num(deviation, 0.0, 0.0), rule, stream)
