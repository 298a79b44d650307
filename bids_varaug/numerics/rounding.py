"""Monte Carlo arithmetic under stock torch.

A context manager, inside which the results of inexact torch operators carry the noise that they
would have if each of their floating-point instructions were randomly rounded: forward pass,
backward pass and optimiser step, on any tensor that torch computes with.
"""

from __future__ import annotations

from functools import cache

import torch
from torch._subclasses import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode_stack,
)

from bids_varaug.machine import start_numba_threads
from bids_varaug.numerics.operator_models import Context
from bids_varaug.numerics.operators import Operator, operator_of
from bids_varaug.numerics.perturb import round_
from bids_varaug.numerics.rules import DIGITS, MODES, Rule

ACCUMULATIONS = ("exact", "fast", "none")
DEVICES = ("cpu", "cuda")
_MODELLED = DIGITS[torch.float32]  # formats of so many bits have models of their many instructions
_TRACED = (
    "Monte Carlo arithmetic cannot become part of a function that torch.jit.trace, torch.export or "
    "torch.compile records: record it outside, then call the result inside"
)


class MonteCarloArithmetic(TorchDispatchMode):
    """Context manager: torch operators inside it round at random.

    Parameters
    ----------
    mode : "rr", "pb", "mca", "sr" or "ud"
        What an instruction returns for its exact result x, whose unit in the last place at the
        virtual precision is u (Parker 1997, Monte Carlo Arithmetic, UCLA CSD-970002):

        - rr, random rounding: ``x + u xi``, xi uniform in (-1/2, 1/2), rounded to the format;
        - pb, precision bounding: each operand is perturbed like that, the result is rounded;
        - mca: both;
        - sr, stochastic rounding: one of the two neighbours of x on the grid of u, unbiased;
        - ud, up-down: x rounded to the grid, then one u up or down with equal odds.
    precision : virtual precision t in bits, at least 2; None: that of each tensor's format
    seed : 0 or more; names the stream of random numbers
    accumulation : "exact", "fast" or "none"
        How the error of the many instructions of one operator is found; see Notes.
    lanes : interleaved partial sums in sums, a power of two; 1 is sequential, 16 models a
        vectorised kernel
    fma : whether multiplying and adding is one instruction in sums of products

    Raises
    ------
    ValueError
        For anything else; inside, for a tensor whose format has fewer bits than `precision`.
    TypeError
        Inside, for results of a floating-point format that is not known (complex, float8), and
        sparse ones.
    NotImplementedError
        Inside, for tensors on devices other than CPU and CUDA.
    RuntimeError
        If torch.jit.trace or torch.export would make it part of what they record; inside, for a
        backward pass that torch.compile made, and, from torch
        itself, inside: torch.jit.trace, functions compiled with ``fullgraph=True``.

    Notes
    -----
    *What rounds.* Every operator that returns float16, bfloat16, float32 or float64, but those that
    are exact whatever their operands: copies, views, conversions, comparisons, indexing, padding,
    sign changes, ReLU, clamping, max-pooling and its gradient, nearest-neighbour upsampling, random
    numbers, multiplication by a power of two, addition of 0 (`operators.EXACT`). An operator that
    happens to be exact for its operands, such as 1.0 + 2.0, is not recognised.

    *Sums.* Convolutions, matrix products, sums, means, variances, norms, normalisations, softmax
    and their gradients carry the error of all their partial sums, first to last (or in `lanes`
    interleaved sums that are added pairwise), whatever order torch's own kernels take. With
    "exact" the energy of the terms is computed for each element (a second convolution of squares);
    with "fast" it is estimated on a coarse grid; both are scaled to agree with all partial sums of
    a sample of elements. With "none", each element of a result is rounded once. What is not in this
    list (gradients of unusual layers, scatter_add, cumulative sums, linear algebra) is one rounding
    per element.

    *Formats.* float32 and float64 are computed at the virtual precision t. Results in float16 and
    bfloat16, also those of autocast, are rounded once, at t or the format's own 11 or 8 bits,
    whichever is less: the products behind them are summed in float32, whose error is below.
    Autocast's conversions are exact by the above.

    *Seeds.* The same seed, operators and number of torch threads give the same bits on one
    device. Entering the same object again continues its stream. Contexts may be nested, the
    innermost one alone rounds. A context acts in the thread that entered it, and in the threads of
    its backward passes.

    *Compiled functions.* A function compiled by torch.compile runs uncompiled inside; functions of
    torch.jit and torch.export run as they are: all of them round. A backward pass compiled by
    torch.compile whose forward pass ran outside is refused by `Tensor.backward` and
    `torch.autograd.grad`: its fused loops are out of reach. (`torch.autograd.backward` does not
    notice.)

    *Zeros* stay zero in operators of one instruction, infinities and NaN in all, as do finite
    numbers finite: the noise of numbers near the largest one is bounded for that.

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
    ):
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"mode={mode!r}: must be one of {', '.join(MODES)}")
        if precision is not None and not (isinstance(precision, int) and 2 <= precision <= 53):
            raise ValueError(f"precision={precision!r}: must be an integer from 2 to 53, or None")
        if not isinstance(seed, int) or seed < 0:
            raise ValueError(f"seed={seed!r}: must be an integer, 0 or more")
        if accumulation not in ACCUMULATIONS:
            raise ValueError(f"accumulation={accumulation!r}: must be one of {ACCUMULATIONS}")
        if not isinstance(lanes, int) or lanes < 1 or lanes & (lanes - 1):
            raise ValueError(f"lanes={lanes!r}: must be a power of two, 1 or more")
        self.mode, self.precision, self.seed = mode, precision, seed
        self.accumulation, self.lanes, self.fma = accumulation, lanes, fma
        self.calls = 0
        self._guard, self._guards = _NoCompiledBackward(), 0
        self._key = _mixed(seed)
        self._rules: dict[tuple, Rule] = {}

    def __enter__(self):
        if torch.jit.is_tracing():
            raise RuntimeError(_TRACED)
        start_numba_threads()
        if not self._guards:
            self._guard.__enter__()
        self._guards += 1
        return super().__enter__()

    def __exit__(self, *failure):
        self._guards -= 1
        if not self._guards:
            self._guard.__exit__(*failure)
        return super().__exit__(*failure)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run the operator, then perturb what it computed."""
        kwargs = kwargs or {}
        operator = operator_of(func)
        if operator.is_exact:  # as it is: its parts may be slower
            return func(*args, **kwargs)
        if _is_composite(func) and FakeTensor not in types:
            with self:  # inference mode hands over operators that consist of others
                return func.decompose(*args, **kwargs)
        if operator.rounds_nothing(args, kwargs):
            return func(*args, **kwargs)
        if any(isinstance(m, MonteCarloArithmetic) for m in _get_current_dispatch_mode_stack()):
            with _disable_current_modes():
                return self._run(operator, func, args, kwargs)
        return self._run(operator, func, args, kwargs)

    def _run(self, operator: Operator, func, args, kwargs):
        self._check_operands(args)
        if operator.model is None and self.mode in ("pb", "mca"):
            args, kwargs = self._perturb_operands(operator, args, kwargs)
        result = func(*args, **kwargs)
        tensors = _computed(result, operator, args, kwargs)
        if not tensors:
            return result
        rule = self.rule(tensors[0])
        if operator.model is None or self.accumulation == "none" or rule.digits < _MODELLED:
            for tensor in tensors:
                round_(tensor.detach(), self.rule(tensor), self._next())
        else:
            self._apply(operator, func, operator.given(args, kwargs), result, rule)
        return result

    def _apply(self, operator: Operator, func, given, result, rule: Rule) -> None:
        def again(**changes):
            changed = given | changes
            return func(**{name: changed[name] for name in operator.names if name in changed})

        again.__name__ = operator.name
        detached = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in given.items()}
        with torch.no_grad():
            context = Context(rule, self.accumulation, self._next(), again)
            operator.model(detached, _detached(result), context)

    def _check_operands(self, args) -> None:
        """Raise where the first operand is of no known kind: torch itself might say less."""
        for value in args:
            for operand in value if isinstance(value, list | tuple) else (value,):
                if _rounds(operand):
                    self.rule(operand)
                    return

    def _perturb_operands(self, operator: Operator, args, kwargs):
        """Copies of all floating-point operands, perturbed; those written to in place."""

        def perturbed(name, value):
            if isinstance(value, list | tuple):
                return type(value)(perturbed(name, item) for item in value)
            if not _rounds(value) or value.dim() == 0:
                return value
            if name not in operator.written:
                value = value.detach().clone()
            digits = DIGITS[value.dtype]
            rule = Rule("operand", self.rule(value).precision, digits)
            round_(value.detach(), rule, self._next())
            return value

        changed = tuple(perturbed(n, v) for n, v in zip(operator.names, args, strict=False))
        return changed, {k: v if k == "out" else perturbed(k, v) for k, v in kwargs.items()}

    def rule(self, tensor: torch.Tensor) -> Rule:
        """How results of the tensor's format and device are rounded; raises where they cannot."""
        key = type(tensor), tensor.dtype, tensor.device, tensor.layout
        rule = self._rules.get(key)
        if rule is None:
            rule = self._rules[key] = self._new_rule(tensor)
        return rule

    def _new_rule(self, tensor: torch.Tensor) -> Rule:
        if tensor.device.type not in DEVICES:
            raise NotImplementedError(
                f"a tensor on device {tensor.device}: Monte Carlo arithmetic runs on CPU and CUDA"
            )
        if isinstance(tensor, FakeTensor):
            raise RuntimeError(_TRACED)
        if tensor.layout != torch.strided:
            raise TypeError(
                f"a result in layout {tensor.layout}: Monte Carlo arithmetic knows dense tensors; "
                "convert with to_dense()"
            )
        dtype = tensor.dtype
        digits = DIGITS.get(dtype)
        if digits is None:
            raise TypeError(
                f"a result of {dtype}: Monte Carlo arithmetic knows float16, bfloat16, float32 and "
                "float64; compute with one of these inside it"
            )
        precision = digits if self.precision is None else self.precision
        if precision > digits:
            if digits >= _MODELLED:
                raise ValueError(
                    f"precision={precision}, but a result of {dtype} has {digits} bits: choose at "
                    f"most {digits}, or None for each format's own"
                )
            precision = digits
        return Rule(self.mode, precision, digits, self.lanes, self.fma)

    def _next(self) -> int:
        self.calls += 1
        return _mixed(self._key + self.calls)


class _NoCompiledBackward(TorchFunctionMode):
    """Refuses backward passes that torch.compile made: their loops bypass the dispatcher."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.backward, torch.autograd.grad) and _has_compiled_node(args[0]):
            raise RuntimeError(
                "Monte Carlo arithmetic cannot round a backward pass that torch.compile made: run "
                "the forward pass inside too, where it is not compiled"
            )
        return func(*args, **(kwargs or {}))


def _has_compiled_node(outputs) -> bool:
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
def _is_composite(func) -> bool:
    """Whether an operator consists of others that torch can be asked for."""
    key = "CompositeImplicitAutograd"
    has_parts = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key)
    return has_parts and func._can_decompose()


def _rounds(value) -> bool:
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


def _computed(result, operator: Operator, args, kwargs) -> list[torch.Tensor]:
    """Floating-point tensors that an operator filled: results that are no views, and what it
    wrote to.
    """
    results = result if isinstance(result, tuple | list) else (result,)
    filled = [r for i, r in enumerate(results) if i not in operator.views]
    if operator.not_returned:
        given = operator.given(args, kwargs)
        filled += [given[name] for name in operator.not_returned if name in given]
    tensors = []
    for one in filled:
        tensors += one if isinstance(one, tuple | list) else (one,)
    return [tensor for tensor in tensors if _rounds(tensor)]


def _detached(result):
    if isinstance(result, torch.Tensor):
        return result.detach()
    if isinstance(result, tuple | list):
        return tuple(_detached(item) for item in result)
    return result
