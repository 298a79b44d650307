from __future__ import annotations

import itertools

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel.orientations import inv_ornt_aff

from bids_varaug.images.conform import Volume, conform, resample_map
from bids_varaug.images.load import voxel_volume
from tests.images.conftest import grids

ORIENTATIONS = [
    np.stack([axes, flips], axis=1)
    for axes in itertools.permutations(range(3))
    for flips in itertools.product([1, -1], repeat=3)
]


def volume(data, affine):
    return Volume(np.asarray(data, np.float32), np.asarray(affine, float))


def to_native(conformed, affine, shape):
    return resample_map(
        conformed.data, grids(conformed.affine, conformed.data.shape, affine, shape)
    )


def smooth(shape, sizes):
    """A smooth function of world mm, sampled at voxel centres about a common centre."""
    axes = [(np.arange(n) - (n - 1) / 2) * s for n, s in zip(shape, sizes, strict=True)]
    x, y, z = np.meshgrid(*axes, indexing="ij")
    return np.cos(x / 9) + np.sin(y / 11 + 0.3) + np.cos(z / 10 - 0.5)


@settings(max_examples=48, deadline=None)
@given(
    orientation=st.sampled_from(ORIENTATIONS),
    shape=st.tuples(*[st.integers(2, 9)] * 3),
    origin=st.tuples(*[st.floats(-150, 150)] * 3),
)
def test_flips_and_permutations_come_back_bit_for_bit(orientation, shape, origin):
    data = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    affine = inv_ornt_aff(orientation, shape)
    affine[:3, 3] += origin
    affine = affine.astype(np.float32).astype(float)  # as a header holds it
    conformed = conform(volume(data, affine), 1.0)
    assert nib.aff2axcodes(conformed.affine) == ("R", "A", "S")
    assert sorted(conformed.data.ravel()) == sorted(data.ravel())
    back = to_native(conformed, affine, shape)
    assert np.array_equal(back, data)


@pytest.mark.parametrize("orientation", ORIENTATIONS[::7], ids=str)
def test_conforming_agrees_with_nibabels_canonical_image(orientation):
    data = np.random.default_rng(0).normal(size=(4, 5, 6)).astype(np.float32)
    affine = inv_ornt_aff(orientation, data.shape)
    canonical = nib.as_closest_canonical(nib.Nifti1Image(data, affine))
    conformed = conform(volume(data, affine), 1.0)
    assert np.array_equal(conformed.data, canonical.get_fdata(dtype=np.float32))
    np.testing.assert_allclose(conformed.affine, canonical.affine)


@pytest.mark.parametrize("sizes", [(0.5, 0.5, 0.5), (0.868, 0.868, 1.0), (1, 1.2, 3), (2, 2, 2)])
def test_resampled_image_has_the_same_world_content(sizes):
    shape = tuple(round(80 / s) for s in sizes)
    conformed = conform(volume(smooth(shape, sizes), np.diag([*sizes, 1])), 1.0)
    inner = (slice(6, -6),) * 3
    expected = smooth(conformed.data.shape, (1, 1, 1))
    np.testing.assert_allclose(conformed.data[inner], expected[inner], atol=0.05)


def test_centre_and_voxel_size_of_the_grid():
    affine = np.array([[0, -0.8, 0.1, 3], [0.7, 0, 0, -5], [0, 0.1, 1.3, 8], [0, 0, 0, 1]])
    image = volume(np.random.default_rng(0).normal(size=(30, 41, 22)), affine)
    conformed = conform(image, 1.0)
    np.testing.assert_allclose(np.linalg.norm(conformed.affine[:3, :3], axis=0), 1)
    middle = [v.affine @ [*((np.array(v.data.shape) - 1) / 2), 1] for v in (image, conformed)]
    np.testing.assert_allclose(*middle, atol=1e-9)


def test_field_of_view_is_covered():
    conformed = conform(volume(np.ones((30, 41, 22)), np.diag([0.7, 1.3, 2.2, 1])), 1.0)
    assert conformed.data.shape == (21, 54, 49)


def test_fine_checkerboard_is_averaged_not_aliased():
    data = np.indices((40, 40, 40)).sum(0) % 2
    conformed = conform(volume(data, np.diag([0.5, 0.5, 0.5, 1])), 2.0)
    np.testing.assert_allclose(conformed.data[2:-2, 2:-2, 2:-2], 0.5, atol=0.01)


def test_coarse_native_voxel_is_the_mean_of_what_it_contains():
    data = np.random.default_rng(0).normal(size=(6, 6, 6)).astype(np.float32)
    affine = np.diag([3.0, 3, 3, 1])
    affine[:3, 3] = 1
    native = resample_map(data, grids(np.eye(4), data.shape, affine, (2, 2, 2)))
    np.testing.assert_allclose(native, data.reshape(2, 3, 2, 3, 2, 3).mean((1, 3, 5)), atol=1e-6)


def test_labels_keep_their_type_and_values_at_order_0():
    data = np.random.default_rng(0).choice([0, 3, 200], (10, 10, 10)).astype(np.uint8)
    geometry = grids(np.eye(4), data.shape, np.diag([0.7, 0.7, 0.7, 1]), (14, 14, 14))
    native = resample_map(data, geometry, order=0)
    assert native.dtype == np.uint8 and set(np.unique(native)) <= {0, 3, 200}


def turned(degrees, shear=0.0, sizes=(1.0, 1.0, 1.0)):
    """An affine whose first two axes are turned, and the third sheared, by so many degrees."""
    affine = np.diag([*sizes, 1.0])
    angle = np.deg2rad(degrees)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    turn[1, 2] = np.tan(np.deg2rad(shear))
    return turn @ affine


def ball(affine, shape, radius=30.0):
    """A smooth-edged ball about the middle of the image; its volume does not depend on the grid."""
    index = np.indices(shape).reshape(3, -1) - (np.array(shape)[:, None] - 1) / 2
    distance = np.linalg.norm(affine[:3, :3] @ index, axis=0).reshape(shape)
    return np.clip(radius + 0.5 - distance, 0, 1)


@settings(max_examples=40, deadline=None)
@given(
    degrees=st.floats(-60, 60),
    shear=st.floats(-30, 30),
    sizes=st.tuples(*[st.sampled_from([0.8, 1.0, 1.0009, 1.3])] * 3),
    orientation=st.sampled_from(ORIENTATIONS),
)
def test_volume_of_a_ball_is_right_in_any_grid(degrees, shear, sizes, orientation):
    affine = turned(degrees, shear, sizes)
    shape = (110, 100, 90)
    affine = affine @ inv_ornt_aff(orientation, shape)
    conformed = conform(volume(ball(affine, shape), affine), 1.0)
    found = conformed.data.sum() * voxel_volume(conformed.affine)
    assert found == pytest.approx(4 / 3 * np.pi * 30**3, rel=0.01)


@pytest.mark.parametrize("degrees", [0, 4, 20, 44])
def test_oblique_maps_come_back_to_where_they_were(degrees):
    affine, shape = turned(degrees), (80, 84, 76)
    conformed = conform(volume(ball(affine, shape, 25), affine), 1.0)
    back = to_native(conformed, affine, shape)
    assert np.abs(back - ball(affine, shape, 25)).mean() < 0.003
    whole = grids(conformed.affine, conformed.data.shape, affine, shape)
    labels = resample_map(conformed.data > 0.5, whole, order=0)
    assert np.mean(labels != (ball(affine, shape, 25) > 0.5)) < 0.005


def test_oblique_image_is_straightened_only_beyond_a_few_degrees():
    image = ball(np.eye(4), (80, 80, 80))
    assert np.array_equal(conform(volume(image, turned(4)), 1.0).data, image.astype(np.float32))
    np.testing.assert_allclose(
        conform(volume(image, turned(20)), 1.0).affine[:3, :3], np.eye(3), atol=1e-9
    )


def test_real_head_agrees_with_another_tools_conformed_image(shared_data):
    from bids_varaug.images.conform import load_t1w

    ours = conform(load_t1w(shared_data / "t1w" / "rorden_T1w.nii.gz"), 1.0)
    other = load_t1w(shared_data / "t1w" / "rorden_desc-conform_T1w.nii.gz")
    theirs = conform(other, 1.0)
    shift = np.round(ours.affine[:3, 3] - theirs.affine[:3, 3]).astype(int)
    window = tuple(slice(s, s + n) for s, n in zip(shift, ours.data.shape, strict=True))
    found = theirs.data[window]
    assert np.corrcoef(found[::3].ravel(), ours.data[::3].ravel())[0, 1] > 0.95
