"""What the baseline gains from several grids, given to another member."""

import numpy as np
import pytest

from bids_varaug.segmentation.posterior import SparsePosterior
from bids_varaug.segmentation.shift import shift_posterior
from tests.segmentation.test_predict import dense

SHAPE, K = (4, 5, 6), 3
ROWS = ("offsets", "voxels", "posterior")


def sparse(values: np.ndarray, stored: np.ndarray) -> SparsePosterior:
    """Voxels `stored` (X, Y, Z) of dense values (X, Y, Z, K)."""
    by_slab = stored.reshape(len(stored), -1)
    return SparsePosterior(
        labels=np.where(stored, values.argmax(-1), 0).astype(np.uint8),
        offsets=np.concatenate([[0], np.cumsum(by_slab.sum(1))]),
        voxels=by_slab.nonzero()[1].astype(np.int32),
        posterior=values[stored].astype(np.float32),
    )


@pytest.fixture
def member():
    rng = np.random.default_rng(0)
    return sparse(rng.dirichlet((0.5,) * K, SHAPE), rng.random(SHAPE) < 0.7)


def change(values, stored):
    return sparse(np.broadcast_to(np.asarray(values, float), (*SHAPE, K)), stored)


def test_nothing_to_add_leaves_a_member_as_it_is(member):
    same = shift_posterior(member, change([0, 0, 0], np.zeros(SHAPE, bool)))
    assert all(np.array_equal(getattr(same, n), getattr(member, n)) for n in (*ROWS, "labels"))


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
    for start, stop in zip(moved.offsets[:-1], moved.offsets[1:], strict=True):
        assert (np.diff(moved.voxels[start:stop]) > 0).all()


def test_two_members_stay_as_far_apart(member):
    """Where nothing falls below 0, a common change takes nothing from their difference."""
    rng = np.random.default_rng(2)
    a, b = (sparse(rng.dirichlet((50,) * K, SHAPE), np.ones(SHAPE, bool)) for _ in range(2))
    shift = change([-0.1, 0.06, 0.04], np.ones(SHAPE, bool))
    moved = [shift_posterior(x, shift).posterior for x in (a, b)]
    np.testing.assert_allclose(moved[0] - moved[1], a.posterior - b.posterior, atol=1e-6)
