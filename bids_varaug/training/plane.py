"""FastSurfer's network of one plane is trained; perturbed, by seed, or neither.

It learns from pairs of images and label maps, or from images drawn from label maps, other ones in each epoch.
Loss, weights, optimiser, schedule and the jitter of the scale are those of FastSurfer 2.4.0-dev (commit 7c45785e). The
checkpoint has FastSurfer's form, so that `models.checkpoint` makes an ensemble of it. A training that was stopped goes
on from the last epoch, and ends with the same bits.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F

from bids_varaug.errors import UserError
from bids_varaug.files import replacing
from bids_varaug.images.fastsurfer import MIN_SIDE, Sizes, conform, conform_labels
from bids_varaug.models.ensemble import VinnShape
from bids_varaug.models.fastsurfer import Vinn, build_planes
from bids_varaug.segmentation.slices import AXES, thick_slice
from bids_varaug.training.fastsurfer import combined_loss, network_ids, slices_to_learn, to_classes, voxel_weights
from bids_varaug.training.labels import LabelScheme, TrainingSubject, image_of, load_subjects, open_image
from bids_varaug.training.recipe import MemberPlan
from bids_varaug.training.synthesis import SynthesisSettings, SyntheticImageGenerator


@dataclass(frozen=True)
class PlaneRecipe:
    """How a plane is trained; the defaults are FastSurfer's."""

    plane: str
    shape: VinnShape = field(default_factory=VinnShape)
    epochs: int = 70
    batch: int = 8
    batches_a_step: int = 2  # whose gradients are added
    lr: float = 0.01
    lr_end: float = 1e-4
    first_cycle: int = 10  # epochs; each cycle of the learning rate is twice as long as the one before
    weight_decay: float = 1e-4
    scale_sd: float = 0.1  # of what is added to the scale, once for each slice
    side: int = 320  # pixels; smaller slices are padded with background, which does not count in the cross-entropy
    most: float = 5  # these three: see `voxel_weights`
    edge: float = 5
    sulci: float = 0

    def learning_rate(self, epoch: float) -> float:
        """Cosine from `lr` to `lr_end`, restarted; `epoch` counts fractions (Loshchilov & Hutter, arXiv:1608.03983).

        >>> recipe = PlaneRecipe("coronal")
        >>> [round(recipe.learning_rate(epoch), 5) for epoch in (0, 5, 10, 30, 69.999)]
        [0.01, 0.00505, 0.01, 0.01, 0.0001]
        """
        length = float(self.first_cycle)
        while epoch >= length:
            epoch, length = epoch - length, 2 * length
        return self.lr_end + (self.lr - self.lr_end) * (1 + math.cos(math.pi * epoch / length)) / 2


@dataclass(frozen=True)
class Head:
    """An image and its labels on FastSurfer's grid, each (N, N, N)."""

    image: np.ndarray  # uint8
    classes: np.ndarray  # uint8
    weights: np.ndarray  # float32
    scale: float  # 1 mm / voxel size


class SyntheticHeads:
    """Heads drawn from label maps with any contrast; other ones for each seed and epoch."""

    def __init__(self, label_maps: Sequence[Path], scheme: LabelScheme, recipe: PlaneRecipe):
        self.ids, self.recipe = np.array(scheme.target_ids, np.int32), recipe
        self.subjects = load_subjects(label_maps, scheme, "cpu")
        self.generator = SyntheticImageGenerator(scheme, SynthesisSettings())

    def __len__(self) -> int:
        return len(self.subjects)

    def draw(self, seed: int, epoch: int) -> list[Head]:
        """Draw a head of 256^3 mm from each label map."""
        first = (1_000_003 * seed + epoch) * len(self)
        return [self._draw(subject, first + n) for n, subject in enumerate(self.subjects)]

    def _draw(self, subject: TrainingSubject, seed: int) -> Head:
        image, targets = self.generator.draw(subject, (MIN_SIDE,) * 3, 1.0, seed)
        return make_head(image.numpy(), self.ids[targets.numpy()], np.eye(4), (1.0, 1.0, 1.0), self.recipe)


def load_heads(label_maps: Sequence[Path], recipe: PlaneRecipe) -> list[Head]:
    """Read label maps of ``aparc.DKTatlas+aseg`` and the T1w image beside each; `UserError` where there is none."""
    heads = []
    for path in label_maps:
        labels, image_path = open_image(path), image_of(path)
        if image_path is None:
            raise UserError(f"{path}: no *_T1w.nii.gz beside it. FastSurfer's networks learn from pairs of both.")
        image = open_image(image_path)
        ids = np.asanyarray(labels.dataobj).astype(np.int32)
        sizes = image.header.get_zooms()[:3]
        heads.append(make_head(np.asanyarray(image.dataobj), ids, image.affine, sizes, recipe))
    return heads


def make_head(image: np.ndarray, ids: np.ndarray, affine: np.ndarray, sizes: Sizes, recipe: PlaneRecipe) -> Head:
    """Conform an image (X, Y, Z) and the ids of ``aparc.DKTatlas+aseg`` at its voxels, of these sizes [mm]."""
    data, conformed = conform(image, affine, sizes)
    classes = to_classes(network_ids(conform_labels(ids, affine, conformed, len(data))), recipe.plane)
    weights = voxel_weights(classes, recipe.plane, recipe.most, recipe.edge, recipe.sulci)
    return Head(data, classes, weights, float(np.float32(1) / np.float32(nib.affines.voxel_sizes(conformed)[0])))


def train_plane(
    recipe: PlaneRecipe, heads: Sequence[Head] | SyntheticHeads, member: MemberPlan, out: Path,
    start: Vinn | None = None, device: str = "cpu",
) -> Vinn:  # fmt: skip
    """Train a plane's network and keep a checkpoint at `out` after each epoch; resumes a run that was stopped.

    `start` is a trained network to go on from, of the same plane; else weights are drawn by the member's seed.
    `UserError` if `out` is of another recipe, or there is nothing to learn.
    """
    network = build_planes(recipe.shape, member.seed)[recipe.plane]
    if start is not None:
        network.load_state_dict(start.state_dict())
    network.to(device).train()
    optimiser = torch.optim.AdamW(network.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    drawn = isinstance(heads, SyntheticHeads)
    config = json.dumps(
        asdict(recipe) | {"member": member.id, "heads": len(heads), "drawn": drawn, "started": start is not None}
    )
    for epoch in range(_resume(out, config, network, optimiser), recipe.epochs):
        here = heads.draw(member.seed, epoch) if isinstance(heads, SyntheticHeads) else heads
        samples = [(n, int(k)) for n, head in enumerate(here) for k in slices_to_learn(head.classes, recipe.plane)]
        if not samples:
            raise UserError(f"{out}: no slice of the label maps holds enough labels to learn from.")
        total = 0.0
        batches = list(_batches(samples, recipe, member.seed, epoch))
        for number, (chosen, jitter) in enumerate(batches):
            images, classes, weights, scale = _stack([here[n] for n, _ in chosen], chosen, recipe, device)
            with member.arithmetic(epoch * len(batches) + number):
                loss = combined_loss(network(images, scale + jitter.to(device)), classes, weights).total
                loss.backward()
                total += float(loss.detach())
                if (number + 1) % recipe.batches_a_step == 0 or number + 1 == len(batches):
                    for group in optimiser.param_groups:
                        group["lr"] = recipe.learning_rate(epoch + number / len(batches))
                    optimiser.step()
                    optimiser.zero_grad()
        print(f"{out.name}: epoch {epoch + 1} of {recipe.epochs}, loss {total / len(batches):.3f}", file=sys.stderr)
        content = {"model_state": network.state_dict(), "optimizer_state": optimiser.state_dict(), "epoch": epoch + 1}
        with replacing(out) as stream:
            torch.save(content | {"config": config}, stream)
    return network.eval()


def _resume(out: Path, config: str, network: Vinn, optimiser: torch.optim.Optimizer) -> int:
    """Load the last epoch's checkpoint, if there is one; return how many epochs are done."""
    if not out.exists():
        return 0
    content = torch.load(out, map_location=next(network.parameters()).device, weights_only=True)
    if content["config"] != config:
        raise UserError(f"{out}: was trained by another recipe or on other heads. Give another folder, or remove it.")
    network.load_state_dict(content["model_state"])
    optimiser.load_state_dict(content["optimizer_state"])
    return content["epoch"]


def _batches(
    samples: Sequence[tuple[int, int]], recipe: PlaneRecipe, seed: int, epoch: int
) -> Iterator[tuple[list[tuple[int, int]], torch.Tensor]]:
    """Yield the slices of each batch of an epoch, and what is added to their scales, (B, 1)."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
    order = torch.randperm(len(samples), generator=generator)
    for part in order.split(recipe.batch):
        jitter = recipe.scale_sd * torch.randn(len(part), 1, generator=generator)
        yield [samples[i] for i in part.tolist()], jitter


def _stack(
    heads: Sequence[Head], chosen: Sequence[tuple[int, int]], recipe: PlaneRecipe, device: str
) -> tuple[torch.Tensor, ...]:
    """Images (B, 7, S, S), classes (B, S, S) int64, weights (B, S, S) and scales (B, 2) of a batch."""
    rows, columns, across = AXES[recipe.plane]
    parts: list[list[torch.Tensor]] = []
    for head, (_, number) in zip(heads, chosen, strict=True):
        at = [data.transpose(across, rows, columns)[number] for data in (head.classes, head.weights)]
        arrays = (thick_slice(head.image, recipe.plane, number), at[0].astype(np.int64), at[1])
        height, width = (max(0, recipe.side - n) for n in arrays[0].shape[1:])
        parts.append([F.pad(torch.from_numpy(np.ascontiguousarray(a)), (0, width, 0, height)) for a in arrays])
    images, classes, weights = (torch.stack(part).to(device) for part in zip(*parts, strict=True))
    scale = torch.tensor([[head.scale] * 2 for head in heads], device=device)
    return images, classes, weights, scale
