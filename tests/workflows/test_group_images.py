"""The group level on features of images, from the command line: small heads, and an encoder with random weights."""

import hashlib
import json

import pandas as pd
import pytest

from bids_varaug.brainage import images
from bids_varaug.cli.run import main
from bids_varaug.inputs.validation import find_validator, run_validator
from tests.brainage.brains import write_dataset, write_encoder

N = 15


@pytest.fixture(scope="module", autouse=True)
def coarse():
    """Voxels of 4 mm: an eighth of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "SHAPE", (40, 48, 40))
        patch.setattr(images, "VOXEL_SIZE", 4.0)
        yield


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """People, and their derivatives with the features of an encoder; the last one's image is damaged."""
    root = tmp_path_factory.mktemp("study")
    bids, out = write_dataset(root, N)
    (bids / f"sub-{N}/anat/sub-{N}_T1w.nii.gz").write_bytes(b"no image")
    encoder = write_encoder(root / "encoder")
    assert run(bids, out, encoder) == 0
    return bids, out, encoder


def run(bids, out, encoder, *flags):
    asked = ("--features", "images", "--encoder", str(encoder), "--brainage-model", "ridge", "--omp-nthreads", "1")
    return main([str(bids), str(out), "group", *asked, *flags])


def test_age_is_predicted_from_images_beside_controls(study):
    _, out, _ = study
    scores = pd.read_csv(out / "models/brainage_scores.tsv", sep="\t", index_col=0)
    assert {"none", "members", "mean_predictor", "ridge", "volumes", "untrained"} <= set(scores.index)
    mae = scores["mae"]
    assert mae["none"] < 0.5 * mae["mean_predictor"] and mae["volumes"] > 0.8 * mae["mean_predictor"]
    gains = pd.read_csv(out / "models/brainage_gains.tsv", sep="\t", index_col="against")
    assert gains.loc["volumes", "part"] == "images" and gains.loc["untrained", "part"] == "pre-training"
    # Scores are of one draw of the folds, gains of three.
    assert gains.loc["volumes", "gain"] == pytest.approx(mae["volumes"] - mae["ridge"], rel=0.3)
    assert gains.loc["volumes", "effect"] == "helps" and gains.loc["untrained", "effect"] == "unclear"
    assert len(pd.read_csv(out / "phenotype/brainage.tsv", sep="\t")) == N - 1
    page = (out / "group_brainage.html").read_text()
    assert "features of an encoder of brain images (sfcn, pre-trained on volumes)" in page
    assert f"sub-{N}_T1w.nii.gz: " in page and "with random weights" in page and "anatomical" not in page
    absent = ("group_quality.html", "models/brainage_numerics.tsv", "models/brainage_covariance.tsv")
    assert not any((out / name).exists() for name in absent)
    if find_validator() is not None:
        assert run_validator(out) == []


def test_the_same_command_reads_the_features_and_gives_the_same_bytes(study, monkeypatch):
    bids, out, encoder = study
    kept = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.rglob("*") if path.is_file()}
    table = out / "sub-03/anat/sub-03_desc-encoder_features.tsv"
    before = table.stat().st_mtime_ns
    assert run(bids, out, encoder) == 0
    assert table.stat().st_mtime_ns == before
    assert {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in kept} == kept
    assert run(bids, out, encoder, "--reports-only") == 0
    assert hashlib.sha256((out / "group_brainage.html").read_bytes()).hexdigest() == kept[out / "group_brainage.html"]


def test_a_model_predicts_other_people_with_its_encoder_alone(study, tmp_path, capsys):
    _, out, encoder = study
    others, theirs = write_dataset(tmp_path, 3)
    model = ("--apply-model", str(out / "models/brainage.skops"))
    assert run(others, theirs, encoder, *model) == 0
    table = pd.read_csv(theirs / "phenotype/brainage.tsv", sep="\t")
    assert ((table["brain_age"] - table["age"]).abs() < 15).all() and len(table) == 3
    assert "encoder of brain images" in (theirs / "group_brainage.html").read_text()
    capsys.readouterr()
    assert run(others, theirs, write_encoder(tmp_path / "other", seed=2), *model) == 65
    assert "not the encoder that the model was fitted with" in capsys.readouterr().err
    plain = [str(others), str(theirs), "group"]
    assert main([*plain, *model]) == 64
    assert "Add --features images" in capsys.readouterr().err


def test_a_target_is_predicted_from_images(study, tmp_path):
    bids, out, encoder = study
    assert run(bids, out, encoder, "--target", "group", "--augmentation", "members") == 0
    scores = pd.read_csv(out / "models/target_group_scores.tsv", sep="\t")
    auc = scores.query("measure == 'auc'").set_index("augmentation")["value"]
    assert auc["none"] > 0.9 > auc["volumes"] and "untrained" in auc
    gains = pd.read_csv(out / "models/target_group_gains.tsv", sep="\t")
    assert {"images", "pre-training"} <= set(gains["part"])
    assert "in place of volumes" in (out / "group_target_group.html").read_text()
    others, theirs = write_dataset(tmp_path, 3)
    assert run(others, theirs, encoder, "--apply-model", str(out / "models/target_group.skops")) == 0
    assert len(pd.read_csv(theirs / "phenotype/target_group.tsv", sep="\t")) == 3


def test_a_dry_run_encodes_nothing(study, tmp_path, capsys):
    _, _, encoder = study
    bids, out = write_dataset(tmp_path, 2)
    before = sorted(out.rglob("*"))
    assert run(bids, out, encoder, "--dry-run") == 0
    assert "2 image(s) of 2 participant(s), 64 features by 2 perturbed member(s)" in capsys.readouterr().out
    assert sorted(out.rglob("*")) == before


def test_nine_people_are_too_few(study, tmp_path, capsys):
    _, _, encoder = study
    bids, out = write_dataset(tmp_path, 10)
    text = (bids / "participants.tsv").read_text().replace("sub-02\t26.7", "sub-02\tn/a")
    (bids / "participants.tsv").write_text(text)
    assert run(bids, out, encoder) == 65
    said = capsys.readouterr().err
    assert "9 participants with age" in said and "no age (n/a)" in said
    assert not (out / "sub-02/anat/sub-02_desc-encoder_features.tsv").exists()


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--features", "images"], 64, "add --encoder DIR"),
        (["--encoder", "E"], 64, "add --features images"),
        (["--features", "images", "--encoder", "E", "--log-volumes"], 64, "--log-volumes: not with --features images"),
        (["--features", "images", "--encoder", "E", "--relative-to", "brain"], 64, "--relative-to: not with"),
        (["--features", "images", "--encoder", "E", "--compare", "x=/tmp"], 64, "--compare: not with"),
        (["--features", "images", "--encoder", "/nowhere"], 65, "/nowhere: no folder of an encoder"),
    ],
)
def test_requests_that_cannot_be_met(tmp_path, flags, code, message, capsys):
    bids, out = write_dataset(tmp_path, 1)
    assert main([str(bids), str(out), "group", *flags]) == code
    assert message in capsys.readouterr().err


def test_a_segmentation_ensemble_is_no_encoder(study, tmp_path, capsys):
    bids, out, _ = study
    (tmp_path / "manifest.json").write_text(json.dumps({"name": "aseg31", "format": 2, "members": []}))
    assert run(bids, out, tmp_path) == 65
    assert "no encoder. Make one with bids_varaug-pretrain" in capsys.readouterr().err
