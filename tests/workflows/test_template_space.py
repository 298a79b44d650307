"""The app with --output-spaces, on the MNI152 template as a head: from the command line to group maps."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from bids_varaug.cli.run import main
from bids_varaug.inputs.validation import run_validator
from bids_varaug.models.ensemble import load_ensemble
from bids_varaug.registration.space import GRIDS, SPACE
from bids_varaug.registration.template import load_template
from bids_varaug.registration.transforms import grid_points, sample
from tests.workflows.conftest import describe, write_t1w
from tests.workflows.test_participant import digests

OPTIONS = ("--sloppy", "--output-spaces", f"{SPACE}:res-2", "--refine", "2", "--nprocs", "2", "--omp-nthreads", "1",
           "--skip-bids-validation", "--device", "cpu")  # fmt: skip
STEM = f"sub-01_space-{SPACE}"


@pytest.fixture(scope="module")
def head() -> nib.Nifti1Image:
    datasets = pytest.importorskip("nilearn.datasets")
    return datasets.load_mni152_template(resolution=2)


@pytest.fixture(scope="module")
def home(head, tmp_path_factory) -> Path:
    """TEMPLATEFLOW_HOME with the one image that is asked for."""
    root = tmp_path_factory.mktemp("templateflow")
    values = sample(np.asarray(head.dataobj), head.affine, grid_points(GRIDS[1])).reshape(GRIDS[1].shape)
    (root / f"tpl-{SPACE}").mkdir()
    image = nib.Nifti1Image(np.rint(255 * values / values.max()).astype(np.uint8), GRIDS[1].affine)
    nib.save(image, root / f"tpl-{SPACE}" / f"tpl-{SPACE}_res-01_desc-brain_T1w.nii.gz")
    return root


@pytest.fixture(scope="module")
def bids_dir(head, tmp_path_factory) -> Path:
    """The head, moved by 30 mm and stored from right to left."""
    root = describe(tmp_path_factory.mktemp("template_space") / "bids")
    affine = head.affine.copy()
    affine[:3, 3] += (0, 30, -20)
    write_t1w(root, "sub-01", 1000 * np.asarray(head.dataobj)[::-1], affine @ np.diag([-1.0, 1, 1, 1])
              + np.outer(affine[:, 0], [0, 0, 0, head.shape[0] - 1]))  # fmt: skip
    return root


@pytest.fixture(scope="module")
def finished(bids_dir, home, linear) -> Path:
    """A finished run: participant and group."""
    out = bids_dir.parent / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEMPLATEFLOW_HOME", str(home))
        where = [str(bids_dir), str(out)]
        assert main([*where, "participant", "-w", str(bids_dir.parent / "work"), *OPTIONS, *linear]) == 0
        assert main([*where, "group", "-w", str(bids_dir.parent / "work"), *OPTIONS[:3], "--no-brain-age"]) == 0
    return out


def test_output_is_valid_and_labels_lie_on_the_template_s(finished):
    assert run_validator(finished) == []
    template = load_template([label.index for label in load_ensemble("aseg31").labels]).labels > 0
    found = (
        np.asarray(nib.load(finished / f"sub-01/anat/{STEM}_seg-varaug_res-2_desc-consensus_dseg.nii.gz").dataobj) > 0
    )
    assert 2 * (found & template).sum() / (found.sum() + template.sum()) > 0.9
    figures = json.loads((finished / f"sub-01/anat/sub-01_from-T1w_to-{SPACE}_mode-image_xfm.json").read_bytes())
    assert figures["NumberOfMembers"] == 2 and figures["ShareOfFolds"] == 0
    assert f"Template space {SPACE}:res-2" in (finished / "sub-01.html").read_text()


def test_group_maps_are_those_of_the_only_participant(finished):
    one = np.asarray(nib.load(finished / f"sub-01/anat/{STEM}_seg-varaug_res-2_stat-entropy_statmap.nii.gz").dataobj)
    mean = nib.load(finished / f"group_maps/space-{SPACE}_res-2_stat-entropymean_statmap.nii.gz")
    np.testing.assert_allclose(np.asarray(mean.dataobj), one, rtol=1e-6)
    table = pd.read_csv(finished / f"group_maps/space-{SPACE}_res-2_regions.tsv", sep="\t")
    assert table["entropy"].is_monotonic_decreasing and len(table) > 25
    page = (finished / "group_maps.html").read_text()
    assert "Maps of 1 participant<" in page and table["name"][0] in page
    assert "Brain age is not predicted" not in page
    assert "Brain age is not predicted" in (finished / "group_quality.html").read_text()
    about = json.loads((finished / f"group_maps/space-{SPACE}_res-2_stat-entropymean_statmap.json").read_bytes())
    assert about["Precision"].startswith("Stored in steps of 0.0009766") and int(mean.header["intent_code"]) == 1001


def test_the_same_command_gives_the_same_bits(finished, bids_dir, home, linear, monkeypatch):
    """An xfm that is in the way is replaced."""
    monkeypatch.setenv("TEMPLATEFLOW_HOME", str(home))
    before = digests(finished)
    path = finished / f"sub-01/anat/sub-01_from-T1w_to-{SPACE}_mode-image_xfm.h5"
    path.write_bytes(b"of another version")
    arguments = [str(bids_dir), str(finished), "participant", "-w", str(bids_dir.parent / "again"), *OPTIONS, *linear]
    assert main(arguments) == 0
    assert digests(finished) == before


def test_killed_in_the_registration_and_resumed_gives_the_same_bits(finished, bids_dir, home, linear, monkeypatch):
    """Killed when the first of three registrations is there."""
    monkeypatch.setenv("TEMPLATEFLOW_HOME", str(home))
    out, work = bids_dir.parent / "killed", bids_dir.parent / "killed-work"
    arguments = [str(bids_dir), str(out), "participant", "-w", str(work), *OPTIONS, *linear]
    code = "import sys; from bids_varaug.cli.run import main; sys.exit(main())"
    with subprocess.Popen([sys.executable, "-c", code, *arguments], stderr=subprocess.DEVNULL) as process:
        while not any(work.rglob("registration.npz")):
            assert process.poll() is None
            time.sleep(0.02)
        process.kill()
    assert not any(out.rglob("*_xfm.h5"))
    assert main(arguments) == 0
    whole = {name: digest for name, digest in digests(finished).items() if name.startswith("sub-01")}
    assert whole.keys() > {"sub-01.html"}
    assert {name: digest for name, digest in digests(out).items() if name.startswith("sub-01")} == whole


def test_dry_run_counts_registrations_and_files_of_the_space(bids_dir, home, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TEMPLATEFLOW_HOME", str(home))
    costs = []
    for options in (OPTIONS, ("--sloppy", *OPTIONS[5:])):
        where = [str(bids_dir), str(tmp_path / "out"), "participant", "-w", str(tmp_path / "work")]
        assert main([*where, *options, "--refine", "1000", "--dry-run"]) == 0
        text = capsys.readouterr().out
        costs.append([float(re.search(p, text)[1]) for p in (r"about (\d+) min", r"([\d.]+) GB of results")])
    # Three registrations of 1,000 iterations on two processors.
    assert costs == [[pytest.approx(12.5, abs=2), 0.1], [1, 0.0]]


def test_without_the_template_nothing_begins(bids_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TEMPLATEFLOW_HOME", str(tmp_path / "nothing"))
    arguments = [str(bids_dir), str(tmp_path / "out"), "participant", "-w", str(tmp_path / "work"), *OPTIONS]
    assert main(arguments) == 66
    assert "--allow-downloads" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("space", ["MNI152Lin", f"{SPACE}:res-3", f"{SPACE}:cohort-1"])
def test_unknown_space_or_resolution_is_a_usage_error(space, tmp_path, capsys):
    assert main([str(tmp_path), str(tmp_path / "out"), "participant", "--output-spaces", space]) == 64
    assert f"{space!r} is not an output space that there is: use {SPACE}" in capsys.readouterr().err
