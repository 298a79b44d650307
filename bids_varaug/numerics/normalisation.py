"""Noise of batch, group, instance and layer normalisation, forward and backward.

Over the n elements of a group the reference computes, each operation one rounding,
``mean = total(x) / n``, ``d = x - mean``, ``variance = total(d^2) / n``,
``r = 1 / sqrt(variance + epsilon)``, ``h = d r``, ``y = h scale + shift``. Errors of mean and r
are the same for the whole group; those of d, h and what follows are of each element. Backwards,
with s = gradient scale: ``dx = r ((s - total(s) / n) - h total(s h) / n)``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from bids_varaug.numerics.accumulation import modelled_variance
from bids_varaug.numerics.perturb import ChannelNoise, perturb_, perturb_channels_
from bids_varaug.numerics.reductions import draws, follow
from bids_varaug.numerics.rules import How, Rule


def _of_product_of_two(rule: Rule) -> float:
    """Variance of one multiplication: its result and both factors."""
    return rule.of_result + 2 * rule.of_operand


def inverse_deviation_noise(
    variance_of_variance, variance, epsilon: float, rule: Rule, stream: int
):
    """Relative error of ``1 / sqrt(variance + epsilon)``, one draw for each group.

    Parameters
    ----------
    variance_of_variance : (R,) float64, of the sum over n; 0 where the variance is given
    variance : (R,) float64
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = variance_of_variance / (variance + epsilon) ** 2 / 4
    relative = np.nan_to_num(relative, posinf=0.0)
    # Adding epsilon counts half through the root, like the division by n; root and inverse in full
    relative = relative + rule.per_energy * (0.5 * rule.of_result + 2 * _of_product_of_two(rule))
    return np.sqrt(relative) * draws(stream, variance.shape, 1)


def group_noise(rows: torch.Tensor, mean, inverse, epsilon: float, how: How):
    """Errors of a group's mean and, relative, of its inverse standard deviation.

    Parameters
    ----------
    rows : (R, n)
    mean, inverse : (R,) float64

    Returns
    -------
    of_mean, of_inverse : (R,) float64
    """
    rule, stream = how.rule, how.stream
    n, dims = rows.shape[1], (1,)
    with np.errstate(divide="ignore"):
        variance = np.maximum(1 / inverse**2 - epsilon, 0.0)
    total = follow(rows, dims, how, total=mean * n).variance
    if how.exact:
        centre = torch.as_tensor(mean, dtype=rows.dtype, device=rows.device)
        squares = follow(rows, dims, how, rows, centre, centre).variance
    else:  # as if x were normal and the same everywhere
        squares = modelled_variance(n * variance, 3 * n * variance**2, n, rule)
    division = rule.per_energy * rule.of_result * mean**2
    of_mean = np.sqrt(total / n**2 + division) * draws(stream, mean.shape, 0)
    of_inverse = inverse_deviation_noise(squares / n**2, variance, epsilon, rule, stream)
    return of_mean, of_inverse


def affine_noise(scale, shift, inverse, of_mean, of_inverse, rule: Rule) -> dict:
    """Arguments of `ChannelNoise` for the result of a normalisation, all (C,)."""
    steps = rule.of_partial_sum + _of_product_of_two(rule)  # d = x - mean, h = d r
    ones = np.ones_like(inverse)
    if scale is None and shift is None:
        steps -= rule.of_result  # the last one is drawn with the result
    scale, shift = (ones if scale is None else scale), (0 * ones if shift is None else shift)
    if shift.any() or (scale != 1).any():
        steps += _of_product_of_two(rule)
    return {
        "quadratic": ones * rule.per_energy * steps,
        "offset": shift,
        "slope": of_inverse,
        "intercept": -shift * of_inverse - of_mean * inverse * scale,
    }


def perturb_batch_norm(
    y, x, scale, shift, mean, inverse, of_statistics: bool, epsilon: float, how: How
) -> tuple[np.ndarray, np.ndarray]:
    """Perturb the result of a batch normalisation in place.

    Parameters
    ----------
    y, x : (N, C, X, Y, Z)
    scale, shift : (C,) tensors or None
    mean, inverse : (C,) float64: the mean and one over the standard deviation used
    of_statistics : whether these are those of x (training), or given

    Returns
    -------
    of_mean, of_inverse : (C,) float64, errors of the statistics, the latter relative
    """
    rule, stream = how.rule, how.stream
    if of_statistics:
        rows = x.detach().movedim(1, 0).flatten(1) if x.shape[0] > 1 else x.detach()[0].flatten(1)
        of_mean, of_inverse = group_noise(rows, mean, inverse, epsilon, how)
    else:
        with np.errstate(divide="ignore"):
            variance = np.maximum(1 / inverse**2 - epsilon, 0.0)
        of_mean = np.zeros_like(mean)
        of_inverse = inverse_deviation_noise(0 * mean, variance, epsilon, rule, stream)
    noise = affine_noise(_float64(scale), _float64(shift), inverse, of_mean, of_inverse, rule)
    perturb_channels_(y, ChannelNoise(**noise), rule, stream)
    return of_mean, of_inverse


def perturb_group_norm(
    y, x, scale, shift, mean, inverse, epsilon: float, how: How
) -> tuple[np.ndarray, np.ndarray]:
    """Perturb the result of a group normalisation in place.

    Parameters
    ----------
    y, x : (N, C, X, Y, Z)
    scale, shift : (C,) tensors or None
    mean, inverse : (N, G) float64

    Returns
    -------
    of_mean, of_inverse : (N, G) float64, the latter relative
    """
    rule, stream = how.rule, how.stream
    n_samples, n_channels = x.shape[:2]
    rows = x.detach().reshape(mean.size, -1)
    errors = group_noise(rows, mean.reshape(-1), inverse.reshape(-1), epsilon, how)
    of_mean, of_inverse = (e.reshape(mean.shape) for e in errors)
    repeats = n_channels // mean.shape[1]
    for sample in range(n_samples):
        inverses, of_means, of_inverses = (
            np.repeat(v[sample], repeats) for v in (inverse, of_mean, of_inverse)
        )
        noise = affine_noise(
            _float64(scale), _float64(shift), inverses, of_means, of_inverses, rule
        )
        perturb_channels_(y[sample : sample + 1], ChannelNoise(**noise), rule, stream + sample)
    return of_mean, of_inverse


def perturb_layer_norm(
    y, x, scale, shift, mean, inverse, epsilon: float, how: How
) -> tuple[np.ndarray, np.ndarray]:
    """Perturb the result of a layer normalisation in place.

    Parameters
    ----------
    y, x : (R, n)
    scale, shift : (n,) tensors or None
    mean, inverse : (R,) float64

    Returns
    -------
    of_mean, of_inverse : (R,) float64, the latter relative
    """
    rule, stream = how.rule, how.stream
    of_mean, of_inverse = group_noise(x.detach(), mean, inverse, epsilon, how)
    distance = y if shift is None else y - shift
    steps = affine_noise(
        None if scale is None else np.full(1, 2.0), None, np.ones(1), 0.0, np.zeros(1), rule
    )["quadratic"][0]
    common = distance * _column(of_inverse, y)
    offset = _column(of_mean * inverse, y)
    common -= offset if scale is None else offset * scale
    deviation = distance.abs() * float(np.sqrt(steps))
    y += common
    perturb_(y, deviation, rule, stream)
    return of_mean, of_inverse


# --------------------------------------------------------------------------------------------------
# Backward


@dataclass(frozen=True)
class Totals:
    """Of a group: sums of the gradient s and of s h, with the variances of their rounding.

    All (R,) float64; `energy` is the sum of s^2.
    """

    slope: np.ndarray
    energy: np.ndarray
    slope_variance: np.ndarray
    product_variance: np.ndarray


def totals(slopes, x, mean, inverse, how: How, results=(None, None)) -> Totals:
    """Follow total(s) and total(s h) over rows, h = (x - mean) inverse.

    Parameters
    ----------
    slopes, x : (R, n) tensors
    mean, inverse : (R,) float64
    results : total(s) and total(s h), (R,) tensors or None
    """
    total, total_product = (None if r is None else _float64(r) for r in results)
    total_product = None if total_product is None else total_product / inverse
    centre = torch.as_tensor(mean, dtype=x.dtype, device=x.device)
    of_slope = follow(slopes, (1,), how, total=total)
    of_product = follow(slopes, (1,), how, x, None, centre, total=total_product)
    h_steps = 2 * _of_product_of_two(how.rule) * how.rule.per_energy
    products = (of_product.variance + h_steps * of_product.energy) * inverse**2
    return Totals(of_slope.total, of_slope.energy, of_slope.variance, products)


def errors_of_means(found: Totals, n: int, has_scale: bool, rule: Rule, stream: int):
    """Errors of ``total(s) / n`` and ``total(s h) / n``, one draw for each group, (R,) float64."""
    variance = found.slope_variance
    if has_scale:
        variance = variance + _of_product_of_two(rule) * rule.per_energy * found.energy
    shape = variance.shape
    of_mean = np.sqrt(variance) / n * draws(stream, shape, 0)
    return of_mean, np.sqrt(found.product_variance) / n * draws(stream, shape, 1)


def gradient_steps(mean_slope, mean_product, energy, inverse, n, has_scale: bool, rule: Rule):
    """Arguments of `ChannelNoise` for dx that are of each element.

    Parameters
    ----------
    mean_slope, mean_product : (C,) total(s) / n, total(s h) / n
    energy : (C,) total(s^2)
    """
    product = _of_product_of_two(rule)
    of_slope = product if has_scale else 0.0
    of_result = rule.of_partial_sum + rule.of_partial_sum + product - rule.of_result
    offset = -inverse * mean_slope
    spread = np.maximum(energy / n - mean_slope**2 - mean_product**2, 0.0) * inverse**2
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.nan_to_num(spread / (spread + offset**2), nan=1.0)
    return rule.per_energy * (of_slope + of_result * share), offset


def perturb_norm_gradient(
    dx, gradient, x, scale, mean, inverse, how: How, results=(None, None)
) -> Totals:
    """Perturb the gradient with respect to the input of a batch normalisation, in place.

    Parameters
    ----------
    dx, gradient, x : (N, C, X, Y, Z); groups are channels over all samples
    scale : (C,) tensor or None
    mean, inverse : (C,) float64
    """
    rule, stream = how.rule, how.stream
    slopes, rows = _channel_rows(gradient), _channel_rows(x)
    factor = np.ones_like(mean) if scale is None else _float64(scale)
    n, has_scale = slopes.shape[1], scale is not None
    found = totals(slopes, rows, mean, inverse, how, results)
    of_mean, of_product = (e * factor for e in errors_of_means(found, n, has_scale, rule, stream))
    quadratic, offset = gradient_steps(
        found.slope * factor / n, 0.0, found.energy * factor**2, inverse, n, has_scale, rule
    )
    slope = -(inverse**2) * of_product
    given = ChannelNoise(
        quadratic, offset=offset, slope=slope, intercept=-inverse * of_mean - slope * mean,
        companion=x,
    )  # fmt: skip
    perturb_channels_(dx, given, rule, stream)
    return found


def _channel_rows(x: torch.Tensor) -> torch.Tensor:
    """(N, C, ...) -> (C, N ...), a view where one sample or channels-last memory allows."""
    x = x.detach()
    return x[0].flatten(1) if x.shape[0] == 1 else x.movedim(0, 1).flatten(1)


def _column(values: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(values, dtype=like.dtype, device=like.device)[:, None]


def _float64(tensor) -> np.ndarray | None:
    return None if tensor is None else tensor.detach().double().cpu().numpy()


def perturb_group_norm_gradient(dx, gradient, x, scale, mean, inverse, how: How) -> None:
    """Perturb the gradient with respect to the input of a group normalisation, in place.

    Parameters
    ----------
    dx, gradient, x : (N, C, X, Y, Z)
    scale : (C,) tensor or None
    mean, inverse : (N, G) float64
    """
    rule, stream = how.rule, how.stream
    n_samples, n_channels = x.shape[:2]
    slopes = gradient.detach()
    if scale is not None:
        slopes = slopes * scale.detach().reshape(1, -1, 1, 1, 1)
    slopes, rows = slopes.reshape(mean.size, -1), x.detach().reshape(mean.size, -1)
    n = slopes.shape[1]
    flat_mean, flat_inverse = mean.reshape(-1), inverse.reshape(-1)
    found = totals(slopes, rows, flat_mean, flat_inverse, how)
    of_mean, of_product = errors_of_means(found, n, scale is not None, rule, stream)
    quadratic, offset = gradient_steps(
        found.slope / n, 0.0, found.energy, flat_inverse, n, scale is not None, rule
    )
    slope = -(flat_inverse**2) * of_product
    intercept = -flat_inverse * of_mean - slope * flat_mean
    repeats = n_channels // mean.shape[1]
    columns = [
        v.reshape(mean.shape).repeat(repeats, 1) for v in (quadratic, offset, slope, intercept)
    ]
    for i in range(n_samples):
        part = slice(i, i + 1)
        given = ChannelNoise(
            columns[0][i], offset=columns[1][i], slope=columns[2][i], intercept=columns[3][i],
            companion=x[part],
        )  # fmt: skip
        perturb_channels_(dx[part], given, rule, stream + i)


def perturb_layer_norm_gradient(dx, gradient, x, scale, mean, inverse, how: How) -> None:
    """Perturb the gradient with respect to the input of a layer normalisation, in place.

    Parameters
    ----------
    dx, gradient, x : (R, n)
    scale : (n,) tensor or None
    mean, inverse : (R,) float64
    """
    rule, stream = how.rule, how.stream
    slopes = gradient.detach() if scale is None else gradient.detach() * scale.detach()
    n = x.shape[1]
    found = totals(slopes, x.detach(), mean, inverse, how)
    of_mean, of_product = errors_of_means(found, n, scale is not None, rule, stream)
    quadratic, offset = gradient_steps(
        found.slope / n, 0.0, found.energy, inverse, n, scale is not None, rule
    )
    slope = -(inverse**2) * of_product
    common = _column(slope, x) * x + _column(-inverse * of_mean - slope * mean, x)
    deviation = (dx - _column(offset, x)).abs() * _column(np.sqrt(quadratic), x)
    dx += common
    perturb_(dx, deviation, rule, stream)


def scale_and_shift_variances(
    gradient, x, mean, inverse, how: How
) -> tuple[np.ndarray, np.ndarray]:
    """Variances of the gradients with respect to scale and shift.

    Parameters
    ----------
    gradient, x : (C, n), the terms of a channel in order
    mean, inverse : (C,) float64, or (C, n) tensors where they differ within a channel

    Returns
    -------
    of_scale, of_shift : (C,) float64
    """
    if not isinstance(mean, np.ndarray):
        x = (x - mean) * inverse
        mean, inverse = np.zeros(len(x)), np.ones(len(x))
    found = totals(gradient, x, mean, inverse, how)
    return found.product_variance, found.slope_variance
