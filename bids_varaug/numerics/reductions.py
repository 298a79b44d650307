"""Noise of sums and means, scattered and cumulative sums, pooling, transforms and linear algebra."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from bids_varaug.numerics.noise import perturb_, round_
from bids_varaug.numerics.specification import Call, RoundingSpecification
from bids_varaug.numerics.sums import bridge, sum_variance

Result = Any  # a tensor or several


def _dims(given: dict[str, Any], x: torch.Tensor) -> tuple[int, ...]:
    dims = given.get("dim")
    if dims is None or dims == []:
        return tuple(range(x.dim()))
    return tuple(sorted(d % max(x.dim(), 1) for d in ([dims] if isinstance(dims, int) else dims)))


def _parts(*tensors: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """Tensors, or their real and their imaginary parts."""
    if not tensors[0].is_complex():
        return [tensors]
    return [tuple(torch.view_as_real(t.resolve_conj())[..., part] for t in tensors) for part in (0, 1)]


def _perturb(y: torch.Tensor, variance: Any, spec: RoundingSpecification, stream: int) -> None:
    """Perturb by a variance without the last rounding, of the result's shape."""
    variance = torch.as_tensor(variance, dtype=torch.float64, device=y.device).nan_to_num(0.0, 0.0, 0.0)
    perturb_(y, variance.reshape(y.shape), spec, stream)


# ----------------------------------------------------------------------------------------------------------------------
# Sums


def total(call: Call, result: torch.Tensor) -> None:
    """sum, mean: the division is the last rounding of a mean."""
    x, spec = call.given["self"], call.spec
    if not x.dim() or not x.numel() or result.dtype != x.dtype:
        return round_(torch.view_as_real(result) if result.is_complex() else result, spec, call.stream())
    dims = _dims(call.given, x)
    count = math.prod(x.shape[d] for d in dims)
    if count == 1:
        return None
    for number, (y, terms) in enumerate(_parts(result, x)):
        variance = sum_variance(terms, dims, spec)
        if call.name == "mean":
            squares = y.detach().double().square().cpu().numpy().reshape(variance.shape)
            variance = variance / count**2 + spec.per_energy * spec.of_partial_sum * squares
        _perturb(y, variance, spec, call.stream(number))
    return None


def product(call: Call, result: torch.Tensor) -> None:
    """prod, cumprod: the relative errors of all multiplications."""
    x, spec = call.given["self"], call.spec
    for number, (y,) in enumerate(_parts(result)):
        factor: torch.Tensor | float
        if call.name == "cumprod" and x.dim():
            dim = _dims(call.given, x)[0]
            before = torch.arange(x.shape[dim], device=y.device, dtype=torch.float64) - 1
            factor = before.clamp_min(0).reshape([-1 if d == dim else 1 for d in range(x.dim())])
        else:
            factor = max(x.numel() / max(result.numel(), 1) - 2, 0.0)
        variance = y.double().square() * (spec.per_energy * spec.of_multiplication * factor)
        _perturb(y, variance, spec, call.stream(number))


def cumulative(call: Call, result: torch.Tensor) -> None:
    """cumsum: each partial sum is rounded once, and carries the errors of those before."""
    for number, (y,) in enumerate(_parts(result)):
        exact = y.clone()
        round_(y, call.spec, call.stream(number))
        if y.dim():
            dim = _dims(call.given, y)[0]
            errors = (y.double() - exact.double()).nan_to_num_(0.0, 0.0, 0.0)
            first = errors.narrow(dim, 0, min(1, errors.shape[dim]))
            first.zero_()  # no sum yet
            y.copy_(exact.double() + errors.cumsum(dim))


# Arguments that hold the terms of scattered sums, in the order in which they are looked for
_TERMS = ("grad_output", "grad", "grad_in", "src", "source", "values", "self", "weight")


def scattered(call: Call, result: Result) -> None:
    """Sums of terms that the operator chooses, with equal weights: what an index says, or what lies under a window.

    The same operator finds the number of terms of each element, given ones, and their energy, given squares.
    """
    given, spec, y = call.given, call.spec, _first(result)
    name = next(n for n in _TERMS if isinstance(given.get(n), torch.Tensor))
    x, has_base = given[name], name in ("src", "source", "values")
    if given.get("mode") == 2 or given.get("reduce") == "prod" or not y.numel() or y.dtype.itemsize < 4:
        return  # the largest, or (a warning says so) too few roundings
    is_mean = given.get("reduce") == "mean" or given.get("mode") == 1
    if has_base and not is_mean and not spec.rounds_exact and _are_copies(y, x):
        return

    def of_terms(terms: torch.Tensor, power: int, **changes: Any) -> torch.Tensor:
        if has_base:
            changes["self"] = torch.zeros_like(given["self"])
        for factor in {"alpha", "per_sample_weights"} & {key for key, value in given.items() if value is not None}:
            changes[factor] = given[factor] ** power
        return _first(call.again(**{name: terms}, **changes))

    if "pool" in call.name and name == "self":
        is_mean = True
        window = given.get("kernel_size") or [x.numel() / y.numel()]
        n_terms = torch.full(y.shape, float(math.prod(window)), dtype=torch.float64, device=y.device)
    else:
        as_sum = {"reduce": "sum"} if given.get("reduce") == "mean" else {"mode": 0} if is_mean else {}
        n_terms = _real(of_terms(torch.ones_like(x), 0, **as_sum)).double()
        n_terms = n_terms if "pool" not in call.name else (n_terms > 0) * 2.0
    for number, (target, terms) in enumerate(_parts(y, x)):
        if y.is_complex():  # the operator takes complex numbers alone
            energy = _real(of_terms(torch.complex(terms.square(), torch.zeros_like(terms)), 2)).double()
            base = None
        else:
            energy = of_terms(terms.square(), 2).double()
            base = target.double() - of_terms(terms, 1).double() if has_base and not is_mean else None
        count = n_terms
        if is_mean:
            energy = energy / n_terms.clamp_min(1)
        elif base is not None:
            energy, count = energy + base.square(), n_terms + (base != 0)
        a, b = (torch.as_tensor(v, device=y.device) for v in _bridges(count, spec.lanes))
        squares = target.double().square()
        variance = spec.of_partial_sum * (a * squares + b * energy + is_mean * squares) + spec.of_operand * energy
        _perturb(target, spec.per_energy * variance * (count > 1), spec, call.stream(number))


def _are_copies(y: torch.Tensor, terms: torch.Tensor) -> bool:
    """Whether each term went to an element of its own, with nothing there before."""
    if terms.numel() > y.numel() or torch.count_nonzero(y) != torch.count_nonzero(terms):
        return False
    norms = (float(torch.linalg.vector_norm(t.detach())) for t in (y, terms))
    return math.isclose(*norms, rel_tol=1e-5)


def _bridges(n_terms: torch.Tensor, lanes: int) -> tuple[np.ndarray, np.ndarray]:
    """`bridge` for each of many numbers of terms."""
    numbers, where = np.unique(np.round(n_terms.cpu().numpy().reshape(-1), 3), return_inverse=True)
    found = np.array([bridge(max(float(n), 1.0), lanes) for n in numbers]).reshape(-1, 2)
    a, b = (found[where.reshape(-1), i].reshape(n_terms.shape) for i in (0, 1))
    return a, b


def _first(result: Result) -> torch.Tensor:
    return result[0] if isinstance(result, tuple | list) else result


def _real(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.real if tensor.is_complex() else tensor


def weighted(call: Call, result: Result) -> None:
    """Sums of few weighted terms: gradients of interpolation and of sampling. A rounding of product and sum for each.

    Weights add up to one at each place of the finer grid: the number of terms of an element is their sum times 2^axes.
    """
    for number, y in enumerate(result if isinstance(result, tuple) else (result,)):
        if not isinstance(y, torch.Tensor) or not y.numel():
            continue
        gradient = call.given.get("grad_output", y)
        n_terms = 2.0 ** (y.dim() - 2) * max(gradient.numel() / y.numel(), 1.0)
        energy = y.double().square().mean() if gradient is y else gradient.double().square().mean()
        a, b = bridge(n_terms, call.spec.lanes)
        of_sums = call.spec.of_partial_sum * (a * y.double().square() + b * energy * 0.6)
        variance = call.spec.per_energy * (of_sums + call.spec.of_product * energy * 0.6)
        _perturb(y, variance * (y != 0), call.spec, call.stream(number))


# ----------------------------------------------------------------------------------------------------------------------
# Transforms and complex numbers


def fourier(call: Call, result: torch.Tensor) -> None:
    """FFT: errors of log2(n) stages, the same for all elements of a transform.

    In each stage of a radix-2 transform an element's real part is a sum of a number and of a product of two complex
    ones: two sums and, for half of the energy, two products. Multiplications of the last two stages are by 1 and i.
    See Schatzman (1996), SIAM J. Sci. Comput. 17, 1150-1166.
    """
    x, spec, dims = call.given["self"], call.spec, tuple(call.given["dim"])
    y = torch.view_as_real(result) if result.is_complex() else result
    length = math.prod((result if x.numel() < result.numel() else x).shape[d] for d in dims)
    stages = math.log2(max(length, 2))
    energy = y.detach().double().square()
    axes = [d % x.dim() for d in dims] + ([y.dim() - 1] if result.is_complex() else [])
    per_stage = 1.5 * spec.of_partial_sum + 0.5 * spec.of_product
    saved = spec.of_product + spec.of_partial_sum
    variance = energy.mean(axes, keepdim=True) * (spec.per_energy * max(stages * per_stage - saved, 0.0))
    _perturb(y, variance.expand(y.shape), spec, call.stream())


def complex_product(call: Call, result: torch.Tensor) -> None:
    """Multiplication and division of complex numbers: each part is a sum of two products."""
    if not result.is_complex():
        return round_(result, call.spec, call.stream())
    is_real = [not (t.is_complex() if isinstance(t, torch.Tensor) else isinstance(t, complex))
               for t in (call.given["self"], call.given["other"])]  # fmt: skip
    y = torch.view_as_real(result)
    energy = y.double().square().sum(-1, keepdim=True) * (0.0 if any(is_real) else 0.5 + (call.name == "div"))
    return _perturb(y, (call.spec.per_energy * call.spec.of_product * energy).expand(y.shape), call.spec, call.stream())


# ----------------------------------------------------------------------------------------------------------------------
# Linear algebra


def backward_stable(call: Call, result: Result) -> None:
    """Decompositions and solvers: the exact result for operands that differ by the errors of n instructions.

    That is what backward stability means (Higham 2002, Accuracy and Stability of Numerical Algorithms, chapter 9); the
    condition of the problem is then that of the operands. Each element of a matrix is perturbed by sqrt(n / 3)
    roundings of its own size.
    """
    operands = {}
    for number, (name, value) in enumerate(call.given.items()):
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel() and value.dim() > 1:
            changed, n = value.detach().clone(), min(value.shape[-2:])
            variance = changed.double().square() * (call.spec.per_energy * call.spec.of_partial_sum * n / 3)
            perturb_(changed, variance, call.spec, call.stream(1 + number))
            operands[name] = changed
    perturbed = call.again(**operands)
    for old, new in zip(_listed(result), _listed(perturbed), strict=True):
        if old.is_floating_point() or old.is_complex():
            old.copy_(new)
            round_(torch.view_as_real(old) if old.is_complex() else old, call.spec, call.stream())


def _listed(result: Result) -> list[torch.Tensor]:
    return list(result) if isinstance(result, tuple | list) else [result]
