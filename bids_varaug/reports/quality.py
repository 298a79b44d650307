"""The page about the reliability of a group's volumes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from bids_varaug.derivatives import names
from bids_varaug.derivatives.names import table_columns
from bids_varaug.reports import plots
from bids_varaug.reports.group import Page, RunInfo, make_page
from bids_varaug.reports.html import data_uri, tabulate
from bids_varaug.variability.change import summarise_changes
from bids_varaug.variability.outliers import MIN_IMAGES, OUTLYING
from bids_varaug.variability.power import ALPHA, MAX_FLIPS


def quality_page(
    run: RunInfo,
    output_dir: Path,
    images: pd.DataFrame,
    volumes: pd.DataFrame,
    structures: pd.DataFrame,
    power: pd.DataFrame | None,
    changes: pd.DataFrame,
) -> Page:
    """Page of the reliability of volumes.

    Parameters
    ----------
    output_dir : whose reports of participants are linked, where there are any
    images : participant_id, session_id, image (entities), n_unreliable, n_caution (structures), worst (text), distance
        and odd (text), of `robust_distances`; missing where unknown
    volumes : mm3, a row per row of `images`, a column per structure
    structures : name, mean, low, high [mm3], n_outside, unreliable (share of the images), cv, npv
    power, changes : of `power_table` (or None) and `paired_changes`
    """
    images = images.sort_values(["distance", "n_unreliable"], ascending=False, kind="stable")
    volumes = volumes.loc[images.index]
    outlying = images["distance"] > OUTLYING
    reports = {p: names.report(output_dir, p.removeprefix("sub-")) for p in images["participant_id"].unique()}
    links = [reports[p].name if reports[p].exists() else "" for p in images["participant_id"]]
    known = structures.dropna(subset=["npv"])
    figure = plots.draw_ranges(volumes, structures, outlying.to_numpy())
    people = None
    if len(changes):
        text = changes["name"].map(plots.short_name) + changes["change"].map(" {:+.1f} %".format).str.replace("-", "−")
        visits = changes.assign(beyond=text.where(changes["mark"] == "beyond"))
        visits = visits.groupby(["participant_id", "session_id", "first_session", "days"], sort=False, dropna=False)
        people = visits["beyond"].agg(n_beyond="count", beyond=lambda texts: ", ".join(texts.dropna())).reset_index()
    return make_page(
        "quality.html",
        run,
        n_images=len(images),
        n_people=images["participant_id"].nunique(),
        n_unreliable=int((images["n_unreliable"] > 0).sum()) if images["n_unreliable"].notna().any() else None,
        n_outlying=int(outlying.sum()) if len(images) >= MIN_IMAGES else None,
        min_images=MIN_IMAGES,
        outlying=OUTLYING,
        alpha=ALPHA,
        max_flips=MAX_FLIPS,
        worst=known.nlargest(3, "npv").assign(name=lambda t: t["name"].map(plots.short_name)).to_dict("records"),
        median_npv=known["npv"].median(),
        n_unsafe=None if power is None else int((power["flips_0.01"] > MAX_FLIPS).sum()),
        changes={
            "n": int(changes["mark"].notna().sum()),
            "n_beyond": int((changes["mark"] == "beyond").sum()),
            "n_people": changes["participant_id"].nunique(),
            "rescanned": bool(changes["detectable_rescan"].notna().any()),
        }
        if len(changes)
        else None,
        figure=data_uri(figure, "svg+xml"),
        tables={
            "images": tabulate(images, table_columns("images"), np.where(outlying, "caution", "").tolist(), links={"image": links}),
            "structures": tabulate(structures, table_columns("structures")),
            "power": None if power is None else tabulate(power, table_columns("group_power")),
            "changes": tabulate(summarise_changes(changes), table_columns("summary")) if len(changes) else None,
            "people": None if people is None else tabulate(people, table_columns("visits")),
        },
    )
