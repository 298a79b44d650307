"""An ensemble on disk: a manifest and one file of weights per member. Without torch."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from pathlib import Path

from bids_varaug.errors import EnsembleError, UsageError
from bids_varaug.models.trunk import Trunk, base_files

BASELINE = "ieee"
ROUNDED = "rr"
"""Family of the members that are the baseline under random rounding, which no file holds."""
ROUNDED_PRECISION = 24  # bits: float32's own
MAX_ROUNDED = 99  # their ids have two digits
MANIFEST = "manifest.json"
FORMAT = 2
OLDER_FORMATS = (1,)  # without trunk and temperature


@dataclass(frozen=True)
class NetworkShape:
    """What has to be known to build the network again (kept in the manifest)."""

    n_classes: int
    channels: tuple[int, ...] = (32, 64, 96, 96, 96)
    rim_channels: int = 16

    @classmethod
    def from_json(cls, values: dict) -> NetworkShape:
        """Rebuild from the manifest's dictionary."""
        return cls(**(values | {"channels": tuple(values["channels"])}))

    @property
    def multiple(self) -> int:
        """Input sides must be multiples of this many voxels."""
        return 2 ** len(self.channels)


@dataclass(frozen=True)
class Label:
    """One class of the network: the id written to label maps, its name, its display colour."""

    index: int
    name: str
    color: str


@dataclass(frozen=True)
class Member:
    """One network, and how it is run.

    `family` is "ieee" (the unperturbed baseline), "mca" or "seed", which say what was perturbed
    in training, or "rr": the baseline's weights, run under random rounding (`round_inference`).
    `seed` is that of the training, or of the rounding; `precision` the virtual precision in bits
    of the rounding (8 where a Monte Carlo member was trained with bfloat16 layers, whose other
    operators have 24), None for members without; `sha256` that of the weights file; `base` the id
    of the member whose weights that file adds to, None where it adds to the trunk, or is whole.
    `steps` and `format` are those of its training and of its file; None in earlier ensembles.
    """

    id: str
    family: str
    seed: int
    precision: int | None
    file: str
    sha256: str
    base: str | None = None
    steps: int | None = None
    format: str | None = None

    @property
    def is_baseline(self) -> bool:
        """Whether this is the unperturbed network, which stays out of consensus and spread."""
        return self.family == BASELINE

    @property
    def is_rounded(self) -> bool:
        """Whether inference, not training, is what is perturbed."""
        return self.family == ROUNDED


@dataclass(frozen=True)
class Ensemble:
    """Members of one architecture, what they segment, and how they were trained.

    `labels[k]` describes class k; `voxel_size` in mm. The `temperature` makes the mean posterior as
    sure as it is right: p becomes p^(1 / temperature), scaled to sum to 1, on the T1w's own grid;
    labels and members' posteriors do not depend on it. Without a `trunk` the members' weights are
    whole.
    """

    name: str
    version: str
    directory: Path
    voxel_size: float
    labels: tuple[Label, ...]
    network: NetworkShape
    members: tuple[Member, ...]
    training: dict
    trunk: Trunk | None = None
    temperature: float = 1.0

    @property
    def baseline(self) -> Member | None:
        """The unperturbed member, if there is one."""
        return next((member for member in self.members if member.is_baseline), None)


def find_ensemble(name: str) -> Path:
    """Return the folder of a shipped ensemble's name, or of a path.

    Raises
    ------
    EnsembleError
        If there is neither; the shipped names are listed.
    """
    shipped = Path(str(files("bids_varaug"))) / "data" / "ensembles"
    for folder in (shipped / name if "/" not in name else None, Path(name)):
        if folder is not None and (folder / MANIFEST).is_file():
            return folder.absolute()  # workers run elsewhere
    known = sorted(p.parent.name for p in shipped.glob(f"*/{MANIFEST}"))
    raise EnsembleError(
        f"--ensemble {name}: neither a shipped ensemble ({', '.join(known) or 'none'}) nor a "
        f"folder with a {MANIFEST}. Train one with bids_varaug-train, or give another path."
    )


def load_ensemble(name: str) -> Ensemble:
    """Read an ensemble's manifest, by shipped name or folder.

    Raises
    ------
    EnsembleError
        If it is unknown, its manifest is damaged, a member is of the family "rr", or members
        differ in steps or format.
    """
    folder = find_ensemble(name)
    path = folder / MANIFEST
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] not in (FORMAT, *OLDER_FORMATS):
            raise EnsembleError(
                f"{path}: format {values['format']}; this version reads {FORMAT}. Use the version "
                "of bids_varaug that trained it."
            )
        trunk = values.get("trunk")
        members = tuple(Member(**member) for member in values["members"])
        if any(member.is_rounded for member in members):
            raise EnsembleError(
                f"{path}: a member is of family {ROUNDED}, which names the baseline run under "
                "random rounding (--perturb-inference). Give that family another name."
            )
        _check_equal(path, members)
        return Ensemble(
            name=values["name"],
            version=values["version"],
            directory=folder,
            voxel_size=float(values["voxel_size"]),
            labels=tuple(Label(**label) for label in values["labels"]),
            network=NetworkShape.from_json(values["network"]),
            members=members,
            training=values["training"],
            trunk=None if trunk is None else Trunk(**trunk),
            temperature=_temperature(values.get("temperature", 1.0)),
        )
    except (json.JSONDecodeError, KeyError, TypeError, ValueError, UnicodeDecodeError) as error:
        raise EnsembleError(f"{path}: damaged manifest ({error}). Install it again.") from error


def _check_equal(path: Path, members: Iterable[Member]) -> None:
    for key, what in (("steps", "numbers of training steps"), ("format", "formats of weights")):
        found = {getattr(member, key): member.id for member in members}
        if len(found) > 1:
            each = ", ".join(f"{member} {value}" for value, member in found.items())
            raise EnsembleError(
                f"{path}: members have unequal {what} ({each}), which would count as spread. "
                "Train all members by one recipe with bids_varaug-train."
            )


def _temperature(value: float) -> float:
    if not 0 < float(value) < math.inf:
        raise ValueError(f"temperature {value}")
    return float(value)


def write_manifest(ensemble: Ensemble) -> None:
    """Write `ensemble.directory`/manifest.json, aside first and renamed."""
    values = {"format": FORMAT} | asdict(ensemble)
    del values["directory"]
    path = ensemble.directory / MANIFEST
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def select_members(ensemble: Ensemble, wanted: Iterable[str], n_members: int | None = None) -> tuple[Member, ...]:
    """Return the members asked for, the baseline first, else in the manifest's order.

    Parameters
    ----------
    wanted : "all", families or ids
    n_members : keep the first n of each family; None keeps all

    Raises
    ------
    EnsembleError
        If a name is neither family nor id.
    """
    wanted = set(wanted)
    known = {"all"} | {m.id for m in ensemble.members} | {m.family for m in ensemble.members}
    if wanted - known:
        rounded = any(name.startswith(ROUNDED) for name in wanted - known)
        hint = f" Members of family {ROUNDED} come from --perturb-inference." if rounded else ""
        raise EnsembleError(
            f"--members {' '.join(sorted(wanted - known))}: not in ensemble {ensemble.name}. "
            f"It has {', '.join(m.id for m in ensemble.members)}.{hint}"
        )
    chosen, per_family = [], {}
    for member in sorted(ensemble.members, key=lambda member: not member.is_baseline):
        if not wanted & {"all", member.id, member.family}:
            continue
        per_family[member.family] = per_family.get(member.family, 0) + 1
        if n_members is None or per_family[member.family] <= n_members:
            chosen.append(member)
    return tuple(chosen)


def round_inference(ensemble: Ensemble, n_members: int, random_seed: int) -> tuple[Member, ...]:
    """Return members that are the baseline run under random rounding, "rr01", "rr02", ...

    Parameters
    ----------
    n_members : 0 to `MAX_ROUNDED`
    random_seed : any; each gives every member another seed. A member's seed depends on its number
        alone, so that more of them leave the first ones what they are.

    Raises
    ------
    UsageError
        If the ensemble has no baseline.

    References
    ----------
    .. Gonzalez Pepe et al. (2023), arXiv:2308.01939.
    """
    if not n_members:
        return ()
    if ensemble.baseline is None:
        raise UsageError(
            f"--perturb-inference {n_members}: ensemble {ensemble.name} has no baseline "
            f"({BASELINE}) to run under random rounding; it has "
            f"{', '.join(m.id for m in ensemble.members)}. Leave the flag out, or train a baseline "
            f"with bids_varaug-train --members {BASELINE}."
        )
    return tuple(
        replace(
            ensemble.baseline,
            id=f"{ROUNDED}{number:02}",
            family=ROUNDED,
            seed=random_seed * (MAX_ROUNDED + 1) + number,
            precision=ROUNDED_PRECISION,
        )
        for number in range(1, n_members + 1)
    )


def files_of(ensemble: Ensemble, member: Member) -> list[tuple[str, str, str]]:
    """Return name, SHA-256 and meaning of the files whose sum a member's weights are, in order."""
    own = member.file, member.sha256, f"weights of {member.id}"
    return [*base_files(ensemble, member), own]


def identify(ensemble: Ensemble, member: Member) -> str:
    """Name the weights that a member's result depends on."""
    return "-".join(sha256 for _, sha256, _ in files_of(ensemble, member))


def check_member(ensemble: Ensemble, member: Member) -> None:
    """Compare a member's weights, and those that they add to, with the manifest.

    Raises
    ------
    EnsembleError
        If a file is missing or its SHA-256 differs.
    """
    for file, sha256, what in files_of(ensemble, member):
        path = ensemble.directory / file
        if path.name != file or not path.is_file():
            raise EnsembleError(f"{path}: {what} are missing. Install the ensemble again.")
        if sha256_of(path) != sha256:
            raise EnsembleError(
                f"{path}: checksum differs from the manifest: the file is damaged or was "
                "replaced. Install the ensemble again."
            )


def sha256_of(path: Path) -> str:
    """Return a file's SHA-256 as hexadecimal text."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
