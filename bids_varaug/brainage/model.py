"""The brain-age model: fitted to a cohort, applied to another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from bids_varaug.brainage.augment import (
    ROW_AUGMENTATIONS,
    USES_MEMBERS,
    Rows,
    augmented_rows,
    centers,
    check_augmentation,
    summed_covariances,
)
from bids_varaug.brainage.cohort import Cohort
from bids_varaug.brainage.conformal import cross_conformal_limits
from bids_varaug.brainage.correction import BiasCorrection, fit_correction
from bids_varaug.brainage.estimators import (
    LINEAR_MODELS,
    Choice,
    MomentRidge,
    build_estimator,
    fit_weighted,
    from_scale,
    to_scale,
)
from bids_varaug.brainage.features import LogVolumes
from bids_varaug.brainage.folds import grouped_folds, known_sites, participant_weights
from bids_varaug.brainage.tune import ALPHAS, MAX_KERNEL_ROWS, closed_form_model, tune
from bids_varaug.errors import UserError

MIN_PARTICIPANTS = 10
INNER_FOLDS = 5
PREDICTED_ROWS = 4096


@dataclass(frozen=True, eq=False)
class BrainAgeModel:
    """A fitted model of age, the models of its inner folds, and what they missed by.

    Attributes
    ----------
    names : of the F features, in order
    estimator : predicts years from (R, F) features, of which it takes logarithms itself if asked to
    fold_estimators : one per inner fold of participants, fitted without it
    residuals : (N,) float64, absolute errors of the fold estimators on the participants held out,
        on the model's scale of age
    residual_folds : (N,) int64, the inner fold of each
    residual_weights : (N,) float64, 1 in all per participant
    correction : of age bias, fitted to the same held-out predictions
    chosen : model, log_age, hyperparameters, inner_mae
    augmentation : what it was trained with
    source : of the features, as in `Cohort`
    unit : of the features
    training : n_participants, n_observations, age_min, age_max [year], seed
    """

    names: tuple[str, ...]
    estimator: BaseEstimator
    fold_estimators: tuple[BaseEstimator, ...]
    residuals: np.ndarray
    residual_folds: np.ndarray
    residual_weights: np.ndarray
    correction: BiasCorrection
    chosen: Mapping[str, object]
    augmentation: str
    source: Mapping[str, object] = field(default_factory=dict)
    unit: str = ""
    training: Mapping[str, object] = field(default_factory=dict)

    def predict(self, cohort: Cohort) -> np.ndarray:
        """Predicted ages, not corrected for age bias.

        From the baseline with ``none``, from the mean of the members with ``mean``, otherwise the
        mean of the predictions from each member. Features of one value per observation are
        predicted from as they are.

        Parameters
        ----------
        cohort : with the model's features, in its order

        Returns
        -------
        (R,) float64, years

        Raises
        ------
        UserError
            If the cohort lacks features of the model.
        """
        return self._predict(self.estimator, self._checked(cohort))

    def predict_members(self, cohort: Cohort) -> np.ndarray:
        """Predicted ages from each member's features, (R, M) float64, years.

        Raises
        ------
        UserError
            If the cohort lacks features of the model, or members.
        """
        cohort = self._checked(cohort)
        if cohort.members is None:
            raise UserError(
                "The spread of predictions over members needs the features of at least two "
                "members; these features have one value per observation."
            )
        return _predict_members(self.estimator, cohort.members)

    def predict_interval(self, cohort: Cohort, coverage: float = 0.9) -> np.ndarray:
        """Limits between which the age lies with a probability of about `coverage` (CV+).

        Computed on the model's scale of age: wider for the old where that is the logarithm. See
        `conformal.cross_conformal_limits` for the guarantee, which holds for people like those
        of training; at new sites it is not one.

        Returns
        -------
        (R, 2) float64, years; NaN if training had too few participants for this coverage
        """
        cohort = self._checked(cohort)
        log_age = bool(self.chosen["log_age"])
        predictions = np.stack(
            [to_scale(self._predict(one, cohort), log_age) for one in self.fold_estimators]
        )
        limits = cross_conformal_limits(
            predictions, self.residuals, self.residual_folds, self.residual_weights, coverage
        )
        return from_scale(limits, log_age)

    def correct(self, predicted: np.ndarray) -> np.ndarray:
        """Correct predicted ages for age bias, without knowing the age; NaN if that failed."""
        return self.correction.apply(predicted)

    def _predict(self, estimator: BaseEstimator, cohort: Cohort) -> np.ndarray:
        return predict_ages(estimator, cohort, self.augmentation)

    def _checked(self, cohort: Cohort) -> Cohort:
        if tuple(cohort.names) == tuple(self.names):
            return cohort
        missing = [name for name in self.names if name not in cohort.names]
        if missing:
            raise UserError(
                f"The model needs {len(missing)} features that are not there: "
                f"{', '.join(missing[:10])}{', ...' if len(missing) > 10 else ''}. "
                "Use features of the same kind as in training, or another model."
            )
        order = [cohort.names.index(name) for name in self.names]
        return replace(
            cohort,
            names=self.names,
            baseline=cohort.baseline[:, order],
            members=None if cohort.members is None else cohort.members[:, :, order],
        )


def fit_brain_age(
    cohort: Cohort,
    model: str = "auto",
    augmentation: str = "none",
    seed: int = 0,
    *,
    log_volumes: bool = False,
    min_participants: int = MIN_PARTICIPANTS,
) -> BrainAgeModel:
    """Fit a model of age to a cohort.

    1. Model, scale of age and hyperparameters are chosen on one row per observation (see `tune`),
       by held-out sites where there are 3 or more, otherwise by held-out participants.
    2. The chosen model is fitted to the augmented rows. Penalties of linear models are chosen
       once more, with augmentation; kernel models keep theirs, and see at most 5,000 rows, that
       is, members drawn by chance for each observation.
    3. The same without each of 5 folds of participants, for intervals and the correction of bias.

    Parameters
    ----------
    cohort : observations without age are left out
    model : one of `estimators.MODELS`
    augmentation : one of `study.AUGMENTATIONS`, see `augment`; ``analytic`` fits linear models
        only: ``bayesian_ridge`` in place of ``svr`` and ``gpr``
    seed : of folds and drawn noise
    log_volumes : whether to take logarithms of volumes first, see `features.LogVolumes`; numerical
        noise is then augmented as it stands on the logarithmic scale
    min_participants : fewer with age are refused; training folds of a study pass less

    Raises
    ------
    UserError
        With fewer than `min_participants` participants with age, one age for all, features not
        finite, or an augmentation that needs members where there are none.
    """
    cohort = check_trainable(cohort, augmentation, min_participants)
    training = _Training(cohort, augmentation, seed, log_volumes)
    chosen = training.choose(model)
    estimator = training.fit(chosen, np.arange(len(cohort)))
    fold_estimators = []
    held_out = np.zeros(len(cohort))
    for k in range(training.folds.max() + 1):
        rows, test = np.flatnonzero(training.folds != k), training.folds == k
        fold_estimators.append(training.fit(chosen, rows))
        held_out[test] = predict_ages(fold_estimators[k], cohort.take(test), augmentation)
    log_age = chosen.log_age
    return BrainAgeModel(
        names=tuple(cohort.names),
        estimator=estimator,
        fold_estimators=tuple(fold_estimators),
        residuals=np.abs(to_scale(held_out, log_age) - to_scale(cohort.age, log_age)),
        residual_folds=training.folds,
        residual_weights=training.weights,
        correction=fit_correction(held_out, cohort.age, training.weights),
        chosen=chosen.as_dict(),
        augmentation=augmentation,
        source=cohort.source,
        unit=cohort.unit,
        training={
            "n_participants": len(np.unique(cohort.groups)),
            "n_observations": len(cohort),
            "age_min": float(cohort.age.min()),
            "age_max": float(cohort.age.max()),
            "seed": seed,
        },
    )


def fit_estimator(
    cohort: Cohort, model: str, augmentation: str, seed: int, *, log_volumes: bool = False
) -> tuple[BaseEstimator, Choice]:
    """Choose and fit as `fit_brain_age` does, without intervals and correction.

    For learning curves and left-out sites, where only predictions are wanted.
    """
    cohort = check_trainable(cohort, augmentation, 2)
    training = _Training(cohort, augmentation, seed, log_volumes)
    chosen = training.choose(model)
    return training.fit(chosen, np.arange(len(cohort))), chosen


def predict_ages(estimator: BaseEstimator, cohort: Cohort, augmentation: str) -> np.ndarray:
    """Ages from the features that an augmentation predicts from, (R,) float64, years."""
    if augmentation == "none" or cohort.members is None:
        return estimator.predict(cohort.baseline)
    if augmentation in USES_MEMBERS:
        return _predict_members(estimator, cohort.members).mean(axis=1)
    return estimator.predict(centers(cohort, augmentation))


def check_trainable(cohort: Cohort, augmentation: str, min_participants: int) -> Cohort:
    """Return the observations with age, if a model can be fitted to them.

    Raises
    ------
    UserError
        See `fit_brain_age`.
    """
    check_augmentation(cohort, augmentation)
    known = np.isfinite(cohort.age)
    n = len(np.unique(cohort.groups[known]))
    if n < min_participants:
        raise UserError(
            f"{n} participants with age: a model of age needs at least {min_participants}. Give "
            "ages in participants.tsv, or apply a model fitted elsewhere with --apply-model."
        )
    cohort = cohort if known.all() else cohort.take(known)
    if np.ptp(cohort.age) == 0:
        raise UserError(f"All participants are {cohort.age[0]:g} years old: nothing to learn.")
    if (cohort.age < 0).any():
        raise UserError(f"Ages below zero ({cohort.age.min():g} years): mend participants.tsv.")
    bad = ~np.isfinite(cohort.baseline).all(axis=0)
    if cohort.members is not None:
        bad |= ~np.isfinite(cohort.members).all(axis=(0, 1))
    if bad.any():
        names = ", ".join(name for name, is_bad in zip(cohort.names, bad, strict=True) if is_bad)
        raise UserError(f"Features with missing or infinite values: {names}. Leave them out.")
    return cohort


class _Training:
    """A cohort made ready for fitting with one augmentation: rows, weights, folds."""

    def __init__(self, cohort: Cohort, augmentation: str, seed: int, log_volumes: bool):
        self.cohort = cohort
        self.augmentation = augmentation
        self.seed = seed
        self.x = centers(cohort, augmentation)
        self.logs = LogVolumes(cohort.names).fit(self.x) if log_volumes else None
        if self.logs is not None:
            self.cohort = _logged(cohort, self.logs)
            # As in `predict_ages`: the logarithm of a mean, or the mean of the members' logarithms.
            if augmentation in USES_MEMBERS:
                self.x = centers(self.cohort, augmentation)
            else:
                self.x = self.logs.transform(self.x)
        self.age = cohort.age
        self.groups = cohort.groups
        self.weights = participant_weights(self.groups)
        self.folds = grouped_folds(self.groups, INNER_FOLDS, seed)
        self.sites = known_sites(self.groups, cohort.people["site"].to_numpy())

    def choose(self, model: str) -> Choice:
        """Choose on one row per observation; then the penalty of ridge on the augmented rows."""
        scatter = None
        by_site = self.sites is not None
        folds = grouped_folds(self.sites, INNER_FOLDS, self.seed) if by_site else self.folds
        if self.augmentation == "analytic":
            model = closed_form_model(model)
            scatter = np.stack([self._scatter(folds == k) for k in range(folds.max() + 1)])
        choice = tune(model, self.x, self.age, self.weights, folds, scatter, self.sites)
        if choice.model == "ridge" and self.augmentation in ROW_AUGMENTATIONS:
            return self._choose_penalty(choice, folds)
        return choice

    def _choose_penalty(self, choice: Choice, folds: np.ndarray) -> Choice:
        """Choose the penalty of ridge again, now with augmented rows."""
        target = to_scale(self.age, choice.log_age)
        held_out = np.zeros((len(ALPHAS), len(self.age)))
        for k in range(folds.max() + 1):
            rows, test = np.flatnonzero(folds != k), folds == k
            augmented = self._rows(rows, None)
            scaler = StandardScaler().fit(augmented.x, sample_weight=augmented.weights)
            z, z_test = scaler.transform(augmented.x), scaler.transform(self.x[test])
            owners = target[rows][augmented.owner]
            for a, alpha in enumerate(ALPHAS):
                ridge = Ridge(alpha=alpha).fit(z, owners, sample_weight=augmented.weights)
                held_out[a, test] = ridge.predict(z_test)
        errors = np.abs(from_scale(held_out, choice.log_age) - self.age) @ self.weights
        best = int(np.argmin(errors))
        return replace(
            choice,
            hyperparameters={"alpha": float(ALPHAS[best])},
            inner_mae=float(errors[best] / self.weights.sum()),
        )

    def fit(self, choice: Choice, rows: np.ndarray) -> BaseEstimator:
        """Fit what was chosen to these observations' augmented rows."""
        fitted = self._fit(choice, rows)
        return fitted if self.logs is None else make_pipeline(self.logs, fitted)

    def _fit(self, choice: Choice, rows: np.ndarray) -> BaseEstimator:
        if choice.model in LINEAR_MODELS and self.augmentation not in ROW_AUGMENTATIONS:
            alpha = choice.hyperparameters.get("alpha")
            scatter = self._scatter(rows) if self.augmentation == "analytic" else None
            return MomentRidge(alpha, choice.log_age).fit(
                self.x[rows], self.age[rows], self.weights[rows], scatter
            )
        estimator = build_estimator(choice)
        if self.augmentation not in ROW_AUGMENTATIONS:
            return fit_weighted(estimator, self.x[rows], self.age[rows], self.weights[rows])
        augmented = self._rows(rows, None if choice.is_linear else MAX_KERNEL_ROWS)
        age = self.age[rows][augmented.owner]
        return fit_weighted(estimator, augmented.x, age, augmented.weights)

    def _rows(self, rows: np.ndarray, max_rows: int | None) -> Rows:
        rng = np.random.default_rng([self.seed, len(rows)])
        return augmented_rows(
            self.cohort.members[rows], self.weights[rows], self.groups[rows], self.augmentation,
            rng, max_rows,
        )  # fmt: skip

    def _scatter(self, rows: np.ndarray) -> np.ndarray:
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows
        return summed_covariances(self.cohort.members, self.weights, rows)


def _logged(cohort: Cohort, logs: LogVolumes) -> Cohort:
    members = cohort.members
    if members is not None:
        flat = members.reshape(-1, members.shape[2])
        members = logs.transform(flat).reshape(members.shape)
    return replace(cohort, baseline=logs.transform(cohort.baseline), members=members)


def _predict_members(estimator: BaseEstimator, members: np.ndarray) -> np.ndarray:
    """Predict in pieces, as kernel models need memory for rows x training rows, (R, M)."""
    n, n_members, n_features = members.shape
    rows = members.reshape(n * n_members, n_features)
    pieces = [
        estimator.predict(rows[start : start + PREDICTED_ROWS])
        for start in range(0, len(rows), PREDICTED_ROWS)
    ]
    return np.concatenate(pieces).reshape(n, n_members)
