"""The brain-age model as a file without pickle, with a model card, and applied to other people."""

from __future__ import annotations

import importlib.metadata
import io
import re
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import skops.io
from skops.io.exceptions import UntrustedTypesFoundException

from bids_varaug.atomic import replacing, write_text
from bids_varaug.brainage.cohort import Cohort
from bids_varaug.brainage.correction import WITHHELD
from bids_varaug.brainage.model import BrainAgeModel
from bids_varaug.brainage.study import Study
from bids_varaug.derivatives.sidecars import package_version
from bids_varaug.errors import NoInputError, UserError

FORMAT = 1
PACKAGES = ("scikit-learn", "numpy", "scipy", "skops")
# Everything of ours that a model may contain. skops itself trusts what numpy, scipy and
# scikit-learn define; nothing else is loaded, whatever a file asks for.
TRUSTED = (
    "bids_varaug.brainage.correction.BiasCorrection",
    "bids_varaug.brainage.estimators.GaussianProcess",
    "bids_varaug.brainage.estimators.MomentRidge",
    "bids_varaug.brainage.estimators.from_scale",
    "bids_varaug.brainage.estimators.to_scale",
    "bids_varaug.brainage.features.LogVolumes",
    "bids_varaug.brainage.model.BrainAgeModel",
    # These are scikit-learn's, but skops does not trust them by itself.
    "sklearn.utils._bunch.Bunch",
    *(f"sklearn.gaussian_process.kernels.{kernel}"
      for kernel in ("ConstantKernel", "DotProduct", "Product", "RBF", "Sum")),
)  # fmt: skip
SAME = {
    "kind": "kind of features",
    "ensemble": "ensemble",
    "ensemble_version": "version of the ensemble",
    "sloppy": "--sloppy",
    "relative_to": "what volumes are divided by",
    "asymmetries": "asymmetries",
    "log_volumes": "logarithms of volumes",
}
SHOWN = 10
COLUMNS = (
    "participant_id", "session_id", "observation", "age", "predicted", "corrected", "lower",
    "upper", "sd_num",
)  # fmt: skip


class ModelError(UserError):
    """The model cannot be read, or does not fit these features."""


def save_model(path: Path, model: BrainAgeModel, card: str) -> Path:
    """Write a model, and its card beside it (``.md``); each is whole or absent.

    Parameters
    ----------
    path : ``models/brainage.skops``
    model : fitted
    card : markdown, see `model_card`

    Returns
    -------
    Path
        `path`.

    Raises
    ------
    OutputError
        If a file cannot be written.
    """
    path = Path(path)
    versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    content = {
        "format": FORMAT,
        "bids_varaug": package_version(),
        "versions": versions,
        "model": model,
    }
    with replacing(path) as stream:
        stream.write(_reproducible(skops.io.dumps(content)))
    write_text(card, path.with_suffix(".md"))
    return path


def _reproducible(archive: bytes) -> bytes:
    """Write a skops archive anew, without what differs from run to run.

    Objects are named by their place in memory there, and files by the time of day: by the order in
    which they come instead.
    """
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(out, "w") as new:
        schema = old.read("schema.json").decode()
        ids = dict.fromkeys(re.findall(r'"__id__": (\d+)', schema))
        number = {name: str(place) for place, name in enumerate(ids, 1)}
        schema = re.sub(
            r'(?<="__id__": )\d+|(?<=": ")\d+(?=\.npy")', lambda m: number[m[0]], schema
        )
        contents = {f"{number[name[:-4]]}.npy": old.read(name)
                    for name in old.namelist() if name != "schema.json"}  # fmt: skip
        for name, content in [*sorted(contents.items()), ("schema.json", schema.encode())]:
            new.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), content)
    return out.getvalue()


def load_model(path: Path) -> BrainAgeModel:
    """Read a model; nothing but the types of `TRUSTED` and of scikit-learn is made.

    Raises
    ------
    NoInputError
        If the file is not there.
    ModelError
        If it is damaged, of another format, made with another scikit-learn (major or minor
        version, which may predict otherwise), or holds other types, which are named.
    """
    path = Path(path)
    if not path.is_file():
        raise NoInputError(f"{path}: no such file. Give a model that the group level wrote.")
    try:
        content = skops.io.load(path, trusted=list(TRUSTED))
    except UntrustedTypesFoundException as error:
        unknown = [t for t in skops.io.get_untrusted_types(file=path) if t not in TRUSTED]
        raise ModelError(
            f"{path}: holds {', '.join(sorted(unknown))}, which no brain-age model of this version "
            "has. It is not loaded, as it might run foreign code. Get the model from its source "
            "again, or fit it anew."
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError,
            zipfile.BadZipFile) as error:  # fmt: skip
        raise ModelError(
            f"{path}: cannot be read as a model ({error!r}). It is damaged, or of another version "
            "of bids_varaug. Get it from its source again, or fit it anew."
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("model"), BrainAgeModel):
        raise ModelError(f"{path}: a skops file, but no brain-age model of bids_varaug.")
    if content.get("format") != FORMAT:
        raise ModelError(
            f"{path}: of format {content.get('format')}, but this is bids_varaug "
            f"{package_version()} with format {FORMAT}. Use the version that wrote it: "
            f"{content.get('bids_varaug')}."
        )
    made, here = content["versions"]["scikit-learn"], importlib.metadata.version("scikit-learn")
    if made.split(".")[:2] != here.split(".")[:2]:
        raise ModelError(
            f"{path}: made with scikit-learn {made}, but {here} is installed, which may predict "
            f"other ages. Install scikit-learn {made}, or fit the model anew."
        )
    return content["model"]


def apply_model(model: BrainAgeModel, cohort: Cohort, coverage: float = 0.9) -> pd.DataFrame:
    """Predict ages of other people, whose ages need not be known.

    Parameters
    ----------
    model : BrainAgeModel
    cohort : with all features of the model; others are ignored
    coverage : of the prediction interval

    Returns
    -------
    one row per observation
        participant_id, session_id, observation, age (NaN where unknown), predicted, corrected,
        lower, upper, sd_num (standard deviation over members, NaN without), all in years. What
        the reader should know is in ``attrs["notes"]``, a list of sentences

    Raises
    ------
    ModelError
        If features are missing or not finite, or come from another ensemble, version, grid or
        set of weights than those of training; each is named.
    """
    notes = check_applicable(model, cohort)
    order = [cohort.names.index(name) for name in model.names]
    members = None if cohort.members is None else cohort.members[:, :, order]
    cohort = replace(
        cohort, names=tuple(model.names), baseline=cohort.baseline[:, order], members=members
    )
    _check_finite(cohort)
    predicted = model.predict(cohort)
    limits = model.predict_interval(cohort, coverage)
    spread = np.full(len(cohort), np.nan)
    if cohort.members is not None:
        spread = model.predict_members(cohort).std(axis=1, ddof=1)
    table = cohort.people[["participant_id", "session_id", "observation", "age"]].assign(
        predicted=predicted,
        corrected=model.correct(predicted),
        lower=limits[:, 0],
        upper=limits[:, 1],
        sd_num=spread,
    )
    table.attrs["notes"] = notes
    return table[list(COLUMNS)]


def check_applicable(model: BrainAgeModel, cohort: Cohort) -> list[str]:
    """Notes on what is ignored or cannot be checked.

    Raises
    ------
    ModelError
        See `apply_model`.
    """
    missing = [name for name in model.names if name not in cohort.names]
    if missing:
        raise ModelError(
            f"the model needs {len(missing)} of its {len(model.names)} features that are not "
            f"there: {_some(missing)}. Use features of the same kind as in training, or fit a "
            "model to these."
        )
    differences = [
        f"{text} ({_said(model.source[key])} in training, {_said(cohort.source[key])} here)"
        for key, text in SAME.items()
        if model.source.get(key) is not None
        and cohort.source.get(key) is not None
        and model.source[key] != cohort.source[key]
    ]
    if model.unit and cohort.unit and model.unit != cohort.unit:
        differences.append(f"unit ({model.unit} in training, {cohort.unit} here)")
    trained, here = (_digests(source) for source in (model.source, cohort.source))
    changed = sorted(m for m in trained.keys() & here.keys() if trained[m] != here[m])
    if changed and not differences:
        differences.append(f"weights of {_some(changed)}")
    if differences:
        raise ModelError(
            f"the model was fitted to features made otherwise: {'; '.join(differences)}. Its ages "
            "would be wrong. Run the participant level with the ensemble of the model, or fit "
            "a model to these features."
        )
    notes = []
    extra = [name for name in cohort.names if name not in model.names]
    if extra:
        notes.append(f"{len(extra)} features that the model does not know are ignored: "
                     f"{_some(extra)}.")  # fmt: skip
    made, now = model.source.get("bids_varaug"), cohort.source.get("bids_varaug")
    if made and now and made != now:
        notes.append(f"The model was fitted to features of bids_varaug {made}; these are of {now}.")
    if trained and here and trained.keys() != here.keys():
        notes.append(
            f"Trained with {len(trained)} members, applied to {len(here)}: the numerical spread "
            "of predictions is that of the latter."
        )
    if model.source.get("kind") == "table":
        notes.append(
            "The features come from tables: that they were made by the same software as in "
            "training cannot be checked."
        )
    ages = cohort.age[np.isfinite(cohort.age)]
    low, high = (model.training.get(key) for key in ("age_min", "age_max"))
    if low is not None and len(ages) and (ages.min() < low or ages.max() > high):
        n = int(((ages < low) | (ages > high)).sum())
        notes.append(f"{n} images are of people outside the ages of training, {low:g} to "
                     f"{high:g} years; their predictions are extrapolated.")  # fmt: skip
    return notes


def _check_finite(cohort: Cohort) -> None:
    bad = ~np.isfinite(cohort.baseline)
    if cohort.members is not None:
        bad |= ~np.isfinite(cohort.members).all(axis=1)
    if bad.any():
        names = [name for name, wrong in zip(cohort.names, bad.any(axis=0), strict=True) if wrong]
        who = cohort.people["observation"][bad.any(axis=1)].tolist()
        raise ModelError(
            f"{_some(names)}: missing or infinite in {_some(who)}. Leave these images out, or mend "
            "the features."
        )


def model_card(
    model: BrainAgeModel, cohort: Cohort, study: Study | None = None, title: str = "Brain age"
) -> str:
    """Markdown that tells what a model is, what it was fitted to, how good it is, and its limits.

    Parameters
    ----------
    model, cohort : the fitted model, and what it was fitted to
    study : its scores, where it was evaluated
    title : of the card
    """
    known = np.isfinite(cohort.age)
    people = cohort.people[known]
    per_person = people.drop_duplicates("participant_id")
    ages = per_person["age"]
    sexes = per_person["sex"].fillna("not given").value_counts()
    sites = per_person["site"].dropna()
    numbers = ", ".join(f"{key} = {_said(v)}" for key, v in _flat(model.chosen))
    lines = [
        f"# Model card: {title}",
        "",
        "Predicts age in years from the features below, with a prediction interval. "
        f"Written by bids_varaug {package_version()}; load it with "
        "`bids_varaug ... group --apply-model FILE`.",
        "",
        "## Model",
        "",
        f"- {numbers}",
        f"- augmentation: {model.augmentation}",
        f"- features ({len(model.names)}{f', {model.unit}' if model.unit else ''}): "
        + ", ".join(model.names),
        f"- made by: {', '.join(f'{key} {_said(value)}' for key, value in _flat(model.source))}",
        "",
        "## Data it was fitted to",
        "",
        f"- {len(per_person)} participants, {len(people)} images",
        f"- age {ages.min():.1f} to {ages.max():.1f} years, median {ages.median():.1f}, standard "
        f"deviation {ages.std():.1f}",
        f"- sex: {', '.join(f'{sex} {n}' for sex, n in sexes.items())}",
        f"- sites: {sites.nunique() or 'not given'}"
        + (f" ({_some(sorted(sites.unique()))})" if len(sites) else ""),
        f"- left out: {len(cohort.left_out)}",
        "",
        "## Scores",
        "",
        *_score_lines(model, study),
        "",
        "## Intended use",
        "",
        "Research on groups: age prediction, brain-age gaps, effects of numerical variability on "
        "both. People, scanners and software should be like those above.",
        "",
        "## Limits",
        "",
        "- Not a medical device; the brain-age gap of one person is not a diagnosis. Its "
        "uncertainty is the prediction interval, not the numerical spread, which is only a part.",
        f"- Outside {ages.min():.0f} to {ages.max():.0f} years predictions are extrapolated.",
        "- The interval's coverage holds for people exchangeable with those above; at another site "
        "or scanner it may be lower.",
        "- Uncorrected predictions are too high for the young and too low for the old. "
        + (
            "The correction does not know the age; it removes this bias on average and widens the "
            "errors."
            if np.isfinite(model.correction.slope)
            else WITHHELD
        ),
        "- Features of another ensemble, version or software are refused where that can be told; "
        "for tables it cannot.",
        "",
    ]
    return "\n".join(lines)


def _score_lines(model: BrainAgeModel, study: Study | None) -> list[str]:
    if study is None or study.scores.empty:
        return ["Not evaluated."]
    settings = ", ".join(f"{key} {_said(value)}" for key, value in _flat(study.settings))
    lines = [
        f"Cross-validated by participant ({settings}). This model's augmentation is "
        f"`{model.augmentation}`.",
        "",
        "| | n | MAE [y] | 95 % | R2 | r | coverage |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in study.scores.itertuples():
        coverage = "n/a" if np.isnan(row.coverage) else f"{row.coverage:.2f}"
        lines.append(
            f"| {row.augmentation} | {row.n} | {row.mae:.2f} | {row.mae_low:.2f} to "
            f"{row.mae_high:.2f} | {row.r2:.2f} | {row.r:.2f} | {coverage} |"
        )
    return lines


def _digests(source: Mapping[str, object]) -> Mapping[str, str]:
    digests = source.get("sha256")
    return digests if isinstance(digests, Mapping) else {}


def _flat(values: Mapping[str, object]) -> list[tuple[str, object]]:
    """Name and value, digests and empty values left out."""
    return [(k, v) for k, v in values.items() if k != "sha256" and v not in (None, "", {}, [], ())]


def _said(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_said(part)}" for key, part in value.items())
    if isinstance(value, (list, tuple)):
        return " ".join(_said(part) for part in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _some(items: list[str]) -> str:
    more = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return ", ".join(map(str, items[:SHOWN])) + more
