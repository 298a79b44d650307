"""The participant's report: made from the derivatives alone, one HTML file that needs nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import nibabel as nib
import numpy as np
import pandas as pd
from nibabel.affines import voxel_sizes
from nibabel.spatialimages import SpatialImage

from bids_varaug.derivatives import names
from bids_varaug.derivatives.citation import cite_participant, percent
from bids_varaug.derivatives.names import Column, ScanRequest, table_columns
from bids_varaug.derivatives.sidecars import package_versions
from bids_varaug.errors import ScanError
from bids_varaug.files import replacing, write_text
from bids_varaug.images.load import load_t1w
from bids_varaug.models.ensemble import BASELINE
from bids_varaug.reports.html import data_uri, render_page, tabulate
from bids_varaug.reports.mosaics import MAP_STYLES, Mosaic
from bids_varaug.reports.plots import draw_volumes
from bids_varaug.settings import Settings
from bids_varaug.variability.measures import UNRELIABLE_BELOW
from bids_varaug.variability.quality import VERDICTS, describe_families

MARKS = {"good": "✓ good", "caution": "! caution", "unknown": "? unknown", "unreliable": "✗ unreliable"}
# Settings that change a participant's result. Not those of place, speed and other participants: a job array must write
# the same report.
_SHOWN = (
    "bids_dir", "level", "session_labels", "bids_filters", "trust", "ensemble", "members", "n_members",
    "perturb_inference", "write_members", "family_maps", "random_seed", "sloppy",
)  # fmt: skip


@dataclass(frozen=True)
class ScanReport:
    """What is shown of one T1w image."""

    prefix: str  # e.g. "sub-01_ses-a_run-1"
    figures: Mapping[str, bytes]  # PNG files in the order shown; those that the template lacks under their own names
    regions: pd.DataFrame  # as in desc-consensus_dseg.tsv
    members: pd.DataFrame  # as in desc-members_morph.tsv
    warnings: Sequence[str] = ()
    limits: str = ""  # whose limits of volume apply
    provenance: Mapping[str, Any] = field(default_factory=dict)  # what was done to this image


def scan_report(request: ScanRequest) -> ScanReport:
    """Draw one scan's figures and collect its tables and warnings; `ScanError` if one is missing or damaged."""
    t1w = load_t1w(request.scan.path, request.settings.trust)
    paths = [request.path(key) for key in ("consensus_dseg", "regions_tsv", "members_tsv")]
    sidecar = request.sidecar("regions_tsv")
    for path in (*paths, sidecar):
        if not path.exists():
            raise ScanError(f"{path}: missing, so {request.scan.relative} has no report. Run without --reports-only.")
    try:
        notes = dict(json.loads(sidecar.read_bytes()))
    except (ValueError, TypeError) as error:
        raise ScanError(f"{sidecar}: damaged ({error}). Run without --reports-only.") from error
    regions, members = (pd.read_csv(path, sep="\t", na_values=["n/a"]) for path in paths[1:])
    mosaic = Mosaic(t1w.data, _read_image(paths[0]), t1w.affine)
    figures = {"consensus": mosaic.draw_labels(request.ensemble.labels), "volumes": draw_volumes(members)}
    for key, style in MAP_STYLES.items():
        if request.path(key).exists():
            figures[key] = mosaic.draw_map(_read_image(request.path(key)), style)
    if request.path("unreliable_mask").exists():
        figures["unreliable"] = mosaic.draw_mask(_read_image(request.path("unreliable_mask")))
    shape = " x ".join(str(n) for n in t1w.data.shape)
    size = " x ".join(f"{zoom:.2f}" for zoom in voxel_sizes(t1w.affine))
    provenance = {"T1w": request.scan.relative, "Grid": f"{shape} voxels of {size} mm"}
    warnings, limits = notes.get("Warnings", []), notes.get("VolumeLimits", "")
    return ScanReport(request.scan.prefix, figures, regions, members, warnings, limits, provenance)


def _read_image(path: Path) -> np.ndarray:
    return np.asanyarray(cast(SpatialImage, nib.load(path)).dataobj)


def shown_settings(settings: Settings) -> dict[str, Any]:
    """Settings that decide what the participant level writes."""
    return {name: getattr(settings, name) for name in _SHOWN}


def write_subject_report(requests: Sequence[ScanRequest]) -> Path:
    """Write a report from scans' derivatives and, beside it, figures as ``sub-XX/figures/*.png``; return its path.

    Raises as `scan_report`.
    """
    path = names.report(requests[0].settings.output_dir, requests[0].scan.subject)
    scans = [scan_report(request) for request in requests]
    for scan in scans:
        for name, png in scan.figures.items():
            with replacing(path.with_suffix("") / "figures" / figure_name(scan.prefix, name)) as stream:
                stream.write(png)
    return write_text(render_participant_report(requests[0], scans), path)


def figure_name(prefix: str, name: str) -> str:
    """File name of a figure.

    >>> figure_name("sub-01_run-2", "entropy")
    'sub-01_run-2_desc-entropy_T1w.png'
    """
    prefix, name = (re.sub(r"[^A-Za-z0-9_+-]", "", part) for part in (prefix, name))
    return f"{prefix}_desc-{name}_T1w.png"


def render_participant_report(request: ScanRequest, scans: Sequence[ScanReport]) -> str:
    """Return the report on scans, of any of which `request` is, as one HTML text; every value is escaped."""
    settings, members = request.settings, request.members
    columns = table_columns("members")
    rows = pd.DataFrame([{name: getattr(member, name) for name in columns} for member in members])
    return render_page(
        "participant.html",
        subject=request.scan.subject,
        sloppy=settings.sloppy,
        scans=[_scan_values(scan, n) for n, scan in enumerate(scans, start=1)],
        settings=shown_settings(settings),
        ensemble=request.ensemble,
        families={member.family for member in members},
        members=tabulate(rows, columns),
        versions=package_versions(),
        citation=cite_participant(request),
        verdicts=[(MARKS[name], meaning) for name, meaning in VERDICTS.items()],
        unreliable_below=percent(UNRELIABLE_BELOW),
    )


def _scan_values(scan: ScanReport, number: int) -> dict[str, Any]:
    """What the template shows of a scan; measures within families have tables of their own."""
    columns = table_columns("regions")
    columns = {name: columns[name] for name in ("index", "name", "verdict", "reason", *columns)}
    perturbed = scan.members[scan.members["family"] != BASELINE]
    n_members = perturbed.groupby("family", sort=False)["member"].nunique().to_dict()
    within = {
        f"{name}_{family}": replace(
            column, heading=f"{column.heading} {family}", description=f"{column.description}, family {family} only"
        )
        for name, column in columns.items()
        for family in n_members
        if f"{name}_{family}" in scan.regions
    }
    others = {name: Column(name, "{:.4g}", "", name) for name in scan.regions if name not in columns | within}
    classes = scan.regions["verdict"].replace("good", "").tolist()
    regions = scan.regions.replace({"verdict": MARKS})
    volumes = scan.members.pivot_table(index=["index", "name"], columns="member", values="volume", sort=False)
    volume = table_columns("volumes")["volume"]
    shown = {name: replace(volume, heading=str(name), description="") for name in volumes}
    has_spread = regions[list(within)].notna().to_numpy().any()
    return {
        "anchor": f"scan-{number}",
        "prefix": scan.prefix,
        "figures": [(name, data_uri(png, "png")) for name, png in scan.figures.items()],
        "regions": tabulate(regions, columns | others, classes, {"verdict": list(MARKS.values())}),
        "has_unreliable": "unreliable" in classes,
        "within": tabulate(regions, {"name": columns["name"], **within}, classes) if has_spread else None,
        "families": tabulate(_summarise_families(regions, n_members), table_columns("families")),
        "few_members": describe_families(n_members),
        "limits": scan.limits.rstrip("."),
        "volumes": tabulate(volumes.reset_index(), {"name": table_columns("volumes")["name"], **shown}),
        "warnings": list(scan.warnings),
        "provenance": scan.provenance,
    }


def _summarise_families(regions: pd.DataFrame, n_members: Mapping[str, int]) -> pd.DataFrame:
    """One row per family: number of members, and its spread over all structures."""
    rows = []
    for family, n in n_members.items():
        measures = (f"{name}_{family}" for name in ("cv", "dice_min", "entropy_mean"))
        cv, dice, entropy = (regions.get(name, pd.Series([np.nan])) for name in measures)
        spread = {"cv_median": cv.median(), "cv_max": cv.max(), "dice_min": dice.min(), "entropy": entropy.mean()}
        rows.append({"family": family, "n": n, **spread})
    return pd.DataFrame(rows)
