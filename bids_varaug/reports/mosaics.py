"""Mosaics of the participant report: arrays in, PNG bytes out, the same bytes every time.

Slices are shown in the scan's own grid, axes flipped and permuted to RAS+ (no rotation), in neurological convention:
the subject's left is on the left of axial and coronal slices, and the nose points to the right in sagittal ones.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import matplotlib
import matplotlib.style
import nibabel as nib
import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.transforms import IdentityTransform
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation
from PIL import Image
from scipy.ndimage import map_coordinates

from bids_varaug.models.ensemble import Label

DPI = 100
ROWS = (2, 1, 0)  # RAS axes cut, top to bottom: axial, coronal, sagittal
MARGIN_MM = 4.0
GAP = 6  # px between tiles
LEGEND_ROW = 20  # px
LEGEND_COLUMNS = 9
BAR_HEIGHT = 66  # px below a mosaic, for its colour bar
INK = "#e8e8e8"
SIDE_INK = "#ffd24d"
FONT = "DejaVu Sans"
PAPER = "#000000"
UNRELIABLE_RGB = (255, 77, 166)
OUTLINE_RGB = (86, 180, 233)
WHITE_MATTER = (2, 41)
RGB = tuple[int, int, int]


@dataclass(frozen=True)
class View:
    """Where a head is cut and at which size it is drawn; shared by all figures of a scan.

    Attributes
    ----------
    shape : (3,) int, of the native grid
    orientation : (3, 2) float, nibabel's orientation of the native grid
    affine : (4, 4) float, RAS+ voxel to world [mm]
    zooms : voxel size along the RAS axes [mm]
    box : first and past-the-last voxel shown along the RAS axes
    cuts : for each RAS axis, the voxel indices of its slices
    scale : px per mm
    """

    shape: tuple[int, int, int]
    orientation: np.ndarray
    affine: np.ndarray
    zooms: tuple[float, float, float]
    box: tuple[tuple[int, int], ...]
    cuts: tuple[tuple[int, ...], ...]
    scale: float


@dataclass(frozen=True)
class MapStyle:
    """How a scalar map is coloured.

    Attributes
    ----------
    title, unit : text of the colour bar
    low, high : ends of the colour bar, in the map's unit
    negligible : value at which the map is fully transparent
    solid : value from which on it is opaque; below `negligible` where small values matter
    colormap : perceptually uniform colormap of matplotlib
    """

    title: str
    unit: str
    low: float
    high: float
    negligible: float
    solid: float
    colormap: str


MAP_STYLES: dict[str, MapStyle] = {
    "entropy": MapStyle("Vote entropy", "bit", 0.0, 2.0, 0.0, 0.3, "plasma"),
    "sigbits": MapStyle("Significant bits of the consensus label's posterior", "bit", 0.0, 8.0, 8.0, 6.0, "plasma_r"),
    "std": MapStyle("Standard deviation of the consensus label's posterior", "1", 0.0, 0.4, 0.02, 0.06, "plasma"),
}


def plan_view(labels: np.ndarray, affine: np.ndarray, n_slices: int = 7, max_width: int = 1900) -> View:
    """Choose slices through the brain and the scale of a mosaic.

    Parameters
    ----------
    labels : (X, Y, Z) integer, 0 = background, native grid; the whole image is shown if all 0
    affine : (4, 4) float, voxel to world [mm]
    n_slices : slices per plane
    max_width : width of the mosaics [px]

    Raises
    ------
    ValueError
        If the labels are not three-dimensional.
    """
    if labels.ndim != 3:
        raise ValueError(f"labels have {labels.ndim} dimensions, not 3")
    orientation = io_orientation(affine)
    ras = apply_orientation(labels, orientation)
    ras_affine = affine @ inv_ornt_aff(orientation, labels.shape)
    zooms = tuple(float(z) for z in nib.affines.voxel_sizes(ras_affine))
    box, cuts = [], []
    for axis, (size, zoom) in enumerate(zip(ras.shape, zooms, strict=True)):
        others = tuple(a for a in range(3) if a != axis)
        inside = np.flatnonzero((ras > 0).any(axis=others))
        first, last = (inside[0], inside[-1]) if inside.size else (0, size - 1)
        pad = int(np.ceil(MARGIN_MM / zoom))
        box.append((int(max(0, first - pad)), int(min(size, last + 1 + pad))))
        steps = (np.arange(n_slices) + 0.75) / (n_slices + 0.5)
        cuts.append(tuple(int(round(c)) for c in first + steps * (last - first)))
    extent = [(stop - start) * zoom for (start, stop), zoom in zip(box, zooms, strict=True)]
    scale = (max_width - (n_slices + 1) * GAP) / (n_slices * max(extent[0], extent[1]))
    return View(labels.shape, orientation, ras_affine, zooms, tuple(box), tuple(cuts), scale)


def draw_labels(t1w: np.ndarray, labels: np.ndarray, view: View, structures: Sequence[Label]) -> bytes:
    """Mosaic of the T1w with each structure's contour in its colour.

    Parameters
    ----------
    t1w : (X, Y, Z) number, native grid
    labels : (X, Y, Z) integer, native grid
    view : from `plan_view` of the same grid
    structures : what the labels stand for, and their colours; others are not drawn

    Returns
    -------
    PNG file
    """
    colors = {s.index: tuple(bytes.fromhex(s.color.removeprefix("#"))) for s in structures if s.index != 0}

    def paint(rgb: np.ndarray, axis: int, index: int) -> np.ndarray:
        return _draw_contours(rgb, _sample(labels, view, axis, index, order=0), colors)

    present = set(pd.unique(labels.ravel(order="K")).tolist())
    legend: dict[str, RGB] = {}
    for structure in structures:
        if structure.index in present and structure.index in colors:
            bare = structure.name.removeprefix("Left-").removeprefix("Right-").replace("-", " ")
            legend.setdefault(bare, colors[structure.index])  # the two sides share an entry
    return _mosaic(t1w, labels, view, paint, legend)


def draw_map(t1w: np.ndarray, values: np.ndarray, labels: np.ndarray, view: View, style: MapStyle) -> bytes:
    """Mosaic of a scalar map over the T1w, with a colour bar.

    Parameters
    ----------
    t1w, values : (X, Y, Z) number, native grid; NaN in `values` is transparent
    labels : (X, Y, Z) integer, native grid, for the grey window of the T1w
    view : from `plan_view` of the same grid
    style : e.g. ``MAP_STYLES["entropy"]``

    Returns
    -------
    PNG file
    """
    colors = ScalarMappable(Normalize(style.low, style.high, clip=True), style.colormap)

    def paint(rgb: np.ndarray, axis: int, index: int) -> np.ndarray:
        cut = _sample(values, view, axis, index, order=0).astype(np.float32)
        # Holds for maps whose small values matter too: there solid < negligible.
        alpha = (cut - style.negligible) / (style.solid - style.negligible)
        alpha = 0.92 * np.clip(np.nan_to_num(alpha, nan=0.0), 0, 1)[..., None]
        color = colors.cmap(colors.norm(np.nan_to_num(cut)))[..., :3] * 255
        return np.rint(alpha * color + (1 - alpha) * rgb).astype(np.uint8)

    return _mosaic(t1w, labels, view, paint, bar=(style, colors))


def draw_mask(t1w: np.ndarray, mask: np.ndarray, labels: np.ndarray, view: View) -> bytes:
    """Mosaic of the unreliable voxels over the T1w, with the outline of the brain.

    Parameters
    ----------
    t1w : (X, Y, Z) number, native grid
    mask : (X, Y, Z) bool or 0/1, native grid
    labels : (X, Y, Z) integer, native grid; its non-zero part is outlined
    view : from `plan_view` of the same grid

    Returns
    -------
    PNG file
    """

    def paint(rgb: np.ndarray, axis: int, index: int) -> np.ndarray:
        brain = (_sample(labels, view, axis, index, order=0) > 0).astype(np.uint8)
        _draw_contours(rgb, brain, {1: OUTLINE_RGB})
        rgb[_sample(mask, view, axis, index, order=0) > 0] = UNRELIABLE_RGB
        return rgb

    legend = {"unreliable voxel": UNRELIABLE_RGB, "outline of the labelled brain": OUTLINE_RGB}
    return _mosaic(t1w, labels, view, paint, legend)


def _window(t1w: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Intensities drawn black and white."""
    if t1w.shape != labels.shape:
        raise ValueError(f"T1w of shape {t1w.shape}, but labels of shape {labels.shape}")
    step = tuple(slice(None, None, max(1, size // 96)) for size in t1w.shape)
    sample = np.nan_to_num(np.asarray(t1w[step], np.float32), posinf=0, neginf=0)
    brain = sample[np.asarray(labels[step]) > 0]
    bright = brain if brain.size > 50 else sample
    low, high = float(np.percentile(sample, 1)), float(np.percentile(bright, 99.5))
    return (low, high * 1.05 - low * 0.05) if high > low else (low, low + 1.0)


def _sample(array: np.ndarray, view: View, axis: int, index: int, order: int) -> np.ndarray:
    """One slice at display resolution: (height, width), first row at the top."""
    if array.shape != view.shape:
        raise ValueError(f"array of shape {array.shape}, but the view is of {view.shape}")
    ras = apply_orientation(array, view.orientation)
    cut = ras[(slice(None),) * axis + (index,)]  # a view; np.take would copy the whole image
    grid = []
    for a in (a for a in range(3) if a != axis):
        start, stop = view.box[a]
        size = max(1, round((stop - start) * view.zooms[a] * view.scale))
        grid.append(start + (np.arange(size) + 0.5) / size * (stop - start) - 0.5)
    if order == 0:
        at = [np.clip(np.rint(g).astype(int), 0, n - 1) for g, n in zip(grid, cut.shape, strict=True)]
        drawn = cut[np.ix_(*at)]
    else:
        points = np.meshgrid(*grid, indexing="ij")
        filled = np.nan_to_num(np.asarray(cut, np.float32), posinf=0, neginf=0)
        drawn = map_coordinates(filled, points, order=order, mode="nearest")
    return drawn.T[::-1]


def _draw_contours(rgb: np.ndarray, labels: np.ndarray, colors: Mapping[int, RGB]) -> np.ndarray:
    """Colour the pixels of each structure that touch another one, in place; return `rgb`.

    White matter touches nearly everything and gives way, so that lines stay one pixel wide.
    """
    edge = np.zeros(labels.shape, bool)
    for axis in (0, 1):
        for step in (1, -1):
            neighbour = np.roll(labels, step, axis=axis)
            yields = np.isin(labels, WHITE_MATTER) & (neighbour != 0)
            edge |= (neighbour != labels) & ~yields
    edge[[0, -1], :] = edge[:, [0, -1]] = False
    for index in np.unique(labels[edge]).tolist():
        if index != 0 and index in colors:
            rgb[edge & (labels == index)] = colors[index]
    return rgb


def _mosaic(
    t1w: np.ndarray,
    labels: np.ndarray,
    view: View,
    paint: Callable[[np.ndarray, int, int], np.ndarray],
    legend: Mapping[str, RGB] = MappingProxyType({}),
    bar: tuple[MapStyle, ScalarMappable] | None = None,
) -> bytes:
    """PNG of a row of grey slices per plane, each painted over, above a legend or a colour bar.

    `paint` gets a slice (height, width, 3) uint8, its RAS axis and index, and returns the same.
    """
    low, high = _window(t1w, labels)

    def tile(axis: int, index: int) -> np.ndarray:
        gray = (_sample(t1w, view, axis, index, order=1) - low) / (high - low)
        # 128 grey levels cannot be told from 256 by eye and shrink the file.
        gray = np.rint(np.clip(gray, 0, 1) * 127).astype(np.uint8) * 2
        return paint(np.repeat(gray[..., None], 3, axis=2), axis, index)

    rows = [[tile(axis, index) for index in view.cuts[axis]] for axis in ROWS]
    cell = max(t.shape[1] for row in rows for t in row)
    width = len(rows[0]) * (cell + GAP) + GAP
    height = sum(row[0].shape[0] for row in rows) + GAP * (len(rows) + 1)
    footer = BAR_HEIGHT if bar else LEGEND_ROW * -(-len(legend) // LEGEND_COLUMNS) + 12 if legend else 0
    total = height + footer
    pixels = np.zeros((height, width, 3), np.uint8)
    with matplotlib.style.context("default"):
        figure = Figure(figsize=(width / DPI, total / DPI), dpi=DPI, facecolor=PAPER)
        canvas = FigureCanvasAgg(figure)
        write = partial(figure.text, color=INK, transform=IdentityTransform())  # at a place in px, from the lower left
        top = GAP
        for axis, row in zip(ROWS, rows, strict=True):
            for column, (index, part) in enumerate(zip(view.cuts[axis], row, strict=True)):
                left = GAP + column * (cell + GAP)
                inset = left + (cell - part.shape[1]) // 2
                pixels[top : top + part.shape[0], inset : inset + part.shape[1]] = part
                _mark_tile(write, view, axis, index, (left, total - top, cell, part.shape[0]))
            top += row[0].shape[0] + GAP
        figure.figimage(pixels, 0, footer, origin="upper", zorder=-1)
        if bar:
            _add_colorbar(figure, write, total, *bar)
        for number, (name, color) in enumerate(legend.items()):
            row_number, column = divmod(number, LEGEND_COLUMNS)
            x, y = 10 + column * width / LEGEND_COLUMNS, footer - 14 - LEGEND_ROW * row_number
            rgb = tuple(c / 255 for c in color)
            figure.patches.append(Rectangle((x, y - 6), 12, 12, color=rgb, transform=None, figure=figure))
            write(x + 18, y, name, fontsize=10, va="center_baseline", parse_math=False)
        return to_png(canvas)


def _mark_tile(write: Callable[..., None], view: View, axis: int, index: int, place: tuple[int, int, int, int]) -> None:
    """Write the slice's position and the sides; `place` is left, top, width, height [px]."""
    left, top, width, height = place
    middle = [(view.shape[int(a)] - 1) / 2 for a in np.argsort(view.orientation[:, 0])]
    middle[axis] = index
    world = float((view.affine @ [*middle, 1.0])[axis])
    write(left + 3, top - 3, f"{'xyz'[axis]} = {world:+.0f} mm", va="top", fontsize=8.5, family=FONT)
    sides = ("P", "A") if axis == 0 else ("L", "R")
    bold = {"fontweight": "bold", "va": "bottom", "fontsize": 9.5, "color": SIDE_INK, "family": FONT}
    write(left + 3, top - height + 2, sides[0], **bold)
    write(left + width - 3, top - height + 2, sides[1], ha="right", **bold)


def _add_colorbar(
    figure: Figure, write: Callable[..., None], total: int, style: MapStyle, colors: ScalarMappable
) -> None:
    axes = figure.add_axes((0.3, (BAR_HEIGHT - 40) / total, 0.4, 14 / total))
    bar = figure.colorbar(colors, cax=axes, orientation="horizontal", extend="max")
    bar.outline.set_edgecolor(INK)
    axes.tick_params(colors=INK, labelsize=10)
    axes.set_title(f"{style.title} [{style.unit}]", color=INK, fontsize=11, pad=5)
    side = "below" if style.solid > style.negligible else "above"
    hidden = f"fades out {side} {style.solid:g}, transparent at {style.negligible:g}"
    width = figure.get_figwidth() * DPI
    write(0.72 * width, BAR_HEIGHT - 33, hidden, fontsize=9.5, va="center")


def to_png(canvas: FigureCanvasAgg) -> bytes:
    """Render as RGB without metadata, so that the same pixels give the same file."""
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()
