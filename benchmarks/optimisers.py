"""How fast the network's body learns with Muon and with AdamW alone.

    python benchmarks/optimisers.py LABELS_DIR [--steps 300] [--hold-out 3]

Trains the body at 4 mm from the same initialisation on the same images (data are a function of the
step), once with each optimiser, and prints the mean Dice on images drawn from the label maps left
out, every 100 steps, as TSV. Learning rates: each at the best of those tried (Muon 0.005 and
0.015; AdamW 0.0015, 0.003 and 0.008).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from bids_varaug.machine import keep_freed_memory
from bids_varaug.models.ensemble import NetworkShape
from bids_varaug.models.unet import UNet, build_network
from bids_varaug.training.labels import TrainingSubject, find_label_maps, load_scheme, load_subjects
from bids_varaug.training.monitor import dice_with_truth
from bids_varaug.training.optimiser import Optimiser, training_loss
from bids_varaug.training.synthesis import SynthesisSettings, SyntheticImageGenerator

SHAPE, VOXEL_SIZE = (48, 48, 48), 4.0
WARMUP = 50


class AdamW:
    """AdamW for every weight, used like `Optimiser`."""

    def __init__(self, network: UNet):
        self.optimiser = torch.optim.AdamW(
            network.parameters(), betas=(0.9, 0.99), weight_decay=1e-4
        )

    def set_lr(self, lr: float) -> None:
        """Set the learning rate."""
        self.optimiser.param_groups[0]["lr"] = lr

    def step(self) -> None:
        """Update all weights."""
        self.optimiser.step()


def mean_dice(
    network: UNet,
    generator: SyntheticImageGenerator,
    subjects: list[TrainingSubject],
    n_classes: int,
) -> float:
    """Mean over nine images of the mean Dice of the structures present."""
    scores, structures = [], range(1, n_classes)
    for number in range(9):
        subject = subjects[number % len(subjects)]
        image, target = generator.draw(subject, SHAPE, VOXEL_SIZE, 9000 + number)
        with torch.no_grad():
            found = network.coarse_logits(image[None, None])[0][0].argmax(-1)
        scores.append(np.nanmean(dice_with_truth(found.numpy(), target.numpy(), structures)))
    return float(np.mean(scores))


def main() -> None:
    """Train twice and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("labels", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--hold-out", type=int, default=3)
    arguments = parser.parse_args()
    keep_freed_memory()
    scheme = load_scheme()
    maps = find_label_maps(arguments.labels)
    subjects = load_subjects(maps, scheme, "cpu")
    to_train, left_out = subjects[: -arguments.hold_out], subjects[-arguments.hold_out :]
    generator = SyntheticImageGenerator(scheme, SynthesisSettings())
    n_classes = len(scheme.target_ids)
    print("optimiser\tlr\tstep\tdice")
    makers = (("muon", 5e-3, lambda n: Optimiser(n, 1e-4)), ("adamw", 8e-3, AdamW))
    for name, lr, make in makers:
        network = build_network(NetworkShape(n_classes), 0)
        optimiser = make(network)
        for step in range(arguments.steps):
            # A short rise, then half a cosine down to nothing.
            share = max(0, step - WARMUP) / (arguments.steps - WARMUP)
            rise = min(1.0, (step + 1) / WARMUP)
            optimiser.set_lr(lr * (rise * 0.5 * (1 + np.cos(np.pi * share)) + 0.01))
            subject, seed = np.random.SeedSequence((77, step)).generate_state(2)
            image, target = generator.draw(
                to_train[int(subject) % len(to_train)], SHAPE, VOXEL_SIZE, int(seed)
            )
            network.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = training_loss(network, image, target, 0, balanced=True, body_only=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimiser.step()
            if (step + 1) % 100 == 0:
                score = mean_dice(network, generator, left_out, n_classes)
                print(f"{name}\t{lr}\t{step + 1}\t{score:.3f}", flush=True)


if __name__ == "__main__":
    main()
