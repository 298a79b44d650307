"""How far each structure's volume can be trusted: a verdict and its reasons.

Everything that makes a verdict stands in `THRESHOLDS`, `MEMBERS` and `LIMITS`. A verdict says "look here", not "ill":
the members may all make one error, and a rare brain is no wrong one.

`LIMITS` were rounded outwards by the authors of this package from what FreeSurfer reports for adults, not copied from a
table, and are no norms. For norms by age, sex and head size see Potvin et al. [1]_, and Potvin et al. [2]_ for the
cortex. ``benchmarks/plausible_volumes.py`` counts how many adults of a table lie outside of them.

References
----------
.. [1] Potvin, Mouiha, Dieumegarde, Duchesne (2016). NeuroImage 137, 9-20. doi:10.1016/j.neuroimage.2016.05.016
.. [2] Potvin, Dieumegarde, Duchesne (2017). NeuroImage 156, 315-339. doi:10.1016/j.neuroimage.2017.05.019
.. [3] Zijdenbos, Dawant, Margolin, Palmer (1994). IEEE Transactions on Medical Imaging 13, 716-724.
.. [4] Kondrateva et al. (2025). arXiv:2504.15931.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np
import pandas as pd
from nibabel.affines import apply_affine, voxel_sizes
from scipy.ndimage import binary_erosion, find_objects, gaussian_filter

from bids_varaug.models.ensemble import BASELINE

VERDICTS = {
    "good": "Nothing speaks against the volume; the figures may",
    "caution": "Look at the structure in the figures before its volume is used",
    "unknown": "Too few perturbed members to tell how far the volume spreads",
    "unreliable": "Do not use the volume",
}
"""From best to worst, with what a reader should do."""
_PHRASES = {"unreliable": "unreliable", "unknown": "not judged", "caution": "with caution"}
_BETWEEN = "; "  # reasons


@dataclass(frozen=True)
class Threshold:
    """From where on a measure calls for caution, and from where on it makes a volume unreliable."""

    caution: float
    unreliable: float
    sign: int  # 1 where more is worse, -1 where less is worse
    text: str  # takes the measure and the threshold it has passed


THRESHOLDS = {
    # A volume lies within 1.96 CV of the members' mean in 95 % of networks: 10 % is +-20 %. 5 % is what scanning one
    # man again on other scanners gives (FreeSurfer 8 and FastSurfer: hippocampus 2.2 and 2.8 %, accumbens 3.1 and
    # 6.9 % [4]_): above it, chance adds more than the scanner.
    "cv": Threshold(0.05, 0.10, 1, "CV {:.1%} (above {:.0%})"),
    # Above 0.7 agreement counts as excellent [3]_. On labelled heads, four in five structures whose expected Dice was
    # below 0.75 had less than that; of those whose interval reached below it, every second had. At 0.6 two in five
    # voxels lie wrong.
    "expected_dice": Threshold(0.75, 0.60, -1, "expected Dice {:.2f} (below {:.2f})"),
    # Of a ball of 300 voxels half lie at its border, of one of 100 two thirds, of a thin structure nearly all: there
    # partial volume decides. Of the coarser grid, the image's or the network's.
    "voxels": Threshold(300, 100, -1, "{:.0f} voxels (fewer than {:.0f})"),
}
# The 95 % confidence interval of a standard deviation reaches from 0.6 to 2.9 times what five members show, 6.3 times
# what three show, 32 times what two show (chi-square).
MEMBERS = Threshold(5, 3, -1, "{:.0f} (fewer than {:.0f})")
UNRELIABLE_FROM = 0.37
"""A voxel is unreliable where its consensus label is wrong with at least this probability.

The smallest with which 45 % of the voxels that it marks were wrong on each of five heads drawn from label maps left out
of training, docs/experiments/2026-11-30-uncertainty.md."""


with (files("bids_varaug") / "data" / "plausible_volumes.tsv").open(encoding="utf-8") as _stream:
    _LEFT = pd.read_csv(_stream, sep="\t").astype({"right": "Int64"})
_RIGHT = _LEFT.dropna(subset="right").rename(columns={"left": "right", "right": "left"})
LIMITS = pd.concat([_LEFT, _RIGHT]).rename(columns={"left": "index", "right": "partner"}).set_index("index")
"""Plausible volumes [mm3] of a structure, by FreeSurfer id.

low, high at any age: outside, the volume is taken for wrong. The same at 20 (young) and at 80 years (old), geometric in
between, for both sexes: outside, it is to be looked at. Largest asymmetry ``|left - right| / mean(left, right)``
against the partner, the id of the other side; both are missing for midline structures."""
SEX_RATIO = 1.1
"""Volumes of men over those of women, 1.07 to 1.18 in FreeSurfer's tables: men's lower limits are so much higher,
women's upper limits so much lower."""
ADULT_AGE = 18.0  # years


def judge_regions(
    regions: pd.DataFrame,
    members: Mapping[str, int],
    voxel_volume: float,
    age: float | None = None,
    sex: str | None = None,
) -> pd.DataFrame:
    """Give every structure a verdict.

    Its worst finding decides: measures beyond `THRESHOLDS`, too few `MEMBERS`, a volume outside of `LIMITS`, left and
    right that differ too much. Spread is the largest of that over all members and those within a family: where one
    family hardly differs, all together differ less. Returns `regions` with the columns verdict (of `VERDICTS`), reason
    (None where good), and the limits volume_low, volume_high [mm3] (NaN where none are known).

    Parameters
    ----------
    regions : one row per structure with index, name, volume_mean [mm3], cv with those within families (cv_FAMILY), as
        of `variability.measures.region_table`, and expected_dice, if it is known
    members : perturbed members of each family
    voxel_volume : of the coarser grid of the image's and the network's, mm3
    age, sex : as for `volume_limits`
    """
    ids, volumes = regions["index"].to_numpy(int), regions["volume_mean"].to_numpy(float)
    low, high = volume_limits(ids, age, sex)
    of_structure = dict(zip(ids.tolist(), volumes, strict=True))
    measures = {
        "cv": _largest_cv(regions),
        "expected_dice": regions.get("expected_dice", pd.Series(np.nan, regions.index)).to_numpy(float),
        "voxels": np.floor(volumes / voxel_volume + 1e-6),
    }
    few = list(_too_few(members))
    verdicts, reasons = [], []
    for row, index in enumerate(ids.tolist()):
        findings = [("unreliable", "not found"), *few]
        if volumes[row] > 0:
            findings = [*_beyond({name: values[row] for name, values in measures.items()}), *few]
            if index in LIMITS.index:
                findings += _implausible(LIMITS.loc[index], volumes[row], low[row], high[row], of_structure)
        findings.sort(key=lambda found: -list(VERDICTS).index(found[0]))  # the worst first, else in this order
        verdicts.append(findings[0][0] if findings else "good")
        reasons.append(_BETWEEN.join(text for _, text in findings) or None)
    return regions.assign(verdict=verdicts, reason=reasons, volume_low=low, volume_high=high)


def _largest_cv(regions: pd.DataFrame) -> np.ndarray:
    """That over all members, or within a family if it is larger."""
    columns = [c for c in regions if c == "cv" or c.startswith("cv_")]
    return np.fmax.reduce(regions[columns].to_numpy(float), axis=1, initial=np.nan)


def _beyond(measures: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    for name, threshold in THRESHOLDS.items():
        for verdict, limit in (("unreliable", threshold.unreliable), ("caution", threshold.caution)):
            if threshold.sign * measures[name] > threshold.sign * limit:
                yield verdict, threshold.text.format(measures[name], limit).replace("%", " %")
                break


def _too_few(members: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    total = sum(members.values())
    few = [f"{n} of {family}" for family, n in members.items() if n < MEMBERS.caution]
    if total < MEMBERS.unreliable:
        yield "unknown", f"spread unknown with {_count(total)}"
    elif total < MEMBERS.caution:
        yield "caution", f"perturbed members: {MEMBERS.text.format(total, MEMBERS.caution)}"
    elif few:
        yield "caution", f"perturbed members: {', '.join(few)} (fewer than {MEMBERS.caution:.0f} of a family)"


def _count(n: int) -> str:
    return "one member" if n == 1 else f"{n} members"


def _implausible(
    limits: pd.Series, volume: float, low: float, high: float, volumes: Mapping[int, float]
) -> Iterator[tuple[str, str]]:
    """Findings about a volume, by its row of `LIMITS`, and about its difference from the other side."""
    if not low <= volume <= high:
        size = "small" if volume < low else "large"
        yield (
            "caution" if limits["low"] <= volume <= limits["high"] else "unreliable",
            f"implausibly {size} ({volume:,.0f} mm3; broad limits {low:,.0f} to {high:,.0f})",
        )
    other = 0.0 if pd.isna(limits["partner"]) else volumes.get(int(limits["partner"]), 0.0)
    asymmetry = abs(volume - other) / ((volume + other) / 2)
    if other > 0 and asymmetry > limits["asymmetry"]:
        yield (
            "caution",
            f"left and right differ by {100 * asymmetry:.0f} % of their mean (more than "
            f"{100 * limits['asymmetry']:.0f} %)",
        )


def volume_limits(ids: np.ndarray, age: float | None = None, sex: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper plausible volume [mm3] of structures by FreeSurfer id, (R,) float64 each, NaN for those without.

    Without an age of `ADULT_AGE` or more [years] they are those of all adults, without a sex "F" or "M" those of both.

    >>> [values.round().tolist() for values in volume_limits(np.array([17, 999]), 80.0, "M")]
    [[1980.0, nan], [6200.0, nan]]
    """
    rows = LIMITS.reindex(ids)
    if age is None or not age >= ADULT_AGE:  # NaN too
        return rows["low"].to_numpy(float), rows["high"].to_numpy(float)
    share = min(max((age - 20) / 60, 0.0), 1.0)
    young, old = (np.log(rows[[f"{at}_low", f"{at}_high"]].to_numpy(float)) for at in ("young", "old"))
    low, high = np.exp((1 - share) * young + share * old).T
    return low * (SEX_RATIO if sex == "M" else 1), high / (SEX_RATIO if sex == "F" else 1)


def describe_limits(age: float | None = None, sex: str | None = None) -> str:
    """Describe whose limits of volume apply.

    >>> describe_limits(63.2, "F")
    'Broad limits of volume for women of 63.2 years'
    >>> describe_limits(12.0)
    'Broad limits of volume for adults of any age, since there are none for 12 years'
    """
    if age is None or np.isnan(age):
        return "Broad limits of volume for adults of any age, since the age is unknown"
    years = f"{round(age, 1):g} years"
    if age < ADULT_AGE:
        return f"Broad limits of volume for adults of any age, since there are none for {years}"
    who = {"F": "women", "M": "men"}.get(sex or "", "adults")
    return f"Broad limits of volume for {who} of {years}"


def describe_thresholds() -> dict[str, dict[str, float]]:
    """Return what the measures are held against, for sidecars."""
    measures = {name: {"caution": t.caution, "unreliable": t.unreliable} for name, t in THRESHOLDS.items()}
    return measures | {"members": {"caution": MEMBERS.caution, "unknown": MEMBERS.unreliable}}


def describe_families(members: Mapping[str, int]) -> list[str]:
    """Warn of families with too few members for their spread to be trusted; the baseline alone gives no warning.

    >>> describe_families({"mca": 5, "seed": 2})
    ['Family seed has 2 members: below 5, its spread is uncertain.']
    """
    return [
        f"Family {family} has {_count(n)}: below {MEMBERS.caution:.0f}, its spread is "
        f"{'unknown' if n == 1 else 'uncertain'}."
        for family, n in members.items()
        if n < MEMBERS.caution and family != BASELINE
    ]


def split_reasons(judged: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Reasons that all structures of a table of `judge_regions` share, which tell none from another; each one's own.

    In a table of one or two structures none are shared.

    >>> split_reasons(pd.DataFrame({"reason": ["CV 7 %; few members", "few members", "few members"]}))
    (['few members'], [['CV 7 %'], [], []])
    """
    each = [text.split(_BETWEEN) if text else [] for text in judged["reason"].fillna("")]
    shared = [text for text in each[0] if all(text in other for other in each)] if len(each) > 2 else []
    return shared, [[text for text in reasons if text not in shared] for reasons in each]


def describe_verdicts(judged: pd.DataFrame, n_named: int | None = None) -> list[str]:
    """Return a sentence for each verdict but good, the worst first, on a table of `judge_regions`.

    It gives the reasons that all structures share once, and names the first `n_named` structures (all if None) that
    have one of their own, by CV, the largest first, or by expected Dice where there is no spread, with the worst alone.
    """
    sentences = []
    shared, own = split_reasons(judged)
    judged = judged.assign(worst=[reasons[0] if reasons else None for reasons in own])
    for verdict, phrase in _PHRASES.items():
        rows = judged[judged["verdict"] == verdict]
        if "expected_dice" in rows:
            rows = rows.sort_values("expected_dice", kind="stable")
        rows = rows.sort_values("cv", ascending=False, kind="stable")
        if rows.empty:
            continue
        known = rows.dropna(subset="worst")
        named = [f"{n}, {r}" for n, r in zip(known["name"], known["worst"], strict=True)][:n_named]
        more = f" and {len(known) - len(named)} more" if len(known) > len(named) else ""
        if len(known) == len(rows) > 2 and known["worst"].nunique() == 1:
            named, more = [known["worst"].iloc[0]], ""
        told = named if verdict == "unreliable" and named else [*shared, *named]
        sentences.append(f"{len(rows)} of {len(judged)} structures {phrase}: {_BETWEEN.join(told)}{more}.")
    return sentences


N_PLACES = 3
CROWD_MM = 3.0  # standard deviation of the Gaussian that weighs a place's surroundings
APART_MM = 20.0


def look_first(
    judged: pd.DataFrame, labels: np.ndarray, error_probability: np.ndarray, affine: np.ndarray
) -> list[dict[str, Any]]:
    """Up to `N_PLACES` places to look at first: where errors crowd in the structures with the worst verdicts.

    Errors crowd where the mean error probability of the surroundings (`CROWD_MM`) is largest within a structure. Of
    structures with one verdict the most crowded comes first. No two places lie within `APART_MM`.

    Parameters
    ----------
    judged : of `judge_regions`
    labels, error_probability : (X, Y, Z), ids of the consensus, and the probability that they are wrong
    affine : (4, 4), voxel to world [mm]

    Returns
    -------
    list of dict: Structure, Index, World [mm], Voxel, Reason; the worst first

    >>> judged = pd.DataFrame({"index": [17, 53], "name": ["L", "R"], "verdict": ["good", "caution"], "reason": "CV"})
    >>> labels, wrong = np.zeros((60, 9, 9), int), np.zeros((60, 9, 9))
    >>> labels[:30], labels[30:], wrong[10], wrong[50] = 17, 53, 0.9, 0.5
    >>> [(place["Structure"], place["Voxel"][0]) for place in look_first(judged, labels, wrong, np.eye(4))]
    [('R', 50), ('L', 10)]
    """
    if not labels.any():
        return []
    zooms, (brain,) = voxel_sizes(affine), find_objects((labels > 0).view(np.uint8))
    rim = np.ceil(3 * CROWD_MM / zooms).astype(int)
    low = np.maximum([side.start for side in brain] - rim, 0)
    part = tuple(map(slice, low, [side.stop for side in brain] + rim))
    inside, crowd = labels[part], gaussian_filter(error_probability[part].astype(np.float32), CROWD_MM / zooms)
    boxes = find_objects(inside)
    candidates = []
    for row, own in zip(judged.itertuples(), split_reasons(judged)[1], strict=True):
        if row.index > len(boxes) or (box := boxes[row.index - 1]) is None:
            continue
        values = np.where(inside[box] == row.index, crowd[box], -1)
        place = np.unravel_index(values.argmax(), values.shape)
        voxel = low + [side.start for side in box] + place
        candidates.append((-list(VERDICTS).index(row.verdict), -float(values[place]), voxel, row, own))
    places: list[dict[str, Any]] = []
    for _, share, voxel, row, own in sorted(candidates, key=lambda candidate: candidate[:2]):
        world = apply_affine(affine, voxel).round(1).tolist()
        if len(places) < N_PLACES and all(math.dist(world, place["World"]) > APART_MM for place in places):
            wrong = f"around here {-100 * share:.0f} % of the labels are expected to be wrong"
            ids = {"Structure": row.name, "Index": int(row.index)}
            places.append(ids | {"World": world, "Voxel": voxel.tolist(), "Reason": _BETWEEN.join([*own[:1], wrong])})
    return places


TRAINED_VOXEL_MM = (0.5, 3.0)
MIN_CONTRAST = 0.5  # separation of white matter and cortex in pooled standard deviations
EDGE_FRACTION = 0.002  # of the labelled voxels
SATURATED_FRACTION = 0.03  # of the labelled voxels
WHITE, CORTEX = (2, 41), (3, 42)
PARCELS = 1000  # ids of the cortex from here on


def find_warnings(zooms: Sequence[float], t1w: np.ndarray, labels: np.ndarray) -> list[str]:
    """What speaks against an image of a voxel size [mm] or its consensus (FreeSurfer ids), both on the native grid."""
    return [*_check_geometry(zooms, labels), *_check_contrast(t1w, labels)]


def _check_geometry(zooms: Sequence[float], labels: np.ndarray) -> Iterator[str]:
    """Voxels finer or coarser than those of the training; a brain that the image's edge cuts."""
    low, high = TRAINED_VOXEL_MM
    if min(zooms) < low * 0.99 or max(zooms) > high * 1.01:  # a header's 0.4999999 mm is 0.5 mm
        size = " x ".join(f"{z:.2f}" for z in zooms)
        trained = f"the range of the training ({low:g} to {high:g} mm)"
        yield f"Voxels of {size} mm are outside {trained}; small structures are not to be trusted."
    faces = (labels.take(side, axis) for axis in range(3) for side in (0, -1))
    on_edge = sum(np.count_nonzero(face) for face in faces)
    if on_edge > EDGE_FRACTION * np.count_nonzero(labels):
        yield (
            f"The brain reaches the edge of the image ({on_edge:,} labelled voxels lie on it): part of it may be "
            "outside the field of view, and volumes too small."
        )


def _check_contrast(t1w: np.ndarray, labels: np.ndarray) -> Iterator[str]:
    """A contrast unlike T1 weighting, or too weak to separate the tissues; bright tissue cut off at the largest value.

    White matter is eroded by a voxel where that leaves enough of it, to keep partial volume out.
    """
    white_mask, cortex_mask = np.isin(labels, WHITE), np.isin(labels, CORTEX) | (labels >= PARCELS)
    core = binary_erosion(white_mask)
    white = np.asarray(t1w[core if core.sum() > 200 else white_mask], np.float64)
    cortex = np.asarray(t1w[cortex_mask], np.float64)
    white, cortex = white[np.isfinite(white)], cortex[np.isfinite(cortex)]
    if white.size < 50 or cortex.size < 50:
        yield "Too little white matter or cortex was found to judge the contrast of the image."
    else:
        pooled = np.sqrt((white.var() + cortex.var()) / 2)
        contrast = (white.mean() - cortex.mean()) / max(pooled, 1e-12)
        means = f"White matter ({white.mean():.4g}) is darker than cortex ({cortex.mean():.4g})"
        if contrast < 0:
            yield f"{means}: this does not look like a T1-weighted image."
        elif contrast < MIN_CONTRAST:
            yield (
                f"White matter and cortex hardly differ in brightness ({contrast:.2f} standard deviations; at least "
                f"{MIN_CONTRAST:g} is usual): noise, motion or another contrast."
            )
    share = np.mean(t1w[labels > 0] == t1w.max()) if labels.any() else 0.0
    if share > SATURATED_FRACTION:
        yield (
            f"{share:.0%} of the brain's voxels have the largest value of the image: it is saturated, and tissues "
            "cannot be told apart there. Convert the original again."
        )


MIN_IMAGES = 10
CLIP = 2.5
OUTLYING = 3.5  # Iglewicz and Hoaglin (1993), How to detect and handle outliers
_MAD = 1.4826  # times the median absolute deviation: the standard deviation of a normal distribution


def robust_distances(volumes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How far each image lies from the others, and each of its structures from what the others predict.

    Logarithms of volumes become robust z-scores (median, median absolute deviation). Their covariance is that of the
    z-scores cut at +-`CLIP`, which outliers cannot move far (Raymaekers & Rousseeuw 2021), shrunk as Ledoit & Wolf
    (2004): fewer images than structures will do. Of the Mahalanobis distances, a robust z-score is returned; above
    `OUTLYING`, an image stands out. Of simulated normal images, 8 % do among 10, 4 % among 20, 0.5 % among 50.

    Of `volumes` (R, F) of any unit, 0 counts as half the smallest other volume. Returns (R,) float64, NaN with fewer
    than `MIN_IMAGES` images; and (R, F) float64, the z-score of each structure given all others, NaN for structures of
    which more than half have one volume.

    >>> volumes = 1000 * np.exp(0.1 * np.random.default_rng(0).standard_normal((30, 4)))
    >>> volumes[7, 2] /= 3
    >>> distances, deviations = robust_distances(volumes)
    >>> np.flatnonzero(distances > OUTLYING).tolist(), int(np.abs(deviations[7]).argmax())
    ([7], 2)
    """
    from sklearn.covariance import ledoit_wolf  # the participant level needs none of it

    distances, deviations = np.full(len(volumes), np.nan), np.full(volumes.shape, np.nan)
    if len(volumes) < MIN_IMAGES:
        return distances, deviations
    smallest = np.where(volumes > 0, volumes, np.inf).min(axis=0)
    logs = np.log(np.where(volumes > 0, volumes, np.where(np.isfinite(smallest), smallest / 2, 1.0)))
    centred = logs - np.median(logs, axis=0)
    spread = _MAD * np.median(np.abs(centred), axis=0)
    known = spread > 1e-9
    if not known.any():
        return distances, deviations
    scores = centred[:, known] / spread[known]
    covariance, _ = ledoit_wolf(np.clip(scores, -CLIP, CLIP), assume_centered=True)
    precision = np.linalg.inv(covariance)
    pulls = scores @ precision
    deviations[:, known] = pulls / np.sqrt(np.diag(precision))
    distances = np.sqrt((pulls * scores).sum(axis=1))
    from_median = distances - np.median(distances)
    return from_median / max(_MAD * np.median(np.abs(from_median)), 1e-9), deviations
