"""The affine transform in closed form: barycentres of structures onto those of the template.

No image metric is optimised: any contrast will do, and the same posterior gives the same bits. Each member of an
ensemble gives an affine of its own. The idea is SynthMorph's (Hoffmann et al. 2024, arXiv:2301.11329), whose network
learns feature maps; here the maps are the posteriors of anatomical structures.
"""

from __future__ import annotations

import numpy as np
from nibabel.affines import apply_affine
from scipy.linalg import polar
from scipy.sparse import csr_array
from scipy.spatial.transform import Rotation

from bids_varaug.images.load import voxel_volume

MIN_STRUCTURES = 4
"""Fewer points do not determine an affine."""
SCALES = (0.5, 2.0)
"""Of an axis of a head against the template's. Heads of infants and adults lie well within."""
MIN_MASS = 10.0
"""mm3 that a structure must have in both for its barycentre to count."""
RADIUS = 50.0
"""mm, of the head in framewise displacement (Power et al. 2012, NeuroImage 59(3))."""


def barycentres(rows: csr_array, shape: tuple[int, ...], affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mass and barycentre of each class.

    `rows` (X * Y * Z, K) are probabilities in C order of a grid of `shape`, whose `affine` (4, 4) leads from voxels to
    mm. Returns masses (K,) in mm3 and barycentres (K, 3) in mm, NaN for classes without mass.

    >>> rows = csr_array(np.array([[0, 1.0], [0, 0], [0, 1.0], [0, 0]]))
    >>> masses, points = barycentres(rows, (4, 1, 1), np.diag([2.0, 1, 1, 1]))
    >>> masses.tolist(), points[1].tolist()
    ([0.0, 4.0], [2.0, 0.0, 0.0])
    """
    stored = np.flatnonzero(np.diff(rows.indptr))
    voxels = np.stack(np.unravel_index(stored, shape), axis=1).astype(np.float64)
    part = rows[stored].astype(np.float64)
    sums = np.asarray(part.sum(axis=0)).ravel()
    with np.errstate(invalid="ignore"):
        points = (part.T @ voxels) / np.where(sums > 0, sums, np.nan)[:, None]
    return sums * voxel_volume(affine), apply_affine(affine, points)


def one_hot(labels: np.ndarray, n_classes: int) -> csr_array:
    """Rows (X * Y * Z, K) of a map of classes (X, Y, Z), as `barycentres` takes them; the background has none."""
    found = np.flatnonzero(labels)
    entries = np.ones(len(found)), (found, labels.ravel()[found].astype(np.int32))
    return csr_array(entries, shape=(labels.size, n_classes))


def fit_affine(source: np.ndarray, target: np.ndarray, source_mass: np.ndarray, target_mass: np.ndarray) -> np.ndarray:
    """Least-squares affine (4, 4) that leads from barycentres `source` (K, 3) to `target` (K, 3), both in mm.

    Points are weighted by the square root of the smaller mass [mm3] of the two: large structures have the more certain
    barycentres, small ones lie where others have none. ValueError, with the reason, if fewer than `MIN_STRUCTURES` have
    `MIN_MASS` in both, they lie in a plane, or the scales are none of a head.

    >>> points = np.array([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]); mass = np.full(4, 100.0)
    >>> fit_affine(points, points + [1, 2, 3], mass, mass)[:3, 3].round(6).tolist()
    [1.0, 2.0, 3.0]
    """
    mass = np.fmin(np.nan_to_num(source_mass), np.nan_to_num(target_mass))
    kept = mass >= MIN_MASS
    if kept.sum() < MIN_STRUCTURES:
        raise ValueError(f"{kept.sum()} of its structures are those of the template; an affine needs {MIN_STRUCTURES}")
    weights = np.sqrt(np.sqrt(mass[kept] / mass[kept].sum()))[:, None]  # of the residuals: root of a weight's root
    design = np.column_stack([source[kept], np.ones(kept.sum())])
    solution, _, rank, _ = np.linalg.lstsq(design * weights, target[kept] * weights, rcond=1e-6)
    affine = np.eye(4)
    affine[:3] = solution.T
    scales = np.linalg.svd(affine[:3, :3], compute_uv=False)
    if rank < 4 or np.linalg.det(affine[:3, :3]) <= 0 or not SCALES[0] <= scales[-1] <= scales[0] <= SCALES[1]:
        sizes = ", ".join(f"{scale:.2g}" for scale in scales)
        raise ValueError(f"its structures lie unlike those of a head (scales of the affine: {sizes})")
    return affine


def framewise_displacement(one: np.ndarray, other: np.ndarray, centre: np.ndarray) -> float:
    """How far two affines (4, 4) differ, mm: translation plus rotation on a sphere of `RADIUS` mm.

    ``|tx| + |ty| + |tz| + 50 (|a| + |b| + |c|)`` (Power et al. 2012) of the one after the inverse of the other, about
    `centre` (3,) in mm, with the angles of its rotation (polar decomposition); scales and shears do not count.

    >>> moved = np.eye(4); moved[0, 3] = 0.5
    >>> framewise_displacement(moved, np.eye(4), np.zeros(3))
    0.5
    """
    between = one @ np.linalg.inv(other)
    shift = apply_affine(between, centre) - centre
    rotation, _ = polar(between[:3, :3])
    angles = Rotation.from_matrix(rotation).as_euler("xyz")
    return float(np.abs(shift).sum() + RADIUS * np.abs(angles).sum())
