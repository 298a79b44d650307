"""How well a cohort's ages are predicted out of sample, and whether augmentation helps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import f as f_distribution
from sklearn.linear_model import RidgeCV
from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from bids_varaug.brainage.augment import AUGMENTATIONS, CONTROLS
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

BASELINES = ("mean_predictor", "ridge")
LINEAR_REFERENCE = "none, linear model"
ALPHA = 0.05  # of tests, as that of the 95 % intervals
CURVE_SIZES = (50, 100, 200, 500, 1000, 2000, 5000)
N_BOOTSTRAP = 2000
N_PERMUTATIONS = 5000
IDS = ["participant_id", "session_id", "observation", "age"]
SCORE_COLUMNS = (
    "augmentation", "n", "mae", "mae_low", "mae_high", "rmse", "r2", "r", "bias_slope", "mae_corrected",
    "bias_slope_corrected", "coverage", "interval_width",
)  # fmt: skip
RELIABILITY_COLUMNS = ("kind", "name", "icc", "low", "high", "n_participants", "n_observations")

Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """How well age is predicted out of sample, and what each augmentation changed.

    Ages and everything derived from them in years. A score is a mean over participants, each with the same weight
    however many observations it has; of several repeats, predictions are averaged for the table, errors for the scores.

    Attributes
    ----------
    predictions : one row per observation with age and augmentation
        augmentation, and the columns of `BrainAgeModel.predict`
    scores : one row per augmentation, and the rows ``mean_predictor`` and ``ridge`` (ridge on age, not augmented)
        augmentation, n (participants), mae, mae_low, mae_high (95 %, bootstrap over participants), rmse, r2, r,
        bias_slope (of predicted - age on age; 0 without bias), mae_corrected, bias_slope_corrected, coverage (share of
        ages in the interval), interval_width (mean)
    gains : one row per augmentation but ``none``, against it
        augmentation, gain (MAE of none - MAE; positive is better), low, high (95 %, bootstrap over participants),
        p_value (two-sided sign-flip permutation over participants), against (``none``, or ``none, linear model`` for
        ``analytic`` where the model asked for is not linear: the change of model is no effect of augmentation),
        p_corrected and effect (of `judge_gains`)
    learning_curve : one row per number of training participants and augmentation
        n_participants, augmentation, mae, low, high; empty if not asked for
    sites : leave-one-site-out, one row per site
        site, n (participants), mae_AUGMENTATION per augmentation, mae_mean_predictor; empty without sites
    reliability : ICC(3,1) where participants have several observations, otherwise empty
        kind ("prediction" or "feature"), name (augmentation or feature), and the fields of `intraclass_correlation`
    chosen : augmentation -> model, log_age, hyperparameters of the fit on all participants
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
    """Decide of each augmentation whether it helps; files and reports only repeat it.

    It helps where the interval of its gain lies above 0 and a test that allows for the number of augmentations tried
    agrees: in a few dozen people the bootstrap interval alone is too narrow, and the best of several is chosen. It
    harms where the same holds below 0.

    Parameters
    ----------
    gains : table with columns augmentation, low, high (95 % interval), p_value

    Returns
    -------
    DataFrame
        The same with the columns p_corrected (Bonferroni; `CONTROLS` do not count as tried) and effect ("helps",
        "harms" or "unclear")
    """
    tried = (~gains["augmentation"].isin(CONTROLS)).sum()
    p_corrected = (gains["p_value"].astype(float) * max(tried, 1)).clip(upper=1.0)
    sure = p_corrected < ALPHA
    effect = np.select([sure & (gains["low"] > 0), sure & (gains["high"] < 0)], ["helps", "harms"], "unclear")
    return gains.assign(p_corrected=p_corrected, effect=effect)


def best_augmentation(evaluation: Evaluation) -> str:
    """Augmentation whose predictions stand for the cohort.

    ``none``, unless another one helps (`judge_gains`); then that of the largest gain. Controls are no candidates.
    Without ``none``, the first one evaluated.
    """
    evaluated = [a for a in AUGMENTATIONS if (evaluation.predictions["augmentation"] == a).any()]
    gains = evaluation.gains
    helpful = gains[(gains["effect"] == "helps") & ~gains["augmentation"].isin(CONTROLS)]
    if helpful.empty or "none" not in evaluated:
        return evaluated[0]
    return str(helpful.loc[helpful["gain"].idxmax(), "augmentation"])


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
    leave_site_out: bool = True,
    n_bootstrap: int = N_BOOTSTRAP,
    n_permutations: int = N_PERMUTATIONS,
    progress: Progress | None = None,
) -> Evaluation:
    """Score a model with every augmentation on the same held-out participants.

    Repeated K-fold cross-validation, folds grouped by participant. Everything that is fitted (scaling, hyperparameters,
    correction of age bias, prediction intervals) is fitted within the training folds.

    Parameters
    ----------
    cohort : observations without age are left out
    model : one of `models.MODELS`
    augmentations : of `augment.AUGMENTATIONS`; ``none`` is always among them. All if not given and the cohort has
        members, otherwise ``none`` alone
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
    ValueError
        If `cv_folds` is below 2 or `repeats` below 1.
    """
    if cv_folds < 2 or repeats < 1:
        raise ValueError(f"{cv_folds} folds, {repeats} repeats: at least 2 and 1 are needed")
    if augmentations is None:
        augmentations = AUGMENTATIONS if cohort.members is not None else ()
    augmentations = tuple(dict.fromkeys(["none", *augmentations]))
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
    tick = _Ticker(n_fits, progress)
    fit = partial(_fit_and_predict, model=model, augmentations=augmentations, log_volumes=log_volumes, tick=tick)
    rng = np.random.default_rng([seed, 1])

    held_out = []
    for repeat, test in splits:
        train, rest = cohort.take(~test), cohort.take(test)
        tables = []
        for augmentation in augmentations:
            fitted = fit_brain_age(
                train, model, augmentation, seed + repeat, log_volumes=log_volumes, min_participants=2
            )
            tables.append(fitted.predict(rest, coverage).assign(augmentation=augmentation))
            tick()
        simple = {"mean_predictor": _mean_age(train), "ridge": _plain_ridge(train, rest, log_volumes)}
        if linear != model:
            estimator, _ = fit_estimator(train, linear, "none", seed + repeat, log_volumes=log_volumes)
            simple[LINEAR_REFERENCE] = predict_ages(estimator, rest, "none")
        tables += [rest.people[IDS].assign(predicted=p, augmentation=name) for name, p in simple.items()]
        held_out += [table.assign(repeat=repeat) for table in tables]
    table = pd.concat(held_out, ignore_index=True)
    # Withheld in one fold, from all: the gaps of some people alone would mislead.
    withheld = table["corrected"].isna().groupby(table["augmentation"]).transform("any")
    table.loc[withheld, "corrected"] = np.nan
    predictions = _mean_predictions(table, cohort, augmentations)
    scores, gains = _score(table, augmentations, linear != model, rng, n_bootstrap, n_permutations)

    curve = []
    for size in sizes:
        parts = []
        for k, test in enumerate(first):
            people = np.random.default_rng([seed, k]).permutation(np.unique(groups[~test]))[:size]
            parts.append(fit(cohort.take(np.isin(groups, people)), cohort.take(test), seed=seed))
        curve += _curve_rows(size, pd.concat(parts), rng)
    if sizes:
        curve += _curve_rows(round(np.mean(training_sizes)), table[table["augmentation"].isin(augmentations)], rng)
    site_rows = [
        _site_row(site, cohort.take(sites != site), cohort.take(sites == site), partial(fit, seed=seed))
        for site in (np.unique(sites) if sites is not None else ())
    ]
    chosen = {}
    for augmentation in augmentations:
        choice = fit_estimator(cohort, model, augmentation, seed, log_volumes=log_volumes)[1]
        chosen[augmentation] = asdict(choice)
        tick()
    return Evaluation(
        predictions=predictions,
        scores=scores,
        gains=gains,
        learning_curve=pd.DataFrame(curve, columns=["n_participants", "augmentation", "mae", "low", "high"]),
        sites=pd.DataFrame(site_rows) if site_rows else pd.DataFrame(columns=["site", "n"]),
        reliability=_reliability(predictions, cohort),
        chosen=chosen,
        settings={
            "model": model,
            "augmentations": list(augmentations),
            "cv_folds": cv_folds,
            "repeats": repeats,
            "seed": seed,
            "log_volumes": log_volumes,
            "coverage": coverage,
            "n_participants": len(np.unique(groups)),
            "n_observations": len(cohort),
            "n_features": len(cohort.names),
            "n_members": 0 if cohort.members is None else cohort.members.shape[1],
            "n_sites": n_sites,
            "n_bootstrap": n_bootstrap,
            "n_permutations": n_permutations,
        },
    )


class _Ticker:
    """Counts fits."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._done, self._total, self._progress = 0, total, progress

    def __call__(self) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total)


def _fit_and_predict(
    train: Cohort, test: Cohort, model: str, augmentations: Iterable[str], log_volumes: bool, tick: _Ticker, seed: int
) -> pd.DataFrame:
    """Held-out predictions of each augmentation, without intervals."""
    tables = []
    for augmentation in augmentations:
        estimator, _ = fit_estimator(train, model, augmentation, seed, log_volumes=log_volumes)
        predicted = predict_ages(estimator, test, augmentation)
        tables.append(test.people[IDS].assign(predicted=predicted, augmentation=augmentation))
        tick()
    return pd.concat(tables, ignore_index=True)


def _mean_age(train: Cohort) -> float:
    return float(np.average(train.age, weights=train.weights))


def _plain_ridge(train: Cohort, test: Cohort, log_volumes: bool) -> np.ndarray:
    logs = [LogVolumes(train.names)] if log_volumes else []
    plain = make_pipeline(*logs, StandardScaler(), RidgeCV(ALPHAS))
    return plain.fit(train.baseline, train.age, ridgecv__sample_weight=train.weights).predict(test.baseline)


def _errors(table: pd.DataFrame) -> pd.DataFrame:
    """Absolute error of each participant (rows) by each augmentation, mean over observations and repeats."""
    table = table.assign(error=(table["predicted"] - table["age"]).abs())
    errors = table.pivot_table(index="participant_id", columns="augmentation", values="error")
    return errors[table["augmentation"].unique()]


def _mean_predictions(table: pd.DataFrame, cohort: Cohort, augmentations: Iterable[str]) -> pd.DataFrame:
    means = table.groupby(["augmentation", "observation"])[list(VALUES)].mean()
    people = cohort.people[IDS]
    tables = [people.join(means.loc[name], on="observation").assign(augmentation=name) for name in augmentations]
    return pd.concat(tables, ignore_index=True)[[*IDS, "augmentation", *VALUES]]


def _score(
    table: pd.DataFrame,
    augmentations: Sequence[str],
    has_reference: bool,
    rng: np.random.Generator,
    n_bootstrap: int,
    n_permutations: int,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    errors = _errors(table)
    others = [name for name in augmentations if name != "none"]
    against = [LINEAR_REFERENCE if name == "analytic" and has_reference else "none" for name in others]
    gains = errors[against].to_numpy() - errors[others].to_numpy()
    low, high = bootstrap_interval(np.concatenate([errors, gains], axis=1), rng, n_bootstrap)
    by_repeat = [
        {"augmentation": name} | agreement_scores(part)
        for (name, _), part in table.groupby(["augmentation", "repeat"], sort=False)
    ]
    scores = pd.DataFrame(by_repeat).groupby("augmentation", sort=False).mean()
    n = errors.shape[1]
    bounds = {"n": len(errors), "mae_low": low[:n], "mae_high": high[:n]}
    scores = scores.assign(**bounds).drop(index=LINEAR_REFERENCE, errors="ignore").reset_index()
    rows = {
        "augmentation": others,
        "gain": gains.mean(axis=0),
        "low": low[n:],
        "high": high[n:],
        "p_value": sign_flip_p_values(gains, rng, n_permutations),
        "against": against,
    }
    return scores[list(SCORE_COLUMNS)], judge_gains(pd.DataFrame(rows))


def _curve_rows(size: int, table: pd.DataFrame, rng: np.random.Generator) -> list[tuple]:
    errors = _errors(table)
    low, high = bootstrap_interval(errors.to_numpy(), rng, 500)
    return [(size, name, errors[name].mean(), low[i], high[i]) for i, name in enumerate(errors)]


def _site_row(site: str, train: Cohort, test: Cohort, fit: Callable[[Cohort, Cohort], pd.DataFrame]) -> dict[str, Any]:
    mean = test.people[IDS].assign(predicted=_mean_age(train), augmentation="mean_predictor")
    errors = _errors(pd.concat([fit(train, test), mean]))
    return {"site": site, "n": len(errors)} | errors.mean().add_prefix("mae_").to_dict()


def _reliability(predictions: pd.DataFrame, cohort: Cohort) -> pd.DataFrame:
    rows = []
    if (np.bincount(cohort.groups) > 1).sum() > 1:
        by_name = [("prediction", name, part["predicted"]) for name, part in predictions.groupby("augmentation", sort=False)]
        by_name += [("feature", name, x) for name, x in zip(cohort.names, cohort.baseline.T, strict=True)]
        rows = [
            {"kind": kind, "name": name} | intraclass_correlation(np.asarray(values), cohort.groups)
            for kind, name, values in by_name
        ]
    return pd.DataFrame(rows, columns=list(RELIABILITY_COLUMNS))


def agreement_scores(table: pd.DataFrame) -> dict[str, float]:
    """Scores of one set of held-out predictions, each participant counting once.

    Parameters
    ----------
    table : columns participant_id, age, predicted, corrected, lower, upper [year]; the last three NaN where unknown

    Returns
    -------
    dict
        mae, rmse [year]; r2 (0 for the mean of these very ages, negative if worse); r (Pearson; NaN for a constant
        prediction); bias_slope (of predicted - age on age); mae_corrected, bias_slope_corrected; coverage,
        interval_width [year]
    """
    age, predicted, corrected, lower, upper = table[["age", "predicted", "corrected", "lower", "upper"]].to_numpy(float).T
    weights = participant_weights(table["participant_id"])
    spread = np.cov(predicted, age, aweights=weights)
    varies = np.ptp(predicted) > 1e-9 and np.ptp(age) > 0
    is_corrected = np.isfinite(corrected).all()
    return {
        "mae": mean_absolute_error(age, predicted, sample_weight=weights),
        "rmse": root_mean_squared_error(age, predicted, sample_weight=weights),
        "r2": r2_score(age, predicted, sample_weight=weights),
        "r": spread[0, 1] / np.sqrt(spread[0, 0] * spread[1, 1]) if varies else np.nan,
        "bias_slope": weighted_line(age, predicted - age, weights)[0],
        "mae_corrected": mean_absolute_error(age, corrected, sample_weight=weights) if is_corrected else np.nan,
        "bias_slope_corrected": weighted_line(age, corrected - age, weights)[0] if is_corrected else np.nan,
        "coverage": np.average((lower <= age) & (age <= upper), weights=weights) if np.isfinite(lower).all() else np.nan,
        "interval_width": np.average(upper - lower, weights=weights),
    }


def bootstrap_interval(values: np.ndarray, rng: np.random.Generator, n_draws: int) -> tuple[np.ndarray, np.ndarray]:
    """Confidence interval (95 %, percentile bootstrap) of means over participants.

    Models are not fitted again: the interval is about which people were looked at, not about which people the models
    were trained on.

    Parameters
    ----------
    values : (P, A) float64, one column per quantity; the same people are drawn for all
    n_draws : number of samples

    Returns
    -------
    low, high : (A,) float64
    """
    n = len(values)
    means = np.stack([np.bincount(rng.integers(0, n, n), minlength=n) @ values / n for _ in range(n_draws)])
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    return low, high


def sign_flip_p_values(differences: np.ndarray, rng: np.random.Generator, n_permutations: int) -> np.ndarray:
    """Two-sided p-values that paired differences are symmetric about zero.

    The sign of each participant's difference is flipped at random; the p-value is the share of flipped means at least
    as far from zero, the observed one counted in [1]_.

    Parameters
    ----------
    differences : (P, A) float64

    Returns
    -------
    (A,) float64
        1 where all differences are zero.

    References
    ----------
    .. [1] Phipson & Smyth (2010), Permutation p-values should never be zero, Statistical Applications in Genetics and
       Molecular Biology 9(1), 39.
    """
    observed = np.abs(differences.sum(axis=0)) - 1e-9 * np.abs(differences).sum(axis=0)
    reached = np.ones(differences.shape[1])
    for _ in range(n_permutations):
        reached += np.abs((rng.integers(0, 2, len(differences)) * 2.0 - 1.0) @ differences) >= observed
    return reached / (n_permutations + 1)


def intraclass_correlation(values: np.ndarray, groups: np.ndarray, confidence: float = CONFIDENCE) -> dict[str, float]:
    """Consistency of single measurements of the same people, ICC(3,1).

    ``(BMS - EMS) / (BMS + (k - 1) EMS)``, with the mean squares between participants and of the residual of a two-way
    model, and the interval from the F distribution [1]_.

    Parameters
    ----------
    values : (R,) float64
    groups : (R,) participant of each value; of participants with several, the first k in order are used, where k is the
        least number that any of them has; others are left out

    Returns
    -------
    dict
        icc, low, high (of the confidence interval), n_participants, n_observations (k); NaN with fewer than two
        participants with several values, or without any variance.

    References
    ----------
    .. [1] Shrout & Fleiss (1979), Intraclass correlations: uses in assessing rater reliability, Psychological Bulletin
       86(2), 420-428.

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
