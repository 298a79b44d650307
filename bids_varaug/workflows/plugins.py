"""How the graph runs: nipype's plugin, its resources, and what the user sees meanwhile."""

from __future__ import annotations

import math
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, cast

import networkx as nx
from nipype import Node, Workflow, config, logging
from nipype.interfaces.base import TraitedSpec
from nipype.pipeline import plugins
from nipype.pipeline.plugins.multiproc import MultiProcPlugin, process_initializer
from nipype.utils import filemanip

from bids_varaug.derivatives import names
from bids_varaug.errors import UsageError
from bids_varaug.machine import memory_bound
from bids_varaug.settings import Settings

MEMORY_SHARE = 0.9  # for the steps; the rest is for this process and what else runs
SUBMIT_ONLY = ("SLURMGraph", "SGEGraph", "CondorDAGMan")  # end when the jobs are submitted
LOG_LEVELS = ("CRITICAL", "INFO", "DEBUG")  # of nipype, without -v, with -v and with -vv
UNFINISHED = "PENDING,CONFIGURING,RUNNING,SUSPENDED,STOPPED,COMPLETING"

WRITING = 3.0  # passes (15 s against 3.5 to 5.4 s a pass, benchmarks/participant.py)

KILLED = (
    "ERROR: a worker process was killed, most likely because memory ran out. Use a smaller --nprocs or --mem (fewer "
    "steps at once), and resume with the same -w."
)

# nipype's loop sleeps until a time of day: a clock that is set back would stop it for as long. It waits for files by
# that clock too: one that is set forward would end the wait at once (tests/faults/test_surroundings.py).
plugins.base.time = filemanip.time = time.monotonic


def configure_nipype(settings: Settings) -> None:
    """Set nipype's global configuration; it has no other kind."""
    os.environ.setdefault("LOGNAME", "bids_varaug")  # jobs are named so; containers have none
    level = LOG_LEVELS[min(settings.verbosity, 2)]
    levels = {f"{name}_level": level for name in ("workflow", "interface", "utils")}
    config.update_config({
        "logging": {"log_to_file": False, **levels},
        "execution": {
            "crashdump_dir": str(names.logs(settings.output_dir)),
            "crashfile_format": "txt",
            "stop_on_first_crash": settings.stop_on_first_crash,
            "check_version": False,
            "create_report": False,  # its files lie where jobs that share -w would collide
            "remove_unnecessary_outputs": False,
            # A batch system is not to be flooded.
            "poll_sleep_duration": 0.1 if settings.runs_here else 2,
        },
    })  # fmt: skip
    logging.update_logging(config)


def check_plugin(settings: Settings) -> None:
    """Raise a `UsageError` for a ``--use-plugin`` that nipype lacks, or that cannot do what is asked for."""
    name = settings.plugin_name
    known = sorted(each.removesuffix("Plugin") for each in dir(plugins) if each.endswith("Plugin"))
    if name not in known:
        raise UsageError(f"--use-plugin: nipype has no plugin {name!r}. It has {', '.join(known)}.")
    if settings.clean_workdir and name in SUBMIT_ONLY:
        why = f"with {name} the jobs still need the work directory when this command ends"
        raise UsageError(f"--clean-workdir: {why}. Leave one of the two out.")


def run_workflow(workflow: Workflow, settings: Settings, progress: ProgressLog) -> bool:
    """Run the graph; return whether every node succeeded. Those that depend on a failed one do not run."""
    name, given = settings.plugin_name, dict((settings.plugin or {}).get("plugin_args", {}))
    if name not in SUBMIT_ONLY:  # else there is nobody left to call
        given = {"status_callback": progress} | given
    if name.startswith("SLURM"):  # each step asks for what it needs; what the user's arguments say wins
        for node in map(workflow.get_node, workflow.list_node_names()):
            own = f"--cpus-per-task={node.n_procs} --mem={math.ceil(node.mem_gb * 1024)}M"
            node.plugin_args = {"sbatch_args": f"{own} {given.get('sbatch_args', '')}".strip(), "overwrite": True}
    runner: Any = name
    if name == "SLURM":
        runner = SlurmPlugin(given)
    elif name == "MultiProc":
        # nipype would count the whole machine's, of which a container may have a small part.
        memory = settings.mem_gb or MEMORY_SHARE * memory_bound().total
        limits = {"n_procs": settings.nprocs, "memory_gb": memory, "raise_insufficient": False}
        runner = WorkersPlugin(limits | given)
    try:
        workflow.run(runner, plugin_args=given)
    except Exception as error:
        # What the first failed node raised, or a RuntimeError; `progress` has told its name, and the node its error.
        if settings.verbosity or not progress.failed:
            print(f"ERROR: {type(error).__name__}: {error}", file=sys.stderr)
        return False
    return True


class WorkerPool:
    """Executors of one process each: a process that is killed takes no other along.

    The first idle one gets the next task, and keeps its memory: in turns by all processes of one executor, each pass
    would need memory that is new to its process, and the kernel takes a fifth of the pass to clear it.
    """

    def __init__(self, new_executor: Callable[[], ProcessPoolExecutor]):
        self._new_executor = new_executor
        self._last: dict[ProcessPoolExecutor, Future] = {}

    def submit(self, function: Callable, *arguments: Any) -> Future:
        """Run `function` in the first idle process, or a new one."""
        idle = (executor for executor, last in self._last.items() if last.done())
        executor = next(idle, None) or self._new_executor()
        try:
            self._last[executor] = executor.submit(function, *arguments)
        except BrokenProcessPool:
            del self._last[executor]
            return self.submit(function, *arguments)
        return self._last[executor]

    def shutdown(self) -> None:
        """Wait for all tasks and end the processes."""
        for executor in self._last:
            executor.shutdown()


class WorkersPlugin(MultiProcPlugin):
    """nipype's MultiProc, but a step whose worker is killed fails, and no worker survives the main process.

    MultiProc waits for ever for a worker that the kernel killed to free memory. It would also run the first step of
    all scans, then the second: of an interrupted run of hundreds, none would be done.
    """

    def __init__(self, plugin_args: dict[str, Any]):
        super().__init__(plugin_args)
        # Forking a process in which OpenMP has run may hang the child.
        context = multiprocessing.get_context("forkserver")
        setup = self._cwd, logging.getLogger("nipype.workflow").level
        self.pool = WorkerPool(partial(ProcessPoolExecutor, 1, context, _start_worker, setup))

    def _sort_jobs(self, jobids: list[int], scheduler: str | None = None) -> list[int]:
        """Put the steps of the first scan first."""
        return sorted(jobids, key=lambda job: (self.procs[self.mapnodesubids.get(job, job)].fullname, job))

    def _async_callback(self, future: Future) -> None:
        """Leave the future to `_get_result`."""

    def _get_result(self, taskid: int) -> dict[str, Any] | None:
        future = self._task_obj[taskid]
        if not future.done():
            return None
        if (error := future.exception()) is None:
            return future.result()
        reason = KILLED if isinstance(error, BrokenProcessPool) else f"ERROR: {error!r}"
        print(reason, file=sys.stderr, flush=True)
        return {"taskid": taskid, "result": None, "traceback": [f"{reason}\n{error!r}\n"]}


def _start_worker(folder: str, level: int) -> None:
    """Begin a worker; it ends when the main process was killed, and does not write beside the next run."""

    def end_with_parent() -> None:
        cast(BaseProcess, multiprocessing.parent_process()).join()
        os._exit(1)

    process_initializer(folder)
    logging.getLogger("nipype.workflow").setLevel(level)
    threading.Thread(target=end_with_parent, daemon=True).start()


class SlurmPlugin(plugins.SLURMPlugin):
    """nipype's SLURM plugin for a cluster that others use too.

    One ``squeue`` asks for all steps, a controller that does not answer for a while fails nothing, and no job outlives
    the run. Further plugin arguments: ``poll_seconds`` between two calls of squeue, and ``result_seconds``, how long
    the result of a finished job may take to appear.
    """

    def __init__(self, plugin_args: dict[str, Any]):
        super().__init__(plugin_args=plugin_args)
        self._asked = -math.inf
        self._unfinished: set[int] = set()
        self._logs: dict[int, Path] = {}

    def run(self, graph: nx.DiGraph, config: dict, updatehash: bool = False) -> None:
        """Run the graph; cancel what is left of its jobs."""
        # NFS shows a file of another node up to a minute later.
        config["execution"]["job_finished_timeout"] = self.plugin_args.get("result_seconds", 60)
        try:
            super().run(graph, config, updatehash)
        finally:  # interrupted, or stopped on the first crash
            if self._pending:
                subprocess.run(["scancel", *map(str, self._pending)], check=False)

    def _submit_batchtask(self, scriptfile: str, node: Node) -> int:
        # An earlier run's would be taken for the result of a job that is killed before it starts.
        for result in Path(node.output_dir()).glob("result_*.pklz"):
            result.unlink()
        job = super()._submit_batchtask(scriptfile, node)
        self._unfinished.add(job)
        self._logs[job] = Path(scriptfile).with_name(f"slurm-{job}.out")
        return job

    def _is_pending(self, job: int) -> bool:
        if time.monotonic() - self._asked >= self.plugin_args.get("poll_seconds", 5):
            self._asked = time.monotonic()
            jobs = ",".join(map(str, self._pending))
            command = ["squeue", "--noheader", "--format=%A", f"--states={UNFINISHED}", f"--jobs={jobs}"]
            answer = subprocess.run(command, capture_output=True, text=True)
            if answer.returncode == 0 or "Invalid job id" in answer.stderr:
                self._unfinished = {int(job) for job in answer.stdout.split()}
            else:  # they are as they were
                logging.getLogger("nipype.workflow").warning("squeue: %s", answer.stderr.strip())
        return job in self._unfinished

    def _get_result(self, job: int) -> dict[str, Any] | None:
        result = super()._get_result(job)
        if result is None:
            return None
        log = self._logs.pop(job)  # elsewhere with ``--output`` of one's own
        for line in log.read_text(errors="replace").splitlines() if log.exists() else ():
            if line.startswith(("ERROR:", "WARNING:", "slurmstepd: error:")):
                print(line, file=sys.stderr, flush=True)
        if isinstance(result["traceback"], str):  # nipype stops at that, with a TypeError
            result["traceback"] = result["traceback"].splitlines(keepends=True)
        return result


@dataclass
class ProgressLog:
    """Prints a line when a step ends: the time, what is done, what is left, how long it may take."""

    root: Path  # folder of the workflow
    scans: Mapping[str, str]  # folder below it -> what the scan is called
    n_members: int  # that segment each scan
    reports: Mapping[str, str] = field(default_factory=dict)  # folder below it -> whose report a step draws
    on_written: Callable[[Path], None] | None = None  # called with the folder of a scan whose derivatives are written
    started: float = field(default_factory=time.monotonic)
    passes_done: set[tuple[str, str]] = field(default_factory=set)
    written: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)

    def __call__(self, node: Node, status: str) -> None:
        """Take note of one node's change of status; called by nipype in the main process."""
        if status not in ("end", "exception"):
            return
        # <root>/<scan>/<step>, and below it the members' own; nipype follows links, as the work directory may be.
        folder = Path(node.output_dir()).resolve()
        where, step = (*folder.relative_to(self.root.resolve()).parts, "")[:2]
        name = self.scans.get(where, self.reports.get(where, where))
        if name in self.failed:
            return  # some plugins report what they skip as ended
        if status == "exception":
            self.failed.add(name)
            _say(f"{name}: {step or 'step'} failed")
        elif step == "segment":
            self._count_passes(name, node.inputs)
        elif step == "write":
            self.written.add(name)
            _say(f"{name}: written ({len(self.written)} of {len(self.scans)} scans)")
            if self.on_written is not None:
                self.on_written(self.root / where)

    def _count_passes(self, scan: str, inputs: TraitedSpec) -> None:
        """Take note of one pass, or (again, or from plugins that do not split a node) of all."""
        members = inputs.member if isinstance(inputs.member, list) else [inputs.member]
        passes = [f"member {member.id}" for member in members]
        new = [each for each in passes if (scan, each) not in self.passes_done]
        if not new:
            return
        self.passes_done.update((scan, each) for each in new)
        done, total = len(self.passes_done), len(self.scans) * self.n_members
        # Consensus, derivatives and report take about as long as so many passes.
        finished, all_work = done + WRITING * len(self.written), total + WRITING * len(self.scans)
        left = round((time.monotonic() - self.started) / finished * (all_work - finished))
        duration = f"{left // 60} min {left % 60:02d} s" if left >= 60 else f"{left} s"
        _say(f"{scan}: {', '.join(new)} done ({done} of {total} segmentations, about {duration} left)")


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr)
