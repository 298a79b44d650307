"""Time and memory of the parts of the group level, each beside the plain way to do it.

    python benchmarks/group.py gather --participants 5000 --members 22
    python benchmarks/group.py table --participants 50000 --members 21 [--file made_before.tsv]
    python benchmarks/group.py augmentation --participants 1000 --members 20
    python benchmarks/group.py study --participants 50000 --members 21

Data are made up and written to a temporary directory first. Files were just written, so that
reading them is from the page cache. Every part prints wall seconds, processor seconds (what counts
where the machine is shared) and the peak memory of this process.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from bids_varaug.brainage.cohort import Cohort
from bids_varaug.brainage.evaluate import evaluate_brain_age
from bids_varaug.brainage.features_table import read_features_table
from bids_varaug.brainage.gather import gather_cohort
from bids_varaug.brainage.models import fit_brain_age, fit_estimator
from bids_varaug.brainage.variability import numerical_covariance, numerical_variability
from bids_varaug.derivatives.io import ENDING
from bids_varaug.inputs.participants import read_people
from bids_varaug.models.ensemble import load_ensemble


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Print how long the block took, and the peak memory of the process so far."""
    start, start_cpu = time.perf_counter(), time.process_time()
    yield
    wall, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{what:48} {wall:8.2f} s wall {cpu:8.2f} s cpu   peak {peak:6.2f} GiB", flush=True)


# --- gather: the participant level's tables, one file per participant ---------------------------


def write_derivatives(root: Path, participants: int, members: int, seed: int = 0) -> None:
    """Write a dataset and derivatives that hold what gathering reads, with made-up volumes."""
    rng = np.random.default_rng(seed)
    labels = load_ensemble("aseg31").labels[1:]
    ids = ["ieee"] + [f"mca{m:02}" for m in range(1, members)]
    families = ["ieee"] + ["mca"] * (members - 1)
    generated = [{"Name": "bids_varaug", "Version": "0.1.0"}]
    (root / "logs").mkdir(parents=True)
    (root / "dataset_description.json").write_text(json.dumps({"GeneratedBy": generated}))
    digests = [f"{m:064x}" for m in range(members)]
    pd.DataFrame(
        {"desc_id": [f"desc-{i}" for i in ids], "family": families, "sha256": digests}
    ).to_csv(root / "descriptions.tsv", sep="\t", index=False)
    people = [f"sub-{number:05}" for number in range(participants)]
    ages = rng.uniform(18, 90, participants).round(1)
    pd.DataFrame({"participant_id": people, "age": ages}).to_csv(
        root / "participants.tsv", sep="\t", index=False
    )
    sidecar = json.dumps({"Description": "Made up", "Members": ids})
    keys = [
        f"{member}\t{family}\t{label.index}\t{label.name}\t"
        for member, family in zip(ids, families, strict=True)
        for label in labels
    ]
    typical = np.exp(rng.uniform(6, 12, len(labels)))
    for name in people:
        folder = root / name / "anat"
        folder.mkdir(parents=True)
        volumes = typical * rng.lognormal(0, 0.1, len(labels))
        every = np.rint(volumes * rng.lognormal(0, 0.01, (members, len(labels)))).astype(int)
        rows = [f"{key}{volume}\n" for key, volume in zip(keys, every.ravel(), strict=True)]
        (folder / f"{name}{ENDING}").write_text(
            "member\tfamily\tindex\tname\tvolume\n" + "".join(rows)
        )
        (folder / f"{name}{ENDING}".replace(".tsv", ".json")).write_text(sidecar)


def gather_with_pandas(root: Path) -> np.ndarray:
    """Read every table with `pandas.read_csv` and pivot; (R, M, F)."""
    arrays = []
    for path in sorted(root.glob(f"sub-*/anat/*{ENDING}")):
        table = pd.read_csv(path, sep="\t")
        arrays.append(table.pivot(index="member", columns="name", values="volume").to_numpy())
    return np.stack(arrays)


def bench_gather(options: argparse.Namespace) -> None:
    """Gather a tree of files."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "derivatives"
        with timed(f"write {options.participants} participants x {options.members} members"):
            write_derivatives(root, options.participants, options.members)
        with timed("read_people"):
            people = read_people(root)
        with timed("gather_cohort"):
            cohort = gather_cohort(root, people)
        with timed("pandas.read_csv per file, without any check"):
            plain = gather_with_pandas(root)
    order = np.argsort(cohort.names)
    np.testing.assert_array_equal(plain[:, 0], cohort.baseline[:, order])
    np.testing.assert_array_equal(plain[:, 1:], cohort.members[:, :, order])
    print(f"the same {plain.size:,} volumes")


# --- table: one table of a large cohort ---------------------------------------------------------


def write_table(path: Path, participants: int, members: int, features: int, seed: int = 0) -> None:
    """Write a table of participants x members with normal features that age linearly."""
    rng = np.random.default_rng(seed)
    ages = rng.uniform(18, 90, participants).round(2)
    ids = ["ieee"] + [f"mca{m:02}" for m in range(1, members)]
    slopes = rng.normal(0, 1, features)
    header = ["participant_id", "member", "age", "site", *(f"feature{f}" for f in range(features))]
    with path.open("w") as stream:
        stream.write("\t".join(header) + "\n")
        for number, age in enumerate(ages):
            true = 1000 + slopes * age + rng.normal(0, 20, features)
            rows = true + rng.normal(0, 2, (members, features))
            for member, row in zip(ids, rows, strict=True):
                values = "\t".join([f"{value:.3f}" for value in row])
                stream.write(f"sub-{number:06}\t{member}\t{age}\tsite{number % 20}\t{values}\n")


def bench_table(options: argparse.Namespace) -> None:
    """Read one table of many rows."""
    with tempfile.TemporaryDirectory() as folder:
        path = options.file or Path(folder) / "features.tsv"
        rows = f"{options.participants} x {options.members} rows, {options.features} features"
        if not path.exists():
            with timed(f"write {rows}"):
                write_table(path, options.participants, options.members, options.features)
        print(f"{path.stat().st_size / 2**20:.0f} MiB")
        with timed("read_features_table"):
            cohort = read_features_table(path)
        with timed("pandas.read_csv alone"):
            plain = pd.read_csv(path, sep="\t")
    values = plain[list(cohort.names)].to_numpy().reshape(len(cohort), -1, len(cohort.names))
    np.testing.assert_allclose(values[:, 0], cohort.baseline, rtol=1e-14)
    np.testing.assert_allclose(values[:, 1:], cohort.members, rtol=1e-14)
    print(f"the same {values.size:,} values")


# --- augmentation: the closed form beside training on every member ------------------------------


def make_cohort(participants: int, members: int, features: int, seed: int = 0) -> Cohort:
    """Make up a cohort in memory, as `write_table` does on disk; `members` counts the baseline."""
    rng = np.random.default_rng(seed)
    age = rng.uniform(18, 90, participants)
    true = 1000 + age[:, None] * rng.normal(0, 1, features)
    true += rng.normal(0, 20, true.shape)
    versions = rng.normal(0, 2, (participants, members - 1, features))
    versions += true[:, None]
    names = [f"sub-{number:06}" for number in range(participants)]
    people = pd.DataFrame({"participant_id": names, "session_id": None, "observation": names})
    people = people.assign(age=age, sex=None, site=None)
    return Cohort(
        people,
        tuple(f"feature{f}" for f in range(features)),
        true + rng.normal(0, 2, true.shape),
        versions,
        tuple(f"mca{m:02}" for m in range(1, members)),
    )


def bench_augmentation(options: argparse.Namespace) -> None:
    """Fit ridge with `members` and `analytic`: choice of the penalty by 5 inner folds included."""
    cohort = make_cohort(options.participants, options.members + 1, options.features)
    seconds, predicted = {}, {}
    for augmentation in ("members", "analytic"):
        runs = []
        for _ in range(options.repeats):
            start = time.process_time()
            estimator, choice = fit_estimator(cohort, "ridge", augmentation, 0)
            runs.append(time.process_time() - start)
        seconds[augmentation] = min(runs)
        predicted[augmentation] = estimator.predict(cohort.baseline)
        print(f"{augmentation:10} {min(runs):8.3f} s cpu   {choice}", flush=True)
    difference = np.abs(predicted["members"] - predicted["analytic"]).max()
    print(f"analytic is {seconds['members'] / seconds['analytic']:.1f} times faster")
    print(f"largest difference of predictions {difference:.1e} years")


# --- study: cross-validation of a large cohort --------------------------------------------------


def bench_study(options: argparse.Namespace) -> None:
    """Evaluate a model with the augmentations, as the group level does, and the numerical variability."""
    with timed("make the cohort" if options.file is None else "read_features_table"):
        if options.file is None:
            cohort = make_cohort(options.participants, options.members, options.features)
        else:
            cohort = read_features_table(options.file)
    with tqdm(total=1, unit="fit") as bar, timed("evaluate_brain_age"):

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        study = evaluate_brain_age(
            cohort, model=options.model, augmentations=options.augmentations, progress=show,
        )  # fmt: skip
    with timed("fit_brain_age"):
        fit_brain_age(cohort, options.model, "mean")
    with timed("numerical_variability and numerical_covariance"):
        numerical_variability(cohort)
        numerical_covariance(cohort)
    print(study.scores.round(3).to_string(index=False))
    print(study.gains.round(4).to_string(index=False))


def main() -> None:
    """Run the part that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = parser.add_subparsers(required=True)
    part = parts.add_parser("gather", help="files of the participant level")
    part.add_argument("--participants", type=int, default=5000)
    part.add_argument("--members", type=int, default=22)
    part.set_defaults(run=bench_gather)
    part = parts.add_parser("table", help="one large table")
    part.add_argument("--participants", type=int, default=50000)
    part.add_argument("--members", type=int, default=21)
    part.add_argument("--features", type=int, default=31)
    part.add_argument("--file", type=Path, help="where to keep the table, or one made before")
    part.set_defaults(run=bench_table)
    part = parts.add_parser("augmentation", help="analytic beside members")
    part.add_argument("--participants", type=int, default=1000)
    part.add_argument("--members", type=int, default=20, help="perturbed ones")
    part.add_argument("--features", type=int, default=31)
    part.add_argument("--repeats", type=int, default=3)
    part.set_defaults(run=bench_augmentation)
    part = parts.add_parser("study", help="cross-validation of a large cohort")
    part.add_argument("--model", default="auto")
    part.add_argument("--augmentations", nargs="+", help="default: all")
    part.add_argument("--participants", type=int, default=50000)
    part.add_argument("--members", type=int, default=21)
    part.add_argument("--features", type=int, default=31)
    part.add_argument("--file", type=Path, help="a table made by the part table")
    part.set_defaults(run=bench_study)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
