"""``--clean-workdir``: what is written frees its disk space at once, and is not done again."""

import json
import os
import shutil
from dataclasses import replace

import pytest

from bids_varaug.cli.parser import parse_settings
from bids_varaug.derivatives.names import ScanRequest
from bids_varaug.inputs.scans import find_scans
from bids_varaug.models.ensemble import load_ensemble
from bids_varaug.workflows.plan import RECORD, is_finished, record_finished, remove_steps
from tests.workflows.conftest import Run, describe, head, write_t1w
from tests.workflows.test_participant import digests

CLEAN = ("--clean-workdir", "--members", "ieee")


@pytest.fixture
def app(tmp_path, small_ensemble) -> Run:
    """Two participants, of whom the second's image is cut off."""
    bids_dir = describe(tmp_path / "bids")
    write_t1w(bids_dir, "sub-01", head(1))
    path = write_t1w(bids_dir, "sub-02", head(2))
    shutil.copy(path, tmp_path / "whole.nii.gz")
    os.truncate(path, 5000)
    return Run(bids_dir, small_ensemble)


def test_work_of_a_written_scan_is_removed_and_the_next_run_goes_on(app, linear, tmp_path, capfd):
    out, work = tmp_path / "out", tmp_path / "out-work"
    assert app(out, *linear, *CLEAN) == 1
    assert not list(work.rglob("*.safetensors"))
    (kept,) = work.glob("*/sub_01/*")
    assert kept.name == "write" and (kept.parent / RECORD).is_file()
    labels = out / "sub-01" / "anat" / "sub-01_seg-varaug_desc-consensus_dseg.nii.gz"
    before = labels.stat().st_mtime_ns

    shutil.copy(tmp_path / "whole.nii.gz", app.bids_dir / "sub-02" / "anat" / "sub-02_T1w.nii.gz")
    capfd.readouterr()
    assert app(out, *linear, *CLEAN) == 0
    told = capfd.readouterr().err
    assert "2 T1w image(s), 1 member(s) each, on cpu; 1 of them are done" in told
    assert "sub-01:" not in told and "sub-02: written (1 of 1 scans)" in told
    assert labels.stat().st_mtime_ns == before
    assert not list(work.glob("bids_varaug_*"))

    assert app(tmp_path / "plain", *linear, "--members", "ieee") == 0
    assert digests(out) == digests(tmp_path / "plain")


@pytest.fixture
def written(dataset, small_ensemble, tmp_path):
    """A request, the folder of its scan in the work directory, and what it is said to have made."""
    settings = parse_settings([str(dataset), str(tmp_path / "out"), "participant"])
    ensemble = load_ensemble(str(small_ensemble))
    scan = find_scans(settings).scans[0]
    path = tmp_path / f"{scan.prefix}_T1w.nii.gz"
    shutil.copy(scan.path, path)
    request = ScanRequest(settings, ensemble, ensemble.members[:2], replace(scan, path=path))
    outputs = [tmp_path / "out" / "a_dseg.nii.gz", tmp_path / "out" / "a_dseg.tsv"]
    outputs[0].parent.mkdir()
    for output in (*outputs, tmp_path / "out" / "a_dseg.json"):
        output.write_text(output.name)
    folder = tmp_path / "work" / "sub_01"
    for step in ("segment", "write"):
        (folder / step).mkdir(parents=True)
    record_finished(request, outputs, folder)
    return request, folder, outputs


def test_record_holds_for_the_same_request_alone(written):
    request, folder, _ = written
    assert is_finished(request, folder)
    slower = replace(request, settings=replace(request.settings, nprocs=7, clean_workdir=True))
    assert is_finished(slower, folder)
    for other in (
        replace(request, members=request.members[:1]),
        replace(request, ensemble=replace(request.ensemble, temperature=2.0)),
        replace(request, settings=replace(request.settings, write_members=True)),
        replace(request, settings=replace(request.settings, sloppy=True)),
        replace(request, settings=replace(request.settings, output_dir=folder)),
    ):
        assert not is_finished(other, folder)


@pytest.mark.parametrize("name", ["a_dseg.nii.gz", "a_dseg.tsv", "a_dseg.json"])
def test_record_does_not_hold_for_outputs_that_are_changed_or_gone(written, name):
    request, folder, outputs = written
    path = outputs[0].with_name(name)
    path.write_text("changed")
    assert not is_finished(request, folder)
    path.unlink()
    assert not is_finished(request, folder)


def test_record_does_not_hold_for_another_image(written):
    request, folder, _ = written
    request.scan.path.write_bytes(b"another")
    assert not is_finished(request, folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"Request": 1}'])
def test_damaged_record_is_none(written, content):
    request, folder, _ = written
    (folder / RECORD).write_text(content)
    assert not is_finished(request, folder)


def test_steps_without_a_record_stay(written):
    _, folder, _ = written
    (folder / RECORD).rename(folder / "aside.json")
    remove_steps(folder)
    assert (folder / "segment").is_dir()
    (folder / "aside.json").rename(folder / RECORD)
    remove_steps(folder)
    assert os.listdir(folder) == ["write"]
    assert json.loads((folder / RECORD).read_text())["SHA256"]


def test_too_little_disk_is_told_before_the_work(app, linear, tmp_path, monkeypatch, capfd):
    usage = shutil.disk_usage(tmp_path)._replace(free=10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    app(tmp_path / "out", *linear, "--participant-label", "01", "--members", "ieee")
    told = capfd.readouterr().err
    assert f"WARNING: {tmp_path}/out-work: the members of 1 image(s) need about " in told
    assert "--clean-workdir" in told
    assert told.index("WARNING") < told.index("written (1 of 1 scans)")
