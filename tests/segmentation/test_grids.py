"""One head on two grids."""

import numpy as np
import pytest
import torch

from bids_varaug.models.unet import build_network
from bids_varaug.segmentation.grids import segment_on_grids
from bids_varaug.segmentation.predict import segment_volume
from tests.segmentation.test_predict import SHAPE, dense, image

__all__ = ["image"]  # fixture


@pytest.fixture(scope="module")
def network():
    """Untrained, but for a liking for background, so that some voxels are not stored."""
    network = build_network(SHAPE, 3).eval().requires_grad_(False)
    with torch.no_grad():
        network.body_head.weight *= 4
        network.rim_head.weight *= 4
        network.body_head.bias.view(8, -1)[:, 0] += 5
    return network


def test_one_grid_is_the_image_itself(network, image):
    one, plain = segment_on_grids(network, image), segment_volume(network, image)
    assert all(np.array_equal(getattr(one, name), getattr(plain, name)) for name in vars(plain))


def test_two_grids_are_averaged_voxel_by_voxel(network, image):
    here = dense(segment_volume(network, image), image.shape)
    moved = np.pad(image[1:, 1:, 1:], [(0, 1)] * 3, mode="edge")
    there = dense(segment_volume(network, moved), image.shape)
    expected = here.copy()  # the first planes are those of the first grid
    expected[1:, 1:, 1:] = (here[1:, 1:, 1:] + there[:-1, :-1, :-1]) / 2
    one_alone = (here[1:, 1:, 1:, 0] == 1) != (there[:-1, :-1, :-1, 0] == 1)
    assert one_alone.sum() > 1000  # stored on one of the grids
    assert np.abs(here - expected).max() > 0.05
    np.testing.assert_allclose(
        dense(segment_on_grids(network, image, 2), image.shape), expected, atol=1e-6
    )


def test_what_is_stored_is_whole_and_in_order(network, image):
    both = segment_on_grids(network, image, 2)
    assert both.offsets[0] == 0 and both.offsets[-1] == len(both.voxels) == len(both.posterior)
    for start, stop in zip(both.offsets[:-1], both.offsets[1:], strict=True):
        assert (np.diff(both.voxels[start:stop]) > 0).all()
    np.testing.assert_allclose(both.posterior.sum(1), 1, atol=1e-5)
    assert both.posterior.dtype == np.float32 and both.labels.dtype == np.uint8
    assert np.array_equal(dense(both, image.shape).argmax(-1), both.labels)


def test_there_is_no_third_grid(network, image):
    with pytest.raises(ValueError, match="3 grids"):
        segment_on_grids(network, image, 3)
