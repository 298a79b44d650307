from __future__ import annotations

import itertools

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel.orientations import inv_ornt_aff

from bids_varaug.images.conform import Volume, axis_maps, axis_taps, conform, to_native_scalar

ORIENTATIONS = [
    np.stack([axes, flips], axis=1)
    for axes in itertools.permutations(range(3))
    for flips in itertools.product([1, -1], repeat=3)
]


def volume(data, affine):
    return Volume(np.asarray(data, np.float32), np.asarray(affine, float), nib.Nifti1Header())


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
    back = to_native_scalar(conformed.data, conformed.affine, affine, shape)
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
    native = to_native_scalar(data, np.eye(4), affine, (2, 2, 2))
    np.testing.assert_allclose(native, data.reshape(2, 3, 2, 3, 2, 3).mean((1, 3, 5)), atol=1e-6)


def test_labels_keep_their_type_and_values_at_order_0():
    data = np.random.default_rng(0).choice([0, 3, 200], (10, 10, 10)).astype(np.uint8)
    native = to_native_scalar(data, np.eye(4), np.diag([0.7, 0.7, 0.7, 1]), (14, 14, 14), order=0)
    assert native.dtype == np.uint8 and set(np.unique(native)) <= {0, 3, 200}


def test_grids_that_are_rotated_against_each_other_are_refused():
    turned = np.eye(4)
    turned[:2, :2] = [[0.9, -0.436], [0.436, 0.9]]
    with pytest.raises(ValueError, match="share their axes"):
        axis_maps(np.eye(4), turned)


def test_order_2_is_refused():
    with pytest.raises(ValueError, match="order"):
        axis_taps(3, 3, 1.0, 0.0, order=2)


@given(
    n_out=st.integers(1, 12),
    n_in=st.integers(1, 12),
    scale=st.floats(-3, 3),
    offset=st.floats(-5, 15),
    samples=st.integers(1, 4),
)
@settings(deadline=None)
def test_taps_weigh_one_and_lie_inside(n_out, n_in, scale, offset, samples):
    taps = axis_taps(n_out, n_in, scale, offset, samples)
    np.testing.assert_allclose(taps.weights.sum(1), 1, atol=1e-5)
    assert taps.indices.min() >= 0 and taps.indices.max() < n_in


def test_real_head_agrees_with_another_tools_conformed_image(shared_data):
    from bids_varaug.images.conform import load_t1w

    ours = conform(load_t1w(shared_data / "t1w" / "rorden_T1w.nii.gz"), 1.0)
    other = load_t1w(shared_data / "t1w" / "rorden_desc-conform_T1w.nii.gz")
    theirs = conform(other, 1.0)
    shift = np.round(ours.affine[:3, 3] - theirs.affine[:3, 3]).astype(int)
    window = tuple(slice(s, s + n) for s, n in zip(shift, ours.data.shape, strict=True))
    found = theirs.data[window]
    assert np.corrcoef(found[::3].ravel(), ours.data[::3].ravel())[0, 1] > 0.95
