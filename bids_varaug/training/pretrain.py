"""Pre-train encoders on images drawn from label maps, resumable to the bit after any step.

Objectives: ``volumes`` predicts the volumes of all structures, which are known exactly from the label map that an image
was drawn from; ``contrast`` tells two images of one anatomy, drawn with other contrasts, from those of other anatomies
(Chen et al. 2020, A simple framework for contrastive learning of visual representations, ICML). Neither knows of age:
what a network learns of people's brains is how they look and how large their parts are.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import RidgeCV
from sklearn.metrics import r2_score

from bids_varaug.errors import UserError
from bids_varaug.files import file_lock
from bids_varaug.models.encoders import (
    SHAPE,
    VOXEL_SIZE,
    Encoder,
    EncoderEnsemble,
    build_encoder,
    copy_segmenter,
    load_encoder,
    load_encoders,
    save_alignment,
    save_encoder,
    start_from,
    write_encoders,
)
from bids_varaug.models.ensemble import MANIFEST, Ensemble, Member, select_members, sha256_of
from bids_varaug.models.unet import FORMAT
from bids_varaug.numerics import GENERATOR
from bids_varaug.numerics.specification import DIGITS
from bids_varaug.training.labels import LabelScheme, TrainingSubject
from bids_varaug.training.optimiser import Optimiser
from bids_varaug.training.recipe import FAMILIES, MemberPlan, plan_member
from bids_varaug.training.synthesis import SynthesisSettings, SyntheticImageGenerator
from bids_varaug.training.train import StepReport, has_bfloat16

VOLUMES, CONTRAST, SEGMENTATION = ("volumes", "contrast", "segmentation-encoder")
N_CONTRAST = 64  # outputs of the head that contrasts are told by
TEMPERATURE = 0.1
N_SCALE, N_TESTS = 100, 100  # label maps that volumes are standardised by; images that members are compared on
_SCALE_SEED, _TEST_SEED = 800_000, 900_000
# Brains as `brainage.images` gives them to the network: extracted, in the middle.
SYNTHESIS = SynthesisSettings(whole_head_share=0.0, thin_share=0.0)
ALPHAS = np.logspace(-3, 4, 15)


class BrainGenerator(SyntheticImageGenerator):
    """Draws whole brains near the middle of the window."""

    off_centre_share, displacement = 0.0, 8.0


@dataclass(frozen=True)
class PretrainRecipe:
    """What decides a member, but for its seed."""

    architecture: str
    objective: str
    steps: int = 1500
    batch: int = 4
    lr: float = 3e-3
    weight_decay: float = 1e-4
    warmup: int = 100
    clip: float = 1.0
    init: str = "random"  # or the SHA-256 of the file of initial weights
    synthesis: SynthesisSettings = field(default_factory=lambda: SYNTHESIS)

    def learning_rate(self, step: int) -> float:
        """Rise linearly, then fall to 0 along a cosine."""
        rise = min(1.0, (step + 1) / max(1, min(self.warmup, self.steps // 4)))
        return self.lr * rise * 0.5 * (1 + math.cos(math.pi * step / self.steps))

    def to_json(self) -> dict:
        """Return plain types for the manifest."""
        return json.loads(json.dumps(asdict(self)))


@dataclass(frozen=True)
class VolumeScale:
    """Mean and SD of the logarithms of volumes [log mm3], (K - 1,) float32 each."""

    mean: torch.Tensor
    sd: torch.Tensor

    def of(self, targets: torch.Tensor) -> torch.Tensor:
        """Standardised logarithms of the volumes of a label map (X, Y, Z) uint8, (K - 1,) float32."""
        return (log_volumes(targets, len(self.mean) + 1) - self.mean) / self.sd


def log_volumes(targets: torch.Tensor, n_classes: int) -> torch.Tensor:
    """Logarithms of the volumes [mm3] of all classes but the background, plus one voxel, (K - 1,) float32."""
    counts = torch.bincount(targets.flatten().long(), minlength=n_classes)[1:]
    return torch.log((counts + 1) * VOXEL_SIZE**3).float()


@dataclass(frozen=True)
class Pretrainer:
    """Trains the members of one ensemble of encoders, each from its first step, and keeps its manifest."""

    directory: Path  # gets manifest, weights and ``checkpoints/``
    recipe: PretrainRecipe
    scheme: LabelScheme
    subjects: Sequence[TrainingSubject]  # on `device`
    device: str
    init: Path | None = None  # initial weights of other software, of the recipe's SHA-256
    segmenters: Ensemble | None = None  # whose encoders are taken, for the objective of this name
    on_step: Callable[[str, StepReport], None] = lambda member, report: None
    save_every: int = 50  # steps between two checkpoints

    @property
    def generator(self) -> BrainGenerator:
        """What draws the images."""
        return BrainGenerator(self.scheme, self.recipe.synthesis, self.device)

    @property
    def outputs(self) -> tuple[str, ...]:
        """What the head predicts."""
        if self.recipe.objective == SEGMENTATION:
            return ()
        if self.recipe.objective == VOLUMES:
            return self.scheme.target_names[1:]
        return tuple(f"contrast{n:02d}" for n in range(N_CONTRAST))

    def build(self, plan: MemberPlan) -> Encoder:
        """Return a member before its first step."""
        encoder = build_encoder(self.recipe.architecture, len(self.outputs), plan.seed)
        if self.init is not None:
            start_from(encoder, self.init)
        return encoder.to(self.device, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]

    def train_member(self, plan: MemberPlan) -> Encoder:
        """Run all steps, from the checkpoint if there is one; raises as `training.train.Trainer.train_member`."""
        encoder, generator = self.build(plan).train(), self.generator
        scale = volume_scale(generator, self.subjects, self.scheme)
        optimiser = Optimiser(encoder, self.recipe.weight_decay)
        half = has_bfloat16(generator.device)
        key = json.dumps([self.recipe.to_json(), plan.seed, half, plan.rounding_seed and GENERATOR], sort_keys=True)
        fingerprint = hashlib.sha256(key.encode()).hexdigest()[:16]
        checkpoint = self.directory / "checkpoints" / f"{plan.id}.safetensors"
        with self._lock(plan.id):
            for step in range(optimiser.load(checkpoint, fingerprint), self.recipe.steps):
                started, lr = time.perf_counter(), self.recipe.learning_rate(step)
                images, truth = self._draw(generator, plan, step, scale)
                optimiser.set_lr(lr)
                with plan.arithmetic(step):
                    encoder.zero_grad()
                    with torch.autocast(generator.device.type, torch.bfloat16, enabled=half):
                        found = encoder(images)
                    loss = F.smooth_l1_loss(found.float(), truth) if truth is not None else contrast_loss(found.float())
                    loss.backward()
                    torch.nn.utils.clip_grad_norm_(encoder.parameters(), self.recipe.clip)
                    value = float(loss.detach())
                    if not math.isfinite(value):
                        raise UserError(
                            f"Loss became {value} at step {step}; the last good state is in {checkpoint}. Lower "
                            "--learning-rate and train into an empty folder."
                        )
                    optimiser.step()
                seconds = time.perf_counter() - started
                report = StepReport(self.recipe.objective, step, self.recipe.steps, value, lr, seconds)
                self.on_step(plan.id, report)
                if (step + 1) % self.save_every == 0 or step + 1 == self.recipe.steps:
                    optimiser.save(checkpoint, step + 1, fingerprint)
        return encoder.eval()

    def _draw(
        self, generator: BrainGenerator, plan: MemberPlan, step: int, scale: VolumeScale
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Images (B, 1, X, Y, Z) of a step, a function of the member's seed and the step alone, and what is true.

        Of the objective ``contrast``, images 2 n and 2 n + 1 show the same anatomy.
        """
        n_images = 1 if self.recipe.objective == VOLUMES else 2
        draws = np.random.SeedSequence((plan.seed, step)).generate_state(2 * self.recipe.batch).tolist()
        images, truth = [], []
        for number, seed in zip(draws[::2], draws[1::2], strict=True):
            subject = self.subjects[number % len(self.subjects)]
            drawn, targets = generator.draw_contrasts(subject, SHAPE, VOXEL_SIZE, seed, n_images)
            images.append(drawn)
            truth.append(scale.of(targets))
        batch = torch.cat(images)[:, None].contiguous(memory_format=torch.channels_last_3d)
        return batch, torch.stack(truth) if self.recipe.objective == VOLUMES else None

    def train_encoders(self, name: str, ids: Iterable[str]) -> EncoderEnsemble:
        """Train the members that the manifest lacks; it grows with each. `UserError` if it is of another recipe."""
        self.directory.mkdir(parents=True, exist_ok=True)
        ensemble = self._so_far(name)
        for plan in map(plan_member, ids):
            if any(m.id == plan.id and (self.directory / m.file).is_file() for m in ensemble.members):
                continue
            path = self.directory / f"{plan.id}.safetensors"
            if self.segmenters is None:
                encoder = self.train_member(plan)
            else:
                encoder = copy_segmenter(self.segmenters, *select_members(self.segmenters, [plan.id]))
            sha256 = save_encoder(encoder, path)
            layers = torch.bfloat16 if has_bfloat16(self.generator.device) else torch.float32
            precision = None if plan.rounding_seed is None else DIGITS[layers]  # of what is rounded most
            member = Member(plan.id, plan.family, plan.seed, precision, path.name, sha256, self.recipe.steps, FORMAT)
            ensemble = self._add(name, [member])
        return ensemble

    def compare_members(self, ensemble: EncoderEnsemble, subjects: Sequence[TrainingSubject]) -> EncoderEnsemble:
        """Bring every member's features to those of the baseline, and measure, on images drawn from `subjects`.

        The map is linear, fitted by ridge regression. The manifest gets, of each member, the coefficients of
        determination of the volumes (objective ``volumes``), and of the baseline's features as the map predicts them on
        images it was not fitted to. Nothing is done where the same members were compared before.
        """
        if ensemble.training.get("comparison", {}).get("weights") == _digest(ensemble.members):
            return ensemble
        generator = self.generator
        scale = volume_scale(generator, self.subjects, self.scheme)
        images, truth = [], []
        for n in range(N_TESTS):
            subject = subjects[n % len(subjects)]
            drawn, targets = generator.draw_contrasts(subject, SHAPE, VOXEL_SIZE, _TEST_SEED + n, 1)
            images.append(drawn)
            truth.append(scale.of(targets))
        maps: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        scores: dict[str, dict[str, float]] = {}
        y: np.ndarray | None = None  # features of the baseline
        for member in sorted(ensemble.members, key=lambda m: not m.is_baseline):
            encoder = load_encoder(replace(ensemble, training={}), member, self.device)  # without an earlier alignment
            with torch.inference_mode():
                features = torch.cat([encoder.body(image[None]) for image in images])
                predicted = encoder.head(features).cpu().numpy()
            x = features.cpu().numpy()
            scores[member.id] = {}
            if self.recipe.objective == VOLUMES:
                known = torch.stack(truth).cpu().numpy()
                scores[member.id]["volumes_r2"] = float(r2_score(known, predicted, multioutput="variance_weighted"))
            if member.is_baseline:
                y = x
            elif y is not None:
                half = N_TESTS // 2
                apart = RidgeCV(ALPHAS).fit(x[:half], y[:half]).predict(x[half:])
                scores[member.id]["features_r2"] = float(r2_score(y[half:], apart, multioutput="variance_weighted"))
                ridge = RidgeCV(ALPHAS).fit(x, y)
                maps[member.id] = torch.from_numpy(ridge.coef_), torch.from_numpy(ridge.intercept_)
        comparison = {"weights": _digest(ensemble.members), "n_images": N_TESTS, "members": scores}
        if maps:
            comparison["alignment_sha256"] = save_alignment(maps, self.directory)
        return self._add(ensemble.name, [], {"comparison": comparison})

    def _lock(self, name: str) -> AbstractContextManager[bool]:
        return file_lock(self.directory / "checkpoints" / f"{name}.lock")

    def _add(self, name: str, members: Sequence[Member], news: dict | None = None) -> EncoderEnsemble:
        """Write the manifest with these members in place of those of the same id."""
        with self._lock("manifest"):
            ensemble = self._so_far(name)
            ids = {member.id for member in members}
            together = [*(m for m in ensemble.members if m.id not in ids), *members]
            together.sort(key=lambda m: (FAMILIES.index(m.family), m.id))
            training = {**ensemble.training, **(news or {})}
            ensemble = replace(ensemble, members=tuple(together), training=training)
            write_encoders(ensemble)
        return ensemble

    def _so_far(self, name: str) -> EncoderEnsemble:
        training = {"recipe": self.recipe.to_json(), "n_label_maps": len(self.subjects), "torch": torch.__version__}
        path = self.directory / MANIFEST
        new = EncoderEnsemble(
            name, self.directory, self.recipe.architecture, self.recipe.objective, self.outputs, (), training
        )
        if not path.exists():
            return new
        found = load_encoders(self.directory)
        if found.training.get("recipe") != training["recipe"]:
            raise UserError(f"{path}: its members were trained by another recipe. Train into an empty folder.")
        return found


def volume_scale(generator: BrainGenerator, subjects: Sequence[TrainingSubject], scheme: LabelScheme) -> VolumeScale:
    """Mean and SD of the volumes in label maps as training draws them."""
    n_classes = len(scheme.target_ids)
    drawn = torch.stack([
        log_volumes(generator.draw_targets(subjects[n % len(subjects)], SHAPE, VOXEL_SIZE, _SCALE_SEED + n), n_classes)
        for n in range(N_SCALE)
    ])  # fmt: skip
    return VolumeScale(drawn.mean(dim=0), drawn.std(dim=0).clamp_min(0.02))


def contrast_loss(z: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of finding, among all others, the image of the same anatomy: NT-Xent, () float32.

    z (2 N, D): rows 2 n and 2 n + 1 belong together.
    """
    z = F.normalize(z, dim=1)
    alike = z @ z.T / TEMPERATURE
    alike = alike.masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), -math.inf)
    return F.cross_entropy(alike, torch.arange(len(z), device=z.device) ^ 1)


def _digest(members: Iterable[Member]) -> str:
    return hashlib.sha256("".join(sorted(member.sha256 for member in members)).encode()).hexdigest()


def hash_of(path: Path | None) -> str:
    """What a recipe calls a file of initial weights."""
    return "random" if path is None else sha256_of(path)
