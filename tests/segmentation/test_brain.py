"""The mask of the brain: closed, filled, one part."""

import numpy as np
import pytest
from scipy.ndimage import distance_transform_edt, label

from bids_varaug.images.conform import Box, Geometry
from bids_varaug.segmentation.brain import CLOSING_MM, brain_mask, depth_of_brain, fill_holes

SIDE = 48


@pytest.fixture
def brain() -> np.ndarray:
    """A ball with a ventricle inside, a sulcus 4 mm wide, and a gap too wide to be one."""
    x, y, z = np.indices((SIDE,) * 3) - SIDE / 2 + 0.5
    radius = np.sqrt(x**2 + y**2 + z**2)
    ball = (radius < 20) & ~(radius < 5)
    ball[(np.abs(x) < 2) & (y > 0)] = False  # sulcus
    ball[(np.abs(z) < 8) & (y < -8)] = False  # wide
    return ball


def geometry(voxel: float) -> Geometry:
    """Network grid of `voxel` mm whose head box is all of it, and an image of 1 mm of the same extent."""
    n = round(SIDE / voxel)
    conformed = np.diag([voxel, voxel, voxel, 1.0])
    conformed[:3, 3] = (voxel - 1) / 2
    return Geometry(voxel, Box((0, 0, 0), (n, n, n)), (n,) * 3, conformed, (SIDE,) * 3, np.eye(4), 1.0, ())


def test_mask_fills_ventricles_and_sulci_and_leaves_wide_gaps(brain):
    mask = brain_mask(brain, brain, geometry(1.0))
    centre = SIDE // 2
    assert mask[centre, centre, centre] and mask[centre, centre + 15, centre]
    assert not mask[centre, centre - 17, centre]
    assert (mask >= brain).all()


def test_mask_is_one_part_without_holes(brain):
    speck = brain.copy()
    speck[1, 1, 1] = True
    mask = brain_mask(brain, speck, geometry(1.0))
    assert label(mask)[1] == 1 and label(~mask)[1] == 1 and not mask[1, 1, 1]


def test_surface_of_a_coarser_grid_is_within_a_voxel_of_the_finer(brain):
    fine = brain_mask(brain, brain, geometry(1.0))
    coarse = brain.reshape(SIDE // 2, 2, SIDE // 2, 2, SIDE // 2, 2).mean(axis=(1, 3, 5)) >= 0.5
    other = brain_mask(coarse, brain, geometry(2.0))
    from_surface = distance_transform_edt(fine) + distance_transform_edt(~fine)
    assert from_surface[fine != other].max() <= 2.0


def test_closing_reaches_what_no_ball_outside_of_the_structures_does(brain):
    """By definition: a voxel is out if some ball of the radius holds it and no structure."""
    found = depth_of_brain(np.pad(brain, 8), 1.0, rim=0.0) > 0
    free = distance_transform_edt(~np.pad(brain, 8)) > CLOSING_MM  # centres of such balls
    assert np.array_equal(found, distance_transform_edt(~free) > CLOSING_MM)


def test_rim_of_a_millimetre_lies_around_the_structures(brain):
    rim = distance_transform_edt(~brain) <= 1
    mask = brain_mask(brain, brain, geometry(1.0))
    closed = depth_of_brain(brain, 1.0, rim=0.0) > 0
    assert mask[rim].all() and not mask[distance_transform_edt(~closed) > 1.5].any()


def test_nothing_to_mask_is_an_empty_mask():
    nothing = np.zeros((4, 4, 4), bool)
    assert not fill_holes(nothing).any() and not depth_of_brain(nothing, 1.0).any()
