"""What stands beside the images: sidecars, tables of labels and members, dataset description."""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd

from bids_varaug import __version__
from bids_varaug.derivatives import names
from bids_varaug.derivatives.io import write_table
from bids_varaug.derivatives.names import Run, ScanRequest
from bids_varaug.files import write_json, write_text
from bids_varaug.models.ensemble import BASELINE, Label, Member
from bids_varaug.variability.quality import VERDICTS

BIDS_VERSION = "1.10.0"
TOOL = "bids_varaug"
PACKAGES = (
    "torch", "numpy", "scipy", "numba", "nibabel", "nipype", "pybids", "significantdigits", "scikit-learn",
)  # fmt: skip
LABEL_COLUMNS = ["index", "name", "abbreviation", "color", "mapping"]
SLOPPY_NOTE = "Made with --sloppy (2 mm grid): for tests and demos only."


def package_versions() -> dict[str, str]:
    """Versions of what the results depend on."""
    return {TOOL: __version__} | {package: importlib.metadata.version(package) for package in PACKAGES}


def raw_link(bids_dir: Path, output_dir: Path) -> str:
    """URI of the input dataset, as seen from the output: relative where they lie together."""
    if bids_dir in output_dir.parents or bids_dir.parent == output_dir.parent != Path("/"):
        return quote(Path(os.path.relpath(bids_dir, output_dir)).as_posix())
    return bids_dir.as_uri()


def dataset_description(bids_dir: Path, output_dir: Path, *, sloppy: bool = False) -> dict[str, Any]:
    """Content of ``dataset_description.json``; both paths are absolute, and the environment names the container."""
    try:
        source = dict(json.loads((bids_dir / names.DATASET_DESCRIPTION).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # absent or damaged, which is the validator's business
        source = {}
    link = raw_link(bids_dir, output_dir)
    generated: dict[str, Any] = {"Name": TOOL, "Version": __version__}
    known = {"Description": SLOPPY_NOTE if sloppy else None, "CodeURL": code_url(), "Container": _container()}
    generated |= {key: value for key, value in known.items() if value}
    doi = source.get("DatasetDOI")
    bare = doi.removeprefix("doi:").removeprefix("https://doi.org/") if isinstance(doi, str) else ""
    origin = {"URL": f"https://doi.org/{bare}", "DOI": bare} if bare else {"URL": link}
    description = {
        "Name": f"Numerical variability of T1w segmentation: {source.get('Name', bids_dir.name)}",
        "BIDSVersion": BIDS_VERSION,
        "DatasetType": "derivative",
        "GeneratedBy": [generated],
        "SourceDatasets": [origin],
        "DatasetLinks": {"raw": link},
        "HowToAcknowledge": "See logs/CITATION.md.",
    }
    if isinstance(source.get("License"), str):
        description["License"] = source["License"]
    return description


def code_url() -> str | None:
    """Address of the source code, as ``pyproject.toml`` gives it to an installation; None where it gives none."""
    try:
        urls = importlib.metadata.metadata(TOOL).get_all("Project-URL") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((url for name, _, url in (text.partition(", ") for text in urls) if name == "Repository"), None)


def _container() -> dict[str, str]:
    """Container that this runs in, as far as the environment tells."""
    tag = os.environ.get("BIDS_VARAUG_DOCKER_TAG")  # set by the Dockerfile
    # Apptainer and Singularity set these themselves, to the path of the image.
    if image := os.environ.get("APPTAINER_CONTAINER") or os.environ.get("SINGULARITY_CONTAINER"):
        return {"Type": "apptainer", "Tag": tag or Path(image).name}
    return {"Type": "docker", "Tag": tag} if tag else {}


def sidecar(
    request: ScanRequest,
    key: str,
    member: str | None = None,
    *,
    skull_stripped: bool = False,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """JSON sidecar of one output (of the consensus labels: also of the table of that name), with the `extra` keys.

    `member` is an id or a family, where the output is of one alone.
    """
    output = names.ALL_OUTPUTS[key]
    raw = f"bids:raw:{request.scan.relative}"
    content: dict[str, Any] = {"Description": output.description, "Sources": [raw]}
    if output.extension != ".tsv" and not output.in_space:
        # The grid is the T1w's own and the name has no 'space', so the reference is named here.
        content |= {"SpatialReference": raw, "Resolution": "Grid of the T1w image"}
    of_suffix: dict[str, dict[str, Any]] = {
        "dseg": {"Manual": False},
        "mask": {"Type": "Brain" if key == "brain_mask" else "ROI"},
        "probseg": {"LabelMap": [label.name for label in request.ensemble.labels]},
        "statmap": {"SkullStripped": skull_stripped, "Units": output.units},
        "T1w": {"SkullStripped": skull_stripped},
    }
    content |= of_suffix.get(output.suffix, {})
    members = _members_behind(request, key, member)
    content["Members"] = [m.id for m in members]
    if output.suffix in ("statmap", "mask", "xfm") or key in ("consensus_dseg", "dseg_in_space"):
        content["MembersPerFamily"] = Counter(m.family for m in members)
    content |= extra or {}
    if request.settings.sloppy:
        content["Warning"] = SLOPPY_NOTE
    table = names.OUTPUTS["regions_tsv"] if key == "consensus_dseg" else output
    return content | describe_columns(table.columns)


def _members_behind(request: ScanRequest, key: str, one: str | None) -> list[Member]:
    """Members that an output was computed from; `one` is its member or family."""
    if key.endswith(names.OF_FAMILY):
        return [member for member in request.perturbed if member.family == one]
    if one == "consensus":
        return list(request.perturbed)
    if one or key == "ieee_dseg":
        return [member for member in request.members if member.id == (one or BASELINE)]
    return list(request.members if key == "members_tsv" else request.perturbed)


def describe_columns(columns: Mapping[str, names.Column]) -> dict[str, Any]:
    """Sidecar of a table: description and unit of each column."""
    return {
        name: {"Description": column.description}
        | ({"Units": column.unit} if column.unit else {})
        | ({"Levels": VERDICTS} if name == "verdict" else {})
        for name, column in columns.items()
        if name not in ("index", "name", "id")  # BIDS defines these itself
    }


def descriptions_table(members: Iterable[Member]) -> pd.DataFrame:
    """Meaning of every ``desc-`` entity: one row per member (with its checkpoint), then summaries and families."""
    texts = dict(names.read_template_table("descriptions.tsv"))
    rows = [
        {"desc_id": f"desc-{m.id}", "description": texts.get(m.family, f"Member of the family {m.family}"),
         "family": m.family, "seed": str(m.seed), "precision": m.precision and str(m.precision), "sha256": m.sha256}
        for m in members
    ]  # fmt: skip
    summaries = {name: texts[name] for name in ("consensus", "mean", "brain", "members")}
    families = dict.fromkeys(member.family for member in members if member.family != member.id)
    summaries |= {family: f"Members of the family {family}" for family in families}
    rows += [{"desc_id": f"desc-{name}", "description": text} for name, text in summaries.items()]
    return pd.DataFrame(rows)


def write_group_dataset_files(bids_dir: Path, output_dir: Path) -> None:
    """Write what the group level needs at the root; what the participant level left stays."""
    path = output_dir / names.DATASET_DESCRIPTION
    if not path.exists():  # features from a table
        write_json(dataset_description(bids_dir, output_dir), path)
    write_text(names.BIDSIGNORE, output_dir / ".bidsignore")


def write_dataset_files(run: Run) -> None:
    """Write what stands at the root: descriptions of dataset and ``desc-`` entities, labels, ``.bidsignore``."""
    output_dir = run.settings.output_dir
    description = dataset_description(run.settings.bids_dir, output_dir, sloppy=run.settings.sloppy)
    write_json(description, output_dir / names.DATASET_DESCRIPTION)
    write_text(names.BIDSIGNORE, output_dir / ".bidsignore")
    path = output_dir / names.DESCRIPTIONS_TABLE
    write_table(descriptions_table(run.members), path)
    text = "What each desc- entity stands for; members with their checkpoints."
    write_json({"Description": text} | describe_columns(names.table_columns("members")), path.with_suffix(".json"))
    # Without a sidecar: BIDS would let every segmentation inherit its Description.
    write_table(labels_table(run.ensemble.labels), run.lookup_table)


def labels_table(labels: Iterable[Label]) -> pd.DataFrame:
    """Labels with the columns that BIDS gives a lookup table; ``mapping`` is to its labels of tissues.

    Structures that ``data/aseg31.tsv`` does not know have neither abbreviation nor mapping.
    """
    with (files("bids_varaug") / "data" / "aseg31.tsv").open(encoding="utf-8") as stream:
        known = pd.read_csv(stream, sep="\t", dtype={"mapping": "Int64"})
    table = pd.DataFrame([vars(label) for label in labels])
    # Manifests spell the background in small letters.
    known = known.set_index(known["name"].str.casefold()).reindex(table["name"].str.casefold()).reset_index(drop=True)
    return table.assign(abbreviation=known["abbreviation"], mapping=known["mapping"])[LABEL_COLUMNS]
