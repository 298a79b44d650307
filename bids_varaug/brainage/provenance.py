"""Which ensemble made the derivatives, and whether it was one and the same for all of them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bids_varaug.derivatives import names
from bids_varaug.derivatives.sidecars import GRIDS_KEY, SLOPPY_NOTE, TOOL
from bids_varaug.errors import NoInputError, UserError
from bids_varaug.inputs.tables import TableError, read_text_table, some

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ENSEMBLE_KEY = "Ensemble"
"""Optional key of a table's sidecar: ``{"Name": ..., "Version": ..., "SHA256": {member: ...}}``."""


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
    families: Mapping[str, str] = field(default_factory=dict)
    participants: tuple[str, ...] = ()


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
    rows = zip(*map(table.column, ("desc_id", "family", "sha256")), strict=True)
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
    digests = ensemble.get("SHA256")
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
    )


def check_same_origin(origins: Iterable[Origin]) -> None:
    """Refuse what contradicts: other ensembles, versions, grids, or weights of the same member.

    Raises
    ------
    MixedDerivativesError
        With every value, and the files that say so.
    """
    said: dict[str, dict[object, list[str]]] = {}
    for origin in origins:
        facts = {
            "ensemble": origin.ensemble,
            "version of the ensemble": origin.version,
            f"version of {TOOL}": origin.tool_version,
            "--sloppy": origin.sloppy,
            "--grids": origin.grids,
        }
        facts |= {f"weights of {member}": sha for member, sha in origin.sha256.items()}
        who = f" ({some(origin.participants)})" if origin.participants else ""
        for what, value in facts.items():
            if value is not None:
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
