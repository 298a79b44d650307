"""Runs into an output directory that has derivatives of another ensemble."""

import json
import shutil
from pathlib import Path

import pytest

from bids_varaug.inputs.validation import run_validator
from tests.workflows.test_participant import digests

FEW = ("--members", "ieee", "mca")


@pytest.fixture(scope="module")
def other_ensemble(small_ensemble, tmp_path_factory) -> Path:
    """Of the same name, with the weights of mca01 and mca02 exchanged."""
    folder = tmp_path_factory.mktemp("other") / "ensemble"
    shutil.copytree(small_ensemble, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    first, second = manifest["members"][1:3]
    for key in ("file", "sha256"):
        first[key], second[key] = second[key], first[key]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture(scope="module")
def out(pair, linear, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("rerun") / "out"
    assert pair(out, *linear, *FEW, "--write-members") == 0
    return out


@pytest.mark.parametrize("reading", [[], ["--dry-run"], ["--reports-only"]])
def test_run_that_would_relabel_others_is_refused_before_anything_is_written(
    pair, linear, out, other_ensemble, capsys, reading
):
    before = digests(out)
    again = (*FEW, "--participant-label", "01", "--ensemble", str(other_ensemble), *reading)
    assert pair(out, *linear, *again) == 65
    error = capsys.readouterr().err
    assert "sub-02" in error and "weights of mca01, mca02" in error
    assert ("sub-01" in error) == ("--reports-only" in reading)
    assert digests(out) == before
    assert len(list((out / "logs").glob("settings-*.toml"))) == 1


def test_everybody_may_be_made_again_and_nobody_keeps_old_files(
    pair, linear, out, other_ensemble, tmp_path
):
    assert pair(out, *linear, *FEW, "--participant-label", "02") == 0
    assert len(list(out.rglob("*_desc-mca0?_dseg.nii.gz"))) == 4  # the same ensemble's stay
    copy = shutil.copytree(out, tmp_path / "out")
    again = (*FEW, "--ensemble", str(other_ensemble))
    assert pair(copy, *linear, *again) == 0
    assert not list(copy.rglob("*_desc-mca0?_dseg.*"))
    assert run_validator(copy) == []
    # The new ensemble is the one that goes on.
    assert pair(copy, *again, "--participant-label", "02", "--dry-run") == 0
    assert pair(copy, *FEW, "--participant-label", "02", "--dry-run") == 65


def test_reports_are_drawn_again_without_the_flags_of_the_run(pair, out, tmp_path, capsys):
    copy = shutil.copytree(out, tmp_path / "out")
    before = digests(copy)
    (copy / "sub-01.html").unlink()
    assert pair(copy, "--reports-only", "--members", "seed") == 0
    assert digests(copy) == before and f"--members {' '.join(FEW[1:])}" in (copy / "sub-01.html").read_text()
    capsys.readouterr()
    assert pair(copy, "--reports-only", "--dry-run") == 0
    assert capsys.readouterr().out == f"{copy / 'sub-01.html'}\n{copy / 'sub-02.html'}\n"
