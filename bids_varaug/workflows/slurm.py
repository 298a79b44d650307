"""nipype's SLURM plugin for a cluster that others use too.

Each step asks for the processors and the memory it needs, one ``squeue`` asks for all steps, a controller that does not
answer for a while fails nothing, and no job outlives the run.
"""

from __future__ import annotations

import logging
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from nipype import Node, Workflow
from nipype.pipeline.plugins import SLURMPlugin

POLL_SECONDS = 5
RESULT_SECONDS = 60  # NFS shows a file of another node up to a minute later
UNFINISHED = "PENDING,CONFIGURING,RUNNING,SUSPENDED,STOPPED,COMPLETING"
TOLD = ("ERROR:", "WARNING:", "slurmstepd: error:")

logger = logging.getLogger("nipype.workflow")


def request_resources(workflow: Workflow, sbatch_args: str) -> None:
    """Let each node ask for its processors and memory; what the user's arguments say wins."""
    for name in workflow.list_node_names():
        node = workflow.get_node(name)
        own = f"--cpus-per-task={node.n_procs} --mem={math.ceil(node.mem_gb * 1024)}M"
        node.plugin_args = {"sbatch_args": f"{own} {sbatch_args}".strip(), "overwrite": True}


class SlurmPlugin(SLURMPlugin):
    """nipype's SLURM plugin, with what the head of this module says.

    Further plugin arguments: ``poll_seconds`` between two calls of squeue, and ``result_seconds``, how long the result
    of a finished job may take to appear.
    """

    def __init__(self, plugin_args: dict | None = None):
        super().__init__(plugin_args=plugin_args)
        self._poll_seconds = self.plugin_args.get("poll_seconds", POLL_SECONDS)
        self._asked = -math.inf
        self._unfinished: set[int] = set()
        self._logs: dict[int, Path] = {}

    def run(self, graph: Any, config: dict, updatehash: bool = False) -> None:
        """Run the graph; cancel what is left of its jobs."""
        timeout = self.plugin_args.get("result_seconds", RESULT_SECONDS)
        config["execution"]["job_finished_timeout"] = timeout
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
        if time.monotonic() - self._asked >= self._poll_seconds:
            self._ask()
            self._asked = time.monotonic()
        return job in self._unfinished

    def _ask(self) -> None:
        """Ask which jobs are unfinished; where there is no answer they are as they were."""
        jobs = ",".join(map(str, self._pending))
        answer = subprocess.run(
            ["squeue", "--noheader", "--format=%A", f"--states={UNFINISHED}", f"--jobs={jobs}"],
            capture_output=True, text=True,
        )  # fmt: skip
        if answer.returncode == 0 or "Invalid job id" in answer.stderr:
            self._unfinished = {int(job) for job in answer.stdout.split()}
        else:
            logger.warning("squeue: %s", answer.stderr.strip())

    def _get_result(self, job: int) -> dict | None:
        result = super()._get_result(job)
        if result is not None:
            self._tell(self._logs.pop(job))
            if isinstance(result["traceback"], str):  # nipype stops at that, with a TypeError
                result["traceback"] = result["traceback"].splitlines(keepends=True)
        return result

    def _tell(self, log: Path) -> None:
        """Show what a step told its user; elsewhere with ``--output`` of one's own."""
        text = log.read_text(errors="replace") if log.exists() else ""
        for line in text.splitlines():
            if line.startswith(TOLD):
                print(line, file=sys.stderr, flush=True)
