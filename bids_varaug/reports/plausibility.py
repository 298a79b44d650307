"""What a reader should be warned of: odd volumes, lopsided pairs, an image unlike the training's.

The limits are broad on purpose: a warning says "look at the mosaic", not "ill". They were rounded
outwards by the authors of this package from what FreeSurfer reports for adults, not copied from a
table, and are no norms. For norms by age, sex and head size see Potvin et al. [1]_, and Potvin et
al. [2]_ for the cortex. Tried on the FreeSurfer volumes of 1,043 adults
(18-85 years, 1000 Functional Connectomes Project): 1 has a volume outside the limits, and 8 get any
warning of volume or asymmetry.

References
----------
.. [1] Potvin, Mouiha, Dieumegarde, Duchesne (2016). Normative data for subcortical regional volumes
       over the lifetime of the adult human brain. NeuroImage 137, 9-20.
       doi:10.1016/j.neuroimage.2016.05.016
.. [2] Potvin, Dieumegarde, Duchesne (2017). Normative morphometric data for cerebral cortical areas
       over the lifetime of the adult human brain. NeuroImage 156, 315-339.
       doi:10.1016/j.neuroimage.2017.05.019
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.ndimage import binary_erosion

SOURCE = (
    "Broad limits for adults, set by the authors of this package; no norms. For norms: Potvin et "
    "al. (2016), NeuroImage 137, 9-20, doi:10.1016/j.neuroimage.2016.05.016."
)


@dataclass(frozen=True)
class Limits:
    """Smallest and largest plausible volume of one side [mm3], largest asymmetry.

    `asymmetry` is of ``|left - right| / mean(left, right)``; None for midline structures.
    """

    low: float
    high: float
    asymmetry: float | None


_PAIRS = {
    (2, 41): Limits(110_000, 420_000, 0.15),
    (3, 42): Limits(120_000, 420_000, 0.15),
    (4, 43): Limits(1_500, 80_000, 1.1),
    (5, 44): Limits(20, 6_000, 1.5),
    (7, 46): Limits(5_000, 34_000, 0.4),
    (8, 47): Limits(22_000, 95_000, 0.25),
    (10, 49): Limits(3_800, 12_500, 0.3),
    (11, 50): Limits(1_700, 7_000, 0.35),
    (12, 51): Limits(2_300, 9_000, 0.35),
    (13, 52): Limits(700, 3_800, 0.5),
    (17, 53): Limits(1_800, 7_500, 0.4),
    (18, 54): Limits(550, 3_500, 0.6),
    (26, 58): Limits(130, 1_500, 0.8),
    (28, 60): Limits(2_200, 8_000, 0.3),
}
LIMITS: dict[int, Limits] = {
    14: Limits(300, 7_000, None),
    15: Limits(350, 7_500, None),
    16: Limits(9_000, 38_000, None),
    **{index: limits for pair, limits in _PAIRS.items() for index in pair},
}

TRAINED_VOXEL_MM = (0.5, 3.0)
MIN_CONTRAST = 0.5  # separation of white matter and cortex in pooled standard deviations
EDGE_FRACTION = 0.002  # of the labelled voxels
WHITE, CORTEX = (2, 41), (3, 42)


def judge_volume(index: int, volume: float) -> str:
    """Return "low", "high" or "" for a structure's volume [mm3]; "" if nothing is known of it.

    Examples
    --------
    >>> judge_volume(17, 4000.0), judge_volume(17, 90.0), judge_volume(999, 1.0)
    ('', 'low', '')
    """
    limits = LIMITS.get(index)
    if limits is None or not np.isfinite(volume):
        return ""
    return "low" if volume < limits.low else "high" if volume > limits.high else ""


def check_volumes(volumes: Mapping[int, float], names: Mapping[int, str]) -> list[str]:
    """Warnings about structures outside `LIMITS`.

    Parameters
    ----------
    volumes : label index to volume [mm3]
    names : label index to name

    Returns
    -------
    list of str, one sentence for each structure
    """
    warnings = []
    for index, volume in volumes.items():
        verdict = judge_volume(index, volume)
        if not verdict:
            continue
        limits, name = LIMITS[index], names.get(index, str(index))
        if volume == 0:
            warnings.append(f"{name} was not found at all.")
            continue
        size = "small" if verdict == "low" else "large"
        warnings.append(
            f"{name} is implausibly {size} for an adult: {volume:,.0f} mm³ (broad limits "
            f"{limits.low:,.0f} to {limits.high:,.0f} mm³)."
        )
    return warnings


def check_asymmetry(volumes: Mapping[int, float], names: Mapping[int, str]) -> list[str]:
    """Warnings about left-right pairs that differ more than `LIMITS` allow; as `check_volumes`."""
    warnings = []
    for (left, right), limits in _PAIRS.items():
        if left not in volumes or right not in volumes:
            continue
        a, b = float(volumes[left]), float(volumes[right])
        if not a + b > 0 or min(a, b) == 0:
            continue  # absence is told by check_volumes
        asymmetry = abs(a - b) / ((a + b) / 2)
        if asymmetry > limits.asymmetry:
            bare = names.get(left, str(left)).removeprefix("Left-")
            warnings.append(
                f"{bare}: left ({a:,.0f} mm³) and right ({b:,.0f} mm³) differ by "
                f"{100 * asymmetry:.0f} % of their mean; up to {100 * limits.asymmetry:.0f} % is "
                "usual."
            )
    return warnings


def check_voxel_size(zooms: Sequence[float]) -> list[str]:
    """Warning about voxels [mm] finer or coarser than those of the training."""
    low, high = TRAINED_VOXEL_MM
    # A header's 0.4999999 mm is 0.5 mm.
    if min(zooms) >= low * 0.99 and max(zooms) <= high * 1.01:
        return []
    size = " x ".join(f"{z:.2f}" for z in zooms)
    return [
        f"Voxels of {size} mm are outside the range of the training ({low:g} to {high:g} mm); "
        "small structures are not to be trusted."
    ]


def check_field_of_view(labels: np.ndarray) -> list[str]:
    """Warning about a brain that the image's edge cuts.

    Parameters
    ----------
    labels : (X, Y, Z) integer, 0 = background

    Returns
    -------
    list of str
    """
    total = int(np.count_nonzero(labels))
    on_edge = sum(
        int(np.count_nonzero(labels[(slice(None),) * axis + (side,)]))
        for axis in range(3)
        for side in (0, -1)
    )
    if not total or on_edge / total <= EDGE_FRACTION:
        return []
    return [
        f"The brain reaches the edge of the image ({on_edge:,} labelled voxels lie on it): part of "
        "it may be outside the field of view, and volumes too small."
    ]


def check_contrast(t1w: np.ndarray, labels: np.ndarray) -> list[str]:
    """Warning about a contrast unlike T1 weighting, or too weak to separate the tissues.

    White matter is eroded by a voxel where that leaves enough of it, to keep partial volume out.

    Parameters
    ----------
    t1w : (X, Y, Z) number
    labels : (X, Y, Z) integer, FreeSurfer ids

    Returns
    -------
    list of str; too little of either tissue to judge is a warning too
    """
    white_mask, cortex_mask = np.isin(labels, WHITE), np.isin(labels, CORTEX)
    core = binary_erosion(white_mask)
    white = np.asarray(t1w[core if core.sum() > 200 else white_mask], np.float64)
    cortex = np.asarray(t1w[cortex_mask], np.float64)
    white, cortex = white[np.isfinite(white)], cortex[np.isfinite(cortex)]
    if white.size < 50 or cortex.size < 50:
        return ["Too little white matter or cortex was found to judge the contrast of the image."]
    pooled = np.sqrt((white.var() + cortex.var()) / 2)
    contrast = (white.mean() - cortex.mean()) / max(pooled, 1e-12)
    if contrast < 0:
        return [
            f"White matter ({white.mean():.4g}) is darker than cortex ({cortex.mean():.4g}): this "
            "does not look like a T1-weighted image."
        ]
    if contrast < MIN_CONTRAST:
        return [
            f"White matter and cortex hardly differ in brightness ({contrast:.2f} standard "
            f"deviations; at least {MIN_CONTRAST:g} is usual): noise, motion or another contrast."
        ]
    return []


def find_warnings(
    regions: pd.DataFrame,
    zooms: Sequence[float],
    t1w: np.ndarray | None = None,
    labels: np.ndarray | None = None,
) -> list[str]:
    """All warnings of one scan, those about the image first.

    Parameters
    ----------
    regions : table with columns index, name, volume_mean [mm3]
    zooms : (3,) voxel size [mm]
    t1w : (X, Y, Z) number, native grid; without it the contrast is not judged
    labels : (X, Y, Z) integer, consensus, native grid; without it neither contrast nor field of
        view are judged

    Returns
    -------
    list of str
    """
    ids = regions["index"].astype(int).tolist()
    volumes = dict(zip(ids, regions["volume_mean"].astype(float).tolist(), strict=True))
    names = dict(zip(ids, regions["name"].astype(str).tolist(), strict=True))
    warnings = check_voxel_size(zooms)
    if labels is not None:
        warnings += check_field_of_view(labels)
        if t1w is not None:
            warnings += check_contrast(t1w, labels)
    return warnings + check_volumes(volumes, names) + check_asymmetry(volumes, names)
