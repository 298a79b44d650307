import json
import subprocess

import pytest

from bids_varaug.errors import InvalidBidsError
from bids_varaug.inputs import validation

needs_validator = pytest.mark.skipif(
    validation.find_validator() is None, reason="bids-validator-deno missing"
)


@pytest.fixture
def bids_dir(tmp_path):
    root = tmp_path / "ds"
    for label in ("01", "02"):
        (root / f"sub-{label}" / "anat").mkdir(parents=True)
        (root / f"sub-{label}" / "anat" / f"sub-{label}_T1w.nii.gz").write_bytes(b"not an image")
    description = {"Name": "x", "BIDSVersion": "1.8.0", "License": "CC0", "Authors": ["A", "B"]}
    (root / "dataset_description.json").write_text(json.dumps(description))
    (root / "README").write_text("A data set for tests.\n" * 10)
    return root


@needs_validator
def test_valid_dataset_with_unreadable_image_passes(bids_dir):
    assert validation.validate_input(bids_dir) is None


@needs_validator
def test_dangling_links_and_empty_images_pass(bids_dir):
    (bids_dir / "sub-01/anat/sub-01_run-1_T1w.nii.gz").symlink_to("nowhere.nii.gz")
    (bids_dir / "sub-01/anat/sub-01_run-2_T1w.nii.gz").symlink_to(
        "../../.git/annex/objects/xx/MD5E-s123--abc.nii.gz"
    )
    (bids_dir / "sub-01/anat/sub-01_run-3_T1w.nii.gz").write_bytes(b"")
    assert validation.validate_input(bids_dir) is None


@needs_validator
def test_description_that_was_not_fetched_is_a_warning(bids_dir, capsys):
    description = bids_dir / "dataset_description.json"
    description.unlink()
    description.symlink_to(".git/annex/objects/xx/MD5E-s123--abc.json")
    assert validation.validate_input(bids_dir) is None
    assert "datalad get dataset_description.json" in capsys.readouterr().err


@needs_validator
def test_participants_whose_folders_were_removed_do_not_count_where_others_are_named(bids_dir):
    (bids_dir / "participants.tsv").write_text("participant_id\nsub-01\nsub-02\nsub-03\n")
    assert validation.validate_input(bids_dir, participant_labels=["01"]) is None


@needs_validator
def test_wrong_name_is_told_with_code_file_and_way_out(bids_dir):
    (bids_dir / "sub-01/anat/sub-01_foo.nii.gz").write_bytes(b"x")
    with pytest.raises(InvalidBidsError, match="sub-01_foo.nii.gz") as caught:
        validation.validate_input(bids_dir)
    assert "--skip-bids-validation" in str(caught.value)
    assert caught.value.exit_code == 16


@needs_validator
def test_errors_of_other_participants_do_not_count(bids_dir):
    (bids_dir / "sub-02/anat/sub-02_foo.nii.gz").write_bytes(b"x")
    assert validation.validate_input(bids_dir, participant_labels=["01"]) is None


@needs_validator
def test_missing_description_is_an_error(bids_dir):
    (bids_dir / "dataset_description.json").unlink()
    with pytest.raises(InvalidBidsError, match="MISSING_DATASET_DESCRIPTION"):
        validation.validate_input(bids_dir, participant_labels=["01"])


@needs_validator
def test_no_schema_is_fetched(bids_dir, monkeypatch):
    monkeypatch.setenv("BIDS_SCHEMA", "http://localhost:1/schema.json")
    assert validation.validate_input(bids_dir) is None


def test_missing_validator_says_how_to_go_on(bids_dir, monkeypatch):
    monkeypatch.setattr(validation, "find_validator", lambda: "/there/is/none")
    with pytest.raises(InvalidBidsError, match="pip install .* --skip-bids-validation"):
        validation.validate_input(bids_dir)


def test_validator_that_fails_is_not_taken_for_a_pass(bids_dir, monkeypatch):
    monkeypatch.setattr(validation, "find_validator", lambda: "validator")
    monkeypatch.setattr(
        validation.subprocess,
        "run",
        lambda *_, **__: subprocess.CompletedProcess([], 1, stdout=b"", stderr=b"out of memory"),
    )
    with pytest.raises(InvalidBidsError, match="no verdict .* out of memory"):
        validation.validate_input(bids_dir)


def test_long_lists_of_errors_are_cut():
    errors = [{"code": f"C{i % 10}", "location": f"/f{i}"} for i in range(50)]
    summary = validation.summarize_errors(errors)
    assert "C0: /f0, /f10, /f20 and 2 more" in summary
    assert summary.endswith("and 2 other kinds of error")
