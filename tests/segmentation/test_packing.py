"""Rows of probabilities without their zeros."""

import numpy as np
import pytest

from bids_varaug.segmentation.packing import SMALLEST, pack_rows, unpack_rows


@pytest.mark.parametrize("n_classes", [2, 32, 256])
def test_rows_come_back_but_for_what_is_near_zero(n_classes):
    rng = np.random.default_rng(0)
    rows = rng.dirichlet([0.05] * n_classes, 500).astype(np.float32)
    rows[3] = 0
    rows[4] = -1 / n_classes  # a change may be negative, and of every class
    packed = pack_rows(rows)
    assert np.array_equal(unpack_rows(packed, n_classes), np.where(abs(rows) > SMALLEST, rows, 0))
    assert packed.counts[3] == 0 and packed.counts[4] == n_classes
    assert len(packed.values) == len(packed.classes) == packed.counts.sum()


def test_what_is_lost_is_no_more_than_the_step_of_a_probability_near_one():
    step = np.spacing(np.float32(1))
    rows = np.array([[1, step, 1.01 * step, -step / 3]], np.float32)
    assert unpack_rows(pack_rows(rows), 4).tolist() == [[1, 0, rows[0, 2], 0]]


def test_nothing_is_packed():
    assert unpack_rows(pack_rows(np.empty((0, 5), np.float32)), 5).shape == (0, 5)
