"""How well a cohort's ages are predicted out of sample, and whether augmentation helps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import count
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import f as f_distribution
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
    MIN_PARTICIPANTS,
    VALUES,
    check_trainable,
    closed_form_model,
    fit_brain_age,
    fit_estimator,
    predict_ages,
)

BASELINES = ("mean_predictor", "site_predictor", "ridge")
LINEAR_MEAN = "mean, linear model"
CONTRASTS = {
    ("mean", "none"): "averaging",
    ("members", "mean"): "augmentation",
    ("analytic", "mean"): "augmentation",
    ("members", "jitter"): "structure",
    ("members", "shuffled"): "structure",
}
"""What each gain shows, by augmentation and what it is compared with. ``mean``, ``members`` and the controls all are
centred on the mean of the members, so that averaging is in none of the later gains."""
ALPHA = 0.05  # of tests, as that of the 95 % intervals
CURVE_SIZES = (50, 100, 200, 500, 1000, 2000, 5000)
N_BOOTSTRAP = 2000
N_PERMUTATIONS = 5000
IDS = ["participant_id", "session_id", "observation", "age"]
Predict = Callable[[Cohort, Cohort], pd.DataFrame]
SCORE_COLUMNS = (
    "augmentation", "n", "mae", "mae_low", "mae_high", "rmse", "r2", "r", "bias_slope", "mae_corrected",
    "bias_slope_corrected", "coverage", "interval_width",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Evaluation:
    """How well age is predicted out of sample, and what each augmentation changed.

    Ages and everything derived from them in years. A score is a mean over participants, each with the same weight
    however many observations it has; of several repeats, predictions are averaged for the table, errors for the scores.

    Attributes
    ----------
    predictions : one row per observation with age and augmentation
        augmentation, and the columns of `BrainAgeModel.predict`
    scores : one row per augmentation, and of ``mean_predictor`` (the mean age), ``site_predictor`` (the mean age of the
        site; where there are 3 or more) and ``ridge`` (ridge on age, not augmented)
        augmentation, n (participants), mae, mae_low, mae_high (95 %, bootstrap over participants), and
        `agreement_scores`
    gains : one row per contrast of `CONTRASTS`
        part ("averaging", "augmentation" or "structure"), augmentation, against (``mean, linear model`` for
        ``analytic`` where the model asked for is not linear: the change of model is no effect of augmentation), gain
        (MAE of against - MAE; positive is better), low, high (95 %, bootstrap over participants), p_value (two-sided
        sign-flip permutation over participants), p_corrected and effect (of `judge_gains`)
    learning_curve : one row per number of training participants and augmentation
        n_participants, augmentation, mae, low, high; empty if not asked for
    sites : leave-one-site-out, one row per site
        site, n (participants), mae_AUGMENTATION per augmentation, mae_mean_predictor; empty without sites
    reliability : ICC(3,1) where participants have several observations, otherwise empty
        kind ("prediction" or "feature"), name (augmentation or feature), and the fields of `intraclass_correlation`
    chosen : augmentation -> `Choice` of the fit on all participants
    settings : how it was done: model, cv_folds, repeats, seed, coverage, n_participants, ...
    """

    predictions: pd.DataFrame
    scores: pd.DataFrame
    gains: pd.DataFrame
    learning_curve: pd.DataFrame
    sites: pd.DataFrame
    reliability: pd.DataFrame
    chosen: dict[str, dict[str, Any]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


def judge_gains(gains: pd.DataFrame) -> pd.DataFrame:
    """Decide of each gain whether it helps; files and reports only repeat it.

    It helps where its interval lies above 0 and a test that allows for the number of augmentations tried agrees: in a
    few dozen people the bootstrap interval alone is too narrow, and the best of several is chosen. It harms where the
    same holds below 0.

    Parameters
    ----------
    gains : table with columns part, low, high (95 % interval), p_value

    Returns
    -------
    DataFrame
        The same with the columns p_corrected (Bonferroni; comparisons with controls do not count as tried) and effect
        ("helps", "harms" or "unclear")
    """
    tried = (gains["part"] != "structure").sum()
    p_corrected = (gains["p_value"].astype(float) * max(tried, 1)).clip(upper=1.0)
    sure = p_corrected < ALPHA
    effect = np.select([sure & (gains["low"] > 0), sure & (gains["high"] < 0)], ["helps", "harms"], "unclear")
    return gains.assign(p_corrected=p_corrected, effect=effect)


def best_augmentation(evaluation: Evaluation) -> str:
    """Augmentation whose predictions stand for the cohort: of ``none`` and those that help, that of the least error."""
    gains, scores = evaluation.gains, evaluation.scores
    helpful = gains[(gains["effect"] == "helps") & (gains["part"] != "structure")]
    candidates = scores[scores["augmentation"].isin(["none", *helpful["augmentation"]])]
    return str(candidates.loc[candidates["mae"].idxmin(), "augmentation"])


def evaluate_brain_age(
    cohort: Cohort, *, model: str = "auto", augmentations: Sequence[str] | None = None, cv_folds: int = 5,
    repeats: int = 1, seed: int = 0, log_volumes: bool = False, coverage: float = 0.9,
    curve_sizes: Sequence[int] | None = CURVE_SIZES, leave_site_out: bool = True, n_bootstrap: int = N_BOOTSTRAP,
    n_permutations: int = N_PERMUTATIONS, progress: Callable[[int, int], None] | None = None,
) -> Evaluation:  # fmt: skip
    """Score a model with every augmentation on the same held-out participants.

    Repeated K-fold cross-validation, folds grouped by participant. Everything that is fitted (scaling, hyperparameters,
    correction of age bias, prediction intervals) is fitted within the training folds.

    Parameters
    ----------
    cohort : observations without age are left out
    model : one of `models.MODELS`
    augmentations : of `augment.AUGMENTATIONS`; ``none`` is always among them, and ``mean`` where members are used. All
        if not given and the cohort has members, otherwise ``none`` alone
    cv_folds, repeats : repeat r assigns participants to folds with ``seed + r``
    seed : of folds, drawn noise, bootstrap and permutations
    log_volumes : as `fit_brain_age`; of the row ``ridge`` too
    coverage : of the prediction intervals
    curve_sizes : numbers of training participants of the learning curve, of the first repeat; those that a training
        fold does not have are left out. None: no curve
    leave_site_out : whether to hold out site after site, where there are at least 3
    n_bootstrap, n_permutations : samples for intervals and p-values
    progress : called with the number of fits done and of all fits

    Raises
    ------
    UserError
        With fewer than 10 participants with age, or as in `fit_brain_age`.
    """
    if cv_folds < 2 or repeats < 1:
        raise ValueError(f"{cv_folds} folds, {repeats} repeats: at least 2 and 1 are needed")
    asked = (AUGMENTATIONS if cohort.members is not None else ()) if augmentations is None else augmentations
    wanted = ["none", *(["mean"] if set(asked) & set(USES_MEMBERS) else []), *asked]
    augmentations = sorted(set(wanted), key=[*AUGMENTATIONS, *asked].index)
    for augmentation in augmentations:
        known = check_trainable(cohort, augmentation, MIN_PARTICIPANTS)
    cohort, groups = known, known.groups
    linear = closed_form_model(model) if "analytic" in augmentations else model
    folds = [grouped_folds(groups, cv_folds, seed + repeat) for repeat in range(repeats)]
    splits = [(repeat, fold == k) for repeat, fold in enumerate(folds) for k in range(fold.max() + 1)]
    first = [test for repeat, test in splits if repeat == 0]
    training_sizes = [len(np.unique(groups[~test])) for test in first]
    sizes = sorted({int(n) for n in curve_sizes or () if MIN_PARTICIPANTS <= n < min(training_sizes)})
    sites = cohort.sites if leave_site_out else None
    n_sites = 0 if sites is None else len(np.unique(sites))
    n_fits = len(augmentations) * (len(splits) + len(sizes) * len(first) + n_sites + 1)
    done = count(1)

    def tick() -> None:
        if progress is not None:
            progress(next(done), n_fits)

    def predict_only(train: Cohort, test: Cohort) -> pd.DataFrame:
        """Held-out predictions of each augmentation, without intervals."""
        tables = []
        for augmentation in augmentations:
            estimator, _ = fit_estimator(train, model, augmentation, seed, log_volumes=log_volumes)
            tables.append(_labelled(test, augmentation, predict_ages(estimator, test, augmentation)))
            tick()
        return pd.concat(tables, ignore_index=True)

    def predict_all(train: Cohort, test: Cohort, repeat: int) -> pd.DataFrame:
        """Held-out predictions of each augmentation and of what they are compared with."""
        tables = _simple_predictions(train, test, cohort.sites is not None, log_volumes)
        if linear != model:
            estimator, _ = fit_estimator(train, linear, "mean", seed + repeat, log_volumes=log_volumes)
            tables.append(_labelled(test, LINEAR_MEAN, predict_ages(estimator, test, "mean")))
        for augmentation in augmentations:
            fitted = fit_brain_age(
                train, model, augmentation, seed + repeat, log_volumes=log_volumes, min_participants=2
            )
            tables.append(fitted.predict(test, coverage).assign(augmentation=augmentation))
            tick()
        return pd.concat(tables, ignore_index=True).assign(repeat=repeat)

    held_out = [predict_all(cohort.take(~test), cohort.take(test), repeat) for repeat, test in splits]
    table = pd.concat(held_out, ignore_index=True)
    # Withheld in one fold, from all: the gaps of some people alone would mislead.
    withheld = table["corrected"].isna().groupby(table["augmentation"]).transform("any")
    table.loc[withheld, "corrected"] = np.nan
    means = table.groupby(["augmentation", "observation"])[list(VALUES)].mean()
    people = [cohort.people[IDS].assign(augmentation=name) for name in augmentations]
    predictions = pd.concat(people, ignore_index=True).join(means, on=["augmentation", "observation"])
    rng = np.random.default_rng([seed, 1])
    scores, gains = _score(table, augmentations, linear != model, rng, n_bootstrap, n_permutations)
    curve = _learning_curve(cohort, first, sizes, seed, predict_only, rng)
    if sizes:
        curve += _curve_rows(round(np.mean(training_sizes)), table[table["augmentation"].isin(augmentations)], rng)
    site_rows = [] if sites is None else _leave_sites_out(cohort, sites, predict_only)
    chosen = {}
    for augmentation in augmentations:
        chosen[augmentation] = asdict(fit_estimator(cohort, model, augmentation, seed, log_volumes=log_volumes)[1])
        tick()
    return Evaluation(
        predictions, scores, gains,
        learning_curve=pd.DataFrame(curve, columns=["n_participants", "augmentation", "mae", "low", "high"]),
        sites=pd.DataFrame(site_rows) if site_rows else pd.DataFrame(columns=["site", "n"]),
        reliability=_reliability(predictions, cohort),
        chosen=chosen,
        settings={
            "model": model, "augmentations": augmentations, "cv_folds": cv_folds, "repeats": repeats, "seed": seed,
            "log_volumes": log_volumes, "coverage": coverage, "n_participants": len(np.unique(groups)),
            "n_observations": len(cohort), "n_features": len(cohort.names), "n_sites": n_sites,
            "n_members": 0 if cohort.members is None else cohort.members.shape[1],
            "n_bootstrap": n_bootstrap, "n_permutations": n_permutations,
        },
    )  # fmt: skip


def _labelled(test: Cohort, name: str, predicted: np.ndarray | float) -> pd.DataFrame:
    return test.people[IDS].assign(predicted=predicted, augmentation=name)


def _mean_age(train: Cohort) -> float:
    return float(np.average(train.age, weights=train.weights))


def _simple_predictions(train: Cohort, test: Cohort, by_site: bool, log_volumes: bool) -> list[pd.DataFrame]:
    """Held-out predictions of `BASELINES`, which are not augmented."""
    logs = [LogVolumes(train.names)] if log_volumes else []
    ridge = make_pipeline(*logs, StandardScaler(), RidgeCV(ALPHAS))
    ridge.fit(train.baseline, train.age, ridgecv__sample_weight=train.weights)
    tables = [_labelled(test, "mean_predictor", _mean_age(train))]
    if by_site:
        participants = train.people.groupby(["site", "participant_id"])["age"].mean()
        at_site = test.people["site"].map(participants.groupby("site").mean()).fillna(_mean_age(train))
        tables.append(_labelled(test, "site_predictor", at_site))
    return [*tables, _labelled(test, "ridge", ridge.predict(test.baseline))]


def _errors(table: pd.DataFrame) -> pd.DataFrame:
    """Absolute error of each participant (rows) by each augmentation, mean over observations and repeats."""
    table = table.assign(error=(table["predicted"] - table["age"]).abs())
    return table.pivot_table(index="participant_id", columns="augmentation", values="error")


def _score(
    table: pd.DataFrame, augmentations: Sequence[str], has_linear: bool, rng: np.random.Generator,
    n_bootstrap: int, n_permutations: int,
) -> tuple[pd.DataFrame, pd.DataFrame]:  # fmt: skip
    names = [name for name in (*augmentations, *BASELINES, LINEAR_MEAN) if (table["augmentation"] == name).any()]
    errors = _errors(table)[names]
    gains = pd.DataFrame(
        [
            (part, name, LINEAR_MEAN if name == "analytic" and has_linear else against)
            for (name, against), part in CONTRASTS.items()
            if {name, against} <= set(augmentations)
        ],
        columns=["part", "augmentation", "against"],
    )
    # Models that are equal by construction differ by rounding, which a sign test would find.
    differences = np.round(errors[gains["against"]].to_numpy() - errors[gains["augmentation"]].to_numpy(), 6)
    low, high = bootstrap_interval(np.concatenate([errors, differences], axis=1), rng, n_bootstrap)
    parts = table.groupby(["augmentation", "repeat"], sort=False)
    by_repeat = [{"augmentation": name} | agreement_scores(part) for (name, _), part in parts]
    scores = pd.DataFrame(by_repeat).groupby("augmentation").mean().loc[names]
    scores = scores.assign(n=len(errors), mae_low=low[: len(names)], mae_high=high[: len(names)])
    scores = scores.drop(index=LINEAR_MEAN, errors="ignore").reset_index()[list(SCORE_COLUMNS)]
    gains = gains.assign(
        gain=differences.mean(axis=0),
        low=low[len(names) :],
        high=high[len(names) :],
        p_value=sign_flip_p_values(differences, rng, n_permutations),
    )
    return scores, judge_gains(gains)


def _learning_curve(
    cohort: Cohort, tests: Sequence[np.ndarray], sizes: Sequence[int], seed: int, predict: Predict,
    rng: np.random.Generator,
) -> list[tuple]:  # fmt: skip
    """Error against the number of training participants, always on all held-out people."""
    rows = []
    for size in sizes:
        parts = []
        for k, test in enumerate(tests):  # of one draw, smaller sizes are part of larger
            drawn = np.random.default_rng([seed, k]).permutation(np.unique(cohort.groups[~test]))[:size]
            parts.append(predict(cohort.take(np.isin(cohort.groups, drawn)), cohort.take(test)))
        rows += _curve_rows(size, pd.concat(parts), rng)
    return rows


def _leave_sites_out(cohort: Cohort, sites: np.ndarray, predict: Predict) -> list[dict[str, Any]]:
    rows = []
    for site in np.unique(sites):
        train, test = cohort.take(sites != site), cohort.take(sites == site)
        errors = _errors(pd.concat([predict(train, test), _labelled(test, "mean_predictor", _mean_age(train))]))
        rows.append({"site": site, "n": len(errors)} | errors.mean().add_prefix("mae_").to_dict())
    return rows


def _curve_rows(size: int, table: pd.DataFrame, rng: np.random.Generator) -> list[tuple]:
    errors = _errors(table)[list(table["augmentation"].unique())]
    low, high = bootstrap_interval(errors.to_numpy(), rng, 500)
    return [(size, name, errors[name].mean(), low[i], high[i]) for i, name in enumerate(errors)]


def _reliability(predictions: pd.DataFrame, cohort: Cohort) -> pd.DataFrame:
    several = (np.bincount(cohort.groups) > 1).sum() > 1
    parts = predictions.groupby("augmentation", sort=False)["predicted"]
    values = [("prediction", name, part.to_numpy()) for name, part in parts]
    values += [("feature", name, x) for name, x in zip(cohort.names, cohort.baseline.T, strict=True)]
    rows = [
        {"kind": kind, "name": name} | intraclass_correlation(x, cohort.groups) for kind, name, x in values if several
    ]
    columns = ["kind", "name", "icc", "low", "high", "n_participants", "n_observations"]
    return pd.DataFrame(rows, columns=columns)


def agreement_scores(table: pd.DataFrame) -> dict[str, float]:
    """Scores of one set of held-out predictions, each participant counting once.

    Parameters
    ----------
    table : columns participant_id, age, predicted, corrected, lower, upper [year]; the last three NaN where unknown

    Returns
    -------
    dict
        mae, rmse [year]; r2 (0 for the mean of these very ages, negative if worse); r (Pearson; NaN for a constant
        prediction); bias_slope (of predicted - age on age; 0 without bias); both after correction; coverage (share of
        ages in the prediction interval), interval_width [year]
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

    Models are not fitted again: the interval is about which people were looked at, not about which people the models
    were trained on. The same people are drawn for all A quantities.
    """
    n = len(values)
    means = np.stack([np.bincount(rng.integers(0, n, n), minlength=n) @ values / n for _ in range(n_draws)])
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    return low, high


def sign_flip_p_values(differences: np.ndarray, rng: np.random.Generator, n_permutations: int) -> np.ndarray:
    """Two-sided p-values, (A,), that paired differences, (P, A), are symmetric about zero; 1 where all are zero.

    The sign of each participant's difference is flipped at random; the p-value is the share of flipped means at least
    as far from zero, the observed one counted in (Phipson & Smyth 2010, Statistical Applications in Genetics and
    Molecular Biology 9(1), 39).
    """
    observed = np.abs(differences.sum(axis=0)) - 1e-9 * np.abs(differences).sum(axis=0)
    reached = np.ones(differences.shape[1])
    for _ in range(n_permutations):
        reached += np.abs((rng.integers(0, 2, len(differences)) * 2.0 - 1.0) @ differences) >= observed
    return reached / (n_permutations + 1)


def intraclass_correlation(values: np.ndarray, groups: np.ndarray, confidence: float = CONFIDENCE) -> dict[str, float]:
    """Consistency of single measurements of the same people, ICC(3,1).

    ``(BMS - EMS) / (BMS + (k - 1) EMS)``, with the mean squares between participants and of the residual of a two-way
    model, and the interval from the F distribution (Shrout & Fleiss 1979, Psychological Bulletin 86(2), 420-428).

    Of participants with several of the (R,) `values`, the first k in order are used, where k is the least number that
    any of them has; others are left out. Returns icc, low, high (of the confidence interval), n_participants,
    n_observations (k); NaN with fewer than two participants with several values, or without any variance.

    Examples
    --------
    >>> values, groups = np.array([1.0, 2.0, 5.0, 6.0, 9.0, 10.0]), np.array([0, 0, 1, 1, 2, 2])
    >>> intraclass_correlation(values, groups)["icc"]
    1.0
    """
    people, counts = np.unique(groups, return_counts=True)
    people = people[counts > 1]
    n, k = len(people), int(counts[counts > 1].min(initial=len(groups)))
    found = {"icc": np.nan, "low": np.nan, "high": np.nan, "n_participants": n, "n_observations": k}
    if n < 2:
        return found
    table = np.stack([values[groups == person][:k] for person in people])
    means = table.mean(axis=1, keepdims=True)
    between = k * means.var(ddof=1)
    error = np.square(table - means - table.mean(axis=0) + table.mean()).sum() / ((n - 1) * (k - 1))
    error = 0.0 if error < 1e-20 * np.square(table).mean() else error  # what rounding leaves of zero
    if not between + (k - 1) * error > 0:
        return found
    freedom, tail = (n - 1, (n - 1) * (k - 1)), (1 + confidence) / 2
    with np.errstate(divide="ignore"):
        ratio = np.divide(between, error)
    low, high = ratio / f_distribution.ppf(tail, *freedom), ratio * f_distribution.ppf(tail, *freedom[::-1])
    icc, low, high = (1 - k / (r + k - 1) for r in (ratio, low, high))  # (r - 1) / (r + k - 1), 1 for infinite r
    return found | {"icc": float(icc), "low": float(low), "high": float(high)}
