"""What a training run shows: a progress bar, a log file, curves as PNG, Dice on real images."""

from __future__ import annotations

import csv
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from bids_varaug.models.unet import UNet
from bids_varaug.training.monitor import find_labelled_images, real_image_dice
from bids_varaug.training.train import StepReport

COLUMNS = ("stage", "step", "loss", "lr", "seconds", "dice")


class Progress:
    """Receives every step of every member.

    Parameters
    ----------
    directory : gets ``<member>.tsv`` (one row a step) and ``<member>.png``
    monitor : folder of T1w images with label maps, or None
    every : steps between two looks at the real images
    names : label id -> name of each class, background first
    voxel_size : of the network grid, mm
    """

    def __init__(
        self,
        directory: Path,
        monitor: Path | None,
        every: int,
        names: Mapping[int, str],
        voxel_size: float,
    ):
        self.directory = directory
        self.images = find_labelled_images(monitor, names) if monitor else []
        self.every = every
        self.class_ids = tuple(names)
        self.voxel_size = voxel_size
        self.bar: tqdm | None = None
        self.name: str | None = None
        directory.mkdir(parents=True, exist_ok=True)

    def on_step(self, name: str, report: StepReport, network: UNet) -> None:
        """Note one step; look at the real images when it is time, and at the end."""
        if name != self.name:
            self.close()
            self.name = name
            self.bar = tqdm(total=report.total, initial=report.step, desc=name, unit="step")
        last = report.step + 1 == report.total
        scores = {}
        if self.images and ((report.step + 1) % self.every == 0 or last):
            scores = self._real_dice(network)
        dice = float(np.mean(list(scores.values()))) if scores else None
        self._log(name, report, dice)
        self.bar.update(1)
        self.bar.set_postfix(stage=report.stage, loss=f"{report.loss:.3f}")
        if dice is not None:
            each = ", ".join(f"{image} {score:.4f}" for image, score in scores.items())
            self.bar.write(f"{name} step {report.step + 1}: mean Dice on real images {dice:.4f}; "
                           f"{each}", file=sys.stderr)  # fmt: skip
        if last or (report.step + 1) % self.every == 0:
            draw_curves(self.directory / f"{name}.tsv", self.directory / f"{name}.png")

    def close(self) -> None:
        """End the bar of the current member."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _real_dice(self, network: UNet) -> dict[str, float]:
        return {
            image.t1w.name.split("_T1w")[0]: float(
                np.nanmean(real_image_dice(network, image, self.class_ids, self.voxel_size))
            )
            for image in self.images
        }

    def _log(self, name: str, report: StepReport, dice: float | None) -> None:
        path = self.directory / f"{name}.tsv"
        new = not path.exists()
        with path.open("a", newline="") as stream:
            writer = csv.writer(stream, delimiter="\t", lineterminator="\n")
            if new:
                writer.writerow(COLUMNS)
            writer.writerow([
                report.stage, report.step, f"{report.loss:.5f}", f"{report.lr:.3e}",
                f"{report.seconds:.3f}", "n/a" if dice is None else f"{dice:.4f}",
            ])  # fmt: skip


def draw_curves(log: Path, picture: Path) -> None:
    """Plot loss (running median) and real-image Dice against the step."""
    with log.open(newline="") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    steps = np.array([int(row["step"]) for row in rows])
    loss = np.array([float(row["loss"]) for row in rows])
    half = max(1, len(loss) // 60)
    smooth = [np.median(loss[max(0, i - half) : i + half + 1]) for i in range(len(loss))]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, loss, ",", color="0.7")
    axes.plot(steps, smooth, color="C0")
    axes.set(xlabel="step", ylabel="loss (synthetic heads)", title=log.stem)
    looks = [(int(r["step"]), float(r["dice"])) for r in rows if r["dice"] != "n/a"]
    if looks:
        right = axes.twinx()
        right.plot(*zip(*looks, strict=True), "o-", color="C1")
        right.set(ylabel="mean Dice (real images)", ylim=(0, 1))
    figure.savefig(picture, dpi=90)
