"""The noise of a matrix product on the CPU, by its energy and a sample of its elements.

What `products.perturb_matrix_product` does in steps, in two compiled calls: an optimiser multiplies
many small matrices, and the steps' overhead would cost more than the products.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch

from bids_varaug.machine import compiled
from bids_varaug.numerics.accumulation import bridge
from bids_varaug.numerics.channel_noise import HYPOTENUSE, perturb_rows
from bids_varaug.numerics.glances import flat_view, row_energies
from bids_varaug.numerics.last_rounding import LARGE, finish
from bids_varaug.numerics.partial_sums import WIDTH, loop_of, products_row
from bids_varaug.numerics.perturb import TILE
from bids_varaug.numerics.random_numbers import BYTES_SD, line_key
from bids_varaug.numerics.rules import Rule

_ROWS = 64  # rows of a result that one task handles, at most
_MOST = 128  # terms from which on an energy is that of every second, third, ... term


class Shares(NamedTuple):
    """Variances per squared partial sum and per squared product, and of the last rounding."""

    of_square: float  # per square of a power of two, as the loops count them
    of_product: float  # per energy
    of_result: float  # per squared result, by `bridge`
    of_energy: float  # per energy, by `bridge`
    last: float  # per squared result


def perturb_by_sample(
    y: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    rule: Rule,
    last: float,
    sample: tuple[int, int],
    stream: int,
) -> None:
    """Perturb y = a b + bias in place, so that the noise agrees with all partial sums of a sample.

    Parameters
    ----------
    y : (M, N), float32 or float64, on the CPU, any strides
    a : (M, K), same dtype
    b : (K, N)
    bias : (N,) or (1,), or None
    rule : how instructions round
    last : variance of the last rounding per squared result, where the kernel adds that by itself
    sample : rows and columns of the sample
    stream : names the random numbers, 64 bits
    """
    (m, k), n = a.shape, b.shape[1]
    dense = y.contiguous()
    values, flat_a, flat_b = (t.detach().numpy() for t in (dense, a, b))
    dtype = values.dtype
    of_y, of_energy = bridge(k, rule.lanes)
    shares = Shares(
        rule.of_partial_sum * 4 * rule.unit,
        rule.of_product * rule.per_energy,
        rule.of_partial_sum * of_y * rule.per_energy,
        (rule.of_partial_sum * of_energy + rule.of_product) * rule.per_energy,
        last,
    )
    columns = np.zeros((5, n * max(1, TILE // n)), dtype)  # several rows at once
    if bias is not None:
        columns[0, :n] = bias.detach().numpy()
    roots = np.zeros(m, dtype)
    calm = _model(
        *flat_view(flat_a), *flat_view(flat_b), k, n, sample, np.uint64(stream),
        loop_of(rule, dtype), shares, columns, roots,
    )  # fmt: skip
    line = math.gcd(m, _ROWS)
    perturb_rows(
        values.reshape(-1), values[:0, 0], values[:0, 0], columns,
        np.array([1, 1, m // line, line, n]), roots.reshape(1, 1, -1, line), 0, calm,
        np.uint64(stream), finish(rule, dtype),
    )  # fmt: skip
    if dense is not y:
        y.copy_(dense)


@compiled()
def _model(a, strides_a, b, strides_b, k, n_out, sample, stream, loop, shares, columns, roots):
    """Fill rows 1 and 2 of `columns` and the roots of the rows' energies, as `perturb_rows` wants
    them; return whether noise of tame numbers is tame.
    """
    n_rows, n_columns = sample
    of_rows, of_columns = roots, np.zeros(n_out, roots.dtype)
    _energies(a, strides_a, k, of_rows)
    _energies(b, strides_b[::-1], k, of_columns)
    rows = _chosen(n_rows, of_rows.size, stream)
    chosen = _chosen(n_columns, n_out, ~stream)
    # Powers of two near the largest magnitude change nothing but keep squares from underflow
    x, weight = np.empty((n_rows, k), a.dtype), np.zeros((k, _padded(n_columns)), a.dtype)
    for s in range(n_rows):
        for i in range(k):
            x[s, i] = a[rows[s] * strides_a[0] + i * strides_a[1]]
    for i in range(k):
        for c in range(n_columns):
            weight[i, c] = b[i * strides_b[0] + chosen[c] * strides_b[1]]
    scale = _normalised(x) * _normalised(weight)
    squares, terms = np.empty(weight.shape[1], a.dtype), np.empty(weight.shape[1], a.dtype)
    total = np.empty(weight.shape[1], a.dtype)
    truth, model = np.zeros(n_columns), np.zeros(n_columns)
    for s in range(n_rows):
        products_row(x[s], weight, loop, squares, terms, total)
        for c in range(n_columns):
            truth[c] += shares.of_square * np.float64(squares[c]) * scale**2
            truth[c] += shares.of_product * np.float64(terms[c]) * scale**2
            both = np.float64(of_rows[rows[s]]) * np.float64(of_columns[chosen[c]]) / k
            model[c] += shares.of_result * (np.float64(total[c]) * scale) ** 2
            model[c] += shares.of_energy * both
    pooled, largest, offset = _ratio(truth.sum(), model.sum()), 0.0, 0.0
    for n in range(n_out):
        factor = _ratio(truth[n], model[n]) if n_columns == n_out else pooled
        quadratic = max(factor * shares.of_result - shares.last, 0.0)
        linear = max(factor * shares.of_energy * np.float64(of_columns[n]) / k, 0.0)
        # The kernels' g is that of whole numbers, their root one of larger and smaller part
        columns[1, n] = np.sqrt(quadratic) / (BYTES_SD * HYPOTENUSE)
        columns[2, n] = np.sqrt(linear) / (BYTES_SD * HYPOTENUSE)
        largest = max(largest, columns[1, n], columns[2, n])
        offset = max(offset, abs(columns[0, n]))
    for start in range(n_out, columns.shape[1], n_out):
        columns[:, start : start + n_out] = columns[:, :n_out]
    for row in range(roots.size):
        roots[row] = np.sqrt(of_rows[row])
    return largest < 1 and max(offset, largest * roots.max()) < LARGE


@compiled()
def _energies(x, strides, k, energy):
    """Add up squares of rows: of all terms, or of some where there are many."""
    step = max(1, k // _MOST)
    n = (k + step - 1) // step
    row_energies(x, np.array([strides[0], strides[1] * step]), n, 0, energy)
    energy *= energy.dtype.type(k / n)


@compiled()
def _chosen(n, size, stream):
    """One of every `size` / n numbers, at random; all where n is `size`."""
    chosen = np.empty(n, np.int64)
    for i in range(n):
        first, stop = i * size // n, (i + 1) * size // n
        chosen[i] = first + np.int64(line_key(stream, i) >> np.uint64(33)) % (stop - first)
    return chosen


@compiled()
def _padded(n):
    return (n + WIDTH - 1) // WIDTH * WIDTH


@compiled()
def _normalised(x):
    """Divide x by a power of two near its largest magnitude; return it."""
    largest = 0.0
    for value in x.flat:
        largest = max(largest, abs(np.float64(value)))
    if not 0 < largest < np.inf:
        return 1.0
    scale = 2.0 ** math.frexp(largest)[1]
    x *= x.dtype.type(1 / scale)
    return scale


@compiled()
def _ratio(truth, model):
    """Truth / model, 1 where the model is 0 or either is no number."""
    if not model > 0:
        return 1.0
    ratio = truth / model
    return ratio if np.isfinite(ratio) else 1.0
