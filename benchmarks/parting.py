"""How far members part as they train, each from its own first step.

    python benchmarks/parting.py LABELS_DIR ENSEMBLE_DIR T1W.nii.gz ... --output DIR
        [--members mca01 seed01] [--steps fine=500 decay=200] [--hold-out 3] [--every 500]
        [--plot parting.png]

Trains the baseline and the members in ENSEMBLE_DIR as ``bids_varaug-train`` does (to the bit: what
is done here need not be done there), keeps the weights of every `--every` steps in DIR, and prints,
for each of these steps and each member,

weights
    distance from the baseline's weights after as many steps, over the way that the baseline has
    come from its first weights;
dice
    mean Dice over structures of the member's and the baseline's labels, mean over images;
brain
    the same for the voxels called brain by both, as a share that got different labels.

To resume, run the same command again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file
from tqdm import tqdm

from bids_varaug.cli.train import with_steps
from bids_varaug.images.conform import prepare_head
from bids_varaug.machine import keep_freed_memory
from bids_varaug.models.ensemble import BASELINE, NetworkShape
from bids_varaug.models.unet import UNet, build_network
from bids_varaug.models.weights import write_tensors
from bids_varaug.segmentation.localise import crop_to_brain
from bids_varaug.segmentation.predict import segment_volume
from bids_varaug.training.labels import load_scheme
from bids_varaug.training.members import plan_member
from bids_varaug.training.recipe import STAGES, Recipe
from bids_varaug.training.subjects import find_label_maps, load_subjects
from bids_varaug.training.train import Trainer
from bids_varaug.variability.regions import pairwise_dice, region_counts


class Snapshots:
    """Weights of each member every few steps, as files ``<member>_<step>.safetensors``."""

    def __init__(self, directory: Path, every: int):
        self.directory, self.every = directory, every
        self.bar = tqdm(unit="step")

    def on_step(self, name: str, report, network: UNet) -> None:
        """Keep the weights when it is time."""
        self.bar.set_description(name)
        self.bar.update()
        if (report.step + 1) % self.every == 0:
            weights = {key: p.detach() for key, p in network.named_parameters()}
            write_tensors(self.path(name, report.step + 1), weights)

    def path(self, name: str, step: int) -> Path:
        """Where the weights after `step` steps are."""
        return self.directory / f"{name}_{step}.safetensors"

    def load(self, name: str, step: int) -> dict[str, torch.Tensor]:
        """Return the weights after `step` steps."""
        return load_file(self.path(name, step))


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Euclidean distance of two sets of weights."""
    return float(sum(((a[key] - b[key]).double() ** 2).sum() for key in a) ** 0.5)


def label(network: UNet, weights: dict[str, torch.Tensor], heads: list[np.ndarray]):
    """Return the label map of each head."""
    network.load_state_dict(weights)
    return [segment_volume(network, head).labels for head in heads]


def compare(ours: list[np.ndarray], theirs: list[np.ndarray], n_classes: int) -> dict[str, float]:
    """Mean Dice and share of different labels of two members, means over images."""
    dice, different = [], []
    for a, b in zip(ours, theirs, strict=True):
        counts = region_counts([np.stack([a.ravel(), b.ravel()])], 2, n_classes)
        dice.append(np.nanmean(pairwise_dice(counts)[0, 1, 1:]))
        brain = (a > 0) & (b > 0)
        different.append(np.mean(a[brain] != b[brain]))
    return {"dice": float(np.mean(dice)), "brain": float(np.mean(different))}


def plot(table: pd.DataFrame, path: Path) -> None:
    """Draw one minus Dice and the distance of the weights against the step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for name, part in table.groupby("member", sort=False):
        axes[0].plot(part["step"], part["weights"], "o-", ms=3, label=name)
        axes[1].plot(part["step"], 1 - part["dice"], "o-", ms=3, label=name)
    axes[0].set(yscale="log", ylabel="distance of weights / way since the first step")
    axes[1].set(yscale="log", ylabel="1 - Dice with the baseline")
    for axis in axes:
        axis.set_xlabel("step")
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Parse the command line, train, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("labels", type=Path)
    parser.add_argument("ensemble", type=Path)
    parser.add_argument("images", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--members", nargs="+", default=["mca01", "seed01"])
    parser.add_argument("--steps", nargs="+", default=[], help="as of bids_varaug-train")
    parser.add_argument("--hold-out", type=int, default=3)
    parser.add_argument("--every", type=int, default=500)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    keep_freed_memory()
    scheme = load_scheme()
    n_classes = len(scheme.target_ids)
    recipe = Recipe(NetworkShape(n_classes), with_steps(STAGES, options.steps))
    maps = find_label_maps(options.labels)
    subjects = load_subjects(maps[: len(maps) - options.hold_out], scheme, "cpu")
    snapshots = Snapshots(options.output, options.every)
    options.output.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(options.ensemble, recipe, scheme, subjects, "cpu", snapshots.on_step)
    for name in (BASELINE, *options.members):
        trainer.train_member(plan_member(name))
    network = build_network(recipe.network, plan_member(BASELINE).seed)
    start = {key: p.detach().clone() for key, p in network.named_parameters()}
    # The brain is found by the trained network.
    network.load_state_dict(snapshots.load(BASELINE, recipe.steps // options.every * options.every))
    network.eval()
    whole = (prepare_head(path, recipe.voxel_size, network.shape.multiple)
             for path in options.images)  # fmt: skip
    prepared = [crop_to_brain(network, *head)[0] for head in whole]
    rows = []
    for step in range(options.every, recipe.steps + 1, options.every):
        baseline = snapshots.load(BASELINE, step)
        truth = label(network, baseline, prepared)
        for name in options.members:
            weights = snapshots.load(name, step)
            moved = distance(weights, baseline) / distance(baseline, start)
            same = compare(label(network, weights, prepared), truth, n_classes)
            rows.append({"step": step, "member": name, "weights": moved, **same})
    table = pd.DataFrame(rows)
    print(table.to_csv(sep="\t", index=False, float_format="%.4g"), end="")
    if options.plot:
        plot(table, options.plot)


if __name__ == "__main__":
    main()
