"""Read a label map from which heads can be simulated."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from scipy.fft import next_fast_len
from scipy.ndimage import distance_transform_edt

from bids_varaug.errors import UserError
from bids_varaug.training.labels import LabelScheme, load_scheme
from simulation.growth import FLUID
from simulation.warp import resample_labels

MARGIN_MM = 14.0
"""Empty space around the head, so that a larger one fits."""
NEEDED = (2, 3, 4)
"""White matter, cortex, lateral ventricle: without these there is nothing to age."""
SULCUS_MM, RIM_MM = 6.0, 2.5
"""Gaps up to twice the first are closed with fluid; a rim of the second surrounds the brain."""


@dataclass(frozen=True, eq=False)
class Template:
    """A labelled head.

    Attributes
    ----------
    labels : (X, Y, Z) int16, FreeSurfer ids, RAS, isotropic
    affine : (4, 4) float64, voxel -> mm, RAS+ world
    spacing : mm
    """

    labels: np.ndarray
    affine: np.ndarray
    spacing: float


def read_template(path: Path, spacing: float = 1.0) -> Template:
    """Read a label map onto an isotropic RAS grid cropped to the head, and check it.

    A map without fluid around the brain (id 24), such as the ensemble's own consensus, gets some:
    sulci are filled and a thin rim is laid around, for the brain to shrink in.

    Parameters
    ----------
    path : NIfTI or MGH file, ids of the ensemble and of SynthSeg's head tissues
    spacing : of the result, mm

    Returns
    -------
    Template

    Raises
    ------
    UserError
        If the file cannot be read; is not one volume of whole numbers; has ids that are not in the
        package's label table; lacks white matter, cortex or lateral ventricles; has a structure on
        one side only; or has left and right swapped.
    """
    scheme = load_scheme()
    try:
        image = nib.load(path)
        values = np.asanyarray(image.dataobj)
    except (OSError, ImageFileError, EOFError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a label map ({error}).") from error
    if values.ndim != 3:
        raise UserError(f"{path}: {values.ndim}D image; a label map is one 3D volume.")
    with np.errstate(invalid="ignore"):
        ids = values.astype(np.int32)
    if not np.array_equal(ids, values):
        raise UserError(f"{path}: fractional values; a label map holds whole numbers.")
    _check_ids(path, ids, scheme)
    codes = np.searchsorted(scheme.ids, ids).astype(np.uint8)
    labels, affine = _to_isotropic(codes, image.affine, spacing)
    labels = scheme.ids[labels].astype(np.int16)
    _check_sides(path, labels, scheme)
    if FLUID not in labels:
        labels = add_fluid(labels, spacing)
    return Template(labels, affine, spacing)


def add_fluid(labels: np.ndarray, spacing: float) -> np.ndarray:
    """Fill sulci and gaps with fluid and lay a rim of it around the brain.

    Parameters
    ----------
    labels : (X, Y, Z) integer, 0 outside
    spacing : mm

    Returns
    -------
    (X, Y, Z) as `labels`, with `FLUID` where a closing by `SULCUS_MM`, less `RIM_MM` of its
    erosion, covers empty voxels
    """
    near = distance_transform_edt(labels == 0) * spacing <= SULCUS_MM + RIM_MM
    hull = distance_transform_edt(near) * spacing > SULCUS_MM
    return np.where((labels == 0) & hull, FLUID, labels).astype(labels.dtype)


def _check_ids(path: Path, ids: np.ndarray, scheme: LabelScheme) -> None:
    present = np.unique(ids)
    unknown = np.setdiff1d(present, scheme.ids)
    if unknown.size:
        more = " ..." if unknown.size > 10 else ""
        raise UserError(
            f"{path}: label(s) {unknown.tolist()[:10]}{more} are not known. Use the ids of a "
            "*_dseg.nii.gz of bids_varaug. In a FreeSurfer segmentation merge 31 and 63 into 4 and "
            "43; 77 and 251 to 255 into 2 and 41, by side; 1000 and more into 3, 2000 and more "
            "into 42."
        )
    names = dict(zip(scheme.ids.tolist(), scheme.names, strict=True))
    mirror = dict(zip(scheme.ids.tolist(), scheme.ids[scheme.mirror].tolist(), strict=True))
    needed = {i for left in NEEDED for i in (left, mirror[left])}
    missing = needed - set(present.tolist())
    # Both sides of every structure that the ensemble knows; lesions may well be on one side.
    structures = set(scheme.target_ids[1:])
    alone = {mirror[i] for i in present.tolist() if i in structures} - set(present.tolist())
    if missing or alone:
        absent = ", ".join(f"{names[i]} ({i})" for i in sorted(missing | alone))
        raise UserError(
            f"{path}: lacks {absent}. Heads can be simulated only from a map with white matter, "
            "cortex and lateral ventricles, left and right, and both sides of every structure."
        )


def _check_sides(path: Path, labels: np.ndarray, scheme: LabelScheme) -> None:
    left, right = (np.flatnonzero((labels == i).any((1, 2))).mean() for i in (3, 42))
    if left > right:
        raise UserError(
            f"{path}: left structures lie to the right of right ones. The file's orientation is "
            "wrong, or left and right ids are swapped."
        )


def _to_isotropic(
    codes: np.ndarray, affine: np.ndarray, spacing: float
) -> tuple[np.ndarray, np.ndarray]:
    """Resample codes (0 = empty) to RAS voxels of `spacing` mm around the head."""
    inside = np.argwhere(codes > 0)
    low, high = inside.min(0) - 0.5, inside.max(0) + 0.5
    corners = np.array(np.meshgrid(*zip(low, high, strict=True))).reshape(3, -1)
    world = affine[:3, :3] @ corners + affine[:3, 3:]
    start, stop = world.min(1), world.max(1)
    margin = np.ceil(MARGIN_MM / spacing)
    shape = np.ceil((stop - start) / spacing - 1e-3).astype(int) + 2 * int(margin)
    # Even, two voxels per node of a warp, and quick to transform.
    shape = np.array([2 * next_fast_len(-(-int(n) // 2), real=True) for n in shape])
    new = np.diag([spacing, spacing, spacing, 1.0])
    new[:3, 3] = start - (margin - 0.5) * spacing
    moved = resample_labels(codes, np.linalg.inv(affine) @ new, tuple(int(n) for n in shape))
    return moved, new
