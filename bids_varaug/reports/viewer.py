"""Volumes of the viewer of a page: cropped to the brain and what is near it, uint8, compressed.

All volumes of a scan share one grid: the T1w's own, cut out, and coarsened along axes finer than asked for. A group's
maps over the template are a scan too.
"""

from __future__ import annotations

import base64
import gzip
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import numpy as np
from nibabel.affines import apply_affine, voxel_sizes
from scipy import ndimage

from bids_varaug.derivatives.io import image_header
from bids_varaug.models.ensemble import Label
from bids_varaug.reports.mosaics import UNRELIABLE_RGB, MapStyle, window

MARGIN_MM = 15.0  # around the labels: skull, meninges and eyes tell why a label is wrong
FINEST_MM = 1.0
ALMOST = 1.05  # times coarser is as good as equal
BUDGET_SCANS = 2  # of 1 mm, that a page has room for
GREYS = 128  # cannot be told from 256 by eye, and compress better
STEP = 0.01  # of a map; a multiple of it where the largest value needs more than a byte
COMPRESSION = 6  # level 9 takes three times as long for 2 % less


def voxel_size_for(n_scans: int) -> float:
    """Voxel size [mm] at which the volumes of so many scans fit into one page.

    >>> voxel_size_for(1), round(voxel_size_for(12), 2)
    (1.0, 1.82)
    """
    return FINEST_MM * max(1.0, n_scans / BUDGET_SCANS) ** (1 / 3)


@dataclass(frozen=True)
class ViewerGrid:
    """Part of an image's grid, coarser by a factor along each axis; affine (4, 4): its voxels -> world [mm]."""

    start: np.ndarray  # first voxel of the part
    stop: np.ndarray  # voxel after the last
    factors: np.ndarray
    affine: np.ndarray

    @classmethod
    def around(cls, labels: np.ndarray, affine: np.ndarray, voxel_size: float) -> ViewerGrid:
        """Grid around labels (X, Y, Z), all of the image where they are 0, of voxels no finer than `voxel_size` mm."""
        zooms, shape = voxel_sizes(affine), np.array(labels.shape)
        (box,) = ndimage.find_objects((labels > 0).view(np.uint8)) or [tuple(map(slice, (0, 0, 0), shape))]
        start, stop = np.array([(side.start, side.stop) for side in box]).T
        margin = np.ceil(MARGIN_MM / zooms).astype(int)
        start, stop = np.maximum(start - margin, 0), np.minimum(stop + margin, shape)
        factors = np.where(voxel_size > ALMOST * zooms, voxel_size / zooms, 1.0)
        local = np.diag([*factors, 1.0])
        local[:3, 3] = start + (factors - 1) / 2
        return cls(start, stop, factors, affine @ local)

    def labels(self, image: np.ndarray) -> np.ndarray:
        """Nearest voxels of labels or a mask (X, Y, Z)."""
        sides = zip(self.start, self._shape, self.factors, image.shape, strict=True)
        places = [(start + (np.arange(n) + 0.5) * f - 0.5, size) for start, n, f, size in sides]
        return image[np.ix_(*(np.rint(at).astype(int).clip(0, size - 1) for at, size in places))]

    def values(self, image: np.ndarray) -> np.ndarray:
        """Linear interpolation of an image (X, Y, Z); float32, what is not finite is 0."""
        part = image[tuple(map(slice, self.start, self.stop))].astype(np.float32)
        np.nan_to_num(part, copy=False, posinf=0, neginf=0)
        if (self.factors == 1).all():
            return part
        first = (self.factors - 1) / 2
        return ndimage.affine_transform(part, self.factors, first, tuple(self._shape), order=1, mode="nearest")

    @property
    def _shape(self) -> np.ndarray:
        return np.maximum(1, np.rint((self.stop - self.start) / self.factors)).astype(int)


@dataclass(frozen=True)
class ViewerScan:
    """What the viewer shows of a scan."""

    volumes: Mapping[str, str] = field(default_factory=dict)  # .nii.gz as base64: "t1w", "labels", ...
    places: Mapping[int, Sequence[float]] = field(default_factory=dict)  # of each structure by index, mm
    settings: Mapping[str, Any] = field(default_factory=dict)  # names and colours, of JSON's types


def view_scan(
    grid: ViewerGrid, structures: Sequence[Label], t1w: np.ndarray, consensus: np.ndarray,
    baseline: np.ndarray | None = None, unreliable: np.ndarray | None = None,
    maps: Mapping[str, tuple[np.ndarray, MapStyle]] | None = None,
) -> ViewerScan:  # fmt: skip
    """Prepare a scan for the viewer.

    All arrays (X, Y, Z) are on the `grid`. `maps`, of values from 0 on, are shown one at a time, the first of them at
    first. Labels become their place among `structures`, from 1 on, which fits into a byte whatever their indices.
    """
    low, high = window(t1w, consensus)
    grey = np.rint(np.clip((t1w - low) / (high - low), 0, 1) * (GREYS - 1)) * (256 // GREYS)
    ranks = {label.index: rank for rank, label in enumerate(structures, start=1)}
    table = np.zeros(max(ranks) + 1, np.min_scalar_type(len(ranks)))
    for index, rank in ranks.items():
        table[index] = rank
    labels = table[consensus]
    arrays = {"t1w": (grey.astype(np.uint8), 1.0), "labels": (labels, 1.0)}
    settings: dict[str, Any] = {
        "indices": [label.index for label in structures],
        "names": [label.name for label in structures],
        "colors": [list(bytes.fromhex(label.color.removeprefix("#"))) for label in structures],
        "unreliable": [[*UNRELIABLE_RGB, 0], [*UNRELIABLE_RGB, 255]],
        "maps": [],
    }
    if baseline is not None:
        arrays["baseline"] = table[baseline], 1.0
    for name, (values, style) in (maps or {}).items():
        step = STEP * max(1, math.ceil(round(float(values.max()) / STEP) / 255))
        arrays[name] = np.rint(np.clip(values / step, 0, 255)).astype(np.uint8), step
        nodes = np.linspace(style.low, style.high, 16)
        colors = np.rint(np.column_stack([style.color(nodes), 255 * style.alpha(nodes)])).astype(int).tolist()
        about = {"name": name, "title": style.title, "low": style.low, "high": style.high, "colors": colors}
        settings["maps"].append(about | {"unit": "" if style.unit == "1" else style.unit, "digits": 2 - (step >= 0.1)})
    if unreliable is not None:
        arrays["unreliable"] = (unreliable > 0).astype(np.uint8), 1.0
    indices = list(ranks)
    places = {indices[rank - 1]: place for rank, place in find_places(labels, grid.affine).items()}
    volumes = {name: _encode(array, grid.affine, slope) for name, (array, slope) in arrays.items()}
    return ViewerScan(volumes, places, settings)


def find_places(labels: np.ndarray, affine: np.ndarray) -> dict[int, list[float]]:
    """World coordinates [mm, 0.1] of the voxel of each label nearest to its centre of mass.

    The centre itself may lie outside, as of a ventricle.

    >>> find_places(np.array([[[0, 3, 3, 3]]]), np.eye(4))
    {3: [0.0, 0.0, 2.0]}
    """
    places = {}
    for label, box in enumerate(ndimage.find_objects(labels), start=1):
        if box is not None:
            inside = np.argwhere(labels[box] == label)
            voxel = inside[((inside - inside.mean(axis=0)) ** 2).sum(axis=1).argmin()]
            places[label] = apply_affine(affine, voxel + [side.start for side in box]).round(1).tolist()
    return places


def link_to_place(anchor: str, index: int, world: Sequence[float] | None) -> dict[str, str]:
    """Link to a structure at world coordinates [mm] in the viewer of a scan; empty where it has none."""
    if not world:
        return {}
    at = " ".join(f"{value:.1f}" for value in world)
    return {"href": f"#{anchor}-viewer", "at": at, "index": str(index)}


def _encode(array: np.ndarray, affine: np.ndarray, slope: float) -> str:
    """A compressed NIfTI image as base64, the same text for the same data."""
    header = image_header(array.shape, array.dtype, affine, None, slope)
    content = header.binaryblock + b"\0\0\0\0" + array.tobytes(order="F")
    return base64.b64encode(gzip.compress(content, COMPRESSION, mtime=0)).decode()


def viewer_program() -> dict[str, str]:
    """NiiVue, compressed, as base64, which the page unpacks when the viewer is first seen; and its licence."""
    folder = files("bids_varaug") / "data" / "viewer"
    program = gzip.compress((folder / "niivue.umd.js").read_bytes(), COMPRESSION, mtime=0)
    return {"code": base64.b64encode(program).decode(), "license": (folder / "LICENSE").read_text(encoding="utf-8")}
