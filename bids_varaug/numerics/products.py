"""Noise of matrix products and convolutions, forward and backward.

Variance of an element: that of all its partial sums where the whole operator is small (`DIRECT`
multiply-adds); otherwise a model by result and energy, scaled for each output channel so that on a
sample of elements it has the variance of all their partial sums (`accumulation`). The energy
``sum x^2 w^2`` is computed in full, as a second product of squares (exact), or taken as the
product of what lies under the kernel, on a coarse grid, and of the kernel (fast).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from bids_varaug.numerics.accumulation import (
    Walk,
    bridge,
    follow_products,
    modelled_variance,
    unthinned,
)
from bids_varaug.numerics.glances import (
    Geometry,
    coarse_energy,
    gather_patches,
    mean_square,
    row_energy,
    some_elements,
    some_rows,
)
from bids_varaug.numerics.matrix_noise import perturb_by_sample
from bids_varaug.numerics.perturb import ChannelNoise, perturb_, perturb_channels_
from bids_varaug.numerics.reductions import follow
from bids_varaug.numerics.rules import DITHER, How, Rule

# Multiply-adds of an operator whose partial sums are all computed, and of a sample
DIRECT = {True: 2**22, False: 2**18}  # exact, fast
SAMPLED = {True: 2**22, False: 2**18}  # of a convolution
SAMPLED_MATRIX = {True: 2**20, False: 2**17}
SAMPLED_COLUMN = {True: 2**22, False: 2**19}  # of a weight gradient
VOXELS = {True: 64, False: 32}  # voxels, or rows, of a sample; fewer where it would be too large
_SIDE_BY_SIDE = 8  # input channels of a sampled weight gradient
_STEP = 16  # of its voxels along the last axis, at most every 16th is looked at, if not exact
_LONG = 2**15  # terms of a matrix product from which on they are looked at like those of sums


# --------------------------------------------------------------------------------------------------
# Matrix products


def perturb_matrix_product(
    y: torch.Tensor, a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, how: How
) -> None:
    """Perturb y = a b + bias in place.

    Parameters
    ----------
    y : (M, N), float32 or float64
    a : (M, K), same dtype
    b : (K, N)
    bias : broadcasts to y, or None
    """
    (m, k), n = a.shape, b.shape[1]
    if not m * n * k:
        return
    rule = how.rule
    if m * n * k <= DIRECT[how.exact]:
        variance = follow_products(_numpy(a), _numpy(b), rule).variance
        _perturb_by_variance(y, variance, bias is None, how)
        return
    is_long = k >= _LONG and not how.exact
    on_cpu = y.device.type == "cpu"
    if on_cpu and not (is_long or how.exact) and (bias is None or bias.dim() == 1):
        sizes = _sample_sizes((m, n), k, SAMPLED_MATRIX[how.exact], how.exact)
        last = _of_last_rounding(rule) if bias is None else 0.0
        perturb_by_sample(y, a, b, bias, rule, last, sizes, how.stream)
        return
    rng = np.random.default_rng(how.stream)
    rows, columns = _sample(rng, (m, n), k, SAMPLED_MATRIX[how.exact], how.exact)
    step = _STEP if is_long else 1
    terms = slice(step // 2, None, step)
    sampled_a, sampled_b = some_rows(a, rows, terms), some_rows(b.T, columns, terms).T
    if is_long:
        total = some_rows(y if bias is None else y - bias, rows, slice(None))[:, columns]
        walk = _follow_long(sampled_a, sampled_b, step, total.astype("f8"), how)
    else:
        walk = follow_products(sampled_a, sampled_b, rule)
    truth = walk.variance
    if how.exact:
        energy, column_energy = (a * a) @ (b * b), None
        sampled_energy = walk.energy
    else:
        energy = row_energy(a)
        column_energy = _numpy(row_energy(b.T))[:, 0].astype("f8") / k
        sampled_energy = some_rows(energy, rows, slice(None)).astype("f8") * column_energy[columns]
    model = modelled_variance(walk.total, sampled_energy, k, rule)
    factor = np.full(n, _ratio(truth.sum(), model.sum()))
    if len(columns) == n:
        factor = _ratio(truth.sum(0), model.sum(0))
    noise = _channel_noise(factor, k, how, column_energy, bias is None)
    if bias is None or bias.dim() == 1:
        offset = None if bias is None else _numpy(bias.expand(n)).astype("f8")
        given = ChannelNoise(*noise, offset=offset, energy=_as_image(energy))
        _perturb_matrix(y, given, how)
    else:
        perturb_sum_with_bias(y, y - bias, noise, energy, how)


def _follow_long(a, b, step: int, total, how: How) -> Walk:
    """Follow a matrix product of which every `step`-th term is given."""
    columns, every = torch.from_numpy(b), how._replace(exact=True)
    rows = []
    for row, totals in zip(a, total, strict=True):
        terms = torch.from_numpy(row)[:, None].expand(-1, b.shape[1])
        walk = follow(terms, (0,), every, columns)
        rows.append(unthinned(walk, step, totals, how.rule))
    return Walk.stacked(rows)


def _perturb_matrix(y: torch.Tensor, given: ChannelNoise, how: How) -> None:
    dense = y.contiguous()
    perturb_channels_(_as_image(dense), given, how.rule, how.stream)
    if dense is not y:
        y.copy_(dense)


def perturb_sum_with_bias(y, total, noise, energy, how: How) -> None:
    """Perturb where the bias is no constant of a channel: the deviation follows from `total`."""
    quadratic, linear = (torch.as_tensor(v, dtype=y.dtype, device=y.device) for v in noise)
    variance = quadratic * total * total + linear * energy
    perturb_(y, variance.sqrt_(), how.rule, how.stream)


# --------------------------------------------------------------------------------------------------
# Convolutions


def perturb_convolution(
    y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    geometry: Geometry,
    groups: int,
    squares: Callable[[], torch.Tensor],
    how: How,
) -> None:
    """Perturb a convolution's result in place.

    Parameters
    ----------
    y : (N, O, X, Y, Z), float32 or float64
    x : (N, C, X', Y', Z')
    weight : (O, C / groups, KX, KY, KZ)
    bias : (O,), or None
    squares : returns the same convolution of the squares of x and weight, without bias
    """
    if not y.numel() or not x.numel():
        return
    rule, n_out = how.rule, y.shape[1]
    n_terms = weight[0].numel()
    n_voxels = y.numel() // n_out
    offset = None if bias is None else _numpy(bias).astype("f8")
    if groups == 1 and n_voxels * n_terms * n_out <= DIRECT[how.exact]:
        voxels = np.arange(n_voxels)
        patches = gather_patches(x, _places(voxels, y), weight.shape[2:], geometry)
        variance = follow_products(patches, _as_columns(weight), rule).variance
        variance = np.moveaxis(variance.reshape(y.shape[0], *y.shape[2:], n_out), -1, 1)
        _perturb_by_variance(y, variance, bias is None, how)
        return
    column_energy = _numpy(row_energy(weight.reshape(n_out, -1), n_terms))[:, 0].astype("f8")
    column_energy /= n_terms
    if how.exact:
        energy, shift = squares(), 0
    else:
        energy, shift = coarse_energy(x, y.shape[2:], geometry.stride)
        energy = energy * (n_terms / x.shape[1])
    factor = np.ones(n_out)
    if groups == 1:
        rng = np.random.default_rng(how.stream)
        voxels, channels = _sample(rng, (n_voxels, n_out), n_terms, SAMPLED[how.exact], how.exact)
        is_all = len(channels) == n_out
        chosen = weight if is_all else weight[torch.from_numpy(channels).to(weight.device)]
        places = _places(voxels, y)
        patches = gather_patches(x, places, weight.shape[2:], geometry)
        walk = follow_products(patches, _as_columns(chosen), rule)
        sampled_energy = walk.energy
        if not how.exact:
            seen = some_elements(energy[:, 0], places >> [0, shift, shift, shift])
            sampled_energy = seen.astype("f8")[:, None] * column_energy[channels]
        model = modelled_variance(walk.total, sampled_energy, n_terms, rule)
        truth = walk.variance
        factor = np.full(n_out, _ratio(truth.sum(), model.sum()))
        if is_all:
            factor = _ratio(truth.sum(0), model.sum(0))
    noise = _channel_noise(factor, n_terms, how, None if how.exact else column_energy, bias is None)
    given = ChannelNoise(*noise, offset=offset, energy=energy, shift=shift)
    perturb_channels_(y, given, rule, how.stream)


def perturb_weight_gradient(
    y: torch.Tensor,
    gradient: torch.Tensor,
    x: torch.Tensor,
    geometry: Geometry,
    groups: int,
    squares: Callable[[], torch.Tensor],
    how: How,
) -> None:
    """Perturb the gradient of a convolution with respect to its kernels, in place.

    Parameters
    ----------
    y : (O, C / groups, KX, KY, KZ), float32 or float64
    gradient : (N, O, X, Y, Z), with respect to the convolution's result
    x : (N, C, X', Y', Z')
    squares : returns the same for the squares of gradient and x
    """
    if not y.numel() or not gradient.numel() or not x.numel():
        return
    rule = how.rule
    n_out, n_in = y.shape[:2]
    n_terms = gradient.numel() // n_out
    if how.exact:
        energy = squares()
    else:
        of_inputs = mean_square(x).reshape(groups, n_in).repeat(n_out // groups, axis=0)
        energy = n_terms * mean_square(gradient)[:, None] * of_inputs
        energy = torch.from_numpy(energy[..., None, None, None]).to(y.device, y.dtype)
    variance = modelled_variance(y, energy, n_terms, rule)
    if groups == 1:
        truth, model = 0.0, 0.0
        rng = np.random.default_rng(how.stream)
        width = min(_SIDE_BY_SIDE, n_in)
        step = 1 if how.exact else max(1, min(_STEP, gradient.shape[4] // 8))
        most = 16 if how.exact else 4
        n_sampled = int(np.clip(step * SAMPLED_COLUMN[how.exact] // (n_terms * width), 1, most))
        sizes = (n_out, n_in - width + 1, *y.shape[2:])
        for out, first, *tap in rng.integers(0, sizes, (n_sampled, 5)).tolist():
            part = slice(first, first + width)
            place = (out, part, *tap)
            total = _numpy(y[place]).astype("f8")
            columns = gradient[:, out], x[:, part]
            truth += _variance_of_column(*columns, tap, geometry, step, total, how).sum()
            model += float(variance[place].sum(dtype=torch.float64))
        variance = variance * float(_ratio(truth, model))
    last = rule.of_result * rule.per_energy
    deviation = (variance - last * y * y).clamp_min_(0).sqrt_()
    perturb_(y, deviation, rule, how.stream)


def _variance_of_column(
    gradient, x, tap, geometry: Geometry, step: int, total: np.ndarray, how: How
) -> np.ndarray:
    """Variance of one output channel's weight gradient at one tap, for some input channels.

    Terms where the kernel lies on padding are 0 and left out. Along the last axis, every `step`-th
    voxel is looked at.
    """
    inside_x, inside_g = [slice(None), slice(None)], [slice(None)]
    for axis, offset in enumerate(tap):
        size, n, stride = x.shape[2 + axis], gradient.shape[1 + axis], geometry.stride[axis]
        start = offset * geometry.dilation[axis] - geometry.padding[axis]
        first, stop = max(0, -(start // stride)), min(n, (size - 1 - start) // stride + 1)
        if stop <= first:
            return np.zeros(x.shape[1])
        every = step if axis == 2 else 1
        first = min(first + every // 2, stop - 1)
        inside_g.append(slice(first, stop, every))
        inside_x.append(
            slice(start + first * stride, start + (stop - 1) * stride + 1, stride * every)
        )
    others = x[tuple(inside_x)].movedim(1, -1).flatten(0, 3)
    terms = gradient[tuple(inside_g)].flatten()[:, None].expand(-1, others.shape[1])
    walk = follow(terms, (0,), how._replace(exact=True), others)
    if step > 1:
        walk = unthinned(walk, step, total, how.rule)
    return walk.variance


# --------------------------------------------------------------------------------------------------


def _sample(rng, shape: tuple[int, int], n_terms: int, budget: int, exact: bool):
    """Rows and columns of a matrix product whose partial sums are followed."""
    rows, columns = _sample_sizes(shape, n_terms, budget, exact)
    chosen = np.arange(columns)
    if columns < shape[1]:
        chosen = rng.choice(shape[1], columns, replace=False, shuffle=False)
    return rng.integers(0, shape[0], rows), chosen


def _sample_sizes(shape: tuple[int, int], n_terms: int, budget: int, exact: bool):
    """How many rows and columns: about `budget` multiply-adds, but some of each."""
    at_once = max(budget // n_terms, 1)
    fewest = 8 if n_terms < 2**10 else 4 if n_terms < _LONG else 2
    rows = min(shape[0], VOXELS[exact], max(fewest, at_once // shape[1]))
    return rows, min(shape[1], max(at_once // rows, 8))


def _channel_noise(factor, n_terms, how: How, column_energy, is_last: bool):
    """(quadratic, linear) of `ChannelNoise`.

    With a dither rule the kernels add the noise of sums without a dither: the last rounding is one
    of the partial sums, and rounding to the format comes on top. On a grid it is drawn separately.
    """
    rule = how.rule
    a, b = bridge(n_terms, rule.lanes)
    quadratic = factor * rule.per_energy * rule.of_partial_sum * a
    linear = factor * rule.per_energy * (rule.of_partial_sum * b + rule.of_product)
    if is_last:
        quadratic = quadratic - _of_last_rounding(rule)
    return quadratic, linear if column_energy is None else linear * column_energy


def _of_last_rounding(rule: Rule) -> float:
    """Variance per squared result of what the kernels add by themselves."""
    return rule.per_energy * (rule.of_format if rule.kind == DITHER else rule.of_result)


def _perturb_by_variance(y, variance: np.ndarray, is_last: bool, how: How) -> None:
    values = _numpy(y)
    if is_last:
        last = how.rule.of_result * how.rule.unit
        variance = variance - last * np.exp2(2.0 * np.frexp(values)[1])
    deviation = np.sqrt(np.maximum(variance, 0)).astype(values.dtype)
    perturb_(y, torch.from_numpy(deviation).to(y.device), how.rule, how.stream)


def _places(voxels: np.ndarray, y: torch.Tensor) -> np.ndarray:
    """(S,) -> (S, 4): sample and voxel of an element's place within a channel."""
    return np.stack(np.unravel_index(voxels, (y.shape[0], *y.shape[2:])), axis=1)


def _as_columns(weight: torch.Tensor) -> np.ndarray:
    """(O, C, KX, KY, KZ) -> (C KX KY KZ, O)."""
    return _numpy(weight.reshape(len(weight), -1).T)


def _as_image(y: torch.Tensor) -> torch.Tensor:
    """(M, N) -> (1, N, 1, M / z, z), so that the kernels find lines of some length."""
    z = math.gcd(len(y), 64)
    return y.view(1, 1, -1, z, y.shape[1]).movedim(-1, 1)


def _ratio(truth, model):
    """Truth / model, 1 where the model is 0 or either is no number."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.asarray(truth, "f8") / model
    return np.where(np.isfinite(ratio) & (np.asarray(model) > 0), ratio, 1.0)


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()
