"""The part of the image that holds the head."""

from __future__ import annotations

from dataclasses import dataclass
from operator import add

import numpy as np
from scipy import ndimage

from bids_varaug.images.affine import in_mm

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
        where = ", ".join(cut)
        return (
            f"The head is cut by the edge of the image ({where}): the brain may be incomplete, and volumes too small."
        )
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
