"""Some small heads, what a plain run makes of them, and a cluster."""

import os
import sys
from pathlib import Path

import pytest

from tests.cli.test_train import labels_dir
from tests.slurm.cluster import missing, slurm_cluster
from tests.workflows.conftest import Run, describe, head, linear, small_ensemble, write_t1w

__all__ = ["labels_dir", "linear", "small_ensemble"]  # fixtures

MEMBERS = ("--members", "seed", "--sloppy", "--omp-nthreads", "1")
FULL = bool(os.environ.get("BIDS_VARAUG_SLURM_FULL"))
LABELS = tuple(f"{number:02d}" for number in range(1, 7 if FULL else 4))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Environment in which sbatch, and the app where it is installed, are found."""
    reason = missing()
    if reason:
        pytest.skip(f"no Slurm: {reason}")
    with slurm_cluster(tmp_path_factory.mktemp("slurm") / "cluster") as environment:
        programs = Path(sys.executable).parent
        yield environment | {"PATH": f"{programs}{os.pathsep}{environment['PATH']}"}


@pytest.fixture(scope="module")
def app(cluster, small_ensemble, tmp_path_factory) -> Run:
    bids_dir = describe(tmp_path_factory.mktemp("heads") / "bids")
    for number, label in enumerate(LABELS, start=1):
        write_t1w(bids_dir, f"sub-{label}", head(number))
    return Run(bids_dir, small_ensemble)


@pytest.fixture(scope="module")
def plain(app, linear, tmp_path_factory) -> Path:
    """What one process makes of all of them."""
    out = tmp_path_factory.mktemp("plain") / "out"
    assert app(out, *linear, *MEMBERS) == 0
    return out
