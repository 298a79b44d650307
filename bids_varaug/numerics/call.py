"""What the model of an operator is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bids_varaug.numerics.specification import RoundingSpecification


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
