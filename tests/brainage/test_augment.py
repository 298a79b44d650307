import numpy as np
import pytest

from bids_varaug.brainage.augment import augmented_rows, centers, summed_covariances
from bids_varaug.brainage.estimators import Choice, MomentRidge, build_estimator, fit_weighted
from bids_varaug.brainage.folds import participant_weights
from bids_varaug.errors import UserError
from tests.brainage.cohorts import simulated_cohort


@pytest.fixture
def cohort():
    return simulated_cohort(n=30, n_members=6, sessions=2)


def rows_of(cohort, augmentation, **more):
    weights = participant_weights(cohort.groups)
    rng = np.random.default_rng(4)
    return augmented_rows(cohort.members, weights, cohort.groups, augmentation, rng, **more)


@pytest.mark.parametrize(
    ("model", "alpha"), [("ridge", 3.0), ("bayesian_ridge", None)], ids=["ridge", "evidence"]
)
@pytest.mark.parametrize("log_age", [False, True])
def test_analytic_equals_training_on_every_member(cohort, model, alpha, log_age):
    rows = rows_of(cohort, "members")
    choice = Choice(model, log_age, {} if alpha is None else {"alpha": alpha})
    members = fit_weighted(
        build_estimator(choice), rows.x, cohort.age[rows.owner], rows.weights
    ).predict(cohort.baseline)
    weights = participant_weights(cohort.groups)
    analytic = MomentRidge(alpha, log_age).fit(
        centers(cohort, "analytic"),
        cohort.age,
        weights,
        summed_covariances(cohort.members, weights),
    )
    np.testing.assert_allclose(analytic.predict(cohort.baseline), members, atol=1e-4)


def test_members_drawn_from_a_covariance_approach_its_closed_form():
    cohort = simulated_cohort(n=40, n_members=0, seed=3)
    rng = np.random.default_rng(5)
    root = rng.normal(0, 30, (6, 6))
    covariance = root @ root.T
    limit = MomentRidge(5.0).fit(
        cohort.baseline, cohort.age, None, len(cohort) * covariance
    ).coef_  # fmt: skip
    distance = []
    for n_members in (4, 64, 1024):
        noise = rng.normal(0, 1, (len(cohort), n_members, 6)) @ root.T
        members = cohort.baseline[:, None] + noise
        one = np.ones(len(cohort))
        fitted = MomentRidge(5.0).fit(
            members.reshape(-1, 6), np.repeat(cohort.age, n_members),
            np.full(len(cohort) * n_members, 1 / n_members),
        ).coef_  # fmt: skip
        assert summed_covariances(members, one).shape == (6, 6)
        distance.append(np.linalg.norm(fitted - limit) / np.linalg.norm(limit))
    assert distance[2] < 0.1 and distance[2] < distance[1] < distance[0]


def test_rows_of_a_participant_weigh_one_in_all(cohort):
    for augmentation in ("members", "jitter", "shuffled"):
        rows = rows_of(cohort, augmentation)
        by_person = np.bincount(cohort.groups[rows.owner], rows.weights)
        np.testing.assert_allclose(by_person, 1.0)


def test_every_augmentation_keeps_the_mean_of_the_members(cohort):
    for augmentation in ("members", "jitter", "shuffled"):
        x = rows_of(cohort, augmentation).x.reshape(cohort.members.shape)
        np.testing.assert_allclose(x.mean(axis=1), cohort.members.mean(axis=1))


def test_shuffled_never_gives_a_participant_the_own_deviations(cohort):
    x = rows_of(cohort, "shuffled").x.reshape(cohort.members.shape)
    deviations = x - x.mean(axis=1, keepdims=True)
    own = cohort.members - cohort.members.mean(axis=1, keepdims=True)
    for i, given in enumerate(deviations):
        source = np.abs(own - given).max(axis=(1, 2)).argmin()
        np.testing.assert_allclose(own[source], given, atol=1e-8)
        assert cohort.groups[source] != cohort.groups[i]


def test_jitter_keeps_the_total_variance_and_drops_the_correlations():
    cohort = simulated_cohort(n=300, n_members=10)
    x = rows_of(cohort, "jitter").x.reshape(cohort.members.shape)
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
    rows = rows_of(cohort, "members", max_rows=150)
    assert len(rows.x) == 120 and set(np.bincount(rows.owner)) == {2}
    assert rows.weights.sum() == pytest.approx(30)


def test_augmentation_without_members_is_refused():
    with pytest.raises(UserError, match="at least two members"):
        centers(simulated_cohort(n_members=0), "mean")
