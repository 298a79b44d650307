"""How far is the expected Dice from the true one? Fit it on synthetic heads, check it on real ones.

    python benchmarks/expected_dice.py SYNTHETIC_CACHE [REAL_CACHE] [--write ENSEMBLE]

Both are folders of `segment_heads.py`; the first of heads of `synthetic_heads.py`, drawn from label
maps that training left out. ``--write`` puts the coefficients into the ensemble's manifest. Prints
Markdown, for the consensus of all trained members and for ``ieee`` alone, by data set (heads of a
folder that is no BIDS dataset are one each):

error, bias
    mean absolute and mean difference of expected and true Dice;
rank, pooled rank
    Spearman's rank correlation over structures, mean over heads; and over all structures of all
    heads;
coverage
    share of the true Dice within the interval, percent.

``closed form`` is the soft Dice as it is, ``synthetic`` what is shipped (for synthetic heads fitted
with their label map left out), ``real`` a fit on the real heads of the other data sets: it shows
what labels of their protocols would give, and must not be shipped, for its data's licences.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from heads import SegmentedHead, print_markdown, print_origin, read_cache, structure_scores

from bids_varaug.models.ensemble import BASELINE, Quality, load_ensemble, write_manifest
from bids_varaug.variability.expected_dice import COVERAGE, expected_dice, fit_dice_model
from bids_varaug.variability.measures import RegionCounts, pairwise_dice

SYNTHETIC = "synthetic"


def head_rows(head: SegmentedHead, group: str) -> pd.DataFrame:
    """Return what a segmentation says of its structures beside their true Dice: a row for each."""
    trained = head.of_family(group)[: len(head.intersections)]
    counts = head.intersections[np.ix_(trained, trained)][..., 1:]
    volumes = np.einsum("aak->ak", counts)
    pairs = pairwise_dice(RegionCounts(volumes, counts))[np.triu_indices(len(counts), 1)]
    coarser = max(head.voxel_volume, head.network_voxel_volume)
    table = pd.DataFrame({
        "soft_dice": head.soft_dice(group)[1:],
        "pair_dice": pairs.mean(axis=0) if len(pairs) else np.nan,
        "voxels": volumes.mean(axis=0) * head.network_voxel_volume / coarser,
    })  # fmt: skip
    scores = structure_scores(head, head.map(group, "consensus"))
    is_bids = head.head.name.startswith("sub-")
    return scores.join(table).assign(
        head=head.head.name, dataset=head.head.dataset if is_bids else head.head.name, map=head.head.name.split("x")[0]
    )


def distinct(heads: list[SegmentedHead]) -> list[SegmentedHead]:
    """Leave out heads that are another one again: ``t1`` is ``sharp`` where no lower resolution was drawn."""
    names = [head.head.name.rpartition("x")[0] or head.head.name for head in heads]  # without the kind
    keys = [(name, head.soft_dice("all").tobytes()) for name, head in zip(names, heads, strict=True)]
    return [head for n, head in enumerate(heads) if keys.index(keys[n]) == n]


def predict(fitted: pd.DataFrame, rows: pd.DataFrame, group: str) -> pd.DataFrame:
    """Return the expected Dice of `rows`, of a model fitted on others, by their label maps or data sets."""
    columns = ["soft_dice", "pair_dice", "voxels"]
    soft, pairs, voxels = (fitted[name].to_numpy() for name in columns)
    groups = fitted["map" if fitted["dataset"].nunique() == 1 else "dataset"].to_numpy()
    model = fit_dice_model(soft, None if group == BASELINE else pairs, voxels, fitted["dice"].to_numpy(), groups)
    quality = Quality(model, model, COVERAGE, tuple(fitted["head"].unique()))
    return expected_dice(quality, *(rows[name].to_numpy() for name in columns)).set_index(rows.index)


def compare(rows: pd.DataFrame, group: str) -> dict[str, pd.DataFrame]:
    """Return expected and true Dice of all rows, by the way it is expected."""
    is_real = rows["dataset"] != SYNTHETIC
    synthetic, real = rows[~is_real], rows[is_real]
    closed = expected_dice(None, *(rows[name].to_numpy() for name in ("soft_dice", "pair_dice", "voxels")))
    left_out = [predict(synthetic[synthetic["map"] != m], part, group) for m, part in synthetic.groupby("map")]
    found = {"closed form": closed.set_index(rows.index)}
    if len(real):
        left_out.append(predict(synthetic, real, group))
    found[SYNTHETIC] = pd.concat(left_out)
    if real["dataset"].nunique() > 2:
        parts = [predict(real[real["dataset"] != d], part, group) for d, part in real.groupby("dataset")]
        found["real"] = pd.concat(parts)
    return {way: rows.join(expected, how="inner") for way, expected in found.items()}


def summarise(rows: pd.DataFrame) -> dict[str, float]:
    """Compare expected and true Dice."""
    errors = rows["expected_dice"] - rows["dice"]
    ranks = [part["expected_dice"].corr(part["dice"], "spearman") for _, part in rows.groupby("head")]
    inside = rows["dice"].between(rows["expected_dice_low"], rows["expected_dice_high"])
    return {
        "heads": len(ranks), "Dice": rows["dice"].mean(), "error": errors.abs().mean(), "bias": errors.mean(),
        "rank": np.mean(ranks), "pooled rank": rows["expected_dice"].corr(rows["dice"], "spearman"),
        "coverage": 100 * inside.mean() if rows["expected_dice_low"].notna().any() else np.nan,
    }  # fmt: skip


def print_comparison(rows: pd.DataFrame, group: str) -> None:
    """Print a row for each data set and way, and for all real ones together."""
    table = {}
    for way, found in compare(rows, group).items():
        parts = dict(list(found.groupby("dataset")))
        if len(parts) > 2:
            parts["all real"] = found[found["dataset"] != SYNTHETIC]
        table |= {(dataset, way): summarise(part) for dataset, part in parts.items()}
    print_markdown(pd.DataFrame.from_dict(table, orient="index").rename_axis(["data", "way"]).sort_index())


def main() -> None:
    """Parse the command line, print the tables, and write the coefficients if wanted."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("synthetic", type=Path)
    parser.add_argument("real", type=Path, nargs="?")
    parser.add_argument("--write", metavar="ENSEMBLE", help="name or folder")
    parser.add_argument("--tsv", type=Path, help="where a row per head, group and structure goes")
    options = parser.parse_args()
    drawn = distinct(read_cache(options.synthetic))
    real = [head for head in read_cache(options.real) if head.head.protocol] if options.real else []
    print_origin("Expected Dice", drawn[0].ensemble, [head.head for head in (*drawn, *real)])
    models, tables = {}, []
    for group, title in {"all": "Consensus of all", BASELINE: f"`{BASELINE}` alone"}.items():
        synthetic = pd.concat([head_rows(head, group) for head in drawn]).assign(dataset=SYNTHETIC)
        rows = pd.concat([synthetic, *(head_rows(head, group) for head in real)], ignore_index=True)
        print(f"## {title}\n")
        print_comparison(rows, group)
        columns = (synthetic[name].to_numpy() for name in ("soft_dice", "pair_dice", "voxels", "dice", "map"))
        soft, pairs, voxels, dice, maps = columns
        models[group] = fit_dice_model(soft, None if group == BASELINE else pairs, voxels, dice, maps)
        print(f"Shipped: {models[group]}\n")
        tables.append(rows.assign(group=group))
    if options.tsv:
        pd.concat(tables).to_csv(options.tsv, sep="\t", index=False, float_format="%.5g")
    if options.write:
        heads = tuple(head.head.name for head in drawn)
        quality = Quality(models["all"], models[BASELINE], COVERAGE, heads)
        write_manifest(replace(load_ensemble(options.write), quality=quality))


if __name__ == "__main__":
    main()
