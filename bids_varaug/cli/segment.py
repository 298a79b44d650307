"""The command ``bids_varaug-segment``: one image, without a BIDS dataset."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence

from bids_varaug.cli.parser import GRIDS, build_segment_parser, dash_flag, split_members
from bids_varaug.errors import ExitCode, UsageError, UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Segment one image; returns the exit code, prints errors without a traceback."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        run(build_segment_parser().parse_args([dash_flag(argument) for argument in arguments]))
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

    options = vars(given) | {"members": split_members(given.members), "grids": GRIDS[given.grids]}
    output_dir, report = options.pop("output_dir"), options.pop("report")
    api.check_output_dir(output_dir)  # before the work
    result = api.segment(**options)
    result.save(output_dir, report)
    for warning in result.warnings:
        print(f"WARNING: {warning}", file=sys.stderr)
    print(f"Done. The results are in {output_dir}.", file=sys.stderr)
