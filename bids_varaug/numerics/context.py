"""Monte Carlo arithmetic under stock torch.

A context manager, inside which the results of inexact torch operators carry the noise that they would have if each of
their floating-point instructions were randomly rounded: forward pass, backward pass and optimiser step, on any tensor
that torch computes with.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from numbers import Integral
from types import TracebackType
from typing import Any

import torch
from torch._subclasses import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode_stack,
)
from torch.utils._pytree import tree_flatten, tree_map

from bids_varaug.machine import start_numba_threads
from bids_varaug.numerics.decompositions import FUSED, call_written_out
from bids_varaug.numerics.noise import round_
from bids_varaug.numerics.operators import (
    APPROXIMATE,
    EXACT,
    ONCE,
    REFUSED,
    UNKNOWN,
    Operator,
    operator_of,
)
from bids_varaug.numerics.specification import DIGITS, MODES, Call, RoundingSpecification

ACCUMULATIONS = ("fast", "none")
CENTRES = ("torch", "exact")
DEVICES = ("cpu", "cuda")
_MODELLED_DIGITS = DIGITS[torch.float32]  # formats of so many bits have models of their many instructions
_WIDER = {torch.float16: torch.float64, torch.bfloat16: torch.float64, torch.float32: torch.float64}
_TRACED = (
    "Monte Carlo arithmetic cannot become part of a function that torch.jit.trace, torch.export or "
    "torch.compile records: record it outside, then call the result inside"
)
_WARNINGS = {
    ONCE: "is many instructions, but is rounded once per element: its spread is too small",
    APPROXIMATE: "is perturbed as its backward stability allows (operands by sqrt(n / 3) roundings, results by one)",
    UNKNOWN: "is not known, and is rounded once per element",
}
_warned: set[str] = set()


class RoundingWarning(UserWarning):
    """An operator is perturbed by less than a model of its instructions."""


class MonteCarloArithmetic(TorchDispatchMode):
    """Context manager: torch operators inside it round at random.

    Parameters
    ----------
    mode : "rr", "pb", "mca", "sr", "ud" or "random"
        What an instruction returns for its exact result x, whose unit in the last place at the virtual precision is u
        (Parker 1997, Monte Carlo Arithmetic, UCLA CSD-970002):

        - rr, random rounding: ``x + u xi``, xi uniform in (-1/2, 1/2), rounded to the format;
        - pb, precision bounding: each operand is perturbed like that, the result is rounded;
        - mca: both;
        - sr, stochastic rounding: one of the two neighbours of x on the grid of u, unbiased;
        - ud, up-down: x rounded to the grid, then one u up or down with equal odds;
        - random: one of the two neighbours with equal odds, exact results left alone (Verrou's mode of that name, used
          by arXiv:2308.01939). What torch rounded away is found in float64; results in float64 count as inexact.
    precision : virtual precision t in bits, at least 2; None: that of each tensor's format
    seed : 0 or more; names the stream of random numbers
    accumulation : "fast" or "none"
        Whether the error of the many instructions of one operator is modelled, or each element is rounded once.
    lanes : interleaved partial sums in sums, a power of two; 1 is sequential, 16 models a vectorised kernel
    fma : whether multiplying and adding is one instruction in sums of products
    centre : "torch" or "exact"
        Around what samples lie: torch's own rounded result, or the one of the same operator in float64. The latter
        takes three times as long, or more; results in float64 are torch's own.

    Raises
    ------
    ValueError
        For anything else; inside, for a tensor whose format has fewer bits than `precision`.
    TypeError
        Inside, for results of a floating-point format that is not known (float8), and quantised, sparse and nested
        tensors.
    NotImplementedError
        Inside, for tensors on devices other than CPU and CUDA.
    RuntimeError
        If torch.jit.trace or torch.export would make it part of what they record; inside, for a backward pass that
        torch.compile made, and, from torch itself, inside: torch.jit.trace, functions compiled with
        ``fullgraph=True``.

    Warns
    -----
    RoundingWarning
        Once per process for each operator whose many instructions have no model, and for unknown ones.

    Notes
    -----
    *What rounds.* Every operator that returns float16, bfloat16, float32, float64, complex64 or complex128, but those
    that are exact whatever their operands: copies, views, conversions, comparisons, indexing, padding, sign changes,
    ReLU, clamping, max-pooling, nearest neighbours, random numbers, multiplication by a power of two, addition of 0. An
    operator that happens to be exact for its operands, such as 1.0 + 2.0, is recognised in mode random alone. The
    table of operators is data/operators.tsv.

    *Sums.* Convolutions, matrix products, sums, means, batch normalisation and their gradients carry the error of all
    their partial sums, first to last (or in `lanes` interleaved sums that are added pairwise), whatever order torch's
    own kernels take. Softmax, norms, attention, recurrent layers, distances and interpolation run as what they consist
    of. With "none", each element of a result is rounded once.

    *Formats.* float32 and float64 are computed at the virtual precision t, complex numbers part by part. Results in
    float16 and bfloat16, also those of autocast, are rounded once, at t or the format's own 11 or 8 bits, whichever is
    less: the products behind them are summed in float32, whose error is below. Autocast's conversions are exact by the
    above.

    *Seeds.* The same seed and operators give the same bits on one device, as long as torch itself does: its own sums
    may depend on the number of threads. Entering the same object again continues its stream. Contexts may be nested,
    the innermost one alone rounds. A context acts in the thread that entered it, and in the threads of its backward
    passes.

    *Compiled functions.* A function compiled by torch.compile runs uncompiled inside; functions of torch.jit and
    torch.export run as they are: all of them round. A backward pass compiled by torch.compile whose forward pass ran
    outside is refused by `Tensor.backward` and `torch.autograd.grad`: its fused loops are out of reach.
    (`torch.autograd.backward` does not notice.)

    *Operands* without axes count as exact scalars in pb and mca.

    *Zeros* stay zero in operators of one instruction, as do subnormal numbers; infinities and NaN stay in all, and
    finite numbers stay finite.

    Examples
    --------
    >>> x = torch.full((1000,), 0.1)
    >>> with MonteCarloArithmetic("sr", precision=11, seed=3):
    ...     y = x / 3
    >>> y.unique().numel()
    2
    """

    def __init__(
        self,
        mode: str = "rr",
        precision: int | None = None,
        seed: int = 0,
        *,
        accumulation: str = "fast",
        lanes: int = 1,
        fma: bool = False,
        centre: str = "torch",
    ):
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"mode={mode!r}: must be one of {', '.join(MODES)}")
        if precision is not None and not (_is_whole(precision) and 2 <= precision <= 53):
            raise ValueError(f"precision={precision!r}: must be an integer from 2 to 53, or None")
        if not _is_whole(seed) or seed < 0:
            raise ValueError(f"seed={seed!r}: must be an integer, 0 or more")
        if accumulation not in ACCUMULATIONS:
            raise ValueError(f"accumulation={accumulation!r}: must be one of {ACCUMULATIONS}")
        if not isinstance(lanes, int) or lanes < 1 or lanes & (lanes - 1):
            raise ValueError(f"lanes={lanes!r}: must be a power of two, 1 or more")
        if centre not in CENTRES:
            raise ValueError(f"centre={centre!r}: must be one of {CENTRES}")
        self.mode, self.precision, self.seed = mode, None if precision is None else int(precision), int(seed)
        self.accumulation, self.lanes, self.fma, self.centre = accumulation, lanes, fma, centre
        self.calls = 0
        self._functions, self._entered = _Functions(), 0
        self._key = _mixed(self.seed)
        self._specs: dict[tuple[Any, ...], RoundingSpecification] = {}

    def __enter__(self) -> MonteCarloArithmetic:
        if torch.jit.is_tracing():
            raise RuntimeError(_TRACED)
        start_numba_threads()
        if not self._entered:
            self._functions.__enter__()
        self._entered += 1
        return super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered -= 1
        if not self._entered:
            self._functions.__exit__(kind, error, trace)
        return super().__exit__(kind, error, trace)

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the operator, then perturb what it computed."""
        kwargs = kwargs or {}
        operator = operator_of(func)
        if operator.kind == EXACT:  # as it is: its parts may be slower
            return func(*args, **kwargs)
        if _is_composite(func) and FakeTensor not in types:
            with self:  # inference mode hands over operators that consist of others
                return func.decompose(*args, **kwargs)
        if operator.rounds_nothing(args, kwargs):
            return func(*args, **kwargs)
        if operator.decomposition is not None and self._can_decompose(types, args, kwargs):
            with self:
                result = operator.decomposition(*args, **kwargs)
            if result is not NotImplemented:
                return _within(operator, result)
        if any(isinstance(m, MonteCarloArithmetic) for m in _get_current_dispatch_mode_stack()):
            with _disable_current_modes():
                return _within(operator, self._run(operator, func, args, kwargs))
        return _within(operator, self._run(operator, func, args, kwargs))

    def _can_decompose(self, types: tuple[type, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """16-bit results are rounded once, as they are; so is everything without accumulation."""
        if FakeTensor in types or self.accumulation == "none":
            return False
        tensors = [t for t in tree_flatten((args, kwargs))[0] if _rounds(t)]
        return all(self.specification(t).digits >= _MODELLED_DIGITS for t in tensors)

    def _run(
        self, operator: Operator, func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self._check_operands(operator, args)
        model = operator.model if self.accumulation == "fast" else None
        if model is None and self.mode in ("pb", "mca"):
            args, kwargs = self._perturb_operands(operator, args, kwargs)
        wanted = self.centre == "exact" or (self.mode == "random" and model is None)
        exact = _computed_wider(operator, func, args, kwargs) if wanted and not operator.is_random else []
        result = func(*args, **kwargs)
        tensors = _computed(result, operator, args, kwargs)
        if not tensors:
            return result
        if operator.kind in _WARNINGS:
            _warn(operator)
        spec = self.specification(tensors[0])
        is_modelled = spec.digits >= _MODELLED_DIGITS and operator.model_for(result) is not None
        if self.accumulation == "none" or not is_modelled:
            self._round(tensors, exact)
            return result
        if exact and self.centre == "exact":
            self._round(tensors, exact)
            spec = replace(spec, centre="drawn")
        self._apply(operator, func, operator.given(args, kwargs), result, spec)
        return result

    def _round(self, tensors: list[torch.Tensor], exact: list[torch.Tensor]) -> None:
        """Round each element once."""
        for number, tensor in enumerate(tensors):
            spec, y = self.specification(tensor), _parts(tensor.detach())
            fraction = None
            if number < len(exact) and exact[number].shape == tensor.shape:
                fraction = _rounded_away(y, _parts(exact[number]))
                spec = replace(spec, centre="exact")
            round_(y, spec, self._next(), fraction)

    def _apply(
        self,
        operator: Operator,
        func: torch._ops.OpOverload,
        given: dict[str, Any],
        result: Any,
        spec: RoundingSpecification,
    ) -> None:
        def again(**changes: Any) -> Any:
            fresh = {name: given[name].detach().clone() for name in operator.written if name in given}
            changed = given | fresh | changes
            return func(**{name: changed[name] for name in operator.names if name in changed})

        model = operator.model_for(result)
        detached = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in given.items()}
        with torch.no_grad():
            if not isinstance(given.get("self"), list | tuple):
                assert model is not None
                model(Call(operator.name, detached, spec, self._next(), again), _detached(result))
                return
            self._round(_computed(result, operator, (), given), [])  # a list of tensors

    def _check_operands(self, operator: Operator, args: tuple[Any, ...]) -> None:
        """Raise where the first operand is of no known kind: torch itself might say less."""
        if operator.kind == REFUSED:
            raise TypeError(
                f"{operator.name} makes or takes quantised, sparse or nested tensors: Monte Carlo arithmetic knows "
                "dense ones; convert with dequantize() or to_dense()"
            )
        if operator.kind == APPROXIMATE and any(isinstance(a, torch.Tensor) and a.is_complex() for a in args):
            raise TypeError(f"{operator.name}: Monte Carlo arithmetic knows linear algebra of real numbers alone")
        for value in args:
            for operand in value if isinstance(value, list | tuple) else (value,):
                if _rounds(operand):
                    self.specification(operand)
                    return

    def _perturb_operands(
        self, operator: Operator, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Copies of all floating-point operands, perturbed; those written to in place."""

        def perturbed(name: str, value: Any) -> Any:
            if isinstance(value, list | tuple):
                return type(value)(perturbed(name, item) for item in value)
            if not _rounds(value) or value.dim() == 0 or name == "is_target":
                return value
            if name not in operator.written:
                value = value.detach().clone()
            spec = self.specification(value)
            operand = RoundingSpecification("operand", spec.precision, spec.digits)
            round_(_parts(value.detach()), operand, self._next())
            return value

        changed = tuple(perturbed(n, v) for n, v in zip(operator.names, args, strict=False))
        return changed, {k: v if k == "out" else perturbed(k, v) for k, v in kwargs.items()}

    def specification(self, tensor: torch.Tensor) -> RoundingSpecification:
        """How results of the tensor's format and device are rounded; raises where they cannot."""
        key = type(tensor), tensor.dtype, tensor.device, tensor.layout
        spec = self._specs.get(key)
        if spec is None or tensor.is_nested:
            spec = self._specs[key] = self._new_specification(tensor)
        return spec

    def _new_specification(self, tensor: torch.Tensor) -> RoundingSpecification:
        if tensor.device.type not in DEVICES:
            raise NotImplementedError(
                f"a tensor on device {tensor.device}: Monte Carlo arithmetic runs on CPU and CUDA"
            )
        if isinstance(tensor, FakeTensor):
            raise RuntimeError(_TRACED)
        if tensor.layout != torch.strided or tensor.is_nested:
            layout = "nested layout" if tensor.is_nested else f"layout {tensor.layout}"
            raise TypeError(
                f"a result in {layout}: Monte Carlo arithmetic knows dense tensors; convert with to_dense() or unbind()"
            )
        dtype = tensor.dtype
        digits = DIGITS.get(dtype.to_real() if dtype.is_complex else dtype)
        if digits is None:
            raise TypeError(
                f"a result of {dtype}: Monte Carlo arithmetic knows float16, bfloat16, float32, float64 and complex "
                "numbers of the last two; compute with one of these inside it"
            )
        precision = digits if self.precision is None else self.precision
        if precision > digits:
            if digits >= _MODELLED_DIGITS:
                raise ValueError(
                    f"precision={precision}, but a result of {dtype} has {digits} bits: choose at most {digits}, or "
                    "None for each format's own"
                )
            precision = digits
        return RoundingSpecification(self.mode, precision, digits, self.lanes, self.fma)

    def _next(self) -> int:
        self.calls += 1
        return _mixed(self._key + self.calls)


class _Functions(TorchFunctionMode):
    """Acts before autograd: has fused layers written out, refuses backward passes that torch.compile made."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.Tensor.backward, torch.autograd.grad) and _has_compiled_node(args[0]):
            raise RuntimeError(
                "Monte Carlo arithmetic cannot round a backward pass that torch.compile made: run the forward pass "
                "inside too, where it is not compiled"
            )
        if getattr(func, "__name__", "") in FUSED:
            return call_written_out(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def _has_compiled_node(outputs: Any) -> bool:
    """Whether the graph behind one or several tensors has a function of torch.compile."""
    outputs = outputs if isinstance(outputs, tuple | list) else (outputs,)
    waiting = [tensor.grad_fn for tensor in outputs if tensor.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if node.name().startswith("CompiledFunction"):
            return True
        following = {found for found, _ in node.next_functions if found is not None} - seen
        seen |= following
        waiting += following
    return False


def _mixed(number: int) -> int:
    """One step of SplitMix64: a well mixed 64-bit word from any integer."""
    word = (number * 0x9E3779B97F4A7C15) % 2**64
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) % 2**64
    return word ^ (word >> 31)


@cache
def _is_composite(func: torch._ops.OpOverload) -> bool:
    """Whether an operator consists of others that torch can be asked for."""
    key = "CompositeImplicitAutograd"
    has_parts = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key)
    return has_parts and func._can_decompose()


def _is_whole(number: Any) -> bool:
    return isinstance(number, Integral)


def _within(operator: Operator, result: Any) -> Any:
    """Keep the results of functions such as tanh, which end at a power of two, in their range."""
    if operator.range is not None:
        for tensor in result if isinstance(result, tuple) else (result,):
            if tensor.is_floating_point():
                with _disable_current_modes():
                    tensor.detach().clamp_(*operator.range)
    return result


def _warn(operator: Operator) -> None:
    if operator.name not in _warned:
        _warned.add(operator.name)
        warnings.warn(f"{operator.name} {_WARNINGS[operator.kind]}", RoundingWarning, stacklevel=4)


def _rounds(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex()) and not value.is_meta


def _parts(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's real numbers, a view."""
    return torch.view_as_real(tensor.conj() if tensor.is_conj() else tensor) if tensor.is_complex() else tensor


def _computed(result: Any, operator: Operator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """Floating-point tensors that an operator filled: results that are no views, and what it wrote to."""
    results = result if isinstance(result, tuple | list) else (result,)
    filled = [r for i, r in enumerate(results) if i not in operator.views]
    if operator.not_returned:
        given = operator.given(args, kwargs)
        filled += [given[name] for name in operator.not_returned if name in given]
    listed = [tensor for value in filled for tensor in (value if isinstance(value, list) else [value])]
    return [tensor for tensor in listed if _rounds(tensor)]


def _computed_wider(
    operator: Operator, func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[torch.Tensor]:
    """What `_computed` would return for operands in float64; nothing where torch cannot compute that."""

    def wider(value: Any) -> Any:
        if isinstance(value, torch.dtype):
            return _WIDER.get(value, torch.complex128 if value == torch.complex64 else value)
        if not _rounds(value):
            return value.clone() if isinstance(value, torch.Tensor) else value
        return value.detach().to(torch.complex128 if value.is_complex() else torch.float64, copy=True)

    tensors = [t for t in tree_flatten((args, kwargs))[0] if _rounds(t)]
    if any(t.dtype in (torch.float64, torch.complex128) for t in tensors):
        return []
    wide_args, wide_kwargs = tree_map(wider, args), tree_map(wider, kwargs)
    try:
        result = func(*wide_args, **wide_kwargs)
    except (RuntimeError, NotImplementedError):
        return []
    return _computed(result, operator, wide_args, wide_kwargs)


def _rounded_away(y: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """What rounding took from each element, away from 0 positive, in steps of the element's format; float64."""
    if y.dtype == torch.float64:
        return torch.zeros_like(y)
    _, exponent = torch.frexp(y.double())
    step = torch.exp2((exponent - DIGITS[y.dtype]).double())
    fraction = (exact.double() - y.double()) / step * torch.sign(y.double())
    return fraction.nan_to_num(0.0, 0.0, 0.0)


def _detached(result: Any) -> Any:
    if isinstance(result, torch.Tensor):
        return result.detach()
    if isinstance(result, tuple | list):
        return tuple(_detached(item) for item in result)
    return result


