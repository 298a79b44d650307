"""The page of a model applied to other people: predicted ages, and what stands behind them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bids_varaug.brainage.outputs import PHENOTYPE_TABLE, applied_tables
from bids_varaug.brainage.scoring import bootstrap_interval
from bids_varaug.derivatives.write import write_text
from bids_varaug.reports.citation import GROUP_REFERENCES, REFERENCES, Citation
from bids_varaug.reports.group import Column, PageContent, data_uris, plain, tabulate
from bids_varaug.reports.group_figures import draw_ages, draw_ranked, signed
from bids_varaug.reports.group_words import percent
from bids_varaug.reports.page import render_page

N_BOOTSTRAP = 2000
PEOPLE = {
    "participant_id": Column("Participant", "As in phenotype/brainage.tsv", text=True),
    "age": Column("Age [y]", "Where it is known", "{:.1f}"),
    "brain_age": Column("Brain age [y]", "Predicted, not corrected for age bias", "{:.1f}"),
    "lower": Column("90 % from", "Lower limit of the prediction interval", "{:.1f}"),
    "upper": Column("to", "Upper limit of the prediction interval", "{:.1f}"),
    "brain_age_corrected": Column("Corrected [y]", "After correction of age bias", "{:.1f}"),
    "brain_age_gap": Column("Gap [y]", "Corrected brain age - age", "signed"),
    "sd_num": Column("SD num. [y]", "Standard deviation of the prediction over members"),
    "n_images": Column("Images", "That were averaged", "{:.0f}"),
}


@dataclass(frozen=True, eq=False)
class AppliedContent(PageContent):
    """What is shown of a model applied to people.

    Attributes
    ----------
    predicted : of `model_file.apply_model`
    model : what was applied, shown as a list of name and value
    """

    predicted: pd.DataFrame
    model: Mapping[str, Any] = field(default_factory=dict)
    title: str = field(default="Brain age by a model fitted before", kw_only=True)


def write_applied_report(path: Path, content: AppliedContent) -> Path:
    """Write the page; the same content gives the same bytes.

    Raises
    ------
    OutputError
        If it cannot be written.
    """
    return write_text(render_applied_report(content), path)


def render_applied_report(content: AppliedContent) -> str:
    """Return the page as one HTML text; every value is escaped."""
    predicted = content.predicted
    people = applied_tables(predicted)[PHENOTYPE_TABLE]
    known = predicted[np.isfinite(predicted["age"].astype(float))]
    figure = draw_ages(known) if len(known) else draw_ranked(predicted)
    return render_page(
        "group_applied.html",
        **content.values(),
        sentences=_sentences(people, content.model.get("inner_mae")),
        tiles=_tiles(people),
        has_ages=bool(len(known)),
        figures=data_uris({"ages": figure}),
        people=tabulate(people, PEOPLE),
        has_sessions=bool(predicted["session_id"].notna().any()),
        model=[(key, plain(v)) for key, v in content.model.items()],
    )


def cite_applied(model: Mapping[str, Any], features: str, versions: Mapping[str, str]) -> Citation:
    """Paragraph of methods for a model applied to other people, and what it cites.

    Parameters
    ----------
    model : "model", "augmentation", "n_participants", "age_min" and "age_max" of its training
    features : e.g. "volumes of 31 features [mm3]"
    versions : package name to version; of bids_varaug and scikit-learn
    """
    methods = (
        f"Age was predicted [@franke2010] from {features} with bids_varaug "
        f"{versions.get('bids_varaug', '')} and scikit-learn {versions.get('scikit-learn', '')} "
        f"[@pedregosa2011] by a model fitted before to {model['n_participants']} other "
        f"participants of {model['age_min']:.0f} to {model['age_max']:.0f} years "
        f"({model['model']}, augmentation '{model['augmentation']}' [@gonzalezpepe2025]). "
        "Prediction intervals (nominal coverage 90 %) are cross-conformal, CV+ [@barber2021]; the "
        "correction of age bias [@delange2020] is that of training."
    )
    works = REFERENCES | GROUP_REFERENCES
    mentioned = sorted((methods.index(f"@{key}"), key) for key in works if f"@{key}" in methods)
    return Citation(methods, tuple(works[key] for _, key in mentioned))


def _sentences(people: pd.DataFrame, inner_mae: float | None) -> list[str]:
    known = people[people["age"].notna()]
    words = []
    if known.empty:
        words.append(
            f"The ages of these {len(people):,} participants are not known, so that nothing can be "
            "said on how well the model predicts them."
        )
    else:
        low, high = _error_limits(known)
        limits = f" (95 % {low:.2f} to {high:.2f})" if len(known) > 1 else ""
        bias = (known["brain_age"] - known["age"]).mean()
        words.append(
            f"In the {len(known):,} participants of known age the model is off by "
            f"{_errors(known).mean():.2f} years on average{limits}; predicted minus true "
            f"age is {signed(bias)} years on average. A large shift, all in one direction, tells "
            "of another scanner or software rather than of brains."
        )
        if inner_mae is not None and _errors(known).mean() < inner_mae / 2:
            words.append(
                f"That is less than half of the {inner_mae:.2f} years by which the model missed "
                "people held out in training. These are probably people that it was fitted to; "
                "their errors say nothing on others."
            )
    if people["lower"].notna().any():
        width = (people["upper"] - people["lower"]).mean()
        words.append(
            f"For one person: the 90 % prediction interval is {width:.1f} years wide on average. "
            "It holds for people like those of training."
        )
    if people["sd_num"].notna().any():
        words.append(
            f"The numerical part: the prediction's standard deviation over the members is "
            f"{people['sd_num'].median():.2f} years in the median participant, "
            f"{people['sd_num'].max():.2f} in the worst."
        )
    return words


def _tiles(people: pd.DataFrame) -> list[dict[str, str]]:
    known = people[people["age"].notna()]
    images = f"{int(people['n_images'].sum()):,} images"
    tiles = [{"value": f"{len(people):,}", "label": "participants", "note": images}]
    if known.empty:
        return tiles
    note = f"in {len(known):,} of known age, uncorrected"
    tiles.append(
        {"value": f"{_errors(known).mean():.2f} y", "label": "mean absolute error", "note": note}
    )
    limits = known.dropna(subset=["lower", "upper"])
    if len(limits):
        inside = (limits["lower"] <= limits["age"]) & (limits["age"] <= limits["upper"])
        tiles.append(
            {"value": percent(inside.mean()), "label": "of ages inside the interval",
             "note": "90 % nominal"}
        )  # fmt: skip
    return tiles


def _errors(known: pd.DataFrame) -> pd.Series:
    return (known["brain_age"] - known["age"]).abs()


def _error_limits(known: pd.DataFrame) -> tuple[float, float]:
    errors = _errors(known).to_numpy()[:, None]
    low, high = bootstrap_interval(errors, np.random.default_rng(0), N_BOOTSTRAP)
    return float(low[0]), float(high[0])
