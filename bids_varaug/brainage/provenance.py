"""Which ensemble made the derivatives, and whether it was one and the same for all of them."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from bids_varaug.derivatives import names
from bids_varaug.derivatives.sidecars import GRIDS_KEY, SLOPPY_NOTE, TOOL, package_version
from bids_varaug.errors import NoInputError, UserError
from bids_varaug.inputs.scans import Scan, natural_key
from bids_varaug.inputs.tables import TableError, read_text_table, some
from bids_varaug.models.ensemble import Ensemble, Member
from bids_varaug.settings import Settings

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ENSEMBLE_KEY = "Ensemble"
"""Optional key of a table's sidecar: ``{"Name": ..., "Version": ..., "SHA256": {member: ...}}``,
and ``"Seed": {member: ...}`` of members under random rounding, who share the baseline's weights."""


LISTED = 100  # participants that a message names before it says how many more there are


class MixedDerivativesError(UserError):
    """The derivatives were made by different ensembles, versions or settings."""


@dataclass(frozen=True)
class Origin:
    """What one file says about how derivatives were made; None or empty where it does not say.

    Parameters
    ----------
    file : that says so, as messages name it
    ensemble, version : of the ensemble
    tool_version : of bids_varaug
    sloppy : whether made with --sloppy, on another grid
    grids : on how many grids the baseline segmented
    sha256 : digest of the weights by member
    seeds : of the random rounding by member
    families : family by member
    participants : that the run was asked for; empty: all
    """

    file: str
    ensemble: str | None = None
    version: str | None = None
    tool_version: str | None = None
    sloppy: bool | None = None
    grids: int | None = None
    sha256: Mapping[str, str] = field(default_factory=dict)
    seeds: Mapping[str, int] = field(default_factory=dict)
    families: Mapping[str, str] = field(default_factory=dict)
    participants: tuple[str, ...] = ()

    def facts(self) -> dict[str, object]:
        """What is known, by the name that messages give it."""
        said = {
            "ensemble": self.ensemble,
            "version of the ensemble": self.version,
            f"version of {TOOL}": self.tool_version,
            "--sloppy": self.sloppy,
            "--grids": self.grids,
        }
        said |= {f"weights of {member}": sha for member, sha in self.sha256.items()}
        said |= {f"seed of {member}": seed for member, seed in self.seeds.items()}
        return {what: value for what, value in said.items() if value is not None}


def read_root(output_dir: Path) -> Origin:
    """What dataset_description.json and descriptions.tsv say, that is, the last run.

    Raises
    ------
    NoInputError
        If there is no dataset_description.json: this is no output of bids_varaug.
    MixedDerivativesError
        If GeneratedBy names several versions of bids_varaug.
    UserError
        If a file is damaged, or descriptions.tsv is missing.
    """
    output_dir = Path(output_dir)
    path = output_dir / names.DATASET_DESCRIPTION
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        made = [by for by in content["GeneratedBy"] if by["Name"] == TOOL]
    except FileNotFoundError as error:
        raise NoInputError(
            f"{path}: is not there. Give the output directory of the participant level, run before."
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TableError(
            f"{path}: damaged, or without GeneratedBy ({error!r}). Run the participant level again "
            "with --reports-only, which writes it anew."
        ) from error
    if not made:
        raise NoInputError(f"{path}: GeneratedBy does not name {TOOL}; these are others' outputs.")
    versions = sorted({str(by.get("Version")) for by in made})
    if len(versions) > 1:
        raise MixedDerivativesError(
            f"{path}: made by several versions of {TOOL}: {', '.join(versions)}. Run the "
            "participant level for everybody with one version, into a directory of its own."
        )
    table_path = output_dir / names.DESCRIPTIONS_TABLE
    if not table_path.is_file():
        raise TableError(
            f"{table_path}: is not there, and without it nobody knows which ensemble this is. Run "
            "the participant level again with --reports-only, which writes it anew."
        )
    table = read_text_table(table_path)
    missing = [c for c in ("desc_id", "family", "sha256") if c not in table.columns]
    if missing:
        raise TableError(f"{table_path}: no column {some(missing)}. Run the participant level.")
    rows = table[["desc_id", "family", "sha256"]].itertuples(index=False, name=None)
    members = {desc.removeprefix("desc-"): (f, sha) for desc, f, sha in rows if desc and sha}
    return Origin(
        names.DESCRIPTIONS_TABLE,
        tool_version=versions[0],
        sloppy=any(by.get("Description") == SLOPPY_NOTE for by in made),
        sha256={member: sha for member, (_, sha) in members.items()},
        families={member: family or "" for member, (family, _) in members.items()},
    )


def read_runs(output_dir: Path) -> list[Origin]:
    """What the logs of the runs say that made derivatives (``logs/settings-*.toml``).

    Raises
    ------
    TableError
        If a log is damaged.
    """
    origins = []
    for path in sorted(names.logs(output_dir).glob("settings-*.toml")):
        try:
            content = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise TableError(f"{path}: cannot read it ({error}). Mend or remove it.") from error
        settings, ensemble = content.get("settings", {}), content.get("ensemble", {})
        if settings.get("level") != "participant" or settings.get("reports_only"):
            continue
        origins.append(
            Origin(
                f"logs/{path.name}",
                ensemble=ensemble.get("name"),
                version=ensemble.get("version"),
                sloppy=bool(settings.get("sloppy")),
                grids=settings.get("grids", 1),
                sha256=ensemble.get("sha256", {}),
                participants=tuple(f"sub-{p}" for p in settings.get("participant_labels", ())),
            )
        )
    return origins


def sidecar_origin(content: Mapping, file: str) -> Origin:
    """What a table's own sidecar says; without `ENSEMBLE_KEY`, little more than the grid."""
    ensemble = content.get(ENSEMBLE_KEY)
    ensemble = ensemble if isinstance(ensemble, Mapping) else {}
    digests, seeds = ensemble.get("SHA256"), ensemble.get("Seed")
    made = content.get("GeneratedBy")
    made = [by for by in made if isinstance(by, Mapping)] if isinstance(made, list) else []
    versions = [by.get("Version") for by in made if by.get("Name") == TOOL]
    return Origin(
        file,
        ensemble=ensemble.get("Name"),
        version=ensemble.get("Version"),
        tool_version=versions[0] if versions else None,
        sloppy=content.get("Warning") == SLOPPY_NOTE,
        grids=content.get(GRIDS_KEY, 1),
        sha256=digests if isinstance(digests, Mapping) else {},
        seeds=seeds if isinstance(seeds, Mapping) else {},
    )


def run_origin(settings: Settings, ensemble: Ensemble, members: Sequence[Member]) -> Origin:
    """How a run of the participant level makes derivatives."""
    return Origin(
        "this run",
        ensemble=ensemble.name,
        version=ensemble.version,
        tool_version=package_version(),
        sloppy=settings.sloppy,
        grids=settings.grids,
        sha256={member.id: member.sha256 for member in members},
        seeds={member.id: member.seed for member in members if member.is_rounded},
    )


def check_rerun(output_dir: Path, run: Origin, scans: Iterable[Scan]) -> None:
    """Refuse a run after which the root would describe others' derivatives wrongly.

    Parameters
    ----------
    output_dir : Path
    run : how this run makes derivatives
    scans : images that it makes again, whose derivatives do not stay

    Raises
    ------
    MixedDerivativesError
        With what stays, in what it differs, and what to do.
    """
    output_dir = Path(output_dir)
    again = {str((output_dir / scan.relative).with_name(scan.prefix)) for scan in scans}
    kept = {stem: path for stem, path in _sidecars(output_dir).items() if stem not in again}
    try:
        root = read_root(output_dir) if kept else run
    except UserError:  # not there, or damaged: this run writes it
        root = Origin(names.DATASET_DESCRIPTION)
    differing: dict[str, list[str]] = {}
    for stem, path in kept.items():
        content = _read_object(path)
        theirs = sidecar_origin(content, run.file) if content else root
        if theirs == run:
            continue
        if content and not theirs.sha256:  # interrupted, or of an older version: as the root says
            theirs = replace(root, sloppy=theirs.sloppy, grids=theirs.grids)
        if difference := _difference(theirs, run):
            differing.setdefault(difference, []).append(stem)
    if not differing:
        return
    lines = [
        f"  {some([Path(stem).name for stem in sorted(stems, key=natural_key)])}: {what}"
        for what, stems in differing.items()
    ]
    kept_stems = (Path(stem) for stems in differing.values() for stem in stems)
    labels = sorted({s.relative_to(output_dir).parts[0][4:] for s in kept_stems}, key=natural_key)
    more = f" and {len(labels) - LISTED} more" if len(labels) > LISTED else ""
    raise MixedDerivativesError(
        f"{output_dir}: other images there were made in another way, and this run would make "
        f"{names.DATASET_DESCRIPTION} and {names.DESCRIPTIONS_TABLE} wrong for them:\n"
        + "\n".join(lines)
        + "\nGive another output directory, remove their files, or process them again in this run: "
        + f"--participant-label {' '.join(labels[:LISTED])}{more}, beside those of this run."
    )


def _sidecars(output_dir: Path) -> dict[str, Path]:
    """Sidecar that tells most about each image, by the path that its outputs begin with."""
    found = {}
    # The first and the last that are written.
    outputs = [names.OUTPUTS[key] for key in ("consensus_dseg", "members_tsv")]
    endings = [output.name("").removesuffix(output.extension) + ".json" for output in outputs]
    for folder, folders, files in os.walk(output_dir):
        folders[:] = [name for name in folders if re.match("sub-|ses-|anat$", name)]
        for ending in endings:
            for name in files:
                if name.endswith(ending):
                    path = os.path.join(folder, name)
                    found[path.removesuffix(ending)] = Path(path)
    return found


def _read_object(path: Path) -> dict:
    """Content of a JSON file; empty where it is damaged, or another job has just removed it."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _difference(theirs: Origin, ours: Origin) -> str:
    """In what derivatives differ from those of this run; empty where in nothing that is known."""
    before, now = theirs.facts(), ours.facts()
    if theirs.sha256:  # the group level allows that members are missing: it leaves images out
        before["members"], now["members"] = (
            ", ".join(sorted(origin.sha256, key=natural_key)) for origin in (theirs, ours)
        )
    other = [what for what, value in before.items() if value != now.get(what, value)]
    said = []
    if "--sloppy" in other:
        said.append(f"made with{'' if theirs.sloppy else 'out'} --sloppy (now with"
                    f"{'' if ours.sloppy else 'out'})")  # fmt: skip
    said += [
        f"{what} {before[what]} (now {now[what]})"
        for what in other
        if what != "--sloppy" and not what.startswith("weights")
    ]
    weights = [what.split()[-1] for what in other if what.startswith("weights")]
    return "; ".join([*said, *([f"other weights of {some(weights)}"] if weights else [])])


def check_same_origin(origins: Iterable[Origin]) -> None:
    """Refuse what contradicts: other ensembles, versions, grids, or weights of the same member.

    Raises
    ------
    MixedDerivativesError
        With every value, and the files that say so.
    """
    said: dict[str, dict[object, list[str]]] = {}
    for origin in origins:
        who = f" ({some(origin.participants)})" if origin.participants else ""
        for what, value in origin.facts().items():
            said.setdefault(what, {}).setdefault(value, []).append(origin.file + who)
    mixed = {what: values for what, values in said.items() if len(values) > 1}
    if not mixed:
        return
    # Where the ensembles differ, so do all of their weights; once is enough.
    what, values = next(iter(mixed.items()))
    lines = [
        f"  {what} {_short(str(value))}: {some(files, '; ')}"
        for value, files in sorted(values.items(), key=lambda item: len(item[1]))
    ]
    raise MixedDerivativesError(
        "the derivatives were not all made in the same way:\n" + "\n".join(lines) + "\n"
        "Give each ensemble, version and setting an output directory of its own. If everything was "
        "made again since, remove the logs of the runs before."
    )


def _short(value: str) -> str:
    return value if len(value) < 32 else f"{value[:12]}..."  # digests
