"""``bids_varaug-train`` from label maps to an ensemble that the app can use."""

import nibabel as nib
import numpy as np
import pytest

from bids_varaug.cli.train import build_parser, main, make_recipe
from bids_varaug.models.ensemble import load_ensemble, load_member


@pytest.fixture
def labels_dir(tmp_path):
    """Two heads of boxes, as BIDS derivatives."""
    labels = np.zeros((80, 90, 80), np.int16)
    for left, right, margin in ((511, 511, 4), (24, 24, 10), (3, 42, 13), (2, 41, 20)):
        box = (slice(margin, -margin),) * 3
        labels[box] = right
        labels[:40][(slice(margin, None), *box[1:])] = left
    for subject in ("01", "02"):
        folder = tmp_path / "labels" / f"sub-{subject}"
        folder.mkdir(parents=True)
        nib.save(nib.Nifti1Image(labels, np.eye(4)), folder / f"sub-{subject}_dseg.nii.gz")
    image = nib.Nifti1Image((labels % 7 * 100 + labels % 3).astype(np.float32), np.eye(4))
    nib.save(image, tmp_path / "labels" / "sub-01" / "sub-01_T1w.nii.gz")
    return tmp_path / "labels"


def test_an_ensemble_is_trained_logged_and_not_trained_twice(labels_dir, tmp_path, capsys):
    out = tmp_path / "mine"
    command = [str(labels_dir), str(out), "--members", "ieee,mca01", "--trunk-steps", "1",
               "1", "1", "1", "1", "--steps", "1", "--hold-out", "1",
               "--channels", "4", "4", "4", "4", "4", "--monitor", str(labels_dir),
               "--device", "cpu"]  # fmt: skip
    assert main(command) == 0
    ensemble = load_ensemble(str(out))
    assert ensemble.name == "mine"
    assert [member.id for member in ensemble.members] == ["ieee", "mca01"]
    assert ensemble.training["forked_at_step"] == 5
    assert ensemble.training["n_label_maps"] == 1
    load_member(ensemble, ensemble.members[0])
    rows = (out / "logs" / "ieee.tsv").read_text().splitlines()
    assert len(rows) == 2 and rows[1].split("\t")[-1] != "n/a"  # looked at the real image
    assert (out / "logs" / "ieee.png").stat().st_size > 1000

    assert main(command) == 0
    assert load_ensemble(str(out)).members == ensemble.members
    assert len((out / "logs" / "ieee.tsv").read_text().splitlines()) == 2


def test_members_can_be_trained_from_their_own_initialisation():
    arguments = build_parser().parse_args(["labels", "out", "--no-trunk", "--steps", "5"])
    recipe = make_recipe(arguments, n_classes=32)
    assert recipe.trunk == () and recipe.trunk_steps == 0
    assert recipe.member[-1].steps == 5 and len(recipe.member) == 6


def test_empty_label_folder_is_refused(tmp_path, capsys):
    assert main([str(tmp_path), str(tmp_path / "out")]) == 65
    assert "no label map" in capsys.readouterr().err


def test_holding_out_everything_is_refused(labels_dir, tmp_path, capsys):
    assert main([str(labels_dir), str(tmp_path / "out"), "--hold-out", "2"]) == 65
    assert "leaves none to train on" in capsys.readouterr().err
