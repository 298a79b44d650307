"""What training minimises (cross-entropy plus soft Dice), and what moves the weights.

Muon moves the 3x3x3 convolutions, AdamW everything else. Checkpoints are safetensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn

from bids_varaug.errors import UserError
from bids_varaug.models.unet import UNet, write_tensors

DEEP_WEIGHT = 0.4  # of the mean loss of the decoder's coarser levels
MOMENTS = ("momentum", "exp_avg", "exp_avg_sq")  # of Muon, and of AdamW

# Coefficients of the quintic iteration that pushes all singular values towards 1, from Jordan et al. 2024, "Muon: an
# optimizer for hidden layers in neural networks" (kellerjordan.github.io).
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5
_MOMENTUM = 0.95
_RMS = 0.2  # of an update's elements per unit of learning rate: about that of AdamW


def segmentation_loss(logits: torch.Tensor, target: torch.Tensor, balanced: bool = False) -> torch.Tensor:
    """Mean cross-entropy plus one minus the mean soft Dice of the structures present, () float32.

    Of logits (..., K) and classes (...), 0 = background. If `balanced`, a voxel has the weight of one over the square
    root of its class's voxels: small structures are learnt early; the posteriors are then no longer calibrated.
    """
    log_p = F.log_softmax(logits.reshape(-1, logits.shape[-1]).float(), dim=1)
    target = target.reshape(-1).long()
    log_true = log_p.gather(1, target[:, None])
    count = torch.bincount(target, minlength=log_p.shape[1]).to(log_p.dtype)
    weight = count.clamp_min(1.0).rsqrt()[target] if balanced else torch.ones_like(count)[target]
    cross_entropy = -(weight * log_true[:, 0]).sum() / weight.sum()
    # Not index_add, whose order of sums changes from run to run on a GPU
    overlap = torch.zeros_like(log_p).scatter(1, target[:, None], log_true.exp()).sum(0)
    dice = (2 * overlap + 1.0) / (log_p.exp().sum(0) + count + 1.0)
    present = count[1:] > 0
    if not bool(present.any()):
        return cross_entropy
    return cross_entropy + 1.0 - dice[1:][present].mean()


def training_loss(
    network: UNet, image: torch.Tensor, target: torch.Tensor, seed: int, balanced: bool = False, body_only: bool = False
) -> torch.Tensor:
    """Loss of the finest logits, plus that of the decoder's coarser levels.

    The finest logits are those of every second voxel along two axes, at a phase drawn from `seed`: a quarter of the
    voxels gives the same gradient on average; the last layer and the softmax of all would take half of a training step.
    Each deep level is compared with the label in the middle of each of its voxels. If `body_only`, the image (X, Y, Z)
    is on the grid of the network's body, and the finest logits are those of `UNet.coarse_logits`.
    """
    if body_only:
        logits, levels = network.coarse_logits(image[None, None])
        sampled = target
    else:
        a, b = seed % 2, (seed // 2) % 2
        features = network.features(image[None, None])
        logits, levels = network.classify_rows(features, a, b), features.deep
        sampled = target[a::2, :, b::2]
    loss = segmentation_loss(logits, sampled, balanced)
    deep = []
    for level, head in zip(levels, network.deep_heads, strict=True):
        step = image.shape[0] // level.shape[2]
        middle = (slice(step // 2, None, step),) * 3
        deep.append(segmentation_loss(head(level).movedim(1, -1), target[middle], balanced))
    return loss + DEEP_WEIGHT * torch.stack(deep).mean() if deep else loss


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal, as a matrix of output channel by the rest.

    Every direction of a convolution's kernel moves by the same amount, also those that the gradient of a single image
    hardly shows: on our data the body learnt in 100 steps what AdamW learnt in 500 (benchmarks/optimisers.py). The
    update's size follows Liu et al. 2025 (arXiv:2502.16982): learning rates mean what they mean for AdamW.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # nothing here needs closures
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in (p for p in group["params"] if p.grad is not None):
                state = self.state[parameter]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(parameter)
                average = state["momentum"].lerp_(parameter.grad, 1 - _MOMENTUM)
                matrix = parameter.grad.lerp(average, _MOMENTUM).flatten(1)
                update = orthogonalise(matrix).reshape(parameter.shape)
                size = group["lr"] * (_RMS * math.sqrt(max(matrix.shape)))
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-size)


def orthogonalise(matrix: torch.Tensor) -> torch.Tensor:
    """Return about the nearest (semi-)orthogonal matrix, (M, N) float32; singular values end in 0.7 to 1.2."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp_min(1e-7)
    # Each iteration multiplies x from the left by a polynomial in x x^T. On the small square matrices alone they take a
    # third of the time.
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
    """Muon for the 3x3x3 kernels of a network and AdamW for the rest, used as one."""

    def __init__(self, network: nn.Module, weight_decay: float):
        kernels = [p for p in network.parameters() if _is_kernel(p)]
        rest = [p for p in network.parameters() if not _is_kernel(p)]
        self.network = network
        self.parts = (
            Muon(kernels, lr=0.0, weight_decay=weight_decay),
            torch.optim.AdamW(rest, lr=0.0, betas=(0.9, 0.99), weight_decay=weight_decay),
        )

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of both."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = lr

    def step(self) -> None:
        """Update all weights."""
        for part in self.parts:
            part.step()

    def save(self, path: Path, step: int, fingerprint: str) -> None:
        """Write weights, moments and step; the last checkpoint is kept until this is complete."""
        tensors = {}
        for name, parameter, state in self._states():
            tensors[f"weight/{name}"] = parameter.detach()
            # None for weights that have not moved yet; those that a stage leaves alone count fewer steps than the run.
            tensors |= {f"{key}/{name}": value.clone() for key, value in state.items()}
        tensors |= {f"buffer/{name}": value for name, value in self.network.named_buffers()}
        write_tensors(path, tensors, {"step": str(step), "fingerprint": fingerprint})

    def load(self, path: Path, fingerprint: str) -> int:
        """Restore what `save` wrote and return the steps done, 0 where there is no file.

        A file that is damaged, or of another recipe, is refused with a `UserError`.
        """
        if not path.exists():
            return 0
        try:
            device = next(self.network.parameters()).device
            with safe_open(path, "pt", device=str(device)) as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            if metadata["fingerprint"] != fingerprint:
                raise UserError(
                    f"{path}: checkpoint of another recipe, of a device with other number formats, or (mca members) "
                    "of a version that rounds otherwise. Resume with the flags, version and kind of device that wrote "
                    "it, or train into an empty folder."
                )
            with torch.no_grad():
                for name, parameter, state in self._states():
                    parameter.copy_(tensors[f"weight/{name}"])
                    for key in (key for key in ("step", *MOMENTS) if f"{key}/{name}" in tensors):
                        value = tensors[f"{key}/{name}"]
                        # Moments in the parameter's memory layout: the update runs over the elements in that order.
                        state[key] = torch.empty_like(value if key == "step" else parameter).copy_(value)
                for name, buffer in self.network.named_buffers():
                    buffer.copy_(tensors[f"buffer/{name}"])
            return int(metadata["step"])
        except (SafetensorError, KeyError) as error:
            raise UserError(f"{path}: damaged checkpoint ({error}). Delete it to train this part again.") from error

    def _states(self) -> Iterator[tuple[str, nn.Parameter, dict[str, torch.Tensor]]]:
        """Name, weights and (mutable) optimiser state of every parameter."""
        for name, parameter in self.network.named_parameters():
            yield name, parameter, self.parts[0 if _is_kernel(parameter) else 1].state[parameter]


def _is_kernel(parameter: torch.Tensor) -> bool:
    return parameter.ndim == 5 and parameter.shape[2:] == (3, 3, 3)
