"""Heads to train on: a label map each, and its T1w image where it is to be mixed in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from bids_varaug.errors import UserError
from bids_varaug.images.intensity import normalise_intensity
from bids_varaug.training.labels import LabelScheme, crop_to_labels, load_label_map
from bids_varaug.training.sides import check_sides


@dataclass(frozen=True)
class Head:
    """What images are drawn from.

    Attributes
    ----------
    classes : (X, Y, Z) uint8, generation class, RAS axes, 1 mm
    t1w : (X, Y, Z) float32, in [0, 1.5] as `normalise_intensity` leaves it; None to draw synthetic
        images only
    """

    classes: torch.Tensor
    t1w: torch.Tensor | None = None


def load_heads(
    paths: Sequence[Path], scheme: LabelScheme, device: str, with_images: bool = False
) -> list[Head]:
    """Read label maps and, if wanted, the T1w image beside each.

    Raises
    ------
    UserError
        If a label map cannot be used, left and right are not where they belong, or no T1w image
        that is wanted is there.
    """
    heads = []
    for path in paths:
        classes = load_label_map(path, scheme)
        check_sides(classes, scheme, path)
        image = load_image_of(path) if with_images else None
        heads.append(Head(
            torch.from_numpy(classes).to(device),
            None if image is None else torch.from_numpy(image).to(device),
        ))  # fmt: skip
    if with_images and all(head.t1w is None for head in heads):
        raise UserError(
            f"{paths[0].parent}: no *_T1w.nii.gz beside any label map. Put them there (the name up "
            "to _T1w is that of the label map up to its _desc-, _seg- or _dseg), or leave out "
            "--real-share."
        )
    return heads


def load_image_of(label_map: Path) -> np.ndarray | None:
    """Read the T1w image of a label map, cropped as `load_label_map` crops; None without one.

    Returns
    -------
    (X, Y, Z) float32, in [0, 1.5], RAS axes, 1 mm

    Raises
    ------
    UserError
        If it is on another grid than its label map.
    """
    stem = label_map.name.split("_dseg")[0].split("_desc-")[0].split("_seg-")[0]
    found = sorted(label_map.parent.glob(f"{stem}_T1w.nii*"))
    found = found or sorted(label_map.parent.glob(f"{stem}_*T1w.nii*"))
    if not found:
        return None
    image, labels = nib.load(found[0]), nib.load(label_map)
    if image.shape != labels.shape or not np.allclose(image.affine, labels.affine, atol=1e-3):
        raise UserError(
            f"{found[0]}: not on the grid of its label map {label_map.name}. Resample one to the "
            "other, or leave out --real-share."
        )
    data = nib.as_closest_canonical(image).get_fdata(dtype=np.float32)
    box = crop_to_labels(np.asanyarray(nib.as_closest_canonical(labels).dataobj))
    return normalise_intensity(torch.from_numpy(np.ascontiguousarray(data[box]))).numpy()
