"""The command ``bids_varaug-segment``: one image, without a BIDS dataset."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence

from bids_varaug import __version__
from bids_varaug.cli import values
from bids_varaug.cli.parser import GRIDS, Parser, add_ensemble, dash_flag
from bids_varaug.errors import ExitCode, UsageError, UserError
from bids_varaug.machine import MAX_DEFAULT_THREADS


# fmt: off
def build_parser() -> argparse.ArgumentParser:
    """Parser of all flags; those that are no path are the arguments of `bids_varaug.segment`."""
    parser = Parser(
        prog="bids_varaug-segment",
        description="Segment one T1w image with a numerical ensemble and map where its members disagree. For a BIDS "
        "dataset, use bids_varaug.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("image", type=values.absolute_path, help="T1w image, .nii or .nii.gz")
    add("output_dir", type=values.absolute_path, help="a new or an empty folder")
    add("--report", action="store_true", help="also write the HTML report")
    add_ensemble(parser)
    add = parser.add_argument_group("computing").add_argument
    add("--trust", choices=("sform", "qform"),
        help="orientation to use where sform and qform contradict each other")
    add("--device", type=values.device, metavar="auto|cpu|cuda[:N]", default="auto",
        help="where the networks run (default: %(default)s)")
    add("--omp-nthreads", dest="n_threads", type=values.positive_int, metavar="N",
        help=f"threads (default: all, at most {MAX_DEFAULT_THREADS})")
    add("--version", action="version", version=f"bids_varaug {__version__}", help="show the version and exit")
    return parser
# fmt: on


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
    """Check the paths, segment, save, and say where the results are."""
    if given.image.is_dir():
        raise UsageError(
            f"{given.image}: this is a folder. For a BIDS dataset, run `bids_varaug BIDS_DIR OUTPUT_DIR participant`; "
            "here, pass one image."
        )
    from bids_varaug import api  # --help must not wait for torch

    options = vars(given) | {"members": values.split_members(given.members), "grids": GRIDS[given.grids]}
    output_dir, report = options.pop("output_dir"), options.pop("report")
    api.check_output_dir(output_dir)  # before the work
    result = api.segment(**options)
    result.save(output_dir, report)
    for warning in result.warnings:
        print(f"WARNING: {warning}", file=sys.stderr)
    print(f"Done. The results are in {output_dir}.", file=sys.stderr)
