"""How the graph runs: nipype's plugin, its resources, and what the user sees meanwhile."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import networkx as nx
from nipype import Node, Workflow, config, logging
from nipype.pipeline import plugins
from nipype.pipeline.plugins.multiproc import MultiProcPlugin, process_initializer
from nipype.utils import filemanip

from bids_varaug.derivatives import names
from bids_varaug.errors import UsageError
from bids_varaug.machine import memory_bound
from bids_varaug.settings import Settings
from bids_varaug.workflows.slurm import SlurmPlugin, request_resources

LOCAL = ("MultiProc", "Linear", "LegacyMultiProc", "Debug")  # the others are of batch systems
MEMORY_SHARE = 0.9  # for the steps; the rest is for this process and what else runs
SUBMIT_ONLY = ("SLURMGraph", "SGEGraph", "CondorDAGMan")  # end when the jobs are submitted
LOG_LEVELS = ("CRITICAL", "INFO", "DEBUG")  # of nipype, without -v, with -v and with -vv

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
    level = log_level(settings)
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
            "poll_sleep_duration": 0.1 if settings.plugin_name in LOCAL else 2,
        },
    })  # fmt: skip
    logging.update_logging(config)


def log_level(settings: Settings) -> str:
    """How much nipype logs."""
    return LOG_LEVELS[min(settings.verbosity, 2)]


def check_plugin(settings: Settings) -> None:
    """Refuse a ``--use-plugin`` that nipype does not have, or that cannot do what is asked for.

    Raises
    ------
    UsageError
        With the names that there are.
    """
    name = settings.plugin_name
    known = sorted(each.removesuffix("Plugin") for each in dir(plugins) if each.endswith("Plugin"))
    if name not in known:
        raise UsageError(f"--use-plugin: nipype has no plugin {name!r}. It has {', '.join(known)}.")
    if settings.clean_workdir and name in SUBMIT_ONLY:
        raise UsageError(
            f"--clean-workdir: with {name} the jobs still need the work directory when this command ends. Leave one of "
            "the two out."
        )


def run_workflow(workflow: Workflow, settings: Settings, progress: ProgressLog) -> bool:
    """Run the graph with MultiProc or ``--use-plugin``; return whether every node succeeded.

    A failed node takes only those that depend on it along.
    """
    name, given = settings.plugin_name, dict((settings.plugin or {}).get("plugin_args", {}))
    if name not in SUBMIT_ONLY:  # else there is nobody left to call
        given = {"status_callback": progress} | given
    if name.startswith("SLURM"):
        request_resources(workflow, given.get("sbatch_args", ""))
    runner = {"plugin": name, "plugin_args": given}
    if name == "SLURM":
        runner = {"plugin": SlurmPlugin(given)}
    elif name == "MultiProc":
        # nipype would count the whole machine's, of which a container may have a small part.
        memory = settings.mem_gb or MEMORY_SHARE * memory_bound().total
        limits = {"n_procs": settings.nprocs, "memory_gb": memory, "raise_insufficient": False}
        runner = {"plugin": WorkersPlugin(limits | {"log_level": log_level(settings)} | given)}
    try:
        workflow.run(**runner)
    except Exception as error:
        # After all other nodes are done, nipype raises what the first failed node raised, or a RuntimeError; `progress`
        # has told that node's name and the node its error.
        if settings.verbosity or not progress.failed:
            print(f"ERROR: {type(error).__name__}: {error}", file=sys.stderr)
        return False
    return True


class WorkerPool:
    """Processes that run one task at a time, of which the first idle one gets the next.

    A worker that is killed takes no other along, and is replaced. The members of a scan run one after another as a
    rule: in turns by all processes of one executor, each pass would need memory that is new to its process, and the
    kernel takes a fifth of the pass to clear it.
    """

    def __init__(self, n_workers: int, new_executor: Callable[[], ProcessPoolExecutor]):
        self._new_executor = new_executor  # of one process, started when it gets its first task
        self._executors = [new_executor() for _ in range(n_workers)]
        self._last: list[Future | None] = [None] * n_workers

    def submit(self, function: Callable, *arguments: Any) -> Future:
        """Run `function` in the first idle process, or after what the last one does."""
        idle = (n for n, last in enumerate(self._last) if last is None or last.done())
        number = next(idle, len(self._last) - 1)
        try:
            future = self._executors[number].submit(function, *arguments)
        except BrokenProcessPool:
            self._executors[number] = self._new_executor()
            future = self._executors[number].submit(function, *arguments)
        self._last[number] = future
        return future

    def shutdown(self) -> None:
        """Wait for all tasks and end the processes."""
        for executor in self._executors:
            executor.shutdown()


class WorkersPlugin(MultiProcPlugin):
    """nipype's MultiProc, but it survives a worker that is killed, and no worker survives it.

    MultiProc waits for ever for the result of a worker that the kernel killed to free memory. Here the step that was
    running fails, and a new worker does the others. It would also run the first step of all scans, then the second: of
    an interrupted run of hundreds, none would be done.
    """

    def __init__(self, plugin_args: dict | None = None):
        super().__init__(plugin_args)
        # Forking a process in which OpenMP has run may hang the child.
        context = multiprocessing.get_context(self.plugin_args.get("mp_context", "forkserver"))
        setup = self._cwd, self.plugin_args.get("log_level", LOG_LEVELS[0])
        self.pool = WorkerPool(self.processors, lambda: ProcessPoolExecutor(1, context, _start_worker, setup))

    def _generate_dependency_list(self, graph: nx.DiGraph) -> None:
        super()._generate_dependency_list(graph)
        generations = enumerate(nx.topological_generations(graph))
        self.stages = {node: stage for stage, nodes in generations for node in nodes}

    def _sort_jobs(self, jobids: list[int], scheduler: str | None = None) -> list[int]:
        """Put first what is nearest to its end."""

        def stage(job: int) -> int:  # of a member, that of its MapNode
            return self.stages[self.procs[self.mapnodesubids.get(job, job)]]

        return sorted(jobids, key=lambda job: (-stage(job), job))

    def _async_callback(self, future: Future) -> None:
        if future.exception() is None:
            super()._async_callback(future)

    def _get_result(self, taskid: int) -> dict | None:
        future = self._task_obj[taskid]
        error = future.exception() if future.done() else None
        if error is None:
            return super()._get_result(taskid)
        reason = KILLED if isinstance(error, BrokenProcessPool) else f"ERROR: {error!r}"
        print(reason, file=sys.stderr, flush=True)
        return {"taskid": taskid, "result": None, "traceback": [f"{reason}\n{error!r}\n"]}


def _start_worker(folder: str, level: str) -> None:
    """Begin a worker, which ends when the main process does, however that ended.

    Otherwise it would go on writing to the work directory while the next run does too.
    """
    process_initializer(folder)
    logging.getLogger("nipype.workflow").setLevel(level)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


@dataclass
class ProgressLog:
    """Prints a line when a step ends: what is done, what is left, how long it may take.

    Called by nipype in the main process with (node, status).

    Parameters
    ----------
    root : folder of the workflow
    scans : folder below it -> what the scan is called
    n_passes : how many times each scan is segmented
    on_written : called with a scan's folder when its derivatives are written
    """

    root: Path
    scans: Mapping[str, str]
    n_passes: int
    on_written: Callable[[Path], None] | None = None
    started: float = field(default_factory=time.monotonic)
    passes_done: set[tuple[str, str]] = field(default_factory=set)
    written: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)

    def __call__(self, node: Node, status: str) -> None:
        """Take note of one node's change of status."""
        if status not in ("end", "exception"):
            return
        # <root>/<scan>/<step>, and below it the members' own folders. nipype follows links, of which the work directory
        # may be one.
        folder = Path(os.path.realpath(node.output_dir()))
        where, step = (*folder.relative_to(os.path.realpath(self.root)).parts, "")[:2]
        name = self.scans.get(where, where)
        if name in self.failed:
            return  # some plugins report what they skip as ended
        if status == "exception":
            self.failed.add(name)
            self._say(f"{name}: {step or 'step'} failed")
        elif step in ("grids", "segment"):
            self._count_passes(name, _passes(step, node.inputs))
        elif step == "write":
            self.written.add(name)
            self._say(f"{name}: written ({len(self.written)} of {len(self.scans)} scans)")
            if self.on_written is not None:
                self.on_written(self.root / where)

    def _count_passes(self, scan: str, passes: list[str]) -> None:
        """Take note of one pass, or (again, or from plugins that do not split a node) of all."""
        new = [each for each in passes if (scan, each) not in self.passes_done]
        if not new:
            return
        self.passes_done.update((scan, each) for each in new)
        done, total = len(self.passes_done), len(self.scans) * self.n_passes
        left = round((time.monotonic() - self.started) / done * (total - done))
        duration = f"{left // 60} min {left % 60:02d} s" if left >= 60 else f"{left} s"
        self._say(f"{scan}: {', '.join(new)} done ({done} of {total} segmentations, about {duration} left)")

    def _say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def _passes(step: str, inputs: Any) -> list[str]:
    """Name what a node of `SegmentMember` does; its iterated input may be one or a list."""
    if step == "segment":
        members = inputs.member if isinstance(inputs.member, list) else [inputs.member]
        return [f"member {member.id}" for member in members]
    offsets = inputs.offset if isinstance(inputs.offset, list) else [inputs.offset]
    return [f"member {inputs.member.id}, grid {'-'.join(map(str, o))}" for o in offsets]
