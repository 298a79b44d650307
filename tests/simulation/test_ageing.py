"""People and their heads."""

import numpy as np
import pytest

from simulation.ageing import (
    BRAIN_AGE_SPREAD,
    HEAD_SEX_EFFECT,
    HEAD_SPREAD,
    draw_person,
    simulate_person,
)

AFFINE = np.diag([2.0, 2.0, 2.0, 1.0])


@pytest.fixture(scope="module")
def people():
    rng = np.random.default_rng(5)
    return [draw_person(60.0, sex, rng) for sex in "FM" * 400]


def test_same_seed_same_person():
    first, again, other = (draw_person(50.0, "F", np.random.default_rng(s)) for s in (3, 3, 4))
    assert first == again
    assert first != other


def test_people_of_one_age_differ_as_stated(people):
    # 800 people: the estimates are within 4 standard errors (false alarms below 1 in 10,000).
    gaps = np.array([p.brain_age_gap for p in people])
    assert gaps.std() == pytest.approx(BRAIN_AGE_SPREAD, rel=0.1)
    size = {s: np.log([p.head_size for p in people if p.sex == s]) for s in "FM"}
    assert size["M"].std() == pytest.approx(HEAD_SPREAD, rel=0.15)
    assert size["M"].mean() - size["F"].mean() == pytest.approx(2 * HEAD_SEX_EFFECT, abs=0.023)


def test_structures_vary_apart_and_sides_together(people):
    logs = {s: np.log([p.ratios[s] / p.head_size for p in people]) for s in (17, 53, 12, 4)}
    assert np.corrcoef(logs[17], logs[53])[0, 1] > 0.8
    assert 0.2 < np.corrcoef(logs[17], logs[12])[0, 1] < 0.8
    assert abs(np.corrcoef(logs[17], logs[4])[0, 1]) < 0.5


@pytest.mark.parametrize(
    ("age", "sex", "message"), [(5.0, "F", "charts stand"), (40.0, "X", "sex must be")]
)
def test_people_beyond_the_charts_are_refused(age, sex, message):
    with pytest.raises(ValueError, match=message):
        draw_person(age, sex, np.random.default_rng(0))


def test_older_heads_have_wider_ventricles_and_smaller_hippocampi(head):
    # The same draws at each age: one person's life.
    volumes = [
        simulate_person(head, AFFINE, age, "F", np.random.default_rng(2)).volumes for age in (20.0, 50.0, 80.0)
    ]
    ventricles = [v[4] + v[43] for v in volumes]
    assert ventricles[0] < ventricles[1] < ventricles[2]
    assert volumes[2][17] < 0.9 * volumes[1][17]
    assert volumes[2][3] < volumes[1][3] < volumes[0][3]


def test_scans_of_one_head_differ_in_noise_and_pose_but_not_in_volume(head):
    def simulate():
        return simulate_person(head, AFFINE, 60.0, "M", np.random.default_rng(1), n_scans=2)

    scans, again = simulate(), simulate()
    assert len(scans.images) == len(scans.labels) == 2
    assert not np.array_equal(scans.labels[0], scans.labels[1])
    for structure in (3, 41, 4, 53):
        drawn = [np.count_nonzero(seen == structure) * 8.0 for seen in scans.labels]
        assert drawn == pytest.approx([scans.volumes[structure]] * 2, rel=0.05)
    for one, two in zip(scans.images, again.images, strict=True):
        assert np.array_equal(one, two)
