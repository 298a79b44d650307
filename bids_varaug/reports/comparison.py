"""The page, tables and maps of repeated runs of another pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import nibabel as nib
import numpy as np
import pandas as pd
from nibabel.spatialimages import SpatialImage

from bids_varaug.derivatives.citation import cite
from bids_varaug.derivatives.io import write_image, write_table
from bids_varaug.derivatives.names import table_columns
from bids_varaug.derivatives.sidecars import package_versions
from bids_varaug.errors import UserError
from bids_varaug.files import write_json, write_text
from bids_varaug.pipelines.compare import Comparison
from bids_varaug.reports.html import data_uri, render_page, tabulate
from bids_varaug.reports.mosaics import MapStyle, Mosaic

PAGE = "comparison.html"
TITLES = {
    "labels": "Label images", "displacement": "Displacements", "scalar": "Images", "affine": "Affine matrices",
    "table": "Tables",
}  # fmt: skip
_MAPS = {  # title, unit, end of the name
    "labels": ("Vote entropy", "bit", "entropy"), "displacement": ("SD of the displacement", "mm", "sd"),
    "scalar": ("SD", "as stored", "sd"),
}  # fmt: skip


def write_comparison(
    found: Comparison, output_dir: Path, settings: Mapping[str, Any], background: Path | None = None
) -> Path:
    """Write ``comparison.tsv``, maps of spread, ``volumes.tsv`` for the group level's --compare, and the page.

    Maps are drawn over `background`, where it has their grid. Returns the page.
    """
    write_table(found.table, output_dir / "comparison.tsv")
    if len(found.volumes.columns):
        parts = [part for run in found.runs for part in Path(run).parts]
        person = next((part for part in parts if part.startswith("sub-")), "sub-unknown")
        volumes = found.volumes.set_axis(found.runs).rename_axis("member").reset_index()
        volumes.insert(0, "participant_id", str(settings.get("participant") or person))
        write_table(volumes, output_dir / "volumes.tsv")
    figures = []
    for file, (kind, values, affine) in found.maps.items():
        title, unit, ending = _MAPS[kind]
        path = output_dir / f"{file.replace('/', '_').partition('.')[0]}_desc-{kind}_{ending}.nii.gz"
        write_image(values, affine, path)
        about = {"Description": f"{title} over runs, voxel by voxel.", "Units": unit, "File": file, "Runs": found.runs}
        write_json(about, path.with_name(path.name.replace(".nii.gz", ".json")))
        figures.append((file, kind, data_uri(_draw(kind, values, affine, background), "png")))
    tables = {}
    for kind, title in TITLES.items():
        if len(rows := found.table[found.table["kind"] == kind]):
            tables[title] = tabulate(rows, table_columns(f"comparison_{kind}"))
    citation = cite("comparison", n=len(found.runs), kinds=sorted(found.table["kind"].unique()))
    citation.write(output_dir, "CITATION")
    page = render_page(
        "comparison.html", runs=found.runs, notes=found.notes, tables=tables, figures=figures, settings=settings,
        worst=_worst(found.table), versions=package_versions(), sloppy=False,
        citation=citation,
    )  # fmt: skip
    return write_text(page, output_dir / PAGE)


def _worst(table: pd.DataFrame) -> dict[str, Any]:
    """What varies most: the label of the smallest Dice, the largest SD of what is in mm, of others the fewest bits."""
    worst: dict[str, Any] = dict.fromkeys(("dice", "displacement", "affine", "scalar", "table"))
    labels = table[table["kind"] == "labels"].dropna(subset="dice_min")
    if len(labels):
        row = labels.loc[labels["dice_min"].idxmin()]
        worst["dice"] = {key: row[key] for key in ("name", "file", "dice_min")} | {"mean": labels["dice_min"].mean()}
    for kind in ("displacement", "affine"):
        if len(rows := table[table["kind"] == kind]):
            row = rows.loc[rows["sd_max"].idxmax()]
            worst[kind] = {"file": row["file"], "median": row["sd"], "max": row["sd_max"]}
    for kind in ("scalar", "table"):
        if len(rows := table[table["kind"] == kind]):
            row = rows.loc[rows["sigbits"].idxmin()]
            worst[kind] = dict(row[["file", "name", "sigbits"]]) | {"n": len(rows), "median": rows["sigbits"].median()}
    return worst


def _draw(kind: str, values: np.ndarray, affine: np.ndarray, background: Path | None) -> bytes:
    """Mosaic of a map of spread."""
    under = values
    if background is not None:
        image = cast(SpatialImage, nib.load(background))
        if image.shape[:3] != values.shape or not np.allclose(image.affine, affine, atol=1e-3):
            raise UserError(f"{background}: has another grid than the images. Leave --background out, or resample it.")
        under = np.asarray(image.dataobj, np.float32).reshape(values.shape)
    title, unit, _ = _MAPS[kind]
    high = float(np.percentile(values[values > 0], 99)) if (values > 0).any() else 1.0
    inside = (values > 0) if background is None else under > np.percentile(under, 50)
    style = MapStyle(title, unit, 0.0, high, 0.02 * high, 0.3 * high, "plasma")
    return Mosaic(under, inside.astype(np.uint8), affine).draw_map(values, style)
