"""The grids on which a head may be segmented."""

from itertools import combinations

import numpy as np

from bids_varaug.segmentation.grids import GRIDS, move_to_grid
from tests.segmentation.test_predict import image

__all__ = ["image"]  # fixture


def test_choices_hold_both_cuts_of_an_axis_equally_often():
    for number, grids in GRIDS.items():
        assert len(set(grids)) == number and grids[0] == (0, 0, 0)
        assert number == 1 or np.mean(grids, axis=0).tolist() == [0.5, 0.5, 0.5]
    for a, b in combinations(range(3), 2):
        assert {(grid[a], grid[b]) for grid in GRIDS[4]} == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_first_grid_is_the_image_itself(image):
    assert np.array_equal(move_to_grid(image, (0, 0, 0)), image)


def test_grids_lie_one_voxel_further(image):
    moved = move_to_grid(image, (1, 0, 1))
    assert moved.shape == image.shape
    assert np.array_equal(moved[:-1, :, :-1], image[1:, :, 1:])
