"""Settings and data that every test may rely on."""

from __future__ import annotations

import os

# Before anything imports nipype (which would ask the network for its newest version) or matplotlib.
os.environ["NO_ET"] = "1"
os.environ["MPLBACKEND"] = "Agg"

from pathlib import Path

import pytest

from bids_varaug.machine import keep_caches_below

ROOT = Path(__file__).resolve().parents[1]
# One for all: a run of the app would otherwise compile anew in each work directory.
keep_caches_below(ROOT / ".pytest_cache")


# What takes a minute or more, the longest first: begun last, it would leave one worker alone.
LONG_FIRST = tuple(
    ROOT / "tests" / part
    for part in ("test_real_heads.py", "workflows/test_participant.py", "slurm", "numerics", "faults", "workflows",
                 "cli", "platforms")
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """Begin with the files that take longest (with ``--no-loadscope-reorder``)."""

    def rank(item) -> int:
        long = (n for n, path in enumerate(LONG_FIRST) if item.path.is_relative_to(path))
        return next(long, len(LONG_FIRST))

    items.sort(key=rank)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real images and label maps for development; they are not part of the repository."""
    given = os.environ.get("BIDS_VARAUG_SHARED_DATA")
    path = Path(given) if given else ROOT.parent / "shared" / "data"
    if not (path / "README.md").is_file():
        pytest.skip(f"no development data in {path} (set BIDS_VARAUG_SHARED_DATA)")
    return path


@pytest.fixture(scope="session")
def golden(shared_data) -> Path:
    """What FastSurfer's own code gave, with random weights; not part of the repository."""
    path = shared_data.parent / "golden" / "fastsurfer"
    if not (path / "README.md").is_file():
        pytest.skip(f"no reference data of FastSurfer in {path}")
    return path
