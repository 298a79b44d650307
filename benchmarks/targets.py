"""Any target of a table: all features beside a few of them alone and covariates alone, and the time it takes.

    python benchmarks/targets.py nichart_muse_ad.tsv diagnosis --include "diagnosis != 'MCI'" --covariates age \
        --relative-to intracranial --alone EntorhinalArea Amygdala_R
    python benchmarks/targets.py abide_males_freesurfer.tsv group --covariates age

``--alone`` takes words; each makes a model of the features whose names hold it. Scores are those of held-out
participants, and of held-out sites where there are three or more, with 95 % intervals.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import pandas as pd
from heads import print_markdown

from bids_varaug.brainage.cohort import Cohort
from bids_varaug.brainage.features import relative_volumes
from bids_varaug.brainage.features_table import read_features_table
from bids_varaug.brainage.target import TargetEvaluation, encode_covariates, evaluate_target, prepare_target
from bids_varaug.inputs.tables import participants_where, read_variables


def evaluate(cohort: Cohort, table: Path, options: argparse.Namespace) -> TargetEvaluation:
    """Score the target's prediction from the cohort's features without augmentation."""
    variables = read_variables(table).groupby(level=0).first().reindex(cohort.people["participant_id"])
    covariates = encode_covariates(cohort, options.covariates, variables.reset_index(drop=True))
    target = variables[options.target].reset_index(drop=True)
    data = prepare_target(cohort, options.target, target, covariates, options.cv_folds)
    return evaluate_target(data, augmentations=("none",), cv_folds=options.cv_folds, seed=options.seed)


def main() -> None:
    """Print scores, the gain over covariates, and seconds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", type=Path)
    parser.add_argument("target")
    parser.add_argument("--include")
    parser.add_argument("--covariates", nargs="*", default=[])
    parser.add_argument("--relative-to")
    parser.add_argument("--alone", nargs="*", default=[])
    parser.add_argument("--cv-folds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    cohort = read_features_table(options.table, require_age=False)
    if options.include:
        wanted = participants_where([options.table], options.include)
        cohort = cohort.take(cohort.people["participant_id"].isin(wanted).to_numpy())
    if options.relative_to:
        cohort = relative_volumes(cohort, options.relative_to)
    parts = {"all features": cohort.names}
    parts |= {word: tuple(name for name in cohort.names if word in name) for word in options.alone}
    rows = []
    for what, names in parts.items():
        start = time.perf_counter()
        found = evaluate(cohort.with_features(names), options.table, options)
        seconds = time.perf_counter() - start
        print(f"{what}: {len(names)} features, {seconds:.0f} s, permutation p {found.p_value:.3f}")
        print(found.gains.round(3).to_string(index=False), flush=True)
        scores = found.scores[found.scores["measure"].isin(["auc", "balanced_accuracy", "mae", "r2"])]
        own = scores["augmentation"] == "none"
        rows.append(scores.assign(model=scores["augmentation"].where(~own, what))[own | (what == "all features")])
    table = pd.concat(rows)[["held_out", "measure", "model", "value", "low", "high", "n"]]
    print_markdown(table.set_index(["held_out", "measure", "model"]).sort_index(), digits=2)


if __name__ == "__main__":
    main()
