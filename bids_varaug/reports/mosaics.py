"""Mosaics of the participant report: arrays in, PNG bytes out, the same bytes every time.

Slices are shown in the scan's own grid, axes flipped and permuted to RAS+ (no rotation), in neurological convention:
the subject's left is on the left of axial and coronal slices, and the nose points to the right in sagittal ones.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib import colormaps
from nibabel.affines import voxel_sizes
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import map_coordinates, maximum_filter

from bids_varaug.models.ensemble import Label

ROWS = (2, 1, 0)  # RAS axes cut, top to bottom: axial, coronal, sagittal
MARGIN_MM = 4.0
GAP = 6  # px between tiles
FONT = 17  # px; the page shows mosaics at about 0.7 of their size
LEGEND_ROW = 24  # px
LEGEND_COLUMNS = 7
BAR_HEIGHT = 78  # px below a mosaic, for its colour bar
BAR_TICKS = 5
DIMMED = 0.6  # grey below a map, so that single voxels of it are seen
FIRST_COLOR = 0.3  # of a colour map: what is darker is not seen on grey
INK = "#e8e8e8"
SIDE_INK = "#ffd24d"
PAPER = "#000000"
UNRELIABLE_RGB = (255, 77, 166)
OUTLINE_RGB = (86, 180, 233)
WHITE_MATTER = (2, 41)
RGB = tuple[int, int, int]
Painter = Callable[[np.ndarray, int, int], None]  # of a slice (height, width, 3) uint8, its RAS axis and index


@dataclass(frozen=True)
class MapStyle:
    """How a scalar map is coloured."""

    title: str
    unit: str
    low: float  # ends of the colour bar
    high: float
    negligible: float  # fully transparent
    solid: float  # opaque from here on; below `negligible` where small values matter
    colormap: str  # of matplotlib, perceptually uniform
    is_dotted: bool = False  # of single voxels, which grow by a pixel to be seen

    def color(self, values: np.ndarray) -> np.ndarray:
        """Colours (..., 3) float64 in [0, 255] of values (...)."""
        share = np.clip((values - self.low) / (self.high - self.low), 0, 1)
        reverse = self.colormap.endswith("_r")
        share = share * (1 - FIRST_COLOR) if reverse else FIRST_COLOR + share * (1 - FIRST_COLOR)
        return np.asarray(colormaps[self.colormap](share))[..., :3] * 255

    def alpha(self, values: np.ndarray) -> np.ndarray:
        """Opacity (...) in [0, 1] of values (...)."""
        # Holds for maps whose small values matter too: there solid < negligible.
        return np.clip((values - self.negligible) / (self.solid - self.negligible), 0, 1)


MAP_STYLES: dict[str, MapStyle] = {
    "total_entropy": MapStyle("Total uncertainty", "bit", 0.0, 2.0, 0.4, 1.2, "plasma"),
    "mutual_information": MapStyle("Mutual information", "bit", 0.0, 0.4, 0.02, 0.1, "plasma"),
    "entropy": MapStyle("Vote entropy", "bit", 0.0, 2.0, 0.0, 0.3, "plasma", is_dotted=True),
    "sigbits": MapStyle("Significant bits of the consensus label's posterior", "bit", 0.0, 8.0, 8.0, 6.0, "plasma_r"),
    "std": MapStyle("Standard deviation of the consensus label's posterior", "1", 0.0, 0.4, 0.02, 0.06, "plasma"),
}


class Mosaic:
    """Slices of a T1w through its labelled brain, a row for each plane; each method draws over them and returns a PNG.

    All arrays are on the native grid, whose affine is voxel to world [mm]. Where all labels are 0 the whole image is
    shown. `max_width` is in px.
    """

    def __init__(
        self, t1w: np.ndarray, labels: np.ndarray, affine: np.ndarray, n_slices: int = 7, max_width: int = 1900
    ):
        self._shape, self._orientation = labels.shape, io_orientation(affine)
        self._labels = self._to_ras(labels)
        self._affine = affine @ inv_ornt_aff(self._orientation, labels.shape)
        self.zooms = voxel_sizes(self._affine)  # along the RAS axes, as all that follows
        self.box: list[tuple[int, int]] = []  # first and past-the-last voxel shown
        self.cuts: list[list[int]] = []  # voxel indices of the slices
        for axis, (size, zoom) in enumerate(zip(self._labels.shape, self.zooms, strict=True)):
            inside = np.flatnonzero((self._labels > 0).any(axis=tuple({0, 1, 2} - {axis})))
            first, last = (inside[0], inside[-1]) if inside.size else (0, size - 1)
            pad = int(np.ceil(MARGIN_MM / zoom))
            self.box.append((int(max(0, first - pad)), int(min(size, last + 1 + pad))))
            steps = (np.arange(n_slices) + 0.75) / (n_slices + 0.5)
            self.cuts.append(np.rint(first + steps * (last - first)).astype(int).tolist())
        extent = np.diff(self.box)[:, 0] * self.zooms
        self._scale = (max_width - (n_slices + 1) * GAP) / (n_slices * extent[:2].max())  # px per mm
        ras = self._to_ras(t1w)
        low, high = window(t1w, labels)
        self._gray: dict[tuple[int, int], np.ndarray] = {}
        for axis in ROWS:
            for index in self.cuts[axis]:
                gray = (self._slice(ras, axis, index, order=1) - low) / (high - low)
                # 128 grey levels cannot be told from 256 by eye and shrink the file.
                self._gray[axis, index] = np.rint(np.clip(gray, 0, 1) * 127).astype(np.uint8) * 2

    def draw_labels(self, structures: Sequence[Label]) -> bytes:
        """Contour of each structure in its colour; labels that `structures` lacks are not drawn."""
        colors: dict[int, RGB] = {}
        legend: dict[str, RGB] = {}
        present = set(pd.unique(self._labels.ravel(order="K")).tolist()) - {0}
        for structure in structures:
            if structure.index in present:
                red, green, blue = bytes.fromhex(structure.color.removeprefix("#"))
                bare = structure.name.removeprefix("Left-").removeprefix("Right-").replace("-", " ")
                colors[structure.index] = red, green, blue
                legend.setdefault(bare, colors[structure.index])  # the two sides share an entry

        def paint(rgb: np.ndarray, axis: int, index: int) -> None:
            draw_contours(rgb, self._slice(self._labels, axis, index), colors)

        return self._draw(paint, legend)

    def draw_map(self, values: np.ndarray, style: MapStyle) -> bytes:
        """Scalar map (X, Y, Z) of the native grid, NaN transparent, with a colour bar."""
        ras = self._to_ras(values)

        def paint(rgb: np.ndarray, axis: int, index: int) -> None:
            cut = np.nan_to_num(self._slice(ras, axis, index).astype(np.float32), nan=style.negligible)
            cut = maximum_filter(cut, 3) if style.is_dotted else cut
            alpha = style.alpha(cut)[..., None]
            rgb[:] = np.rint(alpha * style.color(cut) + (1 - alpha) * DIMMED * rgb)

        return self._draw(paint, bar=style)

    def draw_mask(self, mask: np.ndarray) -> bytes:
        """Unreliable voxels, (X, Y, Z) bool or 0/1 of the native grid, with the outline of the labelled brain."""
        ras = self._to_ras(mask)

        def paint(rgb: np.ndarray, axis: int, index: int) -> None:
            draw_contours(rgb, (self._slice(self._labels, axis, index) > 0).astype(np.uint8), {1: OUTLINE_RGB})
            rgb[self._slice(ras, axis, index) > 0] = UNRELIABLE_RGB

        return self._draw(paint, {"unreliable voxel": UNRELIABLE_RGB, "outline of the labelled brain": OUTLINE_RGB})

    def _to_ras(self, array: np.ndarray) -> np.ndarray:
        if array.shape != self._shape:
            raise ValueError(f"array of shape {array.shape}, but labels of shape {self._shape}")
        return apply_orientation(array, self._orientation)

    def _slice(self, ras: np.ndarray, axis: int, index: int, order: int = 0) -> np.ndarray:
        """One slice at display resolution: (height, width), first row at the top."""
        cut = ras[(slice(None),) * axis + (index,)]  # a view; np.take would copy the whole image
        grid = []
        for a in sorted({0, 1, 2} - {axis}):
            start, stop = self.box[a]
            size = max(1, round((stop - start) * self.zooms[a] * self._scale))
            grid.append(start + (np.arange(size) + 0.5) / size * (stop - start) - 0.5)
        if order == 0:
            at = [np.clip(np.rint(g).astype(int), 0, n - 1) for g, n in zip(grid, cut.shape, strict=True)]
            return cut[np.ix_(*at)].T[::-1]
        filled = np.nan_to_num(np.asarray(cut, np.float32), posinf=0, neginf=0)
        return map_coordinates(filled, np.meshgrid(*grid, indexing="ij"), order=order, mode="nearest").T[::-1]

    def _draw(self, paint: Painter, legend: Mapping[str, RGB] | None = None, bar: MapStyle | None = None) -> bytes:
        """Grey slices, each painted over in place, above a legend or a colour bar."""
        legend = legend or {}
        cell = max(gray.shape[1] for gray in self._gray.values())
        heights = {axis: self._gray[axis, self.cuts[axis][0]].shape[0] for axis in ROWS}
        width = len(self.cuts[0]) * (cell + GAP) + GAP
        height = sum(heights.values()) + GAP * (len(ROWS) + 1)
        footer = BAR_HEIGHT if bar else LEGEND_ROW * -(-len(legend) // LEGEND_COLUMNS) + 12 if legend else 0
        image = Image.new("RGB", (width, height + footer), PAPER)
        draw = ImageDraw.Draw(image)
        top = GAP
        for axis in ROWS:
            for column, index in enumerate(self.cuts[axis]):
                rgb = np.repeat(self._gray[axis, index][..., None], 3, axis=2)
                paint(rgb, axis, index)
                left = GAP + column * (cell + GAP)
                image.paste(Image.fromarray(rgb), (left + (cell - rgb.shape[1]) // 2, top))
                self._mark_tile(draw, axis, index, (left, top, left + cell, top + heights[axis]))
            top += heights[axis] + GAP
        if bar:
            _add_colorbar(image, draw, bar)
        for number, (name, color) in enumerate(legend.items()):
            row, column = divmod(number, LEGEND_COLUMNS)
            x, y = 10 + column * width // LEGEND_COLUMNS, height + 14 + LEGEND_ROW * row
            draw.rectangle((x, y - 7, x + 14, y + 7), fill=color)
            draw.text((x + 21, y), name, INK, _font(FONT - 1), "lm")
        return to_png(image)

    def _mark_tile(self, draw: ImageDraw.ImageDraw, axis: int, index: int, tile: tuple[int, int, int, int]) -> None:
        """Write the slice's position and the sides on a tile (left, top, right, bottom), legible on any tissue."""
        left, top, right, bottom = tile
        middle = (np.array(self._labels.shape) - 1) / 2
        middle[axis] = index
        world = float((self._affine @ [*middle, 1.0])[axis])
        write = partial(draw.text, stroke_width=2, stroke_fill=PAPER)
        write((left + 4, top + 3), f"{'xyz'[axis]} = {world:+.0f} mm".replace("-", "−"), INK, _font(FONT))
        for x, side, anchor in zip((left + 4, right - 4), ("PA", "LR", "LR")[axis], ("ls", "rs"), strict=True):
            write((x, bottom - 5), side, SIDE_INK, _font(FONT + 2, "-Bold"), anchor)


def window(t1w: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Intensities drawn black and white."""
    step = tuple(slice(None, None, max(1, size // 96)) for size in t1w.shape)
    sample = np.nan_to_num(np.asarray(t1w[step], np.float32), posinf=0, neginf=0)
    brain = sample[np.asarray(labels[step]) > 0]
    bright = brain if brain.size > 50 else sample
    low, high = float(np.percentile(sample, 1)), float(np.percentile(bright, 99.5))
    return (low, high * 1.05 - low * 0.05) if high > low else (low, low + 1.0)


def draw_contours(rgb: np.ndarray, labels: np.ndarray, colors: Mapping[int, RGB]) -> None:
    """Colour the pixels of each structure that touch another one, in place."""
    # White matter touches nearly everything and gives way, so that lines stay one pixel wide.
    edge = np.zeros(labels.shape, bool)
    gives_way = np.isin(labels, WHITE_MATTER)
    for axis, step in ((0, 1), (0, -1), (1, 1), (1, -1)):
        neighbour = np.roll(labels, step, axis=axis)
        edge |= (neighbour != labels) & ~(gives_way & (neighbour != 0))
    edge[[0, -1], :] = edge[:, [0, -1]] = False
    for index in np.unique(labels[edge]).tolist():
        if index in colors:
            rgb[edge & (labels == index)] = colors[index]


def _add_colorbar(image: Image.Image, draw: ImageDraw.ImageDraw, style: MapStyle) -> None:
    left, right, top = round(0.3 * image.width), round(0.7 * image.width), image.height - 46
    values = np.linspace(style.low, style.high, right - left)
    strip = np.rint(style.color(np.tile(values, (16, 1)))).astype(np.uint8)
    image.paste(Image.fromarray(strip), (left, top))
    draw.text((image.width // 2, top - 6), f"{style.title} [{style.unit}]", INK, _font(FONT + 1), "ms")
    for value in np.linspace(style.low, style.high, BAR_TICKS):
        x = left + (value - style.low) / (style.high - style.low) * (right - left)
        text = f"{value:g}" + (" or more" if value == style.high else "")
        draw.line((x, top + 16, x, top + 20), INK)
        draw.text((x, top + 23), text, INK, _font(FONT - 1), "ma")
    side = "below" if style.solid > style.negligible else "above"
    hidden = f"fades out {side} {style.solid:g}, transparent at {style.negligible:g}"
    draw.text((right + 70, top + 8), hidden, INK, _font(FONT - 1), "lm")


@cache
def _font(size: int, style: str = "") -> ImageFont.FreeTypeFont:
    """Font that comes with matplotlib, for equal pixels on any machine; `size` is in px."""
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"DejaVuSans{style}.ttf"
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


def to_png(image: Image.Image) -> bytes:
    """Return a PNG without metadata, so that the same pixels give the same file."""
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()
