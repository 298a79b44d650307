"""What reports show of the template's space: a participant's registration, and the maps of a group."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import nibabel as nib
import numpy as np
import pandas as pd
from nibabel.spatialimages import SpatialImage

from bids_varaug.derivatives.names import ScanRequest, table_columns
from bids_varaug.errors import ScanError
from bids_varaug.models.ensemble import Label
from bids_varaug.registration.group_maps import GroupMaps
from bids_varaug.registration.space import OutputSpace
from bids_varaug.registration.transforms import grid_points, sample
from bids_varaug.reports.group import Page, RunInfo, make_page
from bids_varaug.reports.html import data_uri, tabulate
from bids_varaug.reports.mosaics import MapStyle, Mosaic
from bids_varaug.reports.viewer import ViewerGrid, link_to_place, view_scan, voxel_size_for
from bids_varaug.variability.measures import FLOAT32_BITS

SD_STYLE = MapStyle("Standard deviation of the displacement", "mm", 0.0, 2.0, 0.0, 0.5, "plasma")
# Levels of the template's intensity whose borders are drawn: quantiles of its brain.
_LEVELS = (0.12, 0.55)
_EDGES = tuple(Label(n, "edges of the template", "#56b4e9") for n in range(1, len(_LEVELS) + 2))


@dataclass(frozen=True)
class TemplateReport:
    """What is shown of one T1w image in the template's space."""

    space: str
    figures: dict[str, bytes]  # PNG files by name: template, displacement_sd
    figures_of: dict[str, Any]  # numbers of the transform's sidecar


def template_report(request: ScanRequest) -> TemplateReport | None:
    """Draw a scan in its first output space; None without any, `ScanError` if a file is missing or damaged."""
    settings = request.settings
    if not settings.output_spaces or settings.template_t1w is None:
        return None
    space = OutputSpace.parse(settings.output_spaces[0])
    paths = {key: request.path(key, space=space) for key in ("t1w_in_space", "displacement_sd")}
    try:
        numbers = dict(json.loads(request.sidecar("to_space", space=space).read_bytes()))
        t1w = _read(paths["t1w_in_space"])
        levels = template_levels(settings.template_t1w, space)
        mosaic = Mosaic(t1w, levels, space.grid.affine)
        figures = {"template": mosaic.draw_labels(_EDGES)}
        if paths["displacement_sd"].exists():
            figures["displacement_sd"] = mosaic.draw_map(_read(paths["displacement_sd"]), SD_STYLE)
    except (OSError, ValueError, TypeError, nib.filebasedimages.ImageFileError) as error:
        raise ScanError(
            f"{paths['t1w_in_space']}: missing or damaged ({error}). Run without --reports-only."
        ) from error
    return TemplateReport(settings.output_spaces[0], figures, numbers)


@cache
def template_levels(path: Path, space: OutputSpace) -> np.ndarray:
    """Template's T1w in levels (X, Y, Z) uint8 on a space's grid: 0 outside the brain, dark, grey, white matter."""
    found = template_image(path, space)
    brain = found > 0
    return (brain * (1 + np.digitize(found, np.quantile(found[brain], _LEVELS)))).astype(np.uint8)


def template_image(path: Path, space: OutputSpace) -> np.ndarray:
    """Template's T1w image (X, Y, Z) float32 on a space's grid."""
    image = cast(SpatialImage, nib.load(path))
    data = np.asarray(image.dataobj, np.float32)
    return sample(data, np.asarray(image.affine), grid_points(space.grid)).reshape(space.grid.shape)


def _read(path: Path) -> np.ndarray:
    return np.asanyarray(cast(SpatialImage, nib.load(path)).dataobj)


GROUP_STYLES = {
    "entropy": MapStyle("Mean vote entropy", "bit", 0.0, 1.0, 0.0, 0.15, "plasma"),
    "unreliable": MapStyle("Share with an unreliable voxel", "1", 0.0, 0.5, 0.0, 0.1, "plasma"),
    "sigbits": MapStyle("Mean significant bits", "bit", 0.0, 8.0, 8.0, 6.0, "plasma_r"),
}


def group_maps_page(
    run: RunInfo, maps: GroupMaps, regions: pd.DataFrame, structures: Sequence[Label], space: OutputSpace,
    template_t1w: Path, left_out: Mapping[str, str],
) -> Page:  # fmt: skip
    """Page of a group's maps over the template's T1w image; `left_out` are images without maps, and why.

    `structures` are those of the maps' classes, background first.
    """
    t1w, means = template_image(template_t1w, space), {name: maps.mean(name) for name in GROUP_STYLES}
    labels = maps.label_ids[maps.most_probable()]
    mosaic = Mosaic(t1w, (labels > 0).astype(np.uint8), space.grid.affine)
    figures = {name: mosaic.draw_map(means[name], style) for name, style in GROUP_STYLES.items()}
    grid = ViewerGrid.around(labels, space.grid.affine, voxel_size_for(1))
    shown = {  # where nobody has a structure, all are sure of the background
        f"mean_{name}": (grid.values(np.nan_to_num(means[name], nan=FLOAT32_BITS)), style)
        for name, style in GROUP_STYLES.items()
    }
    view = view_scan(grid, structures[1:], grid.values(t1w), grid.labels(labels), maps=shown)
    places = [link_to_place("scan-1", index, view.places.get(index)) for index in regions["index"]]
    return make_page(
        "group_maps.html",
        replace(run, left_out={**run.left_out, **left_out}),
        space=f"{space.name}{space.entity.replace('_', ', ')}",
        n_people=round(maps.weight),
        figures={name: data_uri(png, "png") for name, png in figures.items()},
        regions=tabulate(regions, table_columns("group_regions"), links={"name": places}),
        worst=[{"name": name, **place} for name, place in zip(regions["name"].head(3), places, strict=False)],
        view=asdict(view),
    )
