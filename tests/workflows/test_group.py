"""The group level from the command line, on derivatives written by hand."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from bids_varaug.cli.run import main
from bids_varaug.derivatives.io import ENDING
from bids_varaug.inputs.validation import find_validator, run_validator

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
    covariance = pd.read_csv(output / "models/brainage_covariance.tsv", sep="\t")
    assert set(covariance["family"]) == {"all", "mca", "seed"}
    assert len(covariance) == 3 * len(STRUCTURES) * (len(STRUCTURES) + 1) / 2
    variance = covariance.query("family == 'all' and name == other").set_index("name")["covariance"]
    np.testing.assert_allclose(np.sqrt(variance), numerics["sd_num"][variance.index], rtol=1e-4)
    sidecar = json.loads((output / "models/brainage_covariance.json").read_text())
    assert sidecar["covariance"]["Units"] == "mm^6"
    assert (output / "logs/CITATION_group.md").exists()
    after = digests(output)
    assert {name: after[name] for name in before} == before  # the participant level's files
    assert run(bids, output) == 0
    assert digests(output) == after  # the same bits


@pytest.mark.skipif(find_validator() is None, reason="bids-validator-deno missing")
def test_outputs_pass_the_validator(bids, output):
    assert run(bids, output, "--augmentation", "none") == 0
    assert (output / "models/brainage_covariance.tsv").exists()
    assert (output / "logs/group_brainage.json").exists()
    assert run_validator(output) == []


def test_a_fitted_model_predicts_other_people(bids, output, tmp_path, capsys):
    made = ("--augmentation", "members", "--asymmetries", "--log-volumes")
    assert run(bids, output, *made) == 0
    assert "natural logarithms" in (output / "logs/CITATION_group.md").read_text()
    assert "logarithms" in (output / "phenotype/brainage.json").read_text()
    model = output / "models/brainage.skops"
    others = write_derivatives(tmp_path / "others")
    (bids / "participants.tsv").unlink()  # their ages are not known
    (others / "sub-03/anat" / f"sub-03{ENDING}").write_text("member\n")
    ignored = ("--relative-to", "none", "--log-volumes")  # logarithms are the model's own too
    assert run(bids, others, "--apply-model", str(model), *ignored) == 0
    messages = capsys.readouterr().err
    assert "--relative-to has no effect" in messages and "--log-volumes" not in messages
    table = pd.read_csv(others / "phenotype/brainage.tsv", sep="\t")
    assert len(table) == N - 1
    assert table["brain_age"].between(10, 100).all() and table["age"].isna().all()
    fitted = pd.read_csv(output / "phenotype/brainage.tsv", sep="\t")
    truth = fitted.set_index("participant_id")["age"][table["participant_id"]]
    assert np.corrcoef(truth, table["brain_age"])[0, 1] > 0.9  # logarithms were taken here too
    assert not (others / "models").exists()
    page = (others / "group_brainage.html").read_text()
    assert "ages of these 29 participants are not known" in page
    assert hashlib.sha256(model.read_bytes()).hexdigest() in page
    assert "sub-30" in page and f"sub-03{ENDING}" in page


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


def test_what_is_withheld_or_left_out_is_said_everywhere(bids, tmp_path, capsys):
    rng = np.random.default_rng(3)
    ages = np.linspace(20, 80, N).round(1)
    table = pd.DataFrame(
        {
            "participant_id": [f"{p}" for p in range(1, N + 1)],
            "interview_age": ages,
            "q": 2020 - ages,
        }
        | {f"thickness{k}": 3 + rng.normal(0, 0.1, N) - ages / 900 for k in range(5)}
    )
    table.to_csv(tmp_path / "features.tsv", sep="\t", index=False)
    out = tmp_path / "out"
    assert run(bids, out, "--features-table", str(tmp_path / "features.tsv")) == 0
    brain_age = pd.read_csv(out / "phenotype/brainage.tsv", sep="\t")
    assert brain_age["participant_id"].tolist()[:2] == ["sub-01", "sub-02"]
    assert brain_age[["brain_age_corrected", "brain_age_gap"]].isna().all(axis=None)
    said = [
        capsys.readouterr().err,
        json.loads((out / "phenotype/brainage.json").read_text())["MeasurementToolMetadata"][
            "Description"
        ],
        (out / "group_brainage.html").read_text(),
    ]
    for text in said:
        assert "interview_age (tells the age)" in text and "q (is almost a function of age)" in text
        assert "correction of age bias is withheld" in text
        assert "sub-1 here is sub-01 there" in text
    assert "correction of age bias is withheld" in (out / "models/brainage.md").read_text()


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


def test_published_minimum_dice_is_compared(bids, output, tmp_path):
    lines = ["name\tdice_min", *(f"{name}\t0.9" for name in STRUCTURES)]
    for person in output.glob("sub-*"):
        table = person / f"anat/{person.name}_seg-varaug_desc-consensus_dseg.tsv"
        table.write_text("\n".join(lines) + "\n")
    published = tmp_path / "dice.csv"
    published.write_text(",".join(("subjectID", *STRUCTURES)) + "\n0025531,0.7,0.7,0.8,0.8\n")
    assert run(bids, output, "--augmentation", "none", "--compare", f"fs={published}") == 0
    row = pd.read_csv(output / "models/brainage_against_fs.tsv", sep="\t").iloc[0]
    assert (row["measure"], row["n"]) == ("1 - dice_min", 3)  # left and right count once
    assert row["median_ours"] == pytest.approx(0.1) and row["median_other"] == pytest.approx(0.2)


def test_reports_only_makes_the_same_page_without_fitting(bids, output, capsys):
    assert run(bids, output, "--reports-only") == 66
    assert "group_brainage.json" in capsys.readouterr().err
    assert run(bids, output) == 0
    before = digests(output)
    page = output / "group_brainage.html"
    page.unlink()
    for person in output.glob("sub-*/anat"):
        person.rename(person.with_name("gone"))  # nothing but what the group run left is read
    assert run(bids, output, "--reports-only", "--dry-run") == 0 and not page.exists()
    assert run(bids, output, "--reports-only") == 0
    after = digests(output)
    assert after["group_brainage.html"] == before["group_brainage.html"]
    assert after["models/brainage.skops"] == before["models/brainage.skops"]


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--age-column", "years"], 65, "years"),
        (["--participant-label", "99"], 18, "nobody"),
        (["--compare", "fs=/nowhere"], 64, "/nowhere"),
        (["--compare", "a/b=/tmp"], 64, "letters and digits"),
    ],
)
def test_requests_that_cannot_be_met(bids, output, flags, code, message, capsys):
    assert run(bids, output, *flags) == code
    assert message in capsys.readouterr().err
    assert not (output / "group_brainage.html").exists()


def test_a_dry_run_refuses_what_the_run_would(bids, output, capsys):
    assert run(bids, output, "--target", "sex", "--covariates", "sex", "--dry-run") == 65
    assert "sex" in capsys.readouterr().err


def test_volumes_are_checked_beside_an_empty_table_of_participants(bids, output, capsys):
    (bids / "participants.tsv").write_text("")
    assert run(bids, output, "--no-brain-age", "--participant-label", "01", "02", "zz") == 0
    said = capsys.readouterr().err
    assert "Ages, sexes and sites are unknown" in said and "no outputs of zz" in said
    assert len(pd.read_csv(output / "phenotype/volumes.tsv", sep="\t")) == 2


def test_more_folds_than_people_are_leave_one_out_and_said_so(bids, output):
    assert run(bids, output, "--cv-folds", "500", "--augmentation", "none") == 0
    assert f"{N}-fold" in (output / "logs/CITATION_group.md").read_text()


def test_few_people_with_age_get_no_brain_age(bids, output, capsys):
    assert run(bids, output, "--participant-label", "01", "02", "03") == 0
    assert "fewer than 10 participants have an age" in capsys.readouterr().err
    assert (output / "group_quality.html").exists() and not (output / "group_brainage.html").exists()


def test_who_has_no_age_is_left_out_of_brain_age_only(bids, output):
    people = (bids / "participants.tsv").read_text().replace("sub-30\t80.0", "sub-30\tn/a")
    (bids / "participants.tsv").write_text(people)
    assert run(bids, output, "--augmentation", "none") == 0
    assert len(pd.read_csv(output / "phenotype/brainage.tsv", sep="\t")) == N - 1
    assert "no age (n/a)" in (output / "group_brainage.html").read_text()
    volumes = pd.read_csv(output / "phenotype/volumes.tsv", sep="\t")
    assert "sub-30" in set(volumes["participant_id"]) and len(volumes) == N


def test_a_condition_includes_participants_and_is_told(bids, output, capsys):
    assert run(bids, output, "--include", "sex == 'F' and age > 30", "--augmentation", "none", "--dry-run") == 0
    said = capsys.readouterr()
    assert "13 of 30 participants are in, 17 are out" in said.err and "13 image(s) of 13" in said.out
    assert run(bids, output, "--include", "sex == 'X'", "--dry-run") == 18
    assert "--include leave nobody" in capsys.readouterr().err
    assert run(bids, output, "--include", "hair == 'red'", "--dry-run") == 64
    assert "'hair' is not defined. It has: participant_id, age, sex" in capsys.readouterr().err


def test_a_target_is_scored_and_its_model_predicts_other_people(bids, output, tmp_path, capsys):
    lines = (bids / "participants.tsv").read_text().splitlines()
    old = ["group", *("old" if p > N / 2 else "young" for p in range(1, N + 1))]
    text = "\n".join(f"{line}\t{value}" for line, value in zip(lines, old, strict=True)) + "\n"
    (bids / "participants.tsv").write_text(text)
    asked = ("--target", "group", "--covariates", "sex", "--augmentation", "members")
    assert run(bids, output, *asked) == 0
    table = pd.read_csv(output / "phenotype/target_group.tsv", sep="\t")
    assert (table["predicted"] == table["observed"]).mean() > 0.8 and len(table) == N
    page = (output / "group_target_group.html").read_text()
    assert "The features predict group" in page and "ROC curve" in page
    scores = pd.read_csv(output / "models/target_group_scores.tsv", sep="\t")
    assert {"members", "covariates", "mean_predictor"} <= set(scores["augmentation"])
    if find_validator() is not None:
        assert run_validator(output) == []
    assert run(bids, output, *asked, "--reports-only") == 0
    assert (output / "group_target_group.html").read_text() == page
    others = write_derivatives(tmp_path / "others")
    assert run(bids, others, "--apply-model", str(output / "models/target_group.skops")) == 0
    applied = pd.read_csv(others / "phenotype/target_group.tsv", sep="\t")
    assert applied["p_old"].between(0, 1).all() and "observed" not in applied
    capsys.readouterr()
    assert run(bids, output, "--target", "hair") == 65
    assert "no such column" in capsys.readouterr().err
    assert run(bids, output, "--covariates", "sex") == 64


def test_dry_run_fits_and_writes_nothing(bids, output, capsys):
    before = digests(output)
    assert run(bids, output, "--dry-run") == 0
    assert f"{N} image(s) of {N} participant(s), 4 features" in capsys.readouterr().out
    assert digests(output) == before


def test_output_of_nothing(bids, tmp_path, capsys):
    assert run(bids, tmp_path / "empty") == 66
    assert "participant" in capsys.readouterr().err
