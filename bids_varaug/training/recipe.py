"""How an ensemble is trained: which members, and the stages of each, in plain numbers that the manifest records."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field

from bids_varaug.errors import UsageError
from bids_varaug.models.ensemble import BASELINE, NetworkShape
from bids_varaug.numerics import MonteCarloArithmetic
from bids_varaug.training.synthesis import SynthesisSettings


@dataclass(frozen=True)
class Window:
    """What a step sees: a box of `shape` voxels of `voxel_size` mm, in `share` of the steps."""

    share: float
    voxel_size: float
    shape: tuple[int, int, int]


@dataclass(frozen=True)
class Stage:
    """A run of steps; the learning rate falls linearly from `lr` to `lr_end`.

    `windows` are drawn by their shares. `bf16` uses bfloat16 autocast where the device has it, `balanced` the loss that
    favours small structures, `body_only` trains the network's body on images of its own grid.
    """

    name: str
    steps: int
    windows: tuple[Window, ...]
    lr: float
    lr_end: float
    bf16: bool
    balanced: bool = False
    body_only: bool = False

    def choose_window(self, draw: float) -> Window:
        """Return the window whose interval of cumulated shares holds `draw` (in [0, 1))."""
        for window in self.windows:
            draw -= window.share
            if draw < 0:
                return window
        return self.windows[-1]


# Where structures lie is learnt at 4 mm, at a few steps a second; what they look like at 2 mm, the grid of the body of
# a 1 mm network; where exactly they end at 1 mm, first in parts of the brain, last in all of it.
CUBES_AT_4MM = (Window(1.0, 4.0, (48, 48, 48)),)
CUBES_AT_2MM = (Window(1.0, 2.0, (64, 64, 64)),)
# A step of 96^3 costs 0.4 of one of 128^3. A whole head at 2 mm is what --sloppy gives the network.
SMALL = (Window(0.90, 1.0, (96, 96, 96)), Window(0.05, 1.0, (128, 128, 128)), Window(0.05, 2.0, (96, 128, 128)))
# Mostly the brain; sometimes a whole head, which is what the network will be given.
LARGE = (Window(0.84, 1.0, (128, 128, 128)), Window(0.08, 1.0, (160, 192, 160)), Window(0.08, 2.0, (96, 128, 128)))
STAGES = (
    Stage("coarse", 1500, CUBES_AT_4MM, 6e-3, 4e-3, True, balanced=True, body_only=True),
    Stage("medium", 500, CUBES_AT_2MM, 4e-3, 3e-3, True, balanced=True, body_only=True),
    Stage("fine", 5000, SMALL, 3e-3, 2e-3, True),
    Stage("decay", 1000, LARGE, 2e-3, 1e-5, True),
)


@dataclass(frozen=True)
class Recipe:
    """The stages that every member runs, each from its own initialisation."""

    network: NetworkShape
    stages: tuple[Stage, ...] = STAGES
    weight_decay: float = 1e-4
    clip: float = 1.0
    warmup: int = 40
    synthesis: SynthesisSettings = field(default_factory=SynthesisSettings)

    def __post_init__(self) -> None:
        """Refuse windows that the network cannot take."""
        for stage in self.stages:
            multiple = self.network.multiple // (2 if stage.body_only else 1)
            for window in stage.windows:
                if any(side % multiple for side in window.shape):
                    raise ValueError(f"stage {stage.name}: sides of {window.shape} must be multiples of {multiple}")

    @property
    def steps(self) -> int:
        """Steps of a member, from its first to its last."""
        return sum(stage.steps for stage in self.stages)

    @property
    def voxel_size(self) -> float:
        """Voxel size that members are trained for, mm."""
        return self.stages[-1].windows[0].voxel_size

    def steps_from(self, done: int) -> Iterator[tuple[int, Stage, float]]:
        """Yield number, stage and learning rate of each step after the first `done`."""
        first = 0
        for stage in self.stages:
            for step in range(max(first, done), first + stage.steps):
                yield step, stage, self.learning_rate(stage, step - first, step)
            first += stage.steps

    def learning_rate(self, stage: Stage, step_in_stage: int, step: int) -> float:
        """Linear from `stage.lr` to `stage.lr_end`, after a linear rise over the first steps.

        The rise takes `warmup` steps, but at most a quarter of the stage.
        """
        share = step_in_stage / max(1, stage.steps - 1)
        rate = stage.lr + share * (stage.lr_end - stage.lr)
        warmup = max(1, min(self.warmup, stage.steps // 4))
        return rate * min(1.0, (step + 1) / warmup)

    def to_json(self) -> dict:
        """Return plain types for the manifest."""
        return json.loads(json.dumps(asdict(self)))

    @property
    def fingerprint(self) -> str:
        """Name the recipe, which decides the bits of a member."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:16]


FAMILIES = (BASELINE, "mca", "seed")
_MEMBERS = re.compile(r"ieee|(?P<family>mca|seed)(?P<first>\d\d)(\.\.(?P=family)(?P<last>\d\d))?")


@dataclass(frozen=True)
class MemberPlan:
    """One member to train.

    `seed` decides initialisation and data order; `rounding_seed` the random rounding of a Monte Carlo member, None for
    deterministic arithmetic.
    """

    id: str
    family: str
    seed: int
    rounding_seed: int | None

    def arithmetic(self, step: int) -> AbstractContextManager:
        """Return the context under which step number `step` runs."""
        if self.rounding_seed is None:
            return nullcontext()
        # One stream a step, so that a resumed run rounds as an unbroken one.
        return MonteCarloArithmetic(seed=self.rounding_seed * 1_000_003 + step)


def plan_member(member_id: str) -> MemberPlan:
    """Return the seeds of a member: Monte Carlo members share the baseline's seed, 0."""
    if member_id == BASELINE:
        return MemberPlan(member_id, BASELINE, 0, None)
    family, number = member_id[:-2], int(member_id[-2:])
    return MemberPlan(member_id, family, *((0, number) if family == "mca" else (number, None)))


def parse_members(text: str) -> tuple[str, ...]:
    """Expand "ieee,mca01..mca04" into ids, in the order given; `UsageError` for what is no id or range of a family.

    >>> parse_members("ieee,seed01..seed03")
    ('ieee', 'seed01', 'seed02', 'seed03')
    """
    ids: list[str] = []
    for part in text.split(","):
        found = _MEMBERS.fullmatch(part.strip())
        if found is None or (found["last"] and found["last"] < found["first"]):
            raise UsageError(
                f"--members {part}: use ieee, mcaNN, seedNN, or a range that runs upwards within one family "
                "(mca01..mca10)."
            )
        if found["first"]:
            numbers = range(int(found["first"]), int(found["last"] or found["first"]) + 1)
            ids += [f"{found['family']}{number:02d}" for number in numbers]
        else:
            ids.append(BASELINE)
    return tuple(dict.fromkeys(ids))
