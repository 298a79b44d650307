"""An ensemble on disk: a manifest and one file of weights per member. Without torch.

What is absent or damaged is refused with an `EnsembleError` that names the file.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, astuple, dataclass, replace
from importlib.resources import files
from pathlib import Path

from bids_varaug.errors import EnsembleError, UsageError
from bids_varaug.files import write_text

BASELINE = "ieee"
ROUNDED = "rr"
"""Family of the members that are the baseline under random rounding, which no file holds."""
MANIFEST = "manifest.json"
FORMAT = 2
_GET_ANOTHER = (
    "Leave out --ensemble to use the one that comes with this version, train one with bids_varaug-train, or use the "
    "version of bids_varaug that made this one."
)


@dataclass(frozen=True)
class NetworkShape:
    """What has to be known to build the network again (kept in the manifest)."""

    n_classes: int
    channels: tuple[int, ...] = (32, 64, 96, 96, 96)
    rim_channels: int = 16

    @property
    def multiple(self) -> int:
        """Input sides must be multiples of this many voxels."""
        return 2 ** len(self.channels)


PLANES = ("coronal", "sagittal", "axial")
"""In the order in which FastSurfer adds their logits."""
VINN = "fastsurfer-vinn"


@dataclass(frozen=True)
class VinnShape:
    """What has to be known to build FastSurferVINN's networks again; its checkpoints have the default sizes."""

    filters: int = 71
    rim_filters: int = 32  # of the first block, which works on the image's own grid
    grid: int = 256  # pixels of 1 mm along each side of the grid of the other blocks
    n_slices: int = 7  # that are seen at once
    architecture: str = VINN


@dataclass(frozen=True)
class Label:
    """One class of the network: the id written to label maps, its name, its display colour."""

    index: int
    name: str
    color: str


@dataclass(frozen=True)
class Member:
    """One network, and how it is run.

    Families say what was perturbed in training: "ieee" (nothing: the baseline), "mca" or "seed"; or "rr", the
    baseline's weights run under random rounding (see `round_inference`).
    """

    id: str
    family: str
    seed: int  # of the training, or of the rounding
    # Virtual precision of the rounding, bits (8 where a Monte Carlo member was trained with bfloat16 layers, whose
    # other operators have 24); None for members without.
    precision: int | None
    file: str
    sha256: str  # of that file
    steps: int | None = None  # of the training
    format: str | None = None  # of the weights

    @property
    def is_baseline(self) -> bool:
        """Whether this is the unperturbed network, which stays out of consensus and spread."""
        return self.family == BASELINE

    @property
    def is_rounded(self) -> bool:
        """Whether inference, not training, is what is perturbed."""
        return self.family == ROUNDED


@dataclass(frozen=True)
class DiceModel:
    """Expected Dice of a structure from what a segmentation says of itself, see `variability.expected_dice`.

    All act on the logit of the Dice.
    """

    intercept: float
    soft_dice: float  # of the logit of the soft Dice
    pair_dice: float  # of the logit of the members' mean pairwise Dice; 0 where there is one member
    log_voxels: float  # of the logarithm of the number of voxels
    low: float  # lower end of the interval, from the expected value
    high: float

    def __post_init__(self) -> None:
        if not (all(map(math.isfinite, astuple(self))) and self.low <= self.high):
            raise ValueError(f"expected Dice {self}")


@dataclass(frozen=True)
class Quality:
    """How the expected Dice was calibrated, on heads that were in no training."""

    several: DiceModel  # of the consensus of two members or more
    alone: DiceModel  # of one member
    coverage: float  # of the intervals
    heads: tuple[str, ...]


@dataclass(frozen=True)
class Ensemble:
    """Members of one architecture, what they segment, and how they were trained.

    The temperature T makes the mean posterior as sure as it is right: p becomes p^(1/T), scaled to sum to 1, on the
    T1w's own grid. Labels, volumes and votes do not depend on it.
    """

    name: str
    version: str
    directory: Path
    voxel_size: float  # mm; of FastSurfer, the largest
    labels: tuple[Label, ...]  # of class k
    network: NetworkShape | VinnShape
    members: tuple[Member, ...]
    training: dict
    temperature: float = 1.0
    quality: Quality | None = None  # None where nobody calibrated it

    @property
    def baseline(self) -> Member | None:
        """The unperturbed member, if there is one."""
        return next((member for member in self.members if member.is_baseline), None)

    @property
    def multiple(self) -> int:
        """Sides of the head box are multiples of this many voxels."""
        return self.network.multiple if isinstance(self.network, NetworkShape) else 1

    @property
    def is_fastsurfer(self) -> bool:
        """Whether the networks are FastSurferVINN's, which have rules of their own from conform to labels."""
        return isinstance(self.network, VinnShape)


def find_ensemble(name: str) -> Path:
    """Return the folder of a shipped ensemble's name, or of a path."""
    shipped = Path(str(files("bids_varaug"))) / "data" / "ensembles"
    for folder in (shipped / name if "/" not in name else None, Path(name)):
        if folder is not None and (folder / MANIFEST).is_file():
            return folder.absolute()  # workers run elsewhere
    known = ", ".join(sorted(p.parent.name for p in shipped.glob(f"*/{MANIFEST}"))) or "none"
    raise EnsembleError(
        f"--ensemble {name}: neither a shipped ensemble ({known}) nor a folder with a {MANIFEST}. Train one with "
        "bids_varaug-train, or give the path of its folder."
    )


def load_ensemble(name: str) -> Ensemble:
    """Read an ensemble's manifest, by shipped name or folder."""
    folder = find_ensemble(name)
    path = folder / MANIFEST
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if (found := values.pop("format")) != FORMAT:
            raise EnsembleError(f"{path}: made by another version (format {found}, not {FORMAT}). {_GET_ANOTHER}")
        members, quality = values["members"], values.get("quality")
        if any([values.pop("trunk", None), *(member.pop("base", None) for member in members)]):
            raise EnsembleError(f"{path}: made by an earlier version, whose members share a trunk. {_GET_ANOTHER}")
        values |= {
            "directory": folder,
            "voxel_size": float(values["voxel_size"]),
            "labels": tuple(Label(**label) for label in values["labels"]),
            "network": _network_shape(values["network"]),
            "members": tuple(Member(**member) for member in members),
            "quality": None if quality is None else _read_quality(**quality),
        }
        ensemble = Ensemble(**values)
        if not 0 < ensemble.temperature < math.inf:
            raise ValueError(f"temperature {ensemble.temperature}")
    except (KeyError, TypeError, ValueError) as error:
        raise EnsembleError(f"{path}: damaged manifest ({error}). Install it again.") from error
    _check_members(path, ensemble.members)
    return ensemble


def _read_quality(several: dict, alone: dict, coverage: float, heads: Iterable[str]) -> Quality:
    if not 0 < coverage < 1:
        raise ValueError(f"coverage {coverage}")
    return Quality(DiceModel(**several), DiceModel(**alone), float(coverage), tuple(heads))


def _network_shape(values: dict) -> NetworkShape | VinnShape:
    if (architecture := values.get("architecture")) == VINN:
        return VinnShape(**values)
    if architecture is not None:
        raise ValueError(f"architecture {architecture}")
    return NetworkShape(**values | {"channels": tuple(values["channels"])})


def _check_members(path: Path, members: Iterable[Member]) -> None:
    if any(member.is_rounded for member in members):
        raise EnsembleError(
            f"{path}: a member is of family {ROUNDED}, which names the baseline run under random rounding "
            "(--perturb-inference). Give that family another name."
        )
    for key, what in (("steps", "numbers of training steps"), ("format", "formats of weights")):
        found = {getattr(member, key): member.id for member in members}
        if len(found) > 1:
            each = ", ".join(f"{member} {value}" for value, member in found.items())
            raise EnsembleError(
                f"{path}: members have unequal {what} ({each}), which would count as spread. Train all members by one "
                "recipe with bids_varaug-train."
            )


def write_manifest(ensemble: Ensemble) -> None:
    """Write `ensemble.directory`/manifest.json, aside first and renamed."""
    values = {"format": FORMAT} | asdict(ensemble)
    del values["directory"]
    write_text(json.dumps(values, indent=1) + "\n", ensemble.directory / MANIFEST)


def select_members(ensemble: Ensemble, wanted: Iterable[str], n_members: int | None = None) -> tuple[Member, ...]:
    """Return the members `wanted` ("all", families or ids), the baseline first, else in the manifest's order.

    `n_members` keeps the first n of each family.
    """
    wanted = set(wanted)
    unknown = sorted(wanted - {"all"} - {name for m in ensemble.members for name in (m.id, m.family)})
    if unknown:
        rounded = any(name.startswith(ROUNDED) for name in unknown)
        hint = f" Members of family {ROUNDED} come from --perturb-inference." if rounded else ""
        raise EnsembleError(
            f"--members {' '.join(unknown)}: not in ensemble {ensemble.name}. "
            f"It has {', '.join(m.id for m in ensemble.members)}.{hint}"
        )
    chosen = [m for m in ensemble.members if wanted & {"all", m.id, m.family}]
    chosen.sort(key=lambda member: not member.is_baseline)
    first = {m.family: [other for other in chosen if other.family == m.family][:n_members] for m in chosen}
    return tuple(member for member in chosen if member in first[member.family])


def round_inference(ensemble: Ensemble, n_members: int, random_seed: int) -> tuple[Member, ...]:
    """Return 0 to 99 members that are the baseline run under random rounding, "rr01", "rr02", ...

    So Gonzalez Pepe et al. (2023), arXiv:2308.01939. Each `random_seed` gives every member another seed, which depends
    on its number alone: more members leave the first ones what they are. `UsageError` if there is no baseline.
    """
    if not n_members:
        return ()
    if ensemble.baseline is None:
        raise UsageError(
            f"--perturb-inference {n_members}: ensemble {ensemble.name} has no baseline ({BASELINE}) to run under "
            f"random rounding; it has {', '.join(m.id for m in ensemble.members)}. Leave the flag out, or train a "
            f"baseline with bids_varaug-train --members {BASELINE}."
        )
    float32 = 24  # bits
    return tuple(
        replace(ensemble.baseline, id=f"{ROUNDED}{n:02}", family=ROUNDED, seed=100 * random_seed + n, precision=float32)
        for n in range(1, n_members + 1)
    )


def check_member(ensemble: Ensemble, member: Member) -> Path:
    """Compare the SHA-256 of a member's weights with the manifest; return their file."""
    path = ensemble.directory / member.file
    if path.name != member.file or not path.is_file():
        raise EnsembleError(f"{path}: weights of {member.id} are missing. Install the ensemble again.")
    if sha256_of(path) != member.sha256:
        raise EnsembleError(
            f"{path}: checksum differs from the manifest: the file is damaged or was replaced. Install the ensemble "
            "again."
        )
    return path


def sha256_of(path: Path) -> str:
    """Return a file's SHA-256 as hexadecimal text."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
