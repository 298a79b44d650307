"""The dataset that the example writes."""

import hashlib
import importlib.util

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from bids_varaug.inputs.validation import find_validator, run_validator

OPTIONS = ["--n", "4", "--ages", "20", "80", "--seed", "7", "--size", "4", "--rescans", "1"]


@pytest.fixture(scope="module")
def example(root):
    path = root / "examples" / "make_ageing_cohort.py"
    if not path.is_file():
        pytest.skip("examples are not installed with the package")
    spec = importlib.util.spec_from_file_location("make_ageing_cohort", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def cohort(example, head_file, tmp_path_factory):
    bids_dir = tmp_path_factory.mktemp("cohort") / "bids"
    assert example.main([str(head_file), str(bids_dir), *OPTIONS, "--write-labels"]) == 0
    return bids_dir


@pytest.mark.skipif(find_validator() is None, reason="bids-validator-deno missing")
def test_dataset_is_valid(cohort):
    assert run_validator(cohort) == []


def test_ages_cover_the_range_and_sexes_and_sites_are_balanced(cohort):
    people = pd.read_csv(cohort / "participants.tsv", sep="\t")
    assert np.array_equal(np.sort((people["age"] - 20) // 15), [0, 1, 2, 3])
    assert sorted(people["sex"]) == ["F", "F", "M", "M"]
    assert sorted(people["site"]) == ["site1", "site1", "site2", "site2"]


def test_truth_agrees_with_the_true_labels(cohort):
    truth = pd.read_csv(cohort / "sourcedata" / "truth.tsv", sep="\t").set_index("participant_id")
    labels = sorted((cohort / "sourcedata").rglob("*_dseg.nii.gz"))
    assert len(labels) == 5  # one person was scanned twice
    for path in labels:
        row = truth.loc[path.name.split("_")[0]]
        drawn = np.count_nonzero(np.asarray(nib.load(path).dataobj) == 2) * 64.0
        assert drawn == pytest.approx(row["Left-Cerebral-White-Matter"], rel=0.05)


def test_same_seed_gives_the_same_files(example, head_file, cohort, tmp_path):
    assert example.main([str(head_file), str(tmp_path / "again"), *OPTIONS]) == 0

    def digests(folder):
        files = [p for p in folder.rglob("*") if p.is_file() and "dseg" not in p.name]
        return {p.relative_to(folder): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}

    assert digests(tmp_path / "again") == digests(cohort)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--ages", "80", "20"], 64, "two ages within"),
        (["--size", "9"], 64, "voxels must have"),
        (["--n", "0"], 64, "at least 1"),
    ],
)
def test_wrong_requests_are_refused(example, head_file, tmp_path, capsys, options, code, message):
    assert example.main([str(head_file), str(tmp_path / "out"), *options]) == code
    assert message in capsys.readouterr().err


def test_existing_data_are_not_touched(example, head_file, cohort, capsys):
    assert example.main([str(head_file), str(cohort)]) == 73
    assert "not empty" in capsys.readouterr().err
