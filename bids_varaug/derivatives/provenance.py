"""Which ensemble made the derivatives, and whether it was one and the same for all of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bids_varaug import __version__
from bids_varaug.derivatives import names
from bids_varaug.derivatives.names import Run
from bids_varaug.derivatives.sidecars import SLOPPY_NOTE, TOOL
from bids_varaug.errors import NoInputError, UserError
from bids_varaug.inputs.scans import Scan, natural_key
from bids_varaug.inputs.tables import TableError, read_text_table, some
from bids_varaug.registration.space import SPACE
from bids_varaug.settings import Settings

ENSEMBLE_KEY = "Ensemble"
"""Optional key of a table's sidecar: ``{"Name": ..., "Version": ..., "SHA256": {member: ...}}``, and ``"Seed": {member:
...}`` of members under random rounding, who share the baseline's weights."""

LISTED = 100  # participants that a message names before it says how many more there are
SETTINGS_KEY = "Settings"
"""Key of the sidecar of a members' table: `shown_settings` of the run."""
REDO = "Run the participant level again with --reports-only, which rewrites it."


class MixedDerivativesError(UserError):
    """The derivatives were made by different ensembles, versions or settings."""


@dataclass(frozen=True)
class Origin:
    """What one file says about how derivatives were made; None or empty where it does not say.

    `file` is its name in messages; `sha256` digests of the weights and `seeds` of the random rounding, by member.
    """

    file: str
    ensemble: str | None = None
    version: str | None = None
    tool_version: str | None = None
    sloppy: bool | None = None
    sha256: Mapping[str, str] = field(default_factory=dict)
    seeds: Mapping[str, int] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """What is known, by the name that messages give it."""
        said: dict[str, Any] = {
            "ensemble": self.ensemble,
            "version of the ensemble": self.version,
            f"version of {TOOL}": self.tool_version,
            "--sloppy": self.sloppy,
        }
        said |= {f"weights of {member}": sha for member, sha in self.sha256.items()}
        said |= {f"seed of {member}": seed for member, seed in self.seeds.items()}
        return {what: value for what, value in said.items() if value is not None}

    def to_json(self) -> dict[str, Any]:
        """Which weights and which version of the package made the numbers, for a table's sidecar."""
        ensemble: dict[str, Any] = {"Name": self.ensemble, "Version": self.version, "SHA256": self.sha256}
        ensemble |= {"Seed": self.seeds} if self.seeds else {}
        return {ENSEMBLE_KEY: ensemble, "GeneratedBy": [{"Name": TOOL, "Version": self.tool_version}]}


def read_root(output_dir: Path) -> Origin:
    """What dataset_description.json and descriptions.tsv say, that is, the last run.

    Raises `NoInputError` without dataset_description.json (this is no output of bids_varaug), and another `UserError`
    if it names several versions of bids_varaug, a file is damaged, or descriptions.tsv is missing.
    """
    path, table_path = output_dir / names.DATASET_DESCRIPTION, output_dir / names.DESCRIPTIONS_TABLE
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        made = [by for by in content["GeneratedBy"] if by["Name"] == TOOL]
    except FileNotFoundError as error:
        raise NoInputError(f"{path} does not exist. Give the output directory of the participant level.") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TableError(f"{path}: damaged, or without GeneratedBy ({error!r}). {REDO}") from error
    if not made:
        raise NoInputError(f"{path}: GeneratedBy does not name {TOOL}; these are others' outputs.")
    versions = sorted({str(by.get("Version")) for by in made})
    if len(versions) > 1:
        raise MixedDerivativesError(
            f"{path}: made by several versions of {TOOL}: {', '.join(versions)}. Run the participant level for "
            "everybody with one version, into a directory of its own."
        )
    if not table_path.is_file():
        raise TableError(f"{table_path} does not exist; it says which ensemble made these files. {REDO}")
    table = read_text_table(table_path)
    missing = [c for c in ("desc_id", "sha256") if c not in table.columns]
    if missing:
        raise TableError(f"{table_path}: no column {some(missing)}. {REDO}")
    known = table.dropna(subset=["desc_id", "sha256"])
    return Origin(
        names.DESCRIPTIONS_TABLE,
        tool_version=versions[0],
        sloppy=any(by.get("Description") == SLOPPY_NOTE for by in made),
        sha256=dict(zip(known["desc_id"].str.removeprefix("desc-"), known["sha256"], strict=True)),
    )


def sidecar_origin(content: object, file: str) -> Origin:
    """What a table's own sidecar says; without `ENSEMBLE_KEY`, little."""
    content = _mapping(content)
    ensemble = _mapping(content.get(ENSEMBLE_KEY))
    made = content.get("GeneratedBy")
    tools = [_mapping(by) for by in made] if isinstance(made, list) else []
    return Origin(
        file,
        ensemble=ensemble.get("Name"),
        version=ensemble.get("Version"),
        tool_version=next((by.get("Version") for by in tools if by.get("Name") == TOOL), None),
        sloppy=content.get("Warning") == SLOPPY_NOTE,
        sha256=_mapping(ensemble.get("SHA256")),
        seeds=_mapping(ensemble.get("Seed")),
    )


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


# Settings that change a participant's result. Not those of place, speed and other participants: a job array must write
# the same report.
_SHOWN = (
    "session_labels", "bids_filters", "trust", "ensemble", "members", "n_members", "perturb_inference",
    "write_members", "family_maps", "output_spaces", "refine", "random_seed", "sloppy", "whole_voxels",
)  # fmt: skip


def shown_settings(settings: Settings) -> dict[str, Any]:
    """Settings that decide what the participant level writes, without paths of this machine."""
    shown = {name: getattr(settings, name) for name in _SHOWN}
    if not settings.perturb_inference:
        shown["random_seed"] = Settings.random_seed  # nothing else is drawn
    return shown | {"ensemble": Path(settings.ensemble).name}


def recorded_settings(settings: Settings, scans: Iterable[Scan]) -> dict[str, Settings]:
    """By prefix of the images that have outputs, the settings behind these, as sidecars tell; the rest as given.

    A folder given as the ensemble stays, since sidecars have its name alone.
    """
    sidecars, found = _sidecars(settings.output_dir), {}
    for scan in scans:
        path = sidecars.get((settings.output_dir / scan.relative).with_name(scan.prefix))
        if path is None:
            continue
        try:
            said = _mapping(_mapping(json.loads(path.read_bytes())).get(SETTINGS_KEY))
        except (OSError, ValueError):  # damaged: what reads it says so
            said = {}
        values = {name: said[name] for name in _SHOWN if name in said}
        values |= {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        if "/" in settings.ensemble:
            values["ensemble"] = settings.ensemble
        found[scan.prefix] = replace(settings, **values)
    return found


def run_origin(run: Run) -> Origin:
    """How a run of the participant level makes derivatives."""
    return Origin(
        "this run", run.ensemble.name, run.ensemble.version, __version__, run.settings.sloppy,
        sha256={member.id: member.sha256 for member in run.members},
        seeds={member.id: member.seed for member in run.members if member.is_rounded},
    )  # fmt: skip


def check_rerun(output_dir: Path, run: Origin, scans: Iterable[Scan]) -> None:
    """Refuse a run after which the root would describe others' derivatives wrongly.

    `scans` are the images that it makes again, whose derivatives do not stay. Raises `MixedDerivativesError`, which
    says what stays, in what it differs, and what to do.
    """
    output_dir = Path(output_dir)
    again = {(output_dir / scan.relative).with_name(scan.prefix) for scan in scans}
    kept = {stem: path for stem, path in _sidecars(output_dir).items() if stem not in again}
    try:
        root = read_root(output_dir) if kept else run
    except UserError:  # not there, or damaged: this run writes it
        root = Origin(names.DATASET_DESCRIPTION)
    differing: dict[str, list[Path]] = {}
    for stem, path in kept.items():
        try:
            content = json.loads(path.read_bytes())
        except (OSError, ValueError):  # damaged, or another job has just removed it
            content = {}
        theirs = sidecar_origin(content, run.file) if content else root
        if content and not theirs.sha256:  # interrupted, or of an older version: as the root says
            theirs = replace(root, sloppy=theirs.sloppy)
        if difference := _difference(theirs, run):
            differing.setdefault(difference, []).append(stem)
    if not differing:
        return
    stays = {what: sorted((stem.name for stem in stems), key=natural_key) for what, stems in differing.items()}
    lines = [f"  {some(images)}: {what}" for what, images in stays.items()]
    labels = sorted({name.partition("_")[0][4:] for images in stays.values() for name in images}, key=natural_key)
    raise MixedDerivativesError(
        f"{output_dir}: other images there were made in another way, and this run would make "
        f"{names.DATASET_DESCRIPTION} and {names.DESCRIPTIONS_TABLE} wrong for them:\n"
        + "\n".join(lines)
        + "\nGive another output directory, remove their files, or process them again in this run: "
        + f"--participant-label {some(labels, ' ', LISTED)}, beside those of this run."
    )


def _sidecars(output_dir: Path) -> dict[Path, Path]:
    """Sidecar that tells most about each image, by the path that its outputs begin with."""
    found = {}
    for key in ("consensus_dseg", "members_tsv"):  # the first and the last that are written
        ending = names.ending_of(key).removesuffix(names.OUTPUTS[key].extension) + ".json"
        for folder in ("sub-*/anat", "sub-*/ses-*/anat"):
            for path in output_dir.glob(f"{folder}/*{ending}"):
                if f"_space-{SPACE}_" in path.name:  # of the same image
                    continue
                found[path.with_name(names.prefix_of(path.name))] = path
    return found


def _difference(theirs: Origin, ours: Origin) -> str:
    """In what derivatives differ from those of this run; empty where in nothing that is known."""
    before, now = theirs.facts(), ours.facts()
    if theirs.sha256:  # the group level allows that members are missing: it leaves images out
        for facts, origin in ((before, theirs), (now, ours)):
            facts["members"] = ", ".join(sorted(origin.sha256, key=natural_key))
    other = [what for what, value in before.items() if value != now.get(what, value)]
    weights = [what.split()[-1] for what in other if what.startswith("weights")]
    said = [f"{what} {before[what]} (now {now[what]})" for what in other if not what.startswith("weights")]
    return "; ".join([*said, *([f"other weights of {some(weights)}"] if weights else [])])


def check_same_origin(origins: Iterable[Origin]) -> None:
    """Refuse other ensembles, versions or weights of a member, with every value and the files that say so."""
    said: dict[str, dict[object, list[str]]] = {}
    for origin in origins:
        for what, value in origin.facts().items():
            said.setdefault(what, {}).setdefault(value, []).append(origin.file)
    # Where the ensembles differ, so do all of their weights; once is enough.
    what, values = next(((what, values) for what, values in said.items() if len(values) > 1), ("", {}))
    lines = []
    for value, files in sorted(values.items(), key=lambda item: len(item[1])):
        text = str(value) if len(str(value)) < 32 else f"{str(value)[:12]}..."  # digests
        lines.append(f"  {what} {text}: {some(files, '; ')}")
    if lines:
        raise MixedDerivativesError(
            "the derivatives were not all made in the same way:\n" + "\n".join(lines) + "\nGive each ensemble, version "
            "and setting an output directory of its own."
        )
