"""The group level from the command line, on derivatives written by hand."""

import hashlib
import json
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from bids_varaug.brainage.gather import ENDING
from bids_varaug.cli.run import main

STRUCTURES = ("Left-Hippocampus", "Right-Hippocampus", "Left-Lateral-Ventricle", "3rd-Ventricle")
MEMBERS = ("ieee", "mca01", "mca02", "seed01", "seed02")
N = 30


def write_derivatives(root: Path, numerical: float = 0.02) -> Path:
    """N people whose volumes follow age, each by five members that differ a little."""
    rng = np.random.default_rng(1)
    root.mkdir()
    made = {"Name": "bids_varaug", "Version": "0.1.0"}
    description = {"Name": "x", "BIDSVersion": "1.10.0", "DatasetType": "derivative"}
    write_json(root / "dataset_description.json", description | {"GeneratedBy": [made]})
    rows = [f"desc-{m}\tx\t{m.rstrip('0123456789')}\t0\tn/a\tsha-{m}\n" for m in MEMBERS]
    head = "desc_id\tdescription\tfamily\tseed\tprecision\tsha256\n"
    (root / "descriptions.tsv").write_text(head + "".join(rows))
    ages = np.linspace(20, 80, N)
    for person, age in enumerate(ages, 1):
        truth = np.array([4000 - 20 * age, 4000 - 20 * age, 5000 + 250 * age, 800 + 15 * age])
        truth *= np.exp(rng.normal(0, 0.05, len(STRUCTURES)))
        name = f"sub-{person:02d}"
        folder = root / name / "anat"
        folder.mkdir(parents=True)
        lines = ["member\tfamily\tindex\tname\tvolume"]
        for member in MEMBERS:
            volumes = truth * np.exp(rng.normal(0, numerical, len(STRUCTURES)))
            lines += [
                f"{member}\t{member.rstrip('0123456789')}\t{i}\t{structure}\t{volume:.1f}"
                for i, (structure, volume) in enumerate(zip(STRUCTURES, volumes, strict=True), 1)
            ]
        table = folder / f"{name}{ENDING}"
        table.write_text("\n".join(lines) + "\n")
        write_json(table.with_suffix(".json"), {"Description": "x", "GeneratedBy": [made]})
    return root


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content))


@pytest.fixture
def bids(tmp_path):
    root = tmp_path / "bids"
    root.mkdir()
    write_json(root / "dataset_description.json", {"Name": "x", "BIDSVersion": "1.10.0"})
    ages = np.linspace(20, 80, N)
    rows = [f"sub-{p:02d}\t{a:.1f}\t{'FM'[p % 2]}\n" for p, a in enumerate(ages, 1)]
    (root / "participants.tsv").write_text("participant_id\tage\tsex\n" + "".join(rows))
    return root


@pytest.fixture
def output(tmp_path):
    return write_derivatives(tmp_path / "derivatives")


def run(bids, output, *flags):
    return main([str(bids), str(output), "group", "--brainage-model", "ridge", *flags])


def digests(root):
    return {
        p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(root.rglob("*"))
        if p.is_file()
    }


def test_brain_age_is_predicted_scored_and_reported(bids, output, capsys):
    before = digests(output)
    assert run(bids, output) == 0
    assert "group_brainage.html" in capsys.readouterr().err
    table = pd.read_csv(output / "phenotype/brainage.tsv", sep="\t")
    assert len(table) == N
    assert np.corrcoef(table["age"], table["brain_age"])[0, 1] > 0.9
    assert (table["sd_num"] > 0).all()
    scores = pd.read_csv(output / "models/brainage_scores.tsv", sep="\t", index_col=0)
    wanted = {"none", "mean", "members", "analytic", "jitter", "shuffled", "mean_predictor"}
    assert wanted <= set(scores.index)
    assert scores.loc["none", "mae"] < 0.5 * scores.loc["mean_predictor", "mae"]
    numerics = pd.read_csv(output / "models/brainage_numerics.tsv", sep="\t", index_col=0)
    assert numerics.loc["Left-Hippocampus", "sd_num"] == pytest.approx(60, rel=0.3)
    page = (output / "group_brainage.html").read_text()
    assert "Left-Hippocampus" in page and 'src="http' not in page
    assert (output / "logs/CITATION_group.md").exists()
    after = digests(output)
    assert {name: after[name] for name in before} == before  # the participant level's files
    assert run(bids, output) == 0
    assert digests(output) == after  # the same bits


def test_outputs_pass_the_validator(bids, output):
    assert run(bids, output, "--augmentation", "none") == 0
    validator = Path(__import__("sys").executable).with_name("bids-validator-deno")
    done = subprocess.run(
        [validator, "--format", "json", str(output)], capture_output=True, text=True, check=False
    )
    issues = json.loads(done.stdout)["issues"]["issues"]
    assert [i for i in issues if i["severity"] == "error"] == []


def test_a_fitted_model_predicts_other_people(bids, output, tmp_path):
    assert run(bids, output, "--augmentation", "members", "--asymmetries") == 0
    model = output / "models/brainage.skops"
    others = write_derivatives(tmp_path / "others")
    (bids / "participants.tsv").unlink()  # their ages are not known
    assert run(bids, others, "--apply-model", str(model)) == 0
    table = pd.read_csv(others / "phenotype/brainage.tsv", sep="\t")
    assert len(table) == N
    assert table["brain_age"].between(10, 100).all() and table["age"].isna().all()
    assert not (others / "models").exists()


def test_features_of_another_tool_need_no_derivatives(bids, tmp_path):
    rng = np.random.default_rng(2)
    ages = np.linspace(20, 80, N)
    table = pd.DataFrame(
        {"participant_id": [f"A_{p}" for p in range(N)], "age": ages, "site": ["x", "y", "z"] * 10}
        | {f"thickness{k}": 3 - ages / 60 + rng.normal(0, 0.1, N) for k in range(5)}
    )
    path = tmp_path / "features.tsv"
    table.to_csv(path, sep="\t", index=False)
    (bids / "participants.tsv").unlink()
    out = tmp_path / "out"
    assert run(bids, out, "--features-table", str(path)) == 0
    brain_age = pd.read_csv(out / "phenotype/brainage.tsv", sep="\t")
    assert set(brain_age["source_id"]) == {f"sub-A_{p}" for p in range(N)}
    assert brain_age["participant_id"].str.fullmatch("sub-[0-9A-Za-z]+").all()


def test_another_pipeline_is_compared(bids, output, tmp_path):
    other = write_derivatives(tmp_path / "other", numerical=0.1)
    rows = [
        pd.read_csv(path, sep="\t")
        .pivot(index="member", columns="name", values="volume")
        .assign(participant_id=path.parent.parent.name)
        for path in sorted(other.glob("sub-*/anat/*.tsv"))
    ]
    table = tmp_path / "noisy.tsv"
    pd.concat(rows).reset_index().to_csv(table, sep="\t", index=False)
    assert run(bids, output, "--augmentation", "none", "--compare", f"noisy={table}") == 0
    assert "noisy" in (output / "group_brainage.html").read_text()
    assert (output / "models/brainage_against_noisy.tsv").exists()


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--age-column", "years"], 65, "years"),
        (["--participant-label", "01", "02", "03"], 65, "10"),
        (["--participant-label", "99"], 18, "nobody"),
        (["--compare", "fs=/nowhere"], 64, "/nowhere"),
        (["--compare", "a/b=/tmp"], 64, "letters and digits"),
    ],
)
def test_requests_that_cannot_be_met(bids, output, flags, code, message, capsys):
    assert run(bids, output, *flags) == code
    assert message in capsys.readouterr().err
    assert not (output / "group_brainage.html").exists()


def test_dry_run_fits_and_writes_nothing(bids, output, capsys):
    before = digests(output)
    assert run(bids, output, "--dry-run") == 0
    assert f"{N} image(s) of {N} participant(s), 4 features" in capsys.readouterr().out
    assert digests(output) == before


def test_output_of_nothing(bids, tmp_path, capsys):
    assert run(bids, tmp_path / "empty") == 66
    assert "participant" in capsys.readouterr().err
