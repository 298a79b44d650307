"""How many people of a table get a warning for their volumes: false alarms, if they are healthy.

    python benchmarks/plausible_volumes.py ADULTS.tsv

ADULTS.tsv holds FreeSurfer's volumes (mm3), ages and sexes of people without disease, for example
fcon1000_freesurfer.tsv of the 1000 Functional Connectomes (Biswal et al. 2010; Rutherford et al.
2022, eLife 11:e72904). Everybody from 18 years on is judged four times by
`bids_varaug.variability.quality`: as of unknown age, by age, by age and sex, and as if 22 years old
(what limits by age can find). Only volumes and asymmetries count, since these people have one
segmentation each.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd

from bids_varaug.inputs.freesurfer import MEASURES, RENAMED
from bids_varaug.training.labels import load_scheme
from bids_varaug.variability.quality import ADULT_AGE, judge_regions

BINS = (18, 30, 50, 70, 100)  # years


def judge(person: pd.Series, structures: dict[int, str], age, sex) -> pd.DataFrame:
    """Verdicts on one person, as if many members had agreed on tiny voxels."""
    regions = pd.DataFrame({"index": structures.keys(), "name": structures.values()})
    regions["volume_mean"] = person[list(structures.values())].to_numpy(float)
    return judge_regions(regions, {"seed": 10}, 1e-3, age, sex)


def main() -> None:
    """Parse the command line and print the shares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("adults", type=Path)
    adults = pd.read_csv(parser.parse_args().adults, sep="\t").rename(columns=MEASURES | RENAMED)
    adults = adults[adults["age"] >= ADULT_AGE]
    scheme = load_scheme()
    ids = dict(zip(scheme.target_ids, scheme.target_names, strict=True))
    structures = {int(i): name for i, name in ids.items() if name in adults}
    print(f"{len(adults)} adults, {len(structures)} structures; people with a warning:")
    groups = np.digitize(adults["age"], BINS)
    for what in ("age unknown", "by age", "by age and sex", "as 22 years old"):
        worst, hit = [], Counter()
        for _, person in adults.iterrows():
            age = {"age unknown": None, "as 22 years old": 22.0}.get(what, person["age"])
            judged = judge(person, structures, age, person["sex"] if "sex" in what else None)
            odd = judged[judged["verdict"] != "good"]
            hit.update(odd["name"].str.removeprefix("Left-").str.removeprefix("Right-").unique())
            worst.append(2 * (odd["verdict"] == "unreliable").any() + bool(len(odd)))
        worst = np.array(worst)
        shares = [f"{(worst[groups == g] > 0).mean():.1%}" for g in np.unique(groups)]
        print(f"{what}: {(worst > 0).sum()} ({(worst > 0).mean():.1%}), {(worst > 1).sum()} "
              f"with an unreliable structure; at {BINS} years {', '.join(shares)}\n"
              f"  {dict(hit.most_common(6))}")  # fmt: skip


if __name__ == "__main__":
    main()
