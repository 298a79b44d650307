"""Noise of sums, means, variances and norms."""

from __future__ import annotations

import math

import numpy as np
import torch

from bids_varaug.numerics.accumulation import (
    Walk,
    bridge,
    follow_sums,
    modelled_variance,
    unthinned,
)
from bids_varaug.numerics.rules import How, Rule

# If not exact: of how many terms of so many sums or more every how many-th is looked at
_LARGE, _FEW, _STEP = 2**19, 8, 8


def follow(
    x: torch.Tensor,
    dims: tuple[int, ...],
    how: How,
    other: torch.Tensor | None = None,
    centre: torch.Tensor | None = None,
    other_centre: torch.Tensor | None = None,
    total: np.ndarray | None = None,
) -> Walk:
    """Follow the partial sums of x, or of ``(x - centre) (other - other_centre)``.

    If not exact, of many large sums only every `_STEP`-th term is looked at.

    Parameters
    ----------
    x : float32 or float64
    dims : what is summed over; the order of the terms is that of the axes, the last the fastest
    other : same shape as x
    centre, other_centre : shape of x without `dims`
    total : the sums where they are known, shape of x without `dims`

    Returns
    -------
    Walk
        shape of x without `dims`
    """
    kept = [d for d in range(x.dim()) if d not in dims]
    shape = [x.shape[d] for d in kept]
    x, other = x.detach(), None if other is None else other.detach()
    on_cpu = x.device.type == "cpu"
    before, after = _split(x, dims) if on_cpu else (kept, [])
    order = (*before, *sorted(dims), *after)
    outer, inner = (math.prod(x.shape[d] for d in axes) for axes in (before, after))
    n_terms = math.prod(x.shape[d] for d in dims)
    few = how.exact or outer * inner < _FEW or x.numel() < _LARGE or n_terms < 64 * _STEP
    step = 1 if few else _STEP

    def stacked(tensor):
        if tensor is None:
            return None
        return tensor.permute(order).reshape(outer, n_terms, inner)[:, step // 2 :: step]

    def flat(values):
        return None if values is None else values.reshape(outer, inner)

    arguments = stacked(x), how.rule, stacked(other), flat(centre), flat(other_centre)
    if on_cpu:
        found = follow_sums(*(a.numpy() if isinstance(a, torch.Tensor) else a for a in arguments))
    else:
        found = _follow_with_torch(*arguments)
    if step > 1:
        total = None if total is None else np.asarray(total, "f8").reshape(outer, inner)
        found = unthinned(found, step, total, how.rule)
    return found.reshape(shape)


def _split(x: torch.Tensor, dims: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """Axes that are kept, before and after those summed over, so that no copy is needed.

    The kept axes keep their order. Those after the last one whose stride is larger than that of the
    summed axes can stay behind them in memory.
    """
    kept = [d for d in range(x.dim()) if d not in dims]
    summed = [x.stride(d) for d in dims if x.shape[d] > 1]
    if not summed:
        return kept, []
    for n in range(len(kept)):
        behind = [d for d in kept[n:] if x.shape[d] > 1]
        if behind and all(x.stride(d) < min(summed) for d in behind):
            return kept[:n], kept[n:]
    return kept, []


def _follow_with_torch(x, rule: Rule, other, centre, other_centre) -> Walk:
    """`follow_sums` for other devices: partial sums in one lane; with lanes, for a bridge."""
    terms = x.double()
    if other is not None:
        for values, middle in ((terms, centre), (other.double(), other_centre)):
            moved = values if middle is None else values - middle.double()[:, None]
            terms = moved if values is terms else terms * moved
    energy, total = (terms * terms).sum(1), terms.sum(1)
    if rule.lanes > 1:
        a, b = bridge(terms.shape[1], rule.lanes)
        sums = rule.per_energy * (a * total**2 + b * energy)
    else:
        partial = torch.cumsum(terms, 1)
        inexact = (terms != 0) & (partial != terms) | rule.rounds_exact
        sums = rule.unit * (torch.exp2(2.0 * torch.frexp(partial)[1]) * inexact).sum(1)
    products = torch.zeros_like(energy)
    if other is not None:
        products = rule.of_product * rule.per_energy * energy
    count = ((terms != 0) | rule.rounds_exact).sum(1)
    found = (rule.of_partial_sum * sums, products, total, energy, count)
    return Walk(*(v.cpu().numpy() for v in found))


def deviation_of_sum(x, dims, result, how: How) -> torch.Tensor:
    """Standard deviation of `torch.sum`, without its last rounding; the shape of `result`."""
    walk = follow(x, dims, how, total=_numpy(result))
    return deviation_before_last(walk.variance, result, how.rule)


def deviation_of_mean(x, dims, result, how: How) -> torch.Tensor:
    """Standard deviation of `torch.mean`: of the sum; the division is the last rounding."""
    count = math.prod(x.shape[d] for d in dims)
    walk = follow(x, dims, how, total=_numpy(result) * count)
    return _root(walk.variance / count**2, result)


def deviation_of_variance(x, dims, result, correction: float, how: How) -> torch.Tensor:
    """Standard deviation of `torch.var`: that of the sum of squares about the mean."""
    count = math.prod(x.shape[d] for d in dims)
    if how.exact:
        centre = x.detach().mean(dims)
        variance = follow(x, dims, how, x, centre, centre).variance
    else:  # as if x were normal and the same everywhere
        total = result.detach().double() * max(count - correction, 0)
        variance = modelled_variance(total, 3 * total**2 / count, count, how.rule)
    return _root(variance / max(count - correction, 1) ** 2, result)


def deviation_of_norm(x, dims, result, how: How) -> torch.Tensor:
    """Standard deviation of the Euclidean norm: of the sum of squares, through the root."""
    if how.exact:
        variance = follow(x, dims, how, x).variance
    else:  # as if x were normal and the same everywhere
        total, count = _numpy(result) ** 2, math.prod(x.shape[d] for d in dims)
        variance = modelled_variance(total, 3 * total**2 / count, count, how.rule)
        variance = variance.reshape([x.shape[d] for d in range(x.dim()) if d not in dims])
    twice = 2 * _numpy(result).reshape(variance.shape)
    with np.errstate(divide="ignore", invalid="ignore"):
        return _root(np.where(twice > 0, variance / twice**2, 0.0), result)


def deviation_of_positive_sum(result: torch.Tensor, n_terms: float, rule: Rule) -> torch.Tensor:
    """Standard deviation of sums of n terms of one size and sign, by a model.

    For operators that sum few terms, or whose terms cannot be looked at: ``n / 3`` times the
    variance of one rounding.
    """
    a, b = bridge(n_terms, rule.lanes)
    variance = rule.of_partial_sum * (a + b / n_terms) - rule.of_result
    return result.detach().abs() * math.sqrt(max(variance, 0.0) * rule.per_energy)


def deviation_before_last(variance, result: torch.Tensor, rule: Rule) -> torch.Tensor:
    """Standard deviation of a sum without its last rounding; the shape of `result`."""
    _, exponent = torch.frexp(result.detach().cpu().double())
    last = rule.of_result * rule.unit * torch.exp2(2.0 * exponent.double())
    return _root(torch.as_tensor(variance).reshape(result.shape) - last, result)


def _root(variance: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
    variance = torch.as_tensor(variance).clamp_min(0).nan_to_num_(0.0, 0.0, 0.0)
    return variance.sqrt_().to(result.device, result.dtype).reshape(result.shape)


def draws(stream: int, shape, number: int = 0) -> np.ndarray:
    """Standard normal random numbers for what a whole channel shares."""
    return np.random.default_rng([stream, number]).standard_normal(shape)


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().cpu().numpy()
