"""The derivatives of one T1w image in the template's space, and the transforms that lead there and back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import nibabel as nib
import numpy as np
from nibabel.spatialimages import SpatialImage

from bids_varaug.derivatives.io import write_output
from bids_varaug.derivatives.names import ALL_OUTPUTS, ScanRequest
from bids_varaug.derivatives.scan import header_fields, is_skull_stripped
from bids_varaug.derivatives.sidecars import sidecar
from bids_varaug.files import write_json
from bids_varaug.images.conform import Geometry
from bids_varaug.registration.space import Grid, OutputSpace
from bids_varaug.registration.spread import (
    check_quality,
    describe,
    displacement_sd,
    displacements_in_brain,
    summarise_spread,
)
from bids_varaug.registration.template import Template, load_template
from bids_varaug.registration.transforms import (
    Registration,
    grid_points,
    head_points,
    sample,
    sample_labels,
    write_itk,
)

# Of each image in the template's space, the one in the T1w's grid that it is resampled from.
RESAMPLED = {
    "t1w_in_space": None,
    "dseg_in_space": "consensus_dseg",
    "unreliable_in_space": "unreliable_mask",
    "entropy_in_space": "entropy",
    "sigbits_in_space": "sigbits",
}
_SLABS = 16  # at once
_MNI152 = 4  # NIfTI's code


def write_in_spaces(request: ScanRequest, geometry_file: Path, registration_files: Sequence[Path | str]) -> list[Path]:
    """Write what `write_scan` wrote in each output space too, with transforms and spread; return the files.

    Images are resampled from the files in the T1w's grid, so that whoever applies the transforms gets the same.
    `registration_files` are of the consensus, then of the perturbed members, if there are several.
    """
    consensus, *members = (Registration.load(Path(file)) for file in registration_files)
    template = load_template([int(label.index) for label in request.ensemble.labels])
    forward, inverse = (consensus.field(template.grid, way) for way in (False, True))
    quality, spread, sd = check_quality(consensus, template, forward, inverse), None, None
    if members:
        displacements = displacements_in_brain(members, consensus, template)
        spread = summarise_spread(members, displacements, template)
        sd = np.zeros(template.grid.shape, np.float32)
        sd[template.labels > 0] = displacement_sd(displacements)
    figures = describe(quality, spread) | {"RefinementIterations": request.settings.refine}
    if not request.settings.refine:  # relative to the consensus's affine there is nothing else to have bits of
        figures = {name: value for name, value in figures.items() if not name.startswith("SignificantBits")}
    geometry = Geometry.load(geometry_file)
    stripped = is_skull_stripped(geometry, _read(request.path("consensus_dseg")))
    written = []
    for space in map(OutputSpace.parse, request.settings.output_spaces):
        images = _resample(request, consensus, forward, geometry.native_affine, template, space)
        if sd is not None:
            images["displacement_sd"] = sd
            if space.grid is not template.grid:
                points = grid_points(space.grid)
                images["displacement_sd"] = sample(sd, template.grid.affine, points).reshape(space.grid.shape)
        for key, back in (("to_space", False), ("from_space", True)):
            written.append(write_itk(consensus, template.grid, request.path(key, space=space), back))
            write_json(sidecar(request, key, extra=figures), request.sidecar(key, space=space))
        for key in (*RESAMPLED, "displacement_sd"):
            path = request.path(key, space=space)
            if key not in images:  # no spread: an earlier run's would be taken for this one's
                path.unlink(missing_ok=True)
                request.sidecar(key, space=space).unlink(missing_ok=True)
                continue
            output, header, fields = ALL_OUTPUTS[key], template_header(space.grid), header_fields(request, key)
            precision = write_output(output, images[key], space.grid.affine, path, header, **fields)
            written.append(path)
            content = sidecar(request, key, skull_stripped=stripped, extra=_about(request, space) | precision)
            write_json(content, request.sidecar(key, space=space))
    return written


def _resample(
    request: ScanRequest, consensus: Registration, forward: np.ndarray, affine: np.ndarray, template: Template,
    space: OutputSpace,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Images on the grid of a space, by key, of those that there are in the T1w's grid."""
    sources, found = {}, {}
    for key, source in RESAMPLED.items():
        path = request.scan.path if source is None else request.path(source)
        if path.exists():
            sources[key] = _read(path)
            found[key] = np.zeros(space.grid.shape, sources[key].dtype if _is_labels(key) else np.float32)
    for start in range(0, space.grid.shape[0], _SLABS):
        slabs = slice(start, start + _SLABS)
        points = head_points(consensus, forward, template.grid, grid_points(space.grid, slabs))
        for key, values in sources.items():
            resample = sample_labels if _is_labels(key) else sample
            found[key][slabs] = resample(values, affine, points).reshape(found[key][slabs].shape)
    return found


def _is_labels(key: str) -> bool:
    return ALL_OUTPUTS[key].suffix in ("dseg", "mask")


def _read(path: Path) -> np.ndarray:
    data = np.asanyarray(cast(SpatialImage, nib.load(path)).dataobj)
    return data.reshape(data.shape[:3])  # a T1w may have a fourth axis of one


def _about(request: ScanRequest, space: OutputSpace) -> dict[str, Any]:
    """What the sidecar of an image in a space says beside the rest."""
    transform = request.path("to_space", space=space).relative_to(request.settings.output_dir).as_posix()
    resolution = {"Resolution": f"Voxels of {space.grid.affine[0, 0]:g} mm, TemplateFlow's grid"}
    return {"Transform": f"bids::{transform}"} | (resolution if space.resolution else {})


def template_header(grid: Grid) -> nib.Nifti1Header:
    """Header that says that the grid is in MNI152 space."""
    header = nib.Nifti1Header()
    header.set_data_shape(grid.shape)
    header.set_sform(grid.affine, _MNI152)
    header.set_qform(grid.affine, _MNI152)
    return header
