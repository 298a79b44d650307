from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bids_varaug.images.conform import Box, extract, head_box, head_mask, insert, is_probably_cropped

sides = st.tuples(*[st.integers(1, 7)] * 3)


def covers(box, low, high):
    return all(np.array(box.start) <= low) and all(np.array(box.stop) >= high)


def bounds(mask):
    where = np.argwhere(mask)
    return where.min(0), where.max(0) + 1


def big_head(noise=5.0):
    """An ellipsoid of 140 x 170 x 150 mm in a 200 x 220 x 256 grid at 2 mm, centre a bit high."""
    x, y, z = np.ogrid[:100, :110, :128]
    inside = ((x - 50) / 35) ** 2 + ((y - 55) / 42.5) ** 2 + ((z - 80) / 37.5) ** 2 < 1
    air = np.random.default_rng(0).rayleigh(noise, inside.shape) if noise else 0
    return (100.0 * inside + air).astype(np.float32), inside


def doubt_about(image, voxel_size=2.0):
    return is_probably_cropped(head_mask(image, voxel_size), voxel_size)


@pytest.mark.parametrize("noise", [0, 5, 10])
def test_box_covers_the_head_in_noisy_or_zero_background(noise):
    image, inside = big_head(noise)
    assert covers(head_box(image, 2.0), *bounds(inside))


def test_box_is_the_smallest_multiple_of_32():
    image, _ = big_head()
    assert head_box(image, 2.0).shape == (96, 96, 96)


def test_bright_specks_do_not_enlarge_the_box():
    image, _ = big_head()
    expected = head_box(image, 2.0)
    image[2:4, 2:4, 2:4] = 1000
    image[97, 100, 120] = 5000
    assert head_box(image, 2.0) == expected


def test_long_neck_is_left_out():
    image, inside = big_head(0)
    image[40:60, 45:65, :70] = 100
    box = head_box(image, 2.0, multiple=1)
    assert box.stop[2] - box.start[2] == 100 and box.stop[2] >= bounds(inside)[1][2]


def test_box_reaches_beyond_an_image_that_is_too_small():
    box = head_box(np.pad(np.full((20, 40, 20), 9.0, np.float32), 1), 1.0)
    assert box.shape == (32, 64, 32) and box.start[0] < 0


def test_head_that_fills_the_image_gives_the_whole_image():
    image = np.random.default_rng(0).normal(100, 1, (64, 64, 64)).astype(np.float32)
    assert covers(head_box(image, 2.0), (0, 0, 0), (64, 64, 64))


def test_whole_head_gives_no_warning():
    assert doubt_about(big_head()[0]) is None


def test_head_cut_at_the_top_gives_a_warning():
    assert "top" in doubt_about(big_head()[0][:, :, :95])


def test_head_cut_at_the_side_gives_a_warning():
    assert "left" in doubt_about(big_head()[0][40:])


def test_background_as_bright_as_the_head_is_called_that():
    image, inside = big_head()
    image[~inside] = 130
    assert "cannot be told apart" in doubt_about(image)


@pytest.mark.parametrize("field_of_view", [slice(None), slice(20, 90)], ids=["wide", "tight"])
def test_padding_does_not_move_the_box(field_of_view):
    image = big_head()[0][field_of_view, field_of_view, field_of_view]
    box = head_box(image, 2.0)
    padded = head_box(np.pad(image, ((7, 0), (2, 11), (0, 4))), 2.0)
    assert padded == Box(tuple(np.add(box.start, (7, 2, 0)).tolist()), box.shape)


def test_small_head_gives_a_warning(head):
    assert "incomplete" in doubt_about(head, 1.0)


@settings(deadline=None)
@given(shape=sides, box=st.builds(Box, st.tuples(*[st.integers(-9, 9)] * 3), sides))
def test_insert_undoes_extract_inside_the_box(shape, box):
    data = np.arange(1, 1 + np.prod(shape)).reshape(shape)
    back = insert(extract(data, box), box, shape)
    index = np.indices(shape)
    inside = np.logical_and.reduce(
        [(i >= a) & (i < b) for i, a, b in zip(index, box.start, box.stop, strict=True)]
    )
    assert np.array_equal(back, np.where(inside, data, 0))


def test_insert_refuses_data_of_another_shape():
    with pytest.raises(ValueError, match="do not fill"):
        insert(np.zeros((2, 2, 2)), Box((0, 0, 0), (3, 2, 2)), (5, 5, 5))


@pytest.mark.parametrize("name", ["bert/bert_desc-norm", "mnesample_res-3mm"])
def test_box_covers_the_brain_of_real_images(shared_data, name):
    import nibabel as nib

    from bids_varaug.images.conform import conform, load_t1w

    image = conform(load_t1w(shared_data / "t1w" / f"{name}_T1w.nii.gz"), 2.0)
    labels_name = name.replace("_desc-norm", "") + "_desc-aseg_dseg.nii.gz"
    labels = nib.load(shared_data / "t1w" / labels_name)
    corners = np.argwhere(labels.get_fdata() > 0)[::50]
    world = nib.affines.apply_affine(labels.affine, corners)
    places = nib.affines.apply_affine(np.linalg.inv(image.affine), world)
    assert covers(head_box(image.data, 2.0), places.min(0), places.max(0) + 0.5)
