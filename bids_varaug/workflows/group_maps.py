"""Maps of a group in the template's space: images, a table and a page; no ages are needed."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import nibabel as nib
import numpy as np
import pandas as pd
from nibabel.spatialimages import SpatialImage
from tqdm import tqdm

from bids_varaug.brainage.cohort import Cohort
from bids_varaug.derivatives import names
from bids_varaug.derivatives.citation import cite
from bids_varaug.derivatives.in_space import template_header
from bids_varaug.derivatives.io import write_output, write_table
from bids_varaug.derivatives.names import OUTPUTS, SPACE_OUTPUTS, Output, table_columns
from bids_varaug.derivatives.sidecars import describe_columns
from bids_varaug.errors import NoInputError
from bids_varaug.files import write_json
from bids_varaug.inputs.tables import some
from bids_varaug.models.ensemble import Label
from bids_varaug.registration.group_maps import MAPS, GroupMaps
from bids_varaug.registration.space import OutputSpace
from bids_varaug.registration.template import find_template_t1w
from bids_varaug.reports.registration import group_maps_page
from bids_varaug.settings import Settings
from bids_varaug.workflows.quality import note, run_info

KEYS = {"labels": "dseg_in_space"} | {name: f"{name}_in_space" for name in MAPS}
DESCRIPTIONS = {
    "entropy": ("Mean over participants of the vote entropy.", "bit"),
    "sigbits": ("Mean over participants of the significant bits of the consensus label's posterior.", "bit"),
    "unreliable": ("Share of the participants with an unreliable voxel.", "1"),
}


def write_group_maps(settings: Settings, cohort: Cohort, notes: Sequence[str]) -> Path:
    """Average the participants' maps in each output space; write images, table and page; return the page.

    Participants with several images count once. Images without maps in the space are listed and left out; NoInputError
    if no image has any.
    """
    template_t1w = find_template_t1w(settings.allow_downloads)
    pages: list[Path] = []
    for space in map(OutputSpace.parse, settings.output_spaces):
        maps, structures, left_out = _average(settings.output_dir, cohort, space)
        if left_out:
            note(
                [f"Group maps of {space.name}{space.entity}: {len(left_out)} image(s) left out: {some(list(left_out))}"]
            )
        folder = settings.output_dir / names.GROUP_MAPS
        regions = maps.region_table([label.name for label in structures])
        _write(folder, space, maps, structures)
        path = folder / f"space-{space.name}{space.entity}_regions.tsv"
        write_table(regions, path)
        write_json(describe_columns(table_columns("group_regions")), path.with_suffix(".json"))
        citation = cite("maps", space=space.name, n=round(maps.weight))
        run = run_info(settings, cohort, notes, citation, {"output_spaces": settings.output_spaces}, "CITATION_maps")
        page = group_maps_page(run, maps, regions, structures, space, template_t1w, left_out)
        ending = f"{space.entity.replace('_', '-')}.html" if pages else ".html"
        pages.append(page.write(settings.output_dir, names.MAPS_REPORT.replace(".html", ending)))
    return pages[0]


def _average(
    output_dir: Path, cohort: Cohort, space: OutputSpace
) -> tuple[GroupMaps, list[Label], dict[str, str]]:  # fmt: skip
    """Maps, their classes, background first, and why images are left out."""
    no_maps = NoInputError(
        f"{output_dir}: no image has maps in {space.name}{space.entity}. Run the participant level with "
        "--output-spaces and two perturbed members or more first; FastSurfer's networks have none."
    )
    if not (output_dir / names.LOOKUP_TABLE).is_file():
        raise no_maps
    table = pd.read_csv(output_dir / names.LOOKUP_TABLE, sep="\t", usecols=["index", "name", "color"])
    structures = [Label(**row) for row in table.to_dict("records")]
    files, left_out = {}, {}
    people = cohort.people.set_index("observation")
    for image, who in people["participant_id"].items():
        session = people.loc[image, "session_id"]
        folder = output_dir / who / (session if isinstance(session, str) else "") / "anat"
        paths = {name: folder / SPACE_OUTPUTS[key].name(str(image), space=space) for name, key in KEYS.items()}
        missing = [path.name for path in paths.values() if not path.is_file()]
        if missing:
            advice = "run the participant level with --output-spaces and two members or more"
            left_out[str(image)] = f"{missing[0]} is missing: {advice}"
        else:
            files[str(image)] = who, paths
    counts = Counter(who for who, _ in files.values())
    maps = GroupMaps(space.grid.shape, [label.index for label in structures])
    for image, (who, paths) in tqdm(files.items(), desc="Averaging maps", unit="image", disable=None):
        if reason := _add(maps, paths, 1 / counts[who]):
            left_out[image] = f"its maps cannot be read ({reason}): run the participant level again"
    if not maps.weight:
        raise no_maps
    return maps, structures, left_out


def _add(maps: GroupMaps, paths: Mapping[str, Path], weight: float) -> str | None:
    """Add an image; return why it cannot be read, if so."""
    try:
        arrays = {name: _read(path) for name, path in paths.items()}
        maps.add(arrays.pop("labels"), arrays, weight)
    except (OSError, EOFError, ValueError, zlib.error, nib.filebasedimages.ImageFileError) as error:
        return str(error)
    return None


def _read(path: Path) -> np.ndarray:
    return np.asarray(cast(SpatialImage, nib.load(path)).dataobj)


def _write(folder: Path, space: OutputSpace, maps: GroupMaps, structures: Sequence[Label]) -> None:
    def write(name: str, data: np.ndarray, like: Output, about: Mapping[str, Any]) -> None:
        path, header = folder / f"space-{space.name}{name}", template_header(space.grid)
        precision = write_output(like, data, space.grid.affine, path.with_suffix(".nii.gz"), header)
        write_json({**about, "Participants": round(maps.weight), **precision}, path.with_suffix(".json"))

    for name, (text, unit) in DESCRIPTIONS.items():
        mean, about = np.nan_to_num(maps.mean(name)), {"Description": text, "Units": unit}
        write(f"{space.entity}_stat-{name}mean_statmap", mean, SPACE_OUTPUTS[KEYS[name]], about)
    stacked = np.stack([np.rint(255 * maps.probability(k)).astype(np.uint8) for k in range(len(structures))], axis=-1)
    text = "Share of the participants that have a label."
    labels = {"Description": text, "LabelMap": [label.name for label in structures]}
    write(f"_seg-varaug{space.entity}_probseg", stacked, OUTPUTS["mean_probseg"], labels)
