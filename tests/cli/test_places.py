"""Where caches go; what check_places refuses is tested with the command line."""

import os
from pathlib import Path

import pytest

from bids_varaug.cli.places import CACHES, keep_caches_below


@pytest.fixture
def unset(monkeypatch):
    for name in CACHES:
        monkeypatch.setenv(name, "x")  # so that monkeypatch puts back what was there
        monkeypatch.delenv(name)


def test_caches_are_kept_in_the_work_directory(unset):
    keep_caches_below(Path("/w"))
    assert {os.environ[name] for name in CACHES} == {
        "/w/caches/numba", "/w/caches/matplotlib", "/w/caches/deno"
    }  # fmt: skip


def test_cache_that_the_user_has_set_stays(unset, monkeypatch):
    monkeypatch.setenv("NUMBA_CACHE_DIR", "/scratch/numba")
    keep_caches_below(Path("/w"))
    assert os.environ["NUMBA_CACHE_DIR"] == "/scratch/numba"
