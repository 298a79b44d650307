"""Class probabilities as sparse rows, and their files."""

import numpy as np
import pytest

from bids_varaug.segmentation.fuse import (
    SMALLEST,
    SparsePosterior,
    load_posterior,
    save_posterior,
    sparse_rows,
)

SHAPE = (5, 10, 10)


def random_rows(n_classes: int, n: int = 500) -> np.ndarray:
    return np.random.default_rng(0).dirichlet([0.05] * n_classes, n).astype(np.float32)


@pytest.mark.parametrize("n_classes", [2, 32, 256])
def test_rows_come_back_but_for_what_is_near_zero(n_classes, tmp_path):
    rows = random_rows(n_classes)
    rows[3] = np.full(n_classes, 1 / n_classes)
    sparse = SparsePosterior.from_rows(sparse_rows(rows, np.ones(500, bool)), SHAPE)
    save_posterior(tmp_path / "a.safetensors", sparse)
    again = load_posterior(tmp_path / "a.safetensors")
    assert np.array_equal(again.labels, sparse.labels)
    assert again.rows.shape == (500, n_classes)
    assert abs(again.rows - sparse.rows).max() == 0
    dense = again.rows.toarray()
    np.testing.assert_array_equal(dense[:, 1:], np.where(rows > SMALLEST, rows, 0)[:, 1:])
    # What is not stored counts as background.
    np.testing.assert_allclose(1 - dense.sum(axis=1), rows[:, 0], atol=n_classes * SMALLEST)


def test_what_is_lost_is_no_more_than_the_step_of_a_probability_near_one():
    step = np.spacing(np.float32(1))
    rows = np.array([[0.5, 0.5 - 2 * step, step, 1.01 * step]], np.float32)
    assert sparse_rows(rows, np.ones(1, bool)).toarray().tolist() == [[0, rows[0, 1], 0, rows[0, 3]]]


def test_only_stored_voxels_have_rows():
    stored = np.arange(500) % 7 == 0
    rows = random_rows(4, stored.sum())
    rows[:, 1] += 2 * SMALLEST  # so that each has an entry
    sparse = SparsePosterior.from_rows(sparse_rows(rows, stored), SHAPE)
    assert np.array_equal(sparse.stored, stored)
    np.testing.assert_allclose(sparse.posterior.sum(axis=1), 1, atol=1e-6)
    assert not sparse.labels.ravel()[~stored].any()


def test_nothing_is_stored():
    rows = sparse_rows(np.empty((0, 5), np.float32), np.zeros(500, bool))
    assert SparsePosterior.from_rows(rows, SHAPE).posterior.shape == (0, 5)
