"""Noise of softmax and log-softmax.

Each operation one rounding, ``d = x - max(x)``, ``q = exp(d)``, ``p = q / total(q)``. Rounding d, which is up to 100
times larger than 1, changes q by a relative error of that many ulps: it outweighs the rest. Errors of the total are
shared by a row. (Gradients are decomposed.)
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numba import prange

from bids_varaug.machine import compiled
from bids_varaug.numerics.call import Call
from bids_varaug.numerics.noise import (
    bits_of,
    byte_sum,
    chunk_key,
    float_of,
    last_rounding,
    like,
    next_word,
    perturb_,
    random_word,
    rounded,
    torch_threads,
)
from bids_varaug.numerics.norms import draws
from bids_varaug.numerics.specification import DITHER, MEAN_SQUARE_ULP, RoundingSpecification
from bids_varaug.numerics.sums import bridge

_ROWS = 64  # that one task handles


class Deviations(NamedTuple):
    """Of one rounding: per ulp, per value, and of a total per its root of squared partial sums; byte sums in them."""

    of_ulp: np.float32
    of_value: np.float32
    of_total: np.float32


def _deviations(spec: RoundingSpecification, n_terms: int) -> Deviations:
    of_value = np.sqrt(spec.of_partial_sum * spec.per_energy)
    a, _ = bridge(n_terms, spec.lanes)
    lanes = np.sqrt((a + 1) / (n_terms / 3 + 1 / 3))  # of positive terms
    values = of_value / np.sqrt(MEAN_SQUARE_ULP), of_value, of_value * lanes
    return Deviations(*(np.float32(v / 147.8011276006757) for v in values))


def softmax(call: Call, result: torch.Tensor) -> None:
    """Perturb the result of softmax or log-softmax."""
    if not result.numel():
        return
    dim, is_log = call.given["dim"], call.name == "_log_softmax"
    moved = result.movedim(dim, -1) if result.dim() else result.reshape(1)
    if result.device.type != "cpu":
        _perturb_with_torch(moved, is_log, call)
        return
    rows = moved.reshape(-1, moved.shape[-1])
    values = rows.numpy()
    x = call.given["self"].to(result.dtype)
    inputs = x.movedim(dim, -1).reshape(rows.shape) if result.dim() else x.reshape(1, 1)
    how = last_rounding(call.spec, result.dtype)
    with torch_threads():
        _softmax_rows(
            values, inputs.numpy(), is_log, call.spec.rounds_exact,
            _deviations(call.spec, values.shape[1]), np.uint64(call.stream()), how,
        )  # fmt: skip
    if rows.data_ptr() != moved.data_ptr():
        moved.copy_(rows.reshape(moved.shape))


@compiled(forceinline=True)
def _exp2(x):
    """2^x to 3e-4, for weights of variances: the loop becomes vector instructions."""
    x = max(np.float32(x), np.float32(-126))
    whole = np.float32(np.floor(x))
    f = np.float32(x - whole)
    power = float_of(np.int32(np.int32(np.int32(whole) + np.int32(127)) << np.int32(23)))
    inner = np.float32(np.float32(0.22693) + f * np.float32(0.07739))
    return power * np.float32(np.float32(1) + f * np.float32(np.float32(0.69543) + f * inner))


@compiled(forceinline=True)
def _ulp(x):
    """2^e of x = m 2^e, 0.5 <= m < 1."""
    return np.float32(2) * float_of(np.int32(bits_of(np.float32(x)) & np.int32(0x7F800000)))


@compiled()
def _softmax_row(y, x, is_log, rounds_exact, of, key, how, distance, power, relative):
    """One row; the last three arrays are working memory of its length, float32."""
    first, second = np.uint32(key), np.uint32(key >> np.uint64(32))
    n, zero = y.size, like(0, how.width)
    top, largest = y[0], x[0]
    for i in range(1, n):
        top, largest = max(top, y[i]), max(largest, x[i])
    for i in range(n):
        difference = like(x[i] - largest, zero)
        distance[i] = np.float32(difference)
        power[i] = _exp2(distance[i] * np.float32(1.4426950408889634))
        # What the difference rounds away, as a fraction f of an ulp: the variance is f (1 - f), on average 1/6
        shift = like(difference - x[i], zero)
        lost = np.float32(abs(like(x[i] - like(difference - shift, zero), zero) - like(largest + shift, zero)))
        fraction = lost / max(_ulp(distance[i]) * np.float32(how.ulp * like(0.5, zero)), np.float32(1e-38))
        share = np.sqrt(max(np.float32(6) * fraction * (np.float32(1) - fraction), np.float32(0)))
        relative[i] = np.float32(1) if rounds_exact else share
    for i in range(n):
        word = random_word(np.uint32(2 * i), first, second)
        of_distance = of.of_ulp * _ulp(distance[i]) * relative[i] * np.float32(byte_sum(word))
        both = np.float32(of_distance + of.of_value * np.float32(byte_sum(next_word(word, first))))
        inexact = np.float32(1) if distance[i] != np.float32(0) else np.float32(0)
        relative[i] = (of_distance if is_log else both) * inexact
        distance[i] = power[i] * both * inexact
    total, squares, shared = np.float32(power[0]), np.float32(0), np.float32(distance[0])
    for i in range(1, n):
        total += power[i]
        squares += np.float32(total * total)
        shared += distance[i]
    word = random_word(np.uint32(2 * n), first, second)
    shared = np.float32((shared + of.of_total * np.sqrt(squares) * np.float32(byte_sum(word))) / total)
    if is_log:  # the logarithm of the total is -max(y)
        shared += of.of_ulp * _ulp(np.float32(top)) * np.float32(byte_sum(next_word(word, first)))
    for i in range(n):
        noise = like(relative[i] - shared, zero)
        old, bits = bits_of(y[i]), bits_of(like(y[i] + (noise if is_log else noise * y[i]), zero))
        finite = like(like(bits & how.top, bits) != how.top, bits)
        moved = like(old + like(like(bits - old, bits) & like(-finite, bits), bits), bits)
        word = random_word(np.uint32(2 * i + 1), first, second)
        if how.kind == DITHER:
            y[i] = float_of(rounded(moved, word, zero, DITHER, how))
        else:
            y[i] = float_of(rounded(moved, word, zero, how.kind, how))


@compiled(parallel=True)
def _softmax_rows(y, x, is_log, rounds_exact, of, stream, how):
    n = y.shape[1]
    for task in prange((len(y) + _ROWS - 1) // _ROWS):
        memory = np.empty((3, n), np.float32)
        for row in range(task * _ROWS, min(len(y), (task + 1) * _ROWS)):
            key = chunk_key(stream, row)
            _softmax_row(
                y[row], x[row], is_log, rounds_exact, of, key, how, memory[0], memory[1], memory[2]
            )


def _perturb_with_torch(y: torch.Tensor, is_log: bool, call: Call) -> None:
    """For other devices, rows along the last axis: the same model, errors of the total by their usual size."""
    spec, top = call.spec, y.amax(-1, keepdim=True)
    distance = y - top if is_log else torch.log(y / top)
    power = torch.exp(distance)
    total = power.sum(-1, keepdim=True)
    of_value = spec.of_partial_sum * spec.per_energy
    own = of_value / MEAN_SQUARE_ULP * torch.exp2(2.0 * torch.frexp(distance)[1]) + (0 if is_log else of_value)
    own = torch.where(distance == 0, 0.0, own)
    of_total = (power**2 * (own + is_log * of_value)).sum(-1, keepdim=True) / total**2 + of_value * y.shape[-1] / 3
    shared = torch.as_tensor(draws(call.stream(), tuple(total.shape)), dtype=y.dtype, device=y.device)
    common = -shared * of_total.sqrt().to(y.dtype)
    deviation = own.sqrt() if is_log else own.sqrt() * y.abs()
    y += torch.nan_to_num(common if is_log else common * y, 0.0, 0.0)
    perturb_(y, torch.nan_to_num(deviation, 0.0, 0.0), spec, call.stream(1))
