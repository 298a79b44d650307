"""Brain ages as BIDS phenotype tables, and their description."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pandas as pd

from bids_varaug.brainage.augment import AUGMENTATIONS
from bids_varaug.brainage.calibration import WITHHELD
from bids_varaug.brainage.cohort import Cohort
from bids_varaug.brainage.evaluate import Evaluation, best_augmentation
from bids_varaug.brainage.models import VALUES, BrainAgeModel
from bids_varaug.derivatives.citation import render
from bids_varaug.inputs.participants import OLDEST
from bids_varaug.inputs.tables import some

PHENOTYPE_TABLE = "phenotype/brainage.tsv"


def evaluated_tables(evaluation: Evaluation) -> dict[str, pd.DataFrame]:
    """`phenotype_tables` of an evaluation. Predictions are out of sample: nobody's own images took part in training.

    Columns brain_age ... sd_num are those of `best_augmentation`; the predictions of every augmentation follow as
    brain_age_AUGMENTATION.
    """
    chosen = best_augmentation(evaluation)
    predictions = evaluation.predictions
    wide = predictions.pivot(index="observation", columns="augmentation", values="predicted")
    wide = wide[[name for name in AUGMENTATIONS if name in wide]].add_prefix("brain_age_")
    return phenotype_tables(predictions[predictions["augmentation"] == chosen].join(wide, on="observation"))


def phenotype_tables(predictions: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Brain age of every participant, and of every session where there are such: path -> table.

    Several images of a session are averaged, and in the table of participants, all of a participant's. BIDS wants each
    participant once in a phenotype table, so that sessions have tables of their own, with a column session_id. Columns
    are those of ``data/templates/brainage.json``; columns of `predictions` called brain_age_... are averaged too.
    """
    tables = {PHENOTYPE_TABLE: _table(predictions)}
    for session, rows in predictions.dropna(subset=["session_id"]).groupby("session_id"):
        table = _table(rows)
        table.insert(1, "session_id", session)
        tables[PHENOTYPE_TABLE.replace(".tsv", f"_{session}.tsv")] = table
    return tables


def _table(predictions: pd.DataFrame) -> pd.DataFrame:
    people = predictions.groupby("participant_id", sort=True)
    further = [column for column in predictions if str(column).startswith("brain_age_")]
    means = people[["age", *VALUES, *further]].mean()
    means = means.rename(columns={"predicted": "brain_age", "corrected": "brain_age_corrected"})
    means.insert(3, "brain_age_gap", means["brain_age_corrected"] - means["age"])
    means = means.astype("float64").round(4)
    means.insert(7, "n_images", people.size())
    return means.reset_index()


def remark_ages(table: pd.DataFrame) -> list[str]:
    """Sentences on a table of `phenotype_tables`: no correction, ages that nobody can have."""
    notes = [WITHHELD] if table["brain_age_corrected"].isna().all() else []
    for name in table.columns[table.columns.str.startswith("brain_age")].drop("brain_age_gap"):
        odd = table[(table[name] < 0) | (table[name] > OLDEST)]
        if len(odd):
            who = [f"{p} ({a:.1f})" for p, a in zip(odd["participant_id"], odd[name], strict=True)]
            notes.append(f"{name} is no possible age (0 to {OLDEST:g} years) of {some(who)}.")
    return notes


def evaluated_sidecar(evaluation: Evaluation, notes: Sequence[str] = ()) -> dict[str, Any]:
    """Describe every column of `evaluated_tables` of the best augmentation; `notes` are for the reader."""
    best = best_augmentation(evaluation)
    model = evaluation.chosen.get(best, {}).get("model", evaluation.settings.get("model", ""))
    evaluated = [name for name in AUGMENTATIONS if (evaluation.predictions["augmentation"] == name).any()]
    made = {"log_volumes": evaluation.settings.get("log_volumes"), "coverage": evaluation.settings.get("coverage", 0.9)}
    return json.loads(render("brainage.json", **made, notes=notes, model=model, augmentation=best, evaluated=evaluated))


def applied_sidecar(model: BrainAgeModel, notes: Sequence[str] = ()) -> dict[str, Any]:
    """Describe every column of `phenotype_tables` of a model fitted to other people (``--apply-model``)."""
    made = {"log_volumes": model.source.get("log_volumes"), "coverage": 0.9, "model": model.chosen.get("model", "")}
    return json.loads(render("brainage.json", **made, notes=notes, augmentation=model.augmentation, evaluated=()))


def covariance_sidecar(cohort: Cohort) -> dict[str, Any]:
    """Describe every column of `variability.numerical_covariance`."""
    return json.loads(render("brainage_covariance.json", in_mm3=cohort.unit == "mm3"))
