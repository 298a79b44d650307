"""Where caches go."""

import os
from pathlib import Path

import pytest

from bids_varaug.machine import CACHES, keep_caches_below, name_kernels


@pytest.fixture
def unset(monkeypatch):
    for name in CACHES:
        monkeypatch.setenv(name, "x")  # so that monkeypatch puts back what was there
        monkeypatch.delenv(name)


def test_caches_are_kept_in_the_work_directory(unset):
    keep_caches_below(Path("/w"))
    assert os.environ["MPLCONFIGDIR"] == "/w/caches/matplotlib"
    assert os.environ["DENO_DIR"] == "/w/caches/deno"
    assert Path(os.environ["NUMBA_CACHE_DIR"]).parent == Path("/w/caches/numba")


def test_kernels_of_another_version_have_another_cache(tmp_path):
    """Numba itself looks at a kernel's own module only."""
    (tmp_path / "numerics").mkdir()
    inner, outer, other = (tmp_path / "numerics" / f"{name}.py" for name in "abc")
    for path in (inner, outer):
        path.write_text("@compiled()\n")
    other.write_text("x = 1\n")
    before = name_kernels(tmp_path)
    other.write_text("x = 2\n")
    assert name_kernels(tmp_path) == before
    inner.write_text("@compiled()  # changed\n")
    assert name_kernels(tmp_path) != before


def test_cache_that_the_user_has_set_stays(unset, monkeypatch):
    monkeypatch.setenv("NUMBA_CACHE_DIR", "/scratch/numba")
    keep_caches_below(Path("/w"))
    assert os.environ["NUMBA_CACHE_DIR"] == "/scratch/numba"
