import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from bids_varaug.segmentation.fastsurfer import brain_mask, flip_islands, reduce_to_aseg, split_hemispheres


@pytest.mark.parametrize("subject", ["phantom", "bert"])
def test_labels_are_those_of_fastsurfer(golden, subject):
    """Cortex by hemisphere, brain mask, and reduced labels with islands flipped: every voxel."""

    def read(step):
        return np.asanyarray(nib.load(golden / f"postprocess_{subject}_{step}.nii.gz").dataobj)

    ids = read("input")
    before = ids.copy()
    split, _ = split_hemispheres(ids)
    np.testing.assert_array_equal(split, read("lateralised"))
    mask = brain_mask(split)
    np.testing.assert_array_equal(mask, read("mask"))
    np.testing.assert_array_equal(flip_islands(reduce_to_aseg(split, mask)), read("aseg"))
    np.testing.assert_array_equal(ids, before)


@pytest.fixture
def two_hemispheres():
    """White matter of both sides, x = 5..14 left and 25..34 right, with parcel 1003 beside each."""
    ids = np.zeros((40, 24, 24), np.int16)
    ids[5:15, 5:19, 5:19], ids[25:35, 5:19, 5:19] = 2, 41
    ids[3:5, 5:19, 5:19] = ids[35:37, 5:19, 5:19] = 1003
    return ids


def test_each_part_of_a_parcel_goes_to_the_nearer_white_matter(two_hemispheres):
    split, right = split_hemispheres(two_hemispheres)
    assert (split[3:5, 5:19, 5:19] == 1003).all()
    assert (split[35:37, 5:19, 5:19] == 2003).all()
    assert right[33:40, 12, 12].all()
    assert not right[:8, 12, 12].any()


def test_a_mirrored_head_has_mirrored_sides(two_hemispheres):
    mirrored = two_hemispheres[::-1].copy()
    mirrored[two_hemispheres[::-1] == 2], mirrored[two_hemispheres[::-1] == 41] = 41, 2
    there, back = split_hemispheres(two_hemispheres)[0], split_hemispheres(mirrored)[0][::-1]
    np.testing.assert_array_equal((there == 1003), (back == 2003))


@pytest.mark.parametrize("white", [2, 41])
def test_without_white_matter_of_a_side_parcels_stay_as_they_are(two_hemispheres, white):
    two_hemispheres[two_hemispheres == white] = 0
    split, right = split_hemispheres(two_hemispheres)
    np.testing.assert_array_equal(split, two_hemispheres)
    assert not right.any()


def test_the_mask_covers_the_labels_in_one_part(two_hemispheres):
    two_hemispheres[0, 0, 0] = 24  # a speck far off
    mask = brain_mask(two_hemispheres)
    assert mask[two_hemispheres == 2].all()
    assert ndimage.label(mask, np.ones((3, 3, 3)))[1] == 1


def test_an_island_goes_to_the_hemisphere_around_it(two_hemispheres):
    two_hemispheres[30, 12, 12] = 2
    flipped = flip_islands(two_hemispheres)
    assert flipped[30, 12, 12] == 41
    assert (flipped != two_hemispheres).sum() == 1
