"""Breaking it on purpose: a small version of each attempt by default, all of it on request.

``BIDS_VARAUG_FAULTS=full python -m pytest tests/faults -rA`` runs what docs/experiments/reliability.md reports.
"""

import hashlib
import multiprocessing
import os
import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from bids_varaug.cli.run import main
from tests.workflows.conftest import describe, head, linear, small_ensemble, write_t1w

__all__ = ["linear", "small_ensemble"]  # fixtures of the whole app


@pytest.fixture(scope="session")
def full() -> bool:
    """Whether the long form was asked for."""
    return os.environ.get("BIDS_VARAUG_FAULTS") == "full"


@dataclass(frozen=True)
class App:
    """Runs the app on one dataset in processes that can be killed and limited."""

    bids_dir: Path
    ensemble: Path
    linear: tuple[str, str]

    def arguments(self, out: Path, *options: str) -> list[str]:
        """Command line without the program's name; the work directory is beside the output."""
        return [str(self.bids_dir), str(out), "participant", "--ensemble", str(self.ensemble),
                "-w", str(work_of(out)), "--skip-bids-validation", "--members", "ieee,mca01",
                "--nprocs", "1", "--omp-nthreads", "1", *options]  # fmt: skip

    def start(self, out: Path, limits: Mapping[str, int] | None = None):
        """Begin a run in a fork of a server that has imported torch and nipype already."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["bids_varaug.segmentation.predict", __name__])
        arguments = self.arguments(out, *self.linear)
        process = context.Process(target=_run, args=(arguments, log_of(out), dict(limits or {})))
        process.start()
        return process

    def run(self, out: Path, limits: Mapping[str, int] | None = None) -> tuple[int, str]:
        """Run to the end; returns the exit code and what was printed."""
        process = self.start(out, limits)
        process.join()
        return process.exitcode, log_of(out).read_text(errors="replace")


def work_of(out: Path) -> Path:
    return out.with_name(out.name + "-work")


def log_of(out: Path) -> Path:
    return out.with_name(out.name + "-log")


def _run(arguments: list[str], log: Path, limits: dict[str, int]) -> None:
    screen = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(screen, 1)
    os.dup2(screen, 2)
    for name, value in limits.items():
        kind = getattr(resource, name)
        resource.setrlimit(kind, (value, resource.getrlimit(kind)[1]))
    sys.exit(main(arguments))


@pytest.fixture(scope="session")
def app(tmp_path_factory, small_ensemble, linear) -> App:
    """One participant, two members."""
    bids_dir = describe(tmp_path_factory.mktemp("one") / "bids")
    write_t1w(bids_dir, "sub-01", head(1))
    return App(bids_dir, small_ensemble, linear)


@pytest.fixture(scope="session")
def whole(app, tmp_path_factory) -> dict[str, str]:
    """Digests of what an undisturbed run writes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    code, log = app.run(out)
    assert code == 0, log
    return digests(out)


def digests(out: Path) -> dict[str, str]:
    """SHA-256 of every file; the settings of a run name its folders and are left out."""
    return {
        path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.parent.name != "logs"
    }
