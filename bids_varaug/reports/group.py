"""The pages of the group level: reliability of volumes, a study that was scored, or a model applied to other people."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd

from bids_varaug.brainage.evaluate import (
    ALPHA,
    CONTROLS,
    N_BOOTSTRAP,
    TRIED,
    Evaluation,
    best_augmentation,
    bootstrap_interval,
)
from bids_varaug.brainage.outputs import PHENOTYPE_TABLE, phenotype_tables
from bids_varaug.brainage.target import TargetEvaluation, target_table
from bids_varaug.derivatives import names
from bids_varaug.derivatives.citation import Citation
from bids_varaug.derivatives.names import table_columns
from bids_varaug.errors import NoInputError, UserError
from bids_varaug.files import write_text
from bids_varaug.reports import plots
from bids_varaug.reports.html import data_uri, render_page, run_id, signed, tabulate
from bids_varaug.reports.viewer import viewer_program
from bids_varaug.variability.longitudinal import summarise_changes
from bids_varaug.variability.power import ALPHA as POWER_ALPHA
from bids_varaug.variability.power import MAX_FLIPS
from bids_varaug.variability.quality import MIN_IMAGES, OUTLYING

FORMAT = 4
ADVICE = "Run the group level again without --reports-only."


@dataclass(frozen=True)
class RunInfo:
    """What every page says of the run."""

    methods: str  # of a `Citation`
    left_out: Mapping[str, str] = field(default_factory=dict)  # reason by participant or observation
    warnings: Sequence[str] = ()
    source: Mapping[str, Any] = field(default_factory=dict)  # what the features are
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)  # of packages
    title: str = ""  # e.g. the dataset's name; by default what the page shows
    sloppy: bool = False


@dataclass(frozen=True)
class Page:
    """A page: its template, and what fills it, of JSON's types alone."""

    template: str
    values: dict[str, Any]

    def html(self) -> str:
        """Return the page as one HTML text; every value is escaped."""
        run = self.values["run"]
        about = {"citation": Citation(run["methods"]), "sloppy": run["sloppy"]}
        about["run_id"] = run_id(run["settings"], run["source"], run["versions"])
        if "view" in self.values:
            about["program"] = viewer_program()
        return render_page(self.template, **about, **self.values)

    def save(self, path: Path) -> Path:
        """Write the page as JSON; `load_page` reads it, and gives the same page without fitting."""
        saved = {"format": FORMAT, "template": self.template, "values": self.values}
        return write_text(json.dumps(saved, ensure_ascii=False, allow_nan=False) + "\n", path)

    def write(self, output_dir: Path, name: str) -> Path:
        """Write the page as `name` and, for --reports-only, what it is made of; return its path."""
        self.save((names.logs(output_dir) / name).with_suffix(".json"))
        return write_text(self.html(), output_dir / name)


def load_page(path: Path) -> Page:
    """Read what `Page.save` wrote; NoInputError if there is none, UserError if it is damaged or of another format."""
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        if saved["format"] != FORMAT:
            raise UserError(f"{path}: of format {saved['format']}, not {FORMAT}. {ADVICE}")
        page = Page(saved["template"], saved["values"])
        page.html()
    except FileNotFoundError as error:
        raise NoInputError(f"{path}: not found, and --reports-only makes the page from it. {ADVICE}") from error
    except (OSError, ValueError, KeyError, TypeError, jinja2.TemplateError) as error:
        raise UserError(f"{path}: damaged ({error!r}). {ADVICE}") from error
    return page


@dataclass(frozen=True, eq=False)
class ComparedPipeline:
    """Another pipeline's repeated runs beside ours."""

    name: str  # as given to --compare
    numerics: pd.DataFrame  # of `variability.numerical_variability`
    comparison: pd.DataFrame  # of `variability.compare_pipelines`, ours against it


def evaluation_page(
    run: RunInfo,
    evaluation: Evaluation,
    numerics: pd.DataFrame | None = None,
    compared: Sequence[ComparedPipeline] = (),
) -> Page:
    """Page of a group that a model was scored in; `numerics` (`variability.numerical_variability`) needs members."""
    best = best_augmentation(evaluation)
    shown = evaluation.scores.assign(augmentation=evaluation.scores["augmentation"].str.replace("_", " "))
    marked = ["marked" if name == best else "" for name in evaluation.scores["augmentation"]]
    predicted = evaluation.predictions[evaluation.predictions["augmentation"] == best]
    spread = predicted["sd_num"].dropna()
    at_sites = None
    if f"mae_{best}" in evaluation.sites and not evaluation.sites.empty:
        errors, people = evaluation.sites[f"mae_{best}"].astype(float), evaluation.sites["n"].astype(float)
        mean = np.average(errors, weights=people)  # over people
        at_sites = {"mean": mean, "low": errors.min(), "high": errors.max(), "n": len(errors)}
    figures = {"ages": plots.draw_ages(predicted)}
    if not evaluation.gains.empty:
        figures["gains"] = plots.draw_gains(evaluation.gains)
    if not evaluation.learning_curve.empty:
        figures["curve"] = plots.draw_learning_curve(evaluation.learning_curve)
    if numerics is not None and numerics["ratio"].notna().any():
        others = [(other.name, other.numerics) for other in compared if other.numerics["ratio"].notna().any()]
        figures["ratios"] = plots.draw_ratios(numerics, others)
    return make_page(
        "group.html",
        run,
        best=best,
        scores=evaluation.scores.set_index("augmentation").to_dict("index"),
        gains=_gains(evaluation.gains),
        controls=evaluation.gains[evaluation.gains["part"].isin(CONTROLS.values())].to_dict("records"),
        coverage=evaluation.settings.get("coverage", 0.9),
        spread={"median": spread.median(), "high": spread.quantile(0.95)} if len(spread) else None,
        at_sites=at_sites,
        structures=_structures(numerics),
        n_images=evaluation.settings.get("n_observations", len(evaluation.predictions)),
        figures={name: data_uri(svg, "svg+xml") for name, svg in figures.items()},
        chosen=evaluation.chosen,
        evaluation=evaluation.settings,
        alpha=ALPHA,
        tables={
            "scores": tabulate(shown, table_columns("scores"), marked),
            "gains": tabulate(evaluation.gains, table_columns("gains")),
            "sites": _site_table(evaluation.sites),
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
    """Page of a model applied to other people: what `model_file.apply_model` predicts, and what is known of it."""
    people = phenotype_tables(predicted)[PHENOTYPE_TABLE]
    known = people[people["age"].notna()]
    with_age = predicted[predicted["age"].astype(float).notna()]
    errors = known["brain_age"] - known["age"]
    inside = known["age"].between(known["lower"], known["upper"])[known[["lower", "upper"]].notna().all(axis=1)]
    low = high = np.array([np.nan])
    if len(known):
        low, high = bootstrap_interval(errors.abs().to_numpy()[:, None], np.random.default_rng(0), N_BOOTSTRAP)
    return make_page(
        "applied.html",
        run,
        n_people=len(people),
        n_known=len(known),
        mae={"mean": errors.abs().mean(), "low": low[0], "high": high[0]},
        bias=errors.mean(),
        inner_mae=model.get("inner_mae"),
        width=(people["upper"] - people["lower"]).mean(),
        spread={"median": people["sd_num"].median(), "high": people["sd_num"].max()},
        n_images=people["n_images"].sum(),
        inside=inside.mean(),
        figure=data_uri(plots.draw_ages(with_age) if len(with_age) else plots.draw_ranked(predicted), "svg+xml"),
        people=tabulate(people, table_columns("people")),
        has_sessions=predicted["session_id"].notna().any(),
        model=model,
    )


def target_page(
    run: RunInfo, target: str, classes: Sequence[str], predicted: pd.DataFrame, model: Mapping[str, Any],
    evaluation: TargetEvaluation | None = None,
) -> Page:  # fmt: skip
    """Page of a target (`brainage.target`): scored, or predicted by a model fitted to other people."""
    people = table_columns("target_people")
    share = replace(people["predicted"], description="Predicted probability")
    shares = {f"p_{name}": replace(share, heading=f"p {name}") for name in classes}
    columns = people | shares | {"predicted": replace(people["predicted"], form="text")} if classes else people
    values: dict[str, Any] = {"scores": {}, "evaluation": {}}
    tables = {"people": tabulate(target_table(predicted, classes), columns)}
    if evaluation is not None:
        best, gains = evaluation.best, evaluation.gains.drop_duplicates("part").to_dict("records")
        by_model: dict[str, dict[str, Any]] = {}
        for row in evaluation.scores.query("held_out == 'participants'").to_dict("records"):
            by_model.setdefault(row["augmentation"], {})[row["measure"]] = row
        at_sites = evaluation.scores.query("held_out == 'sites' and augmentation == @best").to_dict("records")
        loss = replace(table_columns("gains")["gain"], heading="Gain", description="Difference in loss")
        tables["scores"] = tabulate(evaluation.scores, table_columns("target_scores"))
        tables["gains"] = tabulate(evaluation.gains, table_columns("gains") | {"gain": loss})
        values = {
            "scores": by_model, "best": best, "gains": gains, "alpha": ALPHA, "p_value": evaluation.p_value,
            "features": next((row for row in gains if row["part"] == "features"), None),
            "at_sites": at_sites[0] if at_sites else None, "n": evaluation.settings["n_participants"],
            "evaluation": evaluation.settings,
        }  # fmt: skip
    return make_page("target.html", run, target=target, classes=classes, tables=tables, model=model, **values)


def make_page(template: str, run: RunInfo, **values: Any) -> Page:
    """Make a page of a template; what fills it becomes JSON, NaN, which JSON lacks, None."""
    source = {key: value for key, value in run.source.items() if key != "sha256"}
    values = {"run": asdict(replace(run, source=source)), **values}
    text = json.dumps(values, default=lambda other: other.item() if isinstance(other, np.generic) else str(other))
    return Page(template, json.loads(text, parse_constant={"Infinity": "inf", "-Infinity": "-inf"}.get))


def _gains(gains: pd.DataFrame) -> dict[str, Any] | None:
    """Rows of `Evaluation.gains` that the page speaks of, one per part; None where no augmentation was tried."""
    first = {part: rows.iloc[0].to_dict() for part, rows in gains.groupby("part", sort=False)}
    if not first.keys() & {"averaging", "augmentation"}:
        return None
    row = {part: first.get(part) for part in ("averaging", "augmentation", "structure")}
    return {**row, "tried": gains["part"].isin(TRIED).sum()}


def _structures(numerics: pd.DataFrame | None) -> dict[str, Any] | None:
    """Numerical against anatomical spread in the median and in the worst feature, as written."""
    if numerics is None or not np.isfinite(numerics["ratio"]).any():
        return None
    known = numerics[np.isfinite(numerics["ratio"])]
    return {
        "n": len(known),
        "median": f"{known['ratio'].median():.3g}",
        "worst": f"{known['ratio'].max():.3g}",
        "worst_name": plots.short_name(str(known.loc[known["ratio"].idxmax(), "name"])),
        "n_needed": f"{known['n_needed'].median():,.0f}",
        "n_needed_worst": f"{known['n_needed'].max():,.0f}",
    }


def _site_table(sites: pd.DataFrame) -> dict[str, Any]:
    """Table of sites: the error of each augmentation under its name."""
    columns = table_columns("sites")
    error = columns.pop("mae")
    for name in sites.columns[sites.columns.str.startswith("mae_")]:
        columns[name] = replace(error, heading=name.removeprefix("mae_").replace("_", " "))
    return tabulate(sites, columns)


def quality_page(
    run: RunInfo, output_dir: Path, images: pd.DataFrame, volumes: pd.DataFrame, structures: pd.DataFrame,
    power: pd.DataFrame, changes: pd.DataFrame, shared: Sequence[str] = (),
) -> Page:  # fmt: skip
    """Page of the reliability of volumes.

    Parameters
    ----------
    output_dir : whose reports of participants are linked, where there are any
    images : participant_id, session_id, image (entities), n_unreliable, n_caution, n_unknown (structures), worst
        (text), distance of `robust_distances`, odd (the structure that deviates most) and its deviation; NaN where
        unknown
    volumes : mm3, a row per row of `images`, a column per structure
    structures : name, mean, low, high [mm3], n_outside, unreliable (share of the images), cv, npv
    power, changes : of `power_table` and `paired_changes`; may be empty
    shared : reasons of verdicts that all structures of all images have
    """
    images = images.sort_values(["distance", "n_unreliable"], ascending=False, kind="stable")
    outlying = images["distance"] > OUTLYING
    odd = images["odd"] + images["deviation"].map(lambda z: f" {signed(z)}")
    reports = [names.report(output_dir, who.removeprefix("sub-")) for who in images["participant_id"]]
    links = [{"href": path.name} if path.exists() else {} for path in reports]
    tables = {
        "images": tabulate(
            images.assign(odd=odd.where(outlying)), table_columns("images"), np.where(outlying, "caution", "").tolist(),
            links={"image": links},
        ),
        "structures": tabulate(structures, table_columns("structures")),
        "power": tabulate(power, table_columns("group_power")),
    }  # fmt: skip
    beyond = None
    if len(changes):
        beyond = changes["mark"] == "beyond"
        text = changes["name"].map(plots.short_name) + changes["change"].map(lambda change: f" {signed(change)} %")
        visits = changes.assign(beyond=text.where(beyond))
        visits = visits.groupby(["participant_id", "session_id", "first_session", "days"], sort=False, dropna=False)
        people = visits["beyond"].agg(n_beyond="count", beyond=lambda texts: ", ".join(texts.dropna())).reset_index()
        tables["changes"] = tabulate(summarise_changes(changes), table_columns("summary"))
        tables["people"] = tabulate(people, table_columns("visits"))
    known = structures.dropna(subset=["npv"]).nlargest(3, "npv")
    return make_page(
        "quality.html",
        run,
        n_images=len(images),
        n_people=images["participant_id"].nunique(),
        n_unreliable=(images["n_unreliable"] > 0).sum() if images["n_unreliable"].notna().any() else None,
        n_unjudged=(images["n_unknown"] > 0).sum(),
        shared="; ".join(shared),
        n_outlying=outlying.sum() if images["distance"].notna().any() else None,
        limits={"min_images": MIN_IMAGES, "outlying": OUTLYING, "alpha": POWER_ALPHA, "max_flips": MAX_FLIPS},
        worst=known.assign(name=known["name"].map(plots.short_name)).to_dict("records"),
        median_npv=structures["npv"].median(),
        n_unsafe=(power["flips_0.01"] > MAX_FLIPS).sum() if len(power) else None,
        n_changes=changes["mark"].count() if len(changes) else 0,
        n_beyond=None if beyond is None else beyond.sum(),
        rescanned=len(changes) > 0 and changes["detectable_rescan"].notna().any(),
        figure=data_uri(plots.draw_ranges(volumes.loc[images.index], structures, outlying.to_numpy()), "svg+xml"),
        tables=tables,
    )
