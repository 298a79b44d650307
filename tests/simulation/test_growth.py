"""Wanted volumes are met without tearing."""

import numpy as np
import pytest
from scipy.ndimage import label

from simulation.growth import TOLERANCE, deform_labels

RATIOS = {2: 0.95, 41: 0.95, 3: 0.85, 42: 0.85, 4: 2.4, 43: 2.0, 17: 0.75, 53: 0.8}


@pytest.fixture(scope="module")
def aged(head):
    return deform_labels(head, RATIOS, 2.0)


def test_volumes_are_met(head, aged):
    for structure, ratio in RATIOS.items():
        before = np.count_nonzero(head == structure) * 8.0
        assert aged.targets[structure] == pytest.approx(ratio * before)
        assert aged.volumes[structure] == pytest.approx(ratio * before, rel=2 * TOLERANCE)
        drawn = np.count_nonzero(aged.labels == structure) * 8.0
        assert drawn == pytest.approx(ratio * before, rel=0.05)


def test_nothing_folds(aged):
    assert aged.warp.jacobian().min() > 0.1


def test_skull_stays_where_it_is(head, aged):
    before, after = head > 0, aged.labels > 0
    assert np.count_nonzero(before ^ after) < 0.01 * np.count_nonzero(before)
    lost = sum(np.count_nonzero(head == s) * (1 - ratio) for s, ratio in RATIOS.items())
    fluid = np.count_nonzero(head == 24) + lost
    assert np.count_nonzero(aged.labels == 24) == pytest.approx(fluid, rel=0.03)


def test_structures_stay_whole_and_on_their_side(head, aged):
    middle = head.shape[0] // 2
    for left, right in ((4, 43), (17, 53)):
        assert label(aged.labels == left)[1] == label(aged.labels == right)[1] == 1
        assert np.flatnonzero((aged.labels == left).any((1, 2))).max() < middle
        assert np.flatnonzero((aged.labels == right).any((1, 2))).min() >= middle


def test_parts_count_for_their_structure(head):
    plexus = head.copy()
    where = np.argwhere(head == 4)
    plexus[tuple(where[len(where) // 3 : len(where) // 2].T)] = 136
    grown = deform_labels(plexus, {4: 1.5}, 2.0, part_of={136: 4})
    whole = np.count_nonzero(np.isin(plexus, (4, 136))) * 8.0
    assert grown.targets == {4: pytest.approx(1.5 * whole)}
    assert grown.volumes[4] == pytest.approx(1.5 * whole, rel=2 * TOLERANCE)


def test_ratios_of_one_leave_the_map_alone(head):
    same = deform_labels(head, dict.fromkeys(RATIOS, 1.0), 2.0)
    assert np.array_equal(same.labels, head)
    assert not same.warp.displacement.any()


def test_nonsense_ratio_is_refused(head):
    with pytest.raises(ValueError, match="must be positive"):
        deform_labels(head, {4: 0.0}, 2.0)
