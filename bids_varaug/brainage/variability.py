"""Numerical against anatomical variability of a group, and other pipelines beside it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import pandas as pd
from scipy.stats import norm, t, wilcoxon

from bids_varaug.brainage.augment import summed_covariances
from bids_varaug.brainage.cohort import Cohort
from bids_varaug.brainage.features import find_pairs
from bids_varaug.errors import UserError
from bids_varaug.variability.power import participants_needed

COVARIANCE_TABLE = "models/brainage_covariance.tsv"
CONFIDENCE = 0.95
TINY = 1e-9  # a standard deviation below this share of the mean is rounding


def numerical_variability(
    cohort: Cohort,
    *,
    dice_min: Mapping[str, float] = MappingProxyType({}),
    unreliable: Mapping[str, float] = MappingProxyType({}),
) -> pd.DataFrame:
    """How much of each feature's spread over a group is numerical.

    With x the value of member m (of M) in observation i of participant p, who has o_p of them::

        sd_num  = sqrt(mean over observations of var_m(x_pim))               (M - 1)
        sd_anat = sqrt(var_p(mean_im x_pim) - mean_p(var_num,p / (M o_p)))   (P - 1)
        ratio   = sd_num / sd_anat
        npv     = sd_num / sqrt(mean_m var_p(mean_i x_pim))

    The part taken off in sd_anat is what numerical noise leaves in the mean of M members; without it the ratio could
    never exceed sqrt(M). `npv` is the numerical-to-population variability ratio of Chatelain et al. (2026, Scientific
    Reports, doi:10.1038/s41598-026-64679-2), whose denominator holds the numerical part in full: about ``ratio / sqrt(1
    + ratio^2)``. sd_anat is all that differs between participants: anatomy, age, and the noise of the scanner.

    The confidence interval of the ratio leaves out participant after participant of ``log(sd_num / sd of the
    participants' means)`` (jackknife, t distribution); ``u = (sd_num / sd)^2`` then gives ``ratio^2 = u / (1 - k u)``,
    k the mean of 1 / (M o_p). In simulations it held the truth in 93-96 % with 8 to 100 participants, in 92-93 % with
    log-normal anatomy and noise. Chatelain et al. take an F distribution that counts the runs of a participant as M
    participants, and is several times too narrow. Members are taken as given, not drawn.

    Members absent in an observation are NaN; observations with fewer than two members of a feature do not count.
    `dice_min` and `unreliable` are of `summarise_regions`. Returns one row per feature, see
    ``data/templates/columns.tsv``. The ratio is infinite where all spread is numerical, NaN where there is none.
    """
    if cohort.members is None:
        raise ValueError("numerical variability needs members; this cohort has one value per row")
    n_members = np.isfinite(cohort.members).sum(axis=1)
    with warnings.catch_warnings(), np.errstate(invalid="ignore", divide="ignore"):
        warnings.simplefilter("ignore", RuntimeWarning)  # of features that somebody lacks
        variance = np.where(n_members >= 2, np.nanvar(cohort.members, axis=1, ddof=1), np.nan)
        center = np.where(n_members >= 2, np.nanmean(cohort.members, axis=1), np.nan)
        variances = pd.DataFrame(variance).groupby(cohort.groups)
        observations, summed = variances.count().to_numpy(float), variances.sum().to_numpy()
        known = observations > 0
        mean = pd.DataFrame(center).groupby(cohort.groups).mean().to_numpy()
        of_mean = pd.DataFrame(variance / n_members).groupby(cohort.groups).sum().to_numpy()
        of_mean = np.nanmean(of_mean / np.where(known, observations, np.nan) ** 2, axis=0)
        n = known.sum(axis=0)
        sd_num = np.sqrt(summed.sum(axis=0) / observations.sum(axis=0))
        between = np.where(n > 1, np.nanvar(mean, axis=0) * n / (n - 1), np.nan)
        sd_anat = np.sqrt(np.maximum(between - of_mean, 0.0))
        constant = np.sqrt(sd_num**2 + between) <= TINY * np.abs(np.nanmean(mean, axis=0))
        ratio = np.where(constant | (n < 2), np.nan, sd_num / sd_anat)
        reach = _jackknife_reach(summed, observations, mean)
        low, high = (_ratio(sd_num**2 / between * np.exp(2 * d), of_mean / sd_num**2) for d in (-reach, reach))
        # Of what one member gives, over participants; the mean over members.
        runs = pd.DataFrame(cohort.members.reshape(len(cohort), -1)).groupby(cohort.groups).mean().var(ddof=1)
        single_run = np.sqrt(np.nanmean(runs.to_numpy().reshape(cohort.members.shape[1:]), axis=0))
        table = pd.DataFrame({"name": cohort.names, "mean": np.nanmean(mean, axis=0), "sd_num": sd_num})
        table = table.assign(sd_anat=sd_anat, ratio=ratio, low=low, high=high)
        table.loc[np.isnan(ratio), ["low", "high"]] = np.nan
        table["npv"] = sd_num / np.where(single_run > 0, single_run, np.nan)
    return table.assign(
        cv=table["sd_num"] / table["mean"].where(table["mean"] > 0),
        dice_min=table["name"].map(dice_min).astype(float),
        unreliable=table["name"].map(unreliable).astype(float),
        n_needed=participants_needed(ratio),
        n_participants=n,
        n_members=n_members.max(axis=0, initial=0),
    )


def _jackknife_reach(variance: np.ndarray, observations: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Half the width of the interval of ``log(sd_num / sd of the participants' means)``, (F,), from (P, F) each."""
    known = observations > 0
    n = known.sum(axis=0)
    centred = np.square(mean - np.nanmean(mean, axis=0))
    left_variance = (variance.sum(axis=0) - variance) / (observations.sum(axis=0) - observations)
    left_between = (np.nansum(centred, axis=0) - centred * n / (n - 1)) / (n - 2)
    left = np.where(known, np.log(left_variance / left_between) / 2, np.nan)
    error = np.sqrt((n - 1) / n * np.nansum(np.square(left - np.nanmean(left, axis=0)), axis=0))
    return np.where((n > 2) & np.isfinite(left).any(axis=0), t.ppf((1 + CONFIDENCE) / 2, n - 1) * error, np.nan)


def _ratio(u: np.ndarray, k: np.ndarray) -> np.ndarray:
    return np.where(k * u < 1, np.sqrt(u / np.maximum(1 - k * u, 0.0)), np.where(np.isnan(u), np.nan, np.inf))


def numerical_covariance(cohort: Cohort) -> pd.DataFrame:
    """Covariance of the features over members, pooled over observations, for each family.

    With x the value of member m (of M of a family) in observation i (of R), and y that of another feature::

        covariance          = 1/R sum_i sum_m (x_im - x_i)(y_im - y_i) / (M - 1)
        relative_covariance = the same of x_im / x_i and y_im / y_i

    No member may be missing. Families are "all", and those of ``source["families"]`` with two members or more. Returns
    one row per family and pair of features, each pair once, a feature with itself among them: family, name, other,
    covariance, relative_covariance (NaN where one is absent in somebody), correlation (of the covariance; NaN where one
    does not vary), n_members, n_observations.
    """
    if cohort.members is None:
        raise ValueError("numerical covariance needs members; this cohort has one value per row")
    first, second = np.triu_indices(len(cohort.names))
    names = np.array(cohort.names, dtype=object)
    tables = []
    for family, ids in ({"all": list(cohort.member_ids)} | dict(cohort.source.get("families", {}))).items():
        if len(ids) < 2:
            continue
        members = cohort.members[:, [cohort.member_ids.index(member) for member in ids]]
        pooled = np.full(len(members), len(ids) / (len(ids) - 1) / len(members))
        with np.errstate(invalid="ignore", divide="ignore"):
            relative = summed_covariances(members / members.mean(axis=1, keepdims=True), pooled)
            covariance = summed_covariances(members, pooled)
            sd = np.sqrt(np.diag(covariance))
            correlation = covariance / np.outer(sd, sd)
        columns = {"covariance": covariance, "relative_covariance": relative, "correlation": correlation}
        table = pd.DataFrame({"family": family, "name": names[first], "other": names[second]})
        table = table.assign(**{name: matrix[first, second] for name, matrix in columns.items()})
        tables.append(table.assign(n_members=len(ids), n_observations=len(members)))
    return pd.concat(tables, ignore_index=True)


def compare_pipelines(ours: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    """Paired comparison of two pipelines over the structures that both have.

    Wilcoxon signed-rank test on ``log(ours / other)``, and the Hodges-Lehmann estimate (1963, Annals of Mathematical
    Statistics 34(2), 598-611) of that log ratio (median of the means of all pairs) with the confidence interval that
    belongs to the test. Structures are the units; left and right of one are not independent, and count once, with the
    mean of their logarithms. Of minimum Dice, ``1 - dice_min`` is compared, so that more is worse in every row.

    Returns a row per measure that both know in two structures or more: measure (``ratio``: sd_num / sd_anat, ``cv``:
    sd_num / mean, ``1 - dice_min``), n (structures), median_ours, median_other, ratio (ours / other; below 1, ours
    varies less), low, high (95 % confidence interval; NaN with fewer than six structures, which have none), p_value. A
    UserError says that tables of `numerical_variability` share fewer than two structures.
    """
    paired = ours.merge(other, on="name", suffixes=("_ours", "_other"))
    names = list(paired["name"])
    both = {side: stem for stem, *sides in find_pairs(names) for side in sides}
    structures = [both.get(at, name) for at, name in enumerate(names)]
    if len(set(structures)) < 2:
        raise UserError(
            f"The two pipelines share {len(set(structures))} structures (left and right count once), of "
            f"{', '.join(ours['name'].head(3))} ... and {', '.join(other['name'].head(3))} ... Names must be those of "
            "FreeSurfer's aseg; rename the columns of the other table."
        )
    columns = ["measure", "n", "median_ours", "median_other", "ratio", "low", "high", "p_value"]
    rows = []
    for measure in ("ratio", "cv", "dice_min"):
        values = paired[[f"{measure}_ours", f"{measure}_other"]].to_numpy(np.float64)
        if measure == "dice_min":
            measure, values = "1 - dice_min", 1 - values
        known = (np.isfinite(values) & (values > 0)).all(axis=1)
        logs = pd.DataFrame(np.log(values[known])).groupby(np.array(structures)[known]).mean()
        if len(logs) < 2:
            continue
        difference = (logs[0] - logs[1]).to_numpy()
        low, middle, high = np.exp(_hodges_lehmann(difference))
        p_value = 1.0 if np.all(difference == 0) else float(wilcoxon(difference).pvalue)
        rows.append((measure, len(logs), *np.exp(logs).median(), middle, low, high, p_value))
    return pd.DataFrame(rows, columns=columns)


def _hodges_lehmann(values: np.ndarray) -> tuple[float, float, float]:
    """Lower bound, estimate, upper bound; the bounds by the test's normal approximation."""
    n = len(values)
    first, second = np.triu_indices(n)
    walsh = np.sort((values[first] + values[second]) / 2)
    z = norm.ppf((1 + CONFIDENCE) / 2)
    rank = round(n * (n + 1) / 4 - z * np.sqrt(n * (n + 1) * (2 * n + 1) / 24))
    middle = float(np.median(walsh))
    return (np.nan, middle, np.nan) if n < 6 or rank < 1 else (float(walsh[rank - 1]), middle, float(walsh[-rank]))
