"""The answer of the group level in words, made from its tables."""

from __future__ import annotations

import numpy as np
import pandas as pd

from bids_varaug.brainage.outputs import CONTROLS, best_augmentation
from bids_varaug.brainage.study import BASELINES, Study
from bids_varaug.reports.group_figures import p_text, signed
from bids_varaug.reports.volume_plot import short_name

ALPHA = 0.05  # of tests, as that of the 95 % intervals


def headline(study: Study, numerics: pd.DataFrame | None = None) -> list[str]:
    """How well age is predicted, whether the ensemble helps, by how much, how sure.

    Parameters
    ----------
    study : Study
    numerics : table of `population.numerical_variability`, where there are members

    Returns
    -------
    sentences, the most important ones first
    """
    words = [_accuracy(study), _gain(study), _certainty(study)]
    if not study.sites.empty:
        words.append(_sites(study))
    if numerics is not None and numerics["ratio"].notna().any():
        words.append(_numerics(numerics))
    return [text for text in words if text]


def percent(share: float) -> str:
    """Share as a whole percentage.

    Examples
    --------
    >>> percent(0.9)
    '90 %'
    """
    return f"{100 * share:.0f} %"


def verdict(study: Study) -> str:
    """Three or four words on what augmentation did: helps, harms, no difference, not tried."""
    candidates = _candidates(study)
    if candidates.empty:
        return "Augmentation was not tried"
    best = _best(candidates)
    if _helps(best, len(candidates)):
        regularised = "jitter" in _as_good_controls(study, best)
        return "Augmentation helps, but so does jitter" if regularised else "The ensemble helps"
    if _harm(candidates):
        return "The ensemble harms"
    return "No gain from the ensemble can be shown"


def _accuracy(study: Study) -> str:
    scores = study.scores.set_index("augmentation")
    name = best_augmentation(study)
    row = scores.loc[name]
    what = "the unperturbed baseline" if name == "none" else f"augmentation '{name}'"
    text = (
        f"Age is predicted with a mean absolute error of {row['mae']:.2f} years (95 % "
        f"{row['mae_low']:.2f} to {row['mae_high']:.2f}) in {int(row['n']):,} participants "
        f"whom the model had not seen, with {what}; R² is {row['r2']:.2f}, r {row['r']:.2f}."
    )
    others = []
    if "mean_predictor" in scores.index:
        mean = scores["mae"]["mean_predictor"]
        others.append(f"giving everybody the mean age misses by {mean:.2f}")
    if "ridge" in scores.index:
        others.append(f"plain ridge regression by {scores['mae']['ridge']:.2f}")
    if others:
        listed = " and ".join(others)
        text += f" For comparison, {listed} years."
        if "mean_predictor" in scores.index and row["mae_high"] >= scores["mae"]["mean_predictor"]:
            text += " So these features hardly predict age in this sample."
    return text


def _gain(study: Study) -> str:
    candidates = _candidates(study)
    if candidates.empty:
        return "Augmentation was not tried, so nothing can be said on whether an ensemble helps."
    best = _best(candidates)
    name, tried = best["augmentation"], len(candidates)
    limits = f"95 % {signed(best['low'])} to {signed(best['high'])}, p {p_text(best['p_value'])}"
    many = (
        f" It is the best of {tried}; neither its limits nor p are corrected for this choice."
        if tried > 1
        else ""
    )
    if _helps(best, tried):
        controls = _as_good_controls(study, best)
        what = "Augmentation helps" if "jitter" in controls else "The ensemble helps"
        text = (
            f"{what}: with '{name}' the error is {abs(best['gain']):.2f} years smaller "
            f"than without ({limits}).{many}"
        )
        if "jitter" in controls:
            text += (
                " But independent noise of the same variance (jitter) gains about as much, so this "
                "may be mere regularisation and needs no ensemble."
            )
        elif "shuffled" in controls:
            text += (
                " The noise of other people (shuffled) gains about as much: what helps is the "
                "noise's common shape, not each person's own."
            )
        return text
    if _harm(candidates):
        return (
            f"The ensemble harms: even the least bad augmentation, '{name}', makes the error "
            f"{abs(best['gain']):.2f} years larger ({limits})."
        )
    largest = candidates["high"].max()
    caution = (
        " The interval alone would say that it helps; the permutation test"
        + (f", allowing for all {tried}," if tried > 1 else "")
        + " does not, and in small samples it is the one to trust."
        if best["low"] > 0
        else ""
    )
    return (
        f"No gain from the ensemble can be shown: the best augmentation, '{name}', changes the "
        f"error by {signed(best['gain'])} years ({limits}; positive is better).{caution}{many} "
        f"A gain of more than {largest:.2f} years is unlikely with these features and people."
    )


def _certainty(study: Study) -> str:
    name = best_augmentation(study)
    row = study.scores.set_index("augmentation").loc[name]
    if not np.isfinite(row["coverage"]):
        return "There were too few participants for prediction intervals."
    nominal = study.settings.get("coverage", 0.9)
    text = (
        f"For one person: the {percent(nominal)} prediction interval is "
        f"{row['interval_width']:.1f} years wide on average, and held "
        f"{percent(row['coverage'])} of the true ages."
    )
    spread = study.predictions.loc[study.predictions["augmentation"] == name, "sd_num"]
    if spread.notna().any():
        text += (
            f" The numerical part: the prediction's standard deviation over the members is "
            f"{spread.median():.2f} years in the median image, more than "
            f"{spread.quantile(0.95):.2f} in the worst 5 %."
        )
    return text


def _sites(study: Study) -> str:
    name = best_augmentation(study)
    column = f"mae_{name}"
    if column not in study.sites:
        return ""
    errors, n = study.sites[column].astype(float), study.sites["n"].astype(float)
    mean = float(np.average(errors, weights=n))
    inside = float(study.scores.set_index("augmentation").loc[name, "mae"])
    return (
        f"At a site left out of training the error is {mean:.2f} years on average over people "
        f"(from {errors.min():.2f} to {errors.max():.2f} over {len(errors)} sites), against "
        f"{inside:.2f} where training saw all sites."
    )


def _numerics(numerics: pd.DataFrame) -> str:
    known = numerics[numerics["ratio"].notna()]
    worst = known.loc[known["ratio"].idxmax()]
    return (
        f"Over {len(known)} features the numerical standard deviation is "
        f"{known['ratio'].median():.3g} of the anatomical one (median); the worst is "
        f"{short_name(str(worst['name']))} with "
        f"{worst['ratio']:.3g}. For numerical error to move Cohen's d of a group "
        f"difference by less than 0.1 (95 %), a study needs {known['n_needed'].median():,.0f} "
        f"participants for the median feature, {known['n_needed'].max():,.0f} for the worst."
    )


def _candidates(study: Study) -> pd.DataFrame:
    names = study.gains["augmentation"]
    return study.gains[~names.isin([*CONTROLS, *BASELINES, "none"])]


def _best(candidates: pd.DataFrame) -> pd.Series:
    return candidates.loc[candidates["gain"].astype(float).idxmax()]


def _helps(best: pd.Series, tried: int) -> bool:
    """Whether interval and test agree on a gain; the test allows for `tried` (Bonferroni).

    In a few dozen people the bootstrap interval is too narrow, and the best of several is chosen.
    """
    return bool(best["low"] > 0 and best["p_value"] * tried < ALPHA)


def _harm(candidates: pd.DataFrame) -> bool:
    """Whether interval and test agree that every augmentation makes the error larger."""
    return bool(((candidates["high"] < 0) & (candidates["p_value"] < ALPHA)).all())


def _as_good_controls(study: Study, best: pd.Series) -> list[str]:
    """Controls that gain at least as much as the lower limit of the best augmentation's gain.

    Of the augmentations by noise only; ``mean`` takes noise away, which they do not control for.
    """
    if best["augmentation"] == "mean":
        return []
    controls = study.gains[study.gains["augmentation"].isin(CONTROLS)]
    return controls.loc[controls["gain"] >= best["low"], "augmentation"].tolist()
