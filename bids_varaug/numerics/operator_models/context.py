"""What the model of an operator is given, and how tensors are handed on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from bids_varaug.numerics.rules import How, Rule


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


def image_of(tensor: torch.Tensor) -> torch.Tensor:
    """(N, C, ...) -> (N, C, X, Y, Z), a view."""
    while tensor.dim() < 5:
        tensor = tensor[..., None]
    return tensor


def float64_of(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor's numbers in double precision."""
    return tensor.detach().double().cpu().numpy()
