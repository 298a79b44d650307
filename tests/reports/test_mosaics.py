"""Mosaics: where they cut, what they show, and the same bytes each time."""

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from bids_varaug.models.ensemble import Label
from bids_varaug.reports import mosaics
from bids_varaug.reports.mosaics import MAP_STYLES, Mosaic

COLORS = {2: (245, 245, 245), 3: (205, 62, 78), 41: (245, 245, 245), 42: (10, 200, 30)}
STRUCTURES = [Label(index, f"Structure-{index}", "#{:02x}{:02x}{:02x}".format(*rgb)) for index, rgb in COLORS.items()]


@pytest.fixture(scope="module")
def mosaic(head):
    return Mosaic(head.t1w, head.labels, head.affine, n_slices=3, max_width=600)


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def slice_of(mosaic, array, axis, order=0):
    """A slice at display resolution: the first one, of axial slices the second."""
    return mosaic._slice(mosaic._to_ras(array), axis, mosaic.cuts[axis][axis // 2], order)


def test_zooms_are_in_ras_order(mosaic):
    assert mosaic.zooms == pytest.approx((2.0, 1.0, 1.5))


def test_slices_pass_through_the_brain(head, mosaic):
    ras = mosaic._to_ras(head.labels)
    assert all((np.take(ras, index, axis=axis) > 0).any() for axis, cuts in enumerate(mosaic.cuts) for index in cuts)


def test_empty_labels_show_the_whole_image(head):
    assert Mosaic(head.t1w, np.zeros_like(head.labels), head.affine).box == [(0, 32), (0, 32), (0, 32)]


def test_axial_slice_has_the_subjects_left_on_the_left(head, mosaic):
    cut = slice_of(mosaic, head.labels, 2)
    assert np.median(np.nonzero(cut == 3)[1]) < np.median(np.nonzero(cut == 42)[1])


def test_sagittal_slice_has_superior_at_the_top(mosaic):
    up = np.broadcast_to(np.arange(32)[None, ::-1, None], (32, 32, 32)).astype(np.float32)
    cut = slice_of(mosaic, up, 0, order=1)
    assert cut[0].mean() > cut[-1].mean()


def test_aspect_follows_the_voxel_size(head, mosaic):
    cut = slice_of(mosaic, head.labels, 2)
    (x0, x1), (y0, y1) = mosaic.box[:2]
    assert cut.shape[1] / cut.shape[0] == pytest.approx(2.0 * (x1 - x0) / (y1 - y0), rel=0.02)


def test_mosaic_is_no_wider_than_asked(mosaic):
    assert pixels(mosaic.draw_labels(STRUCTURES)).shape[1] <= 600 + 3


def test_contours_have_exactly_the_label_colours(mosaic):
    drawn = pixels(mosaic.draw_labels(STRUCTURES)).reshape(-1, 3)
    assert (drawn == COLORS[42]).all(axis=1).sum() > 100


def test_inside_of_a_structure_is_left_grey(head):
    tile = np.full((*head.labels.shape[:2], 3), 7, np.uint8)
    mosaics.draw_contours(tile, head.labels[:, :, 15], COLORS)
    assert (tile[15, 15] == 7).all() and (tile != 7).any()


@pytest.mark.parametrize("key", sorted(MAP_STYLES))
def test_same_map_gives_the_same_bytes(head, mosaic, key):
    first, second = (mosaic.draw_map(head.spread, MAP_STYLES[key]) for _ in range(2))
    assert first == second


def test_negligible_values_leave_the_image_grey(head, mosaic):
    style = replace(MAP_STYLES["entropy"], negligible=2.0, solid=3.0)
    top = pixels(mosaic.draw_map(head.spread, style))[: -mosaics.BAR_HEIGHT]
    shown = top[30:60, 60:160]  # a part of the first tile without text
    assert (shown.max(axis=2) == shown.min(axis=2)).all()


def test_low_significant_bits_are_coloured_and_high_ones_are_not(head, mosaic):
    few = mosaic.draw_map(head.spread * 0, MAP_STYLES["sigbits"])
    many = mosaic.draw_map(head.spread * 0 + 20, MAP_STYLES["sigbits"])
    middle = (80, 100)
    assert np.ptp(pixels(few)[middle]) > 50 >= 5 > np.ptp(pixels(many)[middle])


def test_nan_is_transparent(head, mosaic):
    style, nothing = MAP_STYLES["entropy"], np.zeros_like(head.spread)
    assert mosaic.draw_map(nothing * np.nan, style) == mosaic.draw_map(nothing, style)


def test_unreliable_voxels_are_filled(head, mosaic):
    drawn = pixels(mosaic.draw_mask(head.labels == 2)).reshape(-1, 3)
    assert (drawn == mosaics.UNRELIABLE_RGB).all(axis=1).sum() > 1000


def test_png_carries_no_metadata(head, mosaic):
    png = mosaic.draw_mask(head.labels == 2)
    assert Image.open(io.BytesIO(png)).info == {}


def test_array_of_another_grid_is_refused(head, mosaic):
    with pytest.raises(ValueError, match="shape"):
        mosaic.draw_mask(head.labels[:-1] == 2)
    with pytest.raises(ValueError, match="shape"):
        Mosaic(head.t1w[:-1], head.labels, head.affine)


def test_nan_voxels_of_the_t1w_are_drawn(head):
    holes = head.t1w.copy()
    holes[::5] = np.nan
    assert Mosaic(holes, head.labels, head.affine).draw_labels(STRUCTURES)[:4] == b"\x89PNG"


def test_pyplot_is_not_imported(subprocess_modules):
    assert "matplotlib.pyplot" not in subprocess_modules


@pytest.fixture
def subprocess_modules():
    import subprocess
    import sys

    code = "import sys, bids_varaug.reports.mosaics, bids_varaug.reports.plots; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return run.stdout.split()
