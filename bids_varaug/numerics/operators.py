"""Which torch operators round, and how the noise of each is modelled.

Operators are told apart by the name that torch's dispatcher gives them, without overload. What is
in `EXACT` returns numbers that were there before, or no numbers: it is left alone. What is in
`MODELS` is perturbed by the model of its many instructions; any other operator that returns
floating-point numbers is taken for one instruction per element.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import torch

from bids_varaug.numerics import normalisation, products, reductions, softmax
from bids_varaug.numerics.perturb import perturb_, round_
from bids_varaug.numerics.rules import How, Rule

# Copies, views, comparisons, indexing, rounding to integers, what only changes signs or chooses
# between numbers, random numbers (rounded when they were drawn), and what allocates.
EXACT = frozenset(
    """
    _unsafe_view _reshape_alias abs neg negative sign sgn relu hardtanh relu6 leaky_relu_ threshold
    threshold_backward hardtanh_backward clamp clamp_min clamp_max clip maximum minimum fmax fmin
    max min amax amin aminmax copysign max_pool1d max_pool2d_with_indices
    max_pool2d_with_indices_backward max_pool3d_with_indices max_pool3d_with_indices_backward
    max_unpool2d max_unpool3d adaptive_max_pool2d adaptive_max_pool3d copy copy_ clone _to_copy to
    contiguous empty empty_like empty_strided new_empty new_empty_strided new_zeros new_ones
    new_full zeros zeros_like ones ones_like full full_like fill fill_ zero_ eye any all as_strided
    unbind split chunk cat stack index index_select index_fill index_copy gather scatter
    slice_scatter select_scatter diagonal_scatter as_strided_scatter take take_along_dim masked_fill
    masked_scatter masked_select where roll flip rot90 tril triu diag diag_embed repeat
    repeat_interleave constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d
    replication_pad1d replication_pad2d replication_pad3d select_backward slice_backward unfold_copy
    upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d
    _upsample_nearest_exact2d _upsample_nearest_exact3d pixel_shuffle pixel_unshuffle
    channel_shuffle round floor ceil trunc frac eq ne lt le gt ge isnan isfinite isinf lift_fresh
    lift _local_scalar_dense rand randn rand_like randn_like randint uniform_ normal_ bernoulli
    bernoulli_ exponential_ random_ arange resize_ set_ set_data record_stream is_same_size sort
    topk argmax argmin argsort kthvalue median mode unique_consecutive nonzero embedding
    scalar_tensor frexp ldexp logical_and logical_or logical_not logical_xor isclose equal
    nan_to_num nan_to_num_ complex real imag view_as_real _conj _pack_padded_sequence
    _resize_output_ _unsafe_index searchsorted bucketize device layout
    """.split()
)


@dataclass(frozen=True)
class Context:
    """What a model needs besides the operator's arguments and result.

    Parameters
    ----------
    rule : of the result's format
    accumulation : "exact" or "fast"
    stream : names the random numbers of this call, 64 bits
    again : runs the operator with other arguments of the same names
    """

    rule: Rule
    accumulation: str
    stream: int
    again: Callable

    def how(self, number: int = 0) -> How:
        """What models of products need, with another stream for each number."""
        stream = (self.stream + number * 0x9E3779B97F4A7C15) % 2**64
        return How(self.rule, self.accumulation == "exact", stream)


def _is_power_of_two(given) -> bool:
    factor = _number(given.get("other"))
    return given.get("rounding_mode") is not None or (
        factor is not None and factor != 0 and abs(math.frexp(factor)[0]) == 0.5
    )


def _adds_zero(given) -> bool:
    return _number(given.get("other")) == 0


def _copies(given) -> bool:
    return not given.get("accumulate") and given.get("reduce") in (None, "amax", "amin")


# What is exact for some arguments
_EXACT_FOR: dict[str, Callable[[dict], bool]] = {
    **dict.fromkeys(("mul", "multiply", "div", "divide"), _is_power_of_two),
    **dict.fromkeys(("add", "sub", "subtract"), _adds_zero),
    "pow": lambda given: _number(given.get("exponent")) in (0, 1),
    **dict.fromkeys(
        ("index_put", "_index_put_impl", "_unsafe_index_put", "scatter_reduce", "put"), _copies
    ),
}


def _number(value) -> float | None:
    """A scalar, or a tensor that holds one on the CPU; None for anything else."""
    if isinstance(value, int | float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, torch.Tensor) and value.dim() == 0 and value.device.type == "cpu":
        number = math.inf if value.is_complex() else float(value.detach())
        return number if math.isfinite(number) else None
    return None


# --------------------------------------------------------------------------------------------------
# Products


def _convolution(given, result, context: Context) -> None:
    x, weight, bias = given["input"], given["weight"], given.get("bias")
    geometry = _geometry(given)
    if geometry is None:
        return round_(result, context.rule, context.stream)
    images = [_image(t) for t in (result, x)]
    kernels = _image(weight)
    if given.get("transposed"):
        _sum_of_products_by_model(result, x, weight, bias, given, context)
        return None
    squares = partial(_squares, context.again, {"input": x, "weight": weight, "bias": None})
    products.perturb_convolution(
        *images, kernels, bias, geometry, given.get("groups", 1), lambda: _image(squares()),
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


def _image(tensor: torch.Tensor) -> torch.Tensor:
    """(N, C, ...) -> (N, C, X, Y, Z), a view."""
    while tensor.dim() < 5:
        tensor = tensor[..., None]
    return tensor


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
        return _image(found[position])

    if of_input is not None:
        simple = groups == 1 and not given["transposed"] and set(geometry.stride) == {1}
        if simple:
            kernels = _image(weight).flip(2, 3, 4).transpose(0, 1)
            reach = [d * (k - 1) - p for d, k, p in zip(
                geometry.dilation, kernels.shape[2:], geometry.padding, strict=True)]  # fmt: skip
            inverse = geometry._replace(padding=tuple(reach))
            products.perturb_convolution(
                _image(of_input), _image(gradient), kernels, None, inverse, 1,
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
        slopes, inputs = _image(gradient), _image(x)
        if given["transposed"]:
            slopes, inputs = inputs, slopes
        products.perturb_weight_gradient(
            _image(of_weight), slopes, inputs, geometry, groups, lambda: squares(1), context.how(1)
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


# --------------------------------------------------------------------------------------------------
# Sums


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


# --------------------------------------------------------------------------------------------------
# Normalisation and softmax


def _batch_norm(given, result, context: Context) -> None:
    x = given["input"]
    y = result[0]
    running = (given.get("running_mean"), given.get("running_var"))
    training = given.get("training", given.get("train", False)) or running[0] is None
    epsilon = given.get("eps", given.get("epsilon", 1e-5))
    mean, inverse = (_float64(t) for t in result[1:3])
    if not training:
        mean = _float64(running[0])
        inverse = 1 / np.sqrt(_float64(running[1]) + epsilon)
    errors = normalisation.perturb_batch_norm(
        _image(y), _image(x), given.get("weight"), given.get("bias"), mean, inverse, training,
        epsilon, context.how(),
    )  # fmt: skip
    if training:
        _shift_statistics(result[1], result[2], *errors)


def _shift_statistics(mean, inverse, of_mean, of_inverse) -> None:
    """The statistics kept for the backward pass have the errors that the result has."""
    for tensor, change in ((mean, of_mean), (inverse, of_inverse * _float64(inverse))):
        exact = tensor.detach().double() + torch.as_tensor(change, device=tensor.device)
        tensor.detach().copy_(exact.reshape(tensor.shape))


def _group_norm(given, result, context: Context) -> None:
    x = given["input"]
    mean, inverse = (_float64(t).reshape(x.shape[0], given["group"]) for t in result[1:3])
    errors = normalisation.perturb_group_norm(
        _image(result[0]), _image(x), given.get("weight"), given.get("bias"), mean, inverse,
        given["eps"], context.how(),
    )  # fmt: skip
    _shift_statistics(result[1], result[2], *(e.reshape(result[1].shape) for e in errors))


def _layer_norm(given, result, context: Context) -> None:
    n = math.prod(given["normalized_shape"])
    y = result[0].view(-1, n)
    flat = [None if given.get(k) is None else given[k].reshape(-1) for k in ("weight", "bias")]
    mean, inverse = (_float64(t).reshape(-1) for t in result[1:3])
    errors = normalisation.perturb_layer_norm(
        y, given["input"].reshape(-1, n), *flat, mean, inverse, given["eps"],
        context.how(),
    )  # fmt: skip
    _shift_statistics(result[1], result[2], *(e.reshape(result[1].shape) for e in errors))


def _batch_norm_backward(given, result, context: Context) -> None:
    gradient = given.get("grad_out", given.get("grad_output"))
    x, rule = given["input"], context.rule
    mean, inverse = given.get("save_mean"), given.get("save_invstd", given.get("save_var"))
    if not given.get("train", True):
        mean, epsilon = given["running_mean"], given["eps"]
        inverse = 1 / (given["running_var"] + epsilon).sqrt()
    mean, inverse = _float64(mean), _float64(inverse)
    dx, of_scale, of_shift = result
    found = None
    if dx is not None and given.get("train", True):
        found = normalisation.perturb_norm_gradient(
            _image(dx), _image(gradient), _image(x), given.get("weight"), mean, inverse,
            context.how(), (of_shift, of_scale),
        )  # fmt: skip
    elif dx is not None:
        round_(dx, rule, context.stream)
    if found is None:
        rows = [normalisation._channel_rows(t) for t in (gradient, x)]
        found = normalisation.totals(*rows, mean, inverse, context.how())
    _perturb_sums((of_scale, of_shift), (found.product_variance, found.slope_variance), context)


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


def _group_norm_backward(given, result, context: Context) -> None:
    gradient, x = given["grad_out"], given["input"]
    mean, inverse = (
        _float64(given[k]).reshape(x.shape[0], given["group"]) for k in ("mean", "rstd")
    )
    dx, of_scale, of_shift = result
    if dx is not None:
        normalisation.perturb_group_norm_gradient(
            _image(dx), _image(gradient), _image(x), given.get("weight"), mean, inverse,
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
    mean, inverse = (_float64(given[k]).reshape(-1) for k in ("mean", "rstd"))
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


def _float64(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().cpu().numpy()


MODELS: dict[str, Callable] = {
    "convolution": _convolution,
    "_convolution": _convolution,
    "mkldnn_convolution": _convolution,
    "cudnn_convolution": _convolution,
    "convolution_backward": _convolution_backward,
    **dict.fromkeys(("mm", "addmm", "mv", "addmv", "dot", "vdot"), _matrix_product),
    **dict.fromkeys(("bmm", "baddbmm"), _batched_product),
    "sum": _sum,
    "mean": _mean,
    **dict.fromkeys(("var", "std", "var_mean", "std_mean"), _variance),
    **dict.fromkeys(("linalg_vector_norm", "norm"), _norm),
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


@dataclass(frozen=True)
class Operator:
    """What is known of one of torch's operators.

    Parameters
    ----------
    name : without overload
    names : of the arguments, in order
    defaults : of those that have one
    views : which of its results are views of an argument, unchanged
    written : names of the arguments that it changes
    not_returned : those of them that are not among its results
    is_exact : whether it rounds nothing, whatever its arguments
    is_exact_for : whether it rounds nothing for the arguments given; None: never so
    model : of its many instructions; None: one instruction per element
    """

    name: str
    names: tuple[str, ...]
    defaults: dict
    views: frozenset[int]
    written: tuple[str, ...]
    not_returned: tuple[str, ...]
    is_exact: bool
    is_exact_for: Callable[[dict], bool] | None
    model: Callable | None

    def given(self, args, kwargs) -> dict:
        """Arguments by name."""
        return self.defaults | dict(zip(self.names, args, strict=False)) | kwargs

    def rounds_nothing(self, args, kwargs) -> bool:
        """Whether no number of the result is rounded.

        Examples
        --------
        >>> mul = operator_of(torch.ops.aten.mul.Tensor)
        >>> mul.rounds_nothing((torch.ones(2), 0.5), {}), mul.rounds_nothing((torch.ones(2), 3), {})
        (True, False)
        """
        if self.is_exact or self.is_exact_for is None:
            return self.is_exact
        return self.is_exact_for(self.given(args, kwargs))


@cache
def operator_of(func) -> Operator:
    """Return what is known of an operator, by its schema and its name."""
    schema, name = func._schema, func.overloadpacket.__name__
    one = name.removeprefix("_foreach_")
    base = one.removesuffix("_")
    written = {
        a.name: a.alias_info.before_set
        for a in schema.arguments
        if a.alias_info is not None and a.alias_info.is_write
    }
    aliases = {i: r.alias_info for i, r in enumerate(schema.returns) if r.alias_info is not None}
    views = frozenset(i for i, alias in aliases.items() if not alias.is_write)
    returned = set().union(*(alias.before_set for alias in aliases.values()))
    return Operator(
        name=name,
        names=tuple(a.name for a in schema.arguments),
        defaults={a.name: a.default_value for a in schema.arguments if a.has_default_value()},
        views=views,
        written=tuple(written),
        not_returned=tuple(key for key, alias in written.items() if not alias & returned),
        is_exact=one in EXACT or base in EXACT or bool(views and not written),
        is_exact_for=_EXACT_FOR.get(base),
        model=MODELS.get(name, MODELS.get(name.removesuffix("_"))),
    )
