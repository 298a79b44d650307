"""How an ensemble is trained: the stages, in plain numbers that the manifest records."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field

from bids_varaug.models.shape import NetworkShape
from bids_varaug.training.synthesis import SynthesisSettings


@dataclass(frozen=True)
class Window:
    """What a step looks at: a box of `shape` voxels of `voxel_size` mm, in `share` of the steps."""

    share: float
    voxel_size: float
    shape: tuple[int, int, int]


@dataclass(frozen=True)
class Stage:
    """A run of steps; the learning rate falls linearly from `lr` to `lr_end`.

    `windows` are drawn by their shares. `bf16` uses bfloat16 autocast where the device has it,
    `balanced` the loss that favours small structures, `body_only` trains the network's body on
    images of its own grid.
    """

    name: str
    steps: int
    windows: tuple[Window, ...]
    lr: float
    lr_end: float
    bf16: bool
    balanced: bool = False
    body_only: bool = False


# Where structures lie is learnt at 4 mm, at a few steps a second; what they look like at 2 mm, the
# grid of the body of a 1 mm network; where exactly they end at 1 mm.
HEADS_AT_4MM = (Window(0.7, 4.0, (48, 48, 48)), Window(0.3, 4.0, (48, 64, 64)))
HEADS_AT_2MM = (Window(0.8, 2.0, (80, 96, 80)), Window(0.2, 2.0, (96, 112, 112)))
# Mostly the brain at 1 mm; sometimes a whole head, which is what the network will be given, and
# sometimes a whole head at 2 mm, which is what --sloppy gives it.
MIXED = (
    Window(0.84, 1.0, (128, 128, 128)),
    Window(0.08, 1.0, (160, 192, 160)),
    Window(0.08, 2.0, (96, 128, 128)),
)
COARSE = Stage("coarse", 1500, HEADS_AT_4MM, 6e-3, 4e-3, True, balanced=True, body_only=True)
MEDIUM = Stage("medium", 500, HEADS_AT_2MM, 4e-3, 3e-3, True, balanced=True, body_only=True)
FINE = Stage("fine", 2000, MIXED, 3e-3, 1.067e-3, bf16=True)
SETTLE = Stage("settle", 350, MIXED, 1.066e-3, 1e-4, bf16=True)
REFINE = Stage("refine", 2500, MIXED, 2e-3, 2e-4, bf16=True)
POLISH = Stage("polish", 2000, MIXED, 2e-3, 1.5e-4, bf16=True)
ADAPT = Stage("adapt", 2400, MIXED, 2e-3, 1.5e-4, bf16=True)
FINISH = Stage("finish", 2000, MIXED, 1.5e-3, 1e-4, bf16=True)
MEMBER = Stage("member", 50, MIXED, 5e-4, 1e-5, bf16=True)


@dataclass(frozen=True)
class Recipe:
    """The trunk's stages, then the stage that every member runs on its own.

    With no trunk stages each member is trained from its own initialisation.
    """

    network: NetworkShape
    trunk: tuple[Stage, ...] = (COARSE, MEDIUM, FINE, SETTLE, REFINE, POLISH, ADAPT, FINISH)
    member: tuple[Stage, ...] = (MEMBER,)
    trunk_seed: int = 1000
    weight_decay: float = 1e-4
    clip: float = 1.0
    warmup: int = 40
    synthesis: SynthesisSettings = field(default_factory=SynthesisSettings)

    def __post_init__(self):
        """Refuse windows that the network cannot take."""
        for stage in (*self.trunk, *self.member):
            multiple = self.network.multiple // (2 if stage.body_only else 1)
            for window in stage.windows:
                if any(side % multiple for side in window.shape):
                    raise ValueError(
                        f"stage {stage.name}: sides of {window.shape} must be multiples of "
                        f"{multiple}"
                    )

    @property
    def trunk_steps(self) -> int:
        """Steps shared by all members before they fork."""
        return sum(stage.steps for stage in self.trunk)

    def to_json(self) -> dict:
        """Return plain types for the manifest."""
        return json.loads(json.dumps(asdict(self)))

    def fingerprint(self, stages: tuple[Stage, ...]) -> str:
        """Name the part of the recipe that decides the bits of `stages`."""
        relevant = self.to_json() | {"trunk": [asdict(s) for s in stages], "member": []}
        return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()[:16]
