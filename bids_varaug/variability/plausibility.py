"""What speaks against an image: each check returns a warning, or None."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.ndimage import binary_erosion

TRAINED_VOXEL_MM = (0.5, 3.0)
MIN_CONTRAST = 0.5  # separation of white matter and cortex in pooled standard deviations
EDGE_FRACTION = 0.002  # of the labelled voxels
SATURATED_FRACTION = 0.03  # of the labelled voxels
WHITE, CORTEX = (2, 41), (3, 42)


def find_warnings(zooms: Sequence[float], t1w: np.ndarray, labels: np.ndarray) -> list[str]:
    """All warnings about an image of a voxel size [mm] with its consensus (FreeSurfer ids), both on the native grid."""
    found = check_contrast(t1w, labels), check_saturation(t1w, labels)
    return [text for text in (check_voxel_size(zooms), check_field_of_view(labels), *found) if text]


def check_voxel_size(zooms: Sequence[float]) -> str | None:
    """Voxels [mm] finer or coarser than those of the training."""
    low, high = TRAINED_VOXEL_MM
    # A header's 0.4999999 mm is 0.5 mm.
    if min(zooms) >= low * 0.99 and max(zooms) <= high * 1.01:
        return None
    size = " x ".join(f"{z:.2f}" for z in zooms)
    trained = f"the range of the training ({low:g} to {high:g} mm)"
    return f"Voxels of {size} mm are outside {trained}; small structures are not to be trusted."


def check_field_of_view(labels: np.ndarray) -> str | None:
    """A brain that the image's edge cuts."""
    total = np.count_nonzero(labels)
    faces = (labels.take(side, axis) for axis in range(3) for side in (0, -1))
    on_edge = sum(np.count_nonzero(face) for face in faces)
    if not total or on_edge / total <= EDGE_FRACTION:
        return None
    return (
        f"The brain reaches the edge of the image ({on_edge:,} labelled voxels lie on it): part of it may be outside "
        "the field of view, and volumes too small."
    )


def check_contrast(t1w: np.ndarray, labels: np.ndarray) -> str | None:
    """A contrast unlike T1 weighting, or too weak to separate the tissues, or too little of either to judge.

    White matter is eroded by a voxel where that leaves enough of it, to keep partial volume out.
    """
    white_mask, cortex_mask = np.isin(labels, WHITE), np.isin(labels, CORTEX)
    core = binary_erosion(white_mask)
    white = np.asarray(t1w[core if core.sum() > 200 else white_mask], np.float64)
    cortex = np.asarray(t1w[cortex_mask], np.float64)
    white, cortex = white[np.isfinite(white)], cortex[np.isfinite(cortex)]
    if white.size < 50 or cortex.size < 50:
        return "Too little white matter or cortex was found to judge the contrast of the image."
    pooled = np.sqrt((white.var() + cortex.var()) / 2)
    contrast = (white.mean() - cortex.mean()) / max(pooled, 1e-12)
    if contrast < 0:
        return (
            f"White matter ({white.mean():.4g}) is darker than cortex ({cortex.mean():.4g}): this "
            "does not look like a T1-weighted image."
        )
    if contrast < MIN_CONTRAST:
        return (
            f"White matter and cortex hardly differ in brightness ({contrast:.2f} standard "
            f"deviations; at least {MIN_CONTRAST:g} is usual): noise, motion or another contrast."
        )
    return None


def check_saturation(t1w: np.ndarray, labels: np.ndarray) -> str | None:
    """A brain whose bright tissue was cut off at the image's largest value."""
    share = np.mean(t1w[labels > 0] == t1w.max()) if labels.any() else 0.0
    if share <= SATURATED_FRACTION:
        return None
    return (
        f"{share:.0%} of the brain's voxels have the largest value of the image: it is saturated, "
        "and tissues cannot be told apart there. Convert the original again."
    )
