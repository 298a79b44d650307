"""Train a small ensemble of FastSurfer's networks for a demonstration: how far do its members differ?

    python benchmarks/fastsurfer_training.py LABELS_DIR OUT_DIR [--epochs 100] [--heads 2] [--members ieee mca01 seed01]

A real training needs a GPU. Here one coronal network of 24 channels learns, at 3 mm and with the
cortex as one parcel of each side, from images drawn from the first label maps of the folder
(`bids_varaug.training.plane`, FastSurfer's loss, weights and optimiser). Prints, on images drawn
from the last two label maps, mean Dice with the truth, and the smallest Dice between members of a
family. Resumes where it stopped.
"""

from __future__ import annotations

import argparse
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from heads import print_markdown

from bids_varaug.machine import use_threads
from bids_varaug.models.ensemble import VinnShape
from bids_varaug.models.fastsurfer import Vinn
from bids_varaug.segmentation.slices import thick_slice
from bids_varaug.training.fastsurfer import network_ids, parcel_scheme, to_classes, voxel_weights
from bids_varaug.training.labels import TrainingSubject, find_label_maps
from bids_varaug.training.monitor import dice_with_truth
from bids_varaug.training.plane import Head, PlaneRecipe, SyntheticHeads, train_plane
from bids_varaug.training.recipe import plan_member

SIDE, VOXEL_SIZE = 64, 3.0
CORTEX = {3: 1028, 42: 2028}  # as one parcel, which has a class on each side
TEST_SEED = 99


class CoarseHeads(SyntheticHeads):
    """Heads on a coarse grid, which the network takes for one of 1 mm."""

    def _draw(self, subject: TrainingSubject, seed: int) -> Head:
        image, targets = self.generator.draw(subject, (SIDE,) * 3, VOXEL_SIZE, seed)
        ids = self.ids[targets.numpy()]
        for old, new in CORTEX.items():
            ids[ids == old] = new
        # From RAS to FastSurfer's axes.
        data, ids = (a.transpose(0, 2, 1)[::-1, ::-1] for a in (np.rint(170 * image.numpy()).astype(np.uint8), ids))
        classes = to_classes(network_ids(ids), "coronal")
        return Head(np.ascontiguousarray(data), classes, voxel_weights(classes, "coronal"), 1.0)


@torch.inference_mode()
def segment(network: Vinn, head: Head) -> np.ndarray:
    """Return the class of each voxel, by this one view."""
    slices = torch.from_numpy(np.stack([thick_slice(head.image, "coronal", k) for k in range(SIDE)]))
    logits = [network(part, torch.ones(len(part), 2)).argmax(1) for part in slices.split(16)]
    return torch.cat(logits).permute(1, 2, 0).numpy()


def mean_dice(one: np.ndarray, other: np.ndarray, classes: np.ndarray) -> float:
    """Mean over the classes."""
    return float(np.nanmean(dice_with_truth(one, other, classes)))


def main() -> None:
    """Parse the command line, train and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("labels_dir", type=Path)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--members", nargs="+", default=["ieee", "mca01", "seed01"])
    options = parser.parse_args()
    use_threads(1)
    recipe = PlaneRecipe("coronal", VinnShape(filters=24, rim_filters=24, grid=SIDE), options.epochs, side=SIDE)
    label_maps, scheme = find_label_maps(options.labels_dir), parcel_scheme()
    heads = CoarseHeads(label_maps[: options.heads], scheme, recipe)
    tests = CoarseHeads(label_maps[-2:], scheme, recipe).draw(TEST_SEED, 0)
    found: dict[str, list[np.ndarray]] = {}
    for member in options.members:
        out = options.out_dir / member / "coronal.pkl"
        out.parent.mkdir(parents=True, exist_ok=True)
        network = train_plane(recipe, heads, plan_member(member), out)
        found[member] = [segment(network, head) for head in tests]
    learnt = [np.flatnonzero(np.bincount(head.classes.ravel()))[1:] for head in tests]
    rows = {
        member: np.mean([mean_dice(*pair) for pair in zip(labels, (t.classes for t in tests), learnt, strict=True)])
        for member, labels in found.items()
    }
    print(f"{options.epochs} epochs, {options.heads} heads, {len(tests)} test heads\n")
    print_markdown(pd.DataFrame({"Dice": rows}).rename_axis("member").round(3))
    for family in ("mca", "seed"):
        members = [m for m in options.members if m == "ieee" or m.startswith(family)]
        pairs = [
            [dice_with_truth(a, b, classes) for a, b in combinations(labels, 2)]
            for *labels, classes in zip(*(found[m] for m in members), learnt, strict=True)
        ]
        print(f"`ieee` and `{family}`, minimum Dice: {np.mean([np.nanmean(np.min(p, axis=0)) for p in pairs]):.3f}\n")


if __name__ == "__main__":
    main()
