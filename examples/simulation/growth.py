"""Give each structure of a label map a wanted volume, smoothly and without tearing.

The standard trick of atrophy simulation [1]_ [2]_: prescribe the relative change of volume as the
divergence of a velocity field, and move the labels along. Here the field is the gradient of a
potential (a Poisson equation, solved by Fourier transform), the move is made in small steps, and
each step aims at what is still missing, measured on the labels themselves, so that errors of
discretisation do not add up. What structures gain or lose, the fluid around the brain gives or
takes, so the skull stays where it is.

References
----------
.. [1] Karacali, Davatzikos (2006). Simulation of tissue atrophy using a topology preserving
       transformation model. IEEE Transactions on Medical Imaging 25, 649-652.
.. [2] Khanal, Lorenzi, Ayache, Pennec (2016). A biophysical model of brain deformation to simulate
       and analyze longitudinal MRIs of patients with Alzheimer's disease. NeuroImage 134, 35-52.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from scipy import fft

from bids_varaug.machine import compiled
from simulation.warp import Warp

FLUID = 24
"""FreeSurfer id of the cerebrospinal fluid around the brain."""
MAX_RATE = 0.2
"""Largest relative change of volume in one step: keeps every step far from folding."""
MAX_STEPS = 40
EFFECT_RANGE = (0.5, 1.5)
"""Of achieved over asked change, which the next step makes up for."""
BOX_MARGIN_MM = 12.0
"""Around the brain: how far it may grow while volumes are measured in its box only."""
TOLERANCE = 0.01
"""Of the volume, relative."""
MIN_FLUID_SHARE = 0.25
"""Of the template's fluid that is left in any case; then the outside gives way."""


@dataclass(frozen=True, eq=False)
class Grown:
    """What `deform_labels` made.

    Attributes
    ----------
    labels : (X, Y, Z), ids as in the input
    warp : map from the new labels' grid to the template's
    volumes : structure id -> volume, mm3, by the fractions of voxels (`Warp.measure`)
    targets : structure id -> wanted volume, mm3
    """

    labels: np.ndarray
    warp: Warp
    volumes: dict[int, float]
    targets: dict[int, float]


def deform_labels(
    labels: np.ndarray,
    ratios: Mapping[int, float],
    spacing: float,
    *,
    part_of: Mapping[int, int] = MappingProxyType({}),
    start: Warp | None = None,
) -> Grown:
    """Change the volumes of structures by a smooth, invertible deformation.

    Parameters
    ----------
    labels : (X, Y, Z) integer, at most 255 different ids, isotropic voxels; some empty voxels
        around the head give it room
    ratios : structure id -> wanted volume relative to that in `labels`. Other ids move along and
        keep their volume, but for `FLUID` and, where that does not do, 0
    spacing : side of a voxel, mm
    part_of : id -> structure id of which it counts as a part (choroid plexus -> ventricle)
    start : deformation to begin with (size and shape of the head)

    Returns
    -------
    Grown
        Volumes within `TOLERANCE` as a rule; what is left after `MAX_STEPS` is to be seen in
        `volumes` against `targets`

    Raises
    ------
    ValueError
        If a ratio is not positive, or there are more than 255 ids.
    """
    if any(not ratio > 0 for ratio in ratios.values()):
        raise ValueError(f"ratios of volumes must be positive: {dict(ratios)}")
    ids, codes = np.unique(labels, return_inverse=True)
    if len(ids) > 255:
        raise ValueError(f"{len(ids)} different labels; at most 255 can be deformed")
    codes = codes.reshape(labels.shape).astype(np.uint8)
    owner = [part_of.get(int(i), int(i)) for i in ids]
    structures = sorted({s for s in owner if s in ratios})
    index = np.array([structures.index(s) if s in ratios else -1 for s in owner])
    outlet = [int(np.flatnonzero(ids == i)[0]) if i in ids else -1 for i in (FLUID, 0)]

    counts = np.bincount(codes.ravel(), minlength=len(ids)).astype(np.float64)
    first = _per_structure(counts, index, len(structures))
    wanted = first * np.array([ratios[s] for s in structures])
    warp = start or Warp.identity(labels.shape, spacing)
    least_fluid = MIN_FLUID_SHARE * np.count_nonzero(labels == FLUID)
    inverse_laplacian = _inverse_laplacian(warp.displacement.shape[1:])
    moved = warp.apply(codes)
    box = _box(np.isin(moved, np.flatnonzero((index >= 0) | (ids == FLUID))), spacing)
    effect = np.ones(len(structures))  # achieved change over asked change
    asked = before = None
    for step in range(MAX_STEPS + 1):
        counts = warp.measure(codes, len(ids), moved, box)
        volume = _per_structure(counts, index, len(structures))
        missing = np.log(wanted / np.maximum(volume, 1.0))
        if np.abs(missing).max(initial=0.0) <= TOLERANCE or step == MAX_STEPS:
            break
        if asked is not None:
            # Thin structures get less than they ask for, since the grid of the solver is coarse.
            got = np.log(np.maximum(volume, 1.0) / before)
            ratio = np.divide(got, asked, out=np.ones_like(got), where=np.abs(asked) > 0.003)
            effect = np.clip((effect + ratio) / 2, *EFFECT_RANGE)
        left = max(1, int(np.ceil(np.abs(missing).max() / MAX_RATE)))
        asked, before = missing / left / effect, np.maximum(volume, 1.0)
        rates = np.zeros(len(ids))
        rates[index >= 0] = asked[index[index >= 0]]
        _balance(rates, counts, outlet, least_fluid)
        warp = warp.after(-_velocity(moved, rates, warp, inverse_laplacian))
    moved = warp.apply(codes)
    cell = spacing**3
    return Grown(
        ids[moved].astype(labels.dtype),
        warp,
        {s: float(v * cell) for s, v in zip(structures, volume, strict=True)},
        {s: float(v * cell) for s, v in zip(structures, wanted, strict=True)},
    )


def _box(mask: np.ndarray, spacing: float) -> tuple[slice, ...]:
    """Bounding box of a mask, wide enough for what may grow out of it."""
    margin = int(np.ceil(BOX_MARGIN_MM / spacing))
    box = []
    for axis in range(3):
        inside = np.flatnonzero(mask.any(tuple(a for a in range(3) if a != axis)))
        low, high = (inside[0], inside[-1] + 1) if inside.size else (0, 0)
        box.append(slice(max(0, low - margin), min(mask.shape[axis], high + margin)))
    return tuple(box)


def _per_structure(counts: np.ndarray, index: np.ndarray, n: int) -> np.ndarray:
    return np.bincount(index[index >= 0], weights=counts[index >= 0], minlength=n)


def _balance(rates: np.ndarray, counts: np.ndarray, outlet: list[int], least_fluid: float) -> None:
    """Let the fluid, then the outside, take up what the structures gain or lose (in place)."""
    surplus = float(rates @ counts)
    fluid, outside = outlet
    if fluid >= 0 and counts[fluid] > 0:
        low = max(-MAX_RATE, min(0.0, least_fluid / counts[fluid] - 1))
        rates[fluid] = np.clip(-surplus / counts[fluid], low, MAX_RATE)
        surplus += rates[fluid] * counts[fluid]
    if outside >= 0 and counts[outside] > 0:
        rates[outside] = -surplus / counts[outside]


def _inverse_laplacian(shape: tuple[int, ...]) -> np.ndarray:
    """Fourier multiplier that solves ``laplace(phi) = d`` on a periodic grid, mean of phi 0.

    Of the seven-point Laplacian, voxel units: ``-1 / sum(2 - 2 cos k)``.
    """
    waves = [2 * np.pi * fft.fftfreq(n) for n in shape[:-1]]
    waves.append(2 * np.pi * fft.rfftfreq(shape[-1]))
    symbol = sum(2 - 2 * np.cos(k) for k in np.meshgrid(*waves, indexing="ij", sparse=True))
    symbol[0, 0, 0] = np.inf
    return (-1 / symbol).astype(np.float32)


def _velocity(
    codes: np.ndarray, rates: np.ndarray, warp: Warp, inverse_laplacian: np.ndarray
) -> np.ndarray:
    """Velocity (3, A, B, C) float32, fine voxels per step, whose divergence is `rates[codes]`."""
    divergence = np.zeros(warp.displacement.shape[1:], np.float32)
    _block_mean(codes, rates, warp.factor, divergence)
    spectrum = inverse_laplacian * fft.rfftn(divergence, workers=1)
    potential = fft.irfftn(spectrum, s=divergence.shape, workers=1)
    velocity = np.empty((3, *divergence.shape), np.float32)
    _gradient(potential, velocity)
    velocity *= np.float32(warp.factor)
    return velocity


@compiled()
def _gradient(potential, out):
    nx, ny, nz = potential.shape
    for i in range(nx):
        for j in range(ny):
            for k in range(nz):
                x = potential[(i + 1) % nx, j, k] - potential[i - 1, j, k]
                y = potential[i, (j + 1) % ny, k] - potential[i, j - 1, k]
                z = potential[i, j, (k + 1) % nz] - potential[i, j, k - 1]
                out[0, i, j, k], out[1, i, j, k], out[2, i, j, k] = x / 2, y / 2, z / 2


@compiled()
def _block_mean(codes, rates, factor, out):
    for i in range(codes.shape[0]):
        for j in range(codes.shape[1]):
            for k in range(codes.shape[2]):
                out[i // factor, j // factor, k // factor] += rates[codes[i, j, k]]
    out /= factor**3
