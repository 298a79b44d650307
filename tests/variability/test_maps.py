from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from bids_varaug.variability.measures import calibrate, posterior_entropy, significant_bits, vote_entropy


def count(labels, n_classes):
    return (np.asarray(labels)[None] == np.arange(n_classes)[:, None, None]).sum(1)


member_labels = st.integers(2, 9).flatmap(
    lambda m: st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=3), min_size=m, max_size=m)
)


@settings(deadline=None)
@given(member_labels)
def test_entropy_is_scipys_and_within_its_bounds(labels):
    entropy = vote_entropy(count(labels, 5), len(labels))
    expected = scipy.stats.entropy(count(labels, 5), base=2)
    np.testing.assert_allclose(entropy, expected, atol=1e-6)
    assert (entropy >= 0).all() and (entropy <= np.log2(min(len(labels), 5)) + 1e-6).all()


@settings(deadline=None)
@given(member_labels, st.randoms())
def test_entropy_does_not_depend_on_the_order_of_members(labels, random):
    shuffled = random.sample(labels, len(labels))
    assert np.array_equal(vote_entropy(count(labels, 5), len(labels)), vote_entropy(count(shuffled, 5), len(labels)))


def test_entropy_is_zero_where_all_agree():
    assert vote_entropy(np.array([[0], [9]], np.uint8), 9) == 0


def test_votes_that_do_not_add_up_are_refused():
    with pytest.raises(ValueError, match="do not sum to 3"):
        vote_entropy(np.array([[1], [1]], np.uint8), 3)


@given(st.floats(1e-6, 1e6), st.integers(0, 23))
def test_sd_of_a_power_of_two_gives_that_many_bits(mean, bits):
    assert significant_bits(np.array(mean), np.array(mean * 2.0**-bits)) == pytest.approx(bits)


def test_bits_are_limited_to_those_of_float32():
    assert significant_bits(np.ones(2), np.array([1e-12, 1e3])).tolist() == [24, 0]


def test_zero_that_varies_has_no_bits():
    assert significant_bits(np.zeros(1), np.ones(1)).tolist() == [0]


def test_zero_that_does_not_vary_has_all_bits():
    assert significant_bits(np.zeros(1), np.zeros(1)).tolist() == [24]


posteriors = st.lists(st.floats(0.01, 1), min_size=2, max_size=6).map(lambda p: np.array([p], np.float32) / sum(p))


@settings(deadline=None)
@given(posteriors)
def test_entropy_of_a_posterior_is_scipys(posterior):
    np.testing.assert_allclose(posterior_entropy(posterior), scipy.stats.entropy(posterior, axis=1, base=2), atol=2e-6)


def test_entropy_of_what_is_sure_is_zero_without_a_warning():
    assert posterior_entropy(np.array([[0, 1, 0], [0.25, 0.5, 0.25]], np.float32)).tolist() == [0, 1.5]


@settings(deadline=None)
@given(posteriors, st.floats(0.3, 5))
def test_calibration_keeps_sum_and_order_and_softens_above_one(posterior, temperature):
    calibrated = calibrate(posterior, temperature)
    assert calibrated.sum() == pytest.approx(1, abs=1e-5)
    assert (np.argsort(calibrated, kind="stable") == np.argsort(posterior, kind="stable")).all()
    change = posterior_entropy(calibrated) - posterior_entropy(posterior)
    assert change * (temperature - 1) >= -2e-5


def test_calibration_is_a_root_scaled_to_sum_to_one_and_leaves_its_input():
    posterior = np.array([[0.64, 0.36, 0.0]], np.float32)
    np.testing.assert_allclose(calibrate(posterior, 2.0), [[0.8 / 1.4, 0.6 / 1.4, 0]], rtol=1e-6)
    assert calibrate(posterior, 1.0).tolist() == posterior.tolist() == [[np.float32(0.64), np.float32(0.36), 0]]
