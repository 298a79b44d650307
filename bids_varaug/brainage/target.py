"""Any target, a number or a category, predicted with the same augmentations, folds and sites as age.

Numbers are predicted by ridge, categories by logistic regression. Its probabilities are calibrated, as categories keep
their frequencies in training; the category decided on is that of the largest probability over frequency, so that rare
ones count as much as frequent ones. Beside them stand predictors from covariates alone, from the site, from nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import numpy as np
import pandas as pd
from sklearn.calibration import calibration_curve
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import log_loss, make_scorer, mean_absolute_error, r2_score, roc_auc_score
from sklearn.model_selection import PredefinedSplit, cross_val_score, permutation_test_score
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from bids_varaug.brainage.augment import USES_MEMBERS, augmented_members, centers, draw_rows
from bids_varaug.brainage.calibration import CONFIDENCE
from bids_varaug.brainage.cohort import Cohort, grouped_folds
from bids_varaug.brainage.evaluate import (
    CONTRASTS,
    CONTROLS,
    best_of,
    compare_losses,
    make_splits,
    sizes_of,
    tried_augmentations,
)
from bids_varaug.brainage.features import find_reference
from bids_varaug.brainage.models import INNER_FOLDS, MIN_PARTICIPANTS
from bids_varaug.errors import UserError
from bids_varaug.inputs.leaks import reasons_by_value
from bids_varaug.inputs.tables import find_column, some

MAX_CLASSES = 10
MAX_ROWS = 200_000
PENALTIES = np.logspace(-4, 2, 7)  # C of logistic regression, 1 / alpha of ridge
N_PERMUTATIONS, N_BOOTSTRAP = 200, 300
IDS = ["participant_id", "session_id", "observation"]
WEIGHTS = ("scale__sample_weight", "model__sample_weight")


@dataclass(frozen=True, eq=False)
class TargetData:
    """A cohort, and of each of its R observations the target and C covariates; all are known."""

    cohort: Cohort
    name: str
    y: np.ndarray  # (R,) float64: a number, or the place of a category in `classes`
    classes: tuple[str, ...]  # empty for numbers
    covariates: pd.DataFrame  # (R, C) float64

    def take(self, rows: np.ndarray) -> TargetData:
        """The observations where a mask is true."""
        covariates = self.covariates.loc[rows].reset_index(drop=True)
        return replace(self, cohort=self.cohort.take(rows), y=self.y[rows], covariates=covariates)

    def only(self, covariates: pd.DataFrame) -> TargetData:
        """The same with covariates and no features."""
        cohort = replace(self.cohort, names=(), baseline=np.zeros((len(self.y), 0)), members=None, member_ids=())
        return replace(self, cohort=cohort, covariates=covariates)

    def versions(self, x: np.ndarray) -> np.ndarray:
        """Features of M versions with the covariates behind them, (R, M, F) to (R, M, F + C)."""
        fixed = np.repeat(self.covariates.to_numpy()[:, None], x.shape[1], axis=1)
        return np.concatenate([x, fixed], axis=2)


@dataclass(frozen=True, eq=False)
class TargetModel:
    """A fitted model of a target, and what it was fitted to."""

    target: str
    classes: tuple[str, ...]
    frequencies: tuple[float, ...]  # of the classes in training
    names: tuple[str, ...]
    covariates: tuple[str, ...]
    estimator: Pipeline
    augmentation: str
    source: Mapping[str, Any] = field(default_factory=dict)
    unit: str = ""
    training: Mapping[str, Any] = field(default_factory=dict)

    def predict(self, data: TargetData) -> pd.DataFrame:
        """One row per observation: ids, `predicted`; of categories p_CLASS, and b_CLASS, were all equally frequent.

        With augmentations that use members, the mean of what is predicted from each.
        """
        cohort = data.cohort
        members = cohort.members if self.augmentation in USES_MEMBERS else None
        x = data.versions(centers(cohort, self.augmentation)[:, None] if members is None else members)
        flat, shape = x.reshape(-1, x.shape[2]), x.shape[:2]
        table = cohort.people[IDS].copy()
        if not self.classes:
            return table.assign(predicted=self.estimator.predict(flat).reshape(shape).mean(axis=1))
        shares = np.zeros((*shape, len(self.classes)))
        shares[..., self.estimator.classes_.astype(int)] = self.estimator.predict_proba(flat).reshape(*shape, -1)
        return _decide(table, shares.mean(axis=1), self.classes, self.frequencies)


@dataclass(frozen=True, eq=False)
class TargetEvaluation:
    """How well a target is predicted out of sample; columns are described in ``data/templates/columns.tsv``."""

    predictions: pd.DataFrame  # per observation and augmentation, see `TargetModel.predict`, and observed
    scores: pd.DataFrame  # per model, measure (see `target_measures`), and whether participants or sites were held out
    gains: pd.DataFrame  # of `compare_losses`: absolute error, or of categories log loss [nat]
    p_value: float  # that target and features are unrelated, by permutation
    best: str  # augmentation, see `evaluate.best_of`
    settings: dict[str, Any]


def encode_covariates(cohort: Cohort, names: Sequence[str], variables: pd.DataFrame | None) -> pd.DataFrame:
    """Covariates of each observation, categories as one column per level, float64; NaN where missing.

    Age, sex and site are those of the cohort, "icv" is its intracranial volume; others are columns of `variables`, a
    row per observation. A UserError names one that is nowhere.
    """
    columns = {}
    for name in names:
        if name in ("age", "sex", "site"):
            columns[name] = cohort.people[name]
        elif name == "icv" and (at := find_reference(cohort.names, "intracranial")) is not None:
            columns[name] = pd.Series(cohort.baseline[:, at])
        elif variables is not None and (found := find_column(list(variables), name)):
            columns[name] = variables[found].reset_index(drop=True)
        else:
            raise UserError(f"--covariates {name}: no such column in participants.tsv or the table of features.")
    frame = pd.DataFrame(columns, index=range(len(cohort)))
    encoded = pd.get_dummies(frame, dtype=np.float64).astype(np.float64) if columns else frame
    return encoded.mask(frame.isna().any(axis=1), np.nan)


def prepare_target(cohort: Cohort, name: str, values: pd.Series, covariates: pd.DataFrame, n_folds: int) -> TargetData:
    """Leave out who lacks the target or a covariate, and features that are almost the target itself.

    Text, truth values and numbers of which there are two are categories. A UserError says that the target is missing
    for most, the same for all, one of more than 10 categories, or told by a covariate or every feature, or that a
    category has fewer participants than there are folds.
    """
    known = values.notna().to_numpy()
    n, n_all = (people["participant_id"].nunique() for people in (cohort.people[known], cohort.people))
    if n < max(MIN_PARTICIPANTS, n_all / 2):
        raise UserError(f"--target {name}: known of {n} of {n_all} participants; at least 10, and half, are needed.")
    complete = known & covariates.notna().all(axis=1).to_numpy()
    why = np.where(known, "a covariate is missing", f"no {name}")[~complete]
    left_out = cohort.left_out | dict(zip(cohort.people["observation"][~complete], why, strict=True))
    cohort, values = replace(cohort.take(complete), left_out=left_out), values[complete].reset_index(drop=True)
    covariates = covariates[complete].reset_index(drop=True)
    y, classes = _read_target(name, values, cohort.people["participant_id"], n_folds)
    features = pd.DataFrame(cohort.baseline, columns=list(cohort.names))
    reasons = reasons_by_value(features.join(covariates, rsuffix="*"), cohort.people.assign(age=y))
    told = {name, *(column.rstrip("*") for column, why in reasons.items() if why.startswith("is almost"))}
    if told & set(covariates):
        raise UserError(f"--covariates: {some(sorted(told & set(covariates)))} tells the target {name}. Choose others.")
    names = [column for column in cohort.names if column not in told]
    if not names:
        raise UserError(f"--target {name}: every feature tells it; none is left to predict it from.")
    dropped = dict.fromkeys(sorted(told & set(cohort.names)), f"tells the target {name}")
    cohort = replace(cohort.with_features(names), source={**cohort.source, "told_target": dropped})
    return TargetData(cohort, name, y, classes, covariates)


def _read_target(name: str, values: pd.Series, people: pd.Series, n_folds: int) -> tuple[np.ndarray, tuple[str, ...]]:
    """Numbers, or places of categories and these; for errors see `prepare_target`."""
    if values.nunique() < 2:
        raise UserError(f"--target {name}: {values.iloc[0]} for all participants: nothing to learn.")
    is_number = pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values)
    if is_number and values.nunique() > 2:
        return values.to_numpy(np.float64), ()
    labels = values.map("{:g}".format if is_number else str)
    counts = people.groupby(labels).nunique()
    if len(counts) > MAX_CLASSES:
        raise UserError(
            f"--target {name}: {len(counts)} categories ({some(list(counts.index))}), at most {MAX_CLASSES} are "
            "allowed. Merge some, choose with --include, or give numbers."
        )
    few = [f"{label} ({size})" for label, size in counts.items() if size < n_folds]
    if few:
        raise UserError(
            f"--target {name}: categories with fewer participants than the {n_folds} folds: {some(few)}. Leave them "
            "out with --include, or lower --cv-folds."
        )
    return labels.map(list(counts.index).index).to_numpy(np.float64), tuple(counts.index)


def choose_penalty(data: TargetData, augmentation: str, seed: int) -> dict[str, float]:
    """Parameter of `fit_target` that predicts inner folds of participants best, without augmentation.

    From the strongest penalty on, until two weaker ones are no better: nearly free models of many features, which are
    the slowest to fit, are left out where they are of no use.
    """
    key, grid = ("model__C", PENALTIES) if data.classes else ("model__alpha", 1 / PENALTIES)
    folds = grouped_folds(data.cohort.groups, INNER_FOLDS, seed, data.y if data.classes else None)
    how = {"scoring": _log_loss_of(data) if data.classes else "neg_mean_absolute_error", "cv": PredefinedSplit(folds)}
    x = data.versions(centers(data.cohort, augmentation)[:, None])[:, 0]
    weights, scores = dict.fromkeys(WEIGHTS, data.cohort.weights), []
    for value in grid:
        model = _pipeline(data).set_params(**{key: value})
        scores.append(cross_val_score(model, x, data.y, params=weights, **how).mean())
        if len(scores) > 2 + np.argmax(scores):
            break
    return {key: float(grid[np.argmax(scores)])}


def fit_target(data: TargetData, augmentation: str, seed: int, penalty: dict[str, float] | None = None) -> TargetModel:
    """Fit a model, with the penalty of `choose_penalty` if none is given."""
    cohort, y, weights = data.cohort, data.y, data.cohort.weights
    penalty = penalty or choose_penalty(data, augmentation, seed)
    versions = centers(cohort, augmentation)[:, None]
    rng = np.random.default_rng([seed, len(y)])
    if augmentation in USES_MEMBERS and cohort.members is not None:
        versions = augmented_members(cohort.members, weights, cohort.groups, augmentation, rng)
    x, owner, row_weights = draw_rows(data.versions(versions), weights, MAX_ROWS, rng)
    estimator = _pipeline(data).set_params(**penalty).fit(x, y[owner], **dict.fromkeys(WEIGHTS, row_weights))
    return TargetModel(
        data.name, data.classes, _frequencies(data), cohort.names, tuple(data.covariates), estimator, augmentation,
        cohort.source, cohort.unit, {"n_participants": len(np.unique(cohort.groups)), "seed": seed, **penalty},
    )  # fmt: skip


def _pipeline(data: TargetData, **model: float) -> Pipeline:
    regressor = LogisticRegression(max_iter=2000, **model) if data.classes else Ridge(**model)
    return Pipeline([("scale", StandardScaler()), ("model", regressor)])


def _log_loss_of(data: TargetData) -> Callable[..., float]:
    labels = list(range(len(data.classes)))  # a small fold may lack one
    return make_scorer(log_loss, greater_is_better=False, response_method="predict_proba", labels=labels)


def _frequencies(data: TargetData) -> tuple[float, ...]:
    shares = [np.average(data.y == k, weights=data.cohort.weights) for k in range(len(data.classes))]
    return tuple(map(float, shares))


def _decide(
    table: pd.DataFrame, shares: np.ndarray, classes: Sequence[str], frequencies: Sequence[float]
) -> pd.DataFrame:
    """Append the probabilities of the classes, (R, K), what they were if all were as frequent, and the decision."""
    balanced = shares / np.maximum(frequencies, 1e-9)
    balanced /= balanced.sum(axis=1, keepdims=True)
    columns = {f"p_{name}": shares[:, k] for k, name in enumerate(classes)}
    columns |= {f"b_{name}": balanced[:, k] for k, name in enumerate(classes)}
    return table.assign(**columns, predicted=np.array(classes, dtype=object)[balanced.argmax(axis=1)])


def evaluate_target(
    data: TargetData, *, augmentations: Sequence[str] | None = None, cv_folds: int = 5, seed: int = 0,
    gain_repeats: int = 3, n_bootstrap: int = N_BOOTSTRAP, n_permutations: int = N_PERMUTATIONS,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> TargetEvaluation:  # fmt: skip
    """Score every augmentation on the same held-out participants, and on held-out sites where there are three.

    Folds have the categories in equal shares. ``analytic``, which is ``members`` for linear models, is not fitted.
    """
    cohort = data.cohort
    augmentations = [name for name in tried_augmentations(cohort, augmentations) if name != "analytic"]
    strata = data.y if data.classes else None
    compared = len(augmentations) > 1 or len(data.covariates.columns) > 0 or len(cohort.controls) > 0
    repeats = gain_repeats if compared else 1
    splits = make_splits(cohort, cv_folds, seed, gain_repeats=repeats, leave_site_out=True, strata=strata)
    # A category that one site alone has cannot be learnt without it.
    splits = [split for split in splits if len(np.unique(data.y[split.train])) > 1]
    done, tables = count(1), []
    for split in splits:
        train, test = data.take(split.train), data.take(split.test)
        predicted = {}
        penalties = {name: choose_penalty(train, name, split.seed) for name in augmentations[:2]}
        for augmentation in augmentations:  # all but ``none`` have the centre of ``mean``
            penalty = penalties.get(augmentation, penalties.get("mean"))
            predicted[augmentation] = fit_target(train, augmentation, split.seed, penalty).predict(test)
            progress(next(done), len(splits) * len(augmentations))
        for name, table in (predicted | _control_predictions(train, test)).items():
            labels = {"augmentation": name, "observed": test.y, "n_train": len(np.unique(train.cohort.groups))}
            tables.append(split.label(table.assign(loss=_losses(table, test), **labels)))
    table = pd.concat(tables, ignore_index=True)
    over = {("none", name): part for name, part in {"covariates": "features", **CONTROLS}.items()}
    gains = compare_losses(table[table["kind"] != "site"], contrasts={**over, **CONTRASTS})
    table = table[table["kind"] != "repeats"]
    rng, parts = np.random.default_rng([seed, 1]), table.groupby(["kind", "augmentation"], sort=False)
    scores = [_scores(part, data.classes, n_bootstrap, rng).assign(held_out=kind, augmentation=name)
              for (kind, name), part in parts]  # fmt: skip
    folds = table[table["kind"] == "folds"]
    return TargetEvaluation(
        folds.drop(columns=["kind", "of", "fold", "n_train"]),
        pd.concat(scores, ignore_index=True).replace({"held_out": {"folds": "participants", "site": "sites"}}),
        gains, _permutation_p(data, cv_folds, seed, n_permutations),
        best_of(gains, folds.groupby("augmentation")["loss"].mean()),
        settings={
            "target": data.name, "classes": list(data.classes), "covariates": list(data.covariates), "seed": seed,
            "augmentations": augmentations, "n_permutations": n_permutations, "controls": list(cohort.controls),
            **sizes_of(cohort, splits),
        },
    )  # fmt: skip


def _control_predictions(train: TargetData, test: TargetData) -> dict[str, pd.DataFrame]:
    """Predictions from the covariates alone, from the site alone, from nothing, and from `Cohort.controls`."""
    predicted, penalty = {}, {"model__C" if train.classes else "model__alpha": 1.0}  # of few features: nearly none
    if len(train.covariates.columns):
        model = fit_target(train.only(train.covariates), "none", 0, penalty)
        predicted["covariates"] = model.predict(test.only(test.covariates))
    if train.cohort.sites is not None:
        sites = pd.get_dummies(train.cohort.people["site"], dtype=np.float64)
        there = pd.get_dummies(test.cohort.people["site"], dtype=np.float64)
        there = there.reindex(columns=sites.columns, fill_value=0.0)
        predicted["site_predictor"] = fit_target(train.only(sites), "none", 0, penalty).predict(test.only(there))
    for name in train.cohort.controls:
        model = fit_target(replace(train, cohort=train.cohort.control(name)), "none", 0)
        predicted[name] = model.predict(replace(test, cohort=test.cohort.control(name)))
    ids, frequencies = test.cohort.people[IDS], _frequencies(train)
    mean = ids.assign(predicted=np.average(train.y, weights=train.cohort.weights))
    if train.classes:
        mean = _decide(ids, np.tile(frequencies, (len(ids), 1)), train.classes, frequencies)
    return predicted | {"mean_predictor": mean}


def _losses(table: pd.DataFrame, data: TargetData) -> np.ndarray:
    if not data.classes:
        return np.abs(table["predicted"].to_numpy() - data.y)
    shares = table[[f"p_{name}" for name in data.classes]].to_numpy()
    return -np.log(np.clip(shares[np.arange(len(shares)), data.y.astype(int)], 1e-6, 1))


def target_measures(people: pd.DataFrame, classes: Sequence[str]) -> dict[str, float]:
    """Measures of predictions of participants: `observed`, and `predicted` or p_CLASS and b_CLASS.

    auc is that of one class against the others, the mean over classes; recall is the share of a class that is decided
    to be of it, balanced_accuracy the mean recall; brier the mean square of all probabilities' errors;
    calibration_error the mean difference of probability and frequency in fifths of the people.
    """
    observed = people["observed"].to_numpy()
    if not classes:
        predicted = people["predicted"].to_numpy(np.float64)
        r = np.corrcoef(observed, predicted)[0, 1] if np.ptp(predicted) > 1e-9 * np.ptp(observed) else np.nan
        return {"mae": mean_absolute_error(observed, predicted), "r2": r2_score(observed, predicted), "r": r}
    truth = np.eye(len(classes))[observed.astype(int)]
    shares, balanced = (people[[f"{letter}_{name}" for name in classes]].to_numpy() for letter in "pb")
    recalls = (truth * (balanced.argmax(axis=1)[:, None] == np.arange(len(classes)))).sum(axis=0) / truth.sum(axis=0)
    curves = [calibration_curve(t, p, n_bins=5, strategy="quantile") for t, p in zip(truth.T, shares.T, strict=True)]
    return {
        "auc": float(np.mean([roc_auc_score(t, p) for t, p in zip(truth.T, shares.T, strict=True)])),
        "balanced_accuracy": float(recalls.mean()),
        "brier": float(((shares - truth) ** 2).sum(axis=1).mean()),
        "calibration_error": float(np.mean([np.abs(true - said).mean() for true, said in curves])),
        **{f"recall {name}": float(recalls[k]) for k, name in enumerate(classes)},
    }


def _scores(table: pd.DataFrame, classes: Sequence[str], n_bootstrap: int, rng: np.random.Generator) -> pd.DataFrame:
    """Each measure with its interval (95 %, bootstrap over participants within classes)."""
    people = table.groupby("participant_id").mean(numeric_only=True)
    groups = people.groupby("observed" if classes else np.zeros(len(people))).indices.values()
    draws = [np.concatenate([rng.choice(rows, len(rows)) for rows in groups]) for _ in range(n_bootstrap)]
    drawn = pd.DataFrame([target_measures(people.iloc[rows], classes) for rows in draws])
    low, high = drawn.quantile((1 - CONFIDENCE) / 2), drawn.quantile((1 + CONFIDENCE) / 2)
    found = pd.DataFrame({"value": target_measures(people, classes), "low": low, "high": high, "n": len(people)})
    return found.rename_axis("measure").reset_index()


def target_table(predictions: pd.DataFrame, classes: Sequence[str]) -> pd.DataFrame:
    """Prediction of every participant: participant_id, predicted, of categories p_CLASS, observed where it is known.

    Several images of a participant are averaged.
    """
    people = predictions.groupby("participant_id")
    shown = [f"p_{name}" for name in classes] or ["predicted"]
    table = people[[*shown, *[column for column in ("observed",) if column in predictions]]].mean()
    if classes:
        names = np.array(classes, dtype=object)
        table.insert(0, "predicted", names[people[[f"b_{name}" for name in classes]].mean().to_numpy().argmax(axis=1)])
        if "observed" in table:
            table["observed"] = names[table["observed"].astype(int)]
    return table.reset_index()


def _permutation_p(data: TargetData, n_folds: int, seed: int, n_permutations: int) -> float:
    """P-value of the cross-validated loss where targets are dealt out among participants (of a site).

    The penalty is fixed beforehand, at one per feature: every fit is then the same procedure.
    """
    groups, sites = data.cohort.groups, data.cohort.sites
    first = np.unique(groups, return_index=True)[1]
    x, y = pd.DataFrame(data.cohort.baseline).groupby(groups).mean().to_numpy(), data.y[first]
    folds = grouped_folds(np.arange(len(first)), n_folds, seed, y if data.classes else None)
    penalty = {"C": 1 / x.shape[1]} if data.classes else {"alpha": float(x.shape[1])}
    return float(
        permutation_test_score(
            _pipeline(data, **penalty), x, y, groups=None if sites is None else sites[first],
            cv=list(PredefinedSplit(folds).split()),
            scoring=_log_loss_of(data) if data.classes else "neg_mean_absolute_error", n_permutations=n_permutations,
            random_state=seed,
        )[2]
    )  # fmt: skip
