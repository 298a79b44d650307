"""Noise of batch, group, instance and layer normalisation, forward and backward.

Over the n elements of a group, each operation one rounding, ``mean = total(x) / n``, ``d = x - mean``,
``variance = total(d^2) / n``, ``r = 1 / sqrt(variance + epsilon)``, ``h = d r``, ``y = h scale + shift``. Errors of the
and r are the same for the whole group; those of d, h and what follows are of each element. Backwards, with
s = gradient scale: ``dx = r ((s - total(s) / n) - h total(s h) / n)``.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

from bids_varaug.numerics.call import Call, image_of
from bids_varaug.numerics.noise import ChannelNoise, perturb_, perturb_channels_, round_
from bids_varaug.numerics.specification import RoundingSpecification
from bids_varaug.numerics.sums import Blocks, blocks_of

Results = tuple[torch.Tensor, ...]


def draws(stream: int, shape: tuple[int, ...], number: int = 0) -> np.ndarray:
    """Standard normal random numbers for what a whole group shares."""
    return np.random.default_rng([stream, number]).standard_normal(shape)


# ----------------------------------------------------------------------------------------------------------------------
# Forward


def batch_norm(call: Call, result: Results) -> None:
    """Batch normalisation; its running statistics too, though torch's schema does not say that it writes them."""
    given, spec = call.given, call.spec
    x: torch.Tensor = given["input"]
    running: Any = (given.get("running_mean"), given.get("running_var"))
    by_name = "no_training" not in call.name and "no_update" not in call.name
    of_batch = given.get("training", given.get("train", by_name))
    epsilon = given.get("eps", given.get("epsilon", 1e-5))
    if of_batch or running[0] is None:
        mean, inverse = _float64(result[1]), _float64(result[2])
        of_mean, of_inverse = _errors_of_statistics(_channel_rows(x), mean, inverse, epsilon, spec, call.stream())
    else:
        mean, inverse = _float64(running[0]), 1 / np.sqrt(_float64(running[1]) + epsilon)
        of_mean = np.zeros_like(mean)
        of_inverse = _error_of_inverse(of_mean, 1 / inverse**2, spec, call.stream())
    noise = _affine_noise(given.get("weight"), given.get("bias"), inverse, of_mean, of_inverse, spec)
    _perturb_samples(image_of(result[0]), noise, None, spec, call.stream())
    if not (of_batch or running[0] is None):
        return
    _shift(result[1], of_mean)
    _shift(result[2], of_inverse * inverse)
    if of_batch and running[0] is not None:
        n, momentum = x.numel() // x.shape[1], given.get("momentum", given.get("exponential_average_factor", 0.1))
        variance = (1 / inverse**2 - epsilon) * n / max(n - 1, 1)
        _shift(running[0], momentum * of_mean)
        _shift(running[1], momentum * -2 * of_inverse * (variance + epsilon))
        for number, statistic in enumerate(running):
            round_(statistic, spec, call.stream(1 + number))


def group_norm(call: Call, result: Results) -> None:
    """Group normalisation."""
    given, (y, mean, inverse) = call.given, result
    x, shape = given["input"], mean.shape
    rows = x.detach().reshape(mean.numel(), -1)
    means, inverses = _float64(mean).reshape(-1), _float64(inverse).reshape(-1)
    errors = _errors_of_statistics(rows, means, inverses, given["eps"], call.spec, call.stream())
    of_mean, of_inverse, spread = (
        v.reshape(shape).repeat(x.shape[1] // shape[1], 1) for v in (*errors, inverses)
    )
    noise = _affine_noise(given.get("weight"), given.get("bias"), spread, of_mean, of_inverse, call.spec)
    _perturb_samples(image_of(y), noise, None, call.spec, call.stream())
    _shift(mean, errors[0].reshape(shape))
    _shift(inverse, (errors[1] * inverses).reshape(shape))


def layer_norm(call: Call, result: Results) -> None:
    """Layer normalisation."""
    given, spec, (y, mean, inverse) = call.given, call.spec, result
    n = math.prod(given["normalized_shape"])
    scale, shift = (None if given.get(k) is None else given[k].reshape(-1) for k in ("weight", "bias"))
    rows, means, inverses = y.view(-1, n), _float64(mean).reshape(-1), _float64(inverse).reshape(-1)
    x = given["input"].detach().reshape(-1, n)
    of_mean, of_inverse = _errors_of_statistics(x, means, inverses, given["eps"], spec, call.stream())
    distance = rows if shift is None else rows - shift
    offset = _column(of_mean * inverses, y)
    common = distance * _column(of_inverse, y) - (offset if scale is None else offset * scale)
    steps = _steps(scale is not None or shift is not None, spec)
    deviation = distance.abs() * math.sqrt(spec.per_energy * steps)
    rows += common
    perturb_(rows, deviation, spec, call.stream())
    _shift(mean, of_mean.reshape(mean.shape))
    _shift(inverse, (of_inverse * inverses).reshape(inverse.shape))


def _errors_of_statistics(
    rows: torch.Tensor, mean: np.ndarray, inverse: np.ndarray, epsilon: float, spec: RoundingSpecification, stream: int
) -> tuple[np.ndarray, np.ndarray]:
    """Errors of the mean and, relative, of the inverse standard deviation of groups (R, n); one draw a group."""
    n = max(rows.shape[1], 1)
    distances = blocks_of(rows, (1,), centre=mean)
    sizes = distances.sizes[:, None]
    energies = distances.energies + 2 * mean * distances.totals + sizes * mean**2
    total = replace(distances, totals=distances.totals + sizes * mean, energies=energies)
    total = total.variance(spec, spec.of_operand)
    # Of the squares themselves only their sums matter much: their own squares are taken for those of normal numbers
    squares = replace(distances, totals=distances.energies, energies=3 * distances.energies**2 / sizes)
    squares = squares.variance(spec, spec.of_product)
    # The total's own last rounding, and that of the division
    of_mean = np.sqrt(total / n**2 + 2 * spec.per_energy * spec.of_result * mean**2) * draws(stream, mean.shape)
    return of_mean, _error_of_inverse(squares / n**2, 1 / inverse**2, spec, stream)


def _error_of_inverse(
    variance_of_variance: np.ndarray, spread: np.ndarray, spec: RoundingSpecification, stream: int
) -> np.ndarray:
    """Relative error of ``1 / sqrt(variance + epsilon)``, one draw a group; `spread` is variance + epsilon."""
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = np.nan_to_num(variance_of_variance / spread**2 / 4, posinf=0.0)
    # The sum's last rounding, the division by n and adding epsilon count half through the root, in variance a quarter
    relative = relative + spec.per_energy * (0.75 * spec.of_result + 2 * spec.of_multiplication)
    return np.sqrt(relative) * draws(stream, np.shape(spread), 1)


def _steps(is_affine: bool, spec: RoundingSpecification) -> float:
    """Variance of ``d = x - mean``, ``h = d r`` and what follows, without the last rounding."""
    steps = spec.of_partial_sum + spec.of_multiplication
    return steps + spec.of_multiplication if is_affine else steps - spec.of_result


def _affine_noise(
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    inverse: np.ndarray,
    of_mean: np.ndarray,
    of_inverse: np.ndarray,
    spec: RoundingSpecification,
) -> dict[str, np.ndarray]:
    """Rows of `ChannelNoise` for the result of a normalisation, all (C,) or (N, C)."""
    factor = 1.0 if scale is None else _float64(scale)
    offset = np.zeros_like(inverse) if shift is None else _float64(shift) + 0 * inverse
    steps = _steps(scale is not None or shift is not None, spec)
    return {
        "quadratic": np.full_like(inverse, spec.per_energy * steps),
        "offset": offset,
        "slope": of_inverse,
        "intercept": -offset * of_inverse - of_mean * inverse * factor,
    }


def _perturb_samples(
    y: torch.Tensor, noise: dict[str, Any], companion: torch.Tensor | None, spec, stream: int
) -> None:
    """Perturb channels by noise (C,), or sample by sample by noise (N, C)."""
    if noise["quadratic"].ndim == 1:
        perturb_channels_(y, ChannelNoise(**noise, companion=companion), spec, stream)
        return
    for i in range(len(y)):
        own = {name: values[i] for name, values in noise.items()}
        part = None if companion is None else companion[i : i + 1]
        perturb_channels_(y[i : i + 1], ChannelNoise(**own, companion=part), spec, (stream + i) % 2**64)


def _shift(statistic: torch.Tensor, change: np.ndarray) -> None:
    """Statistics that are kept, for the backward pass or for later, have the errors that the result has."""
    if statistic.numel():
        exact = statistic.detach().double() + torch.as_tensor(change, device=statistic.device).reshape(statistic.shape)
        statistic.detach().copy_(exact)


# ----------------------------------------------------------------------------------------------------------------------
# Backward


class Totals(NamedTuple):
    """Of groups: sums of the gradient s and of s h, and the variances of their rounding; all (R,) float64."""

    slope: Blocks
    slope_variance: np.ndarray
    product_variance: np.ndarray


def _totals(slopes: torch.Tensor, x: torch.Tensor, mean, inverse, spec: RoundingSpecification) -> Totals:
    """Look at total(s) and total(s h) over rows (R, n), h = (x - mean) inverse."""
    of_slope, of_product = blocks_of(slopes, (1,)), blocks_of(slopes, (1,), x, None, mean)
    # Each h comes from a difference and a product
    steps = spec.per_energy * (spec.of_partial_sum + spec.of_multiplication) * of_product.energy
    product = (of_product.variance(spec, spec.of_product) + steps) * np.square(inverse)
    return Totals(of_slope, of_slope.variance(spec, spec.of_operand), product)


def _gradient_noise(
    found: Totals,
    mean: np.ndarray,
    inverse: np.ndarray,
    factor: np.ndarray,
    n: int,
    has_scale: bool,
    spec: RoundingSpecification,
    stream: int,
) -> dict[str, np.ndarray]:
    """Rows of `ChannelNoise`, companion x, for dx; all (R,). `factor` scales the gradient of each group."""
    slope, energy = found.slope.totals.sum(0) * factor / n, found.slope.energy * factor**2
    variance = found.slope_variance + has_scale * spec.of_multiplication * spec.per_energy * found.slope.energy
    of_mean = np.sqrt(variance) / n * draws(stream, mean.shape) * factor
    of_product = np.sqrt(found.product_variance) / n * draws(stream, mean.shape, 1) * factor
    offset = -inverse * slope
    spread = np.maximum(energy / n - slope**2, 0.0) * inverse**2
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.nan_to_num(spread / (spread + offset**2), nan=1.0)
    steps = has_scale * spec.of_multiplication
    steps += (2 * spec.of_partial_sum + spec.of_multiplication - spec.of_result) * share
    inclination = -(inverse**2) * of_product
    return {
        "quadratic": spec.per_energy * steps,
        "offset": offset,
        "slope": inclination,
        "intercept": -inverse * of_mean - inclination * mean,
    }


def batch_norm_backward(call: Call, result: Results) -> None:
    """Gradients of batch normalisation."""
    given, spec, (dx, of_scale, of_shift) = call.given, call.spec, result
    gradient: torch.Tensor = given["grad_out"] if "grad_out" in given else given["grad_output"]
    x, scale = given["input"], given.get("weight")
    is_training = given.get("train", True)
    if is_training:
        saved = given["save_invstd"] if "save_invstd" in given else given["save_var"]
        mean, inverse = _float64(given["save_mean"]), _float64(saved)
    else:
        mean, inverse = _float64(given["running_mean"]), 1 / np.sqrt(_float64(given["running_var"]) + given["eps"])
    rows = _channel_rows(gradient), _channel_rows(x)
    found = _totals(*rows, mean, inverse, spec)
    if dx is not None and is_training:
        factor = np.ones_like(mean) if scale is None else _float64(scale)
        noise = _gradient_noise(found, mean, inverse, factor, rows[0].shape[1], scale is not None, spec, call.stream())
        _perturb_samples(image_of(dx), noise, image_of(x), spec, call.stream())
    elif dx is not None:
        round_(dx, spec, call.stream())
    _perturb_sums((of_scale, of_shift), (found.product_variance, found.slope_variance), call)


def group_norm_backward(call: Call, result: Results) -> None:
    """Gradients of group normalisation."""
    given, spec, (dx, of_scale, of_shift) = call.given, call.spec, result
    gradient, x, scale, n_groups = given["grad_out"], given["input"], given.get("weight"), given["group"]
    n_samples, n_channels = x.shape[:2]
    repeats = n_channels // n_groups
    mean, inverse = (_float64(given[k]).reshape(-1) for k in ("mean", "rstd"))
    if dx is not None:
        slopes = gradient.detach()
        if scale is not None:
            slopes = slopes * scale.detach().reshape(1, -1, *[1] * (x.dim() - 2))
        slopes, rows = (t.reshape(len(mean), -1) for t in (slopes, x.detach()))
        found = _totals(slopes, rows, mean, inverse, spec)
        ones = np.ones_like(mean)
        noise = _gradient_noise(found, mean, inverse, ones, rows.shape[1], scale is not None, spec, call.stream())
        noise = {k: v.reshape(n_samples, n_groups).repeat(repeats, 1) for k, v in noise.items()}
        _perturb_samples(image_of(dx), noise, image_of(x), spec, call.stream())
    if of_scale is not None or of_shift is not None:
        h = x.detach().reshape(len(mean), -1) * _column(inverse, x) - _column(mean * inverse, x)
        found = _totals(_channel_rows(gradient), _channel_rows(h.reshape(x.shape)), *_standard(n_channels), spec)
        _perturb_sums((of_scale, of_shift), (found.product_variance, found.slope_variance), call)


def layer_norm_backward(call: Call, result: Results) -> None:
    """Gradients of layer normalisation."""
    given, spec, (dx, of_scale, of_shift) = call.given, call.spec, result
    n = math.prod(given["normalized_shape"])
    gradient, x = (given[k].detach().reshape(-1, n) for k in ("grad_out", "input"))
    mean, inverse = (_float64(given[k]).reshape(-1) for k in ("mean", "rstd"))
    if dx is not None:
        scale = given.get("weight")
        slopes = gradient if scale is None else gradient * scale.detach().reshape(-1)
        found = _totals(slopes, x, mean, inverse, spec)
        ones = np.ones_like(mean)
        noise = _gradient_noise(found, mean, inverse, ones, n, scale is not None, spec, call.stream())
        columns = {k: _column(v, x) for k, v in noise.items()}
        rows = dx.view(-1, n)
        deviation = (rows - columns["offset"]).abs() * columns["quadratic"].sqrt()
        rows += columns["slope"] * x + columns["intercept"]
        perturb_(rows, deviation, spec, call.stream())
    if of_scale is not None or of_shift is not None:
        h = x * _column(inverse, x) - _column(mean * inverse, x)
        found = _totals(gradient.T, h.T, *_standard(n), spec)
        _perturb_sums((of_scale, of_shift), (found.product_variance, found.slope_variance), call)


def _perturb_sums(tensors: tuple[Any, ...], variances: tuple[np.ndarray, ...], call: Call) -> None:
    """Perturb sums by what comes before their last rounding; None where nobody wants one."""
    for number, (tensor, variance) in enumerate(zip(tensors, variances, strict=True)):
        if tensor is not None and tensor.numel():
            deviation = torch.from_numpy(np.sqrt(variance)).to(tensor.device).reshape(tensor.shape)
            perturb_(tensor, deviation, call.spec, call.stream(3 + number))


def _standard(n: int) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros(n), np.ones(n)


def _channel_rows(x: torch.Tensor) -> torch.Tensor:
    """(N, C, ...) -> (C, N ...), a view where one sample or channels-last memory allows."""
    x = x.detach()
    if x.dim() == 2:
        return x.T
    return x[0].flatten(1) if x.shape[0] == 1 else x.movedim(0, 1).flatten(1)


def _column(values: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(values, dtype=like.dtype, device=like.device)[:, None]


def _float64(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().cpu().numpy()
