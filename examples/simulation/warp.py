"""Smooth maps of a grid onto itself, and label maps seen through them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bids_varaug.machine import compiled

SOLVING_SPACING = 2.0
"""mm: displacements are kept on a grid about this fine, since they are smooth."""


@dataclass(frozen=True, eq=False)
class Warp:
    """Where each point of a grid takes its label from.

    Attributes
    ----------
    displacement : (3, A, B, C) float32, voxels of the fine grid, at the nodes of a coarser one:
        node (a, b, c) lies at ``factor * (a, b, c) + (factor - 1) / 2``. The label at x is that of
        the source at x + displacement
    factor : voxels per node along each axis
    shape : (X, Y, Z) of the fine grid
    """

    displacement: np.ndarray
    factor: int
    shape: tuple[int, int, int]

    @classmethod
    def identity(cls, shape: tuple[int, int, int], spacing: float) -> Warp:
        """The map that moves nothing, for a grid of isotropic voxels of `spacing` [mm]."""
        factor = max(1, round(SOLVING_SPACING / spacing))
        nodes = tuple(-(-n // factor) for n in shape)
        return cls(np.zeros((3, *nodes), np.float32), factor, tuple(shape))

    def positions(self) -> np.ndarray:
        """Fine-grid coordinates of the nodes, (3, A, B, C) float32, voxels."""
        axes = np.indices(self.displacement.shape[1:], dtype=np.float32)
        return axes * np.float32(self.factor) + np.float32((self.factor - 1) / 2)

    def after(self, displacement: np.ndarray) -> Warp:
        """Map that first moves by another displacement (as this one's, voxels), then by this."""
        moved = _compose(self.displacement, displacement.astype(np.float32), self.factor)
        return Warp(moved, self.factor, self.shape)

    def apply(self, codes: np.ndarray) -> np.ndarray:
        """See a label map through the warp.

        The eight source voxels around a point vote with their trilinear weights. Points outside
        take the label of the nearest voxel inside.

        Parameters
        ----------
        codes : (X, Y, Z) uint8, of the fine grid

        Returns
        -------
        (X, Y, Z) uint8
        """
        moved = np.empty_like(codes, order="C")
        self.measure(codes, 0, moved, tuple(slice(0, n) for n in codes.shape))
        return moved

    def measure(
        self, codes: np.ndarray, n: int, moved: np.ndarray, box: tuple[slice, ...]
    ) -> np.ndarray:
        """See a box of a label map through the warp, and sum the votes for the first `n` codes.

        The votes are each voxel's fractions of the labels, so that their sum follows a volume
        more finely than a count of voxels does.

        Parameters
        ----------
        codes : (X, Y, Z) uint8
        n : codes to count
        moved : (X, Y, Z) uint8, written inside the box, as from `apply`
        box : voxels to look at

        Returns
        -------
        (n,) float64, voxels
        """
        low, high = np.array([[side.start, side.stop] for side in box]).T
        codes = np.ascontiguousarray(codes)
        return _apply(codes, self.displacement, self.factor, n, moved, low, high)

    def jacobian(self) -> np.ndarray:
        """Determinant of the map's derivative at the nodes, (A, B, C) float32; 1 where rigid.

        Positive everywhere: nothing folds. Central differences, one-sided at the borders.
        """
        gradient = np.stack(
            [np.stack(np.gradient(d, float(self.factor)), -1) for d in self.displacement], -2
        )
        return np.linalg.det(gradient + np.eye(3)).astype(np.float32)


def resample_labels(
    codes: np.ndarray, matrix: np.ndarray, shape: tuple[int, int, int]
) -> np.ndarray:
    """See a label map on another grid; the voxels around a point vote as in `Warp.apply`.

    Parameters
    ----------
    codes : (X, Y, Z) uint8
    matrix : (4, 4) float64, voxel index of the new grid -> voxel index of `codes`
    shape : of the new grid; points outside the old one become 0

    Returns
    -------
    `shape` uint8
    """
    out = np.zeros(shape, np.uint8)
    _resample(np.ascontiguousarray(codes), np.asarray(matrix, np.float64), out)
    return out


@compiled(inline="always")
def _vote(codes, x, y, z, votes):
    """Winner of the eight voxels around a point; adds their weights to `votes`, where it can."""
    nx, ny, nz = codes.shape
    x = min(max(x, 0.0), nx - 1.0)
    y = min(max(y, 0.0), ny - 1.0)
    z = min(max(z, 0.0), nz - 1.0)
    i, j, k = int(x), int(y), int(z)
    i1, j1, k1 = min(i + 1, nx - 1), min(j + 1, ny - 1), min(k + 1, nz - 1)
    c0, c1, c2, c3 = codes[i, j, k], codes[i, j, k1], codes[i, j1, k], codes[i, j1, k1]
    c4, c5, c6, c7 = codes[i1, j, k], codes[i1, j, k1], codes[i1, j1, k], codes[i1, j1, k1]
    if c0 == c1 and c0 == c2 and c0 == c3 and c0 == c4 and c0 == c5 and c0 == c6 and c0 == c7:
        if c0 < votes.size:
            votes[c0] += 1.0
        return c0
    u, v, w = x - i, y - j, z - k
    corners = (c0, c1, c2, c3, c4, c5, c6, c7)
    low, high = (1.0 - u) * (1.0 - v), (1.0 - u) * v
    low1, high1 = u * (1.0 - v), u * v
    weights = (low * (1.0 - w), low * w, high * (1.0 - w), high * w,
               low1 * (1.0 - w), low1 * w, high1 * (1.0 - w), high1 * w)  # fmt: skip
    # Ties alternate between the sides: always the first would favour the left half of the brain.
    last_wins = ((i >> 1) + (j >> 1) + (k >> 1)) & 1 == 1
    best, chosen = -1.0, c0
    for a in range(8):
        total = 0.0
        for b in range(8):
            if corners[b] == corners[a]:
                total += weights[b]
        if total > best or (last_wins and total == best):
            best, chosen = total, corners[a]
        if corners[a] < votes.size:
            votes[corners[a]] += weights[a]
    return chosen


@compiled(inline="always")
def _interpolate(field, x, y, z):
    """Trilinear interpolation of three components, clamped at the borders."""
    _, nx, ny, nz = field.shape
    x = min(max(x, 0.0), nx - 1.0)
    y = min(max(y, 0.0), ny - 1.0)
    z = min(max(z, 0.0), nz - 1.0)
    low = int(x), int(y), int(z)
    high = min(low[0] + 1, nx - 1), min(low[1] + 1, ny - 1), min(low[2] + 1, nz - 1)
    share = x - low[0], y - low[1], z - low[2]
    return (
        _trilinear(field[0], low, high, share),
        _trilinear(field[1], low, high, share),
        _trilinear(field[2], low, high, share),
    )


@compiled(inline="always")
def _trilinear(field, low, high, share):
    i, j, k = low
    i1, j1, k1 = high
    u, v, w = share
    a, b, c, d = (1 - u) * (1 - v), (1 - u) * v, u * (1 - v), u * v
    p = a * field[i, j, k] + b * field[i, j1, k]
    p += c * field[i1, j, k] + d * field[i1, j1, k]
    p1 = a * field[i, j, k1] + b * field[i, j1, k1]
    p1 += c * field[i1, j, k1] + d * field[i1, j1, k1]
    return p + w * (p1 - p)


@compiled()
def _apply(codes, displacement, factor, n, out, low, high):
    votes = np.zeros(n)
    half = (factor - 1) / 2
    for i in range(low[0], high[0]):
        for j in range(low[1], high[1]):
            for k in range(low[2], high[2]):
                a, b, c = (i - half) / factor, (j - half) / factor, (k - half) / factor
                x, y, z = _interpolate(displacement, a, b, c)
                out[i, j, k] = _vote(codes, i + x, j + y, k + z, votes)
    return votes


@compiled()
def _compose(displacement, first, factor):
    out = np.empty_like(displacement)
    for a in range(out.shape[1]):
        for b in range(out.shape[2]):
            for c in range(out.shape[3]):
                x, y, z = first[0, a, b, c], first[1, a, b, c], first[2, a, b, c]
                p, q, r = _interpolate(displacement, a + x / factor, b + y / factor, c + z / factor)
                out[0, a, b, c], out[1, a, b, c], out[2, a, b, c] = x + p, y + q, z + r
    return out


@compiled()
def _resample(codes, matrix, out):
    nx, ny, nz = codes.shape
    votes = np.zeros(0)
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            for k in range(out.shape[2]):
                x = matrix[0, 0] * i + matrix[0, 1] * j + matrix[0, 2] * k + matrix[0, 3]
                y = matrix[1, 0] * i + matrix[1, 1] * j + matrix[1, 2] * k + matrix[1, 3]
                z = matrix[2, 0] * i + matrix[2, 1] * j + matrix[2, 2] * k + matrix[2, 3]
                inside = -0.5 <= x < nx - 0.5 and -0.5 <= y < ny - 0.5 and -0.5 <= z < nz - 0.5
                if inside:
                    out[i, j, k] = _vote(codes, x, y, z, votes)
