"""Volumes that count a voxel at a border for both of its structures, as FastSurfer's and FreeSurfer's statistics do."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from bids_varaug.machine import compiled

_REACH = 7  # of the window around a voxel, in which means are taken: 15 x 15 x 15 voxels
_EPSILON = 1e-6
_DIGITS = 1e10


class Mixture(NamedTuple):
    """What voxels consist of, each (X, Y, Z): their own label by `share`, `neighbour` by the rest."""

    neighbour: np.ndarray  # int16, 0 where there is none
    share: np.ndarray  # float64, 1 inside of structures


def mix_at_borders(labels: np.ndarray, image: np.ndarray) -> Mixture:
    """Split the voxels at the borders of structures between two labels, by intensity.

    A voxel with a neighbour (by a face) of another label, background (0) too, lies at a border. Of the labels in the
    3 x 3 x 3 voxels around it, those count whose mean lies on the other side of its intensity than the mean of its own
    label; the one with most voxels in the window is taken. The share ``(I - mean_other) / (mean_own - mean_other)`` is
    limited to 0 ... 1.

    `labels` (X, Y, Z) are of any integer type from 0 to 32767, `image` (X, Y, Z) of any real type.

    References
    ----------
    FastSurfer 2.4.0-dev (commit 7c45785e), FastSurferCNN/segstats.py, not in its legacy mode.
    """
    labels = np.ascontiguousarray(labels, np.int16)
    neighbour, share = np.zeros(labels.shape, np.int16), np.ones(labels.shape)
    _mix(labels, np.ascontiguousarray(image, np.float64), neighbour, share)
    return Mixture(neighbour, share)


def corrected_volumes(labels: np.ndarray, image: np.ndarray, voxel_volume: float) -> dict[int, float]:
    """Return the volume of each label but 0, in the unit of `voxel_volume`; arguments as of `mix_at_borders`."""
    found = mix_at_borders(labels, image)
    sizes = np.bincount(labels.ravel(), weights=found.share.ravel())
    rest = np.bincount(found.neighbour.ravel(), weights=1 - found.share.ravel(), minlength=len(sizes))
    sizes = sizes + rest[: len(sizes)]
    return {int(label): float(sizes[label]) * voxel_volume for label in np.unique(labels) if label > 0}


@compiled()
def _mix(labels: np.ndarray, image: np.ndarray, neighbour: np.ndarray, share: np.ndarray) -> None:
    nx, ny, nz = labels.shape
    counts, sums = np.zeros(2**15, np.int64), np.zeros(2**15)
    seen = np.zeros((2 * _REACH + 1) ** 3, np.int64)
    for x in range(nx):
        for y in range(ny):
            for z in range(nz):
                own = labels[x, y, z]
                if not (
                    (x > 0 and labels[x - 1, y, z] != own)
                    or (x < nx - 1 and labels[x + 1, y, z] != own)
                    or (y > 0 and labels[x, y - 1, z] != own)
                    or (y < ny - 1 and labels[x, y + 1, z] != own)
                    or (z > 0 and labels[x, y, z - 1] != own)
                    or (z < nz - 1 and labels[x, y, z + 1] != own)
                ):
                    continue
                x0, x1 = max(0, x - _REACH), min(nx, x + _REACH + 1)
                y0, y1 = max(0, y - _REACH), min(ny, y + _REACH + 1)
                z0, z1 = max(0, z - _REACH), min(nz, z + _REACH + 1)
                n_seen = 0
                for i in range(x0, x1):
                    for j in range(y0, y1):
                        for k in range(z0, z1):
                            label = labels[i, j, k]
                            if counts[label] == 0:
                                seen[n_seen] = label
                                n_seen += 1
                            counts[label] += 1
                            sums[label] += image[i, j, k]
                value = image[x, y, z]
                mean = np.rint(sums[own] / counts[own] * _DIGITS) / _DIGITS
                best, most, other = 0, 0, 0.0
                for i in range(max(0, x - 1), min(nx, x + 2)):
                    for j in range(max(0, y - 1), min(ny, y + 2)):
                        for k in range(max(0, z - 1), min(nz, z + 2)):
                            label = labels[i, j, k]
                            if label == own or counts[label] < most:
                                continue
                            there = np.rint(sums[label] / counts[label] * _DIGITS) / _DIGITS
                            opposite = (mean - value) * (there - value) < 0
                            if opposite and (counts[label] > most or label < best):
                                best, most, other = label, counts[label], there
                if most > 0 and abs(mean - other) > _EPSILON:
                    neighbour[x, y, z] = best
                    share[x, y, z] = min(max((value - other) / (mean - other), 0.0), 1.0)
                for label in seen[:n_seen]:
                    counts[label] = 0
                    sums[label] = 0.0
