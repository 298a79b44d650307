"""``bids_varaug-train``: train an ensemble from label maps."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from bids_varaug import __version__
from bids_varaug.errors import ExitCode, UsageError, UserError

if TYPE_CHECKING:
    from bids_varaug.training.recipe import Recipe, Stage


def main(argv: Sequence[str] | None = None) -> int:
    """Train; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        run(build_parser().parse_args(argv), argv)
    except UserError as error:
        print(f"bids_varaug-train: {error}", file=sys.stderr)
        return int(error.exit_code)
    return int(ExitCode.DONE)


# fmt: off
def build_parser() -> argparse.ArgumentParser:
    """Return the command line of the trainer."""
    parser = argparse.ArgumentParser(
        "bids_varaug-train",
        description="Train a numerical ensemble from label maps. To resume, run the same command again: training "
        "continues from the last checkpoint and ends with the same bits.",
    )
    parser.add_argument("labels_dir", type=Path, help="label maps (*.nii.gz or *_dseg.nii.gz)")
    parser.add_argument("ensemble_dir", type=Path, help="output: manifest and weights")
    add = parser.add_argument_group("members").add_argument
    add("--members", default="ieee,mca01..mca10,seed01..seed10",
        help="members to train, and ranges of them (default: %(default)s)")
    add("--member-index", type=int, metavar="I",
        help="train only member number I of --members, counted from 0, as in a Slurm array; afterwards run once "
        "without this flag to calibrate")
    add("--name", help="name of the ensemble (default: the folder's)")
    add = parser.add_argument_group("data").add_argument
    add("--label-table", type=Path, metavar="TSV",
        help="label ids (default: *dseg.tsv in LABELS_DIR, else FreeSurfer's)")
    add("--hold-out", type=int, default=0, metavar="N",
        help="leave the last N label maps out of training and calibrate the posteriors on images synthesised from them "
        "(default: %(default)s)")
    add("--real-share", type=_share, default=0.0, metavar="SHARE",
        help="share of the images (0 to 1) that are the T1w image beside the label map instead of a synthetic one "
        "(default: %(default)s)")
    add("--monitor", type=Path, metavar="DIR", help="log the Dice on T1w images with *_dseg files")
    add("--monitor-every", type=int, default=200, metavar="STEPS",
        help="steps between two looks (default: %(default)s)")
    add = parser.add_argument_group("recipe").add_argument
    add("--steps", nargs="+", metavar="[STAGE=]N", default=[],
        help="steps of each stage, or of one: coarse and medium (the body alone), fine, decay")
    add("--channels", type=int, nargs="+", help="network width at each level")
    add = parser.add_argument_group("FastSurfer").add_argument
    add("--architecture", choices=("unet", "fastsurfer-vinn"), default="unet",
        help="fastsurfer-vinn trains one plane on pairs of T1w image and aparc.DKTatlas+aseg, and writes checkpoints "
        "for bids_varaug-convert to ENSEMBLE_DIR/MEMBER (default: %(default)s)")
    add("--plane", choices=("coronal", "axial", "sagittal"), help="of fastsurfer-vinn")
    add("--epochs", type=int, default=70, metavar="N", help="of fastsurfer-vinn (default: %(default)s)")
    add("--start-from", metavar="DIR", help="ensemble of fastsurfer-vinn whose baseline to train on, instead of from "
        "random weights")
    add = parser.add_argument_group("computing").add_argument
    add("--device", default="auto",
        help="auto, cpu, cuda, cuda:N, or several, comma-separated, which share the members (default: %(default)s)")
    add("--jobs", type=int, default=1, metavar="N",
        help="members trained at once on each device (default: %(default)s)")
    add("--omp-nthreads", type=int, default=0, metavar="N", help="threads per job (default: all)")
    add("--resume", action=argparse.BooleanOptionalAction, default=True,
        help="continue from what exists; --no-resume deletes it first")
    parser.add_argument("--version", action="version", version=__version__)
    return parser
# fmt: on


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text}: a share lies between 0 and 1")
    return value


def make_recipe(arguments: argparse.Namespace, n_classes: int) -> Recipe:
    """Return the standard recipe with the changes that the command line asks for; `UsageError` for a wrong --steps."""
    from bids_varaug.models.ensemble import NetworkShape
    from bids_varaug.training.recipe import STAGES, Recipe
    from bids_varaug.training.synthesis import SynthesisSettings

    stages: tuple[Stage, ...] = STAGES
    names = [stage.name for stage in stages]
    for change in arguments.steps:
        name, _, steps = change.rpartition("=")
        if name not in ("", *names) or not steps.isdecimal():
            raise UsageError(f"--steps {change}: use N, or STAGE=N with one of {', '.join(names)} as STAGE.")
        stages = tuple(replace(s, steps=int(steps)) if name in ("", s.name) else s for s in stages)
    shape = NetworkShape(n_classes)
    if arguments.channels:
        shape = replace(shape, channels=tuple(arguments.channels))
    return Recipe(shape, stages, synthesis=SynthesisSettings(real_share=arguments.real_share))


def run(arguments: argparse.Namespace, argv: Sequence[str]) -> None:
    """Load the label maps and train every member asked for; `UserError` if there is nothing to train on."""
    import torch

    from bids_varaug.machine import keep_freed_memory, resolve_device, use_threads
    from bids_varaug.training.labels import find_label_maps, find_label_table, load_scheme, load_subjects
    from bids_varaug.training.monitor import TrainingMonitor, find_labelled_images
    from bids_varaug.training.train import Trainer, delete_ensemble, train_in_parallel, unfinished

    keep_freed_memory()
    # Also without --omp-nthreads: numba does not know OMP_NUM_THREADS.
    use_threads(arguments.omp_nthreads or torch.get_num_threads())
    ids = choose_members(arguments)
    if arguments.architecture == "fastsurfer-vinn":
        return train_planes(arguments, ids)
    devices = [resolve_device(name) for name in arguments.device.split(",")] * max(1, arguments.jobs)
    label_maps = find_label_maps(arguments.labels_dir)
    n_train = len(label_maps) - arguments.hold_out
    if not 0 < n_train <= len(label_maps):
        raise UserError(
            f"{arguments.labels_dir}: {len(label_maps)} label map(s), --hold-out {arguments.hold_out} leaves none to "
            "train on."
        )
    scheme = load_scheme(arguments.label_table or find_label_table(arguments.labels_dir))
    recipe = make_recipe(arguments, len(scheme.target_ids))
    if not arguments.resume:
        delete_ensemble(arguments.ensemble_dir)
    logs = arguments.ensemble_dir / "logs"
    names = dict(zip(scheme.target_ids, scheme.target_names, strict=True))
    images = find_labelled_images(arguments.monitor, names) if arguments.monitor else []
    monitor = TrainingMonitor(logs, images, arguments.monitor_every, scheme.target_ids, recipe.voxel_size)
    with closing(monitor):
        subjects = load_subjects(label_maps[:n_train], scheme, devices[0], arguments.real_share > 0)
        trainer = Trainer(arguments.ensemble_dir, recipe, scheme, subjects, devices[0], monitor.on_step)
        name = arguments.name or arguments.ensemble_dir.resolve().name
        apart = len(devices) > 1  # other processes train the members; this one waits
        ensemble = trainer.train_ensemble(name, () if apart else ids)
    if apart:
        train_in_parallel(partial(member_command, argv), unfinished(ensemble, ids), devices, logs)
    held_out = label_maps[n_train:]
    if held_out and arguments.member_index is None:
        print("Calibrating the posteriors on the held-out label maps", file=sys.stderr)
        subjects = load_subjects(held_out, scheme, devices[0])
        ensemble = trainer.calibrate_ensemble(subjects, [path.name for path in held_out])
        print(f"Temperature {ensemble.temperature}", file=sys.stderr)


def train_planes(arguments: argparse.Namespace, ids: Sequence[str]) -> None:
    """Train a plane of FastSurfer's network for each member; `UsageError` without a plane, or for another start."""
    from bids_varaug.machine import resolve_device
    from bids_varaug.models.ensemble import load_ensemble
    from bids_varaug.models.fastsurfer import load_trained
    from bids_varaug.training.fastsurfer import parcel_scheme
    from bids_varaug.training.labels import find_label_maps, image_of, load_scheme
    from bids_varaug.training.plane import Head, PlaneRecipe, SyntheticHeads, load_heads, train_plane
    from bids_varaug.training.recipe import plan_member

    if arguments.plane is None:
        raise UsageError("--architecture fastsurfer-vinn needs --plane coronal, axial or sagittal.")
    recipe, start = PlaneRecipe(arguments.plane, epochs=arguments.epochs), None
    if arguments.start_from is not None:
        ensemble = load_ensemble(arguments.start_from)
        if not ensemble.is_fastsurfer or ensemble.baseline is None:
            raise UsageError(f"--start-from {arguments.start_from}: no FastSurfer ensemble with a baseline.")
        start = load_trained(ensemble, ensemble.baseline)[recipe.plane]
    label_maps, table = find_label_maps(arguments.labels_dir), arguments.label_table
    heads: list[Head] | SyntheticHeads
    if any(map(image_of, label_maps)):
        heads = load_heads(label_maps, recipe)
    else:
        print("No T1w images beside the label maps: training on images drawn from them", file=sys.stderr)
        heads = SyntheticHeads(label_maps, load_scheme(table) if table else parcel_scheme(), recipe)
    for member in ids:
        out = arguments.ensemble_dir / member / f"{recipe.plane}.pkl"
        if not arguments.resume:
            out.unlink(missing_ok=True)
        train_plane(recipe, heads, plan_member(member), out, start, resolve_device(arguments.device))


def choose_members(arguments: argparse.Namespace) -> tuple[str, ...]:
    """Return the ids in ``--members``, or the one that ``--member-index`` picks.

    `UsageError` if there is no such member, or ``--no-resume`` would delete those of the other tasks.
    """
    from bids_varaug.training.recipe import parse_members

    ids, index = parse_members(arguments.members), arguments.member_index
    if index is None:
        return ids
    if not arguments.resume:
        raise UsageError(
            "--no-resume --member-index: this would delete the members of the other tasks. Empty the folder before the "
            "array starts."
        )
    if not 0 <= index < len(ids):
        raise UsageError(
            f"--member-index {index}: --members names {len(ids)}, numbered 0 to {len(ids) - 1} "
            f"(sbatch --array=0-{len(ids) - 1})."
        )
    return (ids[index],)


def member_command(argv: Sequence[str], member_id: str, device: str) -> list[str]:
    """Arguments of ``python -m`` that train one member of the same ensemble: `argv`, partly overruled."""
    one = ["--members", member_id, "--member-index", "0", "--device", device, "--jobs", "1"]
    return ["bids_varaug.cli.train", *argv, *one, "--resume"]


if __name__ == "__main__":
    sys.exit(main())
