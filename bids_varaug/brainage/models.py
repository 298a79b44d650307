"""Models of age: chosen and fitted within the training participants, applied to others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from operator import itemgetter
from typing import Any

import numpy as np
import pandas as pd
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.compose import TransformedTargetRegressor
from sklearn.ensemble import VotingRegressor
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import BayesianRidge, Ridge
from sklearn.model_selection import ParameterGrid
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from sklearn.svm import SVR

from bids_varaug.brainage.augment import (
    USES_MEMBERS,
    augmentation_covariance,
    augmented_members,
    centers,
    draw_rows,
    rows_of_moments,
)
from bids_varaug.brainage.calibration import BiasCorrection, cross_conformal_interval, fit_correction
from bids_varaug.brainage.cohort import Cohort, grouped_folds
from bids_varaug.brainage.features import LogVolumes
from bids_varaug.errors import UserError

LINEAR_MODELS = ("ridge", "bayesian_ridge")
# What ``auto`` averages: at a new site kernel models fall back to the mean, linear ones extrapolate.
AVERAGED, AVERAGED_OVER_SITES = ("svr", "gpr"), ("bayesian_ridge", "svr", "gpr")
ALPHAS = np.logspace(-1, 6, 22)
# Kernel exp(-WIDTH |x - x'|^2 / F): features are standardised, so that the squared distance of two people is about 2 F.
WIDTH = 0.3
GRIDS: dict[str, dict[str, Sequence[float]]] = {
    "ridge": {"alpha": ALPHAS.tolist()},
    "bayesian_ridge": {},
    "svr": {"C": (1.0, 4.0)},
    "gpr": {"alpha": (0.03, 0.1, 0.3, 1.0, 3.0)},
}
MAX_KERNEL_ROWS = 5000
PREDICTED_ROWS = 4096
MIN_PARTICIPANTS = 10
INNER_FOLDS = 5
AGE_OFFSET, OLDEST = 1.0, 120.0
VALUES = ("predicted", "corrected", "lower", "upper", "sd_num")


@dataclass(frozen=True)
class Choice:
    """What is decided before a model is fitted.

    `model` is a key of `GRIDS`, or ``average`` (equal weights; its `hyperparameters` are those of each); `log_age`
    whether it predicts ``log(age + 1)``; `inner_mae` the error in years by which it was chosen.
    """

    model: str
    log_age: bool
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    inner_mae: float = float("nan")


def resolve_model(model: str, augmentation: str, n_observations: int = 0) -> str:
    """The model that is fitted: a linear one with ``analytic``, and for ``auto`` with more than 5,000 observations."""
    linear = augmentation == "analytic" or (model == "auto" and n_observations > MAX_KERNEL_ROWS)
    return "bayesian_ridge" if linear and model not in LINEAR_MODELS else model


def to_scale(age: np.ndarray, log_age: bool) -> np.ndarray:
    """Age in years on the scale a model predicts: itself, or ``log(age + 1)``, which is finite for newborns.

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


def fit_weighted(choice: Choice, x: np.ndarray, age: np.ndarray, weights: np.ndarray) -> TransformedTargetRegressor:
    """Fit (R, F) features and (R,) ages [year] or their logarithms, both standardised, with (R,) weights."""
    scale = {"log_age": choice.log_age}
    target = make_pipeline(
        FunctionTransformer(to_scale, from_scale, check_inverse=False, kw_args=scale, inv_kw_args=scale),
        StandardScaler(),
    )
    regressor = _regressor(choice.model, choice.hyperparameters, x.shape[1])
    pipeline = Pipeline([("scale", StandardScaler()), ("regress", regressor)])
    estimator = TransformedTargetRegressor(pipeline, transformer=target, check_inverse=False)
    return estimator.fit(x, age, scale__sample_weight=weights, regress__sample_weight=weights)


def _regressor(model: str, values: Mapping[str, Any], n_features: int) -> RegressorMixin:
    if model == "ridge":
        return Ridge(alpha=values["alpha"])
    if model == "bayesian_ridge":
        # The default tolerance stops so early that the same data in two forms differ.
        return BayesianRidge(tol=1e-6, max_iter=1000)
    if model == "svr":
        return SVR(C=values["C"], gamma=WIDTH / n_features)
    if model == "gpr":
        # The mean of a Gaussian process with noise of variance alpha / weight (Rasmussen & Williams 2006, eq. 2.23).
        return KernelRidge(kernel="rbf", gamma=WIDTH / n_features, alpha=values["alpha"])
    return VotingRegressor([(part, _regressor(part, theirs, n_features)) for part, theirs in values.items()])


@dataclass(frozen=True, eq=False)
class BrainAgeModel:
    """A fitted model of age, the models of its inner folds, and what they missed by.

    The residuals, (N,), are absolute errors on inner folds, on the model's scale of age, weighing 1 per participant.
    """

    names: tuple[str, ...]  # of the F features, in order
    estimator: BaseEstimator  # predicts years from (R, F) features, takes logarithms itself if asked to
    fold_estimators: tuple[BaseEstimator, ...]  # one per inner fold of participants, fitted without it
    residuals: np.ndarray
    residual_folds: np.ndarray
    residual_weights: np.ndarray
    correction: BiasCorrection  # of age bias, fitted to the same held-out predictions
    chosen: Mapping[str, Any]  # the fields of `Choice`
    augmentation: str
    source: Mapping[str, Any] = field(default_factory=dict)  # of the features, as in `Cohort`
    unit: str = ""
    # n_participants, n_observations, age_min, age_max [year], seed
    training: Mapping[str, Any] = field(default_factory=dict)

    def predict(self, cohort: Cohort, coverage: float = 0.9) -> pd.DataFrame:
        """Predict the age of each observation, see `predict_ages`; a CohortError names features that are lacking.

        Returns one row per observation: participant_id, session_id, observation, age, predicted, corrected (for age
        bias, without knowing the age; NaN where that is withheld), lower, upper (CV+ interval that contains the age
        with probability `coverage`, made on the model's scale of age; NaN if training had too few participants), sd_num
        (standard deviation over members, NaN without), all in years.
        """
        cohort, log_age = cohort.with_features(self.names), bool(self.chosen["log_age"])
        predicted = predict_ages(self.estimator, cohort, self.augmentation)
        by_fold = np.stack([predict_ages(one, cohort, self.augmentation) for one in self.fold_estimators])
        errors = self.residuals, self.residual_folds, self.residual_weights
        interval = from_scale(cross_conformal_interval(to_scale(by_fold, log_age), *errors, coverage), log_age)
        by_member = None if cohort.members is None else predict_members(self.estimator, cohort.members)
        spread = np.nan if by_member is None else by_member.std(axis=1, ddof=1)
        table = cohort.people[["participant_id", "session_id", "observation", "age"]].assign(predicted=predicted)
        return table.assign(
            corrected=self.correction.apply(predicted), lower=interval[:, 0], upper=interval[:, 1], sd_num=spread
        )


def fit_brain_age(
    cohort: Cohort, model: str = "auto", augmentation: str = "none", seed: int = 0, *, log_volumes: bool = False,
    min_participants: int = MIN_PARTICIPANTS,
) -> BrainAgeModel:  # fmt: skip
    """Fit a model of age to a cohort.

    1. Scale of age and hyperparameters are chosen by the mean absolute error in held-out sites where there are 3 or
       more, otherwise in held-out participants. ``auto`` averages svr and gpr, where there are sites bayesian_ridge
       too; with more than 5,000 observations it is bayesian_ridge.
    2. The chosen model is fitted to the augmented rows. Linear models are chosen with augmentation; kernel models
       without, and see at most 5,000 rows, that is, members drawn at random for each observation.
    3. The same without each of 5 folds of participants, for intervals and the correction of bias.

    Observations without age are left out. ``analytic`` fits bayesian_ridge in place of svr, gpr and auto. `log_volumes`
    are those of `features.LogVolumes`, noise included. The seed is that of folds and drawn noise. A UserError says that
    there are fewer than `min_participants` participants with age, one age for all, features not finite, an augmentation
    that needs members where there are none, or a kernel model with more than 5,000 observations.
    """
    cohort = check_trainable(cohort, min_participants)
    training = _Training(cohort, augmentation, seed, log_volumes)
    chosen = training.choose(model)
    fold_estimators, held_out = [], np.zeros(len(cohort))
    for k in range(training.folds.max() + 1):
        test = training.folds == k
        fold_estimators.append(training.fit(chosen, k))
        held_out[test] = predict_ages(fold_estimators[k], cohort.take(test), augmentation)
    return BrainAgeModel(
        names=tuple(cohort.names),
        estimator=training.fit(chosen),
        fold_estimators=tuple(fold_estimators),
        residuals=np.abs(to_scale(held_out, chosen.log_age) - to_scale(cohort.age, chosen.log_age)),
        residual_folds=training.folds, residual_weights=training.weights,
        correction=fit_correction(held_out, cohort.age, training.weights),
        chosen=asdict(chosen), augmentation=augmentation, source=cohort.source, unit=cohort.unit,
        training={
            "n_participants": len(np.unique(cohort.groups)), "n_observations": len(cohort),
            "age_min": float(cohort.age.min()), "age_max": float(cohort.age.max()), "seed": seed,
        },
    )  # fmt: skip


def fit_estimator(
    cohort: Cohort, model: str, augmentation: str, seed: int, *, log_volumes: bool = False
) -> tuple[BaseEstimator, Choice]:
    """Choose and fit as `fit_brain_age` does, without intervals and correction, where only predictions are wanted."""
    cohort = check_trainable(cohort, 2)
    training = _Training(cohort, augmentation, seed, log_volumes)
    chosen = training.choose(model)
    return training.fit(chosen), chosen


def predict_ages(estimator: BaseEstimator, cohort: Cohort, augmentation: str) -> np.ndarray:
    """Ages, (R,) float64, years: from the baseline with ``none``, from the members' mean with ``mean``.

    Otherwise the mean of the predictions from each member. Features of one value are predicted from as they are.
    """
    if cohort.members is None:
        return _predict(estimator, cohort.baseline)
    if augmentation in USES_MEMBERS:
        return predict_members(estimator, cohort.members).mean(axis=1)
    return _predict(estimator, centers(cohort, augmentation))


def predict_members(estimator: BaseEstimator, members: np.ndarray) -> np.ndarray:
    """Ages from each member's features; (R, M, F) to (R, M) float64, years."""
    return _predict(estimator, members.reshape(-1, members.shape[2])).reshape(members.shape[:2])


def _predict(estimator: BaseEstimator, x: np.ndarray) -> np.ndarray:
    """Predict in pieces, as kernel models need memory for rows x training rows."""
    starts = range(0, len(x), PREDICTED_ROWS)
    return np.concatenate([estimator.predict(x[start : start + PREDICTED_ROWS]) for start in starts])


def check_trainable(cohort: Cohort, min_participants: int) -> Cohort:
    """Return the observations with age, if a model can be fitted to them; for errors see `fit_brain_age`."""
    known = np.isfinite(cohort.age)
    n = len(np.unique(cohort.groups[known]))
    if n < min_participants:
        raise UserError(
            f"{n} participants with age: a model of age needs at least {min_participants}. Give ages in "
            "participants.tsv, or apply a model fitted elsewhere with --apply-model."
        )
    cohort = cohort if known.all() else cohort.take(known)
    if np.ptp(cohort.age) == 0:
        raise UserError(f"All participants are {cohort.age[0]:g} years old: nothing to learn.")
    if (cohort.age < 0).any():
        raise UserError(f"Ages below zero ({cohort.age.min():g} years): correct participants.tsv.")
    bad = cohort.missing().any(axis=0)
    if bad.any():
        names = ", ".join(np.array(cohort.names)[bad])
        raise UserError(f"Features with missing or infinite values: {names}. Leave them out.")
    return cohort


def _ridge_path(x: np.ndarray, age: np.ndarray, weights: np.ndarray, x_test: np.ndarray, log_age: bool) -> np.ndarray:
    """Predictions of ridge with each of `ALPHAS`, from one decomposition; (R, A), on the scale of age."""
    scaler = StandardScaler().fit(x, sample_weight=weights)
    z, target = scaler.transform(x), to_scale(age, log_age)
    weighted, mean = (z * weights[:, None]).T, np.average(target, weights=weights)
    values, axes = np.linalg.eigh(weighted @ z)
    along = axes.T @ (weighted @ (target - mean))
    return mean + scaler.transform(x_test) @ axes @ (along[:, None] / (values[:, None] + ALPHAS))


class _Training:
    """A cohort made ready for fitting with one augmentation: rows, weights, folds."""

    def __init__(self, cohort: Cohort, augmentation: str, seed: int, log_volumes: bool) -> None:
        self.augmentation, self.seed = augmentation, seed
        self.age, self.groups, self.weights, self.sites = cohort.age, cohort.groups, cohort.weights, cohort.sites
        self.x, self.logs = centers(cohort, augmentation), None
        self.members = cohort.members if augmentation in USES_MEMBERS else None
        if log_volumes:
            self.logs = LogVolumes(cohort.names).fit(self.x)
            self.x = self.logs.transform(self.x)
            if self.members is not None:  # the mean of logarithms, as `predict_ages`
                flat = self.members.reshape(-1, self.members.shape[2])
                self.members = self.logs.transform(flat).reshape(self.members.shape)
                self.x = self.members.mean(axis=1)
        self.folds = grouped_folds(self.groups, INNER_FOLDS, seed)
        self.choice_folds = self.folds if self.sites is None else grouped_folds(self.sites, INNER_FOLDS, seed)
        self._moments: dict[int, np.ndarray] = {}

    def choose(self, model: str) -> Choice:
        """Choose scale of age and hyperparameters by the error in held-out sites or participants."""
        model = resolve_model(model, self.augmentation, len(self.x))
        if model not in ("auto", *LINEAR_MODELS) and len(self.x) > MAX_KERNEL_ROWS:
            raise UserError(
                f"{model} with {len(self.x)} observations: its cost grows with their square, and more than "
                f"{MAX_KERNEL_ROWS} are refused. Use --brainage-model ridge, bayesian_ridge or auto."
            )
        averaged = AVERAGED if self.sites is None else AVERAGED_OVER_SITES
        best = []
        for log_age in (False, True):
            names = averaged if model == "auto" else (model,)
            parts = [self._best_setting(name, log_age) for name in names]
            held_out = np.mean([predictions for _, predictions in parts], axis=0)
            choice = parts[0][0]
            if model == "auto":
                choice = Choice("average", log_age, {part.model: dict(part.hyperparameters) for part, _ in parts})
            best.append((self._error(held_out, log_age), choice))
        mae, choice = min(best, key=itemgetter(0))
        return replace(choice, inner_mae=mae)

    def _best_setting(self, model: str, log_age: bool) -> tuple[Choice, np.ndarray]:
        """The setting of least error, and its held-out predictions on the scale of age."""
        settings = [Choice(model, log_age, values) for values in ParameterGrid(GRIDS[model])]
        held_out = np.zeros((len(self.x), len(settings)))
        for k in range(self.choice_folds.max() + 1):
            test = self.choice_folds == k
            rows = self._rows(self.choice_folds, k, settings[0], augment=False)
            if model == "ridge":
                held_out[test] = _ridge_path(*rows, self.x[test], log_age)
            else:
                fitted = [fit_weighted(choice, *rows).predict(self.x[test]) for choice in settings]
                held_out[test] = to_scale(np.stack(fitted, axis=1), log_age)
        best = int(np.argmin([self._error(column, log_age) for column in held_out.T]))
        return settings[best], held_out[:, best]

    def _error(self, held_out: np.ndarray, log_age: bool) -> float:
        return float(np.average(np.abs(from_scale(held_out, log_age) - self.age), weights=self.weights))

    def fit(self, choice: Choice, without: int = -1) -> BaseEstimator:
        """Fit what was chosen to all augmented rows, or without one fold."""
        fitted = fit_weighted(choice, *self._rows(self.folds, without, choice))
        return fitted if self.logs is None else make_pipeline(self.logs, fitted)

    def _rows(
        self, folds: np.ndarray, without: int, choice: Choice, augment: bool = True
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Features, ages and weights of the training rows made from all observations but those of one fold.

        Kernel models get the members as rows, if `augment`; linear ones get few rows with the same moments.
        """
        rows = np.flatnonzero(folds != without)
        x, age, weights = self.x[rows], self.age[rows], self.weights[rows]
        n_values = x.shape[1] + 1
        if choice.model in LINEAR_MODELS:
            if self.members is None and len(rows) <= 2 * n_values:
                return x, age, weights
            moments = self._fold_moments(folds)[np.arange(folds.max() + 1) != without].sum(axis=0)
            kept = np.array([*range(n_values - 1), n_values - 1 + choice.log_age])
            z, weights = rows_of_moments(moments[np.ix_([0, *kept + 1], [0, *kept + 1])])
            z = self._center[kept] + z * self._scale[kept]
            return z[:, :-1], np.exp(z[:, -1]) - AGE_OFFSET if choice.log_age else z[:, -1], weights
        if self.members is None or not augment:
            return x, age, weights
        rng = np.random.default_rng([self.seed, len(rows)])
        members = augmented_members(self.members[rows], weights, self.groups[rows], self.augmentation, rng)
        x, owner, weights = draw_rows(members, weights, MAX_KERNEL_ROWS, rng)
        return x, age[owner], weights

    def _fold_moments(self, folds: np.ndarray) -> np.ndarray:
        """Weighted moments of 1, features, age and its logarithm, augmented, by fold; (K, F + 3, F + 3)."""
        key = int(folds is self.folds)
        if key not in self._moments:
            z = np.column_stack([self.x, self.age, to_scale(self.age, True)])
            self._center = np.average(z, axis=0, weights=self.weights)
            self._scale = np.sqrt(np.average((z - self._center) ** 2, axis=0, weights=self.weights))
            self._scale[self._scale == 0] = 1.0
            z = np.column_stack([np.ones(len(z)), (z - self._center) / self._scale])
            moments = []
            for rows in (np.flatnonzero(folds == k) for k in range(folds.max() + 1)):
                weights = self.weights[rows]
                moments.append((z[rows] * weights[:, None]).T @ z[rows])
                if self.members is not None:
                    how = self.augmentation, self._scale[:-2]
                    moments[-1][1:-2, 1:-2] += augmentation_covariance(self.members[rows], weights, *how)
            self._moments[key] = np.stack(moments)
        return self._moments[key]
