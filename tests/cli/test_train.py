"""``bids_varaug-train`` from label maps to an ensemble that the app can use."""

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from bids_varaug.cli.train import build_parser, main, make_recipe, member_command
from bids_varaug.models.ensemble import load_ensemble
from bids_varaug.models.unet import load_member
from bids_varaug.training.recipe import STAGES


@pytest.fixture(scope="module")
def labels_dir(tmp_path_factory):
    """Two heads of boxes, as BIDS derivatives."""
    tmp_path = tmp_path_factory.mktemp("heads")
    labels = np.zeros((80, 90, 80), np.int16)
    for left, right, margin in ((511, 511, 4), (24, 24, 10), (3, 42, 13), (2, 41, 20)):
        box = (slice(margin, -margin),) * 3
        labels[box] = right
        labels[:40][(slice(margin, None), *box[1:])] = left
    for subject in ("01", "02"):
        folder = tmp_path / "labels" / f"sub-{subject}"
        folder.mkdir(parents=True)
        nib.save(nib.Nifti1Image(labels, np.eye(4)), folder / f"sub-{subject}_dseg.nii.gz")
    smooth = gaussian_filter((labels % 7 * 100 + labels % 3).astype(np.float32), 1)
    image = nib.Nifti1Image(smooth, np.eye(4))
    nib.save(image, tmp_path / "labels" / "sub-01" / "sub-01_T1w.nii.gz")
    return tmp_path / "labels"


STEPS = ["--steps", "1", "--hold-out", "1",
         "--channels", "4", "4", "4", "4", "4", "--device", "cpu",
         "--omp-nthreads", "1"]  # fmt: skip


@pytest.fixture(scope="module")
def trained(labels_dir, tmp_path_factory):
    """The folder of an ensemble, and the command that trained it, two members at once."""
    out = tmp_path_factory.mktemp("ensemble") / "mine"
    command = [str(labels_dir), str(out), "--members", "ieee,mca01", *STEPS, "--jobs", "2",
               "--monitor", str(labels_dir)]  # fmt: skip
    assert main(command) == 0
    return out, command


def test_an_ensemble_is_trained_logged_and_calibrated(trained):
    out, _ = trained
    ensemble = load_ensemble(str(out))
    assert ensemble.name == "mine"
    assert [member.id for member in ensemble.members] == ["ieee", "mca01"]
    assert ensemble.training["steps"] == 4
    assert ensemble.training["n_label_maps"] == 1
    load_member(ensemble, ensemble.members[0])
    rows = (out / "logs" / "ieee.tsv").read_text().splitlines()
    assert len(rows) == 1 + 4 and rows[-1].split("\t")[-1] != "n/a"  # looked at the real image
    assert (out / "logs" / "ieee.png").stat().st_size > 1000
    calibration = ensemble.training["calibration"]
    assert calibration["label_maps"] == ["sub-02_dseg.nii.gz"]
    assert calibration["temperature"] == ensemble.temperature != 1
    assert calibration["cross_entropy"] < calibration["cross_entropy_before"]


def test_what_is_done_is_not_done_again(trained):
    out, command = trained
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert main(command) == 0
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_an_array_job_gives_the_bits_of_processes_side_by_side(
    trained, labels_dir, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "aseg31"  # a folder of ours comes before the shipped ensemble of that name
    command = [str(labels_dir), "aseg31", "--members", "ieee,mca01", *STEPS]
    assert main([*command, "--member-index", "1"]) == 0
    assert [member.id for member in load_ensemble(str(out)).members] == ["mca01"]
    assert main([*command, "--member-index", "0"]) == 0
    ensemble = load_ensemble(str(out))
    assert ensemble.temperature == 1  # not calibrated: others may follow
    assert ensemble.members == load_ensemble(str(trained[0])).members


@pytest.mark.parametrize(
    "flags", [[], ["--no-resume"], ["--steps", "2", "fine=3", "--channels", "4", "4"]]
)
def test_a_process_of_its_own_gets_the_flags_of_all(flags):
    argv = ["labels", "out", "--device", "cuda:0,cuda:1", *flags]
    _module, *command = member_command(argv, "mca01", "cuda:1")
    found = vars(build_parser().parse_args(command))
    changed = {"members": "mca01", "member_index": 0, "device": "cuda:1", "jobs": 1, "resume": True}
    assert found == vars(build_parser().parse_args(argv)) | changed


def test_an_array_task_does_not_delete_the_others_members(labels_dir, trained, capsys):
    out, command = trained
    assert main([*command, "--member-index", "0", "--no-resume"]) == 64
    assert "other tasks" in capsys.readouterr().err
    assert len(load_ensemble(str(out)).members) == 2


def test_an_index_beyond_the_members_is_refused(labels_dir, tmp_path, capsys):
    command = [str(labels_dir), str(tmp_path / "x"), "--members", "ieee,mca01..mca03"]
    assert main([*command, "--member-index", "4"]) == 64
    assert "--array=0-3" in capsys.readouterr().err


def test_steps_are_those_of_each_stage_or_of_the_named_one():
    arguments = build_parser().parse_args(["labels", "out", "--steps", "3", "fine=5"])
    stages = make_recipe(arguments, n_classes=32).stages
    assert {s.name: s.steps for s in stages} == {s.name: 3 for s in STAGES} | {"fine": 5}
    assert all(stage.name in build_parser().format_help() for stage in stages)


@pytest.mark.parametrize("wrong", ["final=5", "fine=", "fine=-1", "many"])
def test_steps_of_no_stage_are_refused(labels_dir, tmp_path, capsys, wrong):
    command = [str(labels_dir), str(tmp_path / "x"), "--steps", wrong]
    assert main(command) == 64
    assert wrong in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("asked", [1, None])
def test_numba_gets_as_many_threads_as_torch(tmp_path, monkeypatch, asked):
    given = []
    monkeypatch.setattr("bids_varaug.machine.use_threads", given.append)
    flags = [] if asked is None else ["--omp-nthreads", str(asked)]
    assert main([str(tmp_path), str(tmp_path / "out"), *flags]) == 65
    assert given == [asked or torch.get_num_threads()]


def test_empty_label_folder_is_refused(tmp_path, capsys):
    assert main([str(tmp_path), str(tmp_path / "out")]) == 65
    assert "no label map" in capsys.readouterr().err


def test_holding_out_everything_is_refused(labels_dir, tmp_path, capsys):
    assert main([str(labels_dir), str(tmp_path / "out"), "--hold-out", "2"]) == 65
    assert "leaves none to train on" in capsys.readouterr().err
