"""``bids_varaug-train``: train an ensemble from label maps."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from bids_varaug import __version__
from bids_varaug.cli.exit_codes import ExitCode
from bids_varaug.errors import UserError


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
    parser.add_argument("--members", default="ieee,mca01..mca04,seed01..seed04")
    parser.add_argument("--name", help="of the ensemble; default: the folder's name")
    parser.add_argument("--label-table", type=Path, help="TSV of label ids (default: FreeSurfer)")
    parser.add_argument("--hold-out", type=int, default=0, metavar="N",
                        help="leave the last N label maps out of training")  # fmt: skip
    parser.add_argument("--trunk-steps", type=int, nargs=5, metavar="N",
                        help="trunk steps of the body at 4 mm, of the body at 2 mm, at 1 mm, and "
                        "at 1 mm while the learning rate falls, and of the same again (refine)")  # fmt: skip
    parser.add_argument("--steps", type=int, help="steps of each member after the fork")
    parser.add_argument("--no-trunk", action="store_true",
                        help="train every member from its own initialisation")  # fmt: skip
    parser.add_argument("--channels", type=int, nargs="+", help="network width at each level")
    parser.add_argument("--monitor", type=Path, metavar="DIR",
                        help="T1w images with *_dseg files: their Dice is logged")  # fmt: skip
    parser.add_argument("--monitor-every", type=int, default=200, metavar="STEPS")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--omp-nthreads", type=int, default=0, help="0: all")
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True,
                        help="go on from checkpoints of the same recipe")  # fmt: skip
    parser.add_argument("--version", action="version", version=__version__)
    return parser


def make_recipe(arguments: argparse.Namespace, n_classes: int):
    """Return the standard recipe with the changes that the command line asks for."""
    from bids_varaug.models.unet import NetworkShape
    from bids_varaug.training.recipe import MEMBER, Recipe

    shape = NetworkShape(n_classes)
    if arguments.channels:
        shape = replace(shape, channels=tuple(arguments.channels))
    trunk = Recipe(shape).trunk
    if arguments.trunk_steps:
        trunk = tuple(
            replace(stage, steps=steps)
            for stage, steps in zip(trunk, arguments.trunk_steps, strict=True)
        )
    member = MEMBER if arguments.steps is None else replace(MEMBER, steps=arguments.steps)
    if arguments.no_trunk:
        return Recipe(shape, trunk=(), member=(*trunk, member))
    return Recipe(shape, trunk=trunk, member=(member,))


def run(arguments: argparse.Namespace) -> None:
    """Load the label maps and train every member asked for."""
    import torch

    from bids_varaug.models.memory import keep_freed_memory
    from bids_varaug.segmentation.device import resolve_device
    from bids_varaug.training.labels import find_label_maps, load_label_map, load_scheme
    from bids_varaug.training.members import Workshop, parse_members, train_ensemble
    from bids_varaug.training.progress import Progress
    from bids_varaug.training.synthesis import Randomiser

    keep_freed_memory()
    if arguments.omp_nthreads:
        torch.set_num_threads(arguments.omp_nthreads)
    device = resolve_device(arguments.device)
    ids = parse_members(arguments.members)
    scheme = load_scheme(arguments.label_table)
    paths = find_label_maps(arguments.labels_dir)
    if arguments.hold_out >= len(paths):
        raise UserError(
            f"{arguments.labels_dir}: {len(paths)} label map(s), --hold-out {arguments.hold_out} "
            "leaves none to train on."
        )
    heads = [
        torch.from_numpy(load_label_map(path, scheme)).to(device)
        for path in paths[: len(paths) - arguments.hold_out]
    ]
    recipe = make_recipe(arguments, len(scheme.target_ids))
    if not arguments.resume:
        for path in (arguments.ensemble_dir / "checkpoints").glob("*.safetensors"):
            path.unlink()
    progress = Progress(
        arguments.ensemble_dir / "logs", arguments.monitor, arguments.monitor_every,
        dict(zip(scheme.target_ids, scheme.target_names, strict=True)),
        recipe.member[-1].windows[0].voxel_size,
    )  # fmt: skip
    workshop = Workshop(
        arguments.ensemble_dir, recipe, scheme, heads,
        Randomiser(scheme, recipe.synthesis, device), device, progress.on_step,
    )  # fmt: skip
    name = arguments.name or arguments.ensemble_dir.resolve().name
    try:
        train_ensemble(workshop, name, ids)
    finally:
        progress.close()
