"""Train the members of an ensemble: stages of steps, resumable to the bit after any step. Calibrate their mean."""

from __future__ import annotations

import colorsys
import hashlib
import math
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.colors import to_hex
from scipy.optimize import minimize_scalar

from bids_varaug import __version__
from bids_varaug.errors import UserError
from bids_varaug.files import file_lock
from bids_varaug.models.ensemble import MANIFEST, Ensemble, Label, Member, load_ensemble, write_manifest
from bids_varaug.models.unet import FORMAT, UNet, build_network, load_member, save_weights
from bids_varaug.numerics import GENERATOR
from bids_varaug.numerics.specification import DIGITS
from bids_varaug.training.labels import LabelScheme, TrainingSubject
from bids_varaug.training.optimiser import Optimiser, training_loss
from bids_varaug.training.recipe import FAMILIES, MemberPlan, Recipe, Stage, plan_member
from bids_varaug.training.synthesis import SyntheticImageGenerator


class StepReport(NamedTuple):
    """What one step did, for logs and progress bars."""

    stage: str
    step: int
    total: int
    loss: float
    lr: float
    seconds: float


@dataclass(frozen=True)
class Trainer:
    """Trains the members of one ensemble, each from its first step, and keeps its manifest.

    Several processes may train members of one ensemble side by side: each adds its own members to what it finds in the
    manifest.
    """

    directory: Path  # gets manifest, weights and ``checkpoints/``
    recipe: Recipe
    scheme: LabelScheme
    subjects: Sequence[TrainingSubject]  # on `device`
    device: str
    on_step: Callable[[str, StepReport, UNet], None] = lambda member, report, network: None  # called after every step
    save_every: int = 50  # steps between two checkpoints

    @cached_property
    def generator(self) -> SyntheticImageGenerator:
        """What draws the images."""
        return SyntheticImageGenerator(self.scheme, self.recipe.synthesis, self.device)

    def layer_format(self, stage: Stage) -> torch.dtype:
        """Return the format of the results of convolutions; weights and sums are always float32."""
        return torch.bfloat16 if stage.bf16 and has_bfloat16(self.generator.device) else torch.float32

    @property
    def digits(self) -> list[int]:
        """Bits of the results of convolutions, for each stage; the least are what rounds most."""
        return [DIGITS[self.layer_format(stage)] for stage in self.recipe.stages]

    def fingerprint(self, plan: MemberPlan) -> str:
        """Name what decides a member's weights, but for the seed of its rounding: checkpoints carry it."""
        generator = "" if plan.rounding_seed is None else f"-rounding{GENERATOR}"
        return f"{self.recipe.fingerprint}-{plan.seed}-{self.digits}{generator}"

    def train_member(self, plan: MemberPlan) -> UNet:
        """Run the recipe's stages from where the member's checkpoint left off, or from the start.

        Each step's data are a function of the member's seed and the step alone: an interrupted run gives the bits of an
        unbroken one. A loss that is not finite is a `UserError` (the last good checkpoint is kept), and so is a
        checkpoint of another recipe or seed, or of layers of another format.
        """
        network = build_network(self.recipe.network, plan.seed).to(self.device)
        optimiser = Optimiser(network, self.recipe.weight_decay)
        fingerprint = self.fingerprint(plan)
        checkpoint = self.directory / "checkpoints" / f"{plan.id}.safetensors"
        with self._lock(plan.id):
            done = optimiser.load(checkpoint, fingerprint)
            for step, stage, lr in self.recipe.steps_from(done):
                started = time.perf_counter()
                optimiser.set_lr(lr)
                loss = self._train_step(network, optimiser, plan, stage, step)
                if not math.isfinite(loss):
                    raise UserError(
                        f"Loss became {loss} at step {step} of stage {stage.name}; the last good state is in "
                        f"{checkpoint}. Lower the learning rate and resume."
                    )
                seconds = time.perf_counter() - started
                self.on_step(plan.id, StepReport(stage.name, step, self.recipe.steps, loss, lr, seconds), network)
                if (step + 1) % self.save_every == 0 or step + 1 == self.recipe.steps:
                    optimiser.save(checkpoint, step + 1, fingerprint)
        return network

    def _train_step(self, network: UNet, optimiser: Optimiser, plan: MemberPlan, stage: Stage, step: int) -> float:
        """Return the loss; the weights move unless it is not finite."""
        draws = np.random.SeedSequence((plan.seed, step)).generate_state(4).tolist()
        number, window_draw, image_seed, phase = draws
        window = stage.choose_window(window_draw / 2**32)
        subject = self.subjects[number % len(self.subjects)]
        image, target = self.generator.draw(subject, window.shape, window.voxel_size, image_seed)
        half = self.layer_format(stage) == torch.bfloat16
        # Not the data: perturbed members see the images of the baseline, to the bit.
        with plan.arithmetic(step):
            network.zero_grad()
            with torch.autocast(image.device.type, torch.bfloat16, enabled=half):
                loss = training_loss(network, image, target, phase, stage.balanced, stage.body_only)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), self.recipe.clip)
            value = float(loss.detach())
            if math.isfinite(value):
                optimiser.step()
        return value

    def train_ensemble(self, name: str, ids: Iterable[str]) -> Ensemble:
        """Train the members that the manifest lacks; it grows with each.

        Members of another recipe, or trained in another arithmetic, are refused with a `UserError`.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        ensemble = self._ensemble_so_far(name)
        for plan in map(plan_member, unfinished(ensemble, ids)):
            path = self.directory / f"{plan.id}.safetensors"
            sha256 = save_weights(self.train_member(plan), path)
            precision = None if plan.rounding_seed is None else min(self.digits)
            member = Member(
                plan.id, plan.family, plan.seed, precision, path.name, sha256, steps=self.recipe.steps, format=FORMAT
            )
            with self._lock("manifest"):
                ensemble = self._ensemble_so_far(name)
                members = [*(m for m in ensemble.members if m.id != member.id), member]
                members.sort(key=lambda m: (FAMILIES.index(m.family), m.id))
                ensemble = replace(ensemble, members=tuple(members))
                write_manifest(ensemble)
        return ensemble

    def calibrate_ensemble(self, subjects: Sequence[TrainingSubject], names: Sequence[str]) -> Ensemble:
        """Fit the temperature on subjects left out of training, and write it and their names to the manifest.

        Nothing is done where the same members were calibrated before. The subjects are on the trainer's device.
        """
        ensemble = self._read_manifest()
        weights = hashlib.sha256("".join(m.sha256 for m in ensemble.members).encode()).hexdigest()
        if ensemble.training.get("calibration", {}).get("members_sha256") == weights:
            return ensemble
        found = calibrate(ensemble, subjects, self.generator)
        note = found | {"label_maps": list(names), "members_sha256": weights}
        with self._lock("manifest"):
            ensemble = self._read_manifest()
            training = ensemble.training | {"calibration": note}
            ensemble = replace(ensemble, temperature=found["temperature"], training=training)
            write_manifest(ensemble)
        return ensemble

    def _lock(self, name: str) -> AbstractContextManager[bool]:
        return file_lock(self.directory / "checkpoints" / f"{name}.lock")

    def _read_manifest(self) -> Ensemble:
        # A bare name would be that of a shipped ensemble first.
        return load_ensemble(str(self.directory.resolve()))

    def _ensemble_so_far(self, name: str) -> Ensemble:
        """Return the ensemble with what the folder's manifest has, which must be of our kind."""
        training = {
            "recipe": self.recipe.to_json(),
            "steps": self.recipe.steps,
            "arithmetic": {
                "convolution_bits": min(self.digits),
                "other_bits": DIGITS[torch.float32],
                "mca": "every inexact operator of forward pass, backward pass and update, randomly rounded at the bits "
                "of its result",
            },
            "n_label_maps": len(self.subjects),
            "torch": torch.__version__,
            "processor": platform.processor() or platform.machine(),
            "device": self.device,
        }
        path, network, labels = self.directory / MANIFEST, self.recipe.network, _labels(self.scheme)
        new = Ensemble(name, __version__, self.directory, self.recipe.voxel_size, labels, network, (), training)
        if not path.exists():
            return new
        found = self._read_manifest()
        if any(found.training.get(key) != training[key] for key in ("recipe", "arithmetic")):
            raise UserError(
                f"{path}: its members were trained by another recipe, or in other number formats. Train into an empty "
                "folder, or delete this one's manifest and *.safetensors."
            )
        return replace(new, members=found.members, temperature=found.temperature, training=found.training)


def unfinished(ensemble: Ensemble, ids: Iterable[str]) -> tuple[str, ...]:
    """Return those of `ids` that are not in the manifest, or whose weights are gone."""
    trained = {m.id for m in ensemble.members if (ensemble.directory / m.file).is_file()}
    return tuple(member_id for member_id in ids if member_id not in trained)


def delete_ensemble(directory: Path) -> None:
    """Delete what earlier trainings left in the folder: checkpoints, weights and manifest."""
    (directory / MANIFEST).unlink(missing_ok=True)
    for folder in (directory, directory / "checkpoints"):
        for path in folder.glob("*.safetensors"):
            path.unlink()


def train_in_parallel(
    command_of: Callable[[str, str], Sequence[str]], ids: Sequence[str], devices: Sequence[str], logs: Path
) -> None:
    """Run one command for each member, as many at once as there are `devices`, which may be listed repeatedly.

    `command_of` gives, for a member's id and a device, the arguments of ``python -m``; the folder `logs` gets what the
    processes print, in ``<member>.txt``. `UserError` if one or more end with an error; the others are finished first.
    """
    logs.mkdir(parents=True, exist_ok=True)
    remaining = iter(ids)

    def train_on(device: str) -> list[str]:
        """Train one member after another; return those that failed."""
        failed = []
        for member_id in remaining:
            with (logs / f"{member_id}.txt").open("w") as log:
                command = [sys.executable, "-m", *command_of(member_id, device)]
                code = subprocess.run(command, stdout=log, stderr=log).returncode
            outcome = f"failed (exit code {code})" if code else "done"
            print(f"{member_id}: {outcome}", file=sys.stderr, flush=True)
            if code:
                failed.append(member_id)
        return failed

    with ThreadPoolExecutor(len(devices)) as pool:
        failed = sorted(chain.from_iterable(pool.map(train_on, devices)))
    if failed:
        raise UserError(
            f"Training failed for {', '.join(failed)}; see {logs / f'{failed[0]}.txt'}. To resume from the "
            "checkpoints, run the same command again."
        )


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16; a CPU that does not takes 200 times as long."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _labels(scheme: LabelScheme) -> tuple[Label, ...]:
    """Return the classes with their customary colours, or one of their own (golden-angle hues)."""
    with (files("bids_varaug") / "data" / "aseg31.tsv").open() as stream:
        known = pd.read_csv(stream, sep="\t").set_index("index")["color"].to_dict()
    return tuple(
        Label(i, name, known.get(i) or to_hex(colorsys.hsv_to_rgb((i * 0.61803) % 1.0, 0.65, 0.9)))
        for i, name in zip(scheme.target_ids, scheme.target_names, strict=True)
    )


SHAPE = (160, 192, 160)
N_VOXELS = 20_000  # of each image
IMAGES_PER_SUBJECT = 2
FIRST_SEED = 700_000
_LOG_BOUNDS = (math.log(0.25), math.log(8.0))


def calibrate(
    ensemble: Ensemble, subjects: Sequence[TrainingSubject], generator: SyntheticImageGenerator
) -> dict[str, float]:
    """Find the temperature T of the mean posterior p: that of least cross-entropy of p^(1/T).

    The mean is that of the perturbed members (of the baseline where it is alone), at voxels within and around the
    brain, on images of `subjects`, which training left out and the generator's device holds (Guo et al. 2017, On
    calibration of modern neural networks, ICML; on calibrating the mean and not the members: Rahaman & Thiery 2021,
    Uncertainty quantification and deep ensembles, NeurIPS).

    Returns ``temperature``, above 1 where the mean posterior was too sure; ``cross_entropy_before`` and
    ``cross_entropy``, without and with it, nat per voxel.
    """
    perturbed = [m for m in ensemble.members if not m.is_baseline] or list(ensemble.members)
    seeds = range(FIRST_SEED, FIRST_SEED + IMAGES_PER_SUBJECT * len(subjects))
    repeated = [subject for subject in subjects for _ in range(IMAGES_PER_SUBJECT)]
    drawn = [_draw(generator, *each, ensemble.voxel_size) for each in zip(repeated, seeds, strict=True)]

    def logits() -> Iterator[torch.Tensor]:
        for member in perturbed:
            network = load_member(ensemble, member, str(generator.device))
            yield torch.cat([logits_at(network, image, chosen) for image, _, chosen in drawn])

    log_mean = log_mean_posterior(logits())
    truth = torch.cat([target[chosen].long().cpu() for _, target, chosen in drawn])
    found = minimize_scalar(
        lambda log_t: cross_entropy(log_mean, truth, math.exp(log_t)),
        bounds=_LOG_BOUNDS,
        method="bounded",
        options={"xatol": 1e-3},
    )
    temperature = round(math.exp(found.x), 3)
    before, after = (round(cross_entropy(log_mean, truth, t), 5) for t in (1.0, temperature))
    return {"temperature": temperature, "cross_entropy_before": before, "cross_entropy": after}


def log_mean_posterior(logits: Iterable[torch.Tensor]) -> torch.Tensor:
    """Logarithm of the members' mean posterior, (V, K) float64, from the logits of one after another."""
    total, n_members = torch.zeros((), dtype=torch.float64), 0
    for one in logits:
        total = total + one.double().softmax(-1)
        n_members += 1
    return (total / n_members).log()


def cross_entropy(log_mean: torch.Tensor, truth: torch.Tensor, temperature: float) -> float:
    """Mean cross-entropy [nat] of a posterior, of which (V, K) logarithms are given, at a temperature."""
    return float(F.nll_loss(F.log_softmax(log_mean / temperature, dim=-1), truth))


@torch.inference_mode()
def logits_at(network: UNet, image: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Return logits (V, K) float32, on the CPU, at the voxels of an image (X even) where `chosen` (X, Y, Z) is True."""
    features = network.features_by_slabs(image[None, None])
    parts = zip(features.by_slabs(2), chosen.split(2), strict=True)
    return torch.cat([network.classify(part)[0][:, here].T.cpu() for part, here in parts])


def _draw(
    generator: SyntheticImageGenerator, subject: TrainingSubject, seed: int, voxel_size: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return an image, its target, and voxels drawn from in and around the brain, a mask."""
    image, target = generator.draw(subject, SHAPE, voxel_size, seed)
    near = F.max_pool3d((target > 0).float()[None, None], 9, 1, 4)[0, 0].reshape(-1) > 0
    candidates = near.nonzero()[:, 0]
    order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(seed))
    chosen = torch.zeros_like(near)
    chosen[candidates[order[:N_VOXELS].to(candidates.device)]] = True
    return image, target, chosen.view(target.shape)
