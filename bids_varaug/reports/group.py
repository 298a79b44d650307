"""The pages of the group level: a study that was scored, or a model applied to other people."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd

from bids_varaug.atomic import write_text
from bids_varaug.brainage.evaluate import ALPHA, N_BOOTSTRAP, Evaluation, best_augmentation, bootstrap_interval
from bids_varaug.brainage.outputs import PHENOTYPE_TABLE, phenotype_tables
from bids_varaug.derivatives.citation import Citation
from bids_varaug.errors import NoInputError, UserError
from bids_varaug.reports import plots
from bids_varaug.reports.html import Column, data_uri, render_page, table_columns, tabulate

FORMAT = 3
ADVICE = "Run the group level again without --reports-only."


@dataclass(frozen=True)
class RunInfo:
    """What every page says of the run.

    Attributes
    ----------
    methods : paragraph of a `Citation`
    left_out : reason by participant or observation
    warnings : sentences shown at the top
    source : what the features are, shown as a list of name and value
    settings, versions : of the run, and of packages
    title : e.g. the dataset's name; by default what the page shows
    sloppy : whether made with --sloppy
    """

    methods: str
    left_out: Mapping[str, str] = field(default_factory=dict)
    warnings: Sequence[str] = ()
    source: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    title: str = ""
    sloppy: bool = False


@dataclass(frozen=True)
class Page:
    """A page: its template, and what fills it, of JSON's types alone."""

    template: str
    values: dict[str, Any]

    def html(self) -> str:
        """Return the page as one HTML text; every value is escaped."""
        citation = Citation(self.values["run"]["methods"])
        return render_page(self.template, citation=citation, sloppy=self.values["run"]["sloppy"], **self.values)

    def save(self, path: Path) -> Path:
        """Write the page as JSON; `load_page` reads it, and gives the same page without fitting.

        Raises
        ------
        OutputError
            If it cannot be written.
        """
        saved = {"format": FORMAT, "template": self.template, "values": self.values}
        return write_text(json.dumps(saved, ensure_ascii=False, allow_nan=False) + "\n", path)


def load_page(path: Path) -> Page:
    """Read what `Page.save` wrote.

    Raises
    ------
    NoInputError
        If there is none.
    UserError
        If it is damaged, or of another format.
    """
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        if saved["format"] != FORMAT:
            raise UserError(f"{path}: of format {saved['format']}, not {FORMAT}. {ADVICE}")
        page = Page(saved["template"], saved["values"])
        page.html()
    except FileNotFoundError as error:
        raise NoInputError(
            f"{path}: not found. The group level writes it, and --reports-only makes the page from it. {ADVICE}"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, jinja2.TemplateError) as error:
        raise UserError(f"{path}: damaged ({error!r}). {ADVICE}") from error
    return page


@dataclass(frozen=True, eq=False)
class ComparedPipeline:
    """Another pipeline's repeated runs beside ours.

    Attributes
    ----------
    name : as given to --compare
    numerics : its table of `variability.numerical_variability`
    comparison : of `variability.compare_pipelines`, ours against it
    """

    name: str
    numerics: pd.DataFrame
    comparison: pd.DataFrame


def evaluation_page(
    run: RunInfo,
    evaluation: Evaluation,
    numerics: pd.DataFrame | None = None,
    compared: Sequence[ComparedPipeline] = (),
) -> Page:
    """Page of a group that a model was scored in.

    Parameters
    ----------
    run : RunInfo
    evaluation : scores and predictions
    numerics : table of `variability.numerical_variability`; None without members
    compared : other pipelines
    """
    best = best_augmentation(evaluation)
    scores = evaluation.scores.set_index("augmentation").to_dict("index")
    shown = evaluation.scores.assign(augmentation=evaluation.scores["augmentation"].str.replace("_", " "))
    marked = ["marked" if name == best else "" for name in evaluation.scores["augmentation"]]
    spread = evaluation.predictions.loc[evaluation.predictions["augmentation"] == best, "sd_num"].dropna()
    return _page(
        "group.html",
        run,
        best=best,
        scores=scores,
        gains=_gains(evaluation.gains),
        coverage=evaluation.settings.get("coverage", 0.9),
        spread={"median": spread.median(), "high": spread.quantile(0.95)} if len(spread) else None,
        at_sites=_at_sites(evaluation, best),
        structures=_structures(numerics),
        n_images=evaluation.settings.get("n_observations", len(evaluation.predictions)),
        figures=_figures(evaluation, best, numerics, compared),
        chosen=evaluation.chosen,
        evaluation=evaluation.settings,
        alpha=ALPHA,
        tables={
            "scores": tabulate(shown, table_columns("scores"), marked),
            "gains": tabulate(evaluation.gains, table_columns("gains")),
            "sites": tabulate(evaluation.sites, _site_columns(evaluation.sites)),
            "reliability": tabulate(evaluation.reliability, table_columns("reliability")),
            "numerics": None if numerics is None else tabulate(numerics, table_columns("numerics")),
        },
        compared=[
            {
                "name": other.name,
                "rows": other.comparison.to_dict("records"),
                "table": tabulate(other.comparison, table_columns("comparison")),
            }
            for other in compared
        ],
    )


def applied_page(run: RunInfo, predicted: pd.DataFrame, model: Mapping[str, Any]) -> Page:
    """Page of a model applied to other people.

    Parameters
    ----------
    run : RunInfo
    predicted : of `model_file.apply_model`
    model : what was applied, shown as a list of name and value
    """
    people = phenotype_tables(predicted)[PHENOTYPE_TABLE]
    known = people[people["age"].notna()]
    with_age = predicted[predicted["age"].astype(float).notna()]
    errors = (known["brain_age"] - known["age"]).abs()
    limits = known.dropna(subset=["lower", "upper"])
    low = high = [np.nan]
    if len(known):
        low, high = bootstrap_interval(errors.to_numpy()[:, None], np.random.default_rng(0), N_BOOTSTRAP)
    return _page(
        "applied.html",
        run,
        n_people=len(people),
        n_known=len(known),
        mae={"mean": errors.mean(), "low": low[0], "high": high[0]},
        bias=(known["brain_age"] - known["age"]).mean(),
        inner_mae=model.get("inner_mae"),
        width=(people["upper"] - people["lower"]).mean(),
        spread={"median": people["sd_num"].median(), "high": people["sd_num"].max()},
        n_images=people["n_images"].sum(),
        inside=((limits["lower"] <= limits["age"]) & (limits["age"] <= limits["upper"])).mean(),
        figure=data_uri(plots.draw_ages(with_age) if len(with_age) else plots.draw_ranked(predicted), "svg+xml"),
        people=tabulate(people, table_columns("people")),
        has_sessions=predicted["session_id"].notna().any(),
        model=model,
    )


def _page(template: str, run: RunInfo, **values: Any) -> Page:
    source = {key: value for key, value in run.source.items() if key != "sha256"}
    return Page(template, _as_json({"run": asdict(replace(run, source=source)), **values}))


def _as_json(value: Any) -> Any:
    """The same of JSON's types alone; NaN, which JSON lacks, becomes None."""
    if isinstance(value, Mapping):
        return {str(key): _as_json(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(part) for part in value]
    if isinstance(value, np.generic):
        return _as_json(value.item())
    if isinstance(value, float) and not np.isfinite(value):
        return None if np.isnan(value) else str(value)
    return value if value is None or isinstance(value, (bool, int, float)) else str(value)


def _gains(gains: pd.DataFrame) -> dict[str, Any] | None:
    """The rows of `Evaluation.gains` that the page speaks of, one per part; None where no augmentation was tried."""
    first = {part: rows.iloc[0].to_dict() for part, rows in gains.groupby("part", sort=False)}
    if not first.keys() & {"averaging", "augmentation"}:
        return None
    row = {part: first.get(part) for part in ("averaging", "augmentation", "structure")}
    return {**row, "tried": (gains["part"] != "structure").sum()}


def _at_sites(evaluation: Evaluation, best: str) -> dict[str, float] | None:
    """Error at sites left out of training: mean over people, smallest, largest; None without sites."""
    if evaluation.sites.empty or f"mae_{best}" not in evaluation.sites:
        return None
    errors = evaluation.sites[f"mae_{best}"].astype(float)
    mean = np.average(errors, weights=evaluation.sites["n"].astype(float))
    return {"mean": mean, "low": errors.min(), "high": errors.max(), "n": len(errors)}


def _structures(numerics: pd.DataFrame | None) -> dict[str, Any] | None:
    """Numerical against anatomical spread in the median and in the worst feature, as written."""
    if numerics is None or numerics["ratio"].isna().all():
        return None
    known = numerics[numerics["ratio"].notna()]
    worst = known.loc[known["ratio"].idxmax()]
    return {
        "n": len(known),
        "median": f"{known['ratio'].median():.3g}",
        "worst": f"{worst['ratio']:.3g}",
        "worst_name": plots.short_name(str(worst["name"])),
        "n_needed": f"{known['n_needed'].median():,.0f}",
        "n_needed_worst": f"{known['n_needed'].max():,.0f}",
    }


def _figures(
    evaluation: Evaluation, best: str, numerics: pd.DataFrame | None, compared: Sequence[ComparedPipeline]
) -> dict[str, str]:
    """Data URIs of the figures that there is something to show for."""
    drawn = {"ages": plots.draw_ages(evaluation.predictions[evaluation.predictions["augmentation"] == best])}
    if not evaluation.gains.empty:
        drawn["gains"] = plots.draw_gains(evaluation.gains)
    if not evaluation.learning_curve.empty:
        drawn["curve"] = plots.draw_learning_curve(evaluation.learning_curve)
    if numerics is not None and numerics["ratio"].notna().any():
        others = [(o.name, o.numerics) for o in compared if o.numerics["ratio"].notna().any()]
        drawn["ratios"] = plots.draw_ratios(numerics, others)
    return {name: data_uri(svg, "svg+xml") for name, svg in drawn.items()}


def _site_columns(sites: pd.DataFrame) -> dict[str, Column]:
    """Columns of the table of sites: the error of each augmentation under its name."""
    columns = table_columns("sites")
    error = columns.pop("mae")
    for name in sites.columns[sites.columns.str.startswith("mae_")]:
        columns[name] = replace(error, heading=name.removeprefix("mae_").replace("_", " "))
    return columns
