"""The participant's report: one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from bids_varaug.derivatives.write import replacing, write_text
from bids_varaug.reports.citation import Citation
from bids_varaug.reports.page import render_page
from bids_varaug.variability.maps import UNRELIABLE_BELOW
from bids_varaug.variability.quality import VERDICTS

FORBIDDEN_IN_FILE_NAMES = re.compile(r"[^A-Za-z0-9_+-]")


@dataclass(frozen=True)
class ScanReport:
    """What is shown of one T1w image.

    Attributes
    ----------
    prefix : e.g. "sub-01_ses-a_run-1"
    figures : name to PNG file; `FIGURE_TEXTS` knows consensus, entropy, sigbits, std, unreliable
        and volumes; others are shown under their own name
    regions : table as in ``desc-consensus_dseg.tsv`` (index, name, volume_mean, ...)
    members : table as in ``desc-members_morph.tsv`` (member, family, index, name, volume)
    warnings : sentences
    limits : whose limits of volume apply
    provenance : what was done to this image, shown as a list of name and value
    """

    prefix: str
    figures: Mapping[str, bytes]
    regions: pd.DataFrame
    members: pd.DataFrame
    warnings: tuple[str, ...] | list[str] = ()
    limits: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ReportContent:
    """What is shown of one participant.

    Attributes
    ----------
    subject : label without ``sub-``
    scans : in the order shown
    settings : the run's settings, name to value; "sloppy" true gives the banner
    ensemble : name, version, members (sequence of mappings with id, family, seed, precision,
        sha256), shared_steps and own_steps (of training, before and after members forked)
    versions : package to version
    citation : how to cite
    """

    subject: str
    scans: tuple[ScanReport, ...] | list[ScanReport]
    settings: Mapping[str, Any]
    ensemble: Mapping[str, Any]
    versions: Mapping[str, str]
    citation: Citation


@dataclass(frozen=True)
class FigureText:
    """Heading, alternative text and how to read a figure."""

    title: str
    alt: str
    reading: str


FIGURE_TEXTS: dict[str, FigureText] = {
    "consensus": FigureText(
        "Consensus labels",
        "T1-weighted slices in three planes with the outline of each structure.",
        "Lines enclose the structures of the consensus. They should follow the visible borders: "
        "look for cortex that runs into the skull or the eyes, for cerebellum taken for cortex, "
        "and for missing pieces.",
    ),
    "volumes": FigureText(
        "Volume of each structure in each member",
        "Dot plot: one row per structure, one dot per member.",
        "Each dot is one member, relative to the mean of the perturbed members. Dots far apart: "
        "the volume depends on rounding errors or on the seed of the training. A diamond outside "
        "the cloud: the unperturbed network is not typical of the ensemble.",
    ),
    "entropy": FigureText(
        "Vote entropy",
        "T1-weighted slices with the entropy of the members' votes in colour.",
        "Disagreement of the perturbed members about the label of a voxel, in bit: 0 where all "
        "agree (not coloured), 1 where they are split in two equal camps. Thin lines at borders "
        "are usual; filled patches are not.",
    ),
    "sigbits": FigureText(
        "Significant bits",
        "T1-weighted slices with low significant bits in colour.",
        "How many leading bits of the consensus label's posterior the perturbed members have in "
        "common: -log2 of standard deviation over mean. Bright means few bits, that is little "
        "trust; 1 bit is a standard deviation of half the mean.",
    ),
    "std": FigureText(
        "Standard deviation of the posterior",
        "T1-weighted slices with the standard deviation of the posterior in colour.",
        "Spread of the consensus label's posterior probability over the perturbed members. It sees "
        "hesitation that does not yet change a vote.",
    ),
    "unreliable": FigureText(
        "Unreliable voxels",
        "T1-weighted slices with the unreliable voxels filled.",
        f"Voxels where fewer than {UNRELIABLE_BELOW:.0%} of the perturbed members chose the "
        "consensus label. Leave them out where a measure must not depend on the ensemble.",
    ),
}

# column: (heading, tooltip, format)
COLUMNS: dict[str, tuple[str, str, str]] = {
    "index": ("Id", "FreeSurfer label id, the value in the dseg files", "{:.0f}"),
    "name": ("Structure", "FreeSurfer name", "{}"),
    "verdict": ("Verdict", "How far the volume can be trusted", "{}"),
    "volume_mean": ("Volume [mm³]", "Mean volume over the perturbed members", "{:,.0f}"),
    "volume_std": ("SD [mm³]", "Standard deviation of the volume over them (N - 1)", "{:,.1f}"),
    "cv": ("CV [%]", "Coefficient of variation: SD divided by mean", "{:.2f}"),
    "sigbits": ("Sig. bits", "Significant bits of the volume over the perturbed members", "{:.1f}"),
    "sigbits_lower": ("Sig. bits, lower", "Lower 95 % confidence bound of them", "{:.1f}"),
    "dice_min": ("Dice min", "Smallest Dice over pairs of perturbed members", "{:.3f}"),
    "dice_mean": ("Dice mean", "Mean Dice over pairs of perturbed members", "{:.3f}"),
    "entropy_mean": ("Entropy [bit]", "Mean vote entropy inside the consensus structure", "{:.3f}"),
    "volume_low": ("Least [mm³]", "Lower limit of plausible volumes", "{:,.0f}"),
    "volume_high": ("Most [mm³]", "Upper limit of plausible volumes", "{:,.0f}"),
    "reason": ("Why", "Why the verdict is not good, the worst reason first", "{}"),
}
PERCENT = {"cv"}
MARKS = {"good": "✓ good", "caution": "! caution", "unknown": "? unknown",
         "unreliable": "✗ unreliable"}  # fmt: skip
SOURCE = (
    "set by the authors of this package; no norms. For norms: Potvin et al. (2016), NeuroImage "
    "137, 9-20, doi:10.1016/j.neuroimage.2016.05.016."
)


def write_participant_report(path: Path, content: ReportContent) -> Path:
    """Write the report and, beside it, its figures as ``sub-XX/figures/*.png``.

    The same content gives the same bytes.

    Parameters
    ----------
    path : Path
        ``<output>/sub-XX.html``; the figures go to ``<output>/sub-XX/figures``.
    content : ReportContent

    Returns
    -------
    Path
        `path`.

    Raises
    ------
    OutputError
        If a file cannot be written.
    """
    path = Path(path)
    folder = path.parent / path.stem / "figures"
    for scan in content.scans:
        for name, png in scan.figures.items():
            with replacing(folder / figure_name(scan.prefix, name)) as stream:
                stream.write(png)
    return write_text(render_participant_report(content), path)


def figure_name(prefix: str, name: str) -> str:
    """File name of a figure.

    Examples
    --------
    >>> figure_name("sub-01_run-2", "entropy")
    'sub-01_run-2_desc-entropy_T1w.png'
    """
    clean = FORBIDDEN_IN_FILE_NAMES.sub("", prefix), FORBIDDEN_IN_FILE_NAMES.sub("", name)
    return "{}_desc-{}_T1w.png".format(*clean)


def render_participant_report(content: ReportContent) -> str:
    """Return the report as one HTML text; every value is escaped."""
    ensemble = content.ensemble
    return render_page(
        "participant.html",
        subject=content.subject,
        sloppy=bool(content.settings.get("sloppy")),
        scans=[_scan_context(scan, n) for n, scan in enumerate(content.scans, start=1)],
        settings={name: _plain(value) for name, value in content.settings.items()},
        ensemble=ensemble,
        member_columns=[
            c
            for c in ("id", "family", "seed", "precision", "sha256")
            if any(c in m for m in ensemble["members"])
        ],
        versions=content.versions,
        citation=content.citation,
        verdicts=VERDICTS,
        marks=MARKS,
    )


def _scan_context(scan: ScanReport, number: int) -> dict[str, Any]:
    known = [name for name in FIGURE_TEXTS if name in scan.figures]
    others = [name for name in scan.figures if name not in FIGURE_TEXTS]
    # The verdict beside the name, so that a narrow screen shows both.
    first = [c for c in ("index", "name", "verdict", "reason") if c in scan.regions]
    regions = scan.regions[[*first, *scan.regions.columns.drop(first)]]
    return {
        "anchor": f"scan-{number}",
        "prefix": scan.prefix,
        "figures": [
            {
                "text": FIGURE_TEXTS.get(name, FigureText(name, name, "")),
                "anchor": f"scan-{number}-figure-{position}",
                "wide": name != "volumes",
                "uri": "data:image/png;base64," + base64.b64encode(scan.figures[name]).decode(),
            }
            for position, name in enumerate(known + others, start=1)
        ],
        "columns": [_column(c) for c in regions.columns],
        "rows": [_region_row(row) for _, row in regions.iterrows()],
        "source": f"{scan.limits.rstrip('.')}, {SOURCE}" if scan.limits else "",
        "volumes": _volume_table(scan.members),
        "warnings": list(scan.warnings),
        "provenance": {name: _plain(value) for name, value in scan.provenance.items()},
    }


def _column(name: str) -> dict[str, str]:
    if name in COLUMNS:
        return {"heading": COLUMNS[name][0], "tooltip": COLUMNS[name][1]}
    # dice_min_mca and the like: the measure of the whole, within one family
    for base in sorted(COLUMNS, key=len, reverse=True):
        if name.startswith(f"{base}_"):
            family = name[len(base) + 1 :]
            heading, tooltip, _ = COLUMNS[base]
            return {"heading": f"{heading} {family}", "tooltip": f"{tooltip}, family {family} only"}
    return {"heading": name, "tooltip": name}


def _cell(name: str, value: Any) -> dict[str, Any]:
    """Text, sort key and kind of a cell of the table of regions."""
    if name == "verdict":
        rank = list(VERDICTS).index(value) if value in VERDICTS else ""
        return {"text": MARKS.get(value, str(value)), "key": str(rank), "kind": "text"}
    if name in ("name", "reason") or isinstance(value, str):
        text = "" if pd.isna(value) else str(value)
        return {"text": text, "key": text, "kind": "text long" if name == "reason" else "text"}
    if pd.isna(value):
        return {"text": "n/a", "key": "", "kind": ""}
    base = next((c for c in (name, name.rpartition("_")[0]) if c in COLUMNS), None)
    shown = 100 * float(value) if base in PERCENT else float(value)
    text = (COLUMNS[base][2] if base else "{:.4g}").format(shown)
    return {"text": text, "key": repr(shown), "kind": ""}


def _region_row(row: pd.Series) -> dict[str, Any]:
    """Cells, and the verdict as a class of the row where it is not good."""
    verdict = row.get("verdict")
    return {
        "verdict": verdict if verdict in VERDICTS and verdict != "good" else "",
        "cells": [_cell(name, value) for name, value in row.items()],
    }


def _volume_table(members: pd.DataFrame) -> dict[str, Any]:
    """Structures x members, in the order of the table."""
    if members.empty:
        return {"members": [], "rows": []}
    wide = members.pivot_table(index="index", columns="member", values="volume", sort=False)
    names = dict(zip(members["index"], members["name"], strict=True))
    rows = [
        [str(names[index])] + ["n/a" if pd.isna(v) else f"{v:,.0f}" for v in values]
        for index, values in zip(wide.index, wide.to_numpy(), strict=True)
    ]
    return {"members": [str(m) for m in wide.columns], "rows": rows}


def _plain(value: Any) -> str:
    """A setting as a reader writes it."""
    if value is None or value == () or value == {} or value == []:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(str(v) for v in value)
    if isinstance(value, Mapping):
        return ", ".join(f"{k}: {v}" for k, v in value.items())
    return str(value)
