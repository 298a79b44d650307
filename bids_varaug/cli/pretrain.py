"""``bids_varaug-pretrain``: encoders of whole images, pre-trained on images drawn from label maps."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import closing

from bids_varaug import __version__
from bids_varaug.cli.parser import Parser, absolute_path, device_name, ensemble_name, existing_file, whole_number
from bids_varaug.cli.run import exit_code
from bids_varaug.errors import ExitCode, UsageError, UserError

SEGMENTATION = "segmentation-encoder"


def main(argv: Sequence[str] | None = None) -> int:
    """Pre-train; returns the exit code."""
    return exit_code(lambda: run(build_parser().parse_args(argv)), "Interrupted. To resume, repeat the command.")


# fmt: off
def build_parser() -> Parser:
    """Return the command line."""
    parser = Parser(
        "bids_varaug-pretrain",
        description="Pre-train encoders, networks that turn a brain image into a few features, on images drawn from "
        "label maps. To resume, run the same command again. Nothing is downloaded.",
        epilog="Then: bids_varaug BIDS_DIR OUTPUT_DIR group --features images --encoder ENCODER_DIR",
    )
    add = parser.add_argument
    add("labels_dir", type=absolute_path, help="label maps (*.nii.gz or *_dseg.nii.gz)")
    add("encoder_dir", type=absolute_path, help="output: manifest and weights")
    add("--architecture", choices=("sfcn", "resnet18", "densenet121", "vit-small", "vit-base"), default="sfcn",
        help="all but sfcn need MONAI (default: %(default)s)")
    add("--objective", choices=("volumes", "contrast", SEGMENTATION), default="volumes",
        help="predict the volumes of all structures; tell images of one anatomy from others; or take the encoder of a "
        "segmentation ensemble, without training (default: %(default)s)")
    add("--init", type=existing_file, metavar="FILE",
        help="weights to start from: UK Biobank's SFCN, MONAI's or MedicalNet's ResNet, torchvision's r3d_18, ViT-B of "
        "timm or VideoMAE, an encoder of this program (default: random weights)")
    add("--members",
        help="as for bids_varaug-train: ieee, mcaNN, seedNN, and ranges of them (default: ieee,seed01,seed02; of a "
        "segmentation ensemble all)")
    add("--member-index", type=whole_number(0), metavar="I",
        help="train only member number I of --members, counted from 0; afterwards run once without this flag")
    add("--steps", type=whole_number(1), metavar="N", help="of training (default: 1500)")
    add("--batch-size", type=whole_number(2), metavar="N",
        help="anatomies in a step (default: 4; 16 for contrast, which needs many)")
    add("--learning-rate", type=float, metavar="X", help="at its highest (default: 3e-3)")
    add("--hold-out", type=whole_number(0), default=3, metavar="N",
        help="leave the last N label maps out of training, to compare members on (default: %(default)s)")
    add("--label-table", type=existing_file, metavar="TSV", help="label ids (default: *dseg.tsv in LABELS_DIR, else "
        "FreeSurfer's)")
    add("--ensemble", type=ensemble_name, default="aseg31", metavar="NAME|DIR",
        help=f"whose encoders to take, for --objective {SEGMENTATION} (default: %(default)s)")
    add("--device", type=device_name, default="auto", help="auto, cpu, cuda, cuda:N (default: %(default)s)")
    add("--omp-nthreads", type=whole_number(1), metavar="N", help="threads (default: all)")
    add("--version", action="version", version=f"bids_varaug {__version__}")
    return parser
# fmt: on


def run(given: argparse.Namespace) -> ExitCode:
    """Train what the command line names; `UserError` where it cannot be used."""
    import torch

    from bids_varaug.machine import resolve_device, use_threads
    from bids_varaug.models.encoders import SEGMENTER
    from bids_varaug.models.ensemble import load_ensemble
    from bids_varaug.training.labels import find_label_maps, find_label_table, load_scheme, load_subjects
    from bids_varaug.training.monitor import TrainingMonitor
    from bids_varaug.training.pretrain import CONTRAST, Pretrainer, PretrainRecipe, hash_of
    from bids_varaug.training.recipe import parse_members

    use_threads(given.omp_nthreads or torch.get_num_threads())
    segmenters = load_ensemble(given.ensemble) if given.objective == SEGMENTATION else None
    everybody = ",".join(m.id for m in segmenters.members) if segmenters else "ieee,seed01,seed02"
    ids = parse_members(given.members or everybody)
    if given.member_index is not None:
        if given.member_index >= len(ids):
            raise UsageError(f"--member-index {given.member_index}: --members names {len(ids)}, counted from 0.")
        ids = (ids[given.member_index],)
    device, label_maps = resolve_device(given.device), find_label_maps(given.labels_dir)
    scheme = load_scheme(given.label_table or find_label_table(given.labels_dir))
    if given.hold_out >= len(label_maps):
        raise UserError(
            f"{given.labels_dir}: {len(label_maps)} label map(s), --hold-out {given.hold_out} leaves none to train on."
        )
    n_train = len(label_maps) - given.hold_out
    changes = {"steps": given.steps, "lr": given.learning_rate,
               "batch": given.batch_size or (16 if given.objective == CONTRAST else None)}  # fmt: skip
    recipe = PretrainRecipe(
        SEGMENTER if segmenters else given.architecture, given.objective, init=hash_of(given.init),
        **{name: value for name, value in changes.items() if value is not None},
    )  # fmt: skip
    with closing(TrainingMonitor(given.encoder_dir / "logs", [], 50, (), 2.0)) as monitor:
        trainer = Pretrainer(
            given.encoder_dir, recipe, scheme, load_subjects(label_maps[:n_train], scheme, device), device, given.init,
            segmenters, monitor.on_step,
        )  # fmt: skip
        ensemble = trainer.train_encoders(given.encoder_dir.name, ids)
    if given.member_index is None:
        held_out = load_subjects(label_maps[n_train:], scheme, device) or trainer.subjects
        ensemble = trainer.compare_members(ensemble, held_out)
        for member, scores in ensemble.training["comparison"]["members"].items():
            for name, value in scores.items():
                print(f"{member}: {name} {value:.3f}", file=sys.stderr)
    print(f"Done: {given.encoder_dir} has {', '.join(m.id for m in ensemble.members)}.", file=sys.stderr)
    return ExitCode.DONE


if __name__ == "__main__":
    sys.exit(main())
