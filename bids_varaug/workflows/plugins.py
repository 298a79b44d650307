"""How the graph runs: nipype's plugin, its resources, and what the user sees meanwhile."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from nipype import Workflow, config, logging

from bids_varaug.cli.settings import Settings
from bids_varaug.workflows.interfaces import LOG_LEVEL


def configure_nipype(settings: Settings, log_dir: Path) -> None:
    """Set nipype's global configuration; it has no other kind."""
    level = "INFO" if settings.verbosity > 1 else "CRITICAL"
    os.environ[LOG_LEVEL] = level  # for the workers, which do not inherit this configuration
    config.update_config({
        "logging": {
            "log_to_file": False,
            "workflow_level": level,
            "interface_level": level,
            "utils_level": level,
        },
        "execution": {
            "crashdump_dir": str(log_dir),
            "crashfile_format": "txt",
            "stop_on_first_crash": settings.stop_on_first_crash,
            "check_version": False,
            "remove_unnecessary_outputs": False,
            "poll_sleep_duration": 0.1,
        },
    })  # fmt: skip
    logging.update_logging(config)


def plugin_of(settings: Settings, status_callback: Callable) -> dict:
    """Return the arguments of ``Workflow.run``: MultiProc, or what --use-plugin says."""
    if settings.plugin is not None:
        arguments = dict(settings.plugin.get("plugin_args", {}))
        return {
            "plugin": settings.plugin.get("plugin", "MultiProc"),
            "plugin_args": {"status_callback": status_callback} | arguments,
        }
    # Imported once, in the server that workers are forked from, instead of in each of them.
    multiprocessing.set_forkserver_preload(
        ["bids_varaug.segmentation.member", "bids_varaug.workflows.interfaces"]
    )
    arguments = {
        "n_procs": settings.nprocs,
        "raise_insufficient": False,
        "status_callback": status_callback,
        # Forking a process in which OpenMP has run may hang the child.
        "mp_context": "forkserver",
    }
    if settings.mem_gb is not None:
        arguments["memory_gb"] = settings.mem_gb
    return {"plugin": "MultiProc", "plugin_args": arguments}


@dataclass
class ProgressLog:
    """Prints a line when a step ends: what is done, what is left, how long it may take.

    Called by nipype in the main process with (node, status). `root` is the workflow's folder.
    """

    root: Path
    n_scans: int
    n_members: int
    started: float = field(default_factory=time.monotonic)
    members_done: set[tuple[str, str]] = field(default_factory=set)
    scans_done: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)

    def __call__(self, node, status: str) -> None:
        """Take note of one node's change of status."""
        if status not in ("end", "exception"):
            return
        # <root>/<scan>/<step>, and below it the members' own folders.
        where, step = (*Path(node.output_dir()).relative_to(self.root).parts, "")[:2]
        if where in self.failed:
            return  # some plugins report what they skip as ended
        if status == "exception":
            self.failed.add(where)
            self._say(f"{where}: {step or 'step'} failed")
        elif step == "segment":
            self._count_members(where, node.inputs.member)
        elif step == "write":
            self.scans_done.add(where)
            self._say(f"{where}: written ({len(self.scans_done)} of {self.n_scans} scans)")

    def _count_members(self, where: str, members: str | list[str]) -> None:
        """A node of one member, or (again, or from plugins that do not split it) of all."""
        members = [members] if isinstance(members, str) else members
        new = [member for member in members if (where, member) not in self.members_done]
        if not new:
            return
        self.members_done.update((where, member) for member in new)
        done, total = len(self.members_done), self.n_scans * self.n_members
        left = (time.monotonic() - self.started) / done * (total - done)
        self._say(
            f"{where}: member {', '.join(new)} done ({done} of {total} segmentations, "
            f"about {_duration(left)} left)"
        )

    def _say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def run_workflow(workflow: Workflow, settings: Settings, progress: ProgressLog) -> bool:
    """Run the graph; return whether every node succeeded.

    A failed node takes only those that depend on it along.
    """
    try:
        workflow.run(**plugin_of(settings, progress))
    except RuntimeError as error:
        # nipype's way of saying that some nodes failed, after the others are done.
        if settings.verbosity > 1:
            print(error, file=sys.stderr)
        return False
    return True
