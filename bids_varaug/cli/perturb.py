"""Command lines ``bids_varaug-perturb`` and ``bids_varaug-compare``: numerical noise in programs that are not ours."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import pandas as pd

from bids_varaug import __version__
from bids_varaug.cli.parser import Parser, absolute_path, existing_file, whole_number
from bids_varaug.cli.run import exit_code
from bids_varaug.errors import ExitCode, UsageError, UserError
from bids_varaug.machine import available_processors
from bids_varaug.pipelines.compare import compare_runs, find_runs
from bids_varaug.pipelines.interposer import DOUBLE_BITS, check_program, compile_interposer, libm_calls
from bids_varaug.pipelines.runs import PLACE, Request, run_perturbed, summarise


def perturb_main(argv: Sequence[str] | None = None) -> int:
    """Run a program repeatedly under noise; returns the exit code, 1 if a run failed."""
    return exit_code(lambda: _perturb(argv), "Interrupted. To resume, give the same command again.")


def compare_main(argv: Sequence[str] | None = None) -> int:
    """Compare what repeated runs wrote; returns the exit code."""
    return exit_code(lambda: _compare(argv), "Interrupted.")


# fmt: off
def _perturb_parser() -> Parser:
    parser = Parser(
        prog="bids_varaug-perturb",
        usage="%(prog)s OUTPUT_DIR [--n N] [--seed N] [options] -- COMMAND ...",
        description="Run a program (ANTs, FSL, FreeSurfer, your own) N times with the last bit of each result of libm "
        "made random, and once as it is. Then compare the runs with bids_varaug-compare.",
        epilog="Example: bids_varaug-perturb out --n 10 -- antsRegistrationSyNQuick.sh -d 3 -f mni.nii.gz "
        f"-m t1w.nii.gz -o {PLACE}/syn_",
    )
    add = parser.add_argument
    add("output_dir", type=absolute_path, help="a new folder, or one to resume in; each run gets a folder inside")
    add("--n", type=whole_number(1, 999), default=10, metavar="N", help="runs with noise (default: %(default)s)")
    add("--seed", type=whole_number(0), default=0, metavar="N", help="of the noise (default: %(default)s)")
    add("--precision", type=whole_number(1, DOUBLE_BITS), default=DOUBLE_BITS, metavar="BITS",
        help="virtual precision; float32 has at most 24 (default: %(default)s, the last bit)")
    add("--spare-integers", action="store_true",
        help="leave results alone that are small whole numbers; for programs that compute sizes with libm (Python)")
    add("--nprocs", type=whole_number(1), metavar="N", help="runs at a time (default: all processors)")
    add("--version", action="version", version=f"bids_varaug {__version__}", help="show the version and exit")
    return parser


def _compare_parser() -> Parser:
    parser = Parser(
        prog="bids_varaug-compare",
        description="Compare repeated runs of a pipeline, file by file: label images, images, warps, affine matrices, "
        "tables.",
    )
    add = parser.add_argument
    add("runs", type=absolute_path, nargs="+", metavar="RUN",
        help="folders of runs, or the one folder of bids_varaug-perturb")
    add("-o", "--output-dir", type=absolute_path, required=True, help="where page, table and maps go")
    add("--labels", type=existing_file, metavar="TSV",
        help="names of labels, columns index and name (default: FreeSurfer's)")
    add("--background", type=existing_file, metavar="IMAGE", help="image to draw the maps over, of the same grid")
    add("--participant", metavar="LABEL", help="participant_id in volumes.tsv (default: from the folders' names)")
    add("--version", action="version", version=f"bids_varaug {__version__}", help="show the version and exit")
    return parser
# fmt: on


def _perturb(argv: Sequence[str] | None) -> ExitCode:
    arguments = list(sys.argv[1:] if argv is None else argv)
    at = arguments.index("--") if "--" in arguments else len(arguments)
    given, command = _perturb_parser().parse_args(arguments[:at]), arguments[at + 1 :]
    if not command:
        raise UsageError("no command was given. Write it after --, for example: -- antsRegistration ... -o {run}/out_")
    program = check_program(command[0])
    calls = libm_calls(program)
    if calls == []:
        print(
            f"WARNING: {program} asks for none of the functions of libm that get noise. Unless it starts a program "
            "that does, the runs will fail for that. (torch and numpy use vector code of their own; for torch there is "
            "bids_varaug.numerics.MonteCarloArithmetic.)",
            file=sys.stderr,
        )
    if calls:
        print(f"{program} asks libm for {', '.join(calls)}.", file=sys.stderr)
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bids_varaug"
    library = compile_interposer(caches)
    request = Request(tuple(command), given.seed, given.precision, given.spare_integers)
    outcomes = run_perturbed(request, given.n, given.output_dir, library, given.nprocs or available_processors())
    failed = [outcome.name for outcome in outcomes if not outcome.done]
    summary = summarise(outcomes)
    told = f"{summary['n']} of {given.n} runs with noise succeeded, {summary['calls']:,} calls of libm"
    if outcomes[0].done and summary["n"]:
        told += f", {summary['slowdown']:.2f} times the processor time of the run without noise"
    if summary["n"] > 1:
        told += f". Next: bids_varaug-compare {given.output_dir} -o {given.output_dir}_compared"
    print(f"{told}.", file=sys.stderr)
    if failed:
        print(f"ERROR: failed: {', '.join(failed)}. The same command runs these again.", file=sys.stderr)
        return ExitCode.SUBJECT_FAILED
    return ExitCode.DONE


def _compare(argv: Sequence[str] | None) -> ExitCode:
    given = _compare_parser().parse_args(argv)
    runs = find_runs(given.runs)
    found = compare_runs(runs, _read_names(given.labels))
    from bids_varaug.reports.comparison import write_comparison  # matplotlib

    settings = {"runs": list(runs), "participant": given.participant}
    page = write_comparison(found, given.output_dir, settings, given.background)
    for text in found.notes:
        print(f"Note: {text}", file=sys.stderr)
    print(f"Done. Open {page}.", file=sys.stderr)
    return ExitCode.DONE


def _read_names(path: Path | None) -> dict[int, str]:
    try:
        table = pd.read_csv(path or files("bids_varaug") / "data" / "aseg31.tsv", sep="\t")
        return dict(zip(table["index"].astype(int), table["name"].astype(str), strict=True))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--labels {path}: no table with the columns index and name ({error}).") from error
