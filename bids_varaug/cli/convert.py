"""``bids_varaug-convert``: networks of other software become an ensemble."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bids_varaug import __version__
from bids_varaug.errors import ExitCode, UsageError, UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Convert; returns the exit code."""
    try:
        run(build_parser().parse_args(argv))
    except UserError as error:
        print(f"bids_varaug-convert: {error}", file=sys.stderr)
        return int(error.exit_code)
    return int(ExitCode.DONE)


# fmt: off
def build_parser() -> argparse.ArgumentParser:
    """Return the command line of the converter."""
    parser = argparse.ArgumentParser(
        "bids_varaug-convert",
        description="Make an ensemble of networks that another software trained. Nothing is downloaded, and nothing in "
        "the files is executed.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    software = parser.add_subparsers(dest="software", required=True)
    fastsurfer = software.add_parser("fastsurfer", help="checkpoints of FastSurferVINN",
        description="Convert checkpoints of FastSurferVINN, one of each plane for a member. The plane is taken from "
        "the name of the file.")
    add = fastsurfer.add_argument
    add("checkpoints", type=Path, nargs="*", metavar="CHECKPOINT",
        help="FastSurfer's own three files, or their folder: the baseline")
    add("ensemble_dir", type=Path, help="output: manifest and weights, a new folder")
    add("--member", dest="members", action="append", default=[], metavar="ID=DIR", type=_member,
        help="folder of three checkpoints trained anew, as member mcaNN or seedNN (may be repeated)")
    add("--name", help="name of the ensemble (default: the folder's)")
    return parser
# fmt: on


def _member(text: str) -> tuple[str, Path]:
    member, equals, folder = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text}: write ID=DIR, as in mca01=checkpoints/mca01")
    return member, Path(folder)


def run(arguments: argparse.Namespace) -> None:
    """Convert what the command line names; `UserError` where it cannot be used."""
    from bids_varaug.models.checkpoint import convert  # torch

    members: dict[str, list[Path]] = {"ieee": arguments.checkpoints} if arguments.checkpoints else {}
    for member, folder in arguments.members:
        if member in members:
            raise UsageError(f"--member {member}: given twice.")
        members[member] = [folder]
    if not members:
        raise UsageError("no checkpoint. Name FastSurfer's three, or --member ID=DIR.")
    ensemble = convert(members, arguments.ensemble_dir, arguments.name)
    ids = ", ".join(member.id for member in ensemble.members)
    print(f"Wrote {ensemble.directory} with {ids}. Use it with --ensemble {ensemble.directory}.", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
