"""A registration: points of the template's space to those of the head and back, its ITK files, images through it.

The head's point of a template point y is ``A (y + u(y))``: the displacement first, in mm of the template's space, then
the affine. The template's point of a head's point x is ``w + v(w)`` with ``w = inv(A) x``. All points are in mm, RAS+.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from nibabel.affines import apply_affine
from scipy.ndimage import map_coordinates

from bids_varaug.files import replacing
from bids_varaug.machine import compiled
from bids_varaug.registration.space import Grid

_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True)
class Registration:
    """What brings one segmentation to the template."""

    affine: np.ndarray  # (4, 4) float64, template mm -> head mm
    coefficients: np.ndarray  # of the velocity, see `registration.velocity`

    def save(self, path: Path) -> None:
        """Write as .npz."""
        with path.open("wb") as stream:
            np.savez(stream, affine=self.affine, coefficients=self.coefficients)

    @classmethod
    def load(cls, path: Path) -> Registration:
        """Read what `save` wrote."""
        with np.load(path) as arrays:
            return cls(arrays["affine"], arrays["coefficients"])

    def field(self, grid: Grid, inverse: bool = False) -> np.ndarray:
        """Displacement (3, X, Y, Z) float32 in mm of the template's space, or that of the inverse, on its 2 mm grid."""
        from bids_varaug.registration.velocity import displacement_of  # torch, which resampling needs not

        return displacement_of(self.coefficients, inverse) * np.float32(grid.affine[0, 0])


def sample(values: np.ndarray, affine: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Values (X, Y, Z) of a grid at points (3, ...) in mm, linearly, float32; 0 beyond its outermost voxels' faces.

    As ITK: within half a voxel of the outermost centres their values go on. `affine` (4, 4) is the grid's.
    """
    at = _to_voxels(affine, points)
    last = np.array(values.shape).reshape(3, *(1,) * (at.ndim - 1)) - 1
    inside = ((at >= -0.5) & (at < last + 0.5)).all(axis=0)
    found = map_coordinates(values, at, output=np.float32, order=1, mode="nearest")
    return np.where(inside, found, np.float32(0))


def sample_labels(labels: np.ndarray, affine: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Labels (X, Y, Z) integer of a grid at points (3, ...) in mm; 0 beyond it.

    Of the 8 voxels around a point, the label with the largest sum of linear weights, ties to the lower label (as ITK's
    label interpolation): smoother borders than the nearest voxel has.
    """
    at = np.ascontiguousarray(_to_voxels(affine, points).reshape(3, -1))
    out = np.zeros(at.shape[1], labels.dtype)
    _vote(np.ascontiguousarray(labels), at, out)
    return out.reshape(points.shape[1:])


def _to_voxels(affine: np.ndarray, points: np.ndarray) -> np.ndarray:
    matrix = np.linalg.inv(affine)
    return np.tensordot(matrix[:3, :3], points, 1) + matrix[:3, 3].reshape(3, *(1,) * (points.ndim - 1))


@compiled()
def _vote(labels: np.ndarray, at: np.ndarray, out: np.ndarray) -> None:
    shape = labels.shape
    near, weights = np.empty(8, labels.dtype), np.empty(8, np.float64)
    low, high, share = np.empty(3, np.int64), np.empty(3, np.int64), np.empty(3, np.float64)
    for n in range(at.shape[1]):
        inside = True
        for axis in range(3):
            x = at[axis, n]
            inside &= -0.5 <= x < shape[axis] - 0.5
            x = min(max(x, 0.0), shape[axis] - 1.0)
            low[axis] = int(x)
            high[axis] = min(low[axis] + 1, shape[axis] - 1)
            share[axis] = x - low[axis]
        if not inside:
            continue
        for corner in range(8):
            i, j, k = corner & 1, corner >> 1 & 1, corner >> 2
            near[corner] = labels[high[0] if i else low[0], high[1] if j else low[1], high[2] if k else low[2]]
            weights[corner] = (
                (share[0] if i else 1 - share[0])
                * (share[1] if j else 1 - share[1])
                * (share[2] if k else 1 - share[2])
            )
        most = -1.0
        for corner in range(8):
            total = 0.0
            for other in range(8):
                if near[other] == near[corner]:
                    total += weights[other]
            if total > most or (total == most and near[corner] < out[n]):
                most, out[n] = total, near[corner]


def head_points(registration: Registration, field: np.ndarray, grid: Grid, points: np.ndarray) -> np.ndarray:
    """Points (3, N) float64 of the head for those of the template's space, both in mm; `field` is the forward one."""
    moved = points + np.stack([sample(component, grid.affine, points) for component in field])
    return apply_affine(registration.affine, moved.T).T


def grid_points(grid: Grid, slabs: slice = slice(None)) -> np.ndarray:
    """Centres (3, N) float64, mm, of a grid's voxels in C order, or of those in some slabs along x.

    >>> grid_points(Grid((2, 1, 1), np.diag([2.0, 1, 1, 1]))).tolist()
    [[0.0, 2.0], [0.0, 0.0], [0.0, 0.0]]
    """
    x = np.arange(grid.shape[0])[slabs]
    voxels = np.meshgrid(x, *map(np.arange, grid.shape[1:]), indexing="ij")
    return apply_affine(grid.affine, np.stack(voxels, axis=-1).reshape(-1, 3)).T


def template_points(
    registration: Registration, inverse_field: np.ndarray, grid: Grid, points: np.ndarray
) -> np.ndarray:
    """Points (3, N) of the template's space for those of the head, both in mm; the way back of `head_points`."""
    aligned = apply_affine(np.linalg.inv(registration.affine), points.T).T
    return aligned + np.stack([sample(component, grid.affine, aligned) for component in inverse_field])


def write_itk(registration: Registration, grid: Grid, path: Path, inverse: bool = False) -> Path:
    """Write an ITK composite transform (HDF5), which ANTs and nitransforms read; returns `path`.

    As resampling wants it, the forward one (from the T1w to the template) leads from points of the template to those of
    the T1w, the inverse one back. ITK applies the last transform of a file first. Displacements are in LPS, float32,
    vector fastest, then x. The same registration gives the same bytes.
    """
    field = registration.field(grid, inverse)
    matrix = np.linalg.inv(registration.affine) if inverse else registration.affine
    displacement = _displacement_group(field, grid)
    affine = _affine_group(_LPS @ matrix @ _LPS)
    stored = (displacement, affine) if inverse else (affine, displacement)
    stream = io.BytesIO()
    with h5py.File(stream, "w") as file:
        file["ITKVersion"], file["HDFVersion"] = [b"5.4.0"], [h5py.version.hdf5_version.encode()]
        file["OSName"], file["OSVersion"] = [b"any"], [b"any"]
        file.create_group("TransformGroup/0")["TransformType"] = [b"CompositeTransform_double_3_3"]
        for number, (kind, parameters, fixed) in enumerate(stored, start=1):
            group = file.create_group(f"TransformGroup/{number}")
            group["TransformType"] = [kind]
            group["TransformFixedParameters"] = fixed
            packed = {"compression": "gzip", "compression_opts": 4, "shuffle": True} if parameters.size > 100 else {}
            group.create_dataset("TransformParameters", data=parameters, **packed)
    with replacing(path) as out:
        out.write(stream.getvalue())
    return path


def _affine_group(matrix: np.ndarray) -> tuple[bytes, np.ndarray, np.ndarray]:
    """Type, parameters and fixed parameters (the centre) of an affine (4, 4) in LPS."""
    return b"AffineTransform_double_3_3", np.append(matrix[:3, :3].ravel(), matrix[:3, 3]), np.zeros(3)


def _displacement_group(field: np.ndarray, grid: Grid) -> tuple[bytes, np.ndarray, np.ndarray]:
    """Type, parameters and fixed parameters (size, origin, spacing, direction) of a displacement (3, X, Y, Z), RAS."""
    affine = _LPS @ grid.affine
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    fixed = np.concatenate([grid.shape, affine[:3, 3], spacing, (affine[:3, :3] / spacing).ravel()])
    lps = field * np.array([-1, -1, 1], np.float32)[:, None, None, None]
    return b"DisplacementFieldTransform_float_3_3", lps.ravel(order="F"), fixed
