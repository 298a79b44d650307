from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from bids_varaug.brainage.calibration import cross_conformal_interval, fit_correction
from bids_varaug.brainage.cohort import Cohort, grouped_folds
from bids_varaug.brainage.models import (
    ALPHAS,
    Choice,
    _ridge_path,
    fit_brain_age,
    fit_weighted,
    from_scale,
    predict_members,
    to_scale,
)
from bids_varaug.errors import UserError
from tests.brainage.cohorts import simulated_cohort

SVR, GPR = {"C": 4.0}, {"alpha": 0.1}
CHOICES = [
    Choice("ridge", True, {"alpha": 1.0}),
    Choice("bayesian_ridge", True),
    Choice("svr", False, SVR),
    Choice("gpr", True, GPR),
    Choice("average", True, {"bayesian_ridge": {}, "svr": SVR, "gpr": GPR}),
]


@pytest.fixture(scope="module")
def cohort():
    return simulated_cohort(n=60)


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: choice.model)
def test_every_model_learns_age(choice):
    cohort = simulated_cohort(n=120)
    x, age = cohort.baseline, cohort.age
    error = np.abs(fit_weighted(choice, x[:80], age[:80], np.ones(80)).predict(x[80:]) - age[80:]).mean()
    assert error < 0.7 * np.abs(age[80:] - age[:80].mean()).mean()


@pytest.mark.parametrize("choice", CHOICES[1:4], ids=lambda choice: choice.model)
def test_weight_two_is_two_rows(choice):
    cohort = simulated_cohort(n=30)
    x, age, twice = cohort.baseline, cohort.age, np.repeat(np.arange(30), 2)
    weighted = fit_weighted(choice, x, age, np.full(30, 2.0)).predict(x)
    copied = fit_weighted(choice, x[twice], age[twice], np.ones(60)).predict(x)
    np.testing.assert_allclose(weighted, copied, atol=0.1)


def test_ages_of_all_lives_come_back_from_the_log_scale():
    age = np.array([0.0, 0.5, 6.0, 86.0, 119.0])
    np.testing.assert_allclose(from_scale(to_scale(age, True), True), age, atol=1e-12)
    assert from_scale(np.array([1e4, -1e4]), True) == pytest.approx([120, 0])


@pytest.mark.parametrize("augmentation", ["none", "mean", "members", "analytic", "jitter"])
def test_same_seed_same_bits(cohort, augmentation):
    first, again = (fit_brain_age(cohort, "ridge", augmentation, seed=3) for _ in range(2))
    pd.testing.assert_frame_equal(first.predict(cohort), again.predict(cohort), check_exact=True)


def test_analytic_and_members_choose_and_predict_the_same(cohort):
    members, analytic = (fit_brain_age(cohort, "ridge", name) for name in ("members", "analytic"))
    assert members.chosen["hyperparameters"] == analytic.chosen["hyperparameters"]
    np.testing.assert_allclose(members.predict(cohort)["predicted"], analytic.predict(cohort)["predicted"], atol=1e-5)


def test_shuffled_equals_members_for_a_linear_model(cohort):
    members, shuffled = (fit_brain_age(cohort, "ridge", name) for name in ("members", "shuffled"))
    np.testing.assert_allclose(members.predict(cohort)["predicted"], shuffled.predict(cohort)["predicted"], atol=1e-5)


@pytest.mark.parametrize("augmentation", ["none", "members", "analytic"])
def test_logarithms_are_taken_of_every_member_and_undone_by_nobody(augmentation):
    cohort = simulated_cohort(n=30, n_members=4)
    logged = replace(cohort, baseline=np.log(cohort.baseline), members=np.log(cohort.members))
    wanted = fit_brain_age(logged, "ridge", augmentation)
    fitted = fit_brain_age(cohort, "ridge", augmentation, log_volumes=True)
    pd.testing.assert_frame_equal(fitted.predict(cohort), wanted.predict(logged))


def test_with_logarithms_the_mean_is_that_of_volumes():
    cohort = simulated_cohort(n=30, n_members=4)
    averaged = replace(cohort, baseline=cohort.members.mean(axis=1))
    fitted = fit_brain_age(cohort, "ridge", "mean", log_volumes=True)
    wanted = fit_brain_age(averaged, "ridge", "none", log_volumes=True)
    np.testing.assert_allclose(fitted.predict(cohort)["predicted"], wanted.predict(averaged)["predicted"])


def test_analytic_replaces_kernel_models_and_says_so(cohort):
    assert fit_brain_age(cohort, "svr", "analytic").chosen["model"] == "bayesian_ridge"


@pytest.mark.parametrize("model", ["svr", "gpr", "auto"])
def test_kernel_models_take_members(cohort, model):
    fitted = fit_brain_age(cohort, model, "members")
    predictions = predict_members(fitted.estimator, cohort.members)
    assert predictions.shape == (60, 5)
    np.testing.assert_allclose(fitted.predict(cohort)["predicted"], predictions.mean(axis=1))


def test_features_may_come_in_another_order_but_not_be_missing(cohort):
    fitted = fit_brain_age(cohort, "ridge")
    order = [3, 1, 0, 2, 5, 4]
    turned = type(cohort)(
        cohort.people, tuple(cohort.names[i] for i in order), cohort.baseline[:, order]
    )
    np.testing.assert_allclose(fitted.predict(turned)["predicted"], fitted.predict(cohort)["predicted"])
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
    limits = cross_conformal_interval(np.zeros((5, 1)), errors, fold, np.ones(400), 0.9)
    inside = np.mean(np.abs(rng.standard_t(3, 20000)) <= limits[0, 1])
    # 400 residuals: the coverage is Beta(361, 40), standard deviation 0.015.
    assert 0.85 < inside < 0.95


def test_interval_limits_are_those_of_the_definition():
    rng = np.random.default_rng(1)
    fold, errors = np.arange(30) % 3, rng.exponential(size=30)
    predictions = rng.normal(size=(3, 4))
    found = cross_conformal_interval(predictions, errors, fold, np.ones(30), 0.8)
    rank = int(np.ceil(0.8 * 31))
    upper = np.sort(predictions[fold] + errors[:, None], axis=0)[rank - 1]
    lower = np.sort(predictions[fold] - errors[:, None], axis=0)[30 - rank]
    np.testing.assert_allclose(found, np.column_stack([lower, upper]), atol=1e-6)


def test_no_interval_with_too_few_participants():
    limits = cross_conformal_interval(np.zeros((2, 1)), np.ones(8), np.arange(8) % 2, np.ones(8), 0.9)
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


def test_sites_are_those_of_participants_and_all_known():
    def sites(participants, named):
        people = pd.DataFrame({"participant_id": list(participants), "site": named}, dtype=object)
        return Cohort(people, (), np.zeros((len(people), 0))).sites

    assert sites("abcdef", list("xyzxyz")).tolist() == list("xyzxyz")
    assert sites("aabcde", list("xyzxyz")).tolist() == list("xxzxyz")
    assert sites("abcdef", ["x", "y", None, "x", "y", "z"]) is None
    assert sites("abcd", list("xyxy")) is None


def test_kernel_models_refuse_more_rows_than_they_can_take():
    cohort = simulated_cohort(n=5001, n_members=0, n_features=1)
    with pytest.raises(UserError, match="5001 observations"):
        fit_brain_age(cohort, "svr")


@pytest.mark.parametrize(("n_sites", "parts"), [(0, ["svr", "gpr"]), (6, ["bayesian_ridge", "svr", "gpr"])])
def test_auto_averages_kernel_models_and_over_sites_a_linear_one_too(n_sites, parts):
    chosen = fit_brain_age(simulated_cohort(n=40, n_members=0, n_sites=n_sites)).chosen
    assert chosen["model"] == "average" and list(chosen["hyperparameters"]) == parts


def test_auto_fits_where_there_are_sites():
    fitted = fit_brain_age(simulated_cohort(n=60, n_sites=6, seed=2))
    assert fitted.chosen["inner_mae"] < 15


@pytest.mark.parametrize("log_age", [False, True])
def test_ridge_of_every_penalty_is_that_of_scikit_learn(log_age):
    cohort = simulated_cohort(n=30, n_members=0, n_features=40)
    x, age, weights = cohort.baseline, cohort.age, np.random.default_rng(0).uniform(0.5, 2, 30)
    found = _ridge_path(x[:20], age[:20], weights[:20], x[20:], log_age)
    for at in (0, 10, 21):
        choice = Choice("ridge", log_age, {"alpha": ALPHAS[at]})
        expected = fit_weighted(choice, x[:20], age[:20], weights[:20]).predict(x[20:])
        np.testing.assert_allclose(from_scale(found[:, at], log_age), expected, rtol=1e-9)
