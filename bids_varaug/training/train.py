"""The training loop: stages of steps, resumable to the bit after any step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bids_varaug.errors import UserError
from bids_varaug.models.unet import UNet
from bids_varaug.numerics.rules import DIGITS
from bids_varaug.training.checkpoint import load_checkpoint, save_checkpoint
from bids_varaug.training.heads import Head
from bids_varaug.training.loss import training_loss
from bids_varaug.training.optimiser import Optimiser
from bids_varaug.training.recipe import Recipe, Stage, Window
from bids_varaug.training.synthesis import Randomiser


@dataclass(frozen=True)
class StepReport:
    """What one step did, for logs and progress bars."""

    stage: str
    step: int
    total: int
    loss: float
    lr: float
    seconds: float


def train(
    network: UNet,
    heads: Sequence[Head],
    randomiser: Randomiser,
    recipe: Recipe,
    data_seed: int,
    checkpoint: Path,
    arithmetic: Callable[[int], object] = lambda step: nullcontext(),
    on_step: Callable[[StepReport], None] = lambda report: None,
    save_every: int = 50,
) -> UNet:
    """Run the recipe's stages from where `checkpoint` left off, or from the start.

    Each step's data are a function of (`data_seed`, step) alone, so that an interrupted run gives
    the bits of an unbroken one.

    Parameters
    ----------
    network : changed in place and returned
    heads : on the network's device
    arithmetic : step -> context manager under which forward, backward and update run
    checkpoint : where the state is kept

    Raises
    ------
    UserError
        If the loss is not finite; the last good checkpoint is kept. If `checkpoint` is of another
        recipe or seed, or of layers of another format.
    """
    optimiser = Optimiser(network, recipe.weight_decay)
    digits = [DIGITS[layer_format(stage, randomiser.device)] for stage in recipe.stages]
    fingerprint = f"{recipe.fingerprint}-{data_seed}-{digits}"
    done = 0
    if checkpoint.exists():
        done = load_checkpoint(checkpoint, network, optimiser, fingerprint)
    total = recipe.steps
    first = 0
    for stage in recipe.stages:
        for step in range(max(first, done), first + stage.steps):
            started = time.perf_counter()
            lr = learning_rate(recipe, stage, step - first, step)
            optimiser.set_lr(lr)
            image, target, phase = _draw(heads, randomiser, stage, (data_seed, step))
            # Not the data: perturbed members see the images of the baseline, to the bit.
            with arithmetic(step):
                loss = _one_step(network, optimiser, recipe, stage, image, target, phase)
            if not math.isfinite(loss):
                raise UserError(
                    f"Loss became {loss} at step {step} of stage {stage.name}; the last good "
                    f"state is in {checkpoint}. Lower the learning rate and resume."
                )
            on_step(StepReport(stage.name, step, total, loss, lr, time.perf_counter() - started))
            if (step + 1) % save_every == 0 or step + 1 == total:
                save_checkpoint(checkpoint, network, optimiser, step + 1, fingerprint)
        first += stage.steps
    return network


def learning_rate(recipe: Recipe, stage: Stage, step_in_stage: int, step: int) -> float:
    """Linear from `stage.lr` to `stage.lr_end`, after a linear rise over the first steps.

    The rise takes `recipe.warmup` steps, but at most a quarter of the stage.
    """
    share = step_in_stage / max(1, stage.steps - 1)
    rate = stage.lr + share * (stage.lr_end - stage.lr)
    warmup = max(1, min(recipe.warmup, stage.steps // 4))
    return rate * min(1.0, (step + 1) / warmup)


def choose_window(stage: Stage, draw: float) -> Window:
    """Return the window whose interval of cumulated shares holds `draw` (in [0, 1))."""
    for window in stage.windows:
        draw -= window.share
        if draw < 0:
            return window
    return stage.windows[-1]


def _draw(heads, randomiser, stage: Stage, key: tuple[int, int]):
    """Return image, target and the phase of the sampled voxels of the step that `key` names."""
    head_draw, shape_draw, image_seed, phase = np.random.SeedSequence(key).generate_state(4)
    head = heads[int(head_draw) % len(heads)]
    window = choose_window(stage, int(shape_draw) / 2**32)
    image, target = randomiser.draw(head, window.shape, window.voxel_size, int(image_seed))
    return image, target, int(phase)


def _one_step(network, optimiser, recipe, stage: Stage, image, target, phase: int) -> float:
    optimiser.zero_grad()
    half = layer_format(stage, image.device) == torch.bfloat16
    with torch.autocast(image.device.type, torch.bfloat16, enabled=half):
        loss = training_loss(network, image, target, phase, stage.balanced, stage.body_only)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), recipe.clip)
    value = float(loss.detach())
    if math.isfinite(value):
        optimiser.step()
    return value


def layer_format(stage: Stage, device: torch.device) -> torch.dtype:
    """Return the format of the results of convolutions; weights and sums are always float32."""
    return torch.bfloat16 if stage.bf16 and has_bfloat16(device) else torch.float32


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16; a CPU that does not takes 200 times as long."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
