"""The page about the reliability of a group's volumes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from bids_varaug.derivatives import names
from bids_varaug.derivatives.names import table_columns
from bids_varaug.reports import plots
from bids_varaug.reports.group import Page, RunInfo, make_page
from bids_varaug.reports.html import data_uri, signed, tabulate
from bids_varaug.variability.change import summarise_changes
from bids_varaug.variability.power import ALPHA, MAX_FLIPS
from bids_varaug.variability.quality import MIN_IMAGES, OUTLYING


def quality_page(
    run: RunInfo, output_dir: Path, images: pd.DataFrame, volumes: pd.DataFrame, structures: pd.DataFrame,
    power: pd.DataFrame, changes: pd.DataFrame,
) -> Page:  # fmt: skip
    """Page of the reliability of volumes.

    Parameters
    ----------
    output_dir : whose reports of participants are linked, where there are any
    images : participant_id, session_id, image (entities), n_unreliable, n_caution (structures), worst (text), distance
        of `robust_distances`, odd (the structure that deviates most) and its deviation; NaN where unknown
    volumes : mm3, a row per row of `images`, a column per structure
    structures : name, mean, low, high [mm3], n_outside, unreliable (share of the images), cv, npv
    power, changes : of `power_table` and `paired_changes`; may be empty
    """
    images = images.sort_values(["distance", "n_unreliable"], ascending=False, kind="stable")
    outlying = images["distance"] > OUTLYING
    odd = images["odd"] + images["deviation"].map(lambda z: f" {signed(z)}")
    reports = [names.report(output_dir, who.removeprefix("sub-")) for who in images["participant_id"]]
    links = [path.name if path.exists() else "" for path in reports]
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
        n_outlying=outlying.sum() if images["distance"].notna().any() else None,
        limits={"min_images": MIN_IMAGES, "outlying": OUTLYING, "alpha": ALPHA, "max_flips": MAX_FLIPS},
        worst=known.assign(name=known["name"].map(plots.short_name)).to_dict("records"),
        median_npv=structures["npv"].median(),
        n_unsafe=(power["flips_0.01"] > MAX_FLIPS).sum() if len(power) else None,
        n_changes=changes["mark"].count() if len(changes) else 0,
        n_beyond=None if beyond is None else beyond.sum(),
        rescanned=len(changes) > 0 and changes["detectable_rescan"].notna().any(),
        figure=data_uri(plots.draw_ranges(volumes.loc[images.index], structures, outlying.to_numpy()), "svg+xml"),
        tables=tables,
    )
