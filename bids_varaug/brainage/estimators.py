"""Regression models of age: scikit-learn estimators that take weights, and how they are put up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.compose import TransformedTargetRegressor
from sklearn.ensemble import VotingRegressor
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, DotProduct
from sklearn.linear_model import BayesianRidge, Ridge
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from sklearn.svm import SVR
from sklearn.utils.validation import check_is_fitted, validate_data

from bids_varaug.brainage.moments import (
    Moments,
    evidence_penalty,
    gather_moments,
    linear_problem,
)

MODELS = ("auto", "ridge", "bayesian_ridge", "svr", "gpr")
LINEAR_MODELS = ("ridge", "bayesian_ridge")
KERNEL_MODELS = ("svr", "gpr")
AGE_OFFSET = 1.0
OLDEST = 120.0


@dataclass(frozen=True)
class Choice:
    """One model with everything that has to be decided before it is fitted.

    Attributes
    ----------
    model : one of `MODELS` but ``auto``, or ``average`` (equal weights on bayesian_ridge, svr and
        gpr)
    log_age : whether it predicts ``log(age + 1)`` instead of age
    hyperparameters : name -> value; of ``average``, model -> its hyperparameters
    inner_mae : years, of the inner folds by which it was chosen
    """

    model: str
    log_age: bool
    hyperparameters: Mapping[str, object] = field(default_factory=dict)
    inner_mae: float = float("nan")

    @property
    def is_linear(self) -> bool:
        """Whether predictions, on the model's own scale of age, are linear in the features."""
        return self.model in LINEAR_MODELS

    def as_dict(self) -> dict[str, object]:
        """Return plain values for tables, JSON and model cards."""
        return {
            "model": self.model,
            "log_age": self.log_age,
            "hyperparameters": dict(self.hyperparameters),
            "inner_mae": self.inner_mae,
        }


def to_scale(age: np.ndarray, log_age: bool) -> np.ndarray:
    """Age in years on the scale a model predicts: itself, or ``log(age + 1)``.

    The offset of one year keeps a newborn finite; a brain changes less per year the older it is.

    Examples
    --------
    >>> to_scale(np.array([0.0, 85.0]), True).round(2).tolist()
    [0.0, 4.45]
    """
    return np.log(age + AGE_OFFSET) if log_age else age


def from_scale(value: np.ndarray, log_age: bool) -> np.ndarray:
    """Return years, limited to 0 ... 120: the inverse of `to_scale`."""
    # The exponential of a prediction far outside overflows: limited before, not after.
    value = np.clip(value, *to_scale(np.array([0.0, OLDEST]), log_age))
    return np.exp(value) - AGE_OFFSET if log_age else value


def build_estimator(choice: Choice) -> TransformedTargetRegressor:
    """Return the unfitted estimator: standardised features, standardised (log) age, regression.

    Fit it with `fit_weighted`.
    """
    target = Pipeline(
        [
            (
                "scale_of_age",
                FunctionTransformer(
                    to_scale, from_scale, check_inverse=False,
                    kw_args={"log_age": choice.log_age}, inv_kw_args={"log_age": choice.log_age},
                ),
            ),
            ("standardise", StandardScaler()),
        ]
    )  # fmt: skip
    pipeline = Pipeline([("scale", StandardScaler()), ("regress", _regressor(choice))])
    return TransformedTargetRegressor(pipeline, transformer=target, check_inverse=False)


def fit_weighted(
    estimator: TransformedTargetRegressor, x: np.ndarray, age: np.ndarray, weights: np.ndarray
) -> TransformedTargetRegressor:
    """Fit in place, the weights used by the scaling of features and by the regression.

    Parameters
    ----------
    estimator : of `build_estimator`
    x : (R, F) features
    age : (R,) years
    weights : (R,) > 0, the rows of one participant add up to 1
    """
    return estimator.fit(x, age, scale__sample_weight=weights, regress__sample_weight=weights)


def _regressor(choice: Choice) -> RegressorMixin:
    values = choice.hyperparameters
    if choice.model == "ridge":
        return Ridge(alpha=values["alpha"])
    if choice.model == "bayesian_ridge":
        # The default tolerance stops early enough to tell the same data in two forms apart.
        return BayesianRidge(tol=1e-6, max_iter=1000)
    if choice.model == "svr":
        return SVR(C=values["C"], gamma=values["gamma"], epsilon=values["epsilon"])
    if choice.model == "gpr":
        return GaussianProcess(**values)
    if choice.model == "average":
        parts = [
            (name, _regressor(Choice(name, choice.log_age, part))) for name, part in values.items()
        ]
        return VotingRegressor(parts)
    raise ValueError(f"no such model: {choice.model}")


class GaussianProcess(RegressorMixin, BaseEstimator):
    """Gaussian process with linear and squared-exponential parts, and noise by row.

    ``cov(x, x') = signal (linear <x, x'> + exp(-|x - x'|^2 / (2 length_scale^2)))``, noise of
    variance ``noise / weight`` on top [1]_. scikit-learn's regressor at fixed hyperparameters
    (`tune` chooses them), with the weights that it does not take.

    Parameters
    ----------
    signal, linear, length_scale, noise : of standardised features and targets

    References
    ----------
    .. [1] Rasmussen & Williams (2006), Gaussian Processes for Machine Learning, eq. 2.23.
    """

    def __init__(self, signal=1.0, linear=0.0, length_scale=1.0, noise=0.1):
        self.signal = signal
        self.linear = linear
        self.length_scale = length_scale
        self.noise = noise

    def fit(self, X, y, sample_weight=None):
        """Fit to (R, F) features, (R,) targets and (R,) weights."""
        kernel = ConstantKernel(self.signal, "fixed") * RBF(self.length_scale, "fixed")
        if self.linear > 0:
            slope = ConstantKernel(self.signal * self.linear, "fixed")
            kernel = kernel + slope * DotProduct(0.0, "fixed")
        weights = np.ones(len(X)) if sample_weight is None else np.asarray(sample_weight)
        self.process_ = GaussianProcessRegressor(
            kernel, alpha=self.noise / weights, optimizer=None
        ).fit(X, y)
        self.n_features_in_ = self.process_.n_features_in_
        return self

    def predict(self, X):
        """Return the mean of the predictive distribution, (R,)."""
        check_is_fitted(self)
        return self.process_.predict(X)


class MomentRidge(RegressorMixin, BaseEstimator):
    """Ridge on standardised features, fitted from sums over rows.

    Same predictions as ``StandardScaler`` and ``Ridge`` (``BayesianRidge`` where `alpha` is None)
    on all noisy copies of every row, at the cost of one row each: a copy enters by the scatter of
    the copies around their mean (see `moments`).

    Parameters
    ----------
    alpha : ridge penalty as in scikit-learn; None: chosen by the evidence of the data
    log_age : whether targets are ages on the log scale, for `predict`
    """

    def __init__(self, alpha=1.0, log_age=False):
        self.alpha = alpha
        self.log_age = log_age

    def fit(self, X, y, sample_weight=None, scatter=None):
        """Fit to (R, F) features, (R,) ages in years, (R,) weights and an (F, F) scatter."""
        X, y = validate_data(self, X, y, dtype=np.float64, y_numeric=True)
        # About a point amid the data, for the sake of the last digits.
        origin = X.mean(axis=0)
        target = to_scale(y, self.log_age)
        return self.fit_moments(gather_moments(X - origin, target, sample_weight, scatter), origin)

    def fit_moments(self, moments: Moments, origin: np.ndarray, target: int = 0):
        """Fit to sums of ``x - origin`` and of targets already on the model's scale of age."""
        problem = linear_problem(moments)
        alpha = evidence_penalty(problem, target) if self.alpha is None else self.alpha
        coefficients = problem.coefficients(np.array([alpha]), target)[:, 0]
        self.alpha_ = float(alpha)
        self.coef_ = coefficients / problem.scale
        self.intercept_ = float(problem.y_center[target] - (problem.center + origin) @ self.coef_)
        self.n_features_in_ = len(self.coef_)
        return self

    def predict(self, X):
        """Return ages in years, (R,)."""
        check_is_fitted(self)
        return from_scale(np.asarray(X) @ self.coef_ + self.intercept_, self.log_age)
