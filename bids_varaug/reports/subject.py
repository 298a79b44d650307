"""Gather what a participant's report shows, from the derivatives alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from nibabel.affines import voxel_sizes

from bids_varaug.derivatives import names
from bids_varaug.derivatives.sidecars import package_versions
from bids_varaug.errors import ScanError
from bids_varaug.images.load import Volume, load_t1w
from bids_varaug.inputs.scans import Scan
from bids_varaug.models.ensemble import Member
from bids_varaug.reports import figures
from bids_varaug.reports.citation import cite
from bids_varaug.reports.participant import (
    ReportContent,
    ScanReport,
    write_participant_report,
)
from bids_varaug.reports.request import ReportRequest
from bids_varaug.reports.volume_plot import draw_volumes
from bids_varaug.settings import Settings

NO_VERDICTS = (
    "The table of structures has no verdicts, an older version wrote it: run without "
    "--reports-only to get them."
)
# Where, how fast and beside whom it ran (a report must not depend on it: a job array makes the same
# one), and what the group level is asked.
_NOT_SHOWN = frozenset(
    """
    output_dir work_dir device nprocs omp_nthreads mem_gb plugin verbosity dry_run reports_only
    clean_workdir stop_on_first_crash participant_labels exclude_participant_labels
    skip_bids_validation bids_database_dir age_column site_column sex_column brainage_model
    augmentation cv_folds features_table apply_model
    """.split()
)


def write_subject_report(request: ReportRequest) -> Path:
    """Write ``sub-<label>.html`` and its figures.

    Raises
    ------
    ScanError
        If a derivative that the report needs is not there.
    OutputError
        If it cannot be written.
    """
    settings, ensemble = request.settings, request.ensemble
    versions = package_versions()
    content = ReportContent(
        subject=request.scans[0].subject,
        scans=tuple(scan_report(request, scan) for scan in request.scans),
        settings=_shown_settings(settings),
        ensemble={
            "name": ensemble.name,
            "version": ensemble.version,
            "shared_steps": ensemble.training.get("forked_at_step", 0),
            "own_steps": ensemble.training.get("member_steps", 0),
            "members": [_member_row(member) for member in request.members],
        },
        versions=versions,
        citation=cite(
            ensemble, request.members, versions, sloppy=settings.sloppy, n_grids=settings.grids
        ),
    )
    path = names.report(settings.output_dir, content.subject)
    write_participant_report(path, content)
    return path


def scan_report(request: ReportRequest, scan: Scan) -> ScanReport:
    """Draw one scan's figures and collect its tables and warnings."""
    output_dir = request.settings.output_dir
    regions = _read_table(output_dir, scan, "regions_tsv")
    members = _read_table(output_dir, scan, "members_tsv")
    labels = _read_image(output_dir, scan, "consensus_dseg")
    volume = load_t1w(scan.path, request.settings.trust)
    zooms = voxel_sizes(volume.affine)
    told = _read_sidecar(output_dir, scan, "regions_tsv")
    return ScanReport(
        prefix=scan.prefix,
        figures=dict(_draw(request, scan, volume, labels, members)),
        regions=regions,
        members=members,
        warnings=told.get("Warnings", [NO_VERDICTS]),
        limits=told.get("VolumeLimits", ""),
        provenance={
            "T1w": scan.relative,
            "Grid": f"{' x '.join(str(n) for n in volume.data.shape)} voxels of "
            f"{' x '.join(f'{zoom:.2f}' for zoom in zooms)} mm",
        },
    )


def _draw(
    request: ReportRequest, scan: Scan, volume: Volume, labels: np.ndarray, members: pd.DataFrame
) -> Iterator[tuple[str, bytes]]:
    output_dir = request.settings.output_dir
    structures = request.ensemble.labels[1:]
    colors = figures.parse_colors({label.index: label.color for label in structures})
    label_names = {label.index: label.name for label in structures}
    view = figures.plan_view(labels, volume.affine)
    yield "consensus", figures.draw_labels(volume.data, labels, view, colors, label_names)
    for key, style in figures.MAP_STYLES.items():
        if names.OUTPUTS[key].path(output_dir, scan).exists():
            values = _read_image(output_dir, scan, key)
            yield key, figures.draw_map(volume.data, values, labels, view, style)
    if names.OUTPUTS["unreliable_mask"].path(output_dir, scan).exists():
        mask = _read_image(output_dir, scan, "unreliable_mask")
        yield "unreliable", figures.draw_mask(volume.data, mask, labels, view)
    yield "volumes", draw_volumes(members)


def _read_image(output_dir: Path, scan: Scan, key: str) -> np.ndarray:
    image = nib.load(_existing(names.OUTPUTS[key].path(output_dir, scan), scan))
    return np.asanyarray(image.dataobj)


def _read_table(output_dir: Path, scan: Scan, key: str) -> pd.DataFrame:
    path = _existing(names.OUTPUTS[key].path(output_dir, scan), scan)
    return pd.read_csv(path, sep="\t", na_values=["n/a"])


def _read_sidecar(output_dir: Path, scan: Scan, key: str) -> dict:
    path = _existing(names.OUTPUTS[key].sidecar(output_dir, scan), scan)
    try:
        return dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise ScanError(f"{path}: damaged ({error}). Run without --reports-only.") from error


def _existing(path: Path, scan: Scan) -> Path:
    if not path.exists():
        raise ScanError(
            f"{path}: not there, so that {scan.relative} has no report. Run without --reports-only."
        )
    return path


def _shown_settings(settings: Settings) -> dict:
    return {
        field.name: getattr(settings, field.name)
        for field in fields(settings)
        if field.name not in _NOT_SHOWN
    }


def _member_row(member: Member) -> dict:
    return {
        "id": member.id,
        "family": member.family,
        "seed": member.seed,
        "precision": member.precision,
        "sha256": member.sha256,
    }
