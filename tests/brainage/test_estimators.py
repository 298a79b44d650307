import numpy as np
import pytest
from sklearn.base import clone
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, DotProduct

from bids_varaug.brainage.estimators import (
    Choice,
    GaussianProcess,
    MomentRidge,
    build_estimator,
    fit_weighted,
    from_scale,
    to_scale,
)
from tests.brainage.cohorts import simulated_cohort

SVR = {"C": 4.0, "gamma": 0.05, "epsilon": 0.1}
GPR = {"signal": 1.0, "linear": 0.1, "length_scale": 3.0, "noise": 0.1}
CHOICES = [
    Choice("ridge", True, {"alpha": 1.0}),
    Choice("bayesian_ridge", True),
    Choice("svr", False, SVR),
    Choice("gpr", True, GPR),
    Choice("average", True, {"bayesian_ridge": {}, "svr": SVR, "gpr": GPR}),
]


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: choice.model)
def test_every_model_learns_age(choice):
    cohort = simulated_cohort(n=120)
    x, age = cohort.baseline, cohort.age
    estimator = fit_weighted(build_estimator(choice), x[:80], age[:80], np.ones(80))
    error = np.abs(estimator.predict(x[80:]) - age[80:]).mean()
    assert error < 0.7 * np.abs(age[80:] - age[:80].mean()).mean()


@pytest.mark.parametrize("choice", CHOICES[1:4], ids=lambda choice: choice.model)
def test_weight_two_is_two_rows(choice):
    cohort = simulated_cohort(n=30)
    twice = np.repeat(np.arange(30), 2)
    weighted = fit_weighted(
        build_estimator(choice), cohort.baseline, cohort.age, np.full(30, 2.0)
    ).predict(cohort.baseline)
    copied = fit_weighted(
        build_estimator(choice), cohort.baseline[twice], cohort.age[twice], np.ones(60)
    ).predict(cohort.baseline)
    np.testing.assert_allclose(weighted, copied, atol=0.1)


def test_gaussian_process_is_that_of_scikit_learn():
    cohort = simulated_cohort(n=40)
    x = (cohort.baseline - 1000) / 100
    expected = GaussianProcessRegressor(
        RBF(3.0) + 0.1 * DotProduct(0.0, "fixed"), alpha=0.1, optimizer=None
    ).fit(x, cohort.age)
    found = clone(GaussianProcess(**GPR)).fit(x, cohort.age)
    np.testing.assert_allclose(found.predict(x), expected.predict(x))


def test_ages_of_all_lives_come_back_from_the_log_scale():
    age = np.array([0.0, 0.5, 6.0, 86.0, 119.0])
    np.testing.assert_allclose(from_scale(to_scale(age, True), True), age, atol=1e-12)
    assert from_scale(np.array([1e4, -1e4]), True) == pytest.approx([120, 0])


def test_moment_ridge_is_an_estimator_that_can_be_cloned():
    cohort = simulated_cohort()
    first = MomentRidge(2.0, log_age=True).fit(cohort.baseline, cohort.age)
    again = clone(first).fit(cohort.baseline, cohort.age)
    assert first.get_params() == again.get_params()
    np.testing.assert_array_equal(first.coef_, again.coef_)
