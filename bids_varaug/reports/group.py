"""The group's report: one HTML file that needs nothing else."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bids_varaug.brainage.outputs import CONTROLS, best_augmentation
from bids_varaug.brainage.study import Study
from bids_varaug.derivatives.write import write_text
from bids_varaug.reports.citation import Citation
from bids_varaug.reports.group_figures import (
    draw_ages,
    draw_gains,
    draw_learning_curve,
    draw_ratios,
    p_text,
    signed,
)
from bids_varaug.reports.group_words import ALPHA, headline, percent, verdict
from bids_varaug.reports.page import render_page


@dataclass(frozen=True, eq=False)
class ComparedPipeline:
    """Another pipeline's repeated runs beside ours.

    Attributes
    ----------
    name : as given to --compare
    numerics : its table of `population.numerical_variability`
    comparison : of `population.compare_pipelines`, ours against it
    """

    name: str
    numerics: pd.DataFrame
    comparison: pd.DataFrame


@dataclass(frozen=True, eq=False, kw_only=True)
class PageContent:
    """What every page of the group level shows.

    Attributes
    ----------
    citation : how to cite
    left_out : reason by participant or observation
    warnings : sentences shown at the top
    source : what the features are, shown as a list of name and value
    settings, versions : of the run, and of packages
    title : e.g. the dataset's name
    sloppy : whether made with --sloppy
    """

    citation: Citation
    left_out: Mapping[str, str] = field(default_factory=dict)
    warnings: Sequence[str] = ()
    source: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    title: str = "Brain age"
    sloppy: bool = False

    def values(self) -> dict[str, Any]:
        """The same as the templates take it."""
        return {
            "citation": self.citation,
            "left_out": sorted(self.left_out.items()),
            "warnings": list(self.warnings),
            "source": [(key, plain(v)) for key, v in self.source.items() if key != "sha256"],
            "settings": [(key, plain(value)) for key, value in self.settings.items()],
            "versions": dict(self.versions),
            "title": self.title,
            "sloppy": self.sloppy,
        }


@dataclass(frozen=True, eq=False)
class GroupContent(PageContent):
    """What is shown of a group.

    Attributes
    ----------
    study : scores and predictions
    numerics : table of `population.numerical_variability`; None without members
    compared : other pipelines
    """

    study: Study
    numerics: pd.DataFrame | None = None
    compared: Sequence[ComparedPipeline] = ()


@dataclass(frozen=True)
class Column:
    """Heading, tooltip and format of a column; `text` where it is not a number.

    `form` is a format, or "signed", "p", "percent" (of a share), "volume" (of any size).
    """

    heading: str
    tooltip: str
    form: str = "{:.2f}"
    text: bool = False


SCORES = {
    "augmentation": Column("Model", "Augmentation of the chosen model, or a baseline", text=True),
    "n": Column("n", "Participants", "{:,.0f}"),
    "mae": Column("MAE [y]", "Mean absolute error, uncorrected"),
    "mae_low": Column("95 % from", "Lower limit of the MAE, bootstrap over participants"),
    "mae_high": Column("to", "Upper limit of the MAE"),
    "rmse": Column("RMSE [y]", "Root of the mean squared error"),
    "r2": Column("R²", "Share of the age's variance explained; may be negative"),
    "r": Column("r", "Pearson correlation of predicted and true age"),
    "bias_slope": Column("Bias", "Slope of (predicted - age) on age; 0 without age bias"),
    "mae_corrected": Column("MAE corr. [y]", "Mean absolute error after correction of age bias"),
    "bias_slope_corrected": Column("Bias corr.", "Slope after correction of age bias"),
    "coverage": Column("Coverage", "Share of true ages within the prediction interval"),
    "interval_width": Column("Width [y]", "Mean width of the prediction interval"),
}
GAINS = {
    "augmentation": Column("Augmentation", "Compared with none on the same folds", text=True),
    "gain": Column("Gain [y]", "MAE without - MAE with; positive is better", "signed"),
    "low": Column("95 % from", "Lower limit, bootstrap over participants", "signed"),
    "high": Column("to", "Upper limit", "signed"),
    "p_value": Column("p", "Two-sided sign-flip permutation test, not corrected", "p"),
}
RELIABILITY = {
    "kind": Column("Of", "Predictions, or a feature", text=True),
    "name": Column("Name", "Augmentation or feature", text=True),
    "icc": Column("ICC(3,1)", "Share of variance that is between participants", "{:.3f}"),
    "low": Column("95 % from", "Lower limit", "{:.3f}"),
    "high": Column("to", "Upper limit", "{:.3f}"),
    "n_participants": Column("Participants", "With several images", "{:,.0f}"),
    "n_observations": Column("Images", "Per participant", "{:,.0f}"),
}
NUMERICS = {
    "name": Column("Feature", "Structure", text=True),
    "mean": Column("Mean", "In the feature's unit", "volume"),
    "sd_num": Column("SD num.", "Standard deviation over members, pooled", "volume"),
    "sd_anat": Column("SD anat.", "Standard deviation over participants", "volume"),
    "ratio": Column("Ratio", "SD num. / SD anat.", "{:.3f}"),
    "low": Column("95 % from", "Lower limit, bootstrap over participants", "{:.3f}"),
    "high": Column("to", "Upper limit", "{:.3f}"),
    "npv": Column("NPV", "SD num. / spread of single runs, as Chatelain et al. (2026)", "{:.3f}"),
    "cv": Column("CV [%]", "SD num. / mean", "percent"),
    "dice_min": Column("Dice min", "Smallest Dice over pairs of members, mean over participants",
                       "{:.3f}"),
    "unreliable": Column("Unreliable", "Share of the images whose volume has this verdict",
                         "{:.0%}"),
    "n_needed": Column("n needed", "Participants for a numerical error of Cohen's d below 0.1",
                       "{:,.0f}"),
}  # fmt: skip
COMPARISON = {
    "measure": Column("Measure", "More is worse in each", text=True),
    "n": Column("Structures", "That both have", "{:.0f}"),
    "median_ours": Column("Median, ours", "Over structures", "{:.4g}"),
    "median_other": Column("Median, other", "Over structures", "{:.4g}"),
    "ratio": Column("Ours / other", "Hodges-Lehmann; below 1: ours varies less", "{:.3f}"),
    "low": Column("95 % from", "Lower limit", "{:.3f}"),
    "high": Column("to", "Upper limit", "{:.3f}"),
    "p_value": Column("p", "Wilcoxon signed-rank test on log ratios", "p"),
}


def write_group_report(path: Path, content: GroupContent) -> Path:
    """Write the report; the same content gives the same bytes.

    Parameters
    ----------
    path : ``<output>/group_brainage.html``
    content : GroupContent

    Returns
    -------
    Path
        `path`.

    Raises
    ------
    OutputError
        If it cannot be written.
    """
    return write_text(render_group_report(content), path)


def render_group_report(content: GroupContent) -> str:
    """Return the report as one HTML text; every value is escaped."""
    study = content.study
    best = best_augmentation(study)
    return render_page(
        "group.html",
        **content.values(),
        verdict=verdict(study),
        sentences=headline(study, content.numerics),
        tiles=_tiles(study, best),
        best=best,
        figures=_figures(content, best),
        scores=tabulate(study.scores, SCORES, highlight=best),
        gains=tabulate(study.gains, GAINS),
        sites=tabulate(study.sites, _site_columns(study.sites)),
        reliability=tabulate(study.reliability, RELIABILITY),
        numerics=None if content.numerics is None else tabulate(content.numerics, NUMERICS),
        compared=[
            {"name": other.name, "table": tabulate(other.comparison, COMPARISON),
             "sentences": _comparison_words(other)}
            for other in content.compared
        ],
        chosen=[(name, plain(choice)) for name, choice in study.chosen.items()],
        study_settings=[(key, plain(value)) for key, value in study.settings.items()],
    )  # fmt: skip


def _tiles(study: Study, best: str) -> list[dict[str, str]]:
    """The few numbers that one looks for first."""
    scores = study.scores.set_index("augmentation")
    row = scores.loc[best]
    tiles = [
        {
            "value": f"{row['mae']:.2f} y",
            "label": "mean absolute error",
            "note": f"95 % {row['mae_low']:.2f} to {row['mae_high']:.2f}, '{best}'",
        }
    ]
    if "mean_predictor" in scores.index:
        tiles.append(
            {
                "value": f"{scores['mae']['mean_predictor']:.2f} y",
                "label": "error of the mean age",
                "note": "the same for everybody",
            }
        )
    gains = study.gains[~study.gains["augmentation"].isin(CONTROLS)]
    if not gains.empty:
        gain = gains.loc[gains["gain"].astype(float).idxmax()]
        tiles.append(
            {
                "value": f"{signed(gain['gain'])} y",
                "label": f"largest gain: '{gain['augmentation']}'",
                "note": f"95 % {signed(gain['low'])} to {signed(gain['high'])}, "
                f"p {p_text(gain['p_value'])}",
            }
        )
    tiles.append(
        {
            "value": f"{int(row['n']):,}",
            "label": "participants",
            "note": f"{study.settings.get('n_observations', len(study.predictions)):,} images",
        }
    )
    return tiles


def _figures(content: GroupContent, best: str) -> dict[str, str]:
    """Data URIs of the figures that there is something to show for."""
    study = content.study
    ages = study.predictions[study.predictions["augmentation"] == best]
    drawn = {"ages": draw_ages(ages)}
    if not study.gains.empty:
        drawn["gains"] = draw_gains(study.gains)
    if not study.learning_curve.empty:
        drawn["curve"] = draw_learning_curve(study.learning_curve)
    if content.numerics is not None and content.numerics["ratio"].notna().any():
        others = [
            (other.name, other.numerics)
            for other in content.compared
            if other.numerics["ratio"].notna().any()
        ]
        drawn["ratios"] = draw_ratios(content.numerics, others)
    return data_uris(drawn)


def data_uris(drawn: Mapping[str, str]) -> dict[str, str]:
    """SVG texts as they stand in a page."""
    return {
        name: "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
        for name, svg in drawn.items()
    }


def _comparison_words(other: ComparedPipeline) -> list[str]:
    """One sentence per measure."""
    names = {
        "ratio": "the numerical share of the variability between people (SD num. / SD anat.)",
        "cv": "the numerical variability relative to the volume (CV)",
        "1 - dice_min": "the worst overlap between members (1 - minimum Dice)",
    }
    sentences = []
    for row in other.comparison.itertuples():
        sure = row.p_value < ALPHA
        less = "smaller" if row.ratio < 1 else "larger"
        share = f"{percent(abs(row.ratio - 1))} {less}"
        limits = (
            f", 95 % of ours / other {row.low:.2f} to {row.high:.2f}"
            if np.isfinite(row.low)
            else ""
        )
        sentences.append(
            f"Over {row.n} structures, {names.get(row.measure, row.measure)} is {share} here than "
            f"with {other.name}"
            + (f" (p {p_text(row.p_value)}{limits})." if sure else
               f", but this may be chance (p {p_text(row.p_value)}{limits}).")
            + (" It grows with the number of runs: fair only between equal numbers."
               if row.measure == "1 - dice_min" else "")
        )  # fmt: skip
    return sentences


def _site_columns(sites: pd.DataFrame) -> dict[str, Column]:
    columns = {
        "site": Column("Site", "Held out from training", text=True),
        "n": Column("n", "Participants", "{:,.0f}"),
    }
    for name in sites.columns:
        if str(name).startswith("mae_"):
            what = str(name).removeprefix("mae_").replace("_", " ")
            columns[name] = Column(what, f"Mean absolute error with {what} [years]")
    return columns


def tabulate(
    table: pd.DataFrame, columns: Mapping[str, Column], highlight: str | None = None
) -> dict[str, Any]:
    """Headings and rows of cells with text, sort key and kind."""
    shown = {name: column for name, column in columns.items() if name in table.columns}
    # A column of which nothing is known, such as Dice without participant-level tables.
    shown = {n: c for n, c in shown.items() if c.text or table.empty or table[n].notna().any()}
    rows = []
    for _, row in table.iterrows():
        cells = [_cell(row[name], column) for name, column in shown.items()]
        marked = highlight is not None and row.get("augmentation") == highlight
        rows.append({"cells": cells, "marked": marked})
    headings = [
        {"heading": c.heading, "tooltip": c.tooltip, "numeric": not c.text} for c in shown.values()
    ]
    return {"columns": headings, "rows": rows}


def _cell(value: Any, column: Column) -> dict[str, Any]:
    if column.text:
        return {"text": str(value).replace("_", " "), "key": str(value), "numeric": False}
    if pd.isna(value):
        return {"text": "n/a", "key": "", "numeric": True}
    number = float(value)
    if np.isinf(number):
        text = "∞"
    elif column.form == "signed":
        text = signed(number)
    elif column.form == "p":
        text = p_text(number).removeprefix("= ")
    elif column.form == "volume":
        text = f"{number:,.0f}" if abs(number) >= 100 else f"{number:.3g}"
    elif column.form == "percent":
        text = f"{100 * number:.2f}"
    else:
        text = column.form.format(number).replace("-", "−")
    return {"text": text, "key": repr(number), "numeric": True}


def plain(value: Any) -> str:
    """A setting as a reader writes it."""
    if value is None or value == () or value == {} or value == []:
        return "–"
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(plain(v) for v in value)
    if isinstance(value, Mapping):
        return ", ".join(f"{k}: {plain(v)}" for k, v in value.items())
    return str(value)
