"""What the models of operators are given: how one instruction rounds, and the call itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch

MODES = ("rr", "pb", "mca", "sr", "ud", "random")

# Bits of the significand, the implicit one included
DIGITS = {torch.float16: 11, torch.bfloat16: 8, torch.float32: 24, torch.float64: 53}

# Mean of 4^e / x^2 over numbers x = m 2^e, 0.5 <= |m| < 1, with log-uniform m: 3 / (2 ln 2). The mean square of a unit
# in the last place at precision t is this times x^2 4^-t.
MEAN_SQUARE_ULP = 2.1640425613334453

DITHER, STOCHASTIC, UP_DOWN, RANDOM = range(4)


@dataclass(frozen=True)
class RoundingSpecification:
    r"""How instructions of one format round; see `MonteCarloArithmetic` for the modes.

    Variances are in units of the squared ulp at the virtual precision, ``4^(e-t)`` for a result ``m 2^e`` with
    0.5 <= \|m\| < 1.

    Parameters
    ----------
    mode : one of `MODES`, or "operand": how pb and mca perturb an operand before an instruction
    precision : virtual precision t, bits, at most `digits`
    digits : of the format, bits
    lanes : interleaved partial sums, a power of two
    fma : whether a multiply-add rounds once
    centre : "torch": numbers are rounded results; "exact": what rounding took away from them is known; "drawn": their
        last rounding was drawn already
    """

    mode: str
    precision: int
    digits: int
    lanes: int = 1
    fma: bool = False
    centre: str = "torch"

    @cached_property
    def of_format(self) -> float:
        """Variance of rounding to the format after a perturbation at the virtual precision."""
        return 4.0 ** (self.precision - self.digits) / 12

    @cached_property
    def of_result(self) -> float:
        """Variance of the rounding of one result over seeds.

        Random rounding draws from (-1/2, 1/2) ulp, then rounds to the format: 1/12 each. For stochastic rounding to a
        grid it is f (1 - f), 1/6 on average over the fraction f; with equal odds it is 1/4. Up-down moves by one ulp
        always, after rounding to nearest.
        """
        return {
            "rr": 1 / 12 + self.of_format,
            "mca": 1 / 12 + self.of_format,
            "sr": 1 / 6,
            "ud": 1 + 1 / 12,
            "random": 1 / 4,
            "pb": self.of_format,
            "operand": 1 / 12,
        }[self.mode]

    @cached_property
    def of_operand(self) -> float:
        """Variance of the perturbation of one operand."""
        return 1 / 12 if self.mode in ("pb", "mca") else 0.0

    @cached_property
    def of_partial_sum(self) -> float:
        """Variance per partial sum: as a result, and as operand of the next addition."""
        return self.of_result + self.of_operand

    @cached_property
    def of_multiplication(self) -> float:
        """Variance of one product: its result and both factors."""
        return self.of_result + 2 * self.of_operand

    @cached_property
    def of_product(self) -> float:
        """Variance per product of a sum of products.

        Two factors as operands (their relative error carries over), the product's own rounding, and the product as
        operand of the addition; the last two are absent in a fused one.
        """
        factors = 2 * self.of_operand
        return factors if self.fma else factors + self.of_result + self.of_operand

    @cached_property
    def rounds_exact(self) -> bool:
        """Whether an instruction with an exact result, such as adding 0, changes it nevertheless.

        A random number below half an ulp is rounded away where it is added to a result of the format's own precision;
        a number on the grid stays there in stochastic rounding.
        """
        return self.mode in ("mca", "ud") or (self.mode in ("rr", "pb") and self.precision < self.digits)

    @cached_property
    def per_energy(self) -> float:
        """Mean absolute variance of a variance of 1, per squared result."""
        return MEAN_SQUARE_ULP * 4.0**-self.precision

    @cached_property
    def kind(self) -> int:
        """How the last rounding of a result is drawn: `DITHER`, `STOCHASTIC`, `UP_DOWN` or `RANDOM`."""
        if self.mode in ("ud", "random"):
            return UP_DOWN if self.mode == "ud" else RANDOM
        return STOCHASTIC if self.mode == "sr" and self.precision < self.digits else DITHER

    @cached_property
    def width(self) -> float:
        """Width of the uniform dither, in ulps of the format (0: none)."""
        if self.mode == "pb" or self.kind != DITHER or self.centre == "drawn":
            return 0.0
        if self.centre == "exact":
            return 2.0 ** (self.digits - self.precision)
        return dither_width(self.rounded_variance)

    @cached_property
    def rounded_variance(self) -> float:
        """Variance of the rounding of one result, in squared ulps of the format."""
        return self.of_result * 4.0 ** (self.digits - self.precision)

    @cached_property
    def step(self) -> int:
        """Numbers of the format from one number of the virtual precision to the next."""
        return 1 << (self.digits - self.precision)


@lru_cache
def dither_width(variance: float) -> float:
    """Width w so that an integer plus uniform(-w/2, w/2), rounded, has this variance.

    An operator hands over results that are rounded already: without the part that was rounded away, adding a dither
    of width 1 would round back to the same number always.

    Examples
    --------
    >>> round(dither_width(1 / 6), 6)
    1.2
    """
    low, high = 1.0, max(4.0, (24 * variance) ** 0.5)
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _rounded_variance(middle) < variance else (low, middle)
    return (low + high) / 2


def _rounded_variance(width: float) -> float:
    """Variance of the nearest integer to uniform(-width/2, width/2)."""
    if width > 2**12:
        return (width**2 + 1) / 12
    half, total, step = width / 2, 0.0, 1
    while step - 0.5 < half:
        total += 2 * step**2 * (min(half, step + 0.5) - (step - 0.5)) / width
        step += 1
    return total


@dataclass(frozen=True)
class Call:
    """One call of an operator whose result is perturbed.

    Parameters
    ----------
    name : of the operator, without overload and final underscore
    given : its arguments by name, without gradients
    spec : of the result's format
    number : names the random numbers of this call, 64 bits
    again : runs the operator with other arguments of the same names
    """

    name: str
    given: dict[str, Any]
    spec: RoundingSpecification
    number: int
    again: Callable[..., Any]

    def stream(self, part: int = 0) -> int:
        """Name the random numbers of one of several results."""
        return (self.number + part * 0x9E3779B97F4A7C15) % 2**64


def image_of(tensor: torch.Tensor) -> torch.Tensor:
    """(N, C, ...) -> (N, C, X, Y, Z), a view."""
    while tensor.dim() < 5:
        tensor = tensor[..., None]
    return tensor
