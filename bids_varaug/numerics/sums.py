"""The error of sums: that of all their partial sums.

A sum of K terms rounds each partial sum s_i, a sum of products each product p_i too. To first order the errors add up,
and the variance of the result is

    ``4^-t (c_s T + c_p P)``,   ``T = sum_i 4^e(s_i)``,   ``P = sum_i 4^e(p_i)``,

with e(x) the exponent of x, t the virtual precision and c_s, c_p the variances of one rounding
(`RoundingSpecification`); ``4^e(x)`` is taken for its mean, `MEAN_SQUARE_ULP` times x^2. Terms are looked at in blocks,
in order: between the partial sums at the ends of a block, which are computed, the others are taken for a Brownian
bridge, which needs the energy ``sum p^2`` of the block alone. All of it in float64. The last rounding is left out: it
is drawn by `noise`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numba import prange

from bids_varaug.machine import compiled
from bids_varaug.numerics.noise import bits_of, float_of, torch_threads
from bids_varaug.numerics.specification import MEAN_SQUARE_ULP, RoundingSpecification

BLOCKS = 64  # of a sum, at most
_MOST = 2**21  # blocks of all sums together
_WIDTH = 256  # sums that one task handles side by side
_LINE = 64  # numbers read at once: processors read ahead within a page only
_LONG = 6144  # numbers of sums side by side in a block from which on it is long
_THINNED = 4  # of the lines of long blocks of sums side by side, one of so many tells energy and count
_FOLLOWED = 2**13  # terms of all sums together up to which each is a block of its own
_SMALL = 2**15  # terms below which waking other threads takes longer than the work


def bridge(n_terms: float, lanes: int = 1) -> tuple[float, float]:
    """Return a, b so that ``sum_i s_i^2`` is about ``a y^2 + b E`` for exchangeable terms.

    Partial sum i has mean ``y i / K`` and variance ``i (K - i) / K`` times that of the terms. With lanes, each is a
    bridge over K / lanes terms, and the tree that joins them follows. Neither the last partial sum nor the first term
    of a lane is counted: the one is the result, the other no sum.

    Parameters
    ----------
    n_terms : K
    lanes : a power of two

    Examples
    --------
    >>> a, b = bridge(1000)
    >>> round(a / 1000, 3), round(b / 1000, 3)
    (0.333, 0.167)
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
    return max(a - 1, 0.0), max(b - lanes / max(n_terms, 1.0), 0.0)


def bridge_variances(n_terms: float, spec: RoundingSpecification) -> tuple[float, float]:
    """Variance of a sum of products, without its last rounding: per squared result, and per energy."""
    a, b = bridge(n_terms, spec.lanes)
    return spec.per_energy * spec.of_partial_sum * a, spec.per_energy * (spec.of_partial_sum * b + spec.of_product)


@dataclass(frozen=True)
class Blocks:
    """Of sums, cut into blocks of terms: arrays (B, ...) float64, terms of each block (B,).

    `counts` has the terms that are not 0.
    """

    totals: np.ndarray
    energies: np.ndarray
    counts: np.ndarray
    sizes: np.ndarray

    @property
    def energy(self) -> np.ndarray:
        """Of all terms."""
        return self.energies.sum(0)

    def variance(self, spec: RoundingSpecification, of_term: float) -> np.ndarray:
        """Variance of the sums without their last rounding.

        Parameters
        ----------
        spec : how instructions round
        of_term : variance per term: `of_product` of the specification, or `of_operand` where terms are given
        """
        shape, lanes = self.totals.shape[1:], max(1, min(spec.lanes, int(self.sizes.sum())))
        found = self.totals, self.energies, self.counts
        flat = [np.ascontiguousarray(values).reshape(len(self.sizes), -1) for values in found]
        if (self.sizes == 1).all():
            sums = np.zeros((3, 1, flat[0].shape[1]))
            _add_products(flat[0], np.ones((1, len(flat[0]))), lanes, spec.rounds_exact, sums)
            squares, energy = sums[:2, 0]
        else:
            squares, energy = _add_paths(*flat, self.sizes, lanes, spec.rounds_exact)
        with np.errstate(invalid="ignore"):  # infinite terms: their sums stay as they are
            return (spec.per_energy * (spec.of_partial_sum * squares + of_term * energy)).reshape(shape)


@compiled()
def _add_paths(totals, energies, counts, sizes, lanes, rounds_exact):
    """Squares of all partial sums but the last, and energies, of sums given by their blocks (B, M)."""
    squares, energy, ends = np.zeros((3, totals.shape[1]))
    for block in range(len(sizes)):
        n = sizes[block]
        for i in range(ends.size):
            start, step, own = ends[i], totals[block, i], energies[block, i]
            square = n * start * start + start * step * (n + 1) + step * step * ((n + 1) * (2 * n + 1) / (6 * n))
            square += max(own - step * step / n, 0.0) * ((n + 1) / 6)
            if lanes > 1:  # each lane has its share of what came before, and a part of its own
                square = (square + (lanes - 1) * n * (energy[i] + own / 2)) / lanes**2
            if not rounds_exact:
                square *= counts[block, i] / n
            squares[i] += square
            ends[i] += step
            energy[i] += own
    joined = lanes // 2
    while joined >= 1:
        squares += ends**2 / joined + (1 - 1 / joined) * energy
        joined //= 2
    return np.maximum(squares - ends**2 - energy * (lanes / max(sizes.sum(), 1.0)), 0), energy


class PartialSums(NamedTuple):
    """Of sums of products, arrays (S, O) float64.

    `squares` of all partial sums but the last, and of the terms (`energy`), are those of their units in the last place
    over `MEAN_SQUARE_ULP`; `totals` are the results.
    """

    squares: np.ndarray
    energy: np.ndarray
    totals: np.ndarray

    def variance(self, spec: RoundingSpecification) -> np.ndarray:
        """Variance of the sums without their last rounding."""
        return spec.per_energy * (spec.of_partial_sum * self.squares + spec.of_product * self.energy)


def partial_sums(a: np.ndarray, b: np.ndarray, spec: RoundingSpecification) -> PartialSums:
    """Add up a matrix product as its instructions do, (S, K) times (K, O)."""
    found = np.zeros((3, b.shape[1], len(a)))
    lanes = max(1, min(spec.lanes, a.shape[1]))
    _add_products(np.ascontiguousarray(a.T, "f8"), np.ascontiguousarray(b.T, "f8"), lanes, spec.rounds_exact, found)
    return PartialSums(*found.swapaxes(1, 2))


@compiled(forceinline=True)
def _square_by_ulp(x):
    """4^e of ``x = m 2^e``, 0.5 <= m < 1, over its mean for x^2 = 1; 0 for 0."""
    power = float_of(bits_of(x) & np.int64(0x7FF0000000000000))
    return power * power * (4 / MEAN_SQUARE_ULP)


@compiled()
def _add_products(a, b, lanes, rounds_exact, found):
    sums = np.empty((lanes, a.shape[1]))
    for column in range(len(b)):
        squares, energy, totals = found[0, column], found[1, column], found[2, column]
        sums[:] = 0
        for k in range(len(a)):
            own, factors, factor = sums[k % lanes], a[k], b[column, k]
            is_sum = np.float64(k >= lanes)  # not the first term of its lane
            for s in range(factors.size):
                term = factor * factors[s]
                own[s] += term
                energy[s] += _square_by_ulp(term)
                squares[s] += _square_by_ulp(own[s]) * (is_sum if rounds_exact or term != 0 else 0.0)
        joined = lanes // 2
        while joined >= 1:
            for lane in range(joined):
                sums[lane] += sums[lane + joined]
                for s in range(totals.size):
                    squares[s] += _square_by_ulp(sums[lane, s])
            joined //= 2
        for s in range(totals.size):
            totals[s] = sums[0, s]
            squares[s] = max(squares[s] - _square_by_ulp(totals[s]), 0.0)


def sum_variance(x: torch.Tensor, dims: tuple[int, ...], spec: RoundingSpecification) -> np.ndarray:
    """Variance of the sums of x over some axes, without their last rounding; x without `dims`, float64.

    The order of the terms is that of the axes, the last the fastest. Short sums are added up term by term.
    """
    kept = [d for d in range(x.dim()) if d not in dims]
    n_terms = math.prod(x.shape[d] for d in dims)
    if n_terms > BLOCKS or x.device.type != "cpu":
        return blocks_of(x, dims).variance(spec, spec.of_operand)
    rows = x.detach().permute(*kept, *sorted(dims)).reshape(-1, n_terms).contiguous().numpy()
    found = np.empty((2, len(rows)))
    with torch_threads():
        run = _add_rows_serial if rows.size < _SMALL else _add_rows_parallel
        run(rows, max(1, min(spec.lanes, n_terms)), spec.rounds_exact, found)
    with np.errstate(invalid="ignore"):  # infinite terms: their sums stay as they are
        variance = spec.per_energy * (spec.of_partial_sum * found[0] + spec.of_operand * found[1])
    return variance.reshape([x.shape[d] for d in kept])


def _add_rows(x, lanes, rounds_exact, found):
    """Fill found (2, M) with squares of partial sums but the last, and energies, of the rows (M, K)."""
    n_terms = x.shape[1]
    for task in prange((len(x) + _LINE - 1) // _LINE):
        rows = x[task * _LINE : (task + 1) * _LINE]
        terms, sums = np.empty((n_terms, len(rows))), np.zeros((3, 1, len(rows)))
        for s in range(len(rows)):
            for k in range(n_terms):
                terms[k, s] = rows[s, k]
        _add_products(terms, np.ones((1, n_terms)), lanes, rounds_exact, sums)
        found[:, task * _LINE : task * _LINE + len(rows)] = sums[:2, 0]


_add_rows_serial, _add_rows_parallel = compiled()(_add_rows), compiled(parallel=True)(_add_rows)


def blocks_of_products(a: np.ndarray, b: np.ndarray) -> Blocks:
    """Look at the sums of a matrix product, (S, K) times (K, O); 8 terms a block, or more."""
    n_terms = a.shape[1]
    n_blocks = max(1, min(BLOCKS, n_terms // 8))
    size = -(-n_terms // n_blocks)
    n_blocks = -(-n_terms // size)
    rest = n_blocks * size - n_terms
    left = np.pad(a.astype("f8"), ((0, 0), (0, rest))).reshape(len(a), n_blocks, size).swapaxes(0, 1)
    right = np.pad(b.astype("f8"), ((0, rest), (0, 0))).reshape(n_blocks, size, -1)
    sizes = np.full(n_blocks, float(size))
    sizes[-1] -= rest
    totals, counts = left @ right, sizes[:, None, None]
    if np.count_nonzero(a) < a.size or np.count_nonzero(b) < b.size:
        counts = (left != 0).astype("f8") @ (right != 0).astype("f8")
    return Blocks(totals, left**2 @ right**2, np.broadcast_to(counts, totals.shape), sizes)


def blocks_of(
    x: torch.Tensor,
    dims: tuple[int, ...],
    other: torch.Tensor | None = None,
    centre: torch.Tensor | np.ndarray | None = None,
    other_centre: torch.Tensor | np.ndarray | None = None,
) -> Blocks:
    """Look at the sums of x, or of ``(x - centre) (other - other_centre)``.

    Parameters
    ----------
    x : real
    dims : what is summed over; the order of the terms is that of the axes, the last the fastest
    other : same shape as x
    centre, other_centre : shape of x without `dims`

    Returns
    -------
    Blocks
        of arrays of the shape of x without `dims`
    """
    kept = [d for d in range(x.dim()) if d not in dims]
    shape = [x.shape[d] for d in kept]
    before, after = _split(x, kept, dims)
    order = (*before, *sorted(dims), *after)
    outer, inner = (math.prod(x.shape[d] for d in axes) for axes in (before, after))
    n_terms = math.prod(x.shape[d] for d in dims)

    def stacked(tensor: torch.Tensor) -> torch.Tensor:
        found = tensor.detach().permute(order).reshape(outer, n_terms, inner)
        return found if found.stride(2 if inner > 1 else 1) == 1 else found.contiguous()

    def flat(values: torch.Tensor | np.ndarray | None) -> np.ndarray:
        if values is None:
            return np.zeros((outer, inner))
        values = values.detach().double().cpu().numpy() if isinstance(values, torch.Tensor) else values
        return np.ascontiguousarray(np.reshape(values, (outer, inner)), "f8")

    n_blocks = max(1, min(BLOCKS, n_terms // 8, max(24, n_terms // 512), _MOST // max(outer * inner, 1)))
    n_blocks = max(n_terms, 1) if x.numel() <= _FOLLOWED else n_blocks
    starts = np.arange(n_blocks + 1) * n_terms // n_blocks
    tensors = [stacked(t) for t in (x, other) if t is not None]
    centres = flat(centre), flat(other_centre)
    if x.device.type == "cpu":
        found = np.zeros((3, n_blocks, outer, inner))
        flats, strides = zip(*(flat_view(t) for t in tensors), strict=True)
        run = _add_blocks_serial if x.numel() < _SMALL else _add_blocks_parallel
        with torch_threads():
            run(flats[0], flats[-1], strides[0], strides[-1], other is not None, *centres, starts, found)
    else:
        found = _add_blocks_with_torch(tensors, centres, starts).cpu().numpy()
    totals, squares, counts = found.reshape(3, n_blocks, *shape)
    return Blocks(totals, squares, counts, np.diff(starts).astype("f8"))


def _split(x: torch.Tensor, kept: list[int], dims: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """Axes that are kept, before and after those summed over, so that no copy is needed.

    The kept axes keep their order. Those after the last one whose stride is larger than that of the summed axes can
    stay behind them in memory.
    """
    summed = [x.stride(d) for d in dims if x.shape[d] > 1]
    for n in range(len(kept)):
        behind = [d for d in kept[n:] if x.shape[d] > 1]
        if summed and behind and all(x.stride(d) < min(summed) for d in behind):
            return kept[:n], kept[n:]
    return kept, []


def flat_view(x: torch.Tensor) -> tuple[np.ndarray, tuple[int, ...]]:
    """The memory that a tensor looks at, from its first element on, and strides in elements."""
    extent = 1 + sum(stride * (n - 1) for stride, n in zip(x.stride(), x.shape, strict=True)) if x.numel() else 0
    return x.as_strided((extent,), (1,)).numpy(), x.stride()


@compiled(fastmath={"reassoc"}, forceinline=True)
def _add_terms(x, other, has_other, centre, other_centre):
    total, energy, count = 0.0, 0.0, 0
    for i in range(x.size):
        term = np.float64(x[i]) - centre
        if has_other:
            term *= np.float64(other[i]) - other_centre
        total += term
        energy += term * term
        count += np.int64(term != 0)
    return total, energy, count


@compiled(forceinline=True)
def _add_line(x, other, has_other, centre, other_centre, terms, total, energy, count):
    """Add a line of terms to totals, energies and counts.

    Two loops: with more arrays in one, LLVM would not check for overlaps, nor make vector instructions.
    """
    for b in range(x.size):
        term = np.float64(x[b]) - centre[b]
        if has_other:
            term *= np.float64(other[b]) - other_centre[b]
        terms[b] = term
    for b in range(x.size):
        total[b] += terms[b]
        energy[b] += terms[b] * terms[b]
        count[b] += np.float64(terms[b] != 0)


@compiled(forceinline=True)
def _add_three(a, b, c, centre, total):
    """Add three lines to totals alone."""
    for i in range(a.size):
        first, second, third = np.float64(a[i]) - centre[i], np.float64(b[i]) - centre[i], np.float64(c[i]) - centre[i]
        total[i] += (first + second) + third


@compiled(forceinline=True)
def _add_product(x, other, centre, other_centre, total):
    """Add a line of products to totals alone."""
    for i in range(x.size):
        total[i] += (np.float64(x[i]) - centre[i]) * (np.float64(other[i]) - other_centre[i])


def _add_blocks(x, other, strides, other_strides, has_other, centre, other_centre, starts, found):
    """Fill found (3, B, A, C) with totals, energies and counts of terms x[a, i, c] (and other) of each block.

    In long blocks of sums side by side, every `_THINNED`-th line of memory tells energy and count.
    """
    n_blocks, outer, inner = found.shape[1:]
    n_parts = (inner + _WIDTH - 1) // _WIDTH
    n_groups = 1 if outer * n_parts >= 64 else n_blocks  # of blocks that one task looks at
    for task in prange(outer * n_groups * n_parts):
        a, group, part = task // (n_groups * n_parts), task // n_parts % n_groups, task % n_parts
        left, right = part * _WIDTH, min(inner, (part + 1) * _WIDTH)
        here, there = a * strides[0], a * other_strides[0]
        width = right - left
        is_dense = strides[1] == width and (other_strides[1] == width or not has_other)
        together = max(1, _LINE // width) if is_dense else 1  # rows that are one line of memory
        size, step, other_step = together * width, together * strides[1], together * other_strides[1]
        memory = np.empty((6, size))
        terms, total, energy, count = memory[0], memory[1], memory[2], memory[3]
        for row in range(0, size, width):
            for b in range(width):
                memory[4, row + b], memory[5, row + b] = centre[a, left + b], other_centre[a, left + b]
        for block in range(group, n_blocks, n_groups):
            first, stop, sums = starts[block], starts[block + 1], found[:, block, a]
            if inner == 1:
                line, other_line = x[here + first : here + stop], other[there + first : there + stop]
                if has_other:
                    added = _add_terms(line, other_line, True, centre[a, 0], other_centre[a, 0])
                else:
                    added = _add_terms(line, line, False, centre[a, 0], 0.0)
                sums[0, 0], sums[1, 0], sums[2, 0] = added
                continue
            memory[1:4] = 0
            thins, seen, i = (stop - first) * width > _LONG, 0, first
            while i < stop:
                n = min(together, stop - i)
                at, other_at = here + i * strides[1] + left, there + i * other_strides[1] + left
                line, other_line = x[at : at + n * width], other[other_at : other_at + n * width]
                if has_other:
                    _add_line(line, other_line, True, memory[4], memory[5], terms, total, energy, count)
                else:
                    _add_line(line, line, False, memory[4], memory[5], terms, total, energy, count)
                seen, i = seen + n, i + together
                if not thins or i + (_THINNED - 1) * together > stop:
                    continue
                at, other_at, i = at + step, other_at + other_step, i + (_THINNED - 1) * together
                if has_other:
                    for k in range(_THINNED - 1):
                        line = x[at + k * step : at + k * step + size]
                        other_line = other[other_at + k * other_step : other_at + k * other_step + size]
                        _add_product(line, other_line, memory[4], memory[5], total)
                else:
                    line, other_line, third = x[at:], x[at + step :], x[at + 2 * step :]
                    _add_three(line[:size], other_line[:size], third[:size], memory[4], total)
            for k in range(3):
                scale = (stop - first) / seen if k > 0 else 1.0
                for row in range(0, size, width):
                    for b in range(width):
                        sums[k, left + b] += memory[1 + k, row + b] * scale


_add_blocks_serial, _add_blocks_parallel = compiled()(_add_blocks), compiled(parallel=True)(_add_blocks)


def _add_blocks_with_torch(
    tensors: list[torch.Tensor], centres: tuple[np.ndarray, np.ndarray], starts: np.ndarray
) -> torch.Tensor:
    """As `_add_blocks`, for other devices: tensors (A, n, C), returns (3, B, A, C)."""
    terms = torch.ones((), device=tensors[0].device, dtype=torch.float64)
    for tensor, centre in zip(tensors, centres, strict=False):
        terms = terms * (tensor.double() - torch.from_numpy(centre).to(tensor.device)[:, None])
    found = []
    for first, stop in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        block = terms[:, first:stop]
        found.append(torch.stack([block.sum(1), block.square().sum(1), (block != 0).sum(1).double()]))
    return torch.stack(found, 1)


def energies(x: torch.Tensor, weights: np.ndarray) -> torch.Tensor:
    """Sum over the middle axis of ``weights x^2``.

    Parameters
    ----------
    x : (A, n, C)
    weights : (n,)

    Returns
    -------
    (A, C) float64
    """
    x = x.detach()
    x = x if x.stride(2 if x.shape[2] > 1 else 1) == 1 else x.contiguous()
    if x.device.type != "cpu":
        return torch.einsum("n,anc->ac", torch.as_tensor(weights, device=x.device), x.double().square())
    found = torch.empty(x.shape[0], x.shape[2], dtype=torch.float64)
    flat, strides = flat_view(x)
    if x.numel() < _SMALL:
        _add_energies_serial(flat, strides, np.ascontiguousarray(weights, "f8"), found.numpy())
        return found
    with torch_threads():
        _add_energies_parallel(flat, strides, np.ascontiguousarray(weights, "f8"), found.numpy())
    return found


@compiled(fastmath={"reassoc"}, forceinline=True)
def _energy(x, weights):
    total = 0.0
    for i in range(x.size):
        value = np.float64(x[i])
        total += weights[i] * value * value
    return total


def _add_energies(x, strides, weights, found):
    n, (outer, inner) = weights.size, found.shape
    length = 512
    n_rows, n_parts = (outer + length - 1) // length, (inner + length - 1) // length
    for task in prange(n_rows * n_parts):
        rows = range(task // n_parts * length, min(outer, (task // n_parts + 1) * length))
        left, right = task % n_parts * length, min(inner, (task % n_parts + 1) * length)
        for a in rows:
            if inner == 1:
                found[a, 0] = _energy(x[a * strides[0] : a * strides[0] + n], weights)
                continue
            out = found[a, left:right]
            out[:] = 0
            for i in range(n):
                at = a * strides[0] + i * strides[1]
                weight, row = weights[i], x[at + left : at + right]
                for c in range(out.size):
                    value = np.float64(row[c])
                    out[c] += weight * value * value


_add_energies_serial, _add_energies_parallel = compiled()(_add_energies), compiled(parallel=True)(_add_energies)
