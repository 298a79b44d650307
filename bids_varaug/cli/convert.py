"""``bids_varaug-convert``: networks of other software become an ensemble."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bids_varaug import __version__
from bids_varaug.cli.parser import Parser, absolute_path
from bids_varaug.cli.run import exit_code
from bids_varaug.errors import ExitCode, NoInputError, UsageError


def main(argv: Sequence[str] | None = None) -> int:
    """Convert; returns the exit code."""
    return exit_code(lambda: run(build_parser().parse_args(argv)), "Interrupted.")


# fmt: off
def build_parser() -> Parser:
    """Return the command line of the converter."""
    parser = Parser(
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
    add("checkpoints", type=absolute_path, nargs="*", metavar="CHECKPOINT",
        help="FastSurfer's own three files, or their folder: the baseline")
    add("ensemble_dir", type=absolute_path, help="output: manifest and weights, a new folder")
    add("--member", dest="members", action="append", default=[], metavar="ID=DIR", type=_member,
        help="folder of three checkpoints of another training, as member mcaNN or seedNN (may be repeated)")
    add("--name", help="name of the ensemble (default: the folder's)")
    return parser
# fmt: on


def _member(text: str) -> tuple[str, Path]:
    member, equals, folder = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text}: write ID=DIR, as in mca01=checkpoints/mca01")
    return member, absolute_path(folder)


def run(arguments: argparse.Namespace) -> ExitCode:
    """Convert what the command line names; `UserError` where it cannot be used."""
    members: dict[str, list[Path]] = {"ieee": arguments.checkpoints} if arguments.checkpoints else {}
    for member, folder in arguments.members:
        if member in members:
            raise UsageError(f"--member {member}: given twice.")
        members[member] = [folder]
    if not members:
        raise UsageError("no checkpoint. Name FastSurfer's three, or --member ID=DIR.")
    for path in (path for paths in members.values() for path in paths):
        if not path.exists():
            raise NoInputError(f"{path}: no such file or folder.")
    from bids_varaug.models.checkpoint import convert  # torch

    ensemble = convert(members, arguments.ensemble_dir, arguments.name)
    ids = ", ".join(member.id for member in ensemble.members)
    print(f"Wrote {ensemble.directory} with {ids}. Use it with --ensemble {ensemble.directory}.", file=sys.stderr)
    return ExitCode.DONE


if __name__ == "__main__":
    sys.exit(main())
