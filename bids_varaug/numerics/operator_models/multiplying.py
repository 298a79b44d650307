"""Convolutions and matrix products, forward and backward."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial

from bids_varaug.numerics import products, reductions
from bids_varaug.numerics.operator_models.context import Context, image_of
from bids_varaug.numerics.perturb import perturb_, round_


def _convolution(given, result, context: Context) -> None:
    x, weight, bias = given["input"], given["weight"], given.get("bias")
    geometry = _geometry(given)
    if geometry is None:
        return round_(result, context.rule, context.stream)
    images = [image_of(t) for t in (result, x)]
    kernels = image_of(weight)
    if given.get("transposed"):
        _sum_of_products_by_model(result, x, weight, bias, given, context)
        return None
    squares = partial(_squares, context.again, {"input": x, "weight": weight, "bias": None})
    products.perturb_convolution(
        *images, kernels, bias, geometry, given.get("groups", 1), lambda: image_of(squares()),
        context.how(),
    )  # fmt: skip
    return None


def _sum_of_products_by_model(result, x, weight, bias, given, context: Context) -> None:
    """Transposed or strided gradients: no sample, energy in full or by its mean."""
    stride = math.prod(given["stride"])
    n_terms = max(weight.numel() / weight.shape[1] / stride / given.get("groups", 1), 1.0)
    total = result if bias is None else result - bias.reshape(-1, *[1] * (result.dim() - 2))
    if context.accumulation == "exact":
        energy = _squares(context.again, {"input": x, "weight": weight, "bias": None})
    else:
        energy = n_terms * x.square().mean() * weight.square().mean()
    _perturb_by_model(result, total, energy, n_terms, context)


def _perturb_by_model(result, total, energy, n_terms, context: Context) -> None:
    variance = products.modelled_variance(total, energy, n_terms, context.rule)
    variance = variance - context.rule.of_result * context.rule.per_energy * result**2
    perturb_(result, variance.clamp_min_(0).sqrt_(), context.rule, context.stream)


def _squares(again, tensors: dict):
    return again(**{name: None if t is None else t * t for name, t in tensors.items()})


def _geometry(given) -> products.Geometry | None:
    n_axes = given["weight"].dim() - 2
    if not 1 <= n_axes <= 3:
        return None
    values = []
    for name, missing in (("stride", 1), ("padding", 0), ("dilation", 1)):
        value = list(given[name])
        value = value * n_axes if len(value) == 1 else value
        values.append((*value, *[missing] * (3 - n_axes)))
    return products.Geometry(*values)


def _convolution_backward(given, result, context: Context) -> None:
    gradient, x, weight = given["grad_output"], given["input"], given["weight"]
    of_input, of_weight, of_bias = result
    geometry, groups = _geometry(given), given.get("groups", 1)
    if geometry is None:
        for tensor in result:
            if tensor is not None:
                round_(tensor, context.rule, context.stream)
        return

    @cache
    def gradient_squared():
        return gradient * gradient

    def squares(position):  # of the other operand that counts: of the third one only its shape does
        mask = [i == position for i in range(3)]
        other = {"weight": weight * weight} if position == 0 else {"input": x * x}
        found = context.again(grad_output=gradient_squared(), output_mask=mask, **other)
        return image_of(found[position])

    if of_input is not None:
        simple = groups == 1 and not given["transposed"] and set(geometry.stride) == {1}
        if simple:
            kernels = image_of(weight).flip(2, 3, 4).transpose(0, 1)
            reach = [d * (k - 1) - p for d, k, p in zip(
                geometry.dilation, kernels.shape[2:], geometry.padding, strict=True)]  # fmt: skip
            inverse = geometry._replace(padding=tuple(reach))
            products.perturb_convolution(
                image_of(of_input), image_of(gradient), kernels, None, inverse, 1,
                lambda: squares(0), context.how(0),
            )  # fmt: skip
        else:
            n_terms = max(weight[:, 0].numel() / groups / math.prod(geometry.stride), 1.0)
            if context.accumulation == "exact":
                energy = squares(0).reshape(of_input.shape)
            else:
                energy = n_terms * gradient.square().mean() * weight.square().mean()
            _perturb_by_model(of_input, of_input, energy, n_terms, context)
    if of_weight is not None:
        slopes, inputs = image_of(gradient), image_of(x)
        if given["transposed"]:
            slopes, inputs = inputs, slopes
        products.perturb_weight_gradient(
            image_of(of_weight),
            slopes,
            inputs,
            geometry,
            groups,
            lambda: squares(1),
            context.how(1),
        )
    if of_bias is not None:
        dims = (0, *range(2, gradient.dim()))
        deviation = reductions.deviation_of_sum(gradient, dims, of_bias, context.how(2))
        perturb_(of_bias, deviation, context.rule, context.how(2).stream)


def _matrix_product(given, result, context: Context) -> None:
    """mm, addmm, mv, addmv, dot: all as one matrix product."""
    a = given.get("mat1", given.get("mat", given.get("self")))
    b = given.get("mat2", given.get("vec", given.get("vec2", given.get("tensor"))))
    bias = given["self"] if "mat1" in given or "mat" in given else None
    scaled = given.get("alpha", 1) != 1 or given.get("beta", 1) != 1
    if scaled and bias is not None:
        a, bias = a * given.get("alpha", 1), bias * given.get("beta", 1)
    a = a[None] if a.dim() == 1 else a
    columns = b[:, None] if b.dim() == 1 else b
    view = result.reshape(a.shape[0], columns.shape[1])
    if bias is not None:
        bias = bias[:, None] if bias.dim() == 1 and b.dim() == 1 else bias
    products.perturb_matrix_product(view, a, columns, bias, context.how())
    if view.data_ptr() != result.data_ptr():
        result.copy_(view.reshape(result.shape))


def _batched_product(given, result, context: Context) -> None:
    """bmm, baddbmm: one after another."""
    a, b = (
        (given["batch1"], given["batch2"]) if "batch1" in given else (given["self"], given["mat2"])
    )
    bias = given["self"] if "batch1" in given else None
    if bias is not None:
        bias = (bias * given.get("beta", 1)).expand(result.shape)
        a = a * given.get("alpha", 1)
    for i in range(result.shape[0]):
        part = None if bias is None else bias[i]
        products.perturb_matrix_product(result[i], a[i], b[i], part, context.how(i))


MODELS: dict[str, Callable] = {
    **dict.fromkeys(
        ("convolution", "_convolution", "mkldnn_convolution", "cudnn_convolution"), _convolution
    ),
    "convolution_backward": _convolution_backward,
    **dict.fromkeys(("mm", "addmm", "mv", "addmv", "dot", "vdot"), _matrix_product),
    **dict.fromkeys(("bmm", "baddbmm"), _batched_product),
}  # fmt: skip
