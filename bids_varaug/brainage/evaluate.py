"""How well a cohort's ages are predicted out of sample, and whether augmentation helps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import t as t_distribution
from sklearn.linear_model import RidgeCV
from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from bids_varaug.brainage.augment import AUGMENTATIONS, USES_MEMBERS
from bids_varaug.brainage.calibration import CONFIDENCE, weighted_line
from bids_varaug.brainage.cohort import Cohort, grouped_folds, participant_weights
from bids_varaug.brainage.features import LogVolumes
from bids_varaug.brainage.models import (
    ALPHAS,
    LINEAR_MODELS,
    MIN_PARTICIPANTS,
    VALUES,
    check_trainable,
    fit_brain_age,
    fit_estimator,
    predict_ages,
    resolve_model,
)
from bids_varaug.variability.longitudinal import intraclass_correlation

CONTROLS = {"volumes": "images", "untrained": "pre-training"}
"""Other features than those of an encoder, and what a gain over them shows."""
BASELINES = ("mean_predictor", "site_predictor", "ridge", *CONTROLS)
LINEAR_MEAN = "mean, linear model"
Contrast = tuple[str, str]
CONTRASTS: dict[Contrast, str] = {
    ("mean", "none"): "averaging",
    ("members", "mean"): "augmentation",
    ("analytic", "mean"): "augmentation",
    ("members", "jitter"): "structure",
    ("members", "shuffled"): "structure",
    **{("ridge", name): part for name, part in CONTROLS.items()},
}
"""What each gain shows. All but ``none`` are centred on the members' mean: averaging is in the first gain alone."""
LIKE_MEMBERS = ("analytic", "shuffled")  # of linear models, by construction: fitted once
TRIED = ("averaging", "augmentation")  # parts that are tried for what is best; others are controls
ALPHA = 0.05  # of tests, as that of the 95 % intervals
GAIN_REPEATS = 3  # of the folds, for gains: the interval of a single one is a fifth wider
CURVE_SIZES = (50, 100, 200, 500, 1000, 2000, 5000)
N_BOOTSTRAP = 2000
IDS = ["participant_id", "session_id", "observation", "age"]
SCORE_COLUMNS = (
    "augmentation", "n", "mae", "mae_low", "mae_high", "rmse", "r2", "r", "bias_slope", "mae_corrected",
    "bias_slope_corrected", "coverage", "interval_width",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Evaluation:
    """How well age is predicted out of sample, and what each augmentation changed.

    Ages and everything derived from them in years. A score is a mean over participants, each with the same weight
    however many observations it has.

    Columns are described in ``data/templates/columns.tsv``. A table that does not apply is empty.
    """

    predictions: pd.DataFrame  # per observation and augmentation, see `BrainAgeModel.predict`
    # Per augmentation, and of ``mean_predictor`` (the mean age), ``site_predictor`` (the mean age of the site; where
    # there are 3 or more), ``ridge`` (on age, not augmented) and ridge on `Cohort.controls`: `agreement_scores`, and a
    # bootstrap over participants.
    scores: pd.DataFrame
    # Of `compare_losses`; ``analytic`` is compared with the linear ``mean`` where the model asked for is not linear.
    gains: pd.DataFrame
    learning_curve: pd.DataFrame  # per number of training participants and augmentation
    # Leave-one-site-out, per site: mae_AUGMENTATION, mae_mean_predictor, with controls of all baselines.
    sites: pd.DataFrame
    reliability: pd.DataFrame  # `intraclass_correlation` of predictions and features
    chosen: dict[str, dict[str, Any]] = field(default_factory=dict)  # `Choice` of the fit to all, by augmentation
    settings: dict[str, Any] = field(default_factory=dict)  # model, cv_folds, seed, n_participants, ...


@dataclass(frozen=True, eq=False)
class Split:
    """Observations to train on and to test, as masks."""

    kind: str  # "folds", "repeats", "curve" or "site"
    of: Any  # the draw of the folds, the number of training participants, or the site that is held out
    fold: int
    train: np.ndarray
    test: np.ndarray
    seed: int

    def label(self, table: pd.DataFrame) -> pd.DataFrame:
        """The table of its predictions with the columns kind, of, fold."""
        return table.assign(kind=self.kind, of=self.of, fold=self.fold)


def make_splits(
    cohort: Cohort, cv_folds: int, seed: int, *, gain_repeats: int = 1, curve_sizes: Iterable[int] = (),
    leave_site_out: bool = False, strata: np.ndarray | None = None,
) -> list[Split]:  # fmt: skip
    """Splits of participants: folds (the seed of each draw is ``seed + draw``), learning curve, held-out sites.

    Draws after the first, of the kind "repeats", are for gains alone. Of the learning curve, smaller training samples
    are part of larger ones, within the folds of the first draw; sizes that these do not have are left out.
    """
    splits = []
    for repeat in range(gain_repeats):
        kind = "repeats" if repeat else "folds"
        folds = grouped_folds(cohort.groups, cv_folds, seed + repeat, strata)
        splits += [Split(kind, repeat, k, folds != k, folds == k, seed + repeat) for k in range(folds.max() + 1)]
    first = [split for split in splits if split.of == 0]
    trained = [np.unique(cohort.groups[split.train]) for split in first]
    smallest = min(map(len, trained))
    for size in sorted({int(n) for n in curve_sizes if MIN_PARTICIPANTS <= n < smallest}):
        for k, (split, people) in enumerate(zip(first, trained, strict=True)):
            drawn = np.random.default_rng([seed, k]).permutation(people)[:size]
            splits.append(Split("curve", size, k, np.isin(cohort.groups, drawn), split.test, seed))
    sites = cohort.sites if leave_site_out else None
    if sites is not None:
        splits += [Split("site", site, 0, sites != site, sites == site, seed) for site in np.unique(sites)]
    return splits


def sizes_of(cohort: Cohort, splits: Sequence[Split]) -> dict[str, int]:
    """Numbers of people, images, features, sites and folds, for the settings of an evaluation."""
    kinds = [split.kind for split in splits]
    return {
        "n_participants": len(np.unique(cohort.groups)), "n_observations": len(cohort),
        "n_features": len(cohort.names), "n_sites": cohort.people["site"].nunique(), "cv_folds": kinds.count("folds"),
        "n_sites_left_out": kinds.count("site"),
    }  # fmt: skip


def judge_gains(gains: pd.DataFrame) -> pd.DataFrame:
    """Decide of each gain whether it helps; files and reports only repeat it.

    It helps where its interval (low, high) lies above 0 and its p-value, corrected for the number of augmentations
    tried (Bonferroni, without controls), is below 0.05; it harms where the same holds below 0. Adds the columns
    p_corrected and effect ("helps", "harms" or "unclear").
    """
    tried = gains["part"].isin(TRIED).sum()
    p_corrected = (gains["p_value"].astype(float) * max(tried, 1)).clip(upper=1.0)
    sure = p_corrected < ALPHA
    effect = np.select([sure & (gains["low"] > 0), sure & (gains["high"] < 0)], ["helps", "harms"], "unclear")
    return gains.assign(p_corrected=p_corrected, effect=effect)


def best_augmentation(evaluation: Evaluation) -> str:
    """Augmentation whose predictions stand for the cohort, see `best_of`."""
    return best_of(evaluation.gains, evaluation.scores.set_index("augmentation")["mae"])


def best_of(gains: pd.DataFrame, losses: pd.Series) -> str:
    """Of ``none`` and the augmentations that help, that of the least loss."""
    helpful = gains[(gains["effect"] == "helps") & gains["part"].isin(TRIED)]["augmentation"]
    return str(losses[["none", *helpful]].idxmin())


def evaluate_brain_age(
    cohort: Cohort, *, model: str = "auto", augmentations: Sequence[str] | None = None, cv_folds: int = 5,
    seed: int = 0, log_volumes: bool = False, coverage: float = 0.9, gain_repeats: int = GAIN_REPEATS,
    curve_sizes: Sequence[int] = CURVE_SIZES, leave_site_out: bool = True, n_bootstrap: int = N_BOOTSTRAP,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:  # fmt: skip
    """Score a model with every augmentation on the same held-out participants.

    K-fold cross-validation, folds grouped by participant, drawn `gain_repeats` times for gains. Everything that is
    fitted (scaling, hyperparameters, correction of age bias, prediction intervals of this `coverage`) is fitted within
    the training folds.

    Observations without age are left out; a UserError says that fewer than 10 participants have one. See also
    `tried_augmentations`, `make_splits` and `fit_brain_age`. `progress` gets the number of splits done and of all.
    """
    augmentations = tried_augmentations(cohort, augmentations)
    cohort = check_trainable(cohort, MIN_PARTICIPANTS)
    gain_repeats = gain_repeats if len(augmentations) > 1 or cohort.controls else 1
    splits = make_splits(
        cohort, cv_folds, seed, gain_repeats=gain_repeats, curve_sizes=curve_sizes, leave_site_out=leave_site_out,
    )  # fmt: skip
    asked, model = model, resolve_model(model, "none", len(cohort))  # the same for all sizes of the learning curve
    linear = resolve_model(model, "analytic") if "analytic" in augmentations else model
    tables = []
    for done, split in enumerate(splits, 1):
        tables.append(_held_out(cohort, split, augmentations, model, linear, log_volumes, coverage))
        progress(done, len(splits))
    table = pd.concat(tables, ignore_index=True)
    table["participant_id"] = table["participant_id"].astype("category")  # faster to group by, where there are many
    fits = {name: fit_estimator(cohort, model, name, seed, log_volumes=log_volumes) for name in augmentations}
    chosen = {name: asdict(choice) for name, (_, choice) in fits.items()}
    rng = np.random.default_rng([seed, 1])
    folds = table[table["kind"] == "folds"]
    # Withheld in one fold, from all: the gaps of some people alone would mislead.
    withheld = folds["corrected"].isna().groupby(folds["augmentation"]).transform("any")
    folds = folds.assign(corrected=folds["corrected"].mask(withheld))
    people = pd.concat([cohort.people[IDS].assign(augmentation=name) for name in augmentations], ignore_index=True)
    key = ["augmentation", "observation"]
    predictions = people.join(folds.set_index(key)[list(VALUES)], on=key)
    against = {("analytic", "mean"): LINEAR_MEAN} if linear != model else {}
    gains = compare_losses(table[table["kind"].isin(["folds", "repeats"])], against)
    return Evaluation(
        predictions, _score(folds, [*augmentations, *BASELINES], rng, n_bootstrap), gains,
        _learning_curve(table, augmentations, rng), _site_errors(table, augmentations),
        _reliability(predictions, cohort), chosen,
        settings={
            "model": asked, "augmentations": augmentations, "seed": seed, "log_volumes": log_volumes,
            "coverage": coverage, "n_members": 0 if cohort.members is None else cohort.members.shape[1],
            "n_bootstrap": n_bootstrap, "gain_repeats": gain_repeats, "controls": list(cohort.controls),
            **sizes_of(cohort, splits),
        },
    )  # fmt: skip


def tried_augmentations(cohort: Cohort, asked: Sequence[str] | None) -> list[str]:
    """Those asked for (None: all that the cohort allows) and what they are compared with, in the usual order."""
    if asked is None:
        asked = AUGMENTATIONS if cohort.members is not None else ()
    wanted = {"none", *(["mean"] if set(asked) & set(USES_MEMBERS) else []), *asked}
    return sorted(wanted, key=[*AUGMENTATIONS, *asked].index)


def _held_out(
    cohort: Cohort, split: Split, augmentations: Sequence[str], model: str, linear: str, log_volumes: bool,
    coverage: float,
) -> pd.DataFrame:  # fmt: skip
    """Predictions of one split by each augmentation and by what they are compared with; intervals of folds only."""
    train, test = cohort.take(split.train), cohort.take(split.test)
    predictions = _simple_predictions(train, test, cohort.sites is not None, log_volumes)
    if linear != model and split.kind in ("folds", "repeats"):
        estimator, _ = fit_estimator(train, linear, "mean", split.seed, log_volumes=log_volumes)
        predictions[LINEAR_MEAN] = predict_ages(estimator, test, "mean")
    ids = test.people[IDS]
    tables = [ids.assign(predicted=predicted, augmentation=name) for name, predicted in predictions.items()]
    found: dict[str, pd.DataFrame] = {}
    for name in augmentations:
        if model in LINEAR_MODELS and name in LIKE_MEMBERS and "members" in found:
            found[name] = found["members"]
        elif split.kind == "folds":
            fitted = fit_brain_age(train, model, name, split.seed, log_volumes=log_volumes, min_participants=2)
            found[name] = fitted.predict(test, coverage)
        else:
            estimator, _ = fit_estimator(train, model, name, split.seed, log_volumes=log_volumes)
            found[name] = ids.assign(predicted=predict_ages(estimator, test, name))
    tables += [table.assign(augmentation=name) for name, table in found.items()]
    table = pd.concat(tables, ignore_index=True)
    losses = (table["predicted"] - table["age"]).abs()
    return split.label(table).assign(loss=losses, n_train=len(np.unique(train.groups)))


def _simple_predictions(train: Cohort, test: Cohort, by_site: bool, log_volumes: bool) -> dict[str, Any]:
    """Held-out predictions of `BASELINES`, which are not augmented."""
    logs, linear = [LogVolumes(train.names)] if log_volumes else [], {}
    for name in ("ridge", *train.controls):
        x, x_test = (cohort.baseline if name == "ridge" else cohort.controls[name] for cohort in (train, test))
        ridge = make_pipeline(*(logs if name == "ridge" else ()), StandardScaler(), RidgeCV(ALPHAS))
        linear[name] = ridge.fit(x, train.age, ridgecv__sample_weight=train.weights).predict(x_test)
    mean = float(np.average(train.age, weights=train.weights))
    at_site = {}
    if by_site:
        participants = train.people.groupby(["site", "participant_id"])["age"].mean()
        at_site["site_predictor"] = test.people["site"].map(participants.groupby("site").mean()).fillna(mean)
    return {"mean_predictor": mean, **at_site, **linear}


def participant_losses(table: pd.DataFrame, *by: str) -> pd.DataFrame:
    """Mean loss of each participant (and of each value of the columns `by`), a column per augmentation."""
    return table.pivot_table(index=[*by, "participant_id"], columns="augmentation", values="loss", observed=True)


def _score(folds: pd.DataFrame, names: Sequence[str], rng: np.random.Generator, n_bootstrap: int) -> pd.DataFrame:
    errors = participant_losses(folds)
    errors = errors[[name for name in names if name in errors]]
    low, high = bootstrap_interval(errors.to_numpy(), rng, n_bootstrap)
    parts = dict(iter(folds.groupby("augmentation")))
    scores = pd.DataFrame([{"augmentation": name} | agreement_scores(parts[name]) for name in errors])
    return scores.assign(n=len(errors), mae_low=low, mae_high=high)[list(SCORE_COLUMNS)]


def compare_losses(
    folds: pd.DataFrame, against: Mapping[Contrast, str] | None = None, contrasts: Mapping[Contrast, str] = CONTRASTS
) -> pd.DataFrame:
    """Paired gains, with intervals that allow for the variation of the training set.

    The variance of the mean gain is ``(1 / J + n_test / n_train) s^2`` for J folds (of all repeats): Nadeau & Bengio
    (2003, Machine Learning 52, 239-281) so correct for folds that train on the same people. Here s^2, the variance of
    the mean over the n_test participants of a fold, is that of the participants' differences over n_test. Interval
    and p-value are those of t with P - 1 degrees of freedom for P participants.

    `folds` has participant_id, augmentation, of (repeat), fold, n_train (participants), loss; `against` says what a
    contrast is compared with in place of its second part. Returns part, augmentation, against, gain (loss of
    against - loss; positive is better), low, high (95 %), p_value, and what `judge_gains` adds.
    """
    losses = participant_losses(folds, "of")
    runs = folds.drop_duplicates(["of", "fold"])
    rows = []
    for (name, other), part in contrasts.items():
        base = (against or {}).get((name, other), other)
        if not {name, base} <= set(losses):
            continue
        # Models that are equal by construction differ by rounding, which a test would find.
        difference = (losses[base] - losses[name]).round(6)
        gain, n = difference.mean(), difference.groupby("participant_id", observed=True).ngroups
        variance = difference.groupby("of").var(ddof=1).mean() / n  # of the mean, were the models given
        n_test = n * folds["of"].nunique() / len(runs)
        error = np.sqrt(variance * n / n_test * (1 / len(runs) + n_test / runs["n_train"].mean()))
        reach = error * t_distribution.ppf((1 + CONFIDENCE) / 2, n - 1)
        p_value = 2 * t_distribution.sf(abs(gain) / error, n - 1) if error > 0 else 1.0
        rows.append((part, name, base, gain, gain - reach, gain + reach, p_value))
    columns = ["part", "augmentation", "against", "gain", "low", "high", "p_value"]
    return judge_gains(pd.DataFrame(rows, columns=columns))


def _learning_curve(table: pd.DataFrame, augmentations: Sequence[str], rng: np.random.Generator) -> pd.DataFrame:
    """Error against the number of training participants, always on all held-out people."""
    table = table[table["augmentation"].isin(augmentations)]
    parts = list(table[table["kind"] == "curve"].groupby("of"))
    folds = table[table["kind"] == "folds"]
    parts += [(round(folds.drop_duplicates(["of", "fold"])["n_train"].mean()), folds)] if parts else []
    rows = []
    for size, part in parts:
        errors = participant_losses(part)[list(augmentations)]
        low, high = bootstrap_interval(errors.to_numpy(), rng, 500)
        rows += [(size, name, errors[name].mean(), low[i], high[i]) for i, name in enumerate(errors)]
    return pd.DataFrame(rows, columns=["n_participants", "augmentation", "mae", "low", "high"])


def _site_errors(table: pd.DataFrame, augmentations: Sequence[str]) -> pd.DataFrame:
    rows = []
    for site, part in table[table["kind"] == "site"].groupby("of"):
        errors = participant_losses(part)
        beside = BASELINES if set(CONTROLS) & set(errors) else ["mean_predictor"]
        means = errors[sorted({*augmentations, *beside} & set(errors))].mean()
        rows.append({"site": site, "n": len(errors)} | means.add_prefix("mae_").to_dict())
    return pd.DataFrame(rows, columns=None if rows else ["site", "n"])


def _reliability(predictions: pd.DataFrame, cohort: Cohort) -> pd.DataFrame:
    several = (np.bincount(cohort.groups) > 1).sum() > 1
    parts = predictions.groupby("augmentation", sort=False)
    # Models that know no more than the mean age predict that of the fold, the same for all images of a person.
    told = {name: 1 if r2_score(part["age"], part["predicted"]) > 0 else np.nan for name, part in parts}
    values = [("prediction", name, part["predicted"].to_numpy() * told[name]) for name, part in parts]
    values += [("feature", name, x) for name, x in zip(cohort.names, cohort.baseline.T, strict=True)]
    rows = [
        {"kind": kind, "name": name} | intraclass_correlation(x, cohort.groups) for kind, name, x in values if several
    ]
    columns = ["kind", "name", "icc", "low", "high", "n_participants", "n_observations"]
    return pd.DataFrame(rows, columns=columns)


def agreement_scores(table: pd.DataFrame) -> dict[str, float]:
    """Scores of one set of held-out predictions, each participant counting once.

    `table` has participant_id, age, predicted, corrected, lower, upper [year]; the last three NaN where unknown. r2 is
    0 for the mean of these very ages, negative if worse; r is NaN for a constant prediction; bias_slope is that of
    predicted - age on age; coverage the share of ages in the prediction interval.
    """
    age, predicted, corrected, lower, upper = table[["age", *VALUES[:4]]].to_numpy(float).T
    weights = participant_weights(table["participant_id"])
    covariance = np.cov(predicted, age, aweights=weights)
    varies = np.ptp(predicted) > 1e-9 and np.ptp(age) > 0
    known = np.isfinite(corrected).all()
    inside = np.average((lower <= age) & (age <= upper), weights=weights)
    return {
        "mae": mean_absolute_error(age, predicted, sample_weight=weights),
        "rmse": root_mean_squared_error(age, predicted, sample_weight=weights),
        "r2": r2_score(age, predicted, sample_weight=weights),
        "r": covariance[0, 1] / np.sqrt(covariance[0, 0] * covariance[1, 1]) if varies else np.nan,
        "bias_slope": weighted_line(age, predicted - age, weights)[0],
        "mae_corrected": mean_absolute_error(age, corrected, sample_weight=weights) if known else np.nan,
        "bias_slope_corrected": weighted_line(age, corrected - age, weights)[0] if known else np.nan,
        "coverage": inside if np.isfinite(lower).all() else np.nan,
        "interval_width": np.average(upper - lower, weights=weights),
    }


def bootstrap_interval(values: np.ndarray, rng: np.random.Generator, n_draws: int) -> tuple[np.ndarray, np.ndarray]:
    """Confidence interval (95 %, percentile bootstrap) of means over P participants; (P, A) to (A,), (A,).

    Models are not fitted again: the interval takes them as given. The same people are drawn for all A quantities.
    """
    n = len(values)
    means = np.stack([np.bincount(rng.integers(0, n, n), minlength=n) @ values / n for _ in range(n_draws)])
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    return low, high
