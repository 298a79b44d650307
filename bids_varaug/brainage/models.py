"""Models of age: chosen and fitted within the training participants, applied to others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
    augmented_members,
    centers,
    check_augmentation,
    draw_rows,
    pseudo_rows,
)
from bids_varaug.brainage.calibration import BiasCorrection, cross_conformal_interval, fit_correction
from bids_varaug.brainage.cohort import Cohort, grouped_folds
from bids_varaug.brainage.features import LogVolumes
from bids_varaug.errors import UserError

LINEAR_MODELS = ("ridge", "bayesian_ridge")
# What ``auto`` averages. At a new site kernel models fall back to the mean where there were no training people, and
# linear ones extrapolate: they fail in different places.
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
    """What is decided before a model is fitted; `inner_mae` is the error in years by which it was chosen.

    `model` is a key of `GRIDS`, or ``average`` (equal weights on several; its `hyperparameters` are those
    of each); `log_age` whether it predicts ``log(age + 1)``.
    """

    model: str
    log_age: bool
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    inner_mae: float = float("nan")


def closed_form_model(model: str) -> str:
    """Return the model that ``analytic`` fits where this one is asked for."""
    return model if model in LINEAR_MODELS else "bayesian_ridge"


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

    The residuals, (N,), are absolute errors of the models of the inner folds on the participants held out, on the
    model's scale of age; each has its fold and its weight, 1 in all per participant.
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

    Observations without age are left out. ``analytic`` fits bayesian_ridge in place of svr, gpr and auto. With
    `log_volumes`, see `features.LogVolumes`, numerical noise is augmented as it stands on the logarithmic scale. The
    seed is that of folds and drawn noise. A UserError says that there are fewer than `min_participants` participants
    with age, one age for all, features not finite, an augmentation that needs members where there are none, or a kernel
    model with more than 5,000 observations.
    """
    cohort = check_trainable(cohort, augmentation, min_participants)
    training = _Training(cohort, augmentation, seed, log_volumes)
    chosen = training.choose(model)
    fold_estimators, held_out = [], np.zeros(len(cohort))
    for k in range(training.folds.max() + 1):
        test = training.folds == k
        fold_estimators.append(training.fit(chosen, np.flatnonzero(~test)))
        held_out[test] = predict_ages(fold_estimators[k], cohort.take(test), augmentation)
    return BrainAgeModel(
        names=tuple(cohort.names),
        estimator=training.fit(chosen, np.arange(len(cohort))),
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
    cohort = check_trainable(cohort, augmentation, 2)
    training = _Training(cohort, augmentation, seed, log_volumes)
    chosen = training.choose(model)
    return training.fit(chosen, np.arange(len(cohort))), chosen


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


def check_trainable(cohort: Cohort, augmentation: str, min_participants: int) -> Cohort:
    """Return the observations with age, if a model can be fitted to them; for errors see `fit_brain_age`."""
    check_augmentation(cohort, augmentation)
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
    """Predictions of ridge with every penalty, from one fit: each is the penalty of a target of its own."""
    scaler = StandardScaler().fit(x, sample_weight=weights)
    targets = np.repeat(to_scale(age, log_age)[:, None], len(ALPHAS), axis=1)
    ridge = Ridge(ALPHAS, solver="cholesky").fit(scaler.transform(x), targets, sample_weight=weights)
    return ridge.predict(scaler.transform(x_test))


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

    def choose(self, model: str) -> Choice:
        """Choose scale of age and hyperparameters by the error in held-out sites or participants."""
        if self.augmentation == "analytic" or (model == "auto" and len(self.x) > MAX_KERNEL_ROWS):
            model = closed_form_model(model)
        if model not in ("auto", *LINEAR_MODELS) and len(self.x) > MAX_KERNEL_ROWS:
            raise UserError(
                f"{model} with {len(self.x)} observations: its cost grows with their square, and more than "
                f"{MAX_KERNEL_ROWS} are refused. Use --brainage-model ridge, bayesian_ridge or auto."
            )
        averaged = AVERAGED if self.sites is None else AVERAGED_OVER_SITES
        best = []
        for log_age in (False, True):
            names = averaged if model == "auto" else (model,)
            options = [min(self._options(name, log_age), key=itemgetter(0)) for name in names]
            held_out = np.mean([predictions for _, _, predictions in options], axis=0)
            choice = options[0][1]
            if model == "auto":
                parts = {part.model: dict(part.hyperparameters) for _, part, _ in options}
                choice = Choice("average", log_age, parts)
            best.append((self._error(held_out, log_age), choice))
        mae, choice = min(best, key=itemgetter(0))
        return replace(choice, inner_mae=mae)

    def _options(self, model: str, log_age: bool) -> Iterator[tuple[float, Choice, np.ndarray]]:
        """Every setting of a model: its error in years, itself, and held-out predictions on its own scale of age."""
        settings = [Choice(model, log_age, values) for values in ParameterGrid(GRIDS[model])]
        folds = self.folds if self.sites is None else grouped_folds(self.sites, INNER_FOLDS, self.seed)
        held_out = np.zeros((len(self.x), len(settings)))
        for k in range(folds.max() + 1):
            train, test = np.flatnonzero(folds != k), folds == k
            rows = self._rows(train, settings[0], augment=model in LINEAR_MODELS)
            if model == "ridge":
                held_out[test] = _ridge_path(*rows, self.x[test], log_age)
            else:
                fitted = [fit_weighted(choice, *rows).predict(self.x[test]) for choice in settings]
                held_out[test] = to_scale(np.stack(fitted, axis=1), log_age)
        for choice, column in zip(settings, held_out.T, strict=True):
            yield self._error(column, log_age), choice, column

    def _error(self, held_out: np.ndarray, log_age: bool) -> float:
        return float(np.average(np.abs(from_scale(held_out, log_age) - self.age), weights=self.weights))

    def fit(self, choice: Choice, rows: np.ndarray) -> BaseEstimator:
        """Fit what was chosen to these observations' augmented rows."""
        fitted = fit_weighted(choice, *self._rows(rows, choice))
        return fitted if self.logs is None else make_pipeline(self.logs, fitted)

    def _rows(
        self, rows: np.ndarray, choice: Choice, augment: bool = True
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Features, ages and weights of the training rows made from these observations."""
        x, age, weights = self.x[rows], self.age[rows], self.weights[rows]
        if self.members is None or not augment:
            return x, age, weights
        rng = np.random.default_rng([self.seed, len(rows)])
        members = augmented_members(self.members[rows], weights, self.groups[rows], self.augmentation, rng)
        if choice.model not in LINEAR_MODELS:
            x, owner, weights = draw_rows(members, weights, MAX_KERNEL_ROWS, rng)
            return x, age[owner], weights
        pseudo_x, pseudo_weights = pseudo_rows(members, weights)
        mean_age = from_scale(np.average(to_scale(age, choice.log_age), weights=weights), choice.log_age)
        ages = np.concatenate([age, np.full(len(pseudo_x), mean_age)])
        return np.concatenate([x, pseudo_x]), ages, np.concatenate([weights, pseudo_weights])
