"""What moves the weights: Muon for the 3x3x3 convolutions, AdamW for everything else."""

from __future__ import annotations

import math

import torch
from torch import nn

# Coefficients of the quintic iteration that pushes all singular values towards 1, from Jordan et
# al. 2024, "Muon: an optimizer for hidden layers in neural networks" (kellerjordan.github.io).
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5
_RMS = 0.2  # of an update's elements per unit of learning rate: about that of AdamW


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal, as a matrix of output channel by the rest.

    Every direction of a convolution's kernel moves by the same amount, also those that the
    gradient of a single image hardly shows: on our data the body learnt in 100 steps what AdamW
    learnt in 500 (benchmarks/optimisers.py). The update's size follows Liu et al. 2025
    (arXiv:2502.16982), so that learning rates mean what they mean for AdamW.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group["lr"], group["momentum"], group["weight_decay"])

    def _move(self, parameter, lr: float, decay: float, weight_decay: float) -> None:
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        average = state["momentum"].lerp_(parameter.grad, 1 - decay)
        matrix = parameter.grad.lerp(average, decay).flatten(1)
        size = _RMS * math.sqrt(max(matrix.shape))
        update = orthogonalise(matrix).reshape(parameter.shape)
        parameter.mul_(1 - lr * weight_decay).add_(update, alpha=-lr * size)


def orthogonalise(matrix: torch.Tensor) -> torch.Tensor:
    """Return about the nearest (semi-)orthogonal matrix; singular values end in 0.7 to 1.2.

    Parameters
    ----------
    matrix : (M, N) float32

    Returns
    -------
    (M, N) float32
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp_min(1e-7)
    # Each iteration multiplies x from the left by a polynomial in x x^T. On the small square
    # matrices alone they take a third of the time.
    gram, one = x @ x.T, torch.eye(len(x), device=x.device)
    product = factor = _factor(gram, one)
    for _ in range(_ITERATIONS - 1):
        gram = factor @ gram @ factor
        factor = _factor(gram, one)
        product = factor @ product
    x = product @ x
    return x.T if tall else x


def _factor(gram: torch.Tensor, one: torch.Tensor) -> torch.Tensor:
    return _A * one + _B * gram + _C * (gram @ gram)


class Optimiser:
    """Both optimisers behind one face."""

    def __init__(self, network: nn.Module, weight_decay: float):
        kernels = [p for p in network.parameters() if _is_kernel(p)]
        rest = [p for p in network.parameters() if not _is_kernel(p)]
        self.parts = (
            Muon(kernels, lr=0.0, weight_decay=weight_decay),
            torch.optim.AdamW(rest, lr=0.0, betas=(0.9, 0.99), weight_decay=weight_decay),
        )

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of both."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = lr

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def step(self) -> None:
        """Update all weights."""
        for part in self.parts:
            part.step()

    def state_of(self, parameter: nn.Parameter) -> dict:
        """Return the (mutable) state of one parameter, for checkpoints."""
        return self.parts[0 if _is_kernel(parameter) else 1].state[parameter]


def _is_kernel(parameter: torch.Tensor) -> bool:
    return parameter.ndim == 5 and parameter.shape[2:] == (3, 3, 3)
