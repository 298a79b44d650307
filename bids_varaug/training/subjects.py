"""Training subjects: a label map each, and its T1w image where real images are mixed in.

What training cannot use is refused with a `UserError` that names the file.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import nibabel as nib
import numpy as np
import torch
from nibabel.spatialimages import SpatialImage
from scipy.spatial import cKDTree

from bids_varaug.errors import UserError
from bids_varaug.images.crop import bounds
from bids_varaug.images.intensity import normalise_intensity
from bids_varaug.training.labels import LabelScheme

_IS_LEFT = re.compile(r"left|lh|(?<![a-z])l(?![a-z])", re.IGNORECASE)
_MIDLINE_SHARE, _MIDLINE_MM = 0.95, 6.0  # brain stems are a few millimetres off
_MIN_VOXELS = 200


@dataclass(frozen=True)
class TrainingSubject:
    """What images are drawn from."""

    classes: torch.Tensor  # (X, Y, Z) uint8, generation class, RAS axes, 1 mm
    # (X, Y, Z) float32, in [0, 1.5] as `normalise_intensity` leaves it; None to draw synthetic images only.
    t1w: torch.Tensor | None = None


def find_label_maps(directory: Path) -> list[Path]:
    """Return the label maps of a folder or of a BIDS derivative (``*_dseg.nii.gz``), sorted; at least one."""
    found = sorted(directory.rglob("*_dseg.nii*")) or sorted(directory.glob("*.nii*"))
    if not found:
        raise UserError(f"{directory}: no label map (*_dseg.nii.gz or *.nii.gz) to train on.")
    return found


def load_subjects(
    paths: Sequence[Path], scheme: LabelScheme, device: str, with_images: bool = False
) -> list[TrainingSubject]:
    """Read label maps and, if wanted, the T1w image beside each, which one at least must have."""
    subjects = []
    for path in paths:
        classes = load_label_map(path, scheme)
        check_laterality(classes, scheme, path)
        t1w = load_t1w_of(path) if with_images else None
        subjects.append(TrainingSubject(torch.from_numpy(classes).to(device), None if t1w is None else t1w.to(device)))
    if with_images and all(subject.t1w is None for subject in subjects):
        raise UserError(
            f"{paths[0].parent}: no *_T1w.nii.gz beside any label map. Put them there (the name up to _T1w is that of "
            "the label map up to its _desc-, _seg- or _dseg), or leave out --real-share."
        )
    return subjects


def open_image(path: Path) -> SpatialImage:
    """Return an image whose voxels are not read yet."""
    return cast(SpatialImage, nib.load(path))


def load_label_map(path: Path, scheme: LabelScheme) -> np.ndarray:
    """Read a label map as generation classes, (X, Y, Z) uint8 in RAS orientation at 1 mm, cropped to the head."""
    image = nib.as_closest_canonical(open_image(path))
    zooms = np.array(image.header.get_zooms()[:3])
    if not np.allclose(zooms, 1.0, atol=0.01):
        raise UserError(f"{path}: voxels of {zooms} mm; training needs label maps at 1 mm.")
    values = np.asanyarray(image.dataobj)
    labels = values.astype(np.int32)
    if not np.array_equal(labels, values):
        raise UserError(f"{path}: fractional values; a label map holds whole numbers.")
    if not labels.any():
        raise UserError(f"{path}: the label map is empty.")
    labels = merge_labels(labels[crop_to_labels(labels)], scheme)
    unknown = np.setdiff1d(labels, scheme.ids)
    if unknown.size:
        raise UserError(
            f"{path}: label(s) {unknown.tolist()[:10]} are not in the label table; add a row for each, or pass a table "
            "with --label-table."
        )
    return np.searchsorted(scheme.ids, labels).astype(np.uint8)


def crop_to_labels(labels: np.ndarray) -> tuple[slice, ...]:
    """Return the smallest box (as an index) with all labels of a map (X, Y, Z)."""
    return tuple(slice(a, b) for a, b in zip(*bounds(labels != 0), strict=True))


def merge_labels(labels: np.ndarray, scheme: LabelScheme) -> np.ndarray:
    """Replace ids (X, Y, Z) that the table lists as `also` by those that they count as.

    An id without a side (FreeSurfer's corpus callosum, WM hypointensities) goes, voxel by voxel, to the side of the
    nearest voxel of the same target structure; without such voxels it stays. Voxels are about as long as wide.
    """
    merged = labels.copy()
    present = [int(i) for i in np.unique(labels) if int(i) in scheme.also]
    for also in (i for i in present if len(scheme.also[i]) == 1):
        merged[labels == also] = scheme.also[also][0]
    whole = merged.copy()
    for sides in {scheme.also[i] for i in present if len(scheme.also[i]) > 1}:
        voxels = np.argwhere(np.isin(labels, [i for i in present if scheme.also[i] == sides]))
        distances = np.full((len(sides), len(voxels)), np.inf)
        for n, side in enumerate(sides):
            same = scheme.ids[scheme.targets == scheme.targets[scheme.ids == side]]
            if len(near := np.argwhere(np.isin(whole, same))):
                distances[n] = cKDTree(near, balanced_tree=False, compact_nodes=False).query(voxels)[0]
        if np.isfinite(distances).any():
            merged[tuple(voxels.T)] = np.array(sides)[distances.argmin(axis=0)]
    return merged


def load_t1w_of(label_map: Path) -> torch.Tensor | None:
    """Read the T1w image of a label map, on its grid, as `TrainingSubject` holds it; None without one."""
    stem = re.split("_dseg|_desc-|_seg-", label_map.name)[0]
    found = sorted(label_map.parent.glob(f"{stem}_T1w.nii*")) or sorted(label_map.parent.glob(f"{stem}_*T1w.nii*"))
    if not found:
        return None
    image, labels = open_image(found[0]), open_image(label_map)
    if image.shape != labels.shape or not np.allclose(image.affine, labels.affine, atol=1e-3):
        raise UserError(
            f"{found[0]}: not on the grid of its label map {label_map.name}. Resample one to the other, or leave out "
            "--real-share."
        )
    data = nib.as_closest_canonical(image).get_fdata(dtype=np.float32)
    box = crop_to_labels(np.asanyarray(nib.as_closest_canonical(labels).dataobj))
    return normalise_intensity(torch.from_numpy(np.ascontiguousarray(data[box])))


def check_laterality(classes: np.ndarray, scheme: LabelScheme, path: Path) -> None:
    """Check that no left structure of a label map (as `load_label_map` reads it) lies to the right of its counterpart.

    A learnt structure without a counterpart must not lie on one side of the middle only, and away from it.
    """
    mirror, names = scheme.mirror, scheme.names
    is_single = mirror == np.arange(len(names))
    counts = np.stack([np.bincount(plane.ravel(), minlength=len(names)) for plane in classes])
    total = counts.sum(0)
    x = np.arange(len(counts))
    centre = x @ counts / np.maximum(total, 1)
    for k in np.flatnonzero(~is_single & (total > 0) & (total[mirror] > 0)):
        if _IS_LEFT.search(names[k]) and centre[k] > centre[mirror[k]]:
            raise UserError(
                f"{path}: {names[k]} lies to the right of {names[mirror[k]]}. Either the label table has them the "
                "wrong way round, or the image's affine is wrong."
            )
    learnt = scheme.targets > 0
    inside = counts[:, learnt].sum(1)
    middle = x @ inside / max(inside.sum(), 1)
    left_share = counts[: round(middle)].sum(0) / np.maximum(total, 1)
    one_sided = np.maximum(left_share, 1 - left_share) > _MIDLINE_SHARE
    one_sided &= np.abs(centre - middle) > _MIDLINE_MM
    alone = np.flatnonzero(learnt & is_single & one_sided & (total > _MIN_VOXELS))
    if alone.size:
        raise UserError(
            f"{path}: {names[alone[0]]} lies on one side of the head and has no counterpart in the label table. "
            "Training mirrors half of the images: add a column 'mirror' with the id of the other side."
        )
