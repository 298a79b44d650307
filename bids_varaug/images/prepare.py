"""From a T1w file to the head box that a network takes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bids_varaug.images.affine import is_oblique, voxel_volume
from bids_varaug.images.conform import conform
from bids_varaug.images.crop import extract, head_box, head_mask, is_probably_cropped
from bids_varaug.images.geometry import Geometry
from bids_varaug.images.load import load_t1w


def prepare_head(
    path: Path, voxel_size: float, multiple: int, trust: str | None = None
) -> tuple[np.ndarray, Geometry]:
    """Read, conform and crop a T1w image.

    Parameters
    ----------
    path : ``.nii`` or ``.nii.gz``
    voxel_size : of the network grid, mm
    multiple : sides of the head box are multiples of this many voxels
    trust : see `load_t1w`

    Returns
    -------
    head : (X, Y, Z) float32, any unit, RAS+, network grid
    geometry : Geometry

    Raises
    ------
    ScanError
        If the image cannot be used; the message names the file.
    """
    native = load_t1w(path, trust)
    conformed = conform(native, voxel_size)
    box = head_box(conformed.data, voxel_size, multiple=multiple)
    uncut = conformed  # by corners that straightening adds
    if is_oblique(native.affine):
        uncut = conform(native, voxel_size, straighten=False)
    doubt = is_probably_cropped(uncut.data, voxel_size)
    geometry = Geometry(
        voxel_size=voxel_size,
        box=box,
        conformed_shape=conformed.data.shape,
        conformed_affine=conformed.affine,
        native_shape=native.data.shape,
        native_affine=native.affine,
        foreground_volume=float(head_mask(conformed.data, voxel_size).sum())
        * voxel_volume(conformed.affine),
        warnings=native.warnings + (() if doubt is None else (doubt,)),
    )
    return extract(conformed.data, box), geometry
