"""How far the members of an ensemble register a head differently, and whether the deformation is a sound one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from nibabel.affines import apply_affine

from bids_varaug.registration.affine import framewise_displacement
from bids_varaug.registration.template import Template
from bids_varaug.registration.transforms import Registration, head_points, template_points
from bids_varaug.registration.velocity import jacobian_determinants
from bids_varaug.variability.measures import FLOAT32_BITS, general_bits, significant_bits


@dataclass(frozen=True)
class Quality:
    """Whether one registration is a sound one, in the template's brain."""

    folds: float  # share of voxels whose Jacobian determinant is not positive
    inverse_mean: float  # mm, from a point to where forward and then inverse lead
    inverse_max: float


@dataclass(frozen=True)
class Spread:
    """How far the members' registrations differ, in the template's brain."""

    n_members: int
    sd_median: float  # mm, of `displacement_sd`
    sd_p95: float
    sd_max: float
    sigbits_general: float  # bit, `variability.measures.general_bits`, at most 24
    sigbits_sd: float  # bit, -log2(sd / |mean|)
    affine_fd_mean: float  # mm, framewise displacement of the members' affines from their mean
    affine_fd_max: float


def check_quality(registration: Registration, template: Template, forward: np.ndarray, inverse: np.ndarray) -> Quality:
    """Count folds and follow points there and back; fields are `Registration.field`.

    The points are the centres of the brain's cells, where the error of linear interpolation is largest.
    """
    brain = template.labels > 0
    size = np.float32(template.grid.affine[0, 0])
    folded = jacobian_determinants(forward / size) <= 0
    inside = brain[1:-1, 1:-1, 1:-1]
    points = apply_affine(template.grid.affine, np.argwhere(brain) + 0.5).T
    there = head_points(registration, forward, template.grid, points)
    back = template_points(registration, inverse, template.grid, there)
    errors = np.linalg.norm(back - points, axis=0)
    return Quality(float(folded[inside].mean()), float(errors.mean()), float(errors.max()))


def displacements_in_brain(
    registrations: Sequence[Registration], reference: Registration, template: Template
) -> np.ndarray:
    """Displacements (M, 3, N) float32, mm, of the brain's N voxels by each member: affine and warp together.

    A voxel goes to a member's point of the head; where that lies in the template's space by the affine of `reference`,
    less the voxel, is its displacement. So differences of the members' affines count, and what the affine moves does
    not hide what the members disagree about.
    """
    brain, grid = template.labels > 0, template.grid
    voxels = apply_affine(grid.affine, np.argwhere(brain))
    back = np.linalg.inv(reference.affine)
    found = np.empty((len(registrations), 3, len(voxels)), np.float32)
    for m, registration in enumerate(registrations):
        moved = voxels + registration.field(grid)[:, brain].T
        found[m] = (apply_affine(back @ registration.affine, moved) - voxels).T
    return found


def displacement_sd(displacements: np.ndarray) -> np.ndarray:
    """Standard deviation (N,) float32 over members (sample, M - 1) of displacements (M, 3, N), the root of the sum of
    the three variances: the typical distance of a member from their mean, in the unit of the displacements.

    >>> round(float(displacement_sd(np.array([[[1.0], [0], [0]], [[-1.0], [0], [0]]]))[0]) ** 2, 3)
    2.0
    """
    return np.sqrt(displacements.var(axis=0, ddof=1, dtype=np.float64).sum(axis=0)).astype(np.float32)


def summarise_spread(registrations: Sequence[Registration], displacements: np.ndarray, template: Template) -> Spread:
    """Figures of the members' spread; `displacements` are of `displacements_in_brain`, of two members or more.

    Bits are the mean over voxels and over x, y and z, as published for SynthMorph (arXiv:2308.01939).
    """
    general = np.minimum(general_bits(displacements.astype(np.float64)), FLOAT32_BITS)
    sd = displacement_sd(displacements)
    bits = significant_bits(
        displacements.mean(axis=0, dtype=np.float64), displacements.std(axis=0, ddof=1, dtype=np.float64)
    )
    affines = np.stack([registration.affine for registration in registrations])
    centre = apply_affine(template.grid.affine, np.argwhere(template.labels > 0).mean(axis=0))
    moved = [framewise_displacement(affine, affines.mean(axis=0), centre) for affine in affines]
    return Spread(
        len(registrations), float(np.median(sd)), float(np.percentile(sd, 95)), float(sd.max()),
        float(general.mean()), float(bits.mean()), float(np.mean(moved)), float(np.max(moved)),
    )  # fmt: skip


def describe(quality: Quality, spread: Spread | None) -> dict[str, Any]:
    """Figures for the sidecar of a transform, named as BIDS names keys."""
    words = {
        "folds": "ShareOfFolds", "inverse_mean": "InverseErrorMean", "inverse_max": "InverseErrorMax",
        "n_members": "NumberOfMembers", "sd_median": "DisplacementSDMedian", "sd_p95": "DisplacementSD95thPercentile",
        "sd_max": "DisplacementSDMax", "sigbits_general": "SignificantBitsGeneral",
        "sigbits_sd": "SignificantBitsSDOverMean", "affine_fd_mean": "AffineFramewiseDisplacementMean",
        "affine_fd_max": "AffineFramewiseDisplacementMax",
    }  # fmt: skip
    values = asdict(quality) | ({} if spread is None else asdict(spread))
    return {words[name]: value if isinstance(value, int) else float(f"{value:.6g}") for name, value in values.items()}
