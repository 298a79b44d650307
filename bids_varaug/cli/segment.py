"""The command ``bids_varaug-segment``: one image, without a BIDS dataset."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path

from bids_varaug import __version__
from bids_varaug.cli import values
from bids_varaug.cli.parser import Parser, add_ensemble, dash_flag
from bids_varaug.errors import ExitCode, UsageError, UserError
from bids_varaug.machine import MAX_DEFAULT_THREADS, available_processors
from bids_varaug.settings import Settings


def build_parser() -> argparse.ArgumentParser:
    """Parser of all flags; those of the ensemble are those of ``bids_varaug``."""
    parser = Parser(
        prog="bids_varaug-segment",
        description="Segment one T1w image with a numerical ensemble and map where its members "
        "disagree. For a BIDS dataset, use bids_varaug.",
        allow_abbrev=False,
    )
    parser.set_defaults(bids_filters={})
    parser.set_defaults(**{f.name: f.default for f in fields(Settings) if f.default != MISSING})
    add = parser.add_argument
    add("image", type=values.absolute_path, help="T1w image, .nii or .nii.gz")
    add("output_dir", type=values.absolute_path, help="a new or an empty folder")
    add("--report", action="store_true", help="also write the HTML report")
    add_ensemble(parser.add_argument_group("ensemble"))
    add = parser.add_argument_group("computing").add_argument
    add("--trust", choices=("sform", "qform"),
        help="orientation to use where sform and qform contradict each other")  # fmt: skip
    add("--device", type=values.device, metavar="auto|cpu|cuda[:N]", default="auto",
        help="where the networks run (default: %(default)s)")  # fmt: skip
    add("--omp-nthreads", type=values.positive_int, metavar="N",
        default=min(available_processors(), MAX_DEFAULT_THREADS),
        help="threads (default: %(default)s)")  # fmt: skip
    add("--version", action="version", version=f"bids_varaug {__version__}", help="show the version and exit")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Segment one image; returns the exit code, prints errors without a traceback."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        run(build_parser().parse_args([dash_flag(argument) for argument in arguments]))
    except UserError as error:
        print(f"ERROR: {error}", file=sys.stderr)
        return int(error.exit_code)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 128 + signal.SIGINT
    return int(ExitCode.DONE)


def run(given: argparse.Namespace) -> None:
    """Check the paths, segment, and say where the results are."""
    if given.image.is_dir():
        raise UsageError(
            f"{given.image}: this is a folder. For a BIDS dataset, run `bids_varaug BIDS_DIR "
            "OUTPUT_DIR participant`; here, pass one image."
        )
    from bids_varaug import api  # --help must not wait for torch

    api.check_output_dir(given.output_dir)
    given.members = tuple(name for names in given.members for name in names.split(","))
    given.grids = 0 if given.grids == "auto" else int(given.grids)
    given.bids_dir, given.level = given.image.parent, "participant"
    with tempfile.TemporaryDirectory(prefix="bids_varaug-") as folder:
        given.work_dir = Path(folder) / "work"
        settings = Settings(**{f.name: getattr(given, f.name) for f in fields(Settings)})
        request = api.segment_into(settings, given.image)
    api.finish_output(request, given.output_dir, given.report)
    for warning in api.Segmentation(request).warnings:
        print(f"WARNING: {warning}", file=sys.stderr)
    print(f"Done. The results are in {given.output_dir}.", file=sys.stderr)
