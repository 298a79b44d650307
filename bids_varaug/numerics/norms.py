"""Noise of batch and instance normalisation, forward and backward (group and layer normalisation are decomposed).

Over the n elements of a channel, each operation one rounding, ``mean = total(x) / n``, ``d = x - mean``,
``variance = total(d^2) / n``, ``r = 1 / sqrt(variance + epsilon)``, ``h = d r``, ``y = h scale + shift``. Errors of the
mean and of r are the same for the whole channel; those of d, h and what follows are of each element. Backwards, with
s = gradient scale: ``dx = r ((s - total(s) / n) - h total(s h) / n)``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from bids_varaug.numerics.noise import ChannelNoise, perturb_, perturb_channels_, round_
from bids_varaug.numerics.specification import Call, RoundingSpecification, image_of
from bids_varaug.numerics.sums import blocks_of

Results = tuple[torch.Tensor, ...]


def batch_norm(call: Call, result: Results) -> None:
    """Batch normalisation; its running statistics too, though torch's schema does not say that it writes them."""
    given, spec = call.given, call.spec
    x, scale, shift = given["input"], given.get("weight"), given.get("bias")
    running: Any = (given.get("running_mean"), given.get("running_var"))
    by_name = "no_training" not in call.name and "no_update" not in call.name
    of_batch = given.get("training", given.get("train", by_name)) or running[0] is None
    epsilon = given.get("eps", given.get("epsilon", 1e-5))
    if of_batch:
        mean, inverse = _float64(result[1]), _float64(result[2])
        of_mean, squares = _variances_of_statistics(_channel_rows(x), mean, spec)
        of_mean = np.sqrt(of_mean) * _draws(call, mean.shape)
    else:
        mean, inverse = _float64(running[0]), 1 / np.sqrt(_float64(running[1]) + epsilon)
        of_mean, squares = np.zeros((2, *mean.shape))
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = np.nan_to_num(squares * inverse**4 / 4, posinf=0.0)
    # The sum's last rounding, the division by n and adding epsilon count half through the root, in variance a quarter
    relative += spec.per_energy * (0.75 * spec.of_result + 2 * spec.of_multiplication)
    of_inverse = np.sqrt(relative) * _draws(call, mean.shape, 1)
    is_affine = scale is not None or shift is not None
    steps = spec.of_partial_sum + (2 if is_affine else 1) * spec.of_multiplication - (not is_affine) * spec.of_result
    factor = 1.0 if scale is None else _float64(scale)
    offset = np.zeros_like(mean) if shift is None else _float64(shift)
    noise = ChannelNoise(
        quadratic=np.full_like(mean, spec.per_energy * steps),
        offset=offset,
        slope=of_inverse,
        intercept=-offset * of_inverse - of_mean * inverse * factor,
    )
    perturb_channels_(image_of(result[0]), noise, spec, call.stream())
    if not of_batch:
        return
    _shift(result[1], of_mean)
    _shift(result[2], of_inverse * inverse)
    if running[0] is not None:
        n, momentum = x.numel() // x.shape[1], given.get("momentum", given.get("exponential_average_factor", 0.1))
        variance = (1 / inverse**2 - epsilon) * n / max(n - 1, 1)
        _shift(running[0], momentum * of_mean)
        _shift(running[1], momentum * -2 * of_inverse * (variance + epsilon))
        for number, statistic in enumerate(running):
            round_(statistic, spec, call.stream(1 + number))


def batch_norm_backward(call: Call, result: Results) -> None:
    """Gradients of batch normalisation."""
    given, spec, (dx, of_scale, of_shift) = call.given, call.spec, result
    gradient: torch.Tensor = given["grad_out"] if "grad_out" in given else given["grad_output"]
    x, scale, is_training = given["input"], given.get("weight"), given.get("train", True)
    if is_training:
        saved = given["save_invstd"] if "save_invstd" in given else given["save_var"]
        mean, inverse = _float64(given["save_mean"]), _float64(saved)
    else:
        mean, inverse = _float64(given["running_mean"]), 1 / np.sqrt(_float64(given["running_var"]) + given["eps"])
    rows = _channel_rows(gradient), _channel_rows(x)
    slopes, products = blocks_of(rows[0], (1,)), blocks_of(rows[0], (1,), rows[1], None, mean)
    of_shifts = slopes.variance(spec, spec.of_operand)
    # Each h comes from a difference and a product
    steps = spec.per_energy * (spec.of_partial_sum + spec.of_multiplication) * products.energy
    of_scales = (products.variance(spec, spec.of_product) + steps) * inverse**2
    if dx is not None and is_training:
        n, factor = rows[0].shape[1], np.ones_like(mean) if scale is None else _float64(scale)
        of_scaling = 0.0 if scale is None else spec.of_multiplication
        slope, energy = slopes.totals.sum(0) * factor / n, slopes.energy * factor**2
        common = np.sqrt(of_shifts + of_scaling * spec.per_energy * slopes.energy) * _draws(call, mean.shape)
        inclination = -(inverse**2) * np.sqrt(of_scales) * _draws(call, mean.shape, 1) * factor / n
        offset, spread = -inverse * slope, np.maximum(energy / n - slope**2, 0.0) * inverse**2
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.nan_to_num(spread / (spread + offset**2), nan=1.0)
        of_terms = (2 * spec.of_partial_sum + spec.of_multiplication - spec.of_result) * share
        noise = ChannelNoise(
            quadratic=spec.per_energy * (of_scaling + of_terms),
            offset=offset,
            slope=inclination,
            intercept=-inverse * common * factor / n - inclination * mean,
            companion=image_of(x),
        )
        perturb_channels_(image_of(dx), noise, spec, call.stream())
    elif dx is not None:
        round_(dx, spec, call.stream())
    for number, (tensor, variance) in enumerate(((of_scale, of_scales), (of_shift, of_shifts))):
        if tensor is not None and tensor.numel():
            perturb_(tensor, variance, spec, call.stream(3 + number))


def _variances_of_statistics(
    rows: torch.Tensor, mean: np.ndarray, spec: RoundingSpecification
) -> tuple[np.ndarray, np.ndarray]:
    """Variances of the means and of the variances of channels (C, n)."""
    n, distances = max(rows.shape[1], 1), blocks_of(rows, (1,), centre=mean)
    sizes = distances.sizes[:, None]
    energies = distances.energies + 2 * mean * distances.totals + sizes * mean**2
    total = replace(distances, totals=distances.totals + sizes * mean, energies=energies)
    # Of the squares themselves only their sums matter much: their own squares are taken for those of normal numbers
    squares = replace(distances, totals=distances.energies, energies=3 * distances.energies**2 / sizes)
    # The total's own last rounding, and that of the division
    of_mean = total.variance(spec, spec.of_operand) / n**2 + 2 * spec.per_energy * spec.of_result * mean**2
    return of_mean, squares.variance(spec, spec.of_product) / n**2


def _draws(call: Call, shape: tuple[int, ...], number: int = 0) -> np.ndarray:
    """Standard normal random numbers for what a whole channel shares."""
    return np.random.default_rng([call.stream(), number]).standard_normal(shape)


def _shift(statistic: torch.Tensor, change: np.ndarray) -> None:
    """Statistics that are kept, for the backward pass or for later, have the errors that the result has."""
    if statistic.numel():
        exact = statistic.detach().double() + torch.as_tensor(change, device=statistic.device).reshape(statistic.shape)
        statistic.detach().copy_(exact)


def _channel_rows(x: torch.Tensor) -> torch.Tensor:
    """(N, C, ...) -> (C, N ...), a view where one sample or channels-last memory allows."""
    x = x.detach()
    if x.dim() == 2:
        return x.T
    return x[0].flatten(1) if x.shape[0] == 1 else x.movedim(0, 1).flatten(1)


def _float64(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().cpu().numpy()
