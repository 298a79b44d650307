"""How well a cohort's ages are predicted out of sample, and whether augmentation helps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from bids_varaug.brainage.cohort import Cohort
from bids_varaug.brainage.features import LogVolumes
from bids_varaug.brainage.folds import grouped_folds, known_sites, participant_weights
from bids_varaug.brainage.model import (
    MIN_PARTICIPANTS,
    check_trainable,
    fit_brain_age,
    fit_estimator,
    predict_ages,
)
from bids_varaug.brainage.reliability import intraclass_correlation
from bids_varaug.brainage.scoring import (
    agreement_scores,
    bootstrap_interval,
    per_participant,
    sign_flip_p_values,
)
from bids_varaug.brainage.study import (
    AUGMENTATIONS,
    BASELINES,
    CURVE_COLUMNS,
    GAIN_COLUMNS,
    PREDICTION_COLUMNS,
    RELIABILITY_COLUMNS,
    SCORE_COLUMNS,
    SITE_COLUMNS,
    Study,
    judge_gains,
)
from bids_varaug.brainage.tune import ALPHAS, closed_form_model

CURVE_SIZES = (50, 100, 200, 500, 1000, 2000, 5000)
N_BOOTSTRAP = 2000
N_PERMUTATIONS = 5000

LINEAR_REFERENCE = "none, linear model"

Progress = Callable[[int, int], None]


def evaluate_brain_age(
    cohort: Cohort,
    *,
    model: str = "auto",
    augmentations: Sequence[str] | None = None,
    cv_folds: int = 5,
    repeats: int = 1,
    seed: int = 0,
    log_volumes: bool = False,
    coverage: float = 0.9,
    curve_sizes: Sequence[int] | None = CURVE_SIZES,
    curve_repeats: int = 1,
    leave_site_out: bool = True,
    n_bootstrap: int = N_BOOTSTRAP,
    n_permutations: int = N_PERMUTATIONS,
    progress: Progress | None = None,
) -> Study:
    """Score a model with every augmentation on the same held-out participants.

    Repeated K-fold cross-validation, folds grouped by participant. Everything that is fitted
    (scaling, choice of model and hyperparameters, correction of age bias, prediction intervals)
    is fitted within the training folds.

    Parameters
    ----------
    cohort : observations without age are left out
    model : one of `estimators.MODELS`
    augmentations : of `study.AUGMENTATIONS`; ``none`` is always among them. All if not given and
        the cohort has members, otherwise ``none`` alone
    cv_folds, repeats : repeat r deals out participants with ``seed + r``
    seed : of folds, drawn noise, bootstrap and permutations
    log_volumes : as `fit_brain_age`; of the row ``ridge`` too
    coverage : of the prediction intervals
    curve_sizes : numbers of training participants of the learning curve, besides all of a
        training fold; those that a training fold does not have are left out. None: no curve
    curve_repeats : how many of the repeats the learning curve uses
    leave_site_out : whether to hold out site after site, where there are at least 3
    n_bootstrap, n_permutations : samples for intervals and p-values
    progress : called with the number of fits done and of all fits

    Returns
    -------
    Study

    Raises
    ------
    UserError
        With fewer than 10 participants with age, or as in `fit_brain_age`.
    ValueError
        If `cv_folds` is below 2 or `repeats` below 1.
    """
    if cv_folds < 2 or repeats < 1:
        raise ValueError(f"{cv_folds} folds, {repeats} repeats: at least 2 and 1 are needed")
    augmentations = _with_none(cohort, augmentations)
    for augmentation in augmentations:
        known = check_trainable(cohort, augmentation, MIN_PARTICIPANTS)
    cohort = known
    sites = known_sites(cohort.groups, cohort.people["site"].to_numpy())
    task = _Task(
        cohort, model, augmentations, cv_folds, repeats, seed, log_volumes, coverage, sites
    )
    sizes = _curve_sizes(task, curve_sizes)
    n_sites = 0 if sites is None or not leave_site_out else len(np.unique(sites))
    n_fits = len(augmentations) * (
        repeats * cv_folds + len(sizes) * min(curve_repeats, repeats) * cv_folds + n_sites + 1
    )
    tick = _Ticker(n_fits, progress)

    held_out = _cross_validate(task, tick)
    rng = np.random.default_rng([seed, 1])
    scores, gains = _score(task, held_out, rng, n_bootstrap, n_permutations)
    curve = _learning_curve(task, held_out, sizes, min(curve_repeats, repeats), rng, tick)
    site_table = _leave_sites_out(task, tick) if n_sites else pd.DataFrame(columns=SITE_COLUMNS)
    chosen = {}
    for augmentation in augmentations:
        choice = task.fit_estimator(cohort, model, augmentation, seed)[1]
        chosen[augmentation] = choice.as_dict()
        tick()
    return Study(
        predictions=_prediction_table(task, held_out),
        scores=scores,
        gains=gains,
        learning_curve=curve,
        sites=site_table,
        reliability=_reliability(task, held_out),
        chosen=chosen,
        settings={
            "model": model,
            "augmentations": list(augmentations),
            "cv_folds": cv_folds,
            "repeats": repeats,
            "seed": seed,
            "log_volumes": log_volumes,
            "coverage": coverage,
            "n_participants": len(np.unique(cohort.groups)),
            "n_observations": len(cohort),
            "n_features": len(cohort.names),
            "n_members": 0 if cohort.members is None else cohort.members.shape[1],
            "n_sites": n_sites,
            "n_bootstrap": n_bootstrap,
            "n_permutations": n_permutations,
        },
    )


@dataclass(frozen=True, eq=False)
class _Task:
    cohort: Cohort
    model: str
    augmentations: tuple[str, ...]
    cv_folds: int
    repeats: int
    seed: int
    log_volumes: bool
    coverage: float
    sites: np.ndarray | None

    @property
    def weights(self) -> np.ndarray:
        return participant_weights(self.cohort.groups)

    @property
    def linear_reference(self) -> str | None:
        """The model that ``analytic`` is to be compared with, where it is not the one asked for."""
        other = closed_form_model(self.model)
        return other if "analytic" in self.augmentations and other != self.model else None

    def fit_estimator(self, train: Cohort, model: str, augmentation: str, seed: int):
        return fit_estimator(train, model, augmentation, seed, log_volumes=self.log_volumes)

    def folds(self, repeat: int) -> np.ndarray:
        return grouped_folds(self.cohort.groups, self.cv_folds, self.seed + repeat)


@dataclass(frozen=True, eq=False)
class _HeldOut:
    """What held-out observations were predicted to be, (repeats, R) float64 years each."""

    predicted: np.ndarray
    corrected: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    sd_num: np.ndarray

    @classmethod
    def empty(cls, repeats: int, n: int) -> _HeldOut:
        return cls(*(np.full((repeats, n), np.nan) for _ in range(5)))


class _Ticker:
    """Counts fits."""

    def __init__(self, total: int, progress: Progress | None):
        self._done, self._total, self._progress = 0, total, progress

    def __call__(self) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total)


def _with_none(cohort: Cohort, augmentations: Sequence[str] | None) -> tuple[str, ...]:
    if augmentations is None:
        augmentations = AUGMENTATIONS if cohort.members is not None else ("none",)
    return tuple(dict.fromkeys(["none", *augmentations]))


def _curve_sizes(task: _Task, sizes: Sequence[int] | None) -> list[int]:
    folds = task.folds(0)
    groups = task.cohort.groups
    least = min(len(np.unique(groups[folds != k])) for k in range(folds.max() + 1))
    return sorted({int(size) for size in sizes or () if MIN_PARTICIPANTS <= size < least})


def _cross_validate(task: _Task, tick: _Ticker) -> dict[str, _HeldOut]:
    cohort, n = task.cohort, len(task.cohort)
    names = [*task.augmentations, *BASELINES]
    if task.linear_reference:
        names.append(LINEAR_REFERENCE)
    results = {name: _HeldOut.empty(task.repeats, n) for name in names}
    for repeat in range(task.repeats):
        folds = task.folds(repeat)
        for k in range(folds.max() + 1):
            train, test = cohort.take(folds != k), cohort.take(folds == k)
            _fill_baselines(task, results, repeat, folds == k, train, test)
            for augmentation in task.augmentations:
                fitted = fit_brain_age(
                    train, task.model, augmentation, task.seed + repeat,
                    log_volumes=task.log_volumes, min_participants=2,
                )  # fmt: skip
                here, rows = results[augmentation], (repeat, folds == k)
                here.predicted[rows] = fitted.predict(test)
                here.corrected[rows] = fitted.correct(here.predicted[rows])
                limits = fitted.predict_interval(test, task.coverage)
                here.lower[rows], here.upper[rows] = limits.T
                if test.members is not None:
                    here.sd_num[rows] = fitted.predict_members(test).std(axis=1, ddof=1)
                tick()
            if task.linear_reference:
                estimator, _ = task.fit_estimator(
                    train, task.linear_reference, "none", task.seed + repeat
                )
                predicted = predict_ages(estimator, test, "none")
                results[LINEAR_REFERENCE].predicted[repeat, folds == k] = predicted
    for here in results.values():  # withheld in one fold, from all: some people's gaps mislead
        if not np.isfinite(here.corrected).all():
            here.corrected[:] = np.nan
    return results


def _fill_baselines(
    task: _Task, results, repeat: int, held_out: np.ndarray, train: Cohort, test: Cohort
):
    weights = participant_weights(train.groups)
    results["mean_predictor"].predicted[repeat, held_out] = np.average(train.age, weights=weights)
    logs = [LogVolumes(train.names)] if task.log_volumes else []
    plain = make_pipeline(*logs, StandardScaler(), RidgeCV(ALPHAS))
    plain.fit(train.baseline, train.age, ridgecv__sample_weight=weights)
    results["ridge"].predicted[repeat, held_out] = plain.predict(test.baseline)


def _errors(task: _Task, here: _HeldOut) -> np.ndarray:
    """Absolute error of each participant, mean over observations and repeats, (P,)."""
    error = np.abs(here.predicted - task.cohort.age).mean(axis=0)
    return per_participant(error, task.cohort.groups)


def _score(
    task: _Task, held_out: dict[str, _HeldOut], rng, n_bootstrap: int, n_permutations: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    names = list(held_out)
    errors = np.stack([_errors(task, held_out[name]) for name in names], axis=1)
    others = [name for name in task.augmentations if name != "none"]
    against = [
        LINEAR_REFERENCE if name == "analytic" and task.linear_reference else "none"
        for name in others
    ]
    gains = errors[:, [names.index(name) for name in against]]
    gains = gains - errors[:, [names.index(name) for name in others]]
    low, high = bootstrap_interval(np.concatenate([errors, gains], axis=1), rng, n_bootstrap)
    p_values = sign_flip_p_values(gains, rng, n_permutations) if others else []
    rows = []
    for i, name in enumerate(names):
        if name == LINEAR_REFERENCE:
            continue
        row = {"augmentation": name, "n": len(errors), "mae_low": low[i], "mae_high": high[i]}
        rows.append(row | _mean_scores(task, held_out[name]))
    gain_rows = [
        (
            name,
            gains[:, i].mean(),
            low[len(names) + i],
            high[len(names) + i],
            p_values[i],
            against[i],
        )
        for i, name in enumerate(others)
    ]
    return (
        pd.DataFrame(rows, columns=list(SCORE_COLUMNS)),
        judge_gains(pd.DataFrame(gain_rows, columns=list(GAIN_COLUMNS[:6]))),
    )


def _mean_scores(task: _Task, here: _HeldOut) -> dict[str, float]:
    """Scores of one augmentation, mean over the repeats."""
    age, weights = task.cohort.age, task.weights
    repeats = []
    for repeat in range(task.repeats):
        scores = agreement_scores(here.predicted[repeat], age, weights)
        corrected = here.corrected[repeat]
        nothing = {"mae_corrected": np.nan, "bias_slope_corrected": np.nan}
        if np.isfinite(corrected).all():
            again = agreement_scores(corrected, age, weights)
            nothing = {"mae_corrected": again["mae"], "bias_slope_corrected": again["bias_slope"]}
        scores |= nothing
        inside = (here.lower[repeat] <= age) & (age <= here.upper[repeat])
        known = np.isfinite(here.lower[repeat]).all()
        width = here.upper[repeat] - here.lower[repeat]
        scores["coverage"] = np.average(inside, weights=weights) if known else np.nan
        scores["interval_width"] = np.average(width, weights=weights) if known else np.nan
        repeats.append(scores)
    return {name: float(np.mean([scores[name] for scores in repeats])) for name in repeats[0]}


def _prediction_table(task: _Task, held_out: dict[str, _HeldOut]) -> pd.DataFrame:
    people = task.cohort.people[["participant_id", "session_id", "observation", "age"]]
    tables = []
    for augmentation in task.augmentations:
        table = people.copy()
        table["augmentation"] = augmentation
        for name, values in asdict(held_out[augmentation]).items():
            table[name] = values.mean(axis=0)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)[list(PREDICTION_COLUMNS)]


def _learning_curve(
    task: _Task, held_out: dict[str, _HeldOut], sizes, repeats: int, rng, tick: _Ticker
) -> pd.DataFrame:
    """Error against the number of training participants, always on all held-out people."""
    cohort, rows = task.cohort, []
    if not sizes:
        return pd.DataFrame(columns=list(CURVE_COLUMNS))
    for size in sizes:
        predicted = {name: np.zeros((repeats, len(cohort))) for name in task.augmentations}
        for repeat in range(repeats):
            folds = task.folds(repeat)
            for k in range(folds.max() + 1):
                drawn = np.random.default_rng([task.seed + repeat, k])
                train = cohort.take(_some_participants(cohort.groups, folds != k, size, drawn))
                test = cohort.take(folds == k)
                for name in task.augmentations:
                    estimator, _ = task.fit_estimator(train, task.model, name, task.seed + repeat)
                    predicted[name][repeat, folds == k] = predict_ages(estimator, test, name)
                    tick()
        rows += _curve_rows(task, size, predicted, rng)
    folds = task.folds(0)
    everyone = np.mean([len(np.unique(cohort.groups[folds != k])) for k in range(folds.max() + 1)])
    predicted = {name: held_out[name].predicted for name in task.augmentations}
    rows += _curve_rows(task, int(round(everyone)), predicted, rng)
    return pd.DataFrame(rows, columns=list(CURVE_COLUMNS))


def _curve_rows(task: _Task, size: int, predicted: dict[str, np.ndarray], rng) -> list[tuple]:
    errors = [np.abs(values - task.cohort.age).mean(axis=0) for values in predicted.values()]
    errors = per_participant(np.stack(errors, axis=1), task.cohort.groups)
    low, high = bootstrap_interval(errors, rng, 500)
    return [(size, name, errors[:, i].mean(), low[i], high[i]) for i, name in enumerate(predicted)]


def _some_participants(
    groups: np.ndarray, among: np.ndarray, size: int, rng: np.random.Generator
) -> np.ndarray:
    """Mask of the rows of `size` participants: of one draw, smaller sizes are part of larger."""
    people = rng.permutation(np.unique(groups[among]))[:size]
    return np.isin(groups, people)


def _leave_sites_out(task: _Task, tick: _Ticker) -> pd.DataFrame:
    cohort, rows = task.cohort, []
    for site in np.unique(task.sites):
        train, test = cohort.take(task.sites != site), cohort.take(task.sites == site)
        errors = {}
        for name in task.augmentations:
            estimator, _ = task.fit_estimator(train, task.model, name, task.seed)
            errors[f"mae_{name}"] = np.abs(predict_ages(estimator, test, name) - test.age)
            tick()
        mean = np.average(train.age, weights=participant_weights(train.groups))
        errors["mae_mean_predictor"] = np.abs(mean - test.age)
        row = {"site": test.people["site"].iloc[0], "n": len(np.unique(test.groups))}
        weights = participant_weights(test.groups)
        rows.append(row | {k: np.average(v, weights=weights) for k, v in errors.items()})
    return pd.DataFrame(rows)


def _reliability(task: _Task, held_out: dict[str, _HeldOut]) -> pd.DataFrame:
    cohort = task.cohort
    _, counts = np.unique(cohort.groups, return_counts=True)
    rows = []
    if (counts > 1).sum() > 1:
        columns = [
            ("prediction", name, held_out[name].predicted.mean(axis=0))
            for name in task.augmentations
        ]
        columns += [
            ("feature", name, values)
            for name, values in zip(cohort.names, cohort.baseline.T, strict=True)
        ]
        for kind, name, values in columns:
            agreement = intraclass_correlation(values, cohort.groups)
            rows.append({"kind": kind, "name": name} | asdict(agreement))
    return pd.DataFrame(rows, columns=list(RELIABILITY_COLUMNS))
