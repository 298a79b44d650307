"""The brain ages of a study as a BIDS phenotype table and its description."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from bids_varaug.brainage.correction import WITHHELD
from bids_varaug.brainage.model import BrainAgeModel
from bids_varaug.brainage.study import AUGMENTATIONS, CONTROLS, Study
from bids_varaug.inputs.participants import OLDEST
from bids_varaug.inputs.tables import some

PHENOTYPE_TABLE = "phenotype/brainage.tsv"
AVERAGED = ("age", "predicted", "corrected", "lower", "upper", "sd_num")


def best_augmentation(study: Study) -> str:
    """Augmentation whose predictions stand for the study.

    ``none``, unless another one helps (`study.judge_gains`); then that of the largest gain. The
    controls (jitter, shuffled) are no candidates. Without ``none``, the first one evaluated.
    """
    evaluated = [a for a in AUGMENTATIONS if (study.predictions["augmentation"] == a).any()]
    if "none" not in evaluated:
        return evaluated[0]
    candidates = study.gains[~study.gains["augmentation"].isin(CONTROLS)]
    helpful = candidates[candidates["effect"] == "helps"]
    return "none" if helpful.empty else str(helpful.loc[helpful["gain"].idxmax(), "augmentation"])


def phenotype_tables(study: Study, augmentation: str | None = None) -> dict[str, pd.DataFrame]:
    """Brain age of every participant, and of every session where there are such.

    Predictions are out of sample: no one's own images took part in training. Several images of a
    session are averaged, and in the table of participants, all of a participant's. BIDS
    wants each participant once in a phenotype table, so that sessions have tables of their own.

    Parameters
    ----------
    study : Study
    augmentation : of the columns brain_age ... sd_num; default `best_augmentation`

    Returns
    -------
    path relative to the output directory -> table
        ``phenotype/brainage.tsv``: participant_id, age, brain_age, brain_age_corrected,
        brain_age_gap, lower, upper, sd_num, n_images, and brain_age_AUGMENTATION of every
        augmentation evaluated; all but n_images in years. With sessions also
        ``phenotype/brainage_ses-LABEL.tsv`` for each, with a column session_id

    Raises
    ------
    ValueError
        If the study has no such augmentation.
    """
    chosen = augmentation or best_augmentation(study)
    predictions = study.predictions
    if not (predictions["augmentation"] == chosen).any():
        raise ValueError(f"augmentation {chosen!r} was not evaluated")
    tables = {PHENOTYPE_TABLE: _table(predictions, chosen)}
    for session, rows in predictions.dropna(subset=["session_id"]).groupby("session_id"):
        table = _table(rows, chosen)
        table.insert(1, "session_id", session)
        tables[PHENOTYPE_TABLE.replace(".tsv", f"_{session}.tsv")] = table
    return tables


def _table(predictions: pd.DataFrame, chosen: str) -> pd.DataFrame:
    def averaged(name: str) -> pd.DataFrame:
        rows = predictions[predictions["augmentation"] == name]
        return rows.groupby("participant_id", sort=True)[list(AVERAGED)].mean()

    main = averaged(chosen)
    columns = _columns(main)
    for name in AUGMENTATIONS:
        if (predictions["augmentation"] == name).any():
            columns[f"brain_age_{name}"] = averaged(name)["predicted"]
    table = pd.DataFrame(columns).astype(np.float64).round(4)
    images = predictions[predictions["augmentation"] == chosen]
    table.insert(7, "n_images", images.groupby("participant_id").size())
    return table.reset_index()


def _columns(means: pd.DataFrame) -> dict[str, pd.Series]:
    """Columns that every table has, from means over a participant's images."""
    return {
        "age": means["age"],
        "brain_age": means["predicted"],
        "brain_age_corrected": means["corrected"],
        "brain_age_gap": means["corrected"] - means["age"],
        "lower": means["lower"],
        "upper": means["upper"],
        "sd_num": means["sd_num"],
    }


def remark_ages(table: pd.DataFrame) -> list[str]:
    """Sentences on a table of `phenotype_tables`: no correction, ages that nobody can have."""
    notes = [WITHHELD] if table["brain_age_corrected"].isna().all() else []
    for name in table.columns[table.columns.str.startswith("brain_age")].drop("brain_age_gap"):
        odd = table[(table[name] < 0) | (table[name] > OLDEST)]
        if len(odd):
            who = [f"{p} ({a:.1f})" for p, a in zip(odd["participant_id"], odd[name], strict=True)]
            notes.append(f"{name} is no possible age (0 to {OLDEST:g} years) of {some(who)}.")
    return notes


def phenotype_sidecar(
    study: Study, augmentation: str | None = None, notes: Sequence[str] = ()
) -> dict[str, Any]:
    """Describe every column of `phenotype_tables`, and how it came about, as BIDS wants it.

    The same for all tables; each needs its own file, named like the table.

    Parameters
    ----------
    study, augmentation : as `phenotype_tables`
    notes : what the reader of the table should know
    """
    chosen = augmentation or best_augmentation(study)
    nominal = f"{100 * study.settings.get('coverage', 0.9):.0f} % nominal"
    model = study.chosen.get(chosen, {}).get("model", study.settings.get("model", ""))
    features = _features_words(study.settings)
    texts = {
        "age": "Age at the image",
        "brain_age": f"Predicted age, augmentation '{chosen}', out of sample, not corrected for "
        "age bias (mean over repeats of the cross-validation)",
        "brain_age_corrected": "Predicted age after correction for age bias; the correction was "
        "fitted to training participants and does not use this participant's age",
        "brain_age_gap": "brain_age_corrected - age",
        "lower": f"Lower limit of the prediction interval of brain_age ({nominal})",
        "upper": f"Upper limit of the prediction interval of brain_age ({nominal})",
        "sd_num": "Numerical part of the uncertainty: standard deviation of the prediction over "
        "the members' versions of the image",
    }
    content: dict[str, Any] = {
        "MeasurementToolMetadata": {
            "Description": f"Age predicted from {features} by bids_varaug; "
            f"model of all participants: {model}, cross-validated by participant. For research "
            + " ".join(["only.", *notes])
        }
    }
    columns = phenotype_tables(study, chosen)[PHENOTYPE_TABLE].columns
    for column in columns.drop("participant_id"):
        if column == "n_images":
            content[column] = {"Description": "Images that were averaged"}
            continue
        text = texts.get(column) or (
            f"Predicted age, augmentation '{column.removeprefix('brain_age_')}', as brain_age"
        )
        content[column] = {"Description": text, "Units": "year"}
    return content


def _features_words(made: Mapping[str, Any]) -> str:
    logs = ", volumes as natural logarithms," if made.get("log_volumes") else ""
    return f"features of T1-weighted images{logs}"


def applied_tables(predicted: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Brain ages that a model fitted before predicts (``--apply-model``).

    Parameters
    ----------
    predicted : of `model_file.apply_model`

    Returns
    -------
    path relative to the output directory -> table
        As `phenotype_tables`, without the columns of single augmentations
    """
    tables = {PHENOTYPE_TABLE: _applied_table(predicted)}
    for session, rows in predicted.dropna(subset=["session_id"]).groupby("session_id"):
        table = _applied_table(rows)
        table.insert(1, "session_id", session)
        tables[PHENOTYPE_TABLE.replace(".tsv", f"_{session}.tsv")] = table
    return tables


def _applied_table(predicted: pd.DataFrame) -> pd.DataFrame:
    people = predicted.groupby("participant_id", sort=True)
    means = people[list(AVERAGED)].mean()
    table = pd.DataFrame(_columns(means)).astype(np.float64).round(4)
    return table.assign(n_images=people.size()).reset_index()


def applied_sidecar(
    model: BrainAgeModel, coverage: float = 0.9, notes: Sequence[str] = ()
) -> dict[str, Any]:
    """Describe the columns of `applied_tables`."""
    limit = f"limit of the prediction interval of brain_age ({100 * coverage:.0f} % nominal)"
    texts = {
        "age": "Age at the image, where it is known",
        "brain_age": "Predicted age, not corrected for age bias",
        "brain_age_corrected": "Predicted age after the model's correction for age bias",
        "brain_age_gap": "brain_age_corrected - age",
        "lower": f"Lower {limit}",
        "upper": f"Upper {limit}",
        "sd_num": "Standard deviation of the prediction over the members' versions of the image",
    }
    content: dict[str, Any] = {
        "MeasurementToolMetadata": {
            "Description": f"Age predicted from {_features_words(model.source)} by a model of "
            f"bids_varaug fitted to other people ({model.chosen.get('model', '')}, augmentation "
            f"{model.augmentation}). For research " + " ".join(["only.", *notes])
        },
        "n_images": {"Description": "Images that were averaged"},
    }
    return content | {name: {"Description": t, "Units": "year"} for name, t in texts.items()}


def with_bids_labels(table: pd.DataFrame) -> pd.DataFrame:
    """Spell ids as BIDS wants them, letters and digits; what they were goes to `source_id`.

    Ids of tables made elsewhere may have other characters. Where two would become one, all stay as
    they are.

    Examples
    --------
    >>> with_bids_labels(pd.DataFrame({"participant_id": ["sub-A_1", "sub-02"]}))
      participant_id source_id
    0         sub-A1   sub-A_1
    1         sub-02    sub-02
    """
    ids = table["participant_id"]
    plain = "sub-" + ids.str.removeprefix("sub-").str.replace(r"[^0-9A-Za-z+]", "", regex=True)
    if (plain == ids).all() or plain.nunique() < ids.nunique():
        return table
    return table.assign(participant_id=plain, source_id=ids)
