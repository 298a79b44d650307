import numpy as np
import pytest
from sklearn.linear_model import Ridge

from bids_varaug.brainage.augment import (
    augmentation_covariance,
    augmented_members,
    centers,
    draw_rows,
    summed_covariances,
)
from bids_varaug.brainage.models import Choice, _Training, fit_weighted
from bids_varaug.errors import UserError
from tests.brainage.cohorts import simulated_cohort


@pytest.fixture
def cohort():
    return simulated_cohort(n=30, n_members=6, sessions=2)


def members_of(cohort, augmentation):
    rng = np.random.default_rng(4)
    return augmented_members(cohort.members, cohort.weights, cohort.groups, augmentation, rng)


@pytest.mark.parametrize("model", ["ridge", "bayesian_ridge"])
@pytest.mark.parametrize("log_age", [False, True])
def test_rows_of_moments_equal_training_on_every_member(cohort, model, log_age):
    choice = Choice(model, log_age, {"alpha": 3.0})
    x, owner, weights = draw_rows(cohort.members, cohort.weights, 10_000, np.random.default_rng(0))
    members = fit_weighted(choice, x, cohort.age[owner], weights).predict(cohort.baseline)
    training = _Training(cohort, "members", seed=0, log_volumes=False)
    for kept in (np.ones(len(cohort), bool), training.folds != 2):
        mean, weights = cohort.members[kept].mean(axis=1), cohort.weights[kept]
        few, _, few_weights = training._rows(training.folds, -1 if kept.all() else 2, choice)
        assert len(few) == 2 * (len(cohort.names) + 1) and few_weights.sum() == pytest.approx(weights.sum())
        np.testing.assert_allclose(few_weights @ few, weights @ mean, rtol=1e-9)
        center = np.average(mean, axis=0, weights=weights)
        scatter = ((mean - center) * weights[:, None]).T @ (mean - center)
        scatter += summed_covariances(cohort.members[kept], weights)
        np.testing.assert_allclose(((few - center) * few_weights[:, None]).T @ (few - center), scatter, rtol=1e-6)
    fitted = training.fit(choice)
    np.testing.assert_allclose(fitted.predict(cohort.baseline), members, atol=1e-4)


@pytest.mark.parametrize("model", ["ridge", "bayesian_ridge"])
def test_many_people_give_the_same_model_as_their_moments(model):
    """Above 2 (F + 1) observations a linear model sees their moments alone."""
    cohort = simulated_cohort(n=60, n_members=0)
    choice = Choice(model, True, {"alpha": 3.0})
    fitted = _Training(cohort, "none", seed=0, log_volumes=False).fit(choice)
    direct = fit_weighted(choice, cohort.baseline, cohort.age, cohort.weights)
    np.testing.assert_allclose(fitted.predict(cohort.baseline), direct.predict(cohort.baseline), atol=1e-6)


def test_jitter_of_linear_models_is_what_is_drawn_on_average(cohort):
    center = cohort.members.mean(axis=1)
    scale = np.sqrt(np.average((center - np.average(center, 0, cohort.weights)) ** 2, 0, cohort.weights))
    drawn = np.mean([summed_covariances(
        augmented_members(cohort.members, cohort.weights, cohort.groups, "jitter", np.random.default_rng(seed)),
        cohort.weights) for seed in range(100)], axis=0) / np.outer(scale, scale)  # fmt: skip
    expected = augmentation_covariance(cohort.members, cohort.weights, "jitter", scale)
    np.testing.assert_allclose(drawn, expected, atol=0.05 * expected[0, 0])  # 4 standard errors: 6e-5 false alarms each


def test_members_drawn_from_a_covariance_approach_its_closed_form():
    cohort = simulated_cohort(n=40, n_members=0, seed=3)
    rng = np.random.default_rng(5)
    root = rng.normal(0, 30, (6, 6))
    center, age = cohort.baseline - cohort.baseline.mean(axis=0), cohort.age - cohort.age.mean()
    penalty = len(cohort) * root @ root.T + 5.0 * np.eye(6)
    limit = np.linalg.solve(center.T @ center + penalty, center.T @ age)
    distance = []
    for n_members in (4, 64, 1024):
        members = cohort.baseline[:, None] + rng.normal(0, 1, (len(cohort), n_members, 6)) @ root.T
        weights = np.full(len(cohort) * n_members, 1 / n_members)
        ridge = Ridge(5.0).fit(members.reshape(-1, 6), np.repeat(cohort.age, n_members), weights)
        distance.append(np.linalg.norm(ridge.coef_ - limit) / np.linalg.norm(limit))
    assert distance[2] < 0.1 and distance[2] < distance[1] < distance[0]


def test_rows_of_a_participant_weigh_one_in_all(cohort):
    _, owner, weights = draw_rows(cohort.members, cohort.weights, 10_000, np.random.default_rng(0))
    np.testing.assert_allclose(np.bincount(cohort.groups[owner], weights), 1.0)


def test_every_augmentation_keeps_the_mean_of_the_members(cohort):
    for augmentation in ("members", "jitter", "shuffled"):
        x = members_of(cohort, augmentation)
        np.testing.assert_allclose(x.mean(axis=1), cohort.members.mean(axis=1))


def test_shuffled_never_gives_a_participant_the_own_deviations(cohort):
    x = members_of(cohort, "shuffled")
    deviations = x - x.mean(axis=1, keepdims=True)
    own = cohort.members - cohort.members.mean(axis=1, keepdims=True)
    for i, given in enumerate(deviations):
        source = np.abs(own - given).max(axis=(1, 2)).argmin()
        np.testing.assert_allclose(own[source], given, atol=1e-8)
        assert cohort.groups[source] != cohort.groups[i]


def test_jitter_keeps_the_total_variance_and_drops_the_correlations():
    cohort = simulated_cohort(n=300, n_members=10)
    x = members_of(cohort, "jitter")
    scale = cohort.members.mean(axis=1).std(axis=0)
    ones = np.ones(len(cohort))
    own = summed_covariances(cohort.members, ones) / np.outer(scale, scale)
    noise = summed_covariances(x, ones) / np.outer(scale, scale)
    # 300 x 9 x 6 Gaussian numbers: the trace has a relative standard error of about 2 %.
    assert np.trace(noise) == pytest.approx(np.trace(own), rel=0.1)
    off = ~np.eye(6, dtype=bool)
    assert np.abs(noise[off]).max() < 0.1 * np.trace(noise) / 6
    assert np.abs(own[off]).max() > 0.2 * np.trace(own) / 6


def test_drawn_rows_stay_below_their_limit(cohort):
    x, owner, weights = draw_rows(cohort.members, cohort.weights, 150, np.random.default_rng(0))
    assert len(x) == 120 and set(np.bincount(owner)) == {2}
    assert weights.sum() == pytest.approx(30)


def test_augmentation_without_members_is_refused():
    with pytest.raises(UserError, match="at least two members"):
        centers(simulated_cohort(n_members=0), "mean")
