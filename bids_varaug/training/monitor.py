"""What a training run shows: a progress bar, a log, curves, and Dice on real images.

The loss on synthetic images alone says little about real ones.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from tqdm import tqdm

from bids_varaug.errors import UserError
from bids_varaug.images.conform import prepare_head
from bids_varaug.models.unet import UNet
from bids_varaug.segmentation.predict import crop_to_brain, segment_volume
from bids_varaug.training.labels import open_image
from bids_varaug.training.train import StepReport


class LabelledImage(NamedTuple):
    """A T1w image and its label map on the same grid."""

    t1w: Path
    labels: Path


@dataclass
class TrainingMonitor:
    """Receives every step of every member."""

    directory: Path  # gets ``<member>.tsv`` (one row a step) and ``<member>.png``
    images: Sequence[LabelledImage]  # real ones to evaluate on
    every: int  # steps between two evaluations
    class_ids: Sequence[int]  # label id of each class, background first
    voxel_size: float  # of the network grid, mm
    member: str | None = field(default=None, init=False)
    bar: tqdm | None = field(default=None, init=False)

    def on_step(self, member: str, report: StepReport, network: UNet | None = None) -> None:
        """Note one step; evaluate a segmenting network on the real images when it is time, and at the end."""
        if self.bar is None or member != self.member:
            self.close()
            self.member = member
            self.bar = tqdm(total=report.total, initial=report.step, desc=member, unit="step")
        self.bar.update(1)
        self.bar.set_postfix(stage=report.stage, loss=f"{report.loss:.3f}")
        is_time = (report.step + 1) % self.every == 0 or report.step + 1 == report.total
        scores = {
            image.t1w.name.split("_T1w")[0]: np.nanmean(self.real_image_dice(network, image))
            for image in (self.images if is_time else ())
            if network is not None
        }
        dice = f"{np.mean(list(scores.values())):.4f}" if scores else "n/a"
        row = {
            "stage": report.stage, "step": report.step, "loss": f"{report.loss:.5f}",
            "lr": f"{report.lr:.3e}", "seconds": f"{report.seconds:.3f}", "dice": dice,
        }  # fmt: skip
        log = self.directory / f"{member}.tsv"
        log.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame([row]).to_csv(log, sep="\t", index=False, mode="a", header=not log.exists(), lineterminator="\n")
        if scores:
            each = ", ".join(f"{image} {score:.4f}" for image, score in scores.items())
            self.bar.write(f"{member} step {report.step + 1}: mean Dice on real images {dice}; {each}", sys.stderr)
        if is_time:
            draw_curves(log)

    def real_image_dice(self, network: UNet, image: LabelledImage) -> np.ndarray:
        """Dice of each structure (K - 1,) float64 against the image's label map; NaN where the map lacks it."""
        head = prepare_head(image.t1w, self.voxel_size, network.shape.multiple)
        brain, geometry = crop_to_brain(network, *head)
        found = segment_volume(network, brain).to_native(geometry)
        truth = np.asarray(open_image(image.labels).dataobj).astype(np.int64)
        return dice_with_truth(np.asarray(self.class_ids)[found], truth, self.class_ids[1:])

    def close(self) -> None:
        """End the bar of the current member."""
        if self.bar is not None:
            self.bar.close()


def draw_curves(log: Path) -> None:
    """Plot loss (running median) and real-image Dice against the step, beside a member's table."""
    table = pd.read_csv(log, sep="\t")
    half = max(1, len(table) // 60)
    smooth = table["loss"].rolling(2 * half + 1, center=True, min_periods=1).median()
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(table["step"], table["loss"], ",", color="0.7")
    axes.plot(table["step"], smooth, color="C0")
    axes.set(xlabel="step", ylabel="loss (synthetic images)", title=log.stem)
    evaluated = table.dropna(subset="dice")
    if len(evaluated):
        right = axes.twinx()
        right.plot(evaluated["step"], evaluated["dice"], "o-", color="C1")
        right.set(ylabel="mean Dice (real images)", ylim=(0, 1))
    figure.savefig(log.with_suffix(".png"), dpi=90)


def find_labelled_images(directory: Path, names: Mapping[int, str]) -> list[LabelledImage]:
    """Pair ``<name>_T1w.nii.gz`` with a ``<name>*_dseg.nii.gz`` beside it (``desc-aseg`` first).

    Maps whose own table (``*_dseg.tsv``) calls every id of `names` something else belong to another atlas and are
    passed over; those without a table are believed.
    """
    found = []
    for t1w in sorted(directory.rglob("*_T1w.nii*")):
        stem = t1w.name.split("_T1w")[0].split("_desc-")[0]
        for path in sorted(t1w.parent.glob(f"{stem}*_dseg.nii*"), key=lambda p: ("desc-aseg" not in p.name, p.name)):
            table = path.with_name(path.name.split(".nii")[0] + ".tsv")
            rows = pd.read_csv(table, sep="\t") if table.exists() else None
            if rows is None or (rows["index"].map(names) == rows["name"]).any():
                found.append(LabelledImage(t1w, path))
                break
    if not found:
        raise UserError(f"{directory}: no *_T1w.nii.gz with a *_dseg.nii.gz beside it.")
    return found


def dice_with_truth(found: np.ndarray, truth: np.ndarray, ids: Sequence[int]) -> np.ndarray:
    """Dice of the labels `ids`; NaN where the truth lacks one. Its voxels below 0 do not count.

    >>> dice_with_truth(np.array([[[4, 4, 4, 2]]]), np.array([[[4, 4, 0, -1]]]), [4, 2])
    array([0.8, nan])
    """
    scores = []
    for i in ids:
        ours, theirs = (found == i) & (truth >= 0), truth == i
        total = ours.sum() + theirs.sum()
        scores.append(2 * (ours & theirs).sum() / total if theirs.any() else np.nan)
    return np.array(scores)
