"""Does the ensemble's spread know where it is wrong? Beside cheap rivals, on real heads.

    python benchmarks/spread.py CACHE [--tsv rows.tsv] [--thresholds 0.25 0.33]

CACHE is a folder of `segment_heads.py`. Groups are the families of members, ``all`` trained members
but the baseline, and what was run as rivals: the baseline under random rounding (``rr``), on moved
images (``shift``) and on noisy ones (``noise``); ``ieee`` is the baseline alone. Prints Markdown:

Errors
    The area under the ROC curve of a map as a sign that a label is wrong (0.5 is chance), mean over
    heads, and its range. Of the errors of the consensus of ``all``, which is what the app shows,
    and of the group's own consensus. Over the brain: judged voxels to which the labels or that
    consensus give a structure. Maps, calibrated: ``entropy`` (of the votes), ``mutual_information``,
    ``total_entropy`` (see `bids_varaug.segmentation.fuse`); ``error_probability``, one minus the
    largest value of the mean posterior on the T1w's grid.
Unreliable, calibration
    Of voxels whose error probability is that of the mask of unreliable voxels or more (or that of
    ``--thresholds``): the share that is wrong (precision), and the share of all errors that they
    hold (recall). Expected calibration error of the mean posterior's largest probability, 15 bins
    (Naeini et al. 2015), in percent; interpolation, as of ``shift``, softens posteriors.
Structures
    Spearman's rank correlation of a structure's CV of volumes with its true relative error, and of
    its mean pairwise Dice with the consensus's Dice: over structures, mean over heads; and over
    heads within a structure, mean over structures. For ``ieee`` alone, mean error probability in the
    structure takes the place of both. Median CV, mean significant bits of volumes. Coverage: the
    share of volumes of the labels within the members' mean +- 2 SD, and the median distance from
    that mean in SD.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
from heads import MAPS, SegmentedHead, print_markdown, print_origin, read_cache, structure_scores
from sklearn.metrics import roc_auc_score

from bids_varaug.models.ensemble import BASELINE
from bids_varaug.variability.measures import (
    pairwise_dice,
    region_counts,
    significant_bits_lower,
)
from bids_varaug.variability.quality import UNRELIABLE_FROM

N_BINS = 15


def error_auc(score: np.ndarray, wrong: np.ndarray) -> float:
    """Area under the ROC curve of a score as a sign of an error; NaN where there is none, or all.

    Parameters
    ----------
    score : (V,) float
    wrong : (V,) bool
    """
    return float(roc_auc_score(wrong, score)) if 0 < wrong.sum() < wrong.size else np.nan


def calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """Mean |confidence - accuracy| over bins of confidence, weighted by their voxels.

    Parameters
    ----------
    confidence : (V,) float, 0 to 1
    right : (V,) bool

    Examples
    --------
    >>> round(calibration_error(np.array([0.9, 0.9, 0.7]), np.array([1, 1, 0], bool)), 3)
    0.3
    """
    bins = np.minimum((confidence * N_BINS).astype(int), N_BINS - 1)
    gaps = np.bincount(bins, confidence, N_BINS) - np.bincount(bins, right, N_BINS)
    return float(np.abs(gaps).sum() / len(bins))


def distance_in_sd(true: np.ndarray, volumes: np.ndarray) -> np.ndarray:
    """How far a true volume lies from the members' mean, in their SD.

    Parameters
    ----------
    true : (K,) ; volumes : (M, K), M at least 2

    Returns
    -------
    (K,) float64, infinite where the members agree and are wrong

    Examples
    --------
    >>> distance_in_sd(np.array([4.0]), np.array([[1.0], [3.0]])).round(3).tolist()
    [1.414]
    """
    away = np.abs(true - volumes.mean(axis=0))
    sd = volumes.std(axis=0, ddof=1)
    return np.where(away > 0, np.divide(away, sd, out=np.full(sd.shape, np.inf), where=sd > 0), 0)


def voxel_rows(head: SegmentedHead, thresholds: Sequence[float]) -> list[dict]:
    """Return what each map of each group says about errors: a row per group and measure, or threshold."""
    product, truth = head.map("all", "consensus"), head.truth
    rows = []
    for group in (BASELINE, *head.groups):
        own = head.map(group, "consensus")
        brain = {who: (truth >= 0) & ((truth > 0) | (labels > 0))
                 for who, labels in (("all", product), ("own", own))}  # fmt: skip
        wrong = {"all": (product != truth)[brain["all"]], "own": (own != truth)[brain["own"]]}
        for measure in ("error_probability", *(MAPS if group != BASELINE else MAPS[:1])):
            score = head.map(group, measure)
            areas = {who: error_auc(score[brain[who]], wrong[who]) for who in brain}
            rows.append({"group": group, "measure": measure, "auc": areas["all"],
                         "auc_own": areas["own"]})  # fmt: skip
        doubt, wrong = head.map(group, "error_probability")[brain["own"]].astype(np.float64), wrong["own"]
        rows.append({"group": group, "errors": 100 * wrong.mean(),
                     "calibration": 100 * calibration_error(1 - doubt, ~wrong)})  # fmt: skip
        for threshold in thresholds:
            marked = doubt >= threshold
            rows.append({"group": group, "threshold": threshold, "marked": 100 * marked.mean(),
                         "precision": 100 * wrong[marked].mean() if marked.any() else np.nan,
                         "recall": 100 * marked[wrong].mean()})  # fmt: skip
    return rows


def structure_rows(head: SegmentedHead) -> pd.DataFrame:
    """Return, for each group and structure that the labels have, spread beside true error."""
    n, judged = len(head.class_ids), head.truth >= 0
    tables = []
    for group in (BASELINE, *head.groups):
        own = head.map(group, "consensus")
        table = structure_scores(head, own).assign(group=group)
        table["error"] = (table["volume"] / table["reference"] - 1).abs()
        there = table.index  # of the structures that the labels have
        if group == BASELINE:
            sums = np.bincount(own, head.map(group, "error_probability").astype(float), n)[1:]
            table["spread"] = (sums / np.maximum(np.bincount(own, minlength=n)[1:], 1))[there]
            table["overlap"] = -table["spread"]
        else:
            members = np.ascontiguousarray(head.labels[head.of_family(group)][:, judged])
            counts = region_counts([members], len(members), n)
            volumes, dice = counts.volumes[:, 1:][:, there], pairwise_dice(counts)[..., 1:]
            pairs = combinations(range(len(members)), 2)
            table["spread"] = head.variation(group).to_numpy()[there]
            table["overlap"] = np.mean([dice[pair] for pair in pairs], axis=0)[there]
            true = table["reference"].to_numpy() / head.voxel_volume
            table["distance"] = distance_in_sd(true, volumes)
            table["bits"] = significant_bits_lower(volumes)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def summarise_structures(rows: pd.DataFrame) -> pd.DataFrame:
    """Rank correlations and coverage by group, of `structure_rows` with the name of the head."""
    found = {}
    for group, part in rows.groupby("group", sort=False):
        entry = {}
        for column, key in (("over structures", "head"), ("over heads", "structure")):
            for title, (a, b) in {"CV, error": ("spread", "error"),
                                  "pair Dice, Dice": ("overlap", "dice")}.items():  # fmt: skip
                each = [some[a].corr(some[b], "spearman", min_periods=3)
                        for _, some in part.groupby(key)]  # fmt: skip
                entry[f"{title}: {column}"] = pd.Series(each).mean()
        if group != BASELINE:
            entry["CV, %"] = 100 * part["spread"].median()
            entry["bits"] = part["bits"].mean()
            entry["coverage, %"] = 100 * (part["distance"] <= 2).mean()
            entry["distance, SD"] = part["distance"].median()
        found[group] = entry | {"volumes": len(part)}
    return pd.DataFrame.from_dict(found, orient="index").rename_axis("group")


def main() -> None:
    """Parse the command line and print the tables, for each group of people."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cache", type=Path)
    parser.add_argument("--tsv", type=Path, help="where a row per head, group and map goes")
    parser.add_argument("--thresholds", type=float, nargs="+", default=[UNRELIABLE_FROM])
    options = parser.parse_args()
    heads = [head for head in read_cache(options.cache) if head.head.protocol]
    voxels, structures = [], []
    for head in heads:
        who = {"people": head.people, "head": head.head.name}
        voxels += [who | row for row in voxel_rows(head, options.thresholds)]
        structures.append(structure_rows(head).assign(**who))
    voxels, structures = pd.DataFrame(voxels), pd.concat(structures, ignore_index=True)
    if options.tsv:
        voxels.to_csv(options.tsv, sep="\t", index=False, float_format="%.4f")
    title = "Does the spread know where it is wrong?"
    print_origin(title, heads[0].ensemble, [head.head for head in heads])
    numbers = ", ".join(f"{group} {heads[0].of_family(group).sum()}" for group in heads[0].groups)
    print(f"Passes of each group: {numbers}; of `ieee` one.\n")
    for people, part in voxels.groupby("people", sort=False):
        print(f"## {people}: {part['head'].nunique()} heads\n")
        areas = part.dropna(subset="measure").groupby(["group", "measure"], sort=False)
        print("Area under the ROC curve for errors:\n")
        print_markdown(areas.agg(**{
            "app's consensus": ("auc", "mean"), "least": ("auc", "min"), "most": ("auc", "max"),
            "own consensus": ("auc_own", "mean"),
        }))  # fmt: skip
        rest = part[part["errors"].notna()].groupby("group", sort=False)
        print("Errors, percent of the brain, and calibration error, mean over heads:\n")
        print_markdown(rest[["errors", "calibration"]].mean(), digits=1)
        masks = part.dropna(subset="threshold").groupby(["group", "threshold"], sort=False)
        print("Unreliable voxels, percent of the brain, mean over heads and the least:\n")
        print_markdown(masks.agg(**{
            "marked": ("marked", "mean"), "precision": ("precision", "mean"), "least precision": ("precision", "min"),
            "recall": ("recall", "mean"), "least recall": ("recall", "min"),
        }), digits=1)  # fmt: skip
        print("Structures:\n")
        print_markdown(summarise_structures(structures[structures["people"] == people]))


if __name__ == "__main__":
    main()
