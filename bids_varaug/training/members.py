"""Which members to train, and from one description of an ensemble train them all."""

from __future__ import annotations

import colorsys
import hashlib
import platform
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from pathlib import Path

import pandas as pd
import torch

from bids_varaug import __version__
from bids_varaug.errors import UsageError, UserError
from bids_varaug.locks import file_lock
from bids_varaug.models.ensemble import (
    BASELINE,
    MANIFEST,
    Ensemble,
    Label,
    Member,
    load_ensemble,
    write_manifest,
)
from bids_varaug.models.unet import UNet, build_network
from bids_varaug.models.weights import FORMAT, save_weights
from bids_varaug.numerics import MonteCarloArithmetic
from bids_varaug.numerics.rules import DIGITS
from bids_varaug.training.calibrate import calibrate
from bids_varaug.training.heads import Head
from bids_varaug.training.labels import LabelScheme
from bids_varaug.training.recipe import Recipe
from bids_varaug.training.synthesis import Randomiser
from bids_varaug.training.train import StepReport, layer_format, train

_ID = re.compile(r"(ieee|mca\d{2}|seed\d{2})")
MANIFEST_LOCK = "manifest.lock"


@dataclass(frozen=True)
class Plan:
    """One member to train.

    `seed` decides initialisation and data order; `rounding_seed` the random rounding of a Monte
    Carlo member, None for deterministic arithmetic.
    """

    id: str
    family: str
    seed: int
    rounding_seed: int | None

    @property
    def is_perturbed(self) -> bool:
        """Whether it is the baseline's training but for the rounding."""
        return self.rounding_seed is not None

    def arithmetic(self, step: int):
        """Return the context under which step number `step` runs."""
        if not self.is_perturbed:
            return nullcontext()
        # One stream a step, so that a resumed run rounds as an unbroken one.
        return MonteCarloArithmetic(seed=self.rounding_seed * 1_000_003 + step)


def parse_members(text: str) -> tuple[str, ...]:
    """Expand "ieee,mca01..mca04" into ids, in the order given.

    Raises
    ------
    UsageError
        If a part is no member id or range of one family.

    Examples
    --------
    >>> parse_members("ieee,seed01..seed03")
    ('ieee', 'seed01', 'seed02', 'seed03')
    """
    ids: list[str] = []
    for part in text.split(","):
        first, _, last = part.strip().partition("..")
        if not _ID.fullmatch(first) or (last and not _ID.fullmatch(last)):
            raise UsageError(f"--members {part}: use ieee, mcaNN, seedNN or ranges (mca01..mca10).")
        if not last:
            ids.append(first)
            continue
        if first[:-2] != last[:-2] or first == BASELINE or int(first[-2:]) > int(last[-2:]):
            raise UsageError(f"--members {part}: a range runs upwards within one family.")
        ids += [f"{first[:-2]}{n:02d}" for n in range(int(first[-2:]), int(last[-2:]) + 1)]
    return tuple(dict.fromkeys(ids))


def plan_member(member_id: str) -> Plan:
    """Return the seeds of a member: Monte Carlo members share the baseline's seed, 0."""
    if member_id == BASELINE:
        return Plan(member_id, BASELINE, 0, None)
    number = int(member_id[-2:])
    if member_id.startswith("mca"):
        return Plan(member_id, "mca", 0, number)
    return Plan(member_id, "seed", number, None)


@dataclass(frozen=True)
class Workshop:
    """Everything that training members needs besides the member."""

    directory: Path
    recipe: Recipe
    scheme: LabelScheme
    heads: Sequence[Head]
    device: str
    on_step: Callable[[str, StepReport, UNet], None]

    @property
    def randomiser(self) -> Randomiser:
        """What draws the images."""
        return Randomiser(self.scheme, self.recipe.synthesis, self.device)

    @property
    def checkpoints(self) -> Path:
        """Folder of the training states."""
        return self.directory / "checkpoints"

    @property
    def precision(self) -> int:
        """Bits of the coarsest format that members are trained in, which is what rounds most."""
        device = torch.device(self.device)
        return min(DIGITS[layer_format(stage, device)] for stage in self.recipe.stages)

    def train_member(self, plan: Plan) -> UNet:
        """Train one member (or finish, or load it from its checkpoint)."""
        network = build_network(self.recipe.network, plan.seed).to(self.device)
        with file_lock(self.checkpoints / f"{plan.id}.lock"):
            return train(
                network, self.heads, self.randomiser, self.recipe, plan.seed,
                self.checkpoints / f"{plan.id}.safetensors", plan.arithmetic,
                lambda report: self.on_step(plan.id, report, network),
            )  # fmt: skip

    def write_member(self, plan: Plan, network: UNet) -> Member:
        """Write a trained member's weights."""
        name = f"{plan.id}.safetensors"
        checksum = save_weights(network, self.directory / name)
        return Member(
            plan.id, plan.family, plan.seed, self.precision if plan.is_perturbed else None,
            name, checksum, steps=self.recipe.steps, format=FORMAT,
        )  # fmt: skip


def train_ensemble(workshop: Workshop, name: str, ids: Iterable[str]) -> Ensemble:
    """Train each member from its first step; the manifest grows with every finished one.

    Several processes may train members of one ensemble side by side: each adds its own members to
    what it finds in the manifest.

    Raises
    ------
    UserError
        If the folder holds members of another recipe, or trained in another arithmetic.
    """
    workshop.directory.mkdir(parents=True, exist_ok=True)
    ensemble = _with_those_there(_empty_ensemble(workshop, name))
    for member_id in unfinished(ensemble, ids):
        plan = plan_member(member_id)
        member = workshop.write_member(plan, workshop.train_member(plan))
        with file_lock(workshop.checkpoints / MANIFEST_LOCK):
            ensemble = _with_those_there(ensemble)
            others = tuple(m for m in ensemble.members if m.id != member_id)
            ensemble = replace(ensemble, members=tuple(sorted((*others, member), key=_order)))
            write_manifest(ensemble)
    return ensemble


def unfinished(ensemble: Ensemble, ids: Iterable[str]) -> tuple[str, ...]:
    """Return those of `ids` that are not in the manifest, or whose weights are gone."""
    there = {m.id for m in ensemble.members if (ensemble.directory / m.file).is_file()}
    return tuple(member_id for member_id in ids if member_id not in there)


def forget(directory: Path) -> None:
    """Delete what earlier trainings left in the folder: checkpoints, weights and manifest."""
    (directory / MANIFEST).unlink(missing_ok=True)
    for folder in (directory, directory / "checkpoints"):
        for path in folder.glob("*.safetensors"):
            path.unlink()


def calibrate_ensemble(workshop: Workshop, heads: Sequence[Head], names: Sequence[str]) -> Ensemble:
    """Fit the temperature on heads left out of training, and write it to the manifest.

    Nothing is done where the same members were calibrated before.

    Parameters
    ----------
    heads : on the workshop's device
    names : of their label maps, for the manifest
    """
    ensemble = _load_there(workshop.directory)
    weights = hashlib.sha256("".join(m.sha256 for m in ensemble.members).encode()).hexdigest()
    if ensemble.training.get("calibration", {}).get("members_sha256") == weights:
        return ensemble
    found = calibrate(ensemble, heads, workshop.randomiser)
    note = asdict(found) | {"label_maps": list(names), "members_sha256": weights}
    with file_lock(workshop.checkpoints / MANIFEST_LOCK):
        ensemble = _load_there(workshop.directory)
        training = ensemble.training | {"calibration": note}
        ensemble = replace(ensemble, temperature=found.temperature, training=training)
        write_manifest(ensemble)
    return ensemble


def _with_those_there(ensemble: Ensemble) -> Ensemble:
    """Add the members (and calibration) of the folder's manifest, which must be of our kind."""
    path = ensemble.directory / MANIFEST
    if not path.exists():
        return ensemble
    there = _load_there(ensemble.directory)
    if any(there.training.get(key) != ensemble.training[key] for key in ("recipe", "arithmetic")):
        raise UserError(
            f"{path}: its members were trained by another recipe, or in other number formats. "
            "Train into an empty folder, or delete this one's manifest and *.safetensors."
        )
    return replace(ensemble, members=there.members, temperature=there.temperature,
                   training=there.training)  # fmt: skip


def _load_there(directory: Path) -> Ensemble:
    # A bare name would be that of a shipped ensemble first.
    return load_ensemble(str(directory.resolve()))


def _order(member: Member):
    return (["ieee", "mca", "seed"].index(member.family), member.id)


def _empty_ensemble(workshop: Workshop, name: str) -> Ensemble:
    recipe, scheme = workshop.recipe, workshop.scheme
    return Ensemble(
        name=name,
        version=__version__,
        directory=workshop.directory,
        voxel_size=recipe.voxel_size,
        labels=_labels(scheme),
        network=recipe.network,
        members=(),
        training={
            "recipe": recipe.to_json(),
            "steps": recipe.steps,
            "arithmetic": {
                "convolution_bits": workshop.precision,
                "other_bits": DIGITS[torch.float32],
                "mca": "every inexact operator of forward pass, backward pass and update, randomly "
                "rounded at the bits of its result",
            },
            "n_label_maps": len(workshop.heads),
            "torch": torch.__version__,
            "processor": platform.processor() or platform.machine(),
            "device": workshop.device,
        },
    )


def _labels(scheme: LabelScheme) -> tuple[Label, ...]:
    with (files("bids_varaug") / "data" / "aseg31.tsv").open() as stream:
        known = pd.read_csv(stream, sep="\t").set_index("index")["color"].to_dict()
    pairs = zip(scheme.target_ids, scheme.target_names, strict=True)
    return tuple(Label(index, label, known.get(index) or _color(index)) for index, label in pairs)


def _color(index: int) -> str:
    """A colour of its own for a structure without a customary one (golden-angle hues)."""
    rgb = colorsys.hsv_to_rgb((index * 0.61803) % 1.0, 0.65, 0.9)
    return "#" + "".join(f"{round(255 * channel):02x}" for channel in rgb)
