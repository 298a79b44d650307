"""The server that worker processes are forked from, and what they learn from the environment.

Without nipype or torch, so that the server can import them while this process does.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
from multiprocessing import forkserver

from bids_varaug.errors import OutputError
from bids_varaug.settings import Settings

LOG_LEVEL = "BIDS_VARAUG_NIPYPE_LEVEL"
"""Environment variable by which nipype's worker processes learn how much to log."""


def start_workers_server(settings: Settings) -> None:
    """Start the server, which takes seconds; without it, only tell the environment.

    A run that computes nothing, or not here, needs none.

    Raises
    ------
    OutputError
        If the temporary folder does not take its socket.
    """
    # Workers and jobs do not inherit nipype's configuration.
    os.environ[LOG_LEVEL] = log_level(settings)
    if settings.dry_run or settings.reports_only:
        return
    if settings.plugin is None or settings.plugin["plugin"] == "MultiProc":
        multiprocessing.set_forkserver_preload(
            ["bids_varaug.segmentation.member", "bids_varaug.workflows.interfaces"]
        )
        try:
            forkserver.ensure_running()
        except OSError as error:  # a socket's path holds about 100 bytes
            raise OutputError(
                f"{tempfile.gettempdir()}: cannot make a socket for the workers there ({error}). "
                "Set TMPDIR to a writable folder with a shorter path."
            ) from error


def stop_workers_server() -> None:
    """End the server at once, if there is one; it would finish its imports first."""
    server = forkserver._forkserver  # multiprocessing has no public way
    if server._forkserver_pid is not None:
        os.kill(server._forkserver_pid, signal.SIGKILL)
        server._stop()


def log_level(settings: Settings) -> str:
    """How much nipype logs, here and in the workers."""
    return ("CRITICAL", "INFO", "DEBUG")[min(settings.verbosity, 2)]
