"""Batch, group and layer normalisation and softmax, forward and backward."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from bids_varaug.numerics import normalisation, reductions, softmax
from bids_varaug.numerics.operator_models.context import Context, float64_of, image_of
from bids_varaug.numerics.perturb import perturb_, round_


def _batch_norm(given, result, context: Context) -> None:
    x = given["input"]
    y = result[0]
    running = (given.get("running_mean"), given.get("running_var"))
    training = given.get("training", given.get("train", False)) or running[0] is None
    epsilon = given.get("eps", given.get("epsilon", 1e-5))
    mean, inverse = (float64_of(t) for t in result[1:3])
    if not training:
        mean = float64_of(running[0])
        inverse = 1 / np.sqrt(float64_of(running[1]) + epsilon)
    errors = normalisation.perturb_batch_norm(
        image_of(y), image_of(x), given.get("weight"), given.get("bias"), mean, inverse, training,
        epsilon, context.how(),
    )  # fmt: skip
    if training:
        _shift_statistics(result[1], result[2], *errors)


def _group_norm(given, result, context: Context) -> None:
    x = given["input"]
    mean, inverse = (float64_of(t).reshape(x.shape[0], given["group"]) for t in result[1:3])
    errors = normalisation.perturb_group_norm(
        image_of(result[0]), image_of(x), given.get("weight"), given.get("bias"), mean, inverse,
        given["eps"], context.how(),
    )  # fmt: skip
    _shift_statistics(result[1], result[2], *(e.reshape(result[1].shape) for e in errors))


def _layer_norm(given, result, context: Context) -> None:
    n = math.prod(given["normalized_shape"])
    y = result[0].view(-1, n)
    flat = [None if given.get(k) is None else given[k].reshape(-1) for k in ("weight", "bias")]
    mean, inverse = (float64_of(t).reshape(-1) for t in result[1:3])
    errors = normalisation.perturb_layer_norm(
        y, given["input"].reshape(-1, n), *flat, mean, inverse, given["eps"],
        context.how(),
    )  # fmt: skip
    _shift_statistics(result[1], result[2], *(e.reshape(result[1].shape) for e in errors))


def _shift_statistics(mean, inverse, of_mean, of_inverse) -> None:
    """The statistics kept for the backward pass have the errors that the result has."""
    for tensor, change in ((mean, of_mean), (inverse, of_inverse * float64_of(inverse))):
        exact = tensor.detach().double() + torch.as_tensor(change, device=tensor.device)
        tensor.detach().copy_(exact.reshape(tensor.shape))


def _batch_norm_backward(given, result, context: Context) -> None:
    gradient = given.get("grad_out", given.get("grad_output"))
    x, rule = given["input"], context.rule
    mean, inverse = given.get("save_mean"), given.get("save_invstd", given.get("save_var"))
    if not given.get("train", True):
        mean, epsilon = given["running_mean"], given["eps"]
        inverse = 1 / (given["running_var"] + epsilon).sqrt()
    mean, inverse = float64_of(mean), float64_of(inverse)
    dx, of_scale, of_shift = result
    found = None
    if dx is not None and given.get("train", True):
        found = normalisation.perturb_norm_gradient(
            image_of(dx), image_of(gradient), image_of(x), given.get("weight"), mean, inverse,
            context.how(), (of_shift, of_scale),
        )  # fmt: skip
    elif dx is not None:
        round_(dx, rule, context.stream)
    if found is None:
        rows = [normalisation._channel_rows(t) for t in (gradient, x)]
        found = normalisation.totals(*rows, mean, inverse, context.how())
    _perturb_sums((of_scale, of_shift), (found.product_variance, found.slope_variance), context)


def _group_norm_backward(given, result, context: Context) -> None:
    gradient, x = given["grad_out"], given["input"]
    mean, inverse = (
        float64_of(given[k]).reshape(x.shape[0], given["group"]) for k in ("mean", "rstd")
    )
    dx, of_scale, of_shift = result
    if dx is not None:
        normalisation.perturb_group_norm_gradient(
            image_of(dx), image_of(gradient), image_of(x), given.get("weight"), mean, inverse,
            context.how(),
        )  # fmt: skip
    repeats = x.shape[1] // given["group"]

    def spread(values):  # (N, G) -> (C, N V), for the terms of each channel
        columns = torch.as_tensor(values, dtype=x.dtype, device=x.device).repeat_interleave(
            repeats, 1
        )
        voxels = math.prod(x.shape[2:])
        return columns.T[:, :, None].expand(-1, -1, voxels).reshape(x.shape[1], -1)

    rows = [t.detach().movedim(1, 0).reshape(x.shape[1], -1) for t in (gradient, x)]
    _perturb_scale_and_shift(of_scale, of_shift, *rows, spread(mean), spread(inverse), context)


def _layer_norm_backward(given, result, context: Context) -> None:
    n = math.prod(given["normalized_shape"])
    gradient, x = (given[k].detach().reshape(-1, n) for k in ("grad_out", "input"))
    mean, inverse = (float64_of(given[k]).reshape(-1) for k in ("mean", "rstd"))
    dx, of_scale, of_shift = result
    if dx is not None:
        weight = given.get("weight")
        normalisation.perturb_layer_norm_gradient(
            dx.view(-1, n), gradient, x, None if weight is None else weight.reshape(-1), mean,
            inverse, context.how(),
        )  # fmt: skip
    centre, scale = (
        torch.as_tensor(v, dtype=x.dtype, device=x.device)[None] for v in (mean, inverse)
    )
    _perturb_scale_and_shift(of_scale, of_shift, gradient.T, x.T, centre, scale, context)


def _perturb_scale_and_shift(of_scale, of_shift, gradient, x, mean, inverse, context) -> None:
    if of_scale is None and of_shift is None:
        return
    variances = normalisation.scale_and_shift_variances(gradient, x, mean, inverse, context.how())
    _perturb_sums((of_scale, of_shift), variances, context)


def _perturb_sums(tensors, variances, context) -> None:
    """Perturb sums, whose variances have the last rounding in them; None where nobody wants one."""
    for number, (tensor, variance) in enumerate(zip(tensors, variances, strict=True)):
        if tensor is not None:
            deviation = reductions.deviation_before_last(variance, tensor, context.rule)
            perturb_(tensor, deviation, context.rule, context.how(1 + number).stream)


def _softmax(is_log: bool, given, result, context: Context) -> None:
    if not result.numel():
        return
    softmax.perturb_softmax(result, given["dim"], is_log, context.rule, context.stream)


def _softmax_backward(is_log: bool, given, result, context: Context) -> None:
    if not result.numel():
        return
    softmax.perturb_softmax_gradient(
        result, given["grad_output"], given["output"], given["dim"], is_log, context.rule,
        context.stream,
    )  # fmt: skip


MODELS: dict[str, Callable] = {
    **dict.fromkeys(
        ("native_batch_norm", "_native_batch_norm_legit", "cudnn_batch_norm",
         "_batch_norm_with_update", "_native_batch_norm_legit_no_training",
         "_batch_norm_no_update"),
        _batch_norm,
    ),
    **dict.fromkeys(
        ("native_batch_norm_backward", "cudnn_batch_norm_backward"), _batch_norm_backward
    ),
    "native_group_norm": _group_norm,
    "native_group_norm_backward": _group_norm_backward,
    "native_layer_norm": _layer_norm,
    "native_layer_norm_backward": _layer_norm_backward,
    "_softmax": partial(_softmax, False),
    "_log_softmax": partial(_softmax, True),
    "_softmax_backward_data": partial(_softmax_backward, False),
    "_log_softmax_backward_data": partial(_softmax_backward, True),
}  # fmt: skip
