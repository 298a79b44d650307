"""Between a T1w's own ("native") grid and the network's ("conformed") grid, and the part of it that holds the head.

The conformed grid has one isotropic voxel size, RAS+ axes, and covers the image's field of view with the same centre.
Its axes are the image's own, flipped and permuted; those of the scanner where the image is oblique. On the way back, a
native voxel is interpolated linearly from the 8 conformed voxels around it; one larger than these is the mean of
``ceil(native size / conformed size)`` interpolations along each axis, so that it averages over what it contains. Where
the grids differ by flips and permutations only, values are copied bit for bit.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from operator import add
from pathlib import Path

import numba
import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation
from scipy import ndimage
from scipy.ndimage import gaussian_filter1d

from bids_varaug.images.load import Volume, in_mm, is_oblique, load_t1w, voxel_volume
from bids_varaug.machine import compiled

HEAD_HEIGHT_MM = 200.0  # from the vertex down: brain, cerebellum and the top of the cord of every adult lie within it
_COARSE_MM = 3.0
_TOUCH_CM2 = {"top": 12.0, "left": 30.0, "right": 30.0, "front": 30.0, "back": 30.0}
_MIN_EXTENT_MM = (90.0, 110.0, 80.0)


@dataclass(frozen=True)
class Box:
    """First voxel and number of voxels per axis; may reach beyond the array, where values count as `fill`."""

    start: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def stop(self) -> tuple[int, ...]:
        """Voxel after the last, per axis."""
        return tuple(map(add, self.start, self.shape))

    def within(self, other: Box) -> Box:
        """Return this box, which counts from the first voxel of `other`, on the grid of `other`.

        >>> Box((1, 0), (2, 2)).within(Box((10, -3), (8, 8)))
        Box(start=(11, -3), shape=(2, 2))
        """
        return Box(tuple(map(add, self.start, other.start)), self.shape)


def head_box(data: np.ndarray, voxel_size: float, multiple: int = 32) -> Box:
    """Find the box around the head, or around the brain of a brain-extracted image; arguments as of `head_mask`.

    The foreground, without what lies more than `HEAD_HEIGHT_MM` below the top of the head (a long neck), enlarged to
    sides that are multiples of `multiple`. Empty voxels (0) around the image do not move the box.
    """
    first, last = bounds(data > 0) if data.any() else (np.zeros(3, int), np.array(data.shape))
    rim = round(2 * _COARSE_MM / voxel_size)  # of air, whatever the image has
    inside = extract(data, Box(tuple(first - rim), tuple(last - first + 2 * rim)))
    low, high = (edge + first - rim for edge in bounds(head_mask(inside, voxel_size)))
    low, high = np.maximum(low, first), np.minimum(high, last)
    low[2] = max(low[2], high[2] - round(HEAD_HEIGHT_MM / voxel_size))
    return enclose(low, high, data.shape, multiple)


def enclose(low: np.ndarray, high: np.ndarray, shape: tuple[int, ...], multiple: int) -> Box:
    """Return the box from `low` to `high`, with sides that are multiples of `multiple`.

    Bounds beyond an array of `shape` are moved to its edge; the sides are then enlarged, half of it on each side,
    whether the array has room or not.

    >>> enclose(np.array([-1, 5]), np.array([3, 8]), (9, 9), 4)
    Box(start=(0, 5), shape=(4, 4))
    """
    low, high = np.maximum(low, 0), np.minimum(high, shape)
    sides = -(-(high - low) // multiple) * multiple
    start = low - (sides - (high - low)) // 2
    return Box(tuple(start.tolist()), tuple(sides.tolist()))


def head_mask(data: np.ndarray, voxel_size: float) -> np.ndarray:
    """Foreground of a whole-head or brain-extracted image, (X, Y, Z) bool; all True where nothing stands out.

    Means over cubes of about 3 mm (they quiet the noise of air) above half of Otsu's threshold (whole heads: tissue
    against air, half because a weak coil makes dark tissue), opened by one cube, largest connected part. Coarse by
    design: it finds a box, it is not a mask for analysis. `data` is float32, conformed grid; `voxel_size` in mm.
    """
    step = max(1, round(_COARSE_MM / voxel_size))
    coarse = _block_means(data, step)
    floor, top = np.quantile(coarse, [0.005, 0.995])
    threshold = floor + 0.5 * (_otsu(np.clip(coarse, floor, top)) - floor)
    bright = np.pad(coarse > threshold, 1, mode="edge")
    parts, count = ndimage.label(ndimage.binary_opening(bright)[1:-1, 1:-1, 1:-1])
    if count == 0 or not top > floor:
        return np.ones(data.shape, bool)
    largest = 1 + np.bincount(parts.ravel())[1:].argmax()
    # Give back what opening took from the head's own tips (a gyrus, the nose), not other specks.
    mask = ndimage.binary_dilation(parts == largest, mask=bright[1:-1, 1:-1, 1:-1])
    return mask[np.ix_(*(np.arange(size) // step for size in data.shape))]


def is_probably_cropped(mask: np.ndarray, voxel_size: float) -> str | None:
    """Say, for the report, why the image may not show the whole brain; None where nothing is suspicious.

    Either the foreground (`mask`, of `head_mask`) is cut by the top, a side, the front or the back of the image over
    more than a few square centimetres (a nose or an ear cuts less), or it is smaller than any brain.
    """
    faces = {"top": mask[:, :, -1], "left": mask[0], "right": mask[-1], "front": mask[:, -1], "back": mask[:, 0]}
    cut = [face for face, plane in faces.items() if plane.sum() * voxel_size**2 / 100 > _TOUCH_CM2[face]]
    if {"left", "right", "front", "back"} <= set(cut):
        return (
            "Head and background cannot be told apart: the image is bright up to its edges on all sides. If the head "
            "is not cut there, the background is as bright as the head (as in MP2RAGE's UNI image): denoise it or set "
            "it to 0, or extract the brain."
        )
    if cut:
        edge = f"the edge of the image ({', '.join(cut)})"
        return f"The head is cut by {edge}: the brain may be incomplete, and volumes too small."
    low, high = bounds(mask)
    extent = (high - low) * voxel_size
    if (extent < _MIN_EXTENT_MM).any():
        size = in_mm(extent, ".0f")
        return f"The head or brain measures only {size} (left-right, back-front, bottom-top): it may be incomplete."
    return None


def bounds(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the first voxel of a mask (X, Y, Z) bool along each axis, and that after the last."""
    (box,) = ndimage.find_objects(mask.view(np.uint8))
    return np.array([side.start for side in box]), np.array([side.stop for side in box])


def extract(data: np.ndarray, box: Box, fill: float = 0) -> np.ndarray:
    """Copy the voxels of the box; `fill` where it reaches beyond the array.

    >>> extract(np.ones((2, 2, 2)), Box((-1, 0, 0), (2, 1, 1))).ravel().tolist()
    [0.0, 1.0]
    """
    result = np.full(box.shape, fill, dtype=data.dtype)
    inside = np.clip([box.start, box.stop], 0, data.shape).T
    place = np.clip([np.zeros(3, int), data.shape] - np.array(box.start), 0, box.shape).T
    result[tuple(slice(*ends) for ends in place)] = data[tuple(slice(*ends) for ends in inside)]
    return result


def insert(data: np.ndarray, box: Box, shape: tuple[int, ...], fill: float = 0) -> np.ndarray:
    """Place the box's voxels in an array of `shape`: the inverse of `extract`."""
    if data.shape != tuple(box.shape):
        raise ValueError(f"data of shape {data.shape} do not fill a box of {box.shape}")
    return extract(data, Box(tuple(-a for a in box.start), shape), fill)


def _block_means(data: np.ndarray, step: int) -> np.ndarray:
    for axis, size in enumerate(data.shape):
        edges = np.arange(0, size, step)
        sums = np.add.reduceat(data, edges, axis=axis, dtype=np.float32)
        counts = np.diff(np.append(edges, size)).astype(np.float32)
        data = sums / np.expand_dims(counts, [a for a in range(3) if a != axis])
    return data


def _otsu(values: np.ndarray) -> float:
    """Return the threshold of Otsu (1979): the largest variance between the two classes."""
    counts, edges = np.histogram(values, bins=256)
    centres = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)[:-1].astype(float)
    above = values.size - below
    sums = np.cumsum(counts * centres)
    with np.errstate(all="ignore"):
        gap = sums[:-1] / below - (sums[-1] - sums[:-1]) / above
        between = np.nan_to_num(below * above * gap**2)
    return float(edges[1:-1][between.argmax()])


SAME_SIZE = 1e-3  # relative difference of voxel sizes below which an axis is left as it is
POSTERIOR_SCALE = 1 / 255  # value of one step of a stored posterior (the NIfTI's ``scl_slope``)
_FWHM_TO_SIGMA = 1 / (2 * math.sqrt(2 * math.log(2)))
# Affines are stored in float32: indices computed from them are good to about this many decimals.
_INDEX_STEPS = 1e4

GridMapping = tuple[np.ndarray, np.ndarray]
"""Voxel indices on another grid: matrix (3, 4), and points that stand for a voxel along each axis, (3,) int64."""


@dataclass(frozen=True)
class Geometry:
    """The grids of one scan; affines (4, 4) float64, voxel -> mm, RAS+ world."""

    voxel_size: float  # of the conformed grid, mm
    box: Box  # the head box in the conformed grid, or the part of it that holds the brain
    conformed_shape: tuple[int, int, int]
    conformed_affine: np.ndarray
    native_shape: tuple[int, int, int]
    native_affine: np.ndarray
    foreground_volume: float  # of the head, or of the brain in a brain-extracted image, mm3
    warnings: tuple[str, ...]  # what the image's grid and field of view say against it

    def save(self, path: Path) -> None:
        """Write as JSON; numbers survive to the last bit."""
        path.write_text(json.dumps(asdict(self), default=np.ndarray.tolist), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Geometry:
        """Read what `save` wrote."""
        values = json.loads(path.read_text(encoding="utf-8"))
        for name, value in values.items():
            if isinstance(value, list):
                values[name] = np.array(value) if name.endswith("_affine") else tuple(value)
        return cls(**values | {"box": Box(*map(tuple, values["box"].values()))})

    def native_to_conformed(self) -> GridMapping:
        """Where native voxels lie on the conformed grid."""
        matrix = np.linalg.solve(self.conformed_affine, self.native_affine)
        ratios = voxel_sizes(self.native_affine) / voxel_sizes(self.conformed_affine).mean()
        return matrix[:3], np.maximum(1, np.ceil(ratios - SAME_SIZE)).astype(np.int64)


def prepare_head(path: Path, voxel_size: float, multiple: int, trust: str | None = None) -> tuple[np.ndarray, Geometry]:
    """Read, conform and crop a T1w image; `load_t1w` tells what is refused.

    The head is (X, Y, Z) float32, of any unit, on a grid of `voxel_size` mm; its sides are multiples of `multiple`.
    """
    native = load_t1w(path, trust)
    whole, foreground, warnings = examine(native, voxel_size)
    box = head_box(whole.data, voxel_size, multiple)
    grids = whole.data.shape, whole.affine, native.data.shape, native.affine
    return extract(whole.data, box), Geometry(voxel_size, box, *grids, foreground, warnings)


def examine(native: Volume, voxel_size: float) -> tuple[Volume, float, tuple[str, ...]]:
    """Conform an image; return it, the volume of the foreground [mm3], and what its grid says against it."""
    whole = conform(native, voxel_size)
    mask = uncut = head_mask(whole.data, voxel_size)
    if is_oblique(native.affine):  # the corners that straightening adds are no part of the head
        uncut = head_mask(conform(native, voxel_size, straighten=False).data, voxel_size)
    cropped = is_probably_cropped(uncut, voxel_size)
    warnings = native.warnings + ((cropped,) if cropped else ())
    return whole, float(mask.sum()) * voxel_volume(whole.affine), warnings


def conform(volume: Volume, voxel_size: float, straighten: bool = True) -> Volume:
    """Bring an image to the conformed grid: ``ceil(field of view / voxel_size)`` voxels per axis.

    Linear interpolation. Along axes that are coarsened from size `a` to `b`, a Gaussian of
    ``sigma = sqrt(b**2 - a**2) / 2.355`` mm is applied first, so that the width of the point spread function grows from
    one voxel size to the other (Cardoso et al. 2015, Scale factor point spread function matching, MICCAI). Beyond the
    outermost voxel centres the outermost values go on; what lies outside the image is air (0). Where all axes have the
    voxel size already and the image is not oblique, it is only flipped and permuted, bit for bit. `voxel_size` is in
    mm; `straighten` turns an oblique image (see `is_oblique`) to the scanner's axes.

    >>> data = np.arange(8, dtype="float32").reshape(2, 2, 2)
    >>> mirrored = Volume(data, np.diag([-1.0, 1, 1, 1]))
    >>> conform(mirrored, 1.0).data[:, 0, 0].tolist()
    [4.0, 0.0]
    """
    orientation = io_orientation(volume.affine)
    data = apply_orientation(volume.data, orientation)
    affine = volume.affine @ inv_ornt_aff(orientation, volume.data.shape)
    ratios = voxel_size / voxel_sizes(affine)
    ratios[np.abs(ratios - 1) < SAME_SIZE] = 1.0
    grid = np.diag([*ratios, 1.0])  # voxel of the grid -> voxel of the image
    if straighten and is_oblique(affine):
        grid[:3, :3] = np.linalg.inv(affine[:3, :3]) * voxel_size
    extents = np.abs(np.linalg.inv(grid[:3, :3])) @ data.shape  # of the image, voxels of the grid
    shape = tuple(max(1, math.ceil(n - 0.01)) for n in extents)
    grid[:3, 3] = (np.array(data.shape) - 1) / 2 - grid[:3, :3] @ (np.array(shape) - 1) / 2
    for axis in np.flatnonzero(ratios > 1):
        sigma = _FWHM_TO_SIGMA * math.sqrt(ratios[axis] ** 2 - 1)
        data = gaussian_filter1d(data, sigma, axis=axis, mode="nearest", output=np.float32)
    return Volume(_resample(data, (grid[:3], np.ones(3, np.int64)), shape), affine @ grid, volume.warnings)


def resample_map(values: np.ndarray, geometry: Geometry, order: int = 1, fill: float = 0) -> np.ndarray:
    """Bring a map (X, Y, Z) of any real type from the head box to the image's own grid; `fill` is outside the box.

    Labels and masks (`order` 0) take the nearest voxel and keep their type; maps (`order` 1) become float32.
    """
    whole = insert(values, geometry.box, geometry.conformed_shape, fill)
    matrix, samples = geometry.native_to_conformed()
    if order == 0:
        return _resample(whole, (matrix, np.ones_like(samples)), geometry.native_shape, nearest=True)
    return _resample(whole.astype(np.float32, copy=False), (matrix, samples), geometry.native_shape)


def resample_posterior(
    stored: np.ndarray, posterior: np.ndarray, geometry: Geometry, out: np.ndarray | None = None, temperature: float = 1
) -> np.ndarray:
    """Bring a sparse posterior from the head box (X, Y, Z) to the image's own grid.

    Returns the most probable class, uint8, ties to the lower index. The same bits for any number of threads.
    `stored` (X * Y * Z,) bool are the voxels of the box that are stored, in C order (others, and those outside the box,
    count as background), `posterior` (N, K) float32 their probabilities, which sum to 1 over K. `out` (*native_shape,
    K) uint8, zeros, takes the interpolated posterior, probability * 255, rounded; it may be a `numpy.memmap` (32
    classes at 512^3 voxels are 4.3 GB). With a temperature T probabilities p become p^(1/T), scaled to sum to 1, which
    moves no label.
    """
    box, wanted = geometry.box, (*geometry.native_shape, posterior.shape[1])
    if out is not None and (out.shape != wanted or out.dtype != np.uint8):
        raise ValueError(f"out must be uint8 of shape {wanted}")
    rows = np.full(stored.shape, -1, np.int32)
    rows[stored] = np.arange(len(posterior))
    row_of = insert(rows.reshape(box.shape), box, geometry.conformed_shape, fill=-1)
    labels = np.zeros(geometry.native_shape, np.uint8)
    out = np.empty((0, 0, 0, 0), np.uint8) if out is None else out
    posterior = np.ascontiguousarray(posterior, np.float32)
    _mix(row_of, posterior, geometry.native_to_conformed(), np.float32(1 / temperature), labels, out)
    return labels


def _resample(data: np.ndarray, mapping: GridMapping, shape: tuple[int, ...], nearest: bool = False) -> np.ndarray:
    """Values where the mapping says, 0 for voxels that have no part in the field of view."""
    out = np.zeros(shape, data.dtype)
    _sample(np.ascontiguousarray(data), mapping, nearest, out)
    return out


@compiled(parallel=True)
def _sample(data: np.ndarray, mapping: GridMapping, nearest: bool, out: np.ndarray) -> None:
    flat, n_points = data.ravel(), mapping[1].prod()
    for i in numba.prange(out.shape[0]):
        voxels, weights = np.empty(8 * n_points, np.int64), np.empty(8 * n_points, np.float32)
        for j in range(out.shape[1]):
            for k in range(out.shape[2]):
                _neighbours(mapping, data.shape, i, j, k, voxels, weights)
                total = largest = np.float32(0)
                for n in range(8 * n_points):
                    if not nearest and weights[n] > 0:
                        total += weights[n] * flat[voxels[n]]
                    elif nearest and weights[n] >= largest:  # of equals, the last
                        out[i, j, k], largest = flat[voxels[n]], weights[n]
                if not nearest:
                    out[i, j, k] = total / np.float32(n_points)


@compiled(parallel=True)
def _mix(
    row_of: np.ndarray, posterior: np.ndarray, mapping: GridMapping, power: float, labels: np.ndarray, out: np.ndarray
) -> None:
    rows, n_points, n_classes = row_of.ravel(), mapping[1].prod(), posterior.shape[1]
    for i in numba.prange(labels.shape[0]):
        voxels, weights = np.empty(8 * n_points, np.int64), np.empty(8 * n_points, np.float32)
        mix = np.empty(n_classes, np.float32)
        for j in range(labels.shape[1]):
            for k in range(labels.shape[2]):
                _neighbours(mapping, row_of.shape, i, j, k, voxels, weights)
                mix[:] = np.float32(0)
                stored = False
                for n in range(8 * n_points):
                    weight, row = weights[n] / np.float32(n_points), rows[voxels[n]]
                    if weight > 0 and row < 0:
                        mix[0] += weight
                    elif weight > 0:
                        stored = True
                        for label in range(n_classes):
                            mix[label] += weight * posterior[row, label]
                if stored:
                    labels[i, j, k] = mix.argmax()
                if stored and power != 1:
                    total = np.float32(0)
                    for label in range(n_classes):
                        if mix[label] > 0:
                            mix[label] = mix[label] ** power
                            total += mix[label]
                    mix /= total
                for label in range(out.shape[3] if stored else 0):
                    scaled = mix[label] * np.float32(255) + np.float32(0.5)
                    out[i, j, k, label] = np.uint8(min(scaled, np.float32(255)))
                if out.size > 0 and not stored:
                    out[i, j, k, 0] = 255


@compiled()
def _neighbours(
    mapping: GridMapping, shape: tuple[int, ...], i: int, j: int, k: int, voxels: np.ndarray, weights: np.ndarray
) -> None:
    """Fill in the 8 voxels around each point of a voxel, as flat indices, and their weights; NaN outside the image."""
    matrix, samples = mapping
    for point in range(samples.prod()):
        a = i + ((point % samples[0] + 0.5) / samples[0] - 0.5)
        b = j + ((point // samples[0] % samples[1] + 0.5) / samples[1] - 0.5)
        c = k + ((point // samples[0] // samples[1] + 0.5) / samples[2] - 0.5)
        x, y, z = (_along(matrix[0], a, b, c, shape[0]), _along(matrix[1], a, b, c, shape[1]),
                   _along(matrix[2], a, b, c, shape[2]))  # fmt: skip
        for corner in range(8):
            (p, u), (q, v), (r, w) = x[corner & 1], y[corner >> 1 & 1], z[corner >> 2]
            voxels[8 * point + corner] = (p * shape[1] + q) * shape[2] + r
            weights[8 * point + corner] = u * v * w


@compiled()
def _along(row: np.ndarray, i: float, j: float, k: float, n: int) -> tuple[tuple[int, np.float32], ...]:
    """Voxels below and above a point along an axis of `n` voxels, and their weights."""
    x = row[0] * i + row[1] * j + row[2] * k + row[3]
    x = math.floor(x * _INDEX_STEPS + 0.5) / _INDEX_STEPS
    reach = (1 + (abs(row[0]) + abs(row[1]) + abs(row[2]))) / 2
    is_inside = -reach < x < n - 1 + reach
    x = min(max(x, 0.0), n - 1.0)
    low = int(x)
    share = x - low if is_inside else np.nan
    return (low, np.float32(1 - share)), (min(low + 1, n - 1), np.float32(share))
