"""Grids that lie a voxel apart: their mean, and what it adds to other members."""

from itertools import combinations

import numpy as np
import pytest
import torch

from bids_varaug.errors import UserError
from bids_varaug.models.unet import build_network
from bids_varaug.segmentation.fuse import (
    SparsePosterior,
    load_posterior,
    save_posterior,
    sparse_rows,
)
from bids_varaug.segmentation.predict import segment_volume
from bids_varaug.segmentation.shifts import GRIDS, average_grids, move_to_grid, shift_posterior
from tests.segmentation import test_predict
from tests.segmentation.test_predict import dense, image

__all__ = ["image"]  # fixture

SHAPE, K = (4, 5, 6), 3


def sparse(values: np.ndarray, stored: np.ndarray) -> SparsePosterior:
    """Voxels `stored` (X, Y, Z) of dense values (X, Y, Z, K)."""
    rows = values[stored].astype(np.float32)
    return SparsePosterior.from_rows(sparse_rows(rows, stored.ravel()), SHAPE)


@pytest.fixture
def member():
    rng = np.random.default_rng(0)
    return sparse(rng.dirichlet((0.5,) * K, SHAPE), rng.random(SHAPE) < 0.7)


def change(values, stored):
    return sparse(np.broadcast_to(np.asarray(values, float), (*SHAPE, K)), stored)


def test_nothing_to_add_leaves_a_member_as_it_is(member):
    same = shift_posterior(member, change([0, 0, 0], np.zeros(SHAPE, bool)))
    assert np.array_equal(same.labels, member.labels)
    np.testing.assert_allclose(same.rows.toarray(), member.rows.toarray(), atol=1e-7)


def test_change_is_added_to_what_is_stored_and_to_background(member):
    where = np.random.default_rng(1).random(SHAPE) < 0.5
    before = dense(member, SHAPE)
    assert (where & (before[..., 0] == 1)).any() and (where & (before[..., 0] < 1)).any()
    moved = shift_posterior(member, change([-0.1, 0.06, 0.04], where))
    expected = before.copy()
    expected[where] = np.clip(expected[where] + [-0.1, 0.06, 0.04], 0, None)
    expected /= expected.sum(-1, keepdims=True)
    np.testing.assert_allclose(dense(moved, SHAPE), expected, atol=1e-6)
    np.testing.assert_array_equal(moved.labels, expected.argmax(-1))
    assert moved.posterior.min() >= 0


def test_two_members_stay_as_far_apart(member):
    """Where nothing falls below 0, a common change takes nothing from their difference."""
    rng = np.random.default_rng(2)
    a, b = (sparse(rng.dirichlet((50,) * K, SHAPE), np.ones(SHAPE, bool)) for _ in range(2))
    shift = change([-0.1, 0.06, 0.04], np.ones(SHAPE, bool))
    moved = [shift_posterior(x, shift).posterior for x in (a, b)]
    np.testing.assert_allclose(moved[0] - moved[1], a.posterior - b.posterior, atol=1e-6)


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


@pytest.fixture(scope="module")
def network():
    """Untrained, but for a liking for background, so that some voxels are not stored."""
    network = build_network(test_predict.SHAPE, 3).eval().requires_grad_(False)
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
        save_posterior(paths[-1], sparse)
        posterior = np.full((*image.shape, test_predict.SHAPE.n_classes), np.nan)
        here = tuple(slice(start, None) for start in offset)
        there = tuple(slice(side - start) for side, start in zip(image.shape, offset, strict=True))
        posterior[here] = dense(sparse, image.shape)[there]
        posteriors.append(posterior)
    files = folder / "mean.safetensors", folder / "shift.safetensors"
    average_grids(paths, grids, *files)
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
    difference = (dense(mean, image.shape) - posteriors[0]).reshape(-1, test_predict.SHAPE.n_classes)
    assert shift.rows.data.min() < -0.05 and shift.rows.data.max() > 0.05
    np.testing.assert_allclose(shift.rows.toarray()[:, 1:], difference[:, 1:], atol=1e-6)


def test_what_is_stored_is_whole(averaged):
    _, mean, _ = averaged
    assert len(mean.posterior) == mean.stored.sum()
    np.testing.assert_allclose(mean.posterior.sum(1), 1, atol=1e-5)


def test_boxes_that_differ_are_refused(network, image, tmp_path):
    for name, part in (("a", image), ("b", image[:16])):
        save_posterior(tmp_path / name, segment_volume(network, part))
    with pytest.raises(UserError, match="voxels"):
        average_grids([tmp_path / "a", tmp_path / "b"], GRIDS[2], tmp_path / "mean", tmp_path / "shift")
    assert not (tmp_path / "mean").exists()
