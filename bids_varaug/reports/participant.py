"""The participant's report: made from the derivatives alone, one HTML file that needs nothing else."""

from __future__ import annotations

import io
import json
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, cast

import nibabel as nib
import numpy as np
import pandas as pd
from nibabel.affines import voxel_sizes
from nibabel.spatialimages import SpatialImage
from PIL import Image
from scipy.special import chdtri

from bids_varaug.derivatives import names
from bids_varaug.derivatives.citation import cite_participant, percent
from bids_varaug.derivatives.names import Column, ScanRequest, table_columns
from bids_varaug.derivatives.provenance import shown_settings
from bids_varaug.derivatives.sidecars import package_versions
from bids_varaug.errors import ScanError
from bids_varaug.files import replacing, write_text
from bids_varaug.images.load import load_t1w
from bids_varaug.models.ensemble import BASELINE
from bids_varaug.reports.html import data_uri, render_page, run_id, tabulate
from bids_varaug.reports.mosaics import MAP_STYLES, Mosaic
from bids_varaug.reports.plots import draw_volumes, pair_sides, short_name
from bids_varaug.reports.registration import TemplateReport, template_report
from bids_varaug.reports.viewer import (
    ViewerGrid,
    ViewerScan,
    link_to_place,
    view_scan,
    viewer_program,
    voxel_size_for,
)
from bids_varaug.settings import Settings
from bids_varaug.variability.quality import (
    MEMBERS,
    UNRELIABLE_FROM,
    VERDICTS,
    describe_families,
    describe_verdicts,
    split_reasons,
)

MARKS = {"good": "✓ use", "caution": "! use with caution", "unknown": "? not judged", "unreliable": "✗ do not use"}
WORDS = {"good": "to use", "caution": "with caution", "unknown": "not judged", "unreliable": "not to use"}
UNCERTAINTIES = ("total_entropy", "entropy")  # the first that was written is shown in the viewer
FEW_SCANS = 3  # with more of them, a page has the chief figures of each only
COARSE = 1.5  # times the network's voxel size, from which on the page says what that means
CHIEF = ("consensus", *UNCERTAINTIES, "unreliable", "volumes")
WEBP_QUALITY = (85, 65)  # with few scans contours look as in the PNG files beside the page, in a third of the bytes


@dataclass(frozen=True)
class ScanReport:
    """What is shown of one T1w image."""

    prefix: str  # e.g. "sub-01_ses-a_run-1"
    figures: Mapping[str, bytes]  # PNG files in the order shown; those that the template lacks under their own names
    narrow: bytes  # the figure of volumes again, for small screens
    regions: pd.DataFrame  # as in desc-consensus_dseg.tsv
    members: pd.DataFrame  # as in desc-members_morph.tsv
    warnings: Sequence[str] = ()
    limits: str = ""  # whose limits of volume apply
    provenance: Mapping[str, Any] = field(default_factory=dict)  # what was done to this image
    coarse: Sequence[float] = ()  # voxel size [mm], where it is larger than the network's
    look_first: Sequence[Mapping[str, Any]] = ()  # of the sidecar: Structure, Index, World [mm], Reason
    view: ViewerScan = field(default_factory=ViewerScan)
    template: TemplateReport | None = None


def scan_report(request: ScanRequest, n_scans: int = 1) -> ScanReport:
    """Draw one scan's figures and collect its tables and warnings; `ScanError` if one is missing or damaged.

    The more of the `n_scans` share a page, the coarser are the volumes of the viewer.
    """
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
    structures = [label for label in request.ensemble.labels if label.index]
    consensus = _read_image(paths[0])
    mosaic = Mosaic(t1w.data, consensus, t1w.affine)
    grid = ViewerGrid.around(consensus, t1w.affine, voxel_size_for(n_scans))
    figures = {"consensus": mosaic.draw_labels(structures)}
    shown: dict[str, Any] = {}  # in the viewer
    for key, style in MAP_STYLES.items():
        if request.path(key).exists():
            values = _read_image(request.path(key))
            if key == "sigbits":  # 0 outside of the brain mask, where they were not asked for
                values = np.where(_read_image(request.path("brain_mask")) > 0, values, np.nan)
            figures[key] = mosaic.draw_map(values, style)
            if key in UNCERTAINTIES:
                shown.setdefault("maps", {"uncertainty": (grid.values(values), style)})
    if request.path("unreliable_mask").exists():
        mask = _read_image(request.path("unreliable_mask"))
        figures["unreliable"], shown["unreliable"] = mosaic.draw_mask(mask), grid.labels(mask)
    if request.path("ieee_dseg").exists():
        shown["baseline"] = grid.labels(_read_image(request.path("ieee_dseg")))
    figures["volumes"] = draw_volumes(members)
    zooms = voxel_sizes(t1w.affine)
    shape = " x ".join(str(n) for n in t1w.data.shape)
    size = " x ".join(f"{zoom:.2f}" for zoom in zooms)
    return ScanReport(
        request.scan.prefix, {key: figures[key] for key in sorted(figures, key=_place_on_page)},
        draw_volumes(members, narrow=True), regions, members, notes.get("Warnings", []), notes.get("VolumeLimits", ""),
        provenance={"T1w": request.scan.relative, "Grid": f"{shape} voxels of {size} mm"},
        coarse=zooms.round(2).tolist() if zooms.max() > COARSE * request.voxel_size else (),
        look_first=notes.get("LookFirst", []),
        template=template_report(request),
        view=view_scan(grid, structures, grid.values(t1w.data), grid.labels(consensus), **shown),
    )  # fmt: skip


def _place_on_page(figure: str) -> int:
    return CHIEF.index(figure) if figure in CHIEF else len(CHIEF)


def _read_image(path: Path) -> np.ndarray:
    return np.asanyarray(cast(SpatialImage, nib.load(path)).dataobj)


def write_subject_report(requests: Sequence[ScanRequest]) -> Path:
    """Write a report from scans' derivatives and, beside it, figures as ``sub-XX/figures/*.png``; return its path.

    Raises as `scan_report`.
    """
    path = names.report(requests[0].settings.output_dir, requests[0].scan.subject)
    scans = [scan_report(request, len(requests)) for request in requests]
    for scan in scans:
        of_template = scan.template.figures if scan.template else {}
        for name, png in {**scan.figures, **of_template}.items():
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
    has_viewer = any(scan.view.volumes for scan in scans)
    return render_page(
        "participant.html",
        subject=request.scan.subject,
        sloppy=settings.sloppy,
        scans=[_scan_values(scan, n, len(scans)) for n, scan in enumerate(scans, start=1)],
        views=[scan.view.settings for scan in scans] if has_viewer else [],
        program=viewer_program() if has_viewer else None,
        few_scans=FEW_SCANS,
        more_members=_more_members(request),
        voxel_size=request.voxel_size,
        # Whoever else was in the run.
        run_id=run_id(shown_settings(settings), {member.id: member.sha256 for member in members}, package_versions()),
        command=shown_command(request),
        settings=shown_settings(settings),
        ensemble=request.ensemble,
        families={member.family for member in members},
        members=tabulate(rows, columns),
        versions=package_versions(),
        citation=cite_participant(request),
        verdicts=[(MARKS[name], meaning) for name, meaning in VERDICTS.items()],
        unreliable_from=percent(UNRELIABLE_FROM),
    )


def shown_command(request: ScanRequest) -> str:
    """Command line that makes this participant's results again, without paths of this machine.

    Not the one that was typed: another, for more participants or in a job array, must write the same report.
    """
    words = ["bids_varaug", "BIDS_DIR", "OUTPUT_DIR", "participant", "--participant-label", request.scan.subject]
    standard = {item.name: item.default for item in fields(Settings)}
    for name, value in shown_settings(request.settings).items():
        if name == "bids_filters":
            words += ["--bids-filter-file", "FILE"] if value else []
        elif value != standard[name]:
            flag = "--session-label" if name == "session_labels" else f"--{name.replace('_', '-')}"
            words += [flag, *map(str, () if value is True else value if isinstance(value, tuple) else (value,))]
    return shlex.join(words)


def _scan_values(scan: ScanReport, number: int, n_scans: int) -> dict[str, Any]:
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
    anchor = f"scan-{number}"
    classes = scan.regions["verdict"].replace("good", "").tolist()
    places = [link_to_place(anchor, index, scan.view.places.get(index)) for index in scan.regions["index"]]
    quality = WEBP_QUALITY[n_scans > FEW_SCANS]
    few, known = describe_families(n_members), describe_verdicts(scan.regions)
    chief = [name for name in CHIEF if name != "entropy" or "total_entropy" not in scan.figures]
    _, own = split_reasons(scan.regions)  # the answer gives the others, once
    regions = scan.regions.replace({"verdict": MARKS}).assign(reason=["; ".join(reasons) for reasons in own])
    volumes = scan.members.pivot_table(index=["index", "name"], columns="member", values="volume", sort=False)
    volume = table_columns("volumes")["volume"]
    shown = {name: replace(volume, heading=str(name), description="") for name in volumes}
    has_spread = regions[list(within)].notna().to_numpy().any()
    return {
        "anchor": anchor,
        "prefix": scan.prefix,
        **_answer(scan.regions, places),
        "look_first": [
            {"name": short_name(at["Structure"]), "reason": at["Reason"]}
            | link_to_place(anchor, at["Index"], at["World"])
            for at in scan.look_first
        ],
        "coarse": scan.coarse,
        "volumes_3d": scan.view.volumes,
        "figures": [
            (name, name in chief, data_uri(to_webp(png, quality), "webp"))
            for name, png in scan.figures.items() if n_scans <= FEW_SCANS or name in chief
        ],
        "narrow": data_uri(to_webp(scan.narrow, quality), "webp"),
        "regions": tabulate(
            regions, columns | others, classes, {"verdict": list(MARKS.values())}, links={"name": places}
        ),
        "within": tabulate(regions, {"name": columns["name"], **within}, classes) if has_spread else None,
        "families": tabulate(_summarise_families(regions, n_members), table_columns("families")),
        "few_members": few,
        "limits_of_spread": [
            (n, ", ".join(name for name, other in n_members.items() if other == n), spread_limit(n))
            for n in sorted({n for n in n_members.values() if 1 < n < MEMBERS.caution})
        ],
        "limits": scan.limits.rstrip("."),
        "volumes": tabulate(volumes.reset_index(), {"name": table_columns("volumes")["name"], **shown}),
        "warnings": [text for text in scan.warnings if text not in {*few, *known}],  # the answer says those
        "provenance": scan.provenance,
        "template": scan.template,
        "template_figures": {
            name: data_uri(to_webp(png, quality), "webp")
            for name, png in (scan.template.figures if scan.template else {}).items()
        },
    }


def _answer(regions: pd.DataFrame, places: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """What to do with each structure: links by verdict, what all share, all verdicts in a sentence, and the worst."""
    links: dict[str, list[dict[str, str]]] = {verdict: [] for verdict in VERDICTS}
    rank = {name: n for n, name in enumerate(pair_sides(regions["name"]))}
    shared, own = split_reasons(regions)
    columns = (regions["verdict"], regions["name"], own, places)
    for verdict, name, reasons, place in sorted(zip(*columns, strict=True), key=lambda row: rank[row[1]]):
        worst = reasons[0] if reasons and (shared or verdict == "unreliable") else ""
        link = {"name": short_name(name), "reason": worst, **place}
        if not worst and links[verdict] and links[verdict][-1]["name"] == short_name(name.replace("Right-", "Left-")):
            link |= {"name": "R", "label": link["name"]}  # after "Hippocampus  L"
        links[verdict].append(link)
    counts = [f"{len(links[verdict])} {words}" for verdict, words in WORDS.items() if links[verdict]]
    first, _, rest = ", ".join(counts).partition(" ")
    return {
        "answer": [(verdict, mark, links[verdict]) for verdict, mark in MARKS.items() if links[verdict]],
        "shared": "; ".join(shared),
        "sentence": f"{first} {'structure' if first == '1' else 'structures'} {rest}.",
        "worst": max(regions["verdict"], key=list(VERDICTS).index, default="good"),
    }


def _more_members(request: ScanRequest) -> list[str]:
    """Families of which the ensemble has more members than the few that ran."""
    of_ensemble = [member for member in request.ensemble.members if not member.is_baseline]
    there, ran = (Counter(m.family for m in members) for members in (of_ensemble, request.members))
    return [f"{n} of {family}" for family, n in there.items() if ran[family] < min(n, MEMBERS.caution)]


def spread_limit(n_members: int) -> float:
    """How many times the standard deviation over so many members the true one may be (upper 95 % limit, chi-square).

    >>> round(spread_limit(2)), round(spread_limit(5), 1)
    (32, 2.9)
    """
    return float(np.sqrt((n_members - 1) / chdtri(n_members - 1, 0.975)))


def to_webp(png: bytes, quality: int) -> bytes:
    """Return a picture as the page embeds it."""
    stream = io.BytesIO()
    Image.open(io.BytesIO(png)).save(stream, format="WEBP", quality=quality, method=2)
    return stream.getvalue()


def _summarise_families(regions: pd.DataFrame, n_members: Mapping[str, int]) -> pd.DataFrame:
    """One row per family: number of members, and its spread over all structures."""
    rows = []
    for family, n in n_members.items():
        measures = (f"{name}_{family}" for name in ("cv", "dice_min", "entropy_mean"))
        cv, dice, entropy = (regions.get(name, pd.Series([np.nan])) for name in measures)
        spread = {"cv_median": cv.median(), "cv_max": cv.max(), "dice_min": dice.min(), "entropy": entropy.mean()}
        rows.append({"family": family, "n": n, **spread})
    return pd.DataFrame(rows)
