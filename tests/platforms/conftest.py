"""The small ensemble of the workflow tests, and commands of other tools."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.workflows.conftest import linear, small_ensemble

__all__ = ["linear", "small_ensemble"]  # fixtures

IDENTITY = {
    f"GIT_{role}_{what}": value
    for role in ("AUTHOR", "COMMITTER")
    for what, value in (("NAME", "Tests"), ("EMAIL", "tests@localhost"))
}


def run_tool(*command: str, cwd: Path) -> str:
    """Run a command that must succeed; returns its standard output."""
    done = subprocess.run(
        command, cwd=cwd, env=os.environ | IDENTITY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}: {done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def datalad():
    """Skip where DataLad and git-annex are absent."""
    if not (shutil.which("datalad") and shutil.which("git-annex")):
        pytest.skip("datalad and git-annex are not both installed (pip install datalad git-annex)")
    return run_tool
