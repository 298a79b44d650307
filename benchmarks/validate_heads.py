"""Accuracy on real heads: Dice, volumes and their slope with age, equal members, scan and rescan.

    python benchmarks/validate_heads.py CACHE [--adults ADULTS.tsv] [--margin 0.01] [--tsv rows.tsv]
        [--title "Accuracy on real heads"]

CACHE is a folder of `segment_heads.py`. Prints Markdown: mean Dice of every member and of the
consensus by head and by group of people (dataset and age), whether members are equally good, and
for each structure

Dice
    of the consensus, mean over people;
ratio
    volume of the consensus over that of the labels, median over people;
slope
    least-squares slope of that ratio with age, per ten years, with its 95 % confidence interval;
scan and rescan
    of the people scanned twice, how much a volume differs between the scans, over its mean, beside
    the same of the labels, and beside what the ensemble's SD makes one expect: sqrt(2) SD / mean.

A person scanned twice counts once, with the means of the scans. Volumes are counted in judged
voxels of the T1w's grid. ``--tsv`` writes a row for each head, segmentation and structure.

With ``--adults``, FreeSurfer's volumes (mm3) and ages of people without disease, for example
fcon1000_freesurfer.tsv of the 1000 Functional Connectomes (Biswal et al. 2010; Rutherford et al.
2022, eLife 11:e72904): the median volume of our heads, with labels or without, over that of the
adults, and the median of their percentiles among them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from heads import SegmentedHead, print_markdown, print_origin, read_cache, structure_scores
from scipy import stats

from bids_varaug.inputs.freesurfer import MEASURES, RENAMED
from bids_varaug.models.ensemble import BASELINE

ADULT_YEARS = 18
CONSENSUS = "consensus"


def score_head(head: SegmentedHead) -> pd.DataFrame:
    """Score every trained member and the consensus of every group.

    Returns
    -------
    DataFrame, a row per segmentation and structure that the labels have
        head, participant, age, dataset, group, who, and the columns of `structure_scores`
    """
    found = {row.id: head.labels[row.Index] for row in head.passes.itertuples() if row.trained}
    found |= {f"{CONSENSUS} {group}": head.map(group, "consensus") for group in head.groups}
    tables = {who: structure_scores(head, labels) for who, labels in found.items()}
    table = pd.concat(tables, names=["who"]).reset_index("who")
    return table.assign(head=head.head.name, participant=head.head.participant, age=head.head.age,
                        dataset=head.head.dataset, group=head.people)  # fmt: skip


def by_person(rows: pd.DataFrame) -> pd.DataFrame:
    """Average the scans of a person: Dice, and the ratio of volumes."""
    rows = rows.assign(ratio=rows["volume"] / rows["reference"])
    keys = ["dataset", "group", "participant", "who", "structure"]
    return rows.groupby(keys, sort=False)[["age", "dice", "ratio"]].mean().reset_index()


def slope_with_age(age: np.ndarray, ratio: np.ndarray) -> tuple[float, float, float]:
    """Least-squares slope of a ratio with age, per ten years.

    Parameters
    ----------
    age : (N,) years, N at least 3
    ratio : (N,)

    Returns
    -------
    slope, low, high : with the limits of its 95 % confidence interval

    Examples
    --------
    >>> slope, low, high = slope_with_age(np.array([20, 40, 60]), np.array([1.0, 1.2, 1.4]))
    >>> round(float(slope), 6)
    0.1
    """
    fit = stats.linregress(age, ratio)
    half = stats.t.ppf(0.975, len(age) - 2) * fit.stderr
    return 10 * fit.slope, 10 * (fit.slope - half), 10 * (fit.slope + half)


def equivalence(differences: np.ndarray, margin: float) -> dict[str, float]:
    """Two one-sided t-tests (Schuirmann 1987) that a mean difference is below a margin.

    Parameters
    ----------
    differences : (N,) of the same unit as `margin`, N at least 2

    Returns
    -------
    difference (mean), low, high (its 90 % confidence interval), p

    Examples
    --------
    >>> equivalence(np.array([0.001, -0.001, 0.002, 0.0]), 0.01)["p"] < 0.05
    True
    """
    sem = stats.sem(differences)
    low, high = stats.t.interval(0.9, len(differences) - 1, differences.mean(), sem)
    sides = ((-margin, "greater"), (margin, "less"))
    p = max(stats.ttest_1samp(differences, m, alternative=side).pvalue for m, side in sides)
    return {"difference": float(differences.mean()), "low": low, "high": high, "p": float(p)}


def equivalence_table(people: pd.DataFrame, margin: float) -> pd.DataFrame:
    """Each trained member's mean Dice minus the baseline's, over people."""
    means = people.groupby(["participant", "who"], sort=False)["dice"].mean().unstack()
    members = [who for who in means if who != BASELINE and not who.startswith(CONSENSUS)]
    rows = {m: equivalence((means[m] - means[BASELINE]).to_numpy(), margin) for m in members}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("member")


def structure_table(people: pd.DataFrame) -> pd.DataFrame:
    """Dice and ratio of the consensus of all by structure and group, and the slope with age."""
    ours = people[people["who"] == f"{CONSENSUS} all"]
    columns = {}
    for group, part in ours.groupby("group", sort=False):
        by_structure = part.groupby("structure", sort=False)
        columns[f"{group}: Dice"] = by_structure["dice"].mean()
        columns[f"{group}: ratio"] = by_structure["ratio"].median()
    for dataset, part in ours[ours["age"].notna()].groupby("dataset", sort=False):
        slopes = {}
        for name, some in part.groupby("structure", sort=False):
            if len(some) > 2:
                fit = slope_with_age(some["age"].to_numpy(float), some["ratio"].to_numpy(float))
                slopes[name] = "{:+.3f} ({:+.3f} to {:+.3f})".format(*fit)
        if slopes:
            n_people = part["participant"].nunique()
            columns[f"{dataset}: slope, n = {n_people}"] = pd.Series(slopes)
    return pd.DataFrame(columns).rename_axis("structure")


def rescan_table(pair: Sequence[SegmentedHead], rows: pd.DataFrame) -> pd.DataFrame:
    """Compare two scans of one person: relative differences of volumes, in percent."""
    same = rows["participant"] == pair[0].head.participant
    ours = rows[same & (rows["who"] == f"{CONSENSUS} all")]
    columns = {}
    for title, key in ((CONSENSUS, "volume"), ("labels", "reference")):
        values = ours.pivot(index="structure", columns="head", values=key)
        columns[title] = 100 * np.ptp(values, axis=1) / values.mean(axis=1)
    for group in pair[0].groups:
        spread = sum(head.variation(group) for head in pair) / len(pair)
        columns[f"sqrt(2) SD, {group}"] = 100 * np.sqrt(2) * spread
    table = pd.DataFrame(columns).rename_axis("structure")
    table.loc["median"] = table.median()
    return table


def adults_table(heads: Sequence[SegmentedHead], adults: pd.DataFrame) -> pd.DataFrame:
    """Compare the consensus's volumes with those of a table of adults: a row per structure."""
    ours = pd.DataFrame([
        np.bincount(head.map("all", "consensus"), minlength=len(head.class_ids))[1:]
        * head.voxel_volume for head in heads
    ], columns=heads[0].names)  # fmt: skip
    rows = {}
    for name in ours.columns.intersection(adults.columns):
        medians = {"adults": adults[name].median(), "ours": ours[name].median()}
        percentiles = [100 * (adults[name] < volume).mean() for volume in ours[name]]
        rows[name] = medians | {"ratio": medians["ours"] / medians["adults"],
                                "percentile": np.median(percentiles)}  # fmt: skip
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("structure")


def main() -> None:
    """Parse the command line and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cache", type=Path)
    parser.add_argument("--margin", type=float, default=0.01, help="Dice that does not matter")
    parser.add_argument("--adults", type=Path)
    parser.add_argument("--tsv", type=Path)
    parser.add_argument("--title", default="Accuracy on real heads")
    options = parser.parse_args()
    everybody = read_cache(options.cache)
    heads = [head for head in everybody if head.head.protocol]
    rows = pd.concat([score_head(head) for head in heads], ignore_index=True)
    if options.tsv:
        rows.to_csv(options.tsv, sep="\t", index=False, float_format="%.6g")
    people = by_person(rows)
    print_origin(options.title, heads[0].ensemble, [head.head for head in heads])
    sizes = rows.groupby("group", sort=False).agg(
        heads=("head", "nunique"), people=("participant", "nunique"),
        youngest=("age", "min"), oldest=("age", "max"),
    )  # fmt: skip
    print_markdown(sizes, digits=0)
    print("Mean Dice over the structures that the labels have, mean over people:\n")
    means = people.groupby(["who", "group", "participant"], sort=False)["dice"].mean()
    print_markdown(means.groupby(["who", "group"], sort=False).mean().unstack())
    print("The same by head:\n")
    by_head = rows.groupby(["head", "who"], sort=False)["dice"].mean().unstack()
    print_markdown(by_head[rows["who"].unique()])
    if people["participant"].nunique() > 1:
        print(f"Members minus `{BASELINE}`, mean Dice over people, 90 % confidence interval, p of "
              f"a difference of {options.margin} or more:\n")  # fmt: skip
        print_markdown(equivalence_table(people, options.margin), digits=4)
    print("The consensus of all trained members, by structure; slopes per ten years, with 95 % "
          "confidence intervals:\n")  # fmt: skip
    print_markdown(structure_table(people))
    for participant in people["participant"].unique():
        pair = [head for head in heads if head.head.participant == participant]
        if len(pair) > 1:
            print(f"Scans of {participant}, relative difference of volumes in percent:\n")
            print_markdown(rescan_table(pair, rows), digits=2)
    if options.adults:
        adults = pd.read_csv(options.adults, sep="\t").rename(columns=MEASURES | RENAMED)
        adults = adults[adults["age"] >= ADULT_YEARS]
        print(f"Volumes in mm3, {len(everybody)} heads among {len(adults)} adults:\n")
        print_markdown(adults_table(everybody, adults), digits=2)


if __name__ == "__main__":
    main()
