"""Minimum Dice between members on real heads, beside published tables, by the same rules.

    python benchmarks/minimum_dice.py CACHE PAPER_TABLES [--n-members 5] [--tsv rows.tsv]

CACHE is a folder of `segment_heads.py`; PAPER_TABLES holds the tables of minimum Dice per person
and region that came with arXiv:2509.05238 (``cnn_training_variability``), arXiv:2308.01939
(``structural_mri_uncertainty``) and Fuzzy PyTorch, arXiv:2605.25991 (``fuzzy-pytorch``).

The rules: for each head and structure the smallest Dice over all pairs of a family's first members
(`region_table`), on the network's grid; only structures that the ensemble and the published table
both have; where it is 0 or missing, the structure is absent, from a member or from the person, and
left out on both sides; mean over structures, then over people (of a person's scans: their mean).
Cortical regions of the published tables (``ctx-``), which the ensemble does not have, stand apart.
Members, people and scanners differ, so nothing but the order of magnitude can be compared.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import chain, combinations
from pathlib import Path

import numpy as np
import pandas as pd
from heads import SegmentedHead, print_markdown, print_origin, read_cache

from bids_varaug.variability.measures import RegionCounts, pairwise_dice

PUBLISHED = {
    "training": {
        "cnn_training_variability/freesurfer_min_dice.csv": "FreeSurfer, Monte Carlo arithmetic",
        "cnn_training_variability/mca_fast_corr_epoch9.csv": "FastSurfer, mca, epoch 9",
        "cnn_training_variability/rdn_fast_corr_epoch9.csv": "FastSurfer, seeds, epoch 9",
        "cnn_training_variability/rdn_fast_corr_epoch70.csv": "FastSurfer, seeds, epoch 70",
        "cnn_training_variability/rdn_fast_test.csv": "FastSurfer, seeds, in distribution",
        "cnn_training_variability/weights_fast_corr_epoch9.csv": "FastSurfer, weights, epoch 9",
        "cnn_training_variability/weights_fast_corr_epoch70.csv": "FastSurfer, weights, epoch 70",
    },
    "inference": {
        "structural_mri_uncertainty/fs_min_dice_scores.csv": "FreeSurfer, random rounding",
        "structural_mri_uncertainty/fast_min_dice_scores.csv": "FastSurfer, random rounding",
        **{f"fuzzy-pytorch/{variant}_min_dice_scores.csv": f"FastSurfer, {variant}"
           for variant in ("default", "ieee", "fuzzy", "fuzzy_sr", "fuzzy_ud", "verrou_sr",
                           "verrou_ud")},
    },
}  # fmt: skip
FAMILIES = {"training": ["mca", "seed"], "inference": ["rr"]}


def minimum_dice(counts: RegionCounts, members: Sequence[int]) -> np.ndarray:
    """Smallest Dice over the pairs of some members, (K - 1,) float64; NaN where one lacks it all.

    Parameters
    ----------
    counts : of all members; background is the first class
    members : their places in `counts`, two or more
    """
    dice = pairwise_dice(counts)[..., 1:]
    least = np.min([dice[pair] for pair in combinations(members, 2)], axis=0)
    return np.where(least > 0, least, np.nan)


def mean_over_people(table: pd.DataFrame, columns: Sequence[str]) -> dict[str, float]:
    """Mean over columns, then over people, without what is 0 or missing.

    Parameters
    ----------
    table : a row per head, with its ``subjectID``, a column per structure

    Returns
    -------
    people, regions, minimum Dice, left out (values)
    """
    values = table[list(columns)].where(table[list(columns)] > 0)
    by_person = values.groupby(table["subjectID"]).mean()
    return {"people": len(by_person), "regions": len(columns),
            "minimum Dice": float(by_person.mean(axis=1).mean()),
            "left out": int(values.isna().sum().sum())}  # fmt: skip


def head_table(heads: Sequence[SegmentedHead], family: str, n_members: int) -> pd.DataFrame:
    """Return minimum Dice of a family's first members: a row per head, a column per structure."""
    rows = []
    for head in heads:
        members = np.flatnonzero(head.of_family(family))[:n_members]
        pairs = head.intersections
        diagonal = np.arange(len(pairs))
        least = minimum_dice(RegionCounts(pairs[diagonal, diagonal], pairs), members)
        who = {"subjectID": head.head.participant, "head": head.head.name, "members": len(members)}
        rows.append(who | dict(zip(head.names, least, strict=True)))
    return pd.DataFrame(rows)


def main() -> None:
    """Parse the command line and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cache", type=Path)
    parser.add_argument("tables", type=Path)
    parser.add_argument("--n-members", type=int, default=5)
    parser.add_argument("--tsv", type=Path)
    options = parser.parse_args()
    heads = read_cache(options.cache)
    names = heads[0].names
    published = {
        kind: {title: pd.read_csv(options.tables / file) for file, title in files.items()}
        for kind, files in PUBLISHED.items()
    }
    print_origin("Minimum Dice between members", heads[0].ensemble, [head.head for head in heads])
    ours = {
        family: head_table([h for h in heads if family in h.groups], family, options.n_members)
        for family in chain(*FAMILIES.values()) if any(family in h.groups for h in heads)
    }  # fmt: skip
    for kind, families in FAMILIES.items():
        tables = published[kind]
        shared = [name for name in names if all(name in table for table in tables.values())]
        rows = {}
        for family in (family for family in families if family in ours):
            numbers = "/".join(map(str, sorted(ours[family]["members"].unique())))
            rows[f"`{family}`, {numbers} members"] = mean_over_people(ours[family], shared)
        for title, table in tables.items():
            rows[title] = mean_over_people(table, shared)
            cortex = [column for column in table if column.startswith("ctx-")]
            if cortex:
                rows[title]["cortical"] = mean_over_people(table, cortex)["minimum Dice"]
        missing = [name for name in names if name not in shared]
        print(f"Perturbed {kind}. Not in all published tables: {', '.join(missing) or '-'}.\n")
        print_markdown(pd.DataFrame.from_dict(rows, orient="index").rename_axis("ensemble"), 5)
    print("By structure, mean over heads:\n")
    by_structure = pd.DataFrame({family: table[names].mean() for family, table in ours.items()})
    print_markdown(by_structure.rename_axis("structure"), digits=5)
    if options.tsv:
        pd.concat(ours, names=["family"]).to_csv(options.tsv, sep="\t", float_format="%.5f")


if __name__ == "__main__":
    main()
