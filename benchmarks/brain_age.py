r"""Errors of brain-age models on tables, and whether numerical noise helps as augmentation.

    python benchmarks/brain_age.py tables DIR/*.tsv
    python benchmarks/brain_age.py transfer TRAIN.tsv TEST.tsv [--rows "group == 'TD'"]
    python benchmarks/brain_age.py small DIR/*.tsv
    python benchmarks/brain_age.py transplant fcon1000_freesurfer.tsv --members OUTPUT_DIR \
        --out study.tsv --figure study.png

``tables``: MAE of grouped 5-fold cross-validation, uncorrected, beside plain ridge and the mean
predictor; with ``--sites`` also whole sites held out.

``small``: MAE of models fitted to few people drawn from a table, on all others, sites unknown; and in how many draws
each is better than plain ridge on age.

``transplant``: true volumes are those of a table of FreeSurfer volumes. Each participant gets the
numerical deviations of a donor, a real head segmented by every member: log-volumes drawn from the
donor's covariance over members, one draw as the unperturbed baseline and M as members. Models are
trained on n participants drawn from the training folds, and tested on all held-out ones, for every
augmentation and control on the same people. Without ``--members``, deviations are independent over
structures with the coefficients of variation of ``--cv`` (a stand-in for trying things out).

    python examples/make_ageing_cohort.py LABELS.nii.gz cohort --n 20
    bids_varaug cohort cohort_out participant -w work
    python benchmarks/brain_age.py simulated cohort cohort_out

``simulated``: what a simulated cohort of known volumes and ages gives: how measured volumes follow
the true ones, how large numerical is beside anatomical spread, the errors and paired gains of
repeated cross-validation, and the error with the true volumes as features, the floor for all.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib
import numpy as np
import pandas as pd
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from bids_varaug.brainage.augment import AUGMENTATIONS
from bids_varaug.brainage.cohort import Cohort, grouped_folds
from bids_varaug.brainage.evaluate import (
    LINEAR_MEAN,
    bootstrap_interval,
    compare_losses,
    evaluate_brain_age,
    participant_losses,
)
from bids_varaug.brainage.features import relative_volumes
from bids_varaug.brainage.features_table import read_features_table
from bids_varaug.brainage.gather import gather_cohort
from bids_varaug.brainage.models import ALPHAS, fit_estimator, predict_ages, resolve_model
from bids_varaug.brainage.variability import numerical_variability
from bids_varaug.derivatives.io import ENDING
from bids_varaug.inputs.participants import read_people

matplotlib.use("Agg")
from matplotlib import pyplot as plt

FREESURFER_NAMES = {
    "Left-Cerebral-White-Matter": "lhCerebralWhiteMatterVol",
    "Right-Cerebral-White-Matter": "rhCerebralWhiteMatterVol",
    "Left-Cerebral-Cortex": "lhCortexVol",
    "Right-Cerebral-Cortex": "rhCortexVol",
    "Left-Thalamus": "Left-Thalamus-Proper",
    "Right-Thalamus": "Right-Thalamus-Proper",
}
VOLUMES = (
    "Cerebral-White-Matter", "Cerebral-Cortex", "Lateral-Ventricle", "Inf-Lat-Vent",
    "Cerebellum-White-Matter", "Cerebellum-Cortex", "Thalamus", "Caudate", "Putamen", "Pallidum",
    "Hippocampus", "Amygdala", "Accumbens-area", "VentralDC",
)  # fmt: skip
STRUCTURES = (
    *(f"{side}-{name}" for side in ("Left", "Right") for name in VOLUMES),
    "3rd-Ventricle", "4th-Ventricle", "Brain-Stem",
)  # fmt: skip


# --- tables -------------------------------------------------------------------------------------


def bench_tables(options: argparse.Namespace) -> None:
    """Print scores of each table and model."""
    tables = []
    for path in options.tables:
        cohort = read_features_table(path)
        for model in options.models:
            study = evaluate_brain_age(
                cohort, model=model, seed=options.seed,
                log_volumes=options.log_volumes, curve_sizes=(), leave_site_out=options.sites,
            )  # fmt: skip
            scores = study.scores.copy()
            scores.insert(0, "table", path.stem)
            scores.insert(1, "model", model)
            keep = scores["augmentation"].eq("none") | (model == options.models[0])
            tables.append(scores[keep])
            print(scores[keep].round(3).to_string(index=False), flush=True)
            print(study.chosen["none"], flush=True)
            if len(study.sites):
                mae = np.average(study.sites["mae_none"], weights=study.sites["n"])
                print(f"one site left out: MAE {mae:.3f}", flush=True)
                print(study.sites.round(2).to_string(index=False), flush=True)
    if options.out:
        pd.concat(tables).to_csv(options.out, sep="\t", index=False, na_rep="n/a")


# --- small --------------------------------------------------------------------------------------


def bench_small(options: argparse.Namespace) -> None:
    """Print errors by the number of people, and how often each model beats plain ridge."""
    rows = []
    for path in options.tables:
        cohort = _named_alike(path)
        cohort = replace(cohort, people=cohort.people.assign(site=None))
        if options.volumes:
            cohort = by_brain(_with(cohort, [FREESURFER_NAMES.get(name, name) for name in STRUCTURES]))
        for n in options.sizes:
            for draw in range(options.repeats):
                order = np.random.default_rng([draw, n]).permutation(len(cohort))
                train, test = cohort.take(np.sort(order[:n])), cohort.take(np.sort(order[n:]))
                plain = make_pipeline(StandardScaler(), RidgeCV(ALPHAS)).fit(train.baseline, train.age)
                predicted = {"mean age": train.age.mean(), "plain ridge": plain.predict(test.baseline)}
                for model in options.models:
                    predicted[model] = predict_ages(fit_estimator(train, model, "none", draw)[0], test, "none")
                if {"auto", "ridge"} <= set(options.models):
                    predicted["auto + ridge"] = (predicted["auto"] + predicted["ridge"]) / 2
                errors = {name: np.abs(ages - test.age).mean() for name, ages in predicted.items()}
                rows.append({"table": path.stem, "n": n} | errors)
        table = pd.DataFrame(rows)
        part = table[table["table"] == path.stem].drop(columns="table")
        print(path.stem, part.groupby("n").mean().round(2).to_string(), sep="\n", flush=True)
    errors = table.drop(columns=["table", "n"])
    better = errors.lt(errors["plain ridge"], axis=0).groupby(table["n"]).mean()
    relative = errors.div(errors["plain ridge"], axis=0).groupby(table["n"]).mean()
    print("error over that of plain ridge", relative.round(3).to_string(), sep="\n")
    print("share of draws better than plain ridge", better.round(2).to_string(), sep="\n")


# --- transfer -----------------------------------------------------------------------------------


def bench_transfer(options: argparse.Namespace) -> None:
    """Train on one table, test on another, with the features that both have."""
    train, test = _named_alike(options.train), _named_alike(options.test, options.rows)
    test = test.take(test.age >= options.youngest)
    shared = [name for name in train.names if name in test.names]
    train, test = _with(train, shared), _with(test, shared)
    print(f"{len(train)} and {len(test)} observations, {len(shared)} features", flush=True)
    print(f"{'mean age':15} MAE {np.abs(test.age - train.age.mean()).mean():.3f}", flush=True)
    for model in options.models:
        estimator, choice = fit_estimator(train, model, "none", options.seed)
        error = predict_ages(estimator, test, "none") - test.age
        rng = np.random.default_rng(options.seed)
        low, high = bootstrap_interval(np.abs(error)[:, None], rng, 10_000)
        print(f"{model:15} MAE {np.abs(error).mean():.3f} ({low[0]:.2f} to {high[0]:.2f})  "
              f"mean error {error.mean():+.2f}  "
              f"{choice}", flush=True)  # fmt: skip


def _named_alike(path: Path, rows: str | None = None) -> Cohort:
    """Read a table, or some of its rows; ABIDE's ends the names of volumes in _Volume_mm3."""
    table = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False)
    table = table.rename(columns=lambda name: name.removesuffix("_Volume_mm3"))
    with TemporaryDirectory() as folder:
        renamed = Path(folder) / path.name
        (table.query(rows) if rows else table).to_csv(renamed, sep="\t", index=False)
        return read_features_table(renamed)


def _with(cohort: Cohort, names: list[str]) -> Cohort:
    columns = [cohort.names.index(name) for name in names]
    return Cohort(cohort.people, tuple(names), cohort.baseline[:, columns])


# --- transplant ---------------------------------------------------------------------------------


def read_donors(output_dir: Path) -> list[np.ndarray]:
    """Covariances of log-volumes over the perturbed members, one per segmented head, (F, F)."""
    donors = []
    for path in sorted(output_dir.rglob(f"*{ENDING}")):
        table = pd.read_csv(path, sep="\t")
        table = table[table["family"] != "ieee"]
        volumes = table.pivot(index="member", columns="name", values="volume")[list(STRUCTURES)]
        if len(volumes) > 2 and (volumes > 0).all(axis=None):
            donors.append(np.cov(np.log(volumes.to_numpy()), rowvar=False))
    if not donors:
        raise SystemExit(f"{output_dir}: no *{ENDING} with three members and every structure")
    return donors


def transplant(
    cohort: Cohort, donors: list[np.ndarray], members: int, scale: float, seed: int
) -> Cohort:
    """Give every observation a baseline and members with a donor's numerical covariance."""
    names = [FREESURFER_NAMES.get(name, name) for name in STRUCTURES]
    true = cohort.baseline[:, [cohort.names.index(name) for name in names]]
    positive = (true > 0).all(axis=1)
    cohort, true = cohort.take(positive), true[positive]
    rng = np.random.default_rng(seed)
    roots = []
    for covariance in donors:
        values, axes = np.linalg.eigh(covariance)
        roots.append(axes * np.sqrt(np.clip(values, 0, None)))
    donor = rng.integers(0, len(roots), len(true))
    noise = rng.standard_normal((len(true), members + 1, len(names)))
    noise = scale * np.einsum("rmf,rgf->rmg", noise, np.stack(roots)[donor])
    versions = true[:, None] * np.exp(noise)
    return Cohort(
        cohort.people, tuple(STRUCTURES), versions[:, 0], versions[:, 1:],
        tuple(f"m{m:02}" for m in range(members)), unit="mm3",
    )  # fmt: skip


def paired_study(
    cohort: Cohort, model: str, sizes: list[int], repeats: int, seed: int
) -> pd.DataFrame:
    """Errors and paired gains of each contrast for each number of training participants."""
    # `analytic` is linear: compared with the linear model without augmentation.
    fits = [(name, model, name) for name in AUGMENTATIONS] + [(LINEAR_MEAN, resolve_model(model, "analytic"), "mean")]
    studies = []
    for size in sizes:
        tables = []
        for repeat in range(repeats):
            folds = grouped_folds(cohort.groups, 5, seed + repeat)
            for k in range(5):
                rng = np.random.default_rng([seed + repeat, k])
                drawn = rng.permutation(np.flatnonzero(folds != k))[: size or None]
                train, test = cohort.take(np.sort(drawn)), cohort.take(folds == k)
                ids = test.people[["participant_id"]].assign(of=repeat, fold=k, n_train=len(train))
                for name, fitted, augmentation in fits:
                    estimator, _ = fit_estimator(train, fitted, augmentation, seed + repeat)
                    loss = np.abs(predict_ages(estimator, test, augmentation) - test.age)
                    tables.append(ids.assign(augmentation=name, loss=loss))
        table = pd.concat(tables)
        errors = participant_losses(table).mean()
        gains = compare_losses(table, {("analytic", "mean"): LINEAR_MEAN})
        studies.append(
            gains.assign(
                model=model, n=size or round(len(cohort) * 0.8), mae=errors[gains["augmentation"]].to_numpy(),
                mae_none=errors["none"], contrast=gains["augmentation"] + " over " + gains["against"],
            )
        )  # fmt: skip
        print(studies[-1].round(4).to_string(index=False), flush=True)
    return pd.concat(studies, ignore_index=True)


def draw_gains(table: pd.DataFrame, path: Path) -> None:
    """Draw gain against the number of training participants, one panel per model and scale."""
    panels = list(table.groupby(["model", "noise_scale"], sort=False))
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.5 * len(panels), 4), squeeze=False, layout="constrained"
    )
    for axis, ((model, scale), part) in zip(axes[0], panels, strict=True):
        ranks = {n: i for i, n in enumerate(sorted(part["n"].unique()))}
        for a, (name, one) in enumerate(part.groupby("contrast", sort=False)):
            x = one["n"].map(ranks) + (a - 2) * 0.12
            error = [one["gain"] - one["low"], one["high"] - one["gain"]]
            axis.errorbar(x, one["gain"], error, fmt="o", markersize=4, capsize=2, label=name)
        axis.axhline(0, color="0.5", linewidth=0.8)
        axis.set_xticks(list(ranks.values()), [str(n) for n in ranks])
        axis.set_xlabel("training participants")
        axis.set_title(f"{model}, noise x {scale:g}")
    axes[0, 0].set_ylabel("gain in MAE [years], 95 % interval")
    axes[0, -1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def bench_transplant(options: argparse.Namespace) -> None:
    """Run the study for each model and scale of the noise."""
    donors = read_donors(options.members) if options.members else [np.eye(len(STRUCTURES)) * options.cv ** 2]
    cv = np.sqrt([np.diag(donor) for donor in donors])
    print(f"{len(donors)} donors, coefficients of variation: median {np.median(cv):.4f}, "
          f"largest {cv.max():.4f}", flush=True)  # fmt: skip
    source = read_features_table(options.table)
    tables = []
    for scale in options.scales:
        cohort = transplant(source, donors, options.n_members, scale, options.seed)
        sizes = [0 if size == "all" else int(size) for size in options.sizes]
        for model in options.models:
            table = paired_study(cohort, model, sizes, options.repeats, options.seed)
            table.insert(1, "noise_scale", scale)
            tables.append(table)
            done = pd.concat(tables)
            done.to_csv(options.out, sep="\t", index=False, na_rep="n/a")
            draw_gains(done, options.figure)


# --- simulated ----------------------------------------------------------------------------------


def bench_simulated(options: argparse.Namespace) -> None:
    """Print truth against measurement, numerical spread, errors and gains."""
    measured = gather_cohort(options.derivatives, read_people(options.bids_dir))
    truth = pd.read_csv(options.bids_dir / "sourcedata" / "truth.tsv", sep="\t")
    truth = truth.set_index("participant_id").loc[measured.people["participant_id"]]
    true = truth[list(measured.names)].to_numpy(np.float64)
    numerics = numerical_variability(measured).set_index("name")
    table = numerics[["mean", "cv", "ratio"]].assign(
        r_true=[np.corrcoef(a, b)[0, 1] for a, b in zip(measured.baseline.T, true.T, strict=True)],
        bias_percent=100 * (measured.baseline / true - 1).mean(axis=0),
    )
    print(f"{len(measured)} people, {len(measured.member_ids)} perturbed members")
    print(table.round(4).to_string())
    print(table.describe().loc[["min", "50%", "max"]].round(4).to_string(), flush=True)
    exact = replace(measured, baseline=true, members=None, member_ids=())
    for what, cohort in (("measured", measured), ("true volumes", exact)):
        for relative, one in (("", cohort), (" / brain", by_brain(cohort))):
            study = evaluate_brain_age(
                one, model=options.model, seed=options.seed, gain_repeats=options.repeats,
                curve_sizes=(), leave_site_out=False,
            )  # fmt: skip
            print(f"{what}{relative}, {options.model}, folds drawn {options.repeats} times for gains")
            shown = study.scores[["augmentation", "n", "mae", "mae_low", "mae_high", "r"]]
            print(shown.round(3).to_string(index=False))
            print(study.gains.round(3).to_string(index=False), flush=True)


def by_brain(cohort: Cohort) -> Cohort:
    """Volumes divided by their sum."""
    return relative_volumes(cohort, "sum")


def main() -> None:
    """Run the part that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = parser.add_subparsers(required=True)
    part = parts.add_parser("tables", help="cross-validated errors")
    part.add_argument("tables", type=Path, nargs="+")
    part.add_argument("--models", nargs="+", default=["auto"])
    part.add_argument("--sites", action="store_true", help="also leave out site after site")
    part.add_argument("--log-volumes", action="store_true", help="logarithms of volumes")
    part.add_argument("--seed", type=int, default=0)
    part.add_argument("--out", type=Path)
    part.set_defaults(run=bench_tables)
    part = parts.add_parser("small", help="few people")
    part.add_argument("tables", type=Path, nargs="+")
    part.add_argument("--models", nargs="+", default=["auto", "ridge", "bayesian_ridge", "svr", "gpr"])
    part.add_argument("--sizes", type=int, nargs="+", default=[12, 20, 30, 40, 60, 90, 130, 200])
    part.add_argument("--volumes", action="store_true", help="the 31 volumes of aseg31 over their sum alone")
    part.add_argument("--repeats", type=int, default=10)
    part.set_defaults(run=bench_small)
    part = parts.add_parser("transfer", help="train on one table, test on another")
    part.add_argument("train", type=Path)
    part.add_argument("test", type=Path)
    part.add_argument("--models", nargs="+", default=["auto", "ridge", "bayesian_ridge", "svr"])
    part.add_argument("--rows", help="of the test table, a query such as \"group == 'TD'\"")
    part.add_argument("--youngest", type=float, default=18)
    part.add_argument("--seed", type=int, default=0)
    part.set_defaults(run=bench_transfer)
    part = parts.add_parser("transplant", help="numerical augmentation on real volumes")
    part.add_argument("table", type=Path)
    part.add_argument("--members", type=Path, help="output directory of the participant level")
    part.add_argument("--cv", type=float, default=0.02, help="where there are no members")
    part.add_argument("--scales", type=float, nargs="+", default=[1.0], help="times the noise")
    part.add_argument("--n-members", type=int, default=10)
    part.add_argument("--models", nargs="+", default=["bayesian_ridge"])
    part.add_argument("--sizes", nargs="+", default=["50", "100", "200", "500", "all"])
    part.add_argument("--repeats", type=int, default=3)
    part.add_argument("--seed", type=int, default=0)
    part.add_argument("--out", type=Path, default=Path("transplant.tsv"))
    part.add_argument("--figure", type=Path, default=Path("transplant.png"))
    part.set_defaults(run=bench_transplant)
    part = parts.add_parser("simulated", help="a simulated cohort of known volumes and ages")
    part.add_argument("bids_dir", type=Path, help="of examples/make_ageing_cohort.py")
    part.add_argument("derivatives", type=Path, help="of the participant level")
    part.add_argument("--model", default="bayesian_ridge")
    part.add_argument("--repeats", type=int, default=10)
    part.add_argument("--seed", type=int, default=0)
    part.set_defaults(run=bench_simulated)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
