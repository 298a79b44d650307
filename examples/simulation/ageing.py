"""People of known age, and their heads: what a brain-age model should find.

A person is a draw of head size, of how old the brain is for its years, and of each structure's
volume around its chart (`simulation.charts`). The head is the template's, deformed so
that the structures have these volumes, and then scanned.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bids_varaug.training.labels import load_scheme
from simulation.charts import CHARTS, expected_ratio
from simulation.growth import deform_labels
from simulation.scanner import Scanner, draw_image, smooth_field
from simulation.warp import Warp

TEMPLATE_AGE = 25.0
"""Years; about the mean of the young adults whose average the MNI152 template is."""
AGE_RANGE = (18.0, 95.0)
"""Years for which the charts stand."""
BRAIN_AGE_SPREAD = 4.0
"""SD of how many years older or younger a brain is than its owner. No model of age can do better
than a mean absolute error of about 0.8 of this."""
HEAD_SEX_EFFECT = 0.06
"""Log of intracranial volume: men's above, women's below the mean; about 12 % apart."""
HEAD_SPREAD = 0.08
"""SD of log intracranial volume within a sex."""
COMMON_SHARE = 0.4
"""Share of the variance between people that all tissues, or all ventricles, have in common."""
COARSE_SHAPE, FINE_SHAPE = (2.0, 30.0), (0.6, 12.0)
"""mm: SD of displacement and distance of knots of each head's own shape."""
POSE = (4.0, 3.0)
"""SD of the head's rotation [degree] and shift [mm] between scans."""


@dataclass(frozen=True)
class Person:
    """Somebody of known age.

    Attributes
    ----------
    age : years
    sex : "F" or "M"
    brain_age_gap : years the brain is older than its owner
    head_size : intracranial volume relative to the template's
    ratios : structure id -> volume relative to the template's, head size included
    """

    age: float
    sex: str
    brain_age_gap: float
    head_size: float
    ratios: dict[int, float]


@dataclass(frozen=True, eq=False)
class Head:
    """A simulated head.

    Attributes
    ----------
    person : Person
    labels : tuple of (X, Y, Z) int16, one per scan, as the head lay in the scanner; RAS, isotropic
    images : tuple of (X, Y, Z) float32, one per scan
    affine : (4, 4) float64, voxel -> mm
    volumes : structure id -> true volume, mm3
    targets : structure id -> volume that was asked for, mm3
    """

    person: Person
    labels: tuple[np.ndarray, ...]
    images: tuple[np.ndarray, ...]
    affine: np.ndarray
    volumes: dict[int, float]
    targets: dict[int, float]


def draw_person(
    age: float, sex: str, rng: np.random.Generator, *, template_age: float = TEMPLATE_AGE
) -> Person:
    """Draw somebody of an age and sex.

    Parameters
    ----------
    age : years, within `AGE_RANGE`
    sex : "F" or "M"
    rng : numpy Generator
    template_age : age of the head that will be deformed, years

    Returns
    -------
    Person

    Raises
    ------
    ValueError
        If an age is out of range or the sex is neither.
    """
    for years in (age, template_age):
        if not AGE_RANGE[0] <= years <= AGE_RANGE[1]:
            raise ValueError(f"{years} years: the charts stand for ages {AGE_RANGE} only")
    if sex not in ("F", "M"):
        raise ValueError(f"sex must be F or M, not {sex!r}")
    effect = HEAD_SEX_EFFECT if sex == "M" else -HEAD_SEX_EFFECT
    head_size = float(np.exp(effect + HEAD_SPREAD * rng.standard_normal()))
    gap = float(BRAIN_AGE_SPREAD * rng.standard_normal())
    common = {fluid: rng.standard_normal() for fluid in (False, True)}
    ratios = {}
    for chart in CHARTS:
        own = np.sqrt(COMMON_SHARE) * common[chart.fluid]
        own += np.sqrt(1 - COMMON_SHARE) * rng.standard_normal()
        expected = head_size * expected_ratio(chart, age + gap, template_age)
        for structure in chart.ids:
            side = chart.side_spread * rng.standard_normal()
            ratios[structure] = float(expected * np.exp(chart.spread * own + side))
    return Person(age, sex, gap, head_size, ratios)


def simulate_person(
    labels: np.ndarray,
    affine: np.ndarray,
    age: float,
    sex: str,
    rng: np.random.Generator,
    *,
    template_age: float = TEMPLATE_AGE,
    scanner: Scanner | None = None,
    n_scans: int = 1,
) -> Head:
    """Draw a person, deform the template into the person's head, and scan it.

    Parameters
    ----------
    labels : (X, Y, Z) integer, the template, as `simulation.template` reads it
    affine : (4, 4), voxel -> mm; voxels isotropic, axes RAS
    age, sex, rng, template_age : as for `draw_person`
    scanner : as for `draw_image`
    n_scans : images of the same head, each with its own pose, noise and bias field

    Returns
    -------
    Head

    Raises
    ------
    ValueError
        As `draw_person`, `deform_labels` and `draw_image`.
    """
    spacing = float(affine[0, 0])
    person = draw_person(age, sex, rng, template_age=template_age)
    scheme = load_scheme()
    part_of = {
        int(i): int(scheme.target_ids[t])
        for i, t in zip(scheme.ids, scheme.targets, strict=True)
        if t
    }
    start = draw_shape(labels.shape, spacing, person.head_size, rng)
    grown = deform_labels(labels, person.ratios, spacing, part_of=part_of, start=start)
    template_ids, codes = np.unique(labels, return_inverse=True)
    codes = codes.reshape(labels.shape).astype(np.uint8)
    seen, images = [], []
    for _ in range(n_scans):
        pose = _rigid(grown.warp, spacing, rng)
        seen.append(template_ids[grown.warp.after(pose).apply(codes)].astype(np.int16))
        images.append(draw_image(seen[-1], spacing, rng, scanner=scanner, scheme=scheme))
    return Head(person, tuple(seen), tuple(images), affine, grown.volumes, grown.targets)


def draw_shape(
    shape: tuple[int, int, int], spacing: float, head_size: float, rng: np.random.Generator
) -> Warp:
    """Draw a head's size and shape: scaling a little different along the axes, then a smooth warp.

    Parameters
    ----------
    shape : of the template, voxels
    spacing : mm
    head_size : volume relative to the template's

    Returns
    -------
    Warp
    """
    warp = Warp.identity(shape, spacing)
    stretch = 0.015 * rng.standard_normal(3)
    scale = np.exp(np.log(head_size) / 3 + stretch - stretch.mean())
    nodes = warp.displacement.shape[1:]
    bend = np.zeros_like(warp.displacement)
    for sd, knots in (COARSE_SHAPE, FINE_SHAPE):
        for axis in range(3):
            bend[axis] += sd / spacing * smooth_field(rng, nodes, knots / spacing / warp.factor)
    centre = (np.array(shape) - 1).reshape(3, 1, 1, 1) / 2
    shrink = (1 / scale - 1).reshape(3, 1, 1, 1) * (warp.positions() - centre)
    return warp.after(bend).after(shrink)


def _rigid(warp: Warp, spacing: float, rng: np.random.Generator) -> np.ndarray:
    """Displacement (3, A, B, C), voxels, of a head that was turned and shifted at random."""
    turn, shift = np.deg2rad(POSE[0]), POSE[1] / spacing
    angles, offset = turn * rng.standard_normal(3), shift * rng.standard_normal(3)
    matrix = np.eye(3)
    for axis, angle in enumerate(angles):
        i, j = [(1, 2), (0, 2), (0, 1)][axis]
        step = np.eye(3)
        step[i, i] = step[j, j] = np.cos(angle)
        step[i, j], step[j, i] = -np.sin(angle), np.sin(angle)
        matrix = matrix @ step
    centre = (np.array(warp.shape) - 1) / 2
    place = warp.positions() - centre.reshape(3, 1, 1, 1)
    moved = np.einsum("ij,jxyz->ixyz", matrix - np.eye(3), place)
    return (moved + offset.reshape(3, 1, 1, 1)).astype(np.float32)
