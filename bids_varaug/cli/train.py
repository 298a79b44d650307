"""``bids_varaug-train``: train an ensemble from label maps."""

from __future__ import annotations

import argparse
import sys
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

from bids_varaug import __version__
from bids_varaug.errors import ExitCode, UsageError, UserError


def main(argv: list[str] | None = None) -> int:
    """Train; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    try:
        run(arguments)
    except UserError as error:
        print(f"bids_varaug-train: {error}", file=sys.stderr)
        return int(error.exit_code)
    return int(ExitCode.DONE)


def build_parser() -> argparse.ArgumentParser:
    """Return the command line of the trainer."""
    parser = argparse.ArgumentParser(
        "bids_varaug-train",
        description="Train a numerical ensemble from label maps. Run again after an interruption: "
        "it goes on from the last checkpoint and ends with the same bits.",
    )
    parser.add_argument("labels_dir", type=Path, help="label maps (*.nii.gz or *_dseg.nii.gz)")
    parser.add_argument("ensemble_dir", type=Path, help="where manifest and weights go")
    add_members(parser.add_argument_group("members"))
    add_data(parser.add_argument_group("data"))
    add_schedule(parser.add_argument_group("how long, how large"))
    add_machine(parser.add_argument_group("machine"))
    parser.add_argument("--version", action="version", version=__version__)
    return parser


def add_members(group) -> None:
    """Add the flags that choose members."""
    group.add_argument("--members", default="ieee,mca01..mca10,seed01..seed10")
    group.add_argument("--member-index", type=int, metavar="I",
                       help="train only member number I of --members, from 0 on, as in a Slurm "
                       "array; start it once more without this flag to calibrate")  # fmt: skip
    group.add_argument("--name", help="of the ensemble; default: the folder's name")


def add_data(group) -> None:
    """Add the flags about what is learnt from."""
    group.add_argument("--label-table", type=Path,
                       help="TSV of label ids (default: the *dseg.tsv of LABELS_DIR, else "
                       "FreeSurfer's)")  # fmt: skip
    group.add_argument("--hold-out", type=int, default=0, metavar="N",
                       help="leave the last N label maps out of training and calibrate the "
                       "posteriors on images drawn from them")  # fmt: skip
    group.add_argument("--real-share", type=_share, default=0.0, metavar="SHARE",
                       help="share of the images (0 to 1) that show the T1w image beside the label "
                       "map instead of a synthetic one")  # fmt: skip
    group.add_argument("--monitor", type=Path, metavar="DIR",
                       help="T1w images with *_dseg files: their Dice is logged")  # fmt: skip
    group.add_argument("--monitor-every", type=int, default=200, metavar="STEPS")


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text}: a share lies between 0 and 1")
    return value


def add_schedule(group) -> None:
    """Add the flags that change the recipe."""
    group.add_argument("--steps", nargs="+", metavar="[STAGE=]N",
                       help="steps of each stage or of the named one: coarse and medium (the body "
                       "alone), fine, decay")  # fmt: skip
    group.add_argument("--channels", type=int, nargs="+", help="network width at each level")


def add_machine(group) -> None:
    """Add the flags about where it runs."""
    group.add_argument("--device", default="auto",
                       help="auto, cpu, cuda, cuda:N, or several, comma-separated, over which "
                       "members are spread")  # fmt: skip
    group.add_argument("--jobs", type=int, default=1, metavar="N",
                       help="members at once on each device")  # fmt: skip
    group.add_argument("--omp-nthreads", type=int, default=0, help="of each job; 0: all")
    group.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True,
                       help="go on from what is there; --no-resume deletes it first")  # fmt: skip


def make_recipe(arguments: argparse.Namespace, n_classes: int):
    """Return the standard recipe with the changes that the command line asks for."""
    from bids_varaug.models.shape import NetworkShape
    from bids_varaug.training.recipe import STAGES, Recipe
    from bids_varaug.training.synthesis import SynthesisSettings

    shape = NetworkShape(n_classes)
    if arguments.channels:
        shape = replace(shape, channels=tuple(arguments.channels))
    synthesis = SynthesisSettings(real_share=arguments.real_share)
    return Recipe(shape, with_steps(STAGES, arguments.steps or []), synthesis=synthesis)


def with_steps(stages: tuple, changes: list[str]) -> tuple:
    """Return the stages with other numbers of steps, ``N`` of all or ``STAGE=N`` of one.

    Raises
    ------
    UsageError
        If there is no such stage, or N is no number.
    """
    names = [stage.name for stage in stages]
    for change in changes:
        name, _, steps = change.rpartition("=")
        if (name and name not in names) or not steps.isdecimal():
            raise UsageError(
                f"--steps {change}: a number of steps, or STAGE=N with a STAGE of "
                f"{', '.join(names)}"
            )
        stages = tuple(
            replace(stage, steps=int(steps)) if name in ("", stage.name) else stage
            for stage in stages
        )
    return stages


def run(arguments: argparse.Namespace) -> None:
    """Load the label maps and train every member asked for."""
    import torch

    from bids_varaug.machine import keep_freed_memory, resolve_device, use_threads
    from bids_varaug.training.fleet import train_side_by_side
    from bids_varaug.training.heads import load_heads
    from bids_varaug.training.labels import find_label_table, load_scheme
    from bids_varaug.training.members import (
        Workshop,
        calibrate_ensemble,
        forget,
        parse_members,
        train_ensemble,
        unfinished,
    )

    keep_freed_memory()
    # Also where nobody asks for a number: numba does not know of OMP_NUM_THREADS.
    use_threads(arguments.omp_nthreads or torch.get_num_threads())
    ids = parse_members(arguments.members)
    if arguments.member_index is not None:
        ids = (pick_member(ids, arguments.member_index),)
    devices = [resolve_device(name) for name in arguments.device.split(",")]
    devices *= max(1, arguments.jobs)
    to_train, left_out = split_label_maps(arguments.labels_dir, arguments.hold_out)
    scheme = load_scheme(arguments.label_table or find_label_table(arguments.labels_dir))
    recipe = make_recipe(arguments, len(scheme.target_ids))
    if not arguments.resume and arguments.member_index is not None:
        raise UsageError(
            "--no-resume --member-index: would delete the members of the other tasks. Empty the "
            "folder before the array starts."
        )
    if not arguments.resume:
        forget(arguments.ensemble_dir)
    with closing(open_progress(arguments, scheme, recipe)) as progress:
        workshop = Workshop(
            arguments.ensemble_dir, recipe, scheme,
            load_heads(to_train, scheme, devices[0], arguments.real_share > 0),
            devices[0], progress.on_step,
        )  # fmt: skip
        name = arguments.name or arguments.ensemble_dir.resolve().name
        apart = len(devices) > 1  # other processes train the members; this one waits
        ensemble = train_ensemble(workshop, name, () if apart else ids)
    if apart:
        train_side_by_side(
            partial(member_command, arguments), unfinished(ensemble, ids), devices,
            arguments.ensemble_dir / "logs",
        )  # fmt: skip
    if left_out and arguments.member_index is None:
        print("Calibrating the posteriors on the label maps left out", file=sys.stderr)
        ensemble = calibrate_ensemble(
            workshop, load_heads(left_out, scheme, devices[0]), [path.name for path in left_out]
        )
        print(f"Temperature {ensemble.temperature}", file=sys.stderr)


def split_label_maps(directory: Path, hold_out: int) -> tuple[list[Path], list[Path]]:
    """Return the label maps to train on, and the last `hold_out`, which are left out.

    Raises
    ------
    UserError
        If there are no label maps, or none to train on.
    """
    from bids_varaug.training.labels import find_label_maps

    paths = find_label_maps(directory)
    n_train = len(paths) - hold_out
    if not 0 < n_train <= len(paths):
        raise UserError(
            f"{directory}: {len(paths)} label map(s), --hold-out {hold_out} leaves none to train "
            "on."
        )
    return paths[:n_train], paths[n_train:]


def pick_member(ids: tuple[str, ...], index: int) -> str:
    """Return member number `index`.

    Raises
    ------
    UsageError
        If there are fewer.
    """
    if not 0 <= index < len(ids):
        raise UsageError(
            f"--member-index {index}: --members names {len(ids)}, numbered 0 to {len(ids) - 1} "
            f"(sbatch --array=0-{len(ids) - 1})."
        )
    return ids[index]


def open_progress(arguments: argparse.Namespace, scheme, recipe):
    """Return what shows and logs the training."""
    from bids_varaug.training.progress import Progress

    names = dict(zip(scheme.target_ids, scheme.target_names, strict=True))
    return Progress(
        arguments.ensemble_dir / "logs", arguments.monitor, arguments.monitor_every, names,
        recipe.voxel_size,
    )  # fmt: skip


def member_command(arguments: argparse.Namespace, member_id: str, device: str) -> list[str]:
    """Return the command that trains one member of the same ensemble, for ``python -m``."""
    command = ["bids_varaug.cli.train", str(arguments.labels_dir), str(arguments.ensemble_dir)]
    changed = {"members": member_id, "member_index": 0, "device": device, "jobs": 1}
    for name, value in (vars(arguments) | changed).items():
        if name in ("labels_dir", "ensemble_dir", "resume") or value is None or value is False:
            continue
        values = value if isinstance(value, list) else [] if value is True else [value]
        command += [f"--{name.replace('_', '-')}", *map(str, values)]
    return command


if __name__ == "__main__":
    sys.exit(main())
