"""Settings and data that every test may rely on."""

from __future__ import annotations

import os

# Before anything imports nipype (which would ask the network for its newest version) or matplotlib.
os.environ["NO_ET"] = "1"
os.environ["MPLBACKEND"] = "Agg"

from pathlib import Path

import pytest

from bids_varaug.cli.places import keep_caches_below

ROOT = Path(__file__).resolve().parents[1]
# One for all: a run of the app would otherwise compile anew in each work directory.
keep_caches_below(ROOT / ".pytest_cache")


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
