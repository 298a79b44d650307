"""Operators of many instructions as what they consist of: each part is then perturbed by itself.

Most decompositions are torch's own (``torch._decomp``); here are those that torch lacks, or computes another way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode


def attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    *rest: Any,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of fused attention on the CPU, written out."""
    is_causal, mask = rest[1] if len(rest) > 1 else options.get("is_causal", False), options.get("attn_mask")
    scale = options.get("scale") or 1 / math.sqrt(query.shape[-1])
    scores = (query @ key.mT) * scale
    if mask is not None:
        scores = scores + mask
    if is_causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).tril().logical_not(), -math.inf)
    weights = torch.exp(scores - logsumexp.unsqueeze(-1))
    of_weights = grad_out @ value.mT
    of_scores = weights * (of_weights - (grad_out * out).sum(-1, keepdim=True)) * scale
    return of_scores @ key, of_scores.mT @ query, weights.mT @ grad_out


def softmax(self: Tensor, dim: int, half_to_float: bool) -> Tensor:
    """``exp(x - max(x)) / total``."""
    power = _below_largest(self, dim).exp()
    return power / power.sum(dim, keepdim=True) if self.dim() else power / power


def log_softmax(self: Tensor, dim: int, half_to_float: bool) -> Tensor:
    """``x - max(x) - log(total)``."""
    distance = _below_largest(self, dim)
    return distance - distance.exp().sum(dim, keepdim=True).log() if self.dim() else distance


def _below_largest(x: Tensor, dim: int) -> Tensor:
    """``x - max(x)``, with differences that are exact left alone where the mode does so."""
    largest = x.amax(dim, keepdim=True) if x.numel() and x.dim() else x
    rounded = x - largest
    mode: Any = _get_current_dispatch_mode()
    if mode.specification(x).rounds_exact:
        return rounded
    with _disable_current_modes():  # exact if both operands can be had back
        exact = x - largest
        is_exact = (exact + largest == x).logical_and_(exact - x == -largest)
    return torch.where(is_exact, exact, rounded)


def group_norm_backward(
    grad_out: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, samples: int, channels: int,
    voxels: int, groups: int, output_mask: list[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of group normalisation, each one sum in a row."""
    gradient, inverse = grad_out.reshape(samples, channels, voxels), rstd.reshape(samples, groups, 1)
    h = (x.reshape(samples, groups, -1) - mean.reshape(samples, groups, 1)) * inverse
    slope = (gradient if weight is None else gradient * weight[:, None]).reshape(samples, groups, -1)
    dx = ((slope - slope.mean(2, keepdim=True)) - h * (slope * h).mean(2, keepdim=True)) * inverse
    of_scale = (gradient * h.reshape(samples, channels, voxels)).sum((0, 2)) if output_mask[1] else None
    return dx.reshape(x.shape), of_scale, gradient.sum((0, 2)) if output_mask[2] else None


def softmax_backward(grad_output: Tensor, output: Tensor, dim: int, input_dtype: torch.dtype) -> Tensor:
    """``y (gradient - total(gradient y))``."""
    if not grad_output.dim():
        return torch.zeros_like(output)
    return (output * (grad_output - (grad_output * output).sum(dim, keepdim=True))).to(input_dtype)


def log_softmax_backward(grad_output: Tensor, output: Tensor, dim: int, input_dtype: torch.dtype) -> Tensor:
    """``gradient - exp(y) total(gradient)``."""
    total = grad_output.sum(dim, keepdim=True) if grad_output.dim() else grad_output
    return (grad_output - output.exp() * total).to(input_dtype)


def logsumexp(self: Tensor, dim: list[int], keepdim: bool = False) -> Tensor:
    """``log(total(exp(x - max))) + max``; of real numbers."""
    if self.is_complex():
        return NotImplemented
    largest = self.amax(dim, keepdim=True) if self.numel() else self.sum(dim, keepdim=True) * 0
    largest = torch.where(largest.abs() == math.inf, 0, largest)
    total = (self - largest).exp().sum(dim, keepdim=keepdim)
    return total.log() + (largest if keepdim or not self.dim() else largest.reshape(total.shape))


def _spread(
    self: Tensor, dim: list[int] | None = None, *, correction: float | None = None, keepdim: bool = False
) -> tuple[Tensor, float, Tensor]:
    """Variance by the squares of distances from the mean, over a squared scale; the scale; the mean."""
    dims = dim or list(range(self.dim()))
    mean, count = self.mean(dims, keepdim=True), math.prod(self.shape[d] for d in dims)
    distance, scale = _scaled(self - mean)
    squares = _squares(distance).sum(dims, keepdim=keepdim)
    variance = squares / max(count - (1 if correction is None else correction), 0)
    return variance, scale, mean if keepdim else mean.sum(dims)


def var_mean(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Variance and mean."""
    variance, scale, mean = _spread(*args, **kwargs)
    return variance * scale * scale, mean


def std_mean(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Standard deviation and mean."""
    variance, scale, mean = _spread(*args, **kwargs)
    return variance.sqrt() * scale, mean


def _scaled(x: Tensor) -> tuple[Tensor, float]:
    """Return x over a power of two, and that: the largest magnitude becomes about 1, so that squares stay finite."""
    largest = float(x.abs().amax()) if x.numel() else 0.0
    if not 0 < largest < math.inf or 1e-15 < largest < 1e15:
        return x, 1.0
    scale = 2.0 ** min(max(math.frexp(largest)[1], -120), 120)
    return x * (1 / scale), scale


def _squares(x: Tensor) -> Tensor:
    """``|x|^2``, real."""
    if not x.is_complex():
        return x * x
    parts = torch.view_as_real(x.resolve_conj())
    return (parts * parts).sum(-1)


def vector_norm(
    self: Tensor, ord: float = 2, dim: list[int] | None = None, keepdim: bool = False, *, dtype: Any = None
) -> Tensor:
    """Root of the sum of powers; of complex numbers, by their magnitudes."""
    x = self if dtype is None else self.to(dtype)
    dims = list(range(x.dim())) if dim is None else [dim] if isinstance(dim, int) else dim
    if math.isinf(ord) or ord == 0 or not x.dim() or not x.numel():
        return NotImplemented
    if ord == 2:
        x, scale = _scaled(x)
        return _squares(x).sum(dims, keepdim=keepdim).sqrt() * scale
    total = (x.abs() if ord == 1 else x.abs() ** ord).sum(dims, keepdim=keepdim)
    return total if ord == 1 else total ** (1 / ord)


def norm(
    self: Tensor, p: float | None = None, dim: list[int] | None = None, keepdim: bool = False, *, dtype: Any = None
) -> Tensor:
    """`vector_norm` under its older name."""
    return torch.linalg.vector_norm(self, 2 if p is None else p, dim or None, keepdim, dtype=dtype)


def cdist_forward(x1: Tensor, x2: Tensor, p: float, compute_mode: int | None = None) -> Tensor:
    """Norms of all differences."""
    return torch.linalg.vector_norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), p, dim=-1)


def cdist_backward(grad: Tensor, x1: Tensor, x2: Tensor, p: float, cdist: Tensor) -> Tensor:
    """Gradient of `cdist_forward` with respect to the first operand."""
    difference = x1.unsqueeze(-2) - x2.unsqueeze(-3)
    slope = _slope_of_norm(difference, cdist.unsqueeze(-1), p)
    return (slope * grad.unsqueeze(-1)).sum(-2)


def _slope_of_norm(difference: Tensor, norm: Tensor, p: float) -> Tensor:
    if p == 0:
        return torch.zeros_like(difference)
    if p == 1:
        return difference.sign()
    if math.isinf(p):
        magnitude = difference.abs()  # `norm` was computed from differences that were rounded otherwise
        return difference.sign() * (magnitude == magnitude.amax(-1, keepdim=True))
    slope = difference / norm if p == 2 else difference.sign() * (difference.abs() / norm) ** (p - 1)
    return torch.where(norm == 0, 0.0, slope)


def pdist_forward(self: Tensor, p: float = 2) -> Tensor:
    """Norms of the differences of all pairs of rows."""
    first, second = torch.triu_indices(len(self), len(self), 1, device=self.device)
    return torch.linalg.vector_norm(self[first] - self[second], p, dim=-1)


def dist(self: Tensor, other: Tensor, p: float = 2) -> Tensor:
    """Norm of a difference."""
    return torch.linalg.vector_norm(self - other, p)


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> tuple[Tensor, Tensor]:
    """Weight normalisation."""
    norm = torch.linalg.vector_norm(v, 2, [d for d in range(v.dim()) if d != dim % v.dim()], keepdim=True)
    return v * (g / norm), norm


def trilinear(
    i1: Tensor, i2: Tensor, i3: Tensor, expand1: list[int], expand2: list[int], expand3: list[int],
    sumdim: list[int], unroll_dim: int = 1,
) -> Tensor:  # fmt: skip
    """Sum of products of three factors (`torch.nn.Bilinear`)."""
    factors = []
    for factor, axes in ((i1, expand1), (i2, expand2), (i3, expand3)):
        for axis in axes:
            factor = factor.unsqueeze(axis)
        factors.append(factor)
    return (factors[0] * factors[1] * factors[2]).sum(sumdim) if sumdim else factors[0] * factors[1] * factors[2]


WRITTEN_OUT: dict[str, Callable[..., Any]] = {
    "_scaled_dot_product_flash_attention_for_cpu_backward": attention_backward,
    "_softmax": softmax,
    "_log_softmax": log_softmax,
    "native_group_norm_backward": group_norm_backward,
    "_softmax_backward_data": softmax_backward,
    "_log_softmax_backward_data": log_softmax_backward,
    "logsumexp": logsumexp,
    "softmax": torch.softmax,  # with out=
    "log_softmax": torch.log_softmax,
    "var_mean": var_mean,
    "var": lambda *args, **kwargs: var_mean(*args, **kwargs)[0],
    "std_mean": std_mean,
    "std": lambda *args, **kwargs: std_mean(*args, **kwargs)[0],
    "linalg_vector_norm": vector_norm,
    "norm": norm,
    "_foreach_norm": lambda tensors, ord=2, dtype=None: [norm(tensor, ord, dtype=dtype) for tensor in tensors],
    "_cdist_forward": cdist_forward,
    "_cdist_backward": cdist_backward,
    "_pdist_forward": pdist_forward,
    "dist": dist,
    "_weight_norm_interface": weight_norm,
    "_trilinear": trilinear,
}


@cache
def decomposition_of(func: torch._ops.OpOverload) -> Callable[..., Any] | None:
    """What an operator consists of; None where nobody has written it down."""
    own = WRITTEN_OUT.get(func.overloadpacket.__name__)
    if own is None:
        return decomposition_table.get(func)
    outputs = [a.name for a in func._schema.arguments if a.is_out]
    if not outputs:
        return own

    def into_outputs(*args: Any, **kwargs: Any) -> Any:
        targets = [kwargs.pop(name) for name in outputs]
        results = own(*args, **kwargs)
        if results is NotImplemented:
            return results
        for target, result in zip(targets, results if isinstance(results, tuple) else (results,), strict=True):
            if not torch.can_cast(result.dtype, target.dtype):
                raise RuntimeError(f"result type {result.dtype} cannot be cast to the output's type {target.dtype}")
            target.resize_(result.shape).copy_(result)
        return tuple(targets) if isinstance(results, tuple) else targets[0]

    return into_outputs


def call_written_out(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call attention or a recurrent layer so that torch takes the way of ordinary operators."""
    if func is torch.nn.functional.scaled_dot_product_attention:
        with sdpa_kernel(SDPBackend.MATH):
            return func(*args, **kwargs)
    before = torch._C._get_mkldnn_enabled(), torch._C._get_cudnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    torch._C._set_cudnn_enabled(False)
    try:
        return func(*args, **kwargs)
    finally:
        torch._C._set_mkldnn_enabled(before[0])
        torch._C._set_cudnn_enabled(before[1])


FUSED = ("scaled_dot_product_attention", "lstm", "gru", "rnn_tanh", "rnn_relu")
"""Functions that torch runs as one operator where it can."""
