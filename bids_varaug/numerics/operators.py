"""Which torch operators round, and how the noise of each is modelled: one table.

Operators are told apart by the name that torch's dispatcher gives them, without overload, final underscore and
``_foreach_``. Views, and what torch itself composes of other operators, are recognised by their schema and need no line
here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

import torch

from bids_varaug.numerics import norms, products, reductions
from bids_varaug.numerics.decompositions import decomposition_of

EXACT, ELEMENTWISE, MODELLED, DECOMPOSED, APPROXIMATE, ONCE, REFUSED, UNKNOWN = CLASSES = (
    "exact",  # returns numbers that were there before, whole numbers, random numbers, or none
    "elementwise",  # one instruction per element, rounded once
    "modelled",  # many instructions; the error of all of them by a formula
    "decomposed",  # many instructions; runs as the operators it consists of
    "approximate",  # linear algebra: operands perturbed as backward stability allows, then one rounding; warns
    "once",  # many instructions, rounded once per element: too little; warns
    "refused",  # quantised, sparse and nested tensors, private formats
    "unknown",  # not in this table, such as an extension's: rounded once per element; warns
)

_NAMES = {
    EXACT: """
        __iand__ __ilshift__ __ior__ __irshift__ __ixor__ __lshift__ __rshift__ _aminmax _foobar
        _amp_foreach_non_finite_check_and_unscale _chunk_cat _conj _conj_physical _copy_from
        _copy_from_and_resize _cudnn_init_dropout_state _cudnn_rnn_flatten_weight _efficientzerotensor
        _fake_quantize_learnable_per_channel_affine _fake_quantize_learnable_per_tensor_affine
        _fake_quantize_per_tensor_affine_cachemask_tensor_qparams _fill_mem_eff_dropout_mask
        _functional_assert_async _functional_assert_scalar _functional_sym_constrain_range
        _functional_sym_constrain_range_for_size _fused_dropout _fused_dropout_mask
        _fused_moving_avg_obs_fq_helper _fused_moving_avg_obs_fq_helper_functional _histogramdd_bin_edges
        _histogramdd_from_bin_cts _histogramdd_from_bin_tensors _is_all_true _is_any_true _lazy_clone
        _local_scalar_dense _make_dep_token _mkldnn_reshape _mkldnn_transpose _new_zeros_with_same_feature_meta
        _pack_padded_sequence _philox_key_fold_in _philox_key_split _philox_normal _philox_uniform _pin_memory
        _reshape_alias _resize_output _sample_dirichlet _stack _standard_gamma _test_autograd_multiple_dispatch
        _test_functorch_fallback _test_optional_filled_intlist _test_optional_floatlist _test_optional_intlist
        _test_parallel_materialize _test_warn_in_autograd _to_dense _unique _unique2 _unsafe_index
        _unsafe_masked_index _unsafe_view _upsample_nearest_exact1d _upsample_nearest_exact2d
        _upsample_nearest_exact3d abs adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool2d_backward
        adaptive_max_pool3d adaptive_max_pool3d_backward all amax amin aminmax any arange argmax argmin argsort
        as_strided as_strided_scatter bernoulli bincount binomial bitwise_and bitwise_left_shift bitwise_not
        bitwise_or bitwise_right_shift bitwise_xor block_diag bucketize cat cauchy ceil channel_shuffle chunk
        clamp clamp_max clamp_min clip clone complex conj_physical constant_pad_nd contiguous copy copysign
        count_nonzero cummax cummin detach device diag diag_embed diagonal_backward diagonal_scatter embedding
        empty empty_like empty_permuted empty_strided eq equal exponential eye
        fake_quantize_per_channel_affine_cachemask fake_quantize_per_tensor_affine_cachemask fill flip floor
        floor_divide fmax fmin fmod frac fractional_max_pool2d fractional_max_pool2d_backward
        fractional_max_pool3d fractional_max_pool3d_backward frexp from_file full full_like gather gcd ge
        geometric gt hardshrink hardshrink_backward hardtanh hardtanh_backward hash_tensor heaviside histc
        histogram im2col imag index index_fill index_select is_same_size isclose isfinite isin isinf isnan
        isneginf isposinf kthvalue layout lcm ldexp le lift lift_fresh log_normal logical_and logical_not
        logical_or logical_xor lt lu_unpack masked_fill masked_scatter masked_scatter_backward masked_select max
        max_pool1d max_pool2d max_pool2d_backward max_pool2d_with_indices max_pool2d_with_indices_backward
        max_pool3d_with_indices max_pool3d_with_indices_backward max_unpool2d max_unpool3d maximum median min
        minimum mkldnn_max_pool2d mkldnn_max_pool2d_backward mkldnn_max_pool3d mkldnn_max_pool3d_backward
        mkldnn_reorder_conv2d_weight mkldnn_reorder_conv3d_weight mode multinomial nan_to_num nanmedian ne neg
        negative new_empty new_empty_strided new_full new_ones new_zeros nextafter nonzero nonzero_static normal
        normal_functional ones ones_like pixel_shuffle pixel_unshuffle poisson rand rand_like randint
        randint_like randn randn_like random randperm real record_stream reflection_pad1d reflection_pad2d
        reflection_pad3d relu relu6 repeat repeat_interleave replication_pad1d replication_pad2d
        replication_pad3d resize resize_as roll rot90 round scalar_tensor scatter searchsorted select_backward
        select_scatter set set_data sgn sign signbit slice_backward slice_scatter sort split squeeze stack t
        take take_along_dim threshold threshold_backward to to_mkldnn topk transpose tril tril_indices triu
        triu_indices trunc unbind uniform unique_consecutive unique_dim unique_dim_consecutive unsafe_split
        unsafe_split_with_sizes unsqueeze upsample_nearest1d upsample_nearest2d upsample_nearest3d view_as_real
        where zero zeros zeros_like""",
    ELEMENTWISE: """
        _add_relu _amp_update_scale _dirichlet_grad _masked_scale _prelu_kernel _prelu_kernel_backward
        _standard_gamma_grad acos acosh add addcdiv addcmul affine_grid_generator angle asin asinh atan atan2
        atanh binary_cross_entropy_backward binary_cross_entropy_with_logits celu cos cosh deg2rad digamma div
        elu elu_backward erf erfc erfinv exp exp2 expm1 fft_fftfreq fft_rfftfreq gelu gelu_backward glu
        glu_backward glu_backward_jvp glu_jvp hardsigmoid hardsigmoid_backward hardswish hardswish_backward
        huber_loss_backward hypot i0 igamma igammac leaky_relu leaky_relu_backward lerp lgamma linspace log
        log10 log1p log2 log_sigmoid_backward log_sigmoid_forward logaddexp logaddexp2 logit logit_backward
        logspace mish mish_backward mse_loss_backward mul multi_margin_loss_backward
        multilabel_margin_loss_backward mvlgamma native_dropout native_dropout_backward nll_loss2d_backward
        nll_loss_backward polar polygamma pow rad2deg range reciprocal remainder rrelu_with_noise
        rrelu_with_noise_backward rrelu_with_noise_functional rsqrt rsub sigmoid sigmoid_backward silu
        silu_backward sin sinc sinh smooth_l1_loss_backward soft_margin_loss_backward softplus softplus_backward
        softshrink softshrink_backward sqrt square sub tan tanh tanh_backward xlogy""",
    DECOMPOSED: """
        _cdist_backward _cdist_forward _euclidean_dist _fused_rms_norm _fused_rms_norm_backward _log_softmax
        _log_softmax_backward_data _pdist_forward _safe_softmax _scaled_dot_product_flash_attention_for_cpu
        _scaled_dot_product_flash_attention_for_cpu_backward _softmax _softmax_backward_data _trilinear
        _upsample_bicubic2d_aa _upsample_bilinear2d_aa _upsample_lanczos2d_aa _weight_norm_interface 
        binary_cross_entropy dist grid_sampler_2d huber_loss linalg_cross linalg_vector_norm logsumexp
        mse_loss multi_margin_loss multilabel_margin_loss_forward nansum native_group_norm
        native_group_norm_backward native_layer_norm native_layer_norm_backward nll_loss2d_forward
        nll_loss_forward norm renorm smooth_l1_loss soft_margin_loss std std_mean trace upsample_bicubic2d
        upsample_bilinear2d upsample_linear1d upsample_trilinear3d var var_mean""",
    APPROXIMATE: """
        _cholesky_solve_helper _compute_linear_combination _linalg_det _linalg_eigh _linalg_eigvals
        _linalg_slogdet _linalg_solve_ex _linalg_svd cholesky cholesky_inverse cholesky_solve geqrf
        linalg_cholesky_ex linalg_eig linalg_eigvals linalg_householder_product linalg_inv_ex
        linalg_ldl_factor_ex linalg_ldl_solve linalg_lstsq linalg_lu linalg_lu_factor_ex linalg_lu_solve
        linalg_matrix_exp linalg_pinv linalg_qr linalg_solve_triangular ormqr triangular_solve""",
    ONCE: """
        _addmm_activation _batch_norm_with_update_functional _conv_depthwise2d
        _embedding_bag_per_sample_weights_backward _fake_quantize_learnable_per_channel_affine_backward
        _fake_quantize_learnable_per_tensor_affine_backward _fused_sgd _grouped_mm _int_mm _logcumsumexp
        _masked_softmax _masked_softmax_backward _native_batch_norm_legit_functional
        _native_multi_head_attention _nnpack_spatial_convolution _pdist_backward _segment_reduce_backward
        _transform_bias_rescale_qkv _transformer_encoder_layer_fwd _weight_norm_interface_backward
        conv_depthwise3d conv_tbc convolution_backward_overrideable convolution_overrideable embedding_renorm
        grid_sampler_3d index_reduce linalg__powsum linear linear_backward log_softmax logcumsumexp
        matmul_backward native_norm powsum segment_reduce softmax""",
    REFUSED: """
        _mixed_dtypes_linear _spdiags _spsolve copy_sparse_to_sparse dequantize empty_quantized hspmm int_repr
        resize_as_sparse sspaddmm to_padded_tensor""",
}

# Families, for names that are not listed
_PATTERNS = {
    REFUSED: """
        _nested_* _sparse_* sparse_* quantize* _to_sparse* _coalesce* _empty_*quantized *4bit* *int4pack*
        *int8pack* _cslt_* _scaled_grouped_mm* _scaled_mm* _convert_indices_* _make_per_*_quantized_tensor
        q_per_channel_* *_padded_dense* _padded_dense*""",
    EXACT: """
        *_copy""",
    ELEMENTWISE: """
        special_* *_window""",
    ONCE: """
        miopen_* mkldnn_* cudnn_* _cudnn_* *mps* _scaled_dot_product_* _fused_ad* _flash_attention_*
        _efficient_attention_* _thnn_* _triton_* slow_conv* _slow_conv* batch_norm_* _grid_sampler_* *ctc_loss*""",
}

_MODELS: dict[Callable[..., None], str] = {
    products.matrix_product: "mm addmm mv addmv dot vdot bmm baddbmm addbmm addr",
    products.convolution: "convolution _convolution mkldnn_convolution cudnn_convolution",
    products.convolution_backward: "convolution_backward",
    norms.batch_norm: "native_batch_norm _native_batch_norm_legit cudnn_batch_norm _batch_norm_with_update "
                      "_native_batch_norm_legit_no_training _batch_norm_no_update",
    norms.batch_norm_backward: "native_batch_norm_backward cudnn_batch_norm_backward",
    reductions.total: "sum mean",
    reductions.product: "prod cumprod",
    reductions.cumulative: "cumsum",
    reductions.scattered: """
        scatter_add index_add index_put _index_put_impl _unsafe_index_put put scatter_reduce col2im unfold_backward
        _unsafe_masked_index_put_accumulate embedding_dense_backward _embedding_bag _embedding_bag_forward_only
        _embedding_bag_dense_backward _embedding_bag_backward avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d
        adaptive_avg_pool2d adaptive_avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d avg_pool2d_backward
        avg_pool3d_backward _adaptive_avg_pool2d_backward _adaptive_avg_pool3d_backward adaptive_avg_pool3d_backward
        upsample_nearest1d_backward upsample_nearest2d_backward upsample_nearest3d_backward
        _upsample_nearest_exact1d_backward _upsample_nearest_exact2d_backward _upsample_nearest_exact3d_backward
        reflection_pad1d_backward reflection_pad2d_backward reflection_pad3d_backward replication_pad1d_backward
        replication_pad2d_backward replication_pad3d_backward""",
    reductions.weighted: """
        upsample_linear1d_backward upsample_bilinear2d_backward upsample_trilinear3d_backward
        upsample_bicubic2d_backward _upsample_bilinear2d_aa_backward _upsample_bicubic2d_aa_backward
        _upsample_lanczos2d_aa_backward grid_sampler_2d_backward grid_sampler_3d_backward""",
    reductions.fourier: "_fft_c2c _fft_r2c _fft_c2r",
}  # fmt: skip

CLASS_OF: dict[str, str] = {name: kind for kind, names in _NAMES.items() for name in names.split()}
CLASS_OF |= {name: MODELLED for names in _MODELS.values() for name in names.split()}
_PATTERN_OF = {pattern: kind for kind, patterns in _PATTERNS.items() for pattern in patterns.split()}
_MODEL_OF: dict[str, Callable[..., None]] = {
    name: model for model, names in _MODELS.items() for name in names.split()
} | dict.fromkeys(_NAMES[APPROXIMATE].split(), reductions.backward_stable)
_COMPLEX_MODELS = {"mul": reductions.complex_product, "div": reductions.complex_product}


# ----------------------------------------------------------------------------------------------------------------------
# What is exact for some arguments


def _is_power_of_two(given: dict[str, Any]) -> bool:
    factor = _number(given.get("other"))
    return given.get("rounding_mode") is not None or (
        factor is not None and factor != 0 and abs(math.frexp(factor)[0]) == 0.5
    )


def _adds_zero(given: dict[str, Any]) -> bool:
    return _number(given.get("other")) == 0


def _copies(given: dict[str, Any]) -> bool:
    return not given.get("accumulate") and given.get("reduce") in (None, "amax", "amin")


def _takes_nearest(given: dict[str, Any]) -> bool:
    return given.get("interpolation_mode") == 1


_EXACT_FOR: dict[str, Callable[[dict[str, Any]], bool]] = {
    **dict.fromkeys(("mul", "multiply", "div", "divide"), _is_power_of_two),
    **dict.fromkeys(("add", "sub", "subtract"), _adds_zero),
    "pow": lambda given: _number(given.get("exponent")) in (0, 1),
    **dict.fromkeys(("index_put", "_index_put_impl", "_unsafe_index_put", "put"), _copies),
    "scatter_reduce": lambda given: given["reduce"] in ("amax", "amin"),
    "index_reduce": lambda given: given["reduce"] in ("amax", "amin"),
    **dict.fromkeys(("grid_sampler_2d", "grid_sampler_3d"), _takes_nearest),
    **dict.fromkeys(("_embedding_bag", "_embedding_bag_forward_only"), lambda given: given.get("mode") == 2),
}


def _number(value: Any) -> float | None:
    """A scalar, or a tensor that holds one on the CPU; None for anything else."""
    if isinstance(value, int | float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, torch.Tensor) and value.dim() == 0 and value.device.type == "cpu":
        number = math.inf if value.is_complex() else float(value.detach())
        return number if math.isfinite(number) else None
    return None


# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operator:
    """What is known of one of torch's operators.

    Parameters
    ----------
    name : without overload, final underscore and ``_foreach_``
    kind : one of `CLASSES`
    names : of the arguments, in order
    defaults : of those that have one
    views : which of its results are views of an argument, unchanged
    written : names of the arguments that it changes
    not_returned : those of them that are not among its results
    is_random : whether it draws random numbers
    is_exact_for : whether it rounds nothing for the arguments given; None: never so
    model : of its many instructions; None: one instruction per element
    decomposition : what it consists of
    """

    name: str
    kind: str
    names: tuple[str, ...]
    defaults: dict[str, Any]
    views: frozenset[int]
    written: tuple[str, ...]
    not_returned: tuple[str, ...]
    is_random: bool
    is_exact_for: Callable[[dict[str, Any]], bool] | None
    model: Callable[..., None] | None
    decomposition: Callable[..., Any] | None

    def given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments by name."""
        return self.defaults | dict(zip(self.names, args, strict=False)) | kwargs

    def rounds_nothing(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether no number of the result is rounded.

        Examples
        --------
        >>> mul = operator_of(torch.ops.aten.mul.Tensor)
        >>> mul.rounds_nothing((torch.ones(2), 0.5), {}), mul.rounds_nothing((torch.ones(2), 3), {})
        (True, False)
        """
        return self.kind == EXACT or (self.is_exact_for is not None and self.is_exact_for(self.given(args, kwargs)))

    def model_for(self, result: Any) -> Callable[..., None] | None:
        """The model of many instructions; products of complex numbers are such."""
        first = result[0] if isinstance(result, tuple | list) and result else result
        if isinstance(first, torch.Tensor) and first.is_complex() and self.name in _COMPLEX_MODELS:
            return _COMPLEX_MODELS[self.name]
        return self.model


def _class_of(name: str) -> str:
    if name in CLASS_OF:
        return CLASS_OF[name]
    return next((kind for pattern, kind in _PATTERN_OF.items() if fnmatchcase(name, pattern)), UNKNOWN)


@cache
def operator_of(func: torch._ops.OpOverload) -> Operator:
    """Return what is known of an operator, by its schema and its name."""
    schema, packet = func._schema, func.overloadpacket.__name__
    name = packet.removeprefix("_foreach_").removesuffix("_") if not packet.startswith("__") else packet
    written = {
        a.name: a.alias_info.before_set
        for a in schema.arguments
        if a.alias_info is not None and a.alias_info.is_write
    }
    aliases = {i: r.alias_info for i, r in enumerate(schema.returns) if r.alias_info is not None}
    views = frozenset(i for i, alias in aliases.items() if not alias.is_write)
    returned = set().union(*(alias.before_set for alias in aliases.values()))
    kind = _class_of(name) if func.namespace == "aten" else UNKNOWN
    decomposition = None
    if views and not written:
        kind = EXACT
    elif kind == DECOMPOSED:
        decomposition = decomposition_of(func)
        kind = DECOMPOSED if decomposition is not None else ONCE
    elif kind == UNKNOWN and not written and not any("Tensor" in str(r.type) for r in schema.returns):
        kind = EXACT
    return Operator(
        name=name,
        kind=kind,
        names=tuple(a.name for a in schema.arguments),
        defaults={a.name: a.default_value for a in schema.arguments if a.has_default_value()},
        views=views,
        written=tuple(written),
        not_returned=tuple(key for key, alias in written.items() if not alias & returned),
        is_random=torch.Tag.nondeterministic_seeded in func.tags,
        is_exact_for=_EXACT_FOR.get(name),
        model=_MODEL_OF.get(name) if kind in (MODELLED, APPROXIMATE) and not packet.startswith("_foreach_") else None,
        decomposition=decomposition,
    )
