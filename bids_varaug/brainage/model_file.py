"""The brain-age model as a file without pickle, with a model card, and applied to other people."""

from __future__ import annotations

import importlib.metadata
import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import skops.io
from skops.io.exceptions import UntrustedTypesFoundException

from bids_varaug import __version__
from bids_varaug.brainage.calibration import WITHHELD
from bids_varaug.brainage.cohort import Cohort
from bids_varaug.brainage.evaluate import Evaluation
from bids_varaug.brainage.models import BrainAgeModel
from bids_varaug.brainage.target import TargetModel
from bids_varaug.derivatives.citation import render
from bids_varaug.errors import NoInputError, UserError
from bids_varaug.files import replacing, write_text
from bids_varaug.inputs.tables import some

FORMAT = 2
PACKAGES = ("scikit-learn", "numpy", "scipy", "skops")
# Everything of ours that a model may contain. skops itself trusts what numpy, scipy and scikit-learn define; nothing
# else is loaded, whatever a file asks for.
TRUSTED = (
    "bids_varaug.brainage.calibration.BiasCorrection",
    "bids_varaug.brainage.features.LogVolumes",
    "bids_varaug.brainage.models.BrainAgeModel",
    "bids_varaug.brainage.models.from_scale",
    "bids_varaug.brainage.models.to_scale",
    "bids_varaug.brainage.target.TargetModel",
    "sklearn.utils._bunch.Bunch",  # of VotingRegressor
)
SAME = {
    "kind": "kind of features",
    "ensemble": "ensemble",
    "ensemble_version": "version of the ensemble",
    "sloppy": "--sloppy",
    "relative_to": "what volumes are divided by",
    "asymmetries": "asymmetries",
    "log_volumes": "logarithms of volumes",
}
DAMAGED = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, zipfile.BadZipFile)


class ModelError(UserError):
    """The model cannot be read, or does not fit these features."""


def save_model(path: Path, model: BrainAgeModel | TargetModel, card: str) -> Path:
    """Write a model (``models/brainage.skops``), and its card beside it (``.md``); each is whole or absent."""
    versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    content = {"format": FORMAT, "bids_varaug": __version__, "versions": versions, "model": model}
    with replacing(Path(path)) as stream:
        stream.write(_reproducible(skops.io.dumps(content)))
    write_text(card, Path(path).with_suffix(".md"))
    return Path(path)


def _reproducible(archive: bytes) -> bytes:
    """The archive with objects numbered in their order, not by their place in memory, and without times."""
    numbers: dict[int, int] = {}
    files: dict[str, str] = {}

    def renumber(node: dict[str, Any]) -> dict[str, Any]:
        if "__id__" in node:
            node["__id__"] = numbers.setdefault(node["__id__"], len(numbers))
        if isinstance(node.get("file"), str):
            node["file"] = files.setdefault(node["file"], f"{len(files)}{Path(node['file']).suffix}")
        return node

    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(out, "w") as new:
        schema = json.loads(old.read("schema.json"), object_hook=renumber)
        for name, renamed in files.items():
            new.writestr(zipfile.ZipInfo(renamed), old.read(name))
        new.writestr(zipfile.ZipInfo("schema.json"), json.dumps(schema))
    return out.getvalue()


def load_model(path: Path) -> BrainAgeModel | TargetModel:
    """Read a model; nothing but the types of `TRUSTED` and of scikit-learn is made.

    A ModelError says that it is damaged, of another format, made with another scikit-learn (major or minor version,
    which may predict otherwise), or holds other types, which are named; a NoInputError that there is none.
    """
    path = Path(path)
    if not path.is_file():
        raise NoInputError(f"{path}: no such file. Give a model that the group level wrote.")
    try:
        content = skops.io.load(path, trusted=list(TRUSTED))
    except UntrustedTypesFoundException as error:
        unknown = [t for t in skops.io.get_untrusted_types(file=path) if t not in TRUSTED]
        raise ModelError(
            f"{path}: holds {', '.join(sorted(unknown))}, which no brain-age model of this version has. It is not "
            "loaded, as it might run foreign code. Get the model from its source again, or refit it."
        ) from error
    except DAMAGED as error:
        raise ModelError(
            f"{path}: cannot be read as a model ({error!r}). It is damaged, or of another version of bids_varaug. Get "
            "it from its source again, or refit it."
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("model"), BrainAgeModel | TargetModel):
        raise ModelError(f"{path}: a skops file, but no brain-age model of bids_varaug.")
    if content.get("format") != FORMAT:
        raise ModelError(
            f"{path}: of format {content.get('format')}, but this is bids_varaug {__version__} with format "
            f"{FORMAT}. Use the version that wrote it: {content.get('bids_varaug')}."
        )
    made, here = content["versions"]["scikit-learn"], importlib.metadata.version("scikit-learn")
    if made.split(".")[:2] != here.split(".")[:2]:
        raise ModelError(
            f"{path}: made with scikit-learn {made}, but {here} is installed, which may predict other ages. Install "
            f"scikit-learn {made}, or refit the model."
        )
    return content["model"]


def apply_model(model: BrainAgeModel, cohort: Cohort, coverage: float = 0.9) -> pd.DataFrame:
    """Predict ages of other people, whose ages need not be known.

    Returns what `BrainAgeModel.predict` does; what the reader should know is in ``attrs["notes"]``, a list of
    sentences. Features that the model does not know are ignored. A UserError names those that are missing or not
    finite, or says that they come from another ensemble, version, grid or set of weights than those of training.
    """
    chosen, notes = features_for(model, cohort)
    table = model.predict(chosen, coverage)
    table.attrs["notes"] = notes
    return table


def features_for(model: BrainAgeModel | TargetModel, cohort: Cohort) -> tuple[Cohort, list[str]]:
    """The cohort with the features of a model, and what the reader should know; for errors see `apply_model`."""
    chosen = cohort.with_features(model.names)
    notes = _check_same_source(model, cohort)
    bad = chosen.missing()
    if bad.any():
        names = list(np.array(model.names, dtype=object)[bad.any(axis=0)])
        who = cohort.people["observation"][bad.any(axis=1)].tolist()
        raise ModelError(
            f"{some(names)}: missing or infinite in {some(who)}. Leave these images out, or correct the features."
        )
    return chosen, notes


def _check_same_source(model: BrainAgeModel | TargetModel, cohort: Cohort) -> list[str]:
    """Notes on what is ignored or cannot be checked; for errors see `apply_model`."""
    trained, here = model.source, cohort.source
    differences = [
        f"{text} ({_text(trained[key])} in training, {_text(here[key])} here)"
        for key, text in SAME.items()
        if trained.get(key) is not None and here.get(key) is not None and trained[key] != here[key]
    ]
    if model.unit and cohort.unit and model.unit != cohort.unit:
        differences.append(f"unit ({model.unit} in training, {cohort.unit} here)")
    theirs, ours = trained.get("sha256") or {}, here.get("sha256") or {}
    changed = sorted(m for m in theirs.keys() & ours.keys() if theirs[m] != ours[m])
    if changed and not differences:
        differences.append(f"weights of {some(changed)}")
    if differences:
        raise ModelError(
            f"the model was fitted to features made otherwise: {'; '.join(differences)}. Its ages would be wrong. Run "
            "the participant level with the ensemble of the model, or fit a model to these features."
        )
    notes = []
    extra = [name for name in cohort.names if name not in model.names]
    if extra:
        notes.append(f"{len(extra)} features that the model does not know are ignored: {some(extra)}.")
    made, now = trained.get("bids_varaug"), here.get("bids_varaug")
    if made and now and made != now:
        notes.append(f"The model was fitted to features of bids_varaug {made}; these are of {now}.")
    if theirs and ours and theirs.keys() != ours.keys():
        notes.append(
            f"Trained with {len(theirs)} members, applied to {len(ours)}: the numerical spread of predictions is that "
            "of the latter."
        )
    if trained.get("kind") == "table":
        notes.append(
            "The features come from tables: that they were made by the same software as in training cannot be checked."
        )
    low, high = model.training.get("age_min", -np.inf), model.training.get("age_max", np.inf)
    outside = int(((cohort.age < low) | (cohort.age > high)).sum())
    if outside:
        notes.append(
            f"{outside} {'image is of a person' if outside == 1 else 'images are of people'} outside the ages of "
            f"training, {low:g} to {high:g} years; predictions there are extrapolated."
        )
    return notes


def model_card(
    model: BrainAgeModel, cohort: Cohort, evaluation: Evaluation | None = None, title: str = "Brain age"
) -> str:
    """Markdown that tells what a model is, what cohort it was fitted to, how good it is, and its limits."""
    people = cohort.people[np.isfinite(cohort.age)]
    participants = people.drop_duplicates("participant_id")
    sexes = participants["sex"].fillna("not given").value_counts()
    return render(
        "model_card.md",
        title=title, version=__version__, model=model, chosen=_items(model.chosen), source=_items(model.source),
        ages=participants["age"], n_images=len(people), left_out=len(cohort.left_out),
        sexes=", ".join(f"{sex} {n}" for sex, n in sexes.items()),
        sites=sorted(participants["site"].dropna().unique()),
        settings=_items({} if evaluation is None else evaluation.settings),
        scores=[] if evaluation is None else evaluation.scores.to_dict("records"),
        withheld="" if np.isfinite(model.correction.slope) else WITHHELD,
    )  # fmt: skip


def _items(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and value, digests and empty values left out."""
    return [(k, _text(v)) for k, v in values.items() if k != "sha256" and v not in (None, "", {}, [], ())]


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_text(part)}" for key, part in value.items())
    if isinstance(value, (list, tuple)):
        return " ".join(_text(part) for part in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
