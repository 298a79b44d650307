"""Noise of matrix products and convolutions, forward and backward.

Variance of an element: that of all its partial sums where the whole operator is small (`DIRECT` multiply-adds);
otherwise a Brownian bridge by result and energy (`sums.bridge`), scaled so that on a sample of elements it has the
variance of their partial sums. The energy ``sum x^2 w^2`` is taken as the product of what lies under the kernel, of
every place, and of the kernel.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch

from bids_varaug.numerics.noise import ChannelNoise, perturb_, perturb_channels_, round_
from bids_varaug.numerics.specification import Call, RoundingSpecification, image_of
from bids_varaug.numerics.sums import (
    Blocks,
    PartialSums,
    blocks_of_products,
    bridge_variances,
    energies,
    partial_sums,
    sum_variance,
)

DIRECT = 2**18  # multiply-adds of an operator whose partial sums are all computed
_DIRECT_IMAGES = 2**19  # the same of a convolution, which comes less often
_SAMPLED = 2**14  # of a sample
_LONG = 2**16  # terms of a matrix product of which a sample is looked at
_VOXELS = 2**13  # of a weight gradient, whose energies are computed
_FEW = 2**12  # terms of a weight gradient whose energies are computed for each element
_PAIRS = 16  # channels on either side of a weight gradient whose partial sums are looked at


# ----------------------------------------------------------------------------------------------------------------------
# Matrix products


def matrix_product(call: Call, result: torch.Tensor) -> None:
    """mm, addmm, mv, addmv, dot, vdot, bmm, baddbmm, addbmm, addr: all as matrix products."""
    given = call.given
    a = _first(given, "mat1", "mat", "batch1", "vec1", "self")
    b = _first(given, "mat2", "batch2", "vec2", "vec", "tensor", "other")
    bias = given["self"] if a is not given["self"] else None
    alpha, beta = given.get("alpha", 1), given.get("beta", 1)
    if bias is not None:
        a, bias = (a if alpha == 1 else a * alpha), (bias if beta == 1 else bias * beta)
        bias = None if beta == 0 else bias
    if call.name == "addr":
        a, b = a[:, None], b[None]
    if call.name == "addbmm":
        a, b = a.movedim(0, 1).flatten(1), b.flatten(0, 1)
    a = a[None] if a.dim() == 1 else a
    if b.dim() == 1:
        b, bias = b[:, None], bias[:, None] if bias is not None and bias.dim() == 1 else bias
    target = result.reshape(*a.shape[:-1], b.shape[-1])
    bias = None if bias is None else bias.expand(target.shape)
    a, b, batch = (t if t.dim() == 3 else t[None] for t in (a, b, target))
    added = [None] * len(a) if bias is None else bias.expand(batch.shape) if bias.dim() == 3 else bias[None]
    for i, factors in enumerate(zip(batch, a, b, added, strict=True)):
        perturb_product(*factors, call.spec, call.stream(i))
    if target.data_ptr() != result.data_ptr():
        result.copy_(target.reshape(result.shape))


def _first(given: dict[str, Any], *names: str) -> torch.Tensor:
    return next(given[name] for name in names if name in given)


def perturb_product(
    y: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    spec: RoundingSpecification,
    stream: int,
) -> None:
    """Perturb y = a b + bias in place.

    Parameters
    ----------
    y : (M, N), float32 or float64, or complex
    a : (M, K), same dtype
    b : (K, N)
    bias : (M, N), or None
    """
    if y.is_complex():  # each part is a product of twice as many terms
        parts = torch.view_as_real(y)
        right, added = torch.cat([b.real, b.imag]), (None, None) if bias is None else (bias.real, bias.imag)
        perturb_product(parts[..., 0], torch.cat([a.real, -a.imag], 1), right, added[0], spec, stream)
        left = torch.cat([a.imag, a.real], 1)
        perturb_product(parts[..., 1], left, right, added[1], spec, stream ^ 0x5555)
        return
    (m, k), n = a.shape, b.shape[1]
    if not m * n * k:
        return
    if m * n * k <= DIRECT:
        perturb_(y, _with_bias(partial_sums(_numpy(a), _numpy(b), spec), bias is not None, spec), spec, stream)
        return
    if k > _LONG and bias is None:  # as the gradient of a convolution's kernels, channels by channels
        images = image_of(a[None]), image_of(b.T[None])
        _perturb_weight_gradient(image_of(y), *images, None, Geometry((1,) * 3, (0,) * 3, (1,) * 3), spec, stream)
        return
    rows, columns = _sample((m, n), k, stream)
    of_rows, of_columns = _row_energies(a), _row_energies(b.T) / k
    sums = partial_sums(_some(a, rows), _some(b.T, columns).T, spec)
    seen = _some(of_rows, rows)[:, None] * _some(of_columns, columns)
    factor = _factor(sums, seen, k, n, spec)
    quadratic, linear = bridge_variances(k, spec)
    quadratic += spec.per_energy * spec.of_partial_sum * (bias is not None)
    if bias is not None and bias.stride(0) != 0:
        variance = ((y - bias).double().square() * quadratic).addcmul_(of_rows[:, None], of_columns, value=linear)
        perturb_(y, variance.mul_(torch.from_numpy(factor).to(y.device)), spec, stream)
        return
    offset = None if bias is None else _numpy(bias[0]).astype("f8")
    linears = factor * linear * _numpy(of_columns)
    dense = y.contiguous()
    noise = ChannelNoise(factor * quadratic, linears, offset, of_rows.reshape(1, -1, 1, 1))
    perturb_channels_(dense.view(1, m, n).movedim(2, 1)[..., None, None], noise, spec, stream)
    if dense is not y:
        y.copy_(dense)


def _row_energies(a: torch.Tensor) -> torch.Tensor:
    """(M, K) -> (M,) float64: sums of squares, read as they lie in memory."""
    weights = np.ones(a.shape[1])
    return energies(a.T[None], weights)[0] if a.stride(0) == 1 else energies(a[:, :, None], weights)[:, 0]


def _with_bias(sums: PartialSums, has_bias: bool, spec: RoundingSpecification) -> np.ndarray:
    """Variance without the last rounding; with a bias the sum of products is one more partial sum."""
    variance = sums.variance(spec)
    return variance + spec.per_energy * spec.of_partial_sum * sums.totals**2 if has_bias else variance


def _sample(shape: tuple[int, int], n_terms: int, stream: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of a matrix product whose partial sums are looked at, spread evenly from a random place on."""
    at_once = max(_SAMPLED // n_terms, 1)
    n_rows = min(shape[0], 32, max(16, at_once // shape[1]))
    n_columns = min(shape[1], max(at_once // n_rows, 4))
    start = stream % 2**16 / 2**16
    rows, columns = (
        ((np.arange(size) + start) * n / size).astype(np.int64)
        for n, size in zip(shape, (n_rows, n_columns), strict=True)
    )
    return rows, columns


def _factor(
    sums: PartialSums, energy: np.ndarray, n_terms: float, n_out: int, spec: RoundingSpecification
) -> np.ndarray:
    """What the variance by the bridge is to be multiplied by: of each column, or of all together, (n_out,)."""
    quadratic, linear = bridge_variances(n_terms, spec)
    truth, model = sums.variance(spec), quadratic * sums.totals**2 + linear * energy
    if truth.shape[1] == n_out:
        return _ratio(truth.sum(0), model.sum(0))
    return np.full(n_out, _ratio(truth.sum(), model.sum()))


def _ratio(truth: np.ndarray, model: np.ndarray) -> np.ndarray:
    """Truth / model, 1 where the model is 0 or either is no number."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.asarray(truth) / model
    return np.where(np.isfinite(ratio) & (np.asarray(model) > 0), ratio, 1.0)


# ----------------------------------------------------------------------------------------------------------------------
# Convolutions


class Geometry(NamedTuple):
    """Of a convolution over three axes."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]


def _geometry(given: dict[str, Any]) -> Geometry | None:
    n_axes = given["weight"].dim() - 2
    if not 1 <= n_axes <= 3:
        return None
    values = []
    for name, missing in (("stride", 1), ("padding", 0), ("dilation", 1)):
        value = list(given[name])
        value = value * n_axes if len(value) == 1 else value
        values.append((*value, *[missing] * (3 - n_axes)))
    return Geometry(*values)


def convolution(call: Call, result: torch.Tensor) -> None:
    """Noise of a convolution's result, plain or transposed."""
    given, geometry = call.given, _geometry(call.given)
    x, weight, bias, groups = given["input"], given["weight"], given.get("bias"), given.get("groups", 1)
    if geometry is None:
        round_(result, call.spec, call.stream())
    elif groups == 1 and not given.get("transposed"):
        _perturb_convolution(image_of(result), image_of(x), image_of(weight), bias, geometry, call.spec, call.stream())
    else:
        squares = {"input": x.square(), "weight": weight.square()}
        energy = call.again(**squares, bias=None)
        n_terms = weight[0].numel()
        if given.get("transposed"):
            n_terms = weight.numel() / weight.shape[1] / groups / math.prod(given["stride"])
        total = result if bias is None else result - bias.reshape(-1, *[1] * (result.dim() - 2))
        _perturb_by_energy(result, total, energy, max(n_terms, 1.0), bias is not None, call.spec, call.stream())


def _perturb_by_energy(y, total, energy, n_terms, has_bias: bool, spec: RoundingSpecification, stream: int) -> None:
    """By the bridge alone, the energy of each element given."""
    quadratic, linear = bridge_variances(n_terms, spec)
    quadratic += spec.per_energy * spec.of_partial_sum * has_bias
    variance = quadratic * total.double().square() + linear * energy.double().clamp_min(0)
    perturb_(y, variance, spec, stream)


def _perturb_convolution(
    y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    geometry: Geometry,
    spec: RoundingSpecification,
    stream: int,
) -> None:
    """Perturb a convolution's result in place: (N, O, X, Y, Z) of (N, C, X', Y', Z') and (O, C, KX, KY, KZ)."""
    if not y.numel() or not x.numel():
        return
    n_out, n_terms = y.shape[1], weight[0].numel()
    n_voxels = y.numel() // n_out
    is_small = y.numel() * n_terms <= _DIRECT_IMAGES
    if is_small:
        voxels, channels = np.arange(n_voxels), np.arange(n_out)
    else:
        voxels, channels = _sample((n_voxels, n_out), n_terms, stream)
    places = np.stack(np.unravel_index(voxels, (y.shape[0], *y.shape[2:])), axis=1)
    chosen = weight if len(channels) == n_out else weight[torch.from_numpy(channels).to(weight.device)]
    patches = _patches(x, places, weight.shape[2:], geometry)
    sums = partial_sums(patches, _numpy(chosen.reshape(len(channels), -1).T), spec)
    if is_small:
        variance = _with_bias(sums, bias is not None, spec)
        perturb_(y, np.moveaxis(variance.reshape(y.shape[0], *y.shape[2:], n_out), -1, 1), spec, stream)
        return
    quadratic, linear = bridge_variances(n_terms, spec)
    quadratic += spec.per_energy * spec.of_partial_sum * (bias is not None)
    squares = weight.detach().double().square()
    of_inputs = squares.mean((0, 2, 3, 4)).clamp_min(1e-300)
    energy = _window_sums(_channel_energy(x, of_inputs.cpu().numpy()), weight.shape[2:], geometry, y.shape[2:])
    of_outputs = (squares / of_inputs.reshape(1, -1, 1, 1, 1)).mean((1, 2, 3, 4)).cpu().numpy()
    seen = energy.reshape(-1)[torch.from_numpy(voxels).to(energy.device)].cpu().numpy()
    factor = _factor(sums, seen[:, None] * of_outputs[channels], n_terms, n_out, spec)
    offset = None if bias is None else _numpy(bias).astype("f8")
    noise = ChannelNoise(factor * quadratic, factor * linear * of_outputs, offset, energy)
    perturb_channels_(y, noise, spec, stream)


def _channel_energy(x: torch.Tensor, weights: np.ndarray) -> torch.Tensor:
    """(N, C, X, Y, Z) -> (N, X, Y, Z): sum over channels of weights times squares, float64."""
    shape = (x.shape[0], *x.shape[2:])
    last = x.detach().movedim(1, -1)
    if last.is_contiguous():
        return energies(last.reshape(-1, x.shape[1], 1), weights).reshape(shape)
    return energies(x.detach().flatten(2), weights).reshape(shape)


def _window_sums(energy: torch.Tensor, kernel, geometry: Geometry, shape) -> torch.Tensor:
    """What lies under a kernel: (N, X', Y', Z') -> (N, X, Y, Z)."""
    for axis, (k, s, p, d) in enumerate(zip(kernel, *geometry, strict=True)):
        if (k, s, p) == (1, 1, 0):
            continue
        size, n = energy.shape[1 + axis], shape[axis]
        is_same = (s, size) == (1, n) and p % d == 0 and p // d < k  # one tap is the whole itself
        total = energy.clone() if is_same else energy.new_zeros(*energy.shape[: 1 + axis], n, *energy.shape[2 + axis :])
        for tap in range(k):
            start = tap * d - p
            if is_same and start == 0:
                continue
            first, stop = max(0, -(start // s)), min(n, (size - 1 - start) // s + 1)
            if stop > first:
                at = slice(start + first * s, start + (stop - 1) * s + 1, s)
                before = (slice(None),) * (1 + axis)
                total[(*before, slice(first, stop))] += energy[(*before, at)]
        energy = total
    return energy


def _patches(x: torch.Tensor, places: np.ndarray, kernel, geometry: Geometry) -> np.ndarray:
    """What lies under the kernel for some voxels of the result, (S, 4) -> (S, C KX KY KZ); 0 on padding."""
    index, inside = [places[:, 0].reshape(-1, 1, 1, 1)], np.ones((), bool)
    for axis, size in enumerate(kernel):
        taps = np.arange(size) * geometry.dilation[axis] - geometry.padding[axis]
        place = places[:, 1 + axis, None] * geometry.stride[axis] + taps
        shape = [-1, 1, 1, 1]
        shape[1 + axis] = size
        inside = inside & ((place >= 0) & (place < x.shape[2 + axis])).reshape(shape)
        index.append(place.clip(0, x.shape[2 + axis] - 1).reshape(shape))
    if x.device.type == "cpu":
        patches = _numpy(x.movedim(1, -1))[tuple(index)]
    else:
        patches = _numpy(x.movedim(1, -1)[tuple(torch.from_numpy(places).to(x.device) for places in index)])
    return np.moveaxis(np.where(inside[..., None], patches, 0), -1, 1).reshape(len(places), -1)


def convolution_backward(call: Call, result: tuple[torch.Tensor | None, ...]) -> None:
    """Noise of the gradients with respect to input, kernels and bias."""
    given, geometry = call.given, _geometry(call.given)
    gradient, x, weight = given["grad_output"], given["input"], given["weight"]
    of_input, of_weight, of_bias = result
    groups = given.get("groups", 1)
    if geometry is None:
        for number, tensor in enumerate(t for t in result if t is not None):
            round_(tensor, call.spec, call.stream(number))
        return
    if of_input is not None:
        if groups == 1 and not given["transposed"] and set(geometry.stride) == {1}:
            kernels = image_of(weight).flip(2, 3, 4).transpose(0, 1)
            padding = [d * (k - 1) - p for d, k, p in zip(geometry[2], kernels.shape[2:], geometry[1], strict=True)]
            _perturb_convolution(
                image_of(of_input), image_of(gradient), kernels, None, geometry._replace(padding=tuple(padding)),
                call.spec, call.stream(0),
            )  # fmt: skip
        else:
            squares = {"grad_output": gradient.square(), "weight": weight.square()}
            energy = call.again(**squares, output_mask=[True, False, False])[0]
            n_terms = weight[:, 0].numel() / groups / (1 if given["transposed"] else math.prod(geometry.stride))
            _perturb_by_energy(of_input, of_input, energy, max(n_terms, 1.0), False, call.spec, call.stream(0))
    if of_weight is not None:
        slopes, inputs = (x, gradient) if given["transposed"] else (gradient, x)
        n_terms, energy = max(slopes.numel() // max(slopes.shape[1], 1), 1), None
        if groups > 1 or n_terms <= _FEW:
            squares = {"grad_output": gradient.square(), "input": x.square()}
            energy = call.again(**squares, output_mask=[False, True, False])[1]
        if groups == 1 and of_weight.numel() and gradient.numel():
            images = image_of(slopes), image_of(inputs), None if energy is None else image_of(energy)
            _perturb_weight_gradient(image_of(of_weight), *images, geometry, call.spec, call.stream(1))
        else:
            _perturb_by_energy(of_weight, of_weight, energy, n_terms, False, call.spec, call.stream(1))
    if of_bias is not None:
        variance = sum_variance(gradient, (0, *range(2, gradient.dim())), call.spec)
        perturb_(of_bias, variance, call.spec, call.stream(2))


def _perturb_weight_gradient(
    y: torch.Tensor,
    gradient: torch.Tensor,
    x: torch.Tensor,
    energy: torch.Tensor | None,
    geometry: Geometry,
    spec: RoundingSpecification,
    stream: int,
) -> None:
    """Perturb the gradient (O, C, KX, KY, KZ) of (N, O, X, Y, Z) and (N, C, X', Y', Z').

    If it is not given, the energy of each pair of channels is that of the tap in the middle, from some voxels. What the
    partial sums of some pairs drift beyond a bridge counts for all.
    """
    middle = [k // 2 for k in y.shape[2:]]
    rows, others, step = _voxels(gradient, x, middle, geometry)
    n_terms = gradient.numel() // gradient.shape[1]
    if not rows.shape[1]:
        return round_(y, spec, stream)
    # Share of the terms of each tap that lie on the image
    inside = torch.ones((), device=y.device, dtype=torch.float64)
    for axis, size in enumerate(y.shape[2:]):
        first, stop = zip(*(_overlap(tap, axis, geometry, gradient, x) for tap in range(size)), strict=True)
        of_taps = (torch.tensor(stop) - torch.tensor(first)).clamp_min(0).to(inside) / gradient.shape[2 + axis]
        inside = inside * of_taps.reshape([-1 if d == axis else 1 for d in range(3)])
    if energy is None:
        middle_energy = rows.float().square() @ others.float().square().T
        energy = middle_energy.double().mul_(n_terms / rows.shape[1])[:, :, None, None, None] * inside
    quadratic, linear = bridge_variances(n_terms, spec)
    blocks = blocks_of_products(_numpy(rows[:_PAIRS].double()), _numpy(others[:_PAIRS].double()).T)
    share, drift = _drift(blocks, step)
    variance, exact = energy.double().clamp_min_(0).mul_(linear * (1 + drift)), y.detach().double()
    variance.addcmul_(exact, exact, value=quadratic)
    if not spec.rounds_exact:
        variance.mul_(share * inside)
    return perturb_(y, variance, spec, stream)


def _overlap(tap: int, axis: int, geometry: Geometry, gradient: torch.Tensor, x: torch.Tensor) -> tuple[int, int]:
    """Voxels of a convolution's result, from first to stop, for which a tap lies on the image."""
    start, stride = tap * geometry.dilation[axis] - geometry.padding[axis], geometry.stride[axis]
    stop = min(gradient.shape[2 + axis], (x.shape[2 + axis] - 1 - start) // stride + 1)
    return max(0, -(start // stride)), stop


def _voxels(gradient, x, tap, geometry: Geometry) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Some terms of a weight gradient at a tap, in order: (O, V), (C, V), and how many terms one stands for."""
    inside_g, inside_x = [slice(None), slice(None)], [slice(None), slice(None)]
    n_terms = gradient.numel() // gradient.shape[1]
    n_axes = max(1, sum(n > 1 for n in gradient.shape[2:]))
    every = max(1, round((n_terms / _VOXELS) ** (1 / n_axes))) if n_terms > _VOXELS else 1
    for axis, offset in enumerate(tap):
        n, stride = gradient.shape[2 + axis], geometry.stride[axis]
        start = offset * geometry.dilation[axis] - geometry.padding[axis]
        first, stop = _overlap(offset, axis, geometry, gradient, x)
        if stop <= first:
            return gradient.new_empty(gradient.shape[1], 0), x.new_empty(x.shape[1], 0), 1.0
        step = every if n >= 2 * every else 1
        first = min(first + step // 2, stop - 1)
        inside_g.append(slice(first, stop, step))
        inside_x.append(slice(start + first * stride, start + (stop - 1) * stride + 1, stride * step))
    rows, others = (
        t.detach()[tuple(inside)].movedim(1, 0).flatten(1)
        for t, inside in ((gradient, inside_g), (x, inside_x))
    )
    return rows, others, max(1.0, n_terms / max(rows.shape[1], 1))


def _drift(blocks: Blocks, step: float) -> tuple[float, float]:
    """Share of the terms that are not 0, and what sums wander beyond a bridge, relative to a bridge.

    Sums of every `step`-th term wander more than those of all terms do where terms are independent: that is taken off,
    and one standard error of the estimate with it.
    """
    n = blocks.sizes.sum()
    share = float((blocks.counts.sum(0) * blocks.energy).sum() / max(n * blocks.energy.sum(), 1e-300))
    path = np.cumsum(blocks.totals, 0)
    at = (np.cumsum(blocks.sizes) / n).reshape(-1, 1, 1)
    wandering = ((path - at * path[-1]) ** 2).sum()
    expected = (at * (1 - at) * np.maximum(blocks.energy - path[-1] ** 2 / n, 0)).sum()
    if not expected > 0:
        return share, 0.0
    n_pairs = blocks.energy.size
    excess = step * (wandering / expected - 1)
    error = step * 2 / math.sqrt(n_pairs) if step > 1 else 0.0
    return share, float(max(excess - error, 0.0) if step > 1 else max(excess, -0.9))


def _some(tensor: torch.Tensor, rows: np.ndarray) -> np.ndarray:
    if tensor.device.type == "cpu":
        return _numpy(tensor)[rows]
    return _numpy(tensor.index_select(0, torch.from_numpy(rows).to(tensor.device)))


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()
