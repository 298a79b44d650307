"""Mosaics: where they cut, what they show, and the same bytes each time."""

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from bids_varaug.models.ensemble import Label
from bids_varaug.reports import mosaics
from bids_varaug.reports.mosaics import MAP_STYLES, draw_labels, draw_map, draw_mask, plan_view

COLORS = {2: (245, 245, 245), 3: (205, 62, 78), 41: (245, 245, 245), 42: (10, 200, 30)}
STRUCTURES = [Label(index, f"Structure-{index}", "#{:02x}{:02x}{:02x}".format(*rgb)) for index, rgb in COLORS.items()]


@pytest.fixture(scope="module")
def view(head):
    return plan_view(head.labels, head.affine, n_slices=3, max_width=600)


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def test_zooms_are_in_ras_order(view):
    assert view.zooms == pytest.approx((2.0, 1.0, 1.5))


def test_slices_pass_through_the_brain(head, view):
    ras = mosaics.apply_orientation(head.labels, view.orientation)
    assert all(
        (np.take(ras, index, axis=axis) > 0).any()
        for axis, cuts in enumerate(view.cuts)
        for index in cuts
    )


def test_empty_labels_show_the_whole_image(head):
    view = plan_view(np.zeros_like(head.labels), head.affine)
    assert view.box == ((0, 32), (0, 32), (0, 32))


def test_axial_slice_has_the_subjects_left_on_the_left(head, view):
    cut = mosaics._sample(head.labels, view, 2, view.cuts[2][1], order=0)
    assert np.median(np.nonzero(cut == 3)[1]) < np.median(np.nonzero(cut == 42)[1])


def test_sagittal_slice_has_superior_at_the_top(head, view):
    up = np.broadcast_to(np.arange(32)[None, ::-1, None], (32, 32, 32)).astype(np.float32)
    cut = mosaics._sample(up, view, 0, view.cuts[0][1], order=1)
    assert cut[0].mean() > cut[-1].mean()


def test_aspect_follows_the_voxel_size(head, view):
    cut = mosaics._sample(head.labels, view, 2, view.cuts[2][1], order=0)
    (x0, x1), (y0, y1) = view.box[:2]
    assert cut.shape[1] / cut.shape[0] == pytest.approx(2.0 * (x1 - x0) / (y1 - y0), rel=0.02)


def test_mosaic_is_no_wider_than_asked(head, view):
    png = draw_labels(head.t1w, head.labels, view, STRUCTURES)
    assert pixels(png).shape[1] <= 600 + 3


def test_contours_have_exactly_the_label_colours(head, view):
    drawn = pixels(draw_labels(head.t1w, head.labels, view, STRUCTURES)).reshape(-1, 3)
    assert (drawn == COLORS[42]).all(axis=1).sum() > 100


def test_inside_of_a_structure_is_left_grey(head, view):
    tile = np.full((*head.labels.shape[:2], 3), 7, np.uint8)
    mosaics._draw_contours(tile, head.labels[:, :, 15], COLORS)
    assert (tile[15, 15] == 7).all()


@pytest.mark.parametrize("key", sorted(MAP_STYLES))
def test_same_map_gives_the_same_bytes(head, view, key):
    first, second = (
        draw_map(head.t1w, head.spread, head.labels, view, MAP_STYLES[key]) for _ in range(2)
    )
    assert first == second


def test_negligible_values_leave_the_image_grey(head, view):
    style = replace(MAP_STYLES["entropy"], negligible=2.0, solid=3.0)
    top = pixels(draw_map(head.t1w, head.spread, head.labels, view, style))[: -mosaics.BAR_HEIGHT]
    shown = top[30:60, 60:160]  # a part of the first tile without text
    assert (shown.max(axis=2) == shown.min(axis=2)).all()


def test_low_significant_bits_are_coloured_and_high_ones_are_not(head, view):
    few = draw_map(head.t1w, head.spread * 0, head.labels, view, MAP_STYLES["sigbits"])
    many = draw_map(head.t1w, head.spread * 0 + 20, head.labels, view, MAP_STYLES["sigbits"])
    middle = (80, 100)
    assert np.ptp(pixels(few)[middle]) > 50 >= 5 > np.ptp(pixels(many)[middle])


def test_nan_is_transparent(head, view):
    values = np.full_like(head.spread, np.nan)
    nothing = np.zeros_like(head.spread)
    style = MAP_STYLES["entropy"]
    assert draw_map(head.t1w, values, head.labels, view, style) == draw_map(
        head.t1w, nothing, head.labels, view, style
    )


def test_unreliable_voxels_are_filled(head, view):
    drawn = pixels(draw_mask(head.t1w, head.labels == 2, head.labels, view)).reshape(-1, 3)
    assert (drawn == mosaics.UNRELIABLE_RGB).all(axis=1).sum() > 1000


def test_png_carries_no_metadata(head, view):
    png = draw_mask(head.t1w, head.labels == 2, head.labels, view)
    assert Image.open(io.BytesIO(png)).info == {}


def test_array_of_another_grid_is_refused(head, view):
    with pytest.raises(ValueError, match="shape"):
        draw_mask(head.t1w[:-1], head.labels == 2, head.labels, view)


def test_nan_voxels_of_the_t1w_are_drawn(head, view):
    holes = head.t1w.copy()
    holes[::5] = np.nan
    assert draw_labels(holes, head.labels, view, STRUCTURES)[:4] == b"\x89PNG"


def test_pyplot_is_not_imported(subprocess_modules):
    assert "matplotlib.pyplot" not in subprocess_modules


@pytest.fixture
def subprocess_modules():
    import subprocess
    import sys

    code = "import sys, bids_varaug.reports.mosaics, bids_varaug.reports.plots; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return run.stdout.split()
