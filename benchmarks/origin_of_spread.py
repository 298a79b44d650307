"""Where members part: what short trainings that differ in one thing only make of it.

    python benchmarks/origin_of_spread.py LABELS_DIR OUT_DIR [--steps 100] [--forks 0 25 50 75]
        [--members 3] [--hold-out 3] [--voxel-size 4] [--real T1W.nii.gz ...] [--measure-only]

Trains the network's body, coarse stage alone, with a learning rate that falls to almost nothing.
``ieee`` is the reference, ``again`` the same once more; every other member changes one thing:

rounding         Monte Carlo arithmetic as `mca` members have it
initialisation   the first weights
order            which images are drawn
both             initialisation and order, as `seed` members have it
hardware         threads, or the instruction set of oneDNN or of torch
precision        float32 throughout: plain, and forward and backward pass under Monte Carlo
                 arithmetic at t = 24, 11 and 8 bits

``rounding`` and ``order`` are also trained from ``ieee``'s state after each of `--forks` steps.

OUT_DIR gets the weights of each member at some steps, then for each question a table and a figure:
``growth`` (how fast members part), ``fork`` (spread against the step of the fork), ``families`` and
``precision``. Labels are compared on images drawn from the label maps left out, and on `--real`
ones. Members on disk are not trained again: to resume, run the same command again. Figures are
drawn of the members that are there.

One thread, except where threads are what differs. 4 mm: a step takes half a second.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from bids_varaug.errors import UserError
from bids_varaug.files import replacing
from bids_varaug.images.conform import prepare_head
from bids_varaug.images.intensity import normalise_intensity
from bids_varaug.machine import keep_freed_memory, use_threads
from bids_varaug.models.ensemble import NetworkShape
from bids_varaug.models.unet import build_network, write_tensors
from bids_varaug.numerics import MonteCarloArithmetic
from bids_varaug.training.labels import TrainingSubject, find_label_maps, load_scheme, load_subjects
from bids_varaug.training.optimiser import Optimiser
from bids_varaug.training.recipe import CUBES_AT_2MM, CUBES_AT_4MM, MemberPlan, Recipe, Stage
from bids_varaug.training.synthesis import SyntheticImageGenerator
from bids_varaug.training.train import Trainer
from bids_varaug.variability.measures import pairwise_dice, region_counts

LR, LR_END = 6e-3, 1e-4  # the recipe's first and about its last
WINDOWS = {4: CUBES_AT_4MM, 2: CUBES_AT_2MM}
VIEWS = {4: (48, 48, 48), 2: (80, 96, 80)}  # that labels are compared in: the whole brain
SNAPSHOTS = (1, 2, 5, 10, 20, 50, 100, 150, 200, 300, 400, 600, 800)
FIRST_COMPARED = 20  # before that the networks find next to nothing
N_IMAGES, FIRST_IMAGE = 6, 9000
PRECISIONS = (24, 11, 8)
HARDWARE = {
    "2threads": (2, {}),
    "3threads": (3, {}),
    "onednn-avx512": (1, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}),
    "torch-avx2": (1, {"ATEN_CPU_CAPABILITY": "avx2"}),
}
TITLES = {
    "again": "nothing (trained twice)",
    "hardware": "hardware",
    "rounding": "rounding",
    "order": "data order",
    "initialisation": "initialisation",
    "both": "initialisation and order",
}


@dataclass(frozen=True)
class Member(MemberPlan):
    """One training.

    `seed` decides the data alone, `initialisation` the first weights; `precision` is virtual, in
    bits, None for that of each result's format; `half` is autocast to bfloat16; `fork` counts the
    steps shared with ``ieee``.
    """

    seed: int = 0
    rounding_seed: int | None = None
    initialisation: int = 0
    precision: int | None = None
    half: bool = True
    fork: int = 0
    threads: int = 1
    environment: tuple[tuple[str, str], ...] = ()

    def arithmetic(self, step: int) -> AbstractContextManager:
        """Return the context under which step number `step` runs."""
        if self.precision is None:
            return super().arithmetic(step)
        return passes_at(self.precision, self.rounding_seed * 1_000_003 + step)

    @property
    def place(self) -> tuple:
        """What a process decides: members of one place are trained in one process."""
        return self.threads, self.environment


@contextmanager
def passes_at(precision: int, seed: int) -> Iterator[None]:
    """Round forward and backward pass at a virtual precision, the update at float32's own bits.

    At 11 bits the iteration of Muon diverges: its Gram matrices get negative eigenvalues.
    """
    update = MonteCarloArithmetic(seed=seed)

    def enter(*_) -> None:
        update.__enter__()

    def leave(*_) -> None:
        update.__exit__(None, None, None)

    before = register_optimizer_step_pre_hook(enter)
    after = register_optimizer_step_post_hook(leave)
    try:
        with MonteCarloArithmetic(precision=precision, seed=seed):
            yield
    finally:
        before.remove()
        after.remove()


def plan(n: int, forks: list[int]) -> list[Member]:
    """Return all members, `n` of each family, one of each first."""
    members = [Member("ieee", "ieee"), Member("again", "again")]
    for k in range(1, n + 1):
        members += [
            Member(f"rounding{k}", "rounding", rounding_seed=k),
            Member(f"order{k}", "order", seed=k),
            Member(f"initialisation{k}", "initialisation", initialisation=k),
            Member(f"both{k}", "both", initialisation=k, seed=k),
        ]
        if k == 1:
            members += [
                Member(name, "hardware", threads=threads, environment=tuple(variables.items()))
                for name, (threads, variables) in HARDWARE.items()
            ]
        for fork in sorted(set(forks) - {0}):
            members += [
                Member(f"rounding{k}-fork{fork}", "rounding", rounding_seed=k, fork=fork),
                Member(f"order{k}-fork{fork}", "order", seed=k, fork=fork),
            ]
    members.append(Member("float32", "float32", half=False))
    for k in range(1, n + 1):
        members += [Member(f"t{t}-{k}", f"t{t}", rounding_seed=k, precision=t, half=False) for t in PRECISIONS]
    return members


class Laboratory:
    """What all trainings share: recipe, data and where results are kept."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.scheme = load_scheme()
        self.n_classes = len(self.scheme.target_ids)
        self.maps = find_label_maps(options.labels)
        self.generator = SyntheticImageGenerator(self.scheme, self.recipe(half=True).synthesis)
        self.snapshots = sorted({s for s in SNAPSHOTS if s < options.steps} | {options.steps})

    def claim_folder(self) -> None:
        """Make the output folder, or see that members of the same settings are in it."""
        path = self.options.output / "settings.json"
        names = ("steps", "forks", "voxel_size", "hold_out")
        settings = {name: getattr(self.options, name) for name in names}
        if not path.exists():
            self.options.output.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(settings))
        elif json.loads(path.read_text()) != settings:
            raise UserError(
                f"{path}: members of other settings than {settings}. Give the flags that they were "
                "trained with, or another folder."
            )

    def recipe(self, half: bool) -> Recipe:
        """Return a recipe of one stage."""
        windows = WINDOWS[self.options.voxel_size]
        stage = Stage("coarse", self.options.steps, windows, LR, LR_END, half,
                      balanced=True, body_only=True)  # fmt: skip
        return Recipe(NetworkShape(self.n_classes), (stage,))

    def path(self, name: str, step: int) -> Path:
        """Where the weights of a member after `step` steps are."""
        return self.options.output / name / f"step{step:04d}.safetensors"

    def checkpoint(self, name: str) -> Path:
        """Where the state of a training is."""
        return self.options.output / "checkpoints" / f"{name}.safetensors"

    def is_done(self, member: Member) -> bool:
        """Whether a member was trained to its end."""
        return self.path(member.id, self.options.steps).exists()

    def train(self, member: Member, subjects: list[TrainingSubject]) -> None:
        """Train one member, or finish what was begun."""
        checkpoint = self.checkpoint(member.id)

        def on_step(name: str, report, network) -> None:
            if name == "ieee" and report.step in self.options.forks and report.step:
                # It was saved after the step before this one.
                shutil.copy(checkpoint, self.checkpoint(f"ieee-{report.step}"))
            if report.step + 1 in self.snapshots:
                named = network.named_parameters()
                body = {key: p.detach() for key, p in named if p.grad is not None}
                write_tensors(self.path(name, report.step + 1), body)

        save_every = math.gcd(*self.options.forks, self.options.steps)
        trainer = Trainer(
            self.options.output, self.recipe(member.half), self.scheme, subjects, "cpu", on_step, save_every
        )
        if not checkpoint.exists():
            self._write_start(trainer, member)
        trainer.train_member(member)

    def _write_start(self, trainer: Trainer, member: Member) -> None:
        """Write the checkpoint from which a member starts: its own first weights, or those of a fork."""
        network = build_network(trainer.recipe.network, member.initialisation)
        optimiser = Optimiser(network, trainer.recipe.weight_decay)
        done = 0
        if member.fork:
            start = self.checkpoint(f"ieee-{member.fork}")
            done = optimiser.load(start, trainer.fingerprint(Member("ieee", "ieee")))
        optimiser.save(self.checkpoint(member.id), done, trainer.fingerprint(member))


def train_missing(laboratory: Laboratory, members: list[Member]) -> None:
    """Train what is not there, in one process for each number of threads and environment."""
    options = laboratory.options
    missing = [member for member in members if not laboratory.is_done(member)]
    for place, group in groupby(missing, key=lambda member: member.place):
        threads, variables = place
        ids = [member.id for member in group]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)} | dict(variables)
        command = [sys.executable, __file__, *sys.argv[1:], "--only", *ids]
        print(f"{options.output}: {', '.join(ids)}", file=sys.stderr, flush=True)
        subprocess.run(command, env=environment, check=True)


def train_here(laboratory: Laboratory, members: list[Member]) -> None:
    """Train some members in this process, whose threads and environment are theirs."""
    keep_freed_memory()
    use_threads(members[0].threads)
    n_train = len(laboratory.maps) - laboratory.options.hold_out
    subjects = load_subjects(laboratory.maps[:n_train], laboratory.scheme, "cpu")
    for member in members:
        try:
            laboratory.train(member, subjects)
        except UserError as error:  # its loss is not finite: that, too, is a result
            print(f"{member.id}: {error}", file=sys.stderr, flush=True)
            continue
        print(f"{member.id}: done", file=sys.stderr, flush=True)


class Images:
    """What labels are compared on: images drawn from maps left out (with their truth), real heads.

    Attributes
    ----------
    images : name -> (X, Y, Z) float32, in [0, 1.5], on the grid that was trained on
    truth : name -> (X * Y * Z,) uint8, class index, of the drawn ones
    """

    def __init__(self, laboratory: Laboratory):
        self.laboratory = laboratory
        options, shape = laboratory.options, NetworkShape(laboratory.n_classes)
        view, voxel_size = VIEWS[options.voxel_size], float(options.voxel_size)
        self.network = build_network(shape, 0).eval()
        self.images, self.truth = {}, {}
        subjects = load_subjects(laboratory.maps[-options.hold_out :], laboratory.scheme, "cpu")
        for n in range(N_IMAGES):
            name, subject = f"drawn {n}", subjects[n % len(subjects)]
            image, target = laboratory.generator.draw(subject, view, voxel_size, FIRST_IMAGE + n)
            self.images[name], self.truth[name] = image, target.numpy().ravel()
        for path in options.real:
            head, _ = prepare_head(path, voxel_size, shape.multiple // 2)
            tensor = torch.from_numpy(np.ascontiguousarray(head))
            self.images[path.name] = normalise_intensity(tensor)

    def labels(self, member: Member, step: int) -> dict[str, np.ndarray]:
        """Return what a member made of each image, (X * Y * Z,) uint8, and keep it on disk."""
        weights = self.laboratory.path(member.id, step)
        kept = weights.with_name(f"labels{step:04d}.npz")
        if kept.exists():
            with np.load(kept) as file:
                if set(file) == set(self.images):
                    return dict(file)
        self.network.load_state_dict(load_file(weights), strict=False)
        found = {name: self._find(image) for name, image in self.images.items()}
        with replacing(kept) as stream:
            np.savez_compressed(stream, **found)
        return found

    @torch.inference_mode()
    def _find(self, image: torch.Tensor) -> np.ndarray:
        # In float32, for all alike: only the weights differ.
        logits, _ = self.network.coarse_logits(image[None, None])
        return logits[0].argmax(-1).byte().numpy().ravel()


def agreement(labels: list[list[np.ndarray]], n_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Compare the labels of each two of M members, on average over images.

    Parameters
    ----------
    labels : of each member, for each image (V,) uint8

    Returns
    -------
    different : (M, M) float64
        Share of the voxels that the member of the row calls brain, which the member of the column
        labels otherwise.
    dice : (M, M) float64
        Mean over the structures that one of them found.
    """
    different, dice = [], []
    for image in zip(*labels, strict=True):
        stack = np.stack(image)
        different.append([(stack[:, row > 0] != row[row > 0]).mean(1) for row in stack])
        overlap = pairwise_dice(region_counts([stack], len(stack), n_classes))
        dice.append(np.nanmean(overlap[:, :, 1:], axis=2))
    return np.mean(different, axis=0), np.mean(dice, axis=0)


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Euclidean distance of two sets of weights."""
    return math.sqrt(sum(float(((a[key] - b[key]).double() ** 2).sum()) for key in b))


class Comparison:
    """Members beside each other after as many steps, some of them on labels.

    Parameters
    ----------
    members : trained that far
    with_labels : whether their labels are compared, not their weights alone
    """

    def __init__(self, laboratory: Laboratory, images: Images, members: list[Member], step: int,
                 with_labels: bool = True):  # fmt: skip
        self.members, self.step = {m.id: n for n, m in enumerate(members)}, step
        network = build_network(NetworkShape(laboratory.n_classes), 0)
        self.start = {key: p.detach() for key, p in network.named_parameters()}
        self.weights = [load_file(laboratory.path(m.id, step)) for m in members]
        self.with_labels = with_labels
        if not with_labels:
            return
        labels = [images.labels(member, step) for member in members]
        drawn = [[one[name] for name in images.truth] for one in [*labels, images.truth]]
        self.different, self.dice = agreement(drawn, laboratory.n_classes)
        names = [path.name for path in laboratory.options.real]
        self.on_real = bool(names)
        if names:
            real = [[one[name] for name in names] for one in labels]
            self.real_different, self.real_dice = agreement(real, laboratory.n_classes)

    def row(self, member: Member, reference: str, relatives: list[Member]) -> dict:
        """Measure a member against the reference, and against others of its family."""
        n, base = self.members[member.id], self.members[reference]
        others = [self.members[m.id] for m in relatives if m.id != member.id]
        travelled = distance(self.start, self.weights[base])
        row = {
            "member": member.id, "family": member.family, "fork": member.fork, "step": self.step,
            "weights": distance(self.weights[n], self.weights[base]) / travelled,
        }  # fmt: skip
        if self.with_labels:
            row |= {
                "labels": self.different[base, n],
                "dice": self.dice[base, n],
                "pair_dice": np.mean(self.dice[n, others]) if others else np.nan,
                "true_dice": self.dice[n, -1],
            }
            if self.on_real:
                row |= {
                    "real_labels": self.real_different[base, n],
                    "real_dice": self.real_dice[base, n],
                }
        return row

    def rows(self, members: list[Member], reference: str) -> list[dict]:
        """Measure members, each against those of its family that forked where it did."""
        return [
            self.row(member, reference,
                     [m for m in members if (m.family, m.fork) == (member.family, member.fork)])
            for member in members
        ]  # fmt: skip


def measure(laboratory: Laboratory, members: list[Member]) -> dict[str, pd.DataFrame]:
    """Return a table for each question, of the members that are there."""
    images = Images(laboratory)
    done = [member for member in members if laboratory.is_done(member)]
    from_start = [m for m in done if m.half and not m.fork]
    growth = []
    for step in laboratory.snapshots[:-1]:
        compared = Comparison(laboratory, images, from_start, step, step >= FIRST_COMPARED)
        growth += compared.rows(from_start, "ieee")
    last = Comparison(laboratory, images, done, laboratory.options.steps)
    families = pd.DataFrame(last.rows(from_start, "ieee"))
    forked = [m for m in done if m.half and m.family in ("rounding", "order")]
    tables = {
        "growth": pd.concat([pd.DataFrame(growth), families]),
        "families": families,
        "fork": pd.DataFrame(last.rows(forked, "ieee")),
    }
    exact = [m for m in done if not m.half]
    if exact:
        # The arithmetic of the ensemble, against its own reference, and that against float32
        autocast = [m for m in from_start if m.family in ("ieee", "rounding")]
        rows = last.rows([*exact, autocast[0]], "float32") + last.rows(autocast[1:], "ieee")
        tables["precision"] = pd.DataFrame(rows)
    return tables


def draw_growth(table: pd.DataFrame, figure) -> None:
    """Distance of weights, and labels that differ, against the step."""
    axes = figure.subplots(1, 2)
    for family, color in _colors(table[table["family"] != "again"]).items():
        part = table[table["family"] == family]
        for axis, column in zip(axes, ("weights", "labels"), strict=True):
            mean = part.groupby("step")[column].mean().dropna() * (100 if column == "labels" else 1)
            axis.plot(mean.index, mean, "o-", ms=3, color=color, label=TITLES[family])
    axes[0].set(xscale="log", yscale="log", xlabel="step", ylabel="distance / distance travelled")
    axes[0].set_title("weights", fontsize="medium")
    axes[1].set(xlabel="step", ylabel="brain labels unlike ieee's (%)", ylim=(0, None))
    axes[1].set_title("labels", fontsize="medium")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False)


def draw_fork(table: pd.DataFrame, figure) -> None:
    """Labels that differ, against the step at which members fork."""
    axis = figure.subplots()
    for family, color in _colors(table).items():
        part = table[table["family"] == family]
        axis.plot(part["fork"], 100 * part["labels"], "o", ms=4, color=color, alpha=0.6)
        mean = 100 * part.groupby("fork")["labels"].mean()
        axis.plot(mean.index, mean, color=color, label=TITLES[family])
    axis.set(xlabel="steps shared with ieee", ylabel="brain labels unlike ieee's (%)")
    axis.set_ylim(0)
    axis.legend(frameon=False)


def draw_families(table: pd.DataFrame, figure) -> None:
    """Labels that differ, and Dice between members, family by family."""
    axes = figure.subplots(1, 2, sharey=True)
    colors = _colors(table)
    for n, (family, color) in enumerate(colors.items()):
        part = table[table["family"] == family]
        axes[0].plot(100 * part["labels"], [n] * len(part), "o", color=color, alpha=0.7)
        axes[1].plot(part["pair_dice"], [n] * len(part), "o", color=color, alpha=0.7)
    axes[0].set_yticks(range(len(colors)), [TITLES[family] for family in colors])
    axes[0].set(xlabel="brain labels unlike ieee's (%)", xlim=(-0.5, None))
    axes[1].set(xlabel="mean Dice with others of the family")
    for axis in axes:
        axis.grid(axis="y", alpha=0.3)


def draw_precision(table: pd.DataFrame, figure) -> None:
    """Labels that differ, by virtual precision."""
    axis = figure.subplots()
    names = {f"t{t}": f"float32, t = {t}" for t in PRECISIONS}
    names["rounding"] = "bfloat16 autocast (`mca`)"
    for n, family in enumerate(names):
        part = table[table["family"] == family]
        axis.plot(100 * part["labels"], [n] * len(part), "o", color=f"C{n}", alpha=0.7)
    axis.set_yticks(range(len(names)), list(names.values()))
    axis.set(xlabel="brain labels unlike those without random rounding (%)", xlim=(0, None))
    axis.grid(axis="y", alpha=0.3)


FIGURES = {
    "growth": (draw_growth, (9, 4)),
    "families": (draw_families, (9, 3.6)),
    "fork": (draw_fork, (6.5, 3.4)),
    "precision": (draw_precision, (6.5, 2.8)),
}


def save_figure(name: str, table: pd.DataFrame, path: Path) -> None:
    """Draw the figure of one question."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    draw, size = FIGURES[name]
    figure = plt.figure(figsize=size, layout="constrained")
    draw(table, figure)
    figure.savefig(path, dpi=100)


def _colors(table: pd.DataFrame) -> dict[str, str]:
    """Return a colour for each family that is there, the same in all figures."""
    colors = {family: f"C{n}" for n, family in enumerate(TITLES)}
    return {family: color for family, color in colors.items() if (table["family"] == family).any()}


def main() -> None:
    """Parse the command line, train, measure, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("labels", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--forks", type=int, nargs="+", default=[0, 25, 50, 75])
    parser.add_argument("--members", type=int, default=3, help="of each family")
    parser.add_argument("--hold-out", type=int, default=3)
    parser.add_argument("--voxel-size", type=int, choices=WINDOWS, default=4)
    parser.add_argument("--real", type=Path, nargs="+", default=[])
    parser.add_argument("--measure-only", action="store_true")
    parser.add_argument("--only", nargs="+", default=[], help="train these, here; measure nothing")
    options = parser.parse_args()
    laboratory = Laboratory(options)
    members = plan(options.members, options.forks)
    laboratory.claim_folder()
    if options.only:
        train_here(laboratory, [member for member in members if member.id in options.only])
        return
    if not options.measure_only:
        train_missing(laboratory, members)
    use_threads(1)
    for name, table in measure(laboratory, members).items():
        means = table.groupby(["family", "fork", "step"], sort=False).mean(numeric_only=True)
        print(f"{name}, means")
        print(means.to_csv(sep="\t", float_format="%.3g"))
        table.to_csv(options.output / f"{name}.tsv", sep="\t", index=False, float_format="%.4g")
        save_figure(name, table, options.output / f"{name}.png")


if __name__ == "__main__":
    main()
