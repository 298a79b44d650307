"""What numerical noise does to the statistics of a study, after Chatelain et al. (2026).

NPVR is the numerical-to-population variability ratio: standard deviation of a measure over runs / between people. Noise
is independent between people; n people are in two groups of n / 2, or in one correlation.
doi:10.1038/s41598-026-64679-2
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.stats import norm, t

ALPHA = 0.05
MAX_FLIPS = 0.05
"""Share of reruns on the other side of `ALPHA` up to which a p-value counts as safe."""
REPORTED_P = (0.04, 0.01)
EFFECT_SIZE = 0.1  # Cohen's d; half of what Cohen calls a small effect
CONFIDENCE = 0.95
MIN_PEOPLE = 4
MAX_PEOPLE = 10**9


def _share_of_noise(npvr: ArrayLike) -> np.ndarray:
    """Standard deviation of the noise over that of people as they are measured, noise included."""
    npvr = np.asarray(npvr, np.float64)
    return npvr / np.sqrt(1 + npvr**2)


def noise_of_statistics(npvr: float, n: int, p: float) -> pd.DataFrame:
    """Two-sided p as Cohen's d, t, F (of one degree of freedom) and r, and what numerical noise adds to each.

    ``sd(d) = 2 s / sqrt(n)``, for small d; ``sd(t) = s``; ``sd(F) = s sqrt(4 F + 2 s^2)``;
    ``sd(r) = s sqrt((1 - r^2) / (n - 1))``, partial r too. As people differ by the noise too,
    ``s = npvr / sqrt(1 + npvr^2)``; the paper has s = npvr, and no s^2 in F, for small ratios. ValueError unless
    npvr >= 0, 2 < n <= 1e9 and 0 < p <= 1.

    Examples
    --------
    >>> noise_of_statistics(0.2, 100, 0.03).round(3).loc["d"].tolist()
    [0.44, 0.039]
    """
    if not 0 <= npvr < np.inf:
        raise ValueError(f"npvr {npvr}: must be 0 or more")
    if not 2 < n <= MAX_PEOPLE:
        raise ValueError(f"n {n}: must be more than 2, and at most {MAX_PEOPLE:,}")
    if not 0 < p <= 1:
        raise ValueError(f"p {p}: must be above 0, and at most 1")
    value = float(t.isf(p / 2, n - 2))
    r, share = value / np.sqrt(value**2 + n - 2), _share_of_noise(npvr)
    rows = {
        "d": (2 * value / np.sqrt(n), 2 * share / np.sqrt(n)),
        "t": (value, share),
        "F": (value**2, share * np.sqrt(4 * value**2 + 2 * share**2)),
        "r": (r, share * np.sqrt((1 - r**2) / (n - 1))),
    }
    return pd.DataFrame.from_dict(rows, orient="index", columns=["value", "sd"])


def flip_probability(npvr: ArrayLike, n: int, p: float, *, rerun: bool = True) -> np.ndarray:
    """Probability that a p-value published for one run lies on the other side of `ALPHA`.

    Either in one more run of the same images (``t + sqrt(2) s z``, s as in `noise_of_statistics`: both runs are noisy),
    or, with ``rerun=False``, without any numerical noise (``t sqrt(1 + npvr^2) + npvr z``). Shape of `npvr`; NaN where
    that is NaN.

    Examples
    --------
    >>> flip_probability([0.05, 0.5], 100, 0.03).round(2).tolist()
    [0.0, 0.37]
    """
    value, critical = t.isf([p / 2, ALPHA / 2], n - 2)
    npvr = np.maximum(np.asarray(npvr, np.float64), 1e-12)
    if rerun:
        sd = np.sqrt(2) * _share_of_noise(npvr)
    else:
        value, sd = value * np.sqrt(1 + npvr**2), npvr
    above = norm.sf((critical - value) / sd) + norm.cdf((-critical - value) / sd)
    return 1 - above if p < ALPHA else above


def power_table(names: ArrayLike, npvr: ArrayLike, n: int) -> pd.DataFrame:
    """Row per structure: name, npv, sd_d and sd_r (of a small effect), flips_P of `REPORTED_P`, p_safe.

    p_safe is the largest p of which at most `MAX_FLIPS` of reruns lie above `ALPHA`.
    """
    share = _share_of_noise(npvr)
    safe = t.isf(ALPHA / 2, n - 2) + norm.isf(MAX_FLIPS) * np.sqrt(2) * share
    flips = {f"flips_{p}": flip_probability(npvr, n, p) for p in REPORTED_P}
    noise = {"sd_d": 2 * share / np.sqrt(n), "sd_r": share / np.sqrt(n - 1)}
    return pd.DataFrame({"name": names, "npv": npvr, **noise, **flips, "p_safe": 2 * t.sf(safe, n - 2)})


def participants_needed(
    ratio: np.ndarray | float, effect_size: float = EFFECT_SIZE, *, confidence: float = CONFIDENCE
) -> np.ndarray:
    """Participants that keep the numerical error of a group difference below an effect size.

    Two groups of n/2 are compared by Cohen's d, their mean difference over the pooled standard deviation of single
    runs. Numerical noise, independent between people, moves a small d; by the delta method, as Chatelain et al. (2026)
    derive it, with r = sd_num / sd_anat, by ``sd(d)^2 = 4 r^2 / ((1 + r^2) n)``. n is the smallest even number for
    which ``z sd(d) <= effect_size``, z the two-sided normal quantile of `confidence`. Error that all participants share
    (a bias of the pipeline) is not in it.

    `ratio`, of any shape, is sd_num / sd_anat of one member, infinity allowed. Returns float64 of its shape, at least
    4, NaN where the ratio is NaN.

    Examples
    --------
    >>> participants_needed([0.1, 0.5]).tolist()
    [16.0, 308.0]
    """
    if not effect_size > 0 or not 0 < confidence < 1:
        raise ValueError(f"effect size {effect_size} or confidence {confidence} is out of range")
    with np.errstate(divide="ignore"):
        share = 1 / (1 + 1 / np.square(np.asarray(ratio, np.float64)))  # 1 of infinity: all of the spread is numerical
    n = 4 * np.square(norm.ppf((1 + confidence) / 2) / effect_size) * share
    return np.maximum(2 * np.ceil(n / 2 - 1e-9), 4.0)
