"""How often gains are found where there are none, and where there are some; how often intervals hold the truth.

    python benchmarks/gains.py --studies 200 --n 200 --kinds null
    python benchmarks/gains.py --studies 60 --n 200 --kinds truth --noise 0.5 0.7 1

Cohorts are simulated: features that follow age, seen through numerical noise of a known size (`--noise`, in standard
deviations of the person-to-person variation at one age).

null
    The members carry nothing: their mean has as much noise as the baseline, since all share it, and little of their
    own.
truth
    Every member has noise of its own, so that averaging takes most of it away.

A cohort's gain is, on average over cohorts, the expected gain of models trained on so many people. Its mean over all
cohorts is therefore the truth that intervals should hold. ``plain`` intervals take the fitted models as given.
``error`` is the mean standard error that intervals rest on, ``SD`` that of the gain over cohorts, which it should be;
``known`` how often the gain would help if that SD were known and the same correction for several augmentations were
made.
"""

from __future__ import annotations

import argparse
from itertools import product

import numpy as np
import pandas as pd
from scipy.stats import norm, t

from bids_varaug.brainage.cohort import Cohort
from bids_varaug.brainage.evaluate import compare_losses, make_splits
from bids_varaug.brainage.models import fit_estimator, predict_ages

AUGMENTATIONS = ("none", "mean", "members")


def simulate(n: int, noise: float, shared: bool, seed: int, members: int = 10, features: int = 10) -> Cohort:
    """A cohort with noise that all members share (the null), or that each has of its own."""
    rng = np.random.default_rng(seed)
    age = rng.uniform(20, 80, n)
    slopes = np.random.default_rng(0).normal(0, 0.05, features)
    true = age[:, None] * slopes + rng.standard_normal((n, features))
    baseline = true + noise * rng.standard_normal((n, features))
    versions = true[:, None] + noise * rng.standard_normal((n, 1 if shared else members, features))
    versions = versions + 0.3 * noise * rng.standard_normal((n, members, features))
    people = pd.DataFrame({"participant_id": [f"sub-{i:04d}" for i in range(n)], "session_id": None})
    people = people.assign(observation=people["participant_id"], age=age, sex=None, site=None)
    names, ids = tuple(f"f{i}" for i in range(features)), tuple(f"mca{m:02d}" for m in range(members))
    return Cohort(people, names, baseline, versions, ids)


def evaluate(cohort: Cohort, model: str, folds: int, repeats: int, seed: int) -> pd.DataFrame:
    """Gains of one study, as the group level finds them."""
    tables = []
    for split in make_splits(cohort, folds, seed, gain_repeats=repeats):
        train, test = cohort.take(split.train), cohort.take(split.test)
        for augmentation in AUGMENTATIONS:
            estimator, _ = fit_estimator(train, model, augmentation, split.seed)
            loss = np.abs(predict_ages(estimator, test, augmentation) - test.age)
            ids = test.people[["participant_id"]].assign(augmentation=augmentation, loss=loss, n_train=len(train))
            tables.append(split.label(ids))
    return compare_losses(pd.concat(tables))


def main() -> None:
    """Print, for null and truth, how often each part helps, and how often intervals hold the mean gain."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--studies", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="seed of the first study")
    parser.add_argument("--n", type=int, nargs="+", default=[200])
    parser.add_argument("--noise", type=float, nargs="+", default=[0.5])
    parser.add_argument("--kinds", nargs="+", choices=("null", "truth"), default=["null", "truth"])
    parser.add_argument("--model", default="ridge")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    wider = np.sqrt(1 / options.repeats + options.folds / (options.folds - 1))
    rows = []
    for n, noise, kind in product(options.n, options.noise, options.kinds):
        studies = [
            evaluate(simulate(n, noise, kind == "null", seed), options.model, options.folds, options.repeats, seed)
            for seed in range(options.first, options.first + options.studies)
        ]
        for part, gains in pd.concat(studies).groupby("part"):
            truth, half, sd = gains["gain"].mean(), (gains["high"] - gains["low"]) / 2, gains["gain"].std()
            off, tried = (gains["gain"] - truth).abs(), len(AUGMENTATIONS) - 1
            rows.append({
                "kind": kind, "n": n, "noise": noise, "part": part, "studies": options.studies, "gain": truth, "SD": sd,
                "error": (half / t.ppf(0.975, n - 1)).mean(), "helps": (gains["effect"] == "helps").mean(),
                "harms": (gains["effect"] == "harms").mean(), "holds": (off <= half).mean(),
                "plain holds": (off <= half / wider).mean(),
                "known": (gains["gain"] > norm.isf(0.025 / tried) * sd).mean(),
            })  # fmt: skip
        print(pd.DataFrame(rows).round(3).to_string(index=False), flush=True)


if __name__ == "__main__":
    main()
