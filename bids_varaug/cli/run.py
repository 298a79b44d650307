"""The command ``bids_varaug``: from the command line to the exit code."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from bids_varaug.cli.parser import parse_settings
from bids_varaug.errors import ExitCode, OutputError, UserError
from bids_varaug.machine import keep_caches_below
from bids_varaug.settings import Settings


def main(argv: Sequence[str] | None = None) -> int:
    """Run the app; returns the exit code, prints errors a user can fix without a traceback."""
    # The first process of a container is not ended by SIGTERM (docker stop) unless it handles it.
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        return int(run(parse_settings(argv)))
    except UserError as error:
        print(f"ERROR: {error}", file=sys.stderr)
        _kill_workers()
        return int(error.exit_code)
    except KeyboardInterrupt as interrupt:
        _kill_workers()
        print("Interrupted. To resume, pass the same -w.", file=sys.stderr)
        return 128 + (interrupt.args[0] if interrupt.args else signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, _frame: object) -> None:
    raise KeyboardInterrupt(number)


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
    loaded = ("segmentation.member", "workflows.plugins", "workflows.interfaces")
    multiprocessing.set_forkserver_preload([f"bids_varaug.{name}" for name in loaded])
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
