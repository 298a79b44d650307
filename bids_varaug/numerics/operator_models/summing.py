"""Sums, means, variances, norms, pooling and losses."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from bids_varaug.numerics import reductions
from bids_varaug.numerics.operator_models.context import Context
from bids_varaug.numerics.perturb import perturb_, round_


def _dims(given, x) -> tuple[int, ...]:
    dims = given.get("dim")
    if dims is None or dims == []:
        return tuple(range(x.dim()))
    dims = [dims] if isinstance(dims, int) else dims
    return tuple(sorted(d % max(x.dim(), 1) for d in dims))


def _sum(given, result, context: Context) -> None:
    _reduction(given, result, context, reductions.deviation_of_sum)


def _mean(given, result, context: Context) -> None:
    _reduction(given, result, context, reductions.deviation_of_mean)


def _reduction(given, result, context: Context, deviation_of) -> None:
    x = given["self"]
    if x.dtype != result.dtype or not x.dim() or not x.numel():
        return round_(result, context.rule, context.stream)
    deviation = deviation_of(x, _dims(given, x), result, context.how())
    return perturb_(result, deviation, context.rule, context.stream)


def _variance(given, result, context: Context) -> None:
    """var, std, var_mean, std_mean."""
    x, dims = given["self"], _dims(given, given["self"])
    results = result if isinstance(result, tuple) else (result,)
    spread = results[0]
    correction = given.get("correction")
    correction = 1 if correction is None else correction
    is_root = context.again.__name__.startswith("std")
    squared = spread.square() if is_root else spread
    deviation = reductions.deviation_of_variance(x, dims, squared, correction, context.how())
    if is_root:
        deviation = torch.where(spread > 0, deviation / (2 * spread), 0.0)
    perturb_(spread, deviation, context.rule, context.stream)
    if len(results) > 1:
        of_mean = reductions.deviation_of_mean(x, dims, results[1], context.how(1))
        perturb_(results[1], of_mean, context.rule, context.how(1).stream)


def _norm(given, result, context: Context) -> None:
    order = given.get("ord", given.get("p", 2))
    if order in (2, None):
        return _reduction(given, result, context, reductions.deviation_of_norm)
    return round_(result, context.rule, context.stream)


def _positive_sum(n_terms: Callable) -> Callable:
    """For sums of few terms, or of terms that cannot be looked at."""

    def model(given, result, context: Context) -> None:
        for number, tensor in enumerate(result if isinstance(result, tuple) else (result,)):
            n = max(float(n_terms(given, tensor)), 1.0)
            deviation = reductions.deviation_of_positive_sum(tensor, n, context.rule)
            perturb_(tensor, deviation, context.rule, context.how(number).stream)

    return model


def _kernel_voxels(given, result) -> float:
    return math.prod(given["kernel_size"])


def _input_voxels(given, result) -> float:
    """Input elements per output element."""
    source = given.get("grad_output", given.get("self"))
    return source.numel() / max(result.numel(), 1)


def _loss_terms(given, result) -> float:
    if given["self"].dim() > 1 and "target" in given and not given["target"].is_floating_point():
        return given["target"].numel() / max(result.numel(), 1)
    return given["self"].numel() / max(result.numel(), 1)


MODELS: dict[str, Callable] = {
    "sum": _sum,
    "mean": _mean,
    **dict.fromkeys(("var", "std", "var_mean", "std_mean"), _variance),
    **dict.fromkeys(("linalg_vector_norm", "norm"), _norm),
    **dict.fromkeys(("avg_pool2d", "avg_pool3d"), _positive_sum(_kernel_voxels)),
    **dict.fromkeys(
        ("_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "upsample_nearest1d_backward",
         "upsample_nearest2d_backward", "upsample_nearest3d_backward"),
        _positive_sum(_input_voxels),
    ),
    **dict.fromkeys(
        ("nll_loss_forward", "nll_loss2d_forward", "mse_loss", "l1_loss", "smooth_l1_loss",
         "huber_loss", "binary_cross_entropy", "soft_margin_loss"),
        _positive_sum(_loss_terms),
    ),
}  # fmt: skip
