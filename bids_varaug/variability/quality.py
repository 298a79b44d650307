"""How far each structure's volume can be trusted: a verdict and its reasons.

Everything that makes a verdict stands in `THRESHOLDS`, `MEMBERS` and `LIMITS`. A verdict says "look
here", not "ill": the members may all make one error, and a rare brain is no wrong one.

`LIMITS` were rounded outwards by the authors of this package from what FreeSurfer reports for
adults, not copied from a table, and are no norms. For norms by age, sex and head size see Potvin et
al. [1]_, and Potvin et al. [2]_ for the cortex. ``benchmarks/plausible_volumes.py`` counts how many
adults of a table lie outside of them.

References
----------
.. [1] Potvin, Mouiha, Dieumegarde, Duchesne (2016). Normative data for subcortical regional volumes
       over the lifetime of the adult human brain. NeuroImage 137, 9-20.
       doi:10.1016/j.neuroimage.2016.05.016
.. [2] Potvin, Dieumegarde, Duchesne (2017). Normative morphometric data for cerebral cortical areas
       over the lifetime of the adult human brain. NeuroImage 156, 315-339.
       doi:10.1016/j.neuroimage.2017.05.019
.. [3] Zijdenbos, Dawant, Margolin, Palmer (1994). Morphometric analysis of white matter lesions in
       MR images: method and validation. IEEE Transactions on Medical Imaging 13, 716-724.
.. [4] Kondrateva et al. (2025). arXiv:2504.15931.
.. [5] Gonzalez-Pepe et al. (2025). arXiv:2509.05238.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bids_varaug.models.ensemble import BASELINE

if TYPE_CHECKING:
    import pandas as pd

VERDICTS = {
    "good": "Nothing speaks against the volume; the figures may",
    "caution": "Look at the structure in the figures before its volume is used",
    "unknown": "Too few perturbed members to tell how far the volume spreads",
    "unreliable": "Do not use the volume",
}
"""From best to worst, with what a reader should do."""
GOOD, CAUTION, UNKNOWN, UNRELIABLE = range(len(VERDICTS))
_WORDS = tuple(VERDICTS)
_PHRASES = {"caution": "with caution", "unknown": "not judged", "unreliable": "unreliable"}
_BETWEEN = "; "  # reasons


@dataclass(frozen=True)
class Threshold:
    """From where on a measure calls for caution, and from where on it makes a volume unreliable.

    `sign` is 1 where more is worse, -1 where less is worse; `text` is filled with the measure and
    the threshold it has passed.
    """

    caution: float
    unreliable: float
    sign: int
    text: str


THRESHOLDS = {
    # A volume lies within 1.96 CV of the members' mean in 95 % of networks: 10 % is +-20 %. 5 % is
    # what scanning one man again on other scanners gives (FreeSurfer 8 and FastSurfer: hippocampus
    # 2.2 and 2.8 %, accumbens 3.1 and 6.9 % [4]_): above it, chance adds more than the scanner.
    "cv": Threshold(0.05, 0.10, 1, "CV {:.1%} (above {:.0%})"),
    # Above 0.7 agreement counts as excellent [3]_. The least Dice of FreeSurfer under Monte Carlo
    # arithmetic, and of FastSurfer over seeds, is 0.8 in the median person for the worst structure
    # (inferior lateral ventricle 0.81, cerebellar cortex 0.79), and higher for others [5]_.
    "dice_min": Threshold(0.80, 0.70, -1, "smallest Dice {:.2f} (below {:.2f})"),
    # Of a ball of 300 voxels half lie at its border, of one of 100 two thirds, of a thin structure
    # nearly all: there partial volume decides. Of the coarser grid, the image's or the network's.
    "voxels": Threshold(300, 100, -1, "{:.0f} voxels (fewer than {:.0f})"),
}
# The 95 % confidence interval of a standard deviation reaches from 0.6 to 2.9 times what five
# members show, 6.3 times what three show, 32 times what two show (chi-square).
MEMBERS = Threshold(5, 3, -1, "{:.0f} (fewer than {:.0f})")


@dataclass(frozen=True)
class Limits:
    """Plausible volumes of one side [mm3], and largest asymmetry.

    Attributes
    ----------
    adult : (low, high) at any age: outside, the volume is taken for wrong
    young, old : (low, high) at 20 and at 80 years, geometric in between, for both sexes: outside,
        it is to be looked at
    asymmetry : of ``|left - right| / mean(left, right)``; None for midline structures
    """

    adult: tuple[float, float]
    young: tuple[float, float]
    old: tuple[float, float]
    asymmetry: float | None = None


_PAIRS = {
    (2, 41): Limits((110_000, 420_000), (125_000, 390_000), (115_000, 360_000), 0.15),
    (3, 42): Limits((120_000, 420_000), (150_000, 400_000), (125_000, 350_000), 0.15),
    (4, 43): Limits((1_500, 80_000), (1_500, 35_000), (2_500, 80_000), 1.1),
    (5, 44): Limits((20, 6_000), (20, 2_200), (60, 6_000), 1.5),
    (7, 46): Limits((5_000, 34_000), (5_000, 34_000), (5_000, 30_000), 0.4),
    (8, 47): Limits((22_000, 95_000), (22_000, 95_000), (22_000, 85_000), 0.25),
    (10, 49): Limits((3_800, 12_500), (4_800, 12_500), (3_800, 11_500), 0.3),
    (11, 50): Limits((1_700, 7_000), (2_000, 7_000), (1_700, 6_500), 0.35),
    (12, 51): Limits((2_300, 9_000), (2_700, 9_000), (2_300, 7_800), 0.35),
    (13, 52): Limits((700, 3_800), (850, 3_800), (700, 3_400), 0.5),
    (17, 53): Limits((1_800, 7_500), (2_700, 7_500), (1_800, 6_200), 0.4),
    (18, 54): Limits((550, 3_500), (850, 3_500), (550, 3_000), 0.6),
    (26, 58): Limits((130, 1_500), (240, 1_500), (130, 1_100), 0.8),
    (28, 60): Limits((2_200, 8_000), (2_400, 8_000), (2_200, 7_500), 0.3),
}
LIMITS: dict[int, Limits] = {
    14: Limits((300, 7_000), (300, 3_600), (450, 7_000)),
    15: Limits((350, 7_500), (350, 7_500), (400, 7_500)),
    16: Limits((9_000, 38_000), (10_000, 38_000), (9_000, 36_000)),
    **{index: limits for pair, limits in _PAIRS.items() for index in pair},
}
SEX_RATIO = 1.1
"""Volumes of men over those of women, 1.07 to 1.18 in FreeSurfer's tables: men's lower limits are
so much higher, women's upper limits so much lower."""
ADULT_AGE = 18.0  # years


def judge_regions(
    regions: pd.DataFrame,
    members: Mapping[str, int],
    voxel_volume: float,
    age: float | None = None,
    sex: str | None = None,
) -> pd.DataFrame:
    """Give every structure a verdict.

    Its worst finding decides: measures beyond `THRESHOLDS`, too few `MEMBERS`, a volume outside of
    `LIMITS`, left and right that differ too much. Spread is the largest of that over all members
    and those within a family: where one family hardly differs, all together differ less.

    Parameters
    ----------
    regions : DataFrame, one row per structure, as `variability.regions.region_table` returns it
        index, name, volume_mean [mm3], cv and dice_min with those within families (cv_FAMILY,
        dice_min_FAMILY); NaN where there is no such value
    members : perturbed members of each family
    voxel_volume : of the coarser grid of the image's and the network's, mm3
    age : years, if known
    sex : "F", "M"; others, and None, have the limits of both

    Returns
    -------
    DataFrame
        The same with the columns verdict (of `VERDICTS`), reason (None where good), and volume_low,
        volume_high [mm3], the limits (NaN where none are known).
    """
    ids, volumes = regions["index"].to_numpy(int), regions["volume_mean"].to_numpy(float)
    low, high = volume_limits(ids, age, sex)
    of_structure = dict(zip(ids.tolist(), volumes, strict=True))
    measures = {
        "cv": _worst(regions, "cv", np.fmax),
        "dice_min": _worst(regions, "dice_min", np.fmin),
        "voxels": np.floor(volumes / voxel_volume + 1e-6),
    }
    verdicts, reasons = [], []
    for row, index in enumerate(ids.tolist()):
        here = {name: values[row] for name, values in measures.items()}
        findings = [(UNRELIABLE, "not found"), *_too_few(members)]
        if volumes[row] > 0:
            findings = [
                *_beyond(here),
                *_too_few(members),
                *_implausible(index, volumes[row], low[row], high[row]),
                *_lopsided(index, of_structure),
            ]
        findings.sort(key=lambda found: -found[0])  # the worst first, else in this order
        verdicts.append(_WORDS[findings[0][0] if findings else GOOD])
        reasons.append(_BETWEEN.join(text for _, text in findings) or None)
    return regions.assign(verdict=verdicts, reason=reasons, volume_low=low, volume_high=high)


def _worst(regions: pd.DataFrame, measure: str, worse: np.ufunc) -> np.ndarray:
    """The measure over all members, or within a family if that is worse."""
    columns = [c for c in regions if c == measure or c.startswith(f"{measure}_")]
    return worse.reduce(regions[columns].to_numpy(float), axis=1, initial=np.nan)


def _beyond(measures: Mapping[str, float]) -> Iterator[tuple[int, str]]:
    for name, threshold in THRESHOLDS.items():
        for level, limit in ((UNRELIABLE, threshold.unreliable), (CAUTION, threshold.caution)):
            if threshold.sign * measures[name] > threshold.sign * limit:
                yield level, threshold.text.format(measures[name], limit).replace("%", " %")
                break


def _too_few(members: Mapping[str, int]) -> Iterator[tuple[int, str]]:
    total = sum(members.values())
    few = [f"{n} of {family}" for family, n in members.items() if n < MEMBERS.caution]
    if total < MEMBERS.unreliable:
        yield UNKNOWN, f"spread unknown with {'one member' if total == 1 else f'{total} members'}"
    elif total < MEMBERS.caution:
        yield CAUTION, f"perturbed members: {MEMBERS.text.format(total, MEMBERS.caution)}"
    elif few:
        yield CAUTION, f"perturbed members: {', '.join(few)} (fewer than {MEMBERS.caution:.0f} of a family)"


def _implausible(index: int, volume: float, low: float, high: float) -> Iterator[tuple[int, str]]:
    if index in LIMITS and not low <= volume <= high:
        least, most = LIMITS[index].adult
        size = "small" if volume < low else "large"
        yield (
            CAUTION if least <= volume <= most else UNRELIABLE,
            f"implausibly {size} ({volume:,.0f} mm3; broad limits {low:,.0f} to {high:,.0f})",
        )


def _lopsided(index: int, volumes: Mapping[int, float]) -> Iterator[tuple[int, str]]:
    for pair, limits in _PAIRS.items():
        left, right = (volumes.get(side, 0.0) for side in pair)
        if index in pair and left > 0 and right > 0:
            asymmetry = abs(left - right) / ((left + right) / 2)
            if asymmetry > limits.asymmetry:
                yield (
                    CAUTION,
                    f"left and right differ by {100 * asymmetry:.0f} % of their mean (more than "
                    f"{100 * limits.asymmetry:.0f} %)",
                )


def volume_limits(ids: np.ndarray, age: float | None = None, sex: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Plausible volumes [mm3] of structures at an age, those of all adults where it is unknown.

    Parameters
    ----------
    ids : (R,) FreeSurfer ids
    age : years; below `ADULT_AGE`, NaN and None give the limits of all adults
    sex : "F" or "M"; else the limits of both

    Returns
    -------
    low, high : (R,) float64, NaN for other structures

    Examples
    --------
    >>> [values.round().tolist() for values in volume_limits(np.array([17, 999]), 80.0, "M")]
    [[1980.0, nan], [6200.0, nan]]
    """
    pairs = np.full((len(ids), 2), np.nan)
    grown = age is not None and age >= ADULT_AGE  # False for NaN
    share = min(max((age - 20) / 60, 0.0), 1.0) if grown else 0.0
    for row, index in enumerate(ids):
        limits = LIMITS.get(int(index))
        if limits and grown:
            pairs[row] = np.exp((1 - share) * np.log(limits.young) + share * np.log(limits.old))
        elif limits:
            pairs[row] = limits.adult
    low, high = pairs.T
    if grown and sex == "M":
        low = low * SEX_RATIO
    if grown and sex == "F":
        high = high / SEX_RATIO
    return low, high


def describe_limits(age: float | None = None, sex: str | None = None) -> str:
    """Describe whose limits of volume apply.

    Examples
    --------
    >>> describe_limits(63.2, "F")
    'Broad limits of volume for women of 63.2 years'
    >>> describe_limits(12.0)
    'Broad limits of volume for adults of any age, since there are none for 12 years'
    """
    if age is None or math.isnan(age):
        return "Broad limits of volume for adults of any age, since the age is unknown"
    if age < ADULT_AGE:
        return f"Broad limits of volume for adults of any age, since there are none for {round(age, 1):g} years"
    who = {"F": "women", "M": "men"}.get(sex or "", "adults")
    return f"Broad limits of volume for {who} of {round(age, 1):g} years"


def describe_thresholds() -> dict[str, dict[str, float]]:
    """Return what the measures are held against, for sidecars."""
    measures = {
        name: {"caution": threshold.caution, "unreliable": threshold.unreliable}
        for name, threshold in THRESHOLDS.items()
    }
    return measures | {"members": {"caution": MEMBERS.caution, "unknown": MEMBERS.unreliable}}


def describe_families(members: Mapping[str, int]) -> list[str]:
    """Warn of families of perturbed members too small for their spread to be trusted.

    Parameters
    ----------
    members : perturbed members of each family; the baseline alone gives no warning

    Examples
    --------
    >>> describe_families({"mca": 5, "seed": 2})
    ['Family seed has 2 members: below 5, its spread is uncertain.']
    """
    return [
        f"Family {family} has {'one member' if n == 1 else f'{n} members'}: below "
        f"{MEMBERS.caution:.0f}, its spread is {'unknown' if n == 1 else 'uncertain'}."
        for family, n in members.items()
        if n < MEMBERS.caution and family != BASELINE
    ]


def describe_verdicts(judged: pd.DataFrame, n_named: int | None = None) -> list[str]:
    """Return a sentence for each verdict but good, the worst first; none where all are good.

    Parameters
    ----------
    judged : as `judge_regions` returns it, or as it was read from the table
    n_named : how many structures of a verdict are named, the largest CV first, each with the worst
        reason alone; all if None

    Returns
    -------
    list of str
    """
    sentences = []
    for word in reversed(_WORDS[1:]):
        rows = judged[judged["verdict"] == word].sort_values("cv", ascending=False, kind="stable", na_position="last")
        if rows.empty:
            continue
        start = f"{len(rows)} of {len(judged)} structures {_PHRASES[word]}"
        worst = rows["reason"].str.partition(_BETWEEN)[0]
        if len(rows) > 2 and worst.nunique() == 1:
            sentences.append(f"{start}: {worst.iloc[0]}.")
            continue
        named = [f"{n}, {r}" for n, r in zip(rows["name"], worst, strict=True)][:n_named]
        more = f" and {len(rows) - len(named)} more" if len(rows) > len(named) else ""
        sentences.append(f"{start}: {_BETWEEN.join(named)}{more}.")
    return sentences
