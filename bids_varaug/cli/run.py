"""From the command line to the exit code: ``bids_varaug``, ``bids_varaug-segment`` and ``bids_varaug-power``."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from bids_varaug.cli.parser import build_power_parser, build_segment_parser, dash_flag, parse_settings, split_members
from bids_varaug.errors import ExitCode, NoInputError, OutputError, UsageError, UserError
from bids_varaug.machine import WORKER_MODULES, keep_caches_below
from bids_varaug.settings import Settings


def main(argv: Sequence[str] | None = None) -> int:
    """Run the app; returns the exit code, prints errors a user can fix without a traceback."""
    # The first process of a container is not ended by SIGTERM (docker stop) unless it handles it.
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        return exit_code(lambda: run(parse_settings(argv)), "Interrupted. To resume, pass the same -w.")
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, _frame: object) -> None:
    raise KeyboardInterrupt(number)


def exit_code(work: Callable[[], ExitCode], interrupted: str) -> int:
    """Do the work; print errors that a user can fix without a traceback."""
    try:
        return int(work())
    except UserError as error:
        print(f"ERROR: {error}", file=sys.stderr)
        _kill_workers()
        return int(error.exit_code)
    except KeyboardInterrupt as interrupt:
        _kill_workers()
        print(interrupted, file=sys.stderr)
        return 128 + (interrupt.args[0] if interrupt.args else signal.SIGINT)


def run(settings: Settings) -> ExitCode:
    """Run the level of analysis that is asked for."""
    # A dry run leaves nothing in the work directory.
    place = tempfile.TemporaryDirectory() if settings.dry_run else nullcontext(settings.work_dir)
    with place as folder:
        keep_caches_below(Path(folder))
        if settings.level == "participant":
            return run_participant_level(settings)
        from bids_varaug.workflows.group import run_group  # --help must not wait for pandas

        page = run_group(settings)
    if page is not None:
        print(f"Done. Open {page}.", file=sys.stderr)
    return ExitCode.DONE


def run_participant_level(settings: Settings) -> ExitCode:
    """Segment every T1w image that the settings select."""
    # With `docker -u` and a user id that the image has no name for, pybids and the validator, which look for the home
    # directory, do not start.
    try:
        Path.home()
    except RuntimeError:
        os.environ["HOME"] = tempfile.gettempdir()
    _start_workers_server(settings)
    # While the server imports torch, which takes as long.
    from bids_varaug.workflows.participant import run_participants

    return run_participants(settings)


def _start_workers_server(settings: Settings) -> None:
    """Start the server that worker processes are forked from, if there will be any."""
    if settings.dry_run or settings.reports_only or settings.plugin_name != "MultiProc":
        return
    multiprocessing.set_forkserver_preload(list(WORKER_MODULES))
    try:
        forkserver.ensure_running()
    except OSError as error:  # a socket's path holds about 100 bytes
        raise OutputError(
            f"{tempfile.gettempdir()}: cannot make a socket for the workers there ({error}). Set TMPDIR to a writable "
            "folder with a shorter path."
        ) from error


def _kill_workers() -> None:
    """End workers and the server that they are forked from.

    Python would wait for their steps, longer than docker does, and the server would finish its imports first.
    """
    for worker in multiprocessing.active_children():
        worker.kill()
    server: Any = forkserver._forkserver  # multiprocessing has no public way
    if server._forkserver_pid is not None:
        os.kill(server._forkserver_pid, signal.SIGKILL)
        server._stop()


def segment_main(argv: Sequence[str] | None = None) -> int:
    """Segment one image, without a BIDS dataset; returns the exit code, prints errors without a traceback."""
    arguments = [dash_flag(argument) for argument in (sys.argv[1:] if argv is None else argv)]
    return exit_code(lambda: segment_image(arguments), "Interrupted.")


def segment_image(argv: Sequence[str]) -> ExitCode:
    """Check the paths, segment, save, and say where the results are."""
    given = build_segment_parser().parse_args(argv)
    if given.image.is_dir():
        raise UsageError(
            f"{given.image}: this is a folder. For a BIDS dataset, run `bids_varaug BIDS_DIR OUTPUT_DIR participant`; "
            "here, pass one image."
        )
    if not given.image.is_file():
        raise NoInputError(f"{given.image}: no such file, or a link to content that is not here (`datalad get` it).")
    from bids_varaug import api  # --help must not wait for torch

    options = vars(given) | {"members": split_members(given.members)}
    output_dir, report = options.pop("output_dir"), options.pop("report")
    api.check_output_dir(output_dir)  # before the work
    result = api.segment(**options)
    result.save(output_dir, report)
    for warning in result.warnings:
        print(f"WARNING: {warning}", file=sys.stderr)
    print(f"Done. The results are in {output_dir}.", file=sys.stderr)
    return ExitCode.DONE


def power_main(argv: Sequence[str] | None = None) -> int:
    """Print what numerical noise does to each statistic of a published result; returns the exit code."""
    from bids_varaug.variability.power import ALPHA, flip_probability, noise_of_statistics

    try:
        given = build_power_parser().parse_args(argv)
        table = noise_of_statistics(given.npvr, given.n, given.p)
    except (UsageError, ValueError) as error:
        print(f"ERROR: {error}", file=sys.stderr)
        return int(ExitCode.USAGE)
    print(f"NPVR {given.npvr:g}, {given.n} people, p = {given.p:g} (two-sided)\n")
    print(table.rename(columns={"sd": "SD by numerical noise"}).round(3).to_string())
    rerun, clean = (flip_probability(given.npvr, given.n, given.p, rerun=again) for again in (True, False))
    print(f"\nProbability that one more run of the pipeline has p on the other side of {ALPHA:g}: {rerun:.1%}")
    print(f"Probability that p without numerical noise is on the other side: {clean:.1%}")
    return int(ExitCode.DONE)
