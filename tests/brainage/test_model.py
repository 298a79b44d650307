from dataclasses import replace

import numpy as np
import pytest

from bids_varaug.brainage.conformal import cross_conformal_limits
from bids_varaug.brainage.correction import fit_correction
from bids_varaug.brainage.estimators import Choice
from bids_varaug.brainage.folds import grouped_folds, known_sites
from bids_varaug.brainage.model import fit_brain_age
from bids_varaug.brainage.tune import _robust_if_as_good, tune
from bids_varaug.errors import UserError
from tests.brainage.cohorts import simulated_cohort


@pytest.fixture(scope="module")
def cohort():
    return simulated_cohort(n=60)


@pytest.mark.parametrize("augmentation", ["none", "mean", "members", "analytic", "jitter"])
def test_same_seed_same_bits(cohort, augmentation):
    first, again = (fit_brain_age(cohort, "ridge", augmentation, seed=3) for _ in range(2))
    np.testing.assert_array_equal(first.predict(cohort), again.predict(cohort))
    np.testing.assert_array_equal(first.predict_interval(cohort), again.predict_interval(cohort))


def test_analytic_and_members_choose_and_predict_the_same(cohort):
    members, analytic = (fit_brain_age(cohort, "ridge", name) for name in ("members", "analytic"))
    assert members.chosen["hyperparameters"] == analytic.chosen["hyperparameters"]
    np.testing.assert_allclose(members.predict(cohort), analytic.predict(cohort), atol=1e-5)


def test_shuffled_equals_members_for_a_linear_model(cohort):
    members, shuffled = (fit_brain_age(cohort, "ridge", name) for name in ("members", "shuffled"))
    np.testing.assert_allclose(members.predict(cohort), shuffled.predict(cohort), atol=1e-5)


@pytest.mark.parametrize("augmentation", ["none", "members", "analytic"])
def test_logarithms_are_taken_of_every_member_and_undone_by_nobody(augmentation):
    cohort = simulated_cohort(n=30, n_members=4)
    logged = replace(cohort, baseline=np.log(cohort.baseline), members=np.log(cohort.members))
    wanted = fit_brain_age(logged, "ridge", augmentation)
    fitted = fit_brain_age(cohort, "ridge", augmentation, log_volumes=True)
    np.testing.assert_allclose(fitted.predict(cohort), wanted.predict(logged))
    np.testing.assert_allclose(fitted.predict_interval(cohort), wanted.predict_interval(logged))
    np.testing.assert_allclose(fitted.predict_members(cohort), wanted.predict_members(logged))


def test_with_logarithms_the_mean_is_that_of_volumes():
    cohort = simulated_cohort(n=30, n_members=4)
    averaged = replace(cohort, baseline=cohort.members.mean(axis=1))
    fitted = fit_brain_age(cohort, "ridge", "mean", log_volumes=True)
    wanted = fit_brain_age(averaged, "ridge", "none", log_volumes=True)
    np.testing.assert_allclose(fitted.predict(cohort), wanted.predict(averaged))


def test_analytic_replaces_kernel_models_and_says_so(cohort):
    assert fit_brain_age(cohort, "svr", "analytic").chosen["model"] == "bayesian_ridge"


@pytest.mark.parametrize("model", ["svr", "gpr", "auto"])
def test_kernel_models_take_members(cohort, model):
    fitted = fit_brain_age(cohort, model, "members")
    predictions = fitted.predict_members(cohort)
    assert predictions.shape == (60, 5)
    np.testing.assert_allclose(fitted.predict(cohort), predictions.mean(axis=1))


def test_features_may_come_in_another_order_but_not_be_missing(cohort):
    fitted = fit_brain_age(cohort, "ridge")
    order = [3, 1, 0, 2, 5, 4]
    turned = type(cohort)(
        cohort.people, tuple(cohort.names[i] for i in order), cohort.baseline[:, order]
    )
    np.testing.assert_allclose(fitted.predict(turned), fitted.predict(cohort))
    fewer = type(cohort)(cohort.people, cohort.names[:5], cohort.baseline[:, :5])
    with pytest.raises(UserError, match="structure5"):
        fitted.predict(fewer)


def test_too_few_participants_are_refused():
    with pytest.raises(UserError, match="9 participants with age"):
        fit_brain_age(simulated_cohort(n=9, sessions=3))


def test_missing_features_are_named(cohort):
    baseline = cohort.baseline.copy()
    baseline[3, 2] = np.nan
    broken = type(cohort)(cohort.people, cohort.names, baseline)
    with pytest.raises(UserError, match="structure2"):
        fit_brain_age(broken)


def test_intervals_keep_their_coverage():
    rng = np.random.default_rng(0)
    fold = grouped_folds(np.arange(400), 5, 0)
    errors = np.abs(rng.standard_t(3, 400))
    limits = cross_conformal_limits(np.zeros((5, 1)), errors, fold, np.ones(400), 0.9)
    inside = np.mean(np.abs(rng.standard_t(3, 20000)) <= limits[0, 1])
    # 400 residuals: the coverage is Beta(361, 40), standard deviation 0.015.
    assert 0.85 < inside < 0.95


def test_interval_limits_are_those_of_the_definition():
    rng = np.random.default_rng(1)
    fold, errors = np.arange(30) % 3, rng.exponential(size=30)
    predictions = rng.normal(size=(3, 4))
    found = cross_conformal_limits(predictions, errors, fold, np.ones(30), 0.8)
    rank = int(np.ceil(0.8 * 31))
    upper = np.sort(predictions[fold] + errors[:, None], axis=0)[rank - 1]
    lower = np.sort(predictions[fold] - errors[:, None], axis=0)[30 - rank]
    np.testing.assert_allclose(found, np.column_stack([lower, upper]), atol=1e-6)


def test_no_interval_with_too_few_participants():
    limits = cross_conformal_limits(np.zeros((2, 1)), np.ones(8), np.arange(8) % 2, np.ones(8), 0.9)
    assert np.isnan(limits).all()


@pytest.mark.parametrize(("n", "r", "kept"), [(12, 0.5, False), (1000, 0.6, False),
                                             (12, 0.97, True), (100, 0.8, True)])  # fmt: skip
def test_correction_is_withheld_where_its_slope_is_not_told_well(n, r, kept):
    rng = np.random.default_rng(0)
    age, noise = rng.uniform(20, 80, n), rng.normal(size=n)
    noise -= np.polyval(np.polyfit(age, noise, 1), age)
    z = (age - age.mean()) / age.std()
    predicted = 50 + 8 * (r * z + np.sqrt(1 - r**2) * noise / noise.std())
    corrected = fit_correction(predicted, age, np.ones(n)).apply(predicted)
    assert np.isfinite(corrected).all() == kept
    if kept:
        assert np.sqrt(((corrected - age) ** 2).mean()) < age.std()


@pytest.mark.parametrize("scale", [1.0, -1.0])
def test_correction_of_few_or_of_the_wrong_direction_is_withheld(scale):
    age = np.array([20.0, 60.0])
    assert np.isnan(fit_correction(scale * age, age, np.ones(2)).slope)
    age = np.linspace(20, 80, 30)
    assert np.isfinite(fit_correction(scale * age, age, np.ones(30)).slope) == (scale > 0)


def test_correction_undoes_a_slope_and_leaves_hopeless_models_alone():
    age = np.linspace(20, 80, 50)
    correction = fit_correction(0.5 * age + 20, age, np.ones(50))
    np.testing.assert_allclose(correction.apply(0.5 * age + 20), age)
    assert np.isnan(fit_correction(np.full(50, 40.0), age, np.ones(50)).apply(age)).all()


def test_folds_keep_participants_and_their_sites_together():
    groups = np.repeat(np.arange(20), 2)
    folds = grouped_folds(groups, 5, seed=1)
    assert (folds[::2] == folds[1::2]).all() and np.bincount(folds).tolist() == [8] * 5
    named = np.array(["a", "b", "c", "a", "b", "c"], dtype=object)
    assert known_sites(np.arange(6), named).tolist() == [0, 1, 2, 0, 1, 2]
    assert known_sites(np.array([0, 0, 1, 2, 3, 4]), named)[:2].tolist() == [0, 0]
    named[2] = None
    assert known_sites(np.arange(6), named) is None


def test_kernel_models_refuse_more_rows_than_they_can_take():
    x = np.zeros((6000, 1))
    with pytest.raises(UserError, match="6000 observations"):
        tune("svr", x, np.ones(6000), np.ones(6000), np.zeros(6000, int))


@pytest.mark.parametrize(("clear", "expected"), [(False, "average"), (True, "svr")])
def test_auto_prefers_the_robust_average_unless_sites_agree_against_it(clear, expected):
    age, sites, one = np.full(40, 30.0), np.repeat(np.arange(8), 5), np.ones(40)
    # The average is worse by one year at every site, or by 3 at half of them and better at others.
    excess = np.ones(40) if clear else np.where(sites % 2, 3.0, -2.0)
    parts = {"bayesian_ridge": {}, "svr": {}, "gpr": {}}
    entries = [
        (5.0 + excess.mean(), Choice("average", False, parts), age + 5 + excess),
        (5.0, Choice("svr", False, {"C": 1.0}), age + 5),
    ]
    best = _robust_if_as_good(entries[1], entries, age, one, sites)
    assert best[1].model == expected


def test_auto_fits_where_there_are_sites():
    fitted = fit_brain_age(simulated_cohort(n=60, n_sites=6, seed=2))
    assert fitted.chosen["inner_mae"] < 15
