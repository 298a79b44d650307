"""The group level without ages: tables and page of the reliability of volumes."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest

from bids_varaug.cli.run import main
from bids_varaug.derivatives.io import ENDING
from bids_varaug.derivatives.names import OUTPUTS
from bids_varaug.inputs.validation import find_validator, run_validator

STRUCTURES = {17: "Left-Hippocampus", 53: "Right-Hippocampus", 4: "Left-Lateral-Ventricle", 14: "3rd-Ventricle"}
VOLUMES = np.array([4000.0, 4100.0, 9000.0, 1200.0])
MEMBERS = ("ieee", "mca01", "mca02", "mca03", "seed01", "seed02")
REGIONS = OUTPUTS["regions_tsv"].name("")


def write_image(root, name, truth, levels, rng):
    """Tables of one image: members differ by 2 % in level (`levels`), and by 0.3 % from image to image."""
    folder = root.joinpath(*name.split("_")[: 2 if "ses-" in name else 1], "anat")
    folder.mkdir(parents=True, exist_ok=True)
    volumes = truth * levels * np.exp(rng.normal(0, 0.003, levels.shape))
    lines = [
        f"{member}\t{member.rstrip('0123456789')}\t{index}\t{structure}\t{volumes[m, s]:.2f}\n"
        for m, member in enumerate(MEMBERS)
        for s, (index, structure) in enumerate(STRUCTURES.items())
    ]
    (folder / f"{name}{ENDING}").write_text("member\tfamily\tindex\tname\tvolume\n" + "".join(lines))
    mean = volumes[1:].mean(axis=0)
    low = np.array([1800, 1800, 1500, 300])
    table = pd.DataFrame({"index": STRUCTURES.keys(), "name": STRUCTURES.values(), "volume_mean": mean})
    table = table.assign(cv=0.02, verdict="good", reason=None, volume_low=low, volume_high=[7500, 7500, 80000, 7000])
    table.loc[mean < low, ["verdict", "reason"]] = ["unreliable", "too small; few voxels"]
    path = folder / f"{name}{REGIONS}"
    table.to_csv(path, sep="\t", index=False, na_rep="n/a")
    path.with_suffix(".json").write_text(json.dumps({"Volumes": {"brain_mask": {"Value": 1.2 * mean.sum()}}}))


def write_cohort(root):
    """Twelve people: sub-01 has two sessions, the first with two scans, and loses 5 % of the left hippocampus."""
    rng = np.random.default_rng(0)
    description = {"Name": "x", "BIDSVersion": "1.10.0", "DatasetType": "derivative"}
    root.mkdir()
    made = {"GeneratedBy": [{"Name": "bids_varaug", "Version": "0.1.0"}]}
    (root / "dataset_description.json").write_text(json.dumps(description | made))
    head = "desc_id\tdescription\tfamily\tseed\tprecision\tsha256\n"
    rows = [f"desc-{m}\tx\t{m.rstrip('0123456789')}\t0\tn/a\tsha-{m}\n" for m in MEMBERS]
    (root / "descriptions.tsv").write_text(head + "".join(rows))
    for person in range(1, 13):
        truth = VOLUMES * np.exp(rng.normal(0, 0.08, 4))
        levels = np.exp(rng.normal(0, 0.02, (len(MEMBERS), 4)))
        if person > 1:
            truth = truth * ([0.3, 1, 1, 1] if person == 12 else 1)
            for run in ("_run-1", "_run-2") if person < 6 else ("",):
                scanned = truth * np.exp(rng.normal(0, 0.003, 4))
                write_image(root, f"sub-{person:02d}{run}", scanned, levels, rng)
            continue
        for name, factor in {"ses-b_run-1": 1.0, "ses-b_run-2": 1.004, "ses-a": 0.95}.items():
            write_image(root, f"sub-01_{name}", truth * [factor, 1, 1, 1], levels, rng)
    (root / "sub-02.html").write_text("a report")
    return root


@pytest.fixture
def bids(tmp_path):
    (tmp_path / "bids").mkdir()
    (tmp_path / "bids/dataset_description.json").write_text('{"Name": "x", "BIDSVersion": "1.10.0"}')
    return tmp_path / "bids"


@pytest.fixture(scope="module")
def derivatives(tmp_path_factory):
    return write_cohort(tmp_path_factory.mktemp("cohort") / "derivatives")


@pytest.fixture
def output(derivatives, tmp_path):
    return shutil.copytree(derivatives, tmp_path / "derivatives")


def run(bids, output, *flags):
    return main([str(bids), str(output), "group", "-w", str(output.parent / "work"), *flags])


def test_people_without_ages_get_volumes_outliers_power_and_changes(bids, output, capsys):
    assert run(bids, output) == 0
    told = capsys.readouterr().err
    assert "participants.tsv: not found" in told and "group_quality.html" in told
    assert "order of their labels: sub-01" in told
    volumes = pd.read_csv(output / "phenotype/volumes.tsv", sep="\t", index_col="image")
    assert len(volumes) == 18 and volumes["distance"].idxmax() == "sub-12"
    assert (volumes["distance"] > 3.5).sum() == 1 and volumes.loc["sub-12", "n_unreliable"] == 1
    cv = volumes["Left-Hippocampus_sd"] / volumes["Left-Hippocampus"]
    assert cv.median() == pytest.approx(0.02, rel=0.5)
    np.testing.assert_allclose(volumes["brain"], volumes[list(STRUCTURES.values())].sum(axis=1), rtol=1e-5)
    assert volumes["brain_mask"].to_numpy() == pytest.approx(1.2 * volumes["brain"].to_numpy(), rel=1e-4)
    sidecar = json.loads((output / "phenotype/volumes.json").read_text())
    assert set(volumes) - {"participant_id", "session_id"} <= set(sidecar)
    assert sidecar["Left-Hippocampus_sd"]["Units"] == "mm^3"
    power = pd.read_csv(output / "models/power.tsv", sep="\t", index_col="name")
    assert power["sd_d"].to_numpy() == pytest.approx(
        2 * power["npv"].to_numpy() / (12 * (1 + power["npv"].to_numpy() ** 2)) ** 0.5, rel=1e-4
    )
    assert not (output / "group_brainage.html").exists() and not (output / "phenotype/brainage.tsv").exists()
    page = (output / "group_quality.html").read_text()
    assert '<a href="sub-02.html">sub-02_run-1</a>' in page and "sub-03.html" not in page
    assert "1 stands out" in page and ">Left-Hippocampus</td>" in page


def test_sessions_are_ordered_by_date_and_a_change_is_paired(bids, output):
    tables = {"sub-01_sessions.tsv": "session_id\tacq_time\nses-b\t1901-05-02T10:00:00\n",
              "ses-a/sub-01_ses-a_scans.tsv": "filename\tacq_time\nanat/sub-01_ses-a_T1w.nii.gz\t1902-05-02T10:00:00Z\n"
              "anat/sub-01_ses-a_T2w.nii.gz\t1900-05-02T10:00:00Z\n"}  # fmt: skip
    for name, text in tables.items():
        path = bids / "sub-01" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert run(bids, output, "--no-brain-age") == 0
    changes = pd.read_csv(output / "phenotype/changes.tsv", sep="\t", index_col="name")
    assert set(changes["session_id"]) == {"ses-a"} and set(changes["days"]) == {365}
    hippocampus = changes.loc["Left-Hippocampus"]
    assert hippocampus["change"] == pytest.approx(-5.2, abs=0.6) and hippocampus["mark"] == "beyond"
    assert hippocampus["sd_num"] < 0.6  # 2 % in level
    assert 0.3 < hippocampus["detectable_rescan"] < 3
    assert (changes["mark"].drop("Left-Hippocampus") == "within").all()
    page = (output / "group_quality.html").read_text()
    assert "order of their labels" not in page and "Hippocampus  L −5" in page


def test_pages_are_rewritten_from_what_was_saved(bids, output):
    assert run(bids, output, "--no-brain-age") == 0
    page = output / "group_quality.html"
    before = page.read_bytes()
    page.unlink()
    assert run(bids, output, "--reports-only") == 0
    assert page.read_bytes() == before and not (output / "group_brainage.html").exists()


def test_what_nobody_judged_and_what_all_share_is_said_once(bids, output, capsys):
    few = "spread unknown with one member"
    for path in output.rglob(f"*{REGIONS}"):
        table = pd.read_csv(path, sep="\t", na_values="n/a")
        reason = [few if pd.isna(own) else f"{own}; {few}" for own in table["reason"]]
        verdict = table["verdict"].replace("good", "unknown")
        table.assign(reason=reason, verdict=verdict).to_csv(path, sep="\t", index=False, na_rep="n/a")
    (bids / "participants.tsv").write_text("participant_id\n" + "".join(f"sub-{n:02d}\n" for n in range(3, 30)))
    assert run(bids, output) == 0
    told = capsys.readouterr().err
    (line,) = (line for line in told.splitlines() if line.startswith("Left out: 17 "))
    assert line.startswith("Left out: 17 (sub-13, sub-14, ") and "and 9 more): no *" in line
    page = (output / "group_quality.html").read_text()
    assert "In 18, structures are not judged." in page and page.count(few) == 1
    assert "sub-20 and 9 more</summary>" in page and "sub-28, sub-29</details>" in page


@pytest.mark.skipif(find_validator() is None, reason="bids-validator-deno missing")
def test_outputs_pass_the_validator(bids, output):
    assert run(bids, output) == 0
    assert run_validator(output) == []


def test_other_features_have_no_page_of_their_own(bids, output, capsys):
    assert run(bids, output, "--no-brain-age", "--features-table", str(output / "descriptions.tsv")) == 64
    assert "nothing is left to do" in capsys.readouterr().err


def test_few_images_and_damaged_tables_are_said(bids, output):
    (output / f"sub-08/anat/sub-08{REGIONS}").write_text("index\n")
    assert run(bids, output, "--participant-label", "07", "08", "09") == 0
    page = (output / "group_quality.html").read_text()
    assert "fewer than 10 images" in page.replace("\n", "") and "Images without verdicts" in page and "sub-08" in page
    assert 'id="power"' not in page
