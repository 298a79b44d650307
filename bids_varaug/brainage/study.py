"""What an evaluation of brain age found: the tables that reports, files and benchmarks read."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pandas as pd

AUGMENTATIONS = ("none", "mean", "members", "analytic", "jitter", "shuffled")
CONTROLS = ("jitter", "shuffled")
"""Augmentations by noise of another origin: what others are compared with, never chosen."""
BASELINES = ("mean_predictor", "ridge")
ALPHA = 0.05  # of tests, as that of the 95 % intervals

PREDICTION_COLUMNS = (
    "participant_id", "session_id", "observation", "age", "augmentation", "predicted",
    "corrected", "lower", "upper", "sd_num",
)  # fmt: skip
SCORE_COLUMNS = (
    "augmentation", "n", "mae", "mae_low", "mae_high", "rmse", "r2", "r", "bias_slope",
    "mae_corrected", "bias_slope_corrected", "coverage", "interval_width",
)  # fmt: skip
GAIN_COLUMNS = (
    "augmentation", "gain", "low", "high", "p_value", "against", "p_corrected", "effect",
)  # fmt: skip
CURVE_COLUMNS = ("n_participants", "augmentation", "mae", "low", "high")
SITE_COLUMNS = ("site", "n")
RELIABILITY_COLUMNS = ("kind", "name", "icc", "low", "high", "n_participants", "n_observations")


@dataclass(frozen=True, eq=False)
class Study:
    """How well age is predicted out of sample, and what each augmentation changed.

    Ages and everything derived from them in years. A score is a mean over participants, each
    with the same weight however many observations it has; of several repeats, predictions are
    averaged for the table, errors are averaged for the scores.

    Attributes
    ----------
    predictions : one row per observation and augmentation
        participant_id, session_id, observation, age, augmentation, predicted, corrected (for
        age bias, fitted in the training folds), lower, upper (limits of the prediction interval
        around `predicted`), sd_num (standard deviation over the members' versions of the
        observation, NaN without members). Observations without age are not in it
    scores : one row per augmentation, and the rows ``mean_predictor`` and ``ridge``
        augmentation, n (participants), mae, mae_low, mae_high (95 %, bootstrap over
        participants), rmse, r2, r, bias_slope (of predicted - age on age; 0 without bias),
        mae_corrected, bias_slope_corrected, coverage (share of ages in the interval),
        interval_width (mean). The ridge row is ridge on age without augmentation
    gains : one row per augmentation but ``none``, against it
        augmentation, gain (MAE of none - MAE; positive is better), low, high (95 %, bootstrap
        over participants), p_value (two-sided sign-flip permutation over participants), against
        (``none``, or ``none, linear model`` for ``analytic`` where the model asked for is not
        linear: then the gain is against that linear model without augmentation, as anything else
        would mistake the change of model for an effect of augmentation), p_corrected and effect
        (of `judge_gains`)
    learning_curve : one row per number of training participants and augmentation
        n_participants, augmentation, mae, low, high; empty if not asked for
    sites : leave-one-site-out, one row per site
        site, n (participants), mae_AUGMENTATION per augmentation, mae_mean_predictor; empty
        without sites
    reliability : ICC(3,1) where participants have several observations, otherwise empty
        kind ("prediction" or "feature"), name (augmentation or feature), icc, low, high (95 %),
        n_participants, n_observations (per participant)
    chosen : augmentation -> model, log_age, hyperparameters of the fit on all participants
    settings : how it was done: model, cv_folds, repeats, seed, coverage, n_participants, ...
    """

    predictions: pd.DataFrame
    scores: pd.DataFrame
    gains: pd.DataFrame
    learning_curve: pd.DataFrame
    sites: pd.DataFrame
    reliability: pd.DataFrame
    chosen: dict[str, dict[str, object]] = field(default_factory=dict)
    settings: dict[str, object] = field(default_factory=dict)


def judge_gains(gains: pd.DataFrame) -> pd.DataFrame:
    """Decide of each augmentation whether it helps; files and reports only repeat it.

    It helps where the interval of its gain lies above 0 and a test that allows for the number of
    augmentations tried agrees: in a few dozen people the bootstrap interval alone is too narrow,
    and the best of several is chosen. It harms where the same holds below 0.

    Parameters
    ----------
    gains : table with columns augmentation, low, high (95 % interval), p_value

    Returns
    -------
    DataFrame
        The same with the columns p_corrected (Bonferroni; `CONTROLS` do not count as tried) and
        effect ("helps", "harms" or "unclear")
    """
    tried = (~gains["augmentation"].isin(CONTROLS)).sum()
    p_corrected = (gains["p_value"].astype(float) * max(tried, 1)).clip(upper=1.0)
    sure = p_corrected < ALPHA
    effect = np.select([sure & (gains["low"] > 0), sure & (gains["high"] < 0)], ["helps", "harms"], "unclear")
    return gains.assign(p_corrected=p_corrected, effect=effect)
