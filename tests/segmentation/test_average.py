"""The mean over several grids, and what it adds to the first."""

import numpy as np
import pytest
import torch

from bids_varaug.errors import UserError
from bids_varaug.models.unet import build_network
from bids_varaug.segmentation.average import average_grids
from bids_varaug.segmentation.grids import GRIDS, move_to_grid
from bids_varaug.segmentation.posterior import load_posterior, save_posterior
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


@pytest.fixture(scope="module", params=(2, 4))
def averaged(request, network, image, tmp_path_factory):
    """Grids, posteriors on them (dense, where they lie in the image), files of mean and shift."""
    folder = tmp_path_factory.mktemp("grids")
    grids, paths, posteriors = GRIDS[request.param], [], []
    for number, offset in enumerate(grids):
        sparse = segment_volume(network, move_to_grid(image, offset))
        paths.append(folder / f"{number}.safetensors")
        save_posterior(paths[-1], sparse, {})
        posterior = np.full((*image.shape, SHAPE.n_classes), np.nan)
        here = tuple(slice(start, None) for start in offset)
        there = tuple(slice(side - start) for side, start in zip(image.shape, offset, strict=True))
        posterior[here] = dense(sparse, image.shape)[there]
        posteriors.append(posterior)
    files = folder / "mean.safetensors", folder / "shift.safetensors"
    average_grids(paths, grids, *files, {"member": "ieee"})
    return posteriors, *map(load_posterior, files)


def test_mean_is_that_of_the_grids_on_which_a_voxel_lies(averaged, image):
    posteriors, mean, _ = averaged
    expected = np.nanmean(posteriors, axis=0)
    stored = np.array(posteriors)[..., 0] < 1
    assert (stored[0] != stored[1]).sum() > 1000  # on some of the grids alone
    assert np.abs(posteriors[0] - expected).max() > 0.05
    np.testing.assert_allclose(dense(mean, image.shape), expected, atol=1e-6)
    np.testing.assert_array_equal(mean.labels, dense(mean, image.shape).argmax(-1))


def test_shift_is_what_the_mean_adds_to_the_first(averaged, image):
    posteriors, mean, shift = averaged
    assert np.array_equal(shift.offsets, mean.offsets)
    assert np.array_equal(shift.voxels, mean.voxels)
    sparse_first = dense(mean, image.shape) - posteriors[0]
    slabs = np.repeat(np.arange(len(image)), np.diff(shift.offsets))
    expected = sparse_first.reshape(len(image), -1, SHAPE.n_classes)[slabs, shift.voxels]
    np.testing.assert_allclose(shift.posterior, expected, atol=1e-6)
    np.testing.assert_allclose(shift.posterior.sum(1), 0, atol=1e-5)


def test_what_is_stored_is_whole_and_in_order(averaged):
    _, mean, _ = averaged
    assert mean.offsets[0] == 0 and mean.offsets[-1] == len(mean.voxels) == len(mean.posterior)
    for start, stop in zip(mean.offsets[:-1], mean.offsets[1:], strict=True):
        assert (np.diff(mean.voxels[start:stop]) > 0).all()
    np.testing.assert_allclose(mean.posterior.sum(1), 1, atol=1e-5)


def test_boxes_that_differ_are_refused(network, image, tmp_path):
    for name, part in (("a", image), ("b", image[:16])):
        save_posterior(tmp_path / name, segment_volume(network, part), {})
    with pytest.raises(UserError, match="voxels"):
        average_grids(
            [tmp_path / "a", tmp_path / "b"], GRIDS[2], tmp_path / "mean", tmp_path / "shift"
        )
    assert not (tmp_path / "mean").exists()
