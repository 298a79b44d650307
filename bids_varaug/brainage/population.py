"""Numerical against anatomical variability of a group, and what it means for other studies."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pandas as pd
from scipy.stats import norm, wilcoxon

from bids_varaug.brainage.cohort import Cohort
from bids_varaug.derivatives.names import OUTPUTS
from bids_varaug.errors import UserError

EFFECT_SIZE = 0.1  # Cohen's d; half of what Cohen calls a small effect
CONFIDENCE = 0.95
CHUNK = 2_000_000  # counts of bootstrap samples held at once, 16 MB
COMPARED = ("ratio", "cv", "dice_min")
TINY = 1e-9  # a standard deviation below this share of the mean is rounding


def numerical_variability(
    cohort: Cohort,
    seed: int = 0,
    n_boot: int = 1000,
    *,
    dice_min: Mapping[str, float] = MappingProxyType({}),
    unreliable: Mapping[str, float] = MappingProxyType({}),
    effect_size: float = EFFECT_SIZE,
) -> pd.DataFrame:
    """How much of each feature's spread over a group is numerical.

    With x the value of member m (of M) in observation i of participant p, who has o_p of them::

        sd_num  = sqrt(mean over observations of var_m(x_pim))               (M - 1)
        sd_anat = sqrt(var_p(mean_im x_pim) - mean_p(var_num,p / (M o_p)))   (P - 1)
        ratio   = sd_num / sd_anat
        npv     = sd_num / sqrt(mean_m var_p(mean_i x_pim))

    The part taken off in sd_anat is what numerical noise leaves in the mean of M members;
    without it the ratio could never exceed sqrt(M). `npv` is the ratio of Chatelain et al. [1]_,
    whose denominator is the spread of single runs and so holds the numerical part in full: about
    ``ratio / sqrt(1 + ratio^2)``. It is given to compare with their tables. sd_anat is all that
    differs between participants: anatomy, age, and the noise of the scanner.

    Limits are those of a studentised bootstrap [2]_ that draws participants, who keep all their
    observations and members: of ``log(sd_num / sd of the participants' means)``, which exists in
    every sample, with its error by the delta method; ``u = (sd_num / sd)^2`` then gives
    ``ratio^2 = u / (1 - k u)``, k the mean of 1 / (M o_p). [1]_ take an F distribution with
    n (M - 1) and M (n - 1) degrees of freedom; that counts the runs of a participant as M
    participants, and is several times too narrow. Members are taken as given, not drawn.

    Parameters
    ----------
    cohort : Cohort
        With members. Members absent in an observation are NaN; observations with fewer than two
        members of a feature do not count.
    seed : of the bootstrap
    n_boot : number of bootstrap samples
    dice_min, unreliable : by feature, see `read_regions`
    effect_size : for `n_needed`, see `participants_needed`

    Returns
    -------
    one row per feature, in the cohort's order
        name, mean, sd_num, sd_anat (in the feature's unit), ratio, low, high (95 % limits of the
        ratio), npv, cv (sd_num / mean), dice_min and unreliable (NaN where unknown), n_needed
        (participants), n_participants, n_members (largest number). The ratio is infinite where
        nothing but numerical spread is seen, and NaN with fewer than two participants or in a
        feature that is constant

    Raises
    ------
    ValueError
        If the cohort has no members.

    References
    ----------
    .. [1] Chatelain et al. (2026), The practical impact of numerical variability on structural MRI
       measures of Parkinson's disease, Scientific Reports, doi:10.1038/s41598-026-64679-2.
       Formulas from the notebooks ``npv/*.ipynb`` of their repository
       yohanchatelain/livingpark-numerical-variability.
    .. [2] Efron & Tibshirani (1993), An Introduction to the Bootstrap, chapter 12.5.
    """
    if cohort.members is None:
        raise ValueError("numerical variability needs members; this cohort has one value per row")
    table = pd.DataFrame({"name": cohort.names, **_spread(_participant_sums(cohort), n_boot, seed)})
    table["npv"] = table["sd_num"] / _single_run_sd(cohort)
    table["cv"] = table["sd_num"] / table["mean"].where(table["mean"] > 0)
    for column, known in (("dice_min", dice_min), ("unreliable", unreliable)):
        table[column] = [float(known.get(name, np.nan)) for name in cohort.names]
    table["n_needed"] = participants_needed(table["ratio"].to_numpy(), effect_size)
    columns = ["name", "mean", "sd_num", "sd_anat", "ratio", "low", "high", "npv", "cv"]
    return table[[*columns, "dice_min", "unreliable", "n_needed", "n_participants", "n_members"]]


def _participant_sums(cohort: Cohort) -> dict[str, np.ndarray]:
    """Per participant and feature, (P, F): what the pooled standard deviations are made of."""
    present = np.isfinite(cohort.members)
    n_members = present.sum(axis=1)
    usable = n_members >= 2
    values = np.where(present, cohort.members, 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(usable, values.sum(axis=1) / n_members, 0.0)
        deviation = np.where(present, cohort.members - mean[:, None, :], 0.0)
        variance = np.where(usable, (deviation**2).sum(axis=1) / (n_members - 1), 0.0)
        of_mean = np.where(usable, variance / n_members, 0.0)
    groups = cohort.groups
    n_people = int(groups.max()) + 1 if len(groups) else 0

    def per_participant(of_observation: np.ndarray) -> np.ndarray:
        total = np.zeros((n_people, len(cohort.names)))
        np.add.at(total, groups, of_observation)
        return total

    observations = per_participant(usable.astype(float))
    divisor = np.maximum(observations, 1)
    return {
        "observations": observations,
        "variance": per_participant(variance),  # summed over the participant's observations
        "mean": per_participant(mean) / divisor,
        "of_mean": per_participant(of_mean) / divisor**2,
        "n_members": n_members.max(axis=0, initial=0),
    }


def _spread(sums: dict[str, np.ndarray], n_boot: int, seed: int) -> dict[str, np.ndarray]:
    """Columns of the table that need no more than the participants' sums, each (F,)."""
    known = sums["observations"] > 0
    n = known.sum(axis=0)
    at_least_one = np.maximum(n, 1)
    mean = np.where(n > 0, sums["mean"].sum(axis=0) / at_least_one, np.nan)
    centred = np.where(known, sums["mean"] - mean, 0.0)
    scale = np.sqrt((centred**2).sum(axis=0) / at_least_one)
    moments = _moments(sums, centred / np.where(scale > 0, scale, 1.0), known)
    with np.errstate(invalid="ignore", divide="ignore"):
        variance = sums["variance"].sum(axis=0) / sums["observations"].sum(axis=0)
        of_mean = sums["of_mean"].sum(axis=0) / n
        between = scale**2 * n / np.where(n > 1, n - 1, np.nan)
        sd_num, sd_anat = np.sqrt(variance), np.sqrt(np.maximum(between - of_mean, 0.0))
        constant = np.sqrt(variance + between) <= TINY * np.abs(mean)
        log_ratio, error = _log_ratio(moments.mean(axis=0), moments[..., -1].mean(axis=0))
        samples = _resample(moments, n_boot, seed)
        t = np.concatenate([(sample - log_ratio) / spread for sample, spread in samples])
        t[~np.isfinite(t)] = np.nan  # a sample of one person over and over
        t[:, np.isnan(t).all(axis=0)] = 0.0  # no numerical or no anatomical spread: no limits
        upper, lower = np.nanquantile(t, [0.025, 0.975], axis=0)
        k = of_mean / variance

        def to_ratio(error: np.ndarray) -> np.ndarray:
            u = variance / between * np.exp(-2 * error)
            return np.where(k * u < 1, np.sqrt(u / np.maximum(1 - k * u, 0.0)), np.inf)

        columns = {
            "mean": mean,
            "sd_num": sd_num,
            "sd_anat": sd_anat,
            "ratio": np.where(constant | (n < 2), np.nan, sd_num / sd_anat),
            "low": to_ratio(lower * error),
            "high": to_ratio(upper * error),
        }
    no_limits = np.isnan(columns["ratio"]) | (variance == 0)
    for limit in ("low", "high"):
        columns[limit] = np.where(no_limits, np.nan, columns[limit])
    return columns | {"n_participants": n, "n_members": sums["n_members"]}


def _moments(sums: dict[str, np.ndarray], m: np.ndarray, known: np.ndarray) -> np.ndarray:
    """What `_log_ratio` needs of each participant, (P, F, 14); the last is 1 where known."""
    v, o = sums["variance"], sums["observations"]
    v = v / np.where(v.any(axis=0), v.max(axis=0), 1.0)  # a factor of no effect on the error
    columns = (v, o, m, m**2, m**3, m**4, v**2, v * o, o**2, v * m, v * m**2, o * m, o * m**2)
    return np.stack([*columns, np.ones_like(m)], axis=-1) * known[..., None]


def _resample(moments: np.ndarray, n_boot: int, seed: int):
    """Bootstrap samples of log ratio and its standard error, in chunks of (b, F) each."""
    n = len(moments)
    rng = np.random.default_rng(seed)
    flat = moments.reshape(n, -1)
    size = max(1, CHUNK // max(n, 1))
    for start in range(0, n_boot, size):
        counts = rng.multinomial(n, np.full(n, 1 / n), size=min(size, n_boot - start))
        means = (counts @ flat / n).reshape(len(counts), *moments.shape[1:])
        yield _log_ratio(means, means[..., -1])


def _log_ratio(means: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``log(sd_num / sd of the participants' means)``; its error by the delta method, x sqrt(n)."""
    v, o, m, m2, m3, m4, vv, vo, oo, vm, vm2, om, om2, _ = np.moveaxis(
        means / np.where(known > 0, known, np.nan)[..., None], -1, 0
    )
    variance, between = v / o, m2 - m**2
    # Influence of a participant: (v - o V) / (2 o V) of log sd_num, ((m - mu)^2 - b) / (2 b) of
    # the other; the squared error is the mean square of their difference.
    numerical = (vv - 2 * variance * vo + variance**2 * oo) / (4 * v**2)
    fourth = m4 - 4 * m * m3 + 6 * m**2 * m2 - 3 * m**4
    anatomical = (fourth - between**2) / (4 * between**2)
    cross = (vm2 - 2 * m * vm + m**2 * v) - variance * (om2 - 2 * m * om + m**2 * o)
    squared = numerical + anatomical - 2 * cross / (4 * v * between)
    return np.log(variance / between) / 2, np.sqrt(np.maximum(squared, 0.0))


def _single_run_sd(cohort: Cohort) -> np.ndarray:
    """Spread over participants of what one member gives, pooled over members, (F,)."""
    groups = cohort.groups
    n_people = int(groups.max()) + 1 if len(groups) else 0
    present = np.isfinite(cohort.members)
    total = np.zeros((n_people, *cohort.members.shape[1:]))
    count = np.zeros_like(total)
    np.add.at(total, groups, np.where(present, cohort.members, 0.0))
    np.add.at(count, groups, present.astype(float))
    people = pd.DataFrame(
        np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0).reshape(
            n_people, -1
        )
    )
    variance = people.var(ddof=1).to_numpy().reshape(cohort.members.shape[1:])
    pooled = pd.DataFrame(variance).mean().to_numpy()
    return np.sqrt(np.where(pooled > 0, pooled, np.nan))


def participants_needed(
    ratio: np.ndarray | float,
    effect_size: float = EFFECT_SIZE,
    *,
    confidence: float = CONFIDENCE,
    true_effect: float = 0.0,
    n_members: int = 1,
) -> np.ndarray:
    """Participants that keep the numerical error of a group difference below an effect size.

    Two groups of n/2 are compared by Cohen's d, their mean difference over the pooled standard
    deviation s of single runs. Numerical noise of standard deviation sd_num, independent between
    people, moves d; to first order in the noise (the delta method, as [1]_ derive it) by::

        sd(d)^2 = (sd_num / s)^2 (4 / n + d^2 / (n - 2)),   (sd_num / s)^2 = r^2 / (1 + r^2)

    with r = sd_num / sd_anat. n is the smallest even number for which the error stays below
    `effect_size` with probability `confidence`: ``z sd(d) <= effect_size``, z the two-sided normal
    quantile; for d = 0 that is ``n >= 4 z^2 r^2 / ((1 + r^2) effect_size^2)``. The mean of M
    members has ``sd_num / sqrt(M)``. Averaging over participants is all that helps
    here; error that all of them share (a bias of the pipeline) is not in it.

    Parameters
    ----------
    ratio : any shape, sd_num / sd_anat of one member; infinity is allowed
    effect_size : largest tolerated numerical error of Cohen's d
    confidence : probability with which it holds
    true_effect : d of the study
    n_members : over which volumes are averaged

    Returns
    -------
    float64, shape of `ratio`; at least 4, NaN where the ratio is NaN

    Raises
    ------
    ValueError
        If the effect size is not positive, or the confidence not between 0 and 1.

    References
    ----------
    .. [1] Chatelain et al. (2026), Scientific Reports, doi:10.1038/s41598-026-64679-2. With their
       criterion, one standard deviation below 0.01, their mean ratio of 0.183 needs about 1,340.

    Examples
    --------
    >>> participants_needed([0.1, 0.5]).tolist()
    [16.0, 308.0]
    """
    if not effect_size > 0 or not 0 < confidence < 1:
        raise ValueError(f"effect size {effect_size} or confidence {confidence} is out of range")
    squared = np.square(np.asarray(ratio, np.float64)) / n_members
    with np.errstate(invalid="ignore"):
        # Of two equal infinities the limit is 1: all of the spread is numerical.
        share = np.where(np.isinf(squared), 1.0, squared / (1 + squared))
    a = np.square(norm.ppf((1 + confidence) / 2) / effect_size) * share
    # n^2 - (2 + a (4 + d^2)) n + 8 a >= 0, from sd(d) above
    half = 1 + a * (4 + true_effect**2) / 2
    n = half + np.sqrt(np.maximum(half**2 - 8 * a, 0.0))
    return np.maximum(2 * np.ceil(n / 2 - 1e-9), 4.0)


def read_regions(
    output_dir: Path, observations: Mapping[str, str] | None = None
) -> dict[str, dict[str, float]]:
    """Minimum Dice and verdicts of each structure, from the participant level's tables.

    Parameters
    ----------
    output_dir : of the derivatives
    observations : entities of the images that count (``sub-01_ses-1``) to their participant;
        default all that are there

    Returns
    -------
    measure -> structure -> value
        dice_min: mean over participants (of the mean over their images); unreliable: share of the
        images whose volume has this verdict, absent in tables of older versions

    Raises
    ------
    UserError
        If a table cannot be read or lacks a column.

    Notes
    -----
    Minimum Dice falls as members are added: compare only ensembles of the same size.
    """
    ending, wanted = OUTPUTS["regions_tsv"].name(""), ("name", "dice_min", "verdict")
    tables = []
    for path in sorted(Path(output_dir).glob(f"sub-*/**/*{ending}")):
        prefix = path.name.removesuffix(ending)
        if observations is not None and prefix not in observations:
            continue
        participant = observations[prefix] if observations else prefix.split("_")[0]
        try:
            table = pd.read_csv(path, sep="\t", na_values="n/a", usecols=lambda c: c in wanted)
            if not {"name", "dice_min"} <= set(table):
                raise ValueError(f"it has {', '.join(table)}")
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path}: cannot be read as a table with columns name and dice_min ({error}). "
                "Run the participant level again for this image."
            ) from error
        tables.append(table.assign(participant=participant))
    if not tables:
        return {}
    table = pd.concat(tables)
    per_person = table.groupby(["name", "participant"], sort=False)["dice_min"].mean()
    found = {"dice_min": per_person.groupby("name", sort=False).mean().dropna().to_dict()}
    if "verdict" in table:
        judged = table.dropna(subset="verdict")
        unreliable = (judged["verdict"] == "unreliable").groupby(judged["name"], sort=False)
        found["unreliable"] = unreliable.mean().to_dict()
    return found


def compare_pipelines(ours: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    """Paired comparison of two pipelines over the structures that both have.

    Wilcoxon signed-rank test [1]_ on ``log(ours / other)``, and the Hodges-Lehmann estimate [2]_ of
    that log ratio (median of the means of all pairs) with the limits that belong to the test.
    Structures are the units, as in the papers' tables of FreeSurfer against FastSurfer; left and
    right of one brain are not independent, so the test is optimistic. Of minimum
    Dice, ``1 - dice_min`` is compared, so that more is worse in every row.

    Parameters
    ----------
    ours, other : tables of `numerical_variability`

    Returns
    -------
    one row per measure that both know in two structures or more
        measure (``ratio``: sd_num / sd_anat, ``cv``: sd_num / mean, ``1 - dice_min``),
        n (structures), median_ours, median_other, ratio (ours / other; below 1, ours varies less),
        low, high (95 % limits; NaN with fewer than six structures, which
        have none), p_value

    Raises
    ------
    UserError
        If they share fewer than two structures.

    References
    ----------
    .. [1] Wilcoxon (1945), Biometrics Bulletin 1(6), 80-83, doi:10.2307/3001968.
    .. [2] Hodges & Lehmann (1963), Annals of Mathematical Statistics 34(2), 598-611,
       doi:10.1214/aoms/1177704172.
    """
    paired = ours.merge(other, on="name", suffixes=("_ours", "_other"))
    if len(paired) < 2:
        raise UserError(
            f"The two pipelines share {len(paired)} structures, of "
            f"{', '.join(ours['name'].head(3))} ... and {', '.join(other['name'].head(3))} ... "
            "Names must be those of FreeSurfer's aseg; rename the columns of the other table."
        )
    rows = []
    for measure in COMPARED:
        a, b = (paired[f"{measure}_{side}"].to_numpy(np.float64) for side in ("ours", "other"))
        if measure == "dice_min":
            a, b = 1 - a, 1 - b
        known = np.isfinite(a) & np.isfinite(b) & (a > 0) & (b > 0)
        if known.sum() < 2:
            continue
        a, b = a[known], b[known]
        difference = np.log(a / b)
        low, middle, high = _hodges_lehmann(difference)
        p_value = 1.0 if np.all(difference == 0) else wilcoxon(difference).pvalue
        rows.append(
            {
                "measure": "1 - dice_min" if measure == "dice_min" else measure,
                "n": len(a),
                "median_ours": np.median(a),
                "median_other": np.median(b),
                "ratio": np.exp(middle),
                "low": np.exp(low),
                "high": np.exp(high),
                "p_value": float(p_value),
            }
        )
    columns = ["measure", "n", "median_ours", "median_other", "ratio", "low", "high", "p_value"]
    return pd.DataFrame(rows, columns=columns)


def _hodges_lehmann(values: np.ndarray) -> tuple[float, float, float]:
    """Lower limit, estimate, upper limit; the limits by the test's normal approximation."""
    n = len(values)
    first, second = np.triu_indices(n)
    walsh = np.sort((values[first] + values[second]) / 2)
    z = norm.ppf((1 + CONFIDENCE) / 2)
    rank = round(n * (n + 1) / 4 - z * np.sqrt(n * (n + 1) * (2 * n + 1) / 24))
    middle = float(np.median(walsh))
    if n < 6 or rank < 1:
        return np.nan, middle, np.nan
    return float(walsh[rank - 1]), middle, float(walsh[-rank])
