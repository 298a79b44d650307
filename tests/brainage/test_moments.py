import numpy as np
import pytest
from sklearn.linear_model import BayesianRidge, Ridge
from sklearn.preprocessing import StandardScaler

from bids_varaug.brainage.moments import evidence_penalty, gather_moments, linear_problem


@pytest.fixture
def rows():
    rng = np.random.default_rng(1)
    x = rng.normal(50, 3, (80, 4)) @ rng.normal(0, 1, (4, 4))
    return x, x @ rng.normal(0, 1, 4) + rng.normal(0, 1, 80), rng.uniform(0.2, 2, 80)


def test_ridge_from_moments_is_the_ridge_of_scikit_learn(rows):
    x, y, weights = rows
    scaler = StandardScaler().fit(x, sample_weight=weights)
    expected = Ridge(alpha=7.0).fit(scaler.transform(x), y, sample_weight=weights).coef_
    problem = linear_problem(gather_moments(x, y, weights))
    np.testing.assert_allclose(problem.coefficients([7.0])[:, 0], expected, rtol=1e-7)


def test_evidence_is_that_of_bayesian_ridge(rows):
    x, y, weights = rows
    scaler = StandardScaler().fit(x, sample_weight=weights)
    z = (y - np.average(y, weights=weights)) / np.sqrt(np.cov(y, aweights=weights, ddof=0))
    model = BayesianRidge(tol=1e-6).fit(scaler.transform(x), z, sample_weight=weights)
    penalty = evidence_penalty(linear_problem(gather_moments(x, y, weights)))
    assert penalty == pytest.approx(model.lambda_ / model.alpha_, rel=1e-4)


def test_moments_of_parts_add_up_and_subtract(rows):
    x, y, weights = rows
    whole = gather_moments(x, y, weights)
    part = gather_moments(x[:30], y[:30], weights[:30])
    rest = gather_moments(x[30:], y[30:], weights[30:])
    np.testing.assert_allclose((part + rest).xx, whole.xx)
    np.testing.assert_allclose((whole - part).xy, rest.xy)


def test_a_constant_feature_gets_no_coefficient(rows):
    x, y, _ = rows
    x = np.column_stack([x, np.full(len(x), 0.1)])
    coefficients = linear_problem(gather_moments(x, y)).coefficients([1.0])[:, 0]
    assert coefficients[-1] == 0 and np.isfinite(coefficients).all()
