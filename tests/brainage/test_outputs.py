"""The phenotype table, its description, and what the validator says of both."""

import json

import numpy as np
import pandas as pd
import pytest

from bids_varaug.brainage import outputs
from bids_varaug.brainage.evaluate import best_augmentation
from bids_varaug.derivatives import io, sidecars
from bids_varaug.files import write_json
from bids_varaug.inputs.validation import find_validator, run_validator
from tests.reports.group_content import make_study


def main_table(study):
    return outputs.evaluated_tables(study)[outputs.PHENOTYPE_TABLE]


def with_sessions(study, runs=2):
    """Every observation once per session and run, predictions a year apart."""
    from dataclasses import replace

    tables = []
    for session in (1, 2):
        for run in range(runs):
            table = study.predictions.assign(session_id=f"ses-{session}")
            table["observation"] += f"_ses-{session}_run-{run}"
            table["predicted"] += session + 0.5 * run
            tables.append(table)
    return replace(study, predictions=pd.concat(tables, ignore_index=True))


def test_one_row_per_participant_of_the_best_augmentation():
    study = make_study(n=30)
    table = main_table(study)
    rows = study.predictions.query("augmentation == 'members'")
    assert list(table.columns[:2]) == ["participant_id", "age"]
    assert np.allclose(table["brain_age"], rows["predicted"], atol=1e-4)
    assert np.allclose(table["brain_age_gap"], rows["corrected"] - rows["age"], atol=1e-4)
    none = study.predictions.query("augmentation == 'none'")
    assert np.allclose(table["brain_age_none"], none["predicted"], atol=1e-4)


def test_sessions_have_tables_of_their_own_and_runs_are_averaged():
    study = make_study(n=30)
    tables = outputs.evaluated_tables(with_sessions(study))
    assert list(tables) == [
        "phenotype/brainage.tsv",
        "phenotype/brainage_ses-1.tsv",
        "phenotype/brainage_ses-2.tsv",
    ]
    alone = main_table(study)["brain_age"]
    for (name, table), shift in zip(tables.items(), (1.75, 1.25, 2.25), strict=True):
        assert np.allclose(table["brain_age"], alone + shift, atol=1e-3)
        assert table["participant_id"].is_unique and len(table) == 30
        assert (table["n_images"] == (2 if "ses" in name else 4)).all()
    assert (tables["phenotype/brainage_ses-2.tsv"]["session_id"] == "ses-2").all()


def test_impossible_ages_and_a_withheld_correction_are_remarked():
    table = main_table(make_study(n=30))
    assert outputs.remark_ages(table) == []
    table.loc[3, "brain_age_corrected"], table.loc[4, "brain_age"] = 130.25, -3.0
    low, high = outputs.remark_ages(table)
    assert low.startswith("brain_age is no possible age") and "(-3.0)" in low
    assert f"{table['participant_id'][3]} (130.2)" in high
    table["brain_age_corrected"] = np.nan
    assert "withheld" in outputs.remark_ages(table)[0]


def test_best_is_none_unless_a_gain_is_sure_and_no_control():
    assert best_augmentation(make_study(20)) == "members"
    assert best_augmentation(make_study(20, half=1.0)) == "none"
    assert best_augmentation(make_study(20, {"mean": 0.5, "members": 0.4, "jitter": 0.1})) == "mean"
    assert best_augmentation(make_study(20, {"jitter": 3.0})) == "none"
    assert best_augmentation(make_study(20, {})) == "none"


def test_every_column_is_described_with_its_unit():
    study = with_sessions(make_study(20))
    sidecar = outputs.evaluated_sidecar(study)
    columns = set(main_table(study).columns) - {"participant_id"}
    assert columns == set(sidecar) - {"MeasurementToolMetadata"}
    assert all(sidecar[c]["Description"] for c in columns)
    assert all(sidecar[c]["Units"] == "year" for c in columns - {"n_images"})
    assert "90 % nominal" in sidecar["lower"]["Description"]
    json.dumps(sidecar, allow_nan=False)


@pytest.mark.skipif(find_validator() is None, reason="bids-validator-deno missing")
def test_the_validator_accepts_it_and_would_see_a_fault(tmp_path):
    study = with_sessions(make_study(n=12))
    raw, out = tmp_path / "raw", tmp_path / "out"
    raw.mkdir()
    sidecars.write_group_dataset_files(raw, out)
    for name, table in outputs.evaluated_tables(study).items():
        io.write_table(table, out / name)
        write_json(outputs.evaluated_sidecar(study), (out / name).with_suffix(".json"))
    for participant in study.predictions["participant_id"].unique():
        (out / participant / "anat").mkdir(parents=True)
        io.write_table(
            pd.DataFrame({"index": [1], "name": ["x"]}),
            out / participant / "anat" / f"{participant}_seg-varaug_desc-consensus_dseg.tsv",
        )
    assert run_validator(out) == []
    table = main_table(study).rename(columns={"participant_id": "who"})
    io.write_table(table, out / outputs.PHENOTYPE_TABLE)
    assert run_validator(out) != []
