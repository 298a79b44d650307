"""Images that stand out: found among few and many, and not where all are alike."""

import numpy as np
import pytest

from bids_varaug.variability.quality import MIN_IMAGES, OUTLYING, robust_distances


def normal_volumes(n, rng, n_structures=31):
    """Log-normal volumes of one correlation, as of head size."""
    size = rng.normal(0, 0.08, (n, 1))
    return 1000 * np.exp(size + rng.normal(0, 0.1, (n, n_structures)))


@pytest.mark.parametrize(("n", "at_most"), [(10, 0.1), (20, 0.07), (50, 0.015), (200, 0.005)])
def test_false_alarms_are_as_many_as_documented(n, at_most):
    rng = np.random.default_rng(0)
    shares = [np.mean(robust_distances(normal_volumes(n, rng))[0] > OUTLYING) for _ in range(1500 // n)]
    assert np.mean(shares) < at_most


@pytest.mark.parametrize("n", [15, 100])
def test_a_fifth_of_failed_segmentations_is_found(n):
    rng = np.random.default_rng(1)
    volumes = normal_volumes(n, rng)
    volumes[: n // 5] *= np.exp(rng.normal(0, 0.4, (n // 5, 31)))
    distances, _ = robust_distances(volumes)
    assert (distances[: n // 5] > OUTLYING).mean() > 0.9 and (distances[n // 5 :] > OUTLYING).mean() < 0.05


def test_a_large_head_does_not_stand_out_and_its_one_wrong_structure_is_named():
    volumes = normal_volumes(60, np.random.default_rng(2))
    volumes[0] *= 1.25
    assert robust_distances(volumes)[0][0] < OUTLYING
    volumes[0, 5] /= 3
    distances, deviations = robust_distances(volumes)
    assert distances[0] > OUTLYING and np.abs(deviations[0]).argmax() == 5 and deviations[0, 5] < -3


def test_absent_and_constant_structures_and_few_images_are_no_error():
    volumes = normal_volumes(20, np.random.default_rng(3))
    volumes[0, 0], volumes[:, 1], volumes[:, 2] = 0, 0, 5
    distances, deviations = robust_distances(volumes)
    assert np.isfinite(distances).all() and np.isnan(deviations[:, 1:3]).all()
    for few in (volumes[: MIN_IMAGES - 1], volumes[:0], volumes[:, 1:3]):
        assert np.isnan(robust_distances(few)[0]).all()
