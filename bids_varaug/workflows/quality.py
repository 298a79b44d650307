"""How reliable a group's volumes are: tables and a page; no ages are needed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from bids_varaug.atomic import write_json, write_text
from bids_varaug.brainage.cohort import Cohort
from bids_varaug.brainage.variability import numerical_variability
from bids_varaug.derivatives import names
from bids_varaug.derivatives.citation import cite
from bids_varaug.derivatives.logs import write_group_logs
from bids_varaug.derivatives.sidecars import describe_columns, package_versions
from bids_varaug.derivatives.write import write_table
from bids_varaug.inputs.sessions import order_sessions
from bids_varaug.inputs.tables import some
from bids_varaug.reports.group import RunInfo
from bids_varaug.reports.html import signed
from bids_varaug.reports.quality import quality_page
from bids_varaug.settings import Settings
from bids_varaug.variability.change import comparable, paired_changes
from bids_varaug.variability.outliers import OUTLYING, robust_distances
from bids_varaug.variability.power import MIN_PEOPLE, power_table
from bids_varaug.variability.quality import adult_limits

VERDICTS = ["name", "cv", "verdict", "reason", "volume_mean", "volume_low", "volume_high"]


def write_quality(settings: Settings, cohort: Cohort, notes: Sequence[str]) -> Path:
    """Write the tables and the page of the reliability of a cohort's volumes [mm3]; return the page."""
    has_members, told = cohort.members is not None, len(notes)
    notes = list(notes)
    volumes = cohort.baseline[:, None] if cohort.members is None else cohort.members
    verdicts = _read_verdicts(settings.output_dir, cohort.people, notes)
    images = _describe_images(cohort, volumes, verdicts)
    structures = _describe_structures(cohort, volumes, verdicts)
    changes = _find_changes(settings.bids_dir, cohort, volumes, notes)
    for note in notes[told:]:
        print(f"Note: {note}", file=sys.stderr)
    n_people = cohort.people["participant_id"].nunique()
    power = power_table(cohort.names, structures["npv"], n_people) if n_people >= MIN_PEOPLE and has_members else None
    _write(settings.output_dir / "phenotype/volumes.tsv", _volumes_table(cohort, volumes, images), cohort.names)
    for path, table in {"phenotype/changes.tsv": changes, "models/power.tsv": power}.items():
        if table is not None and len(table):
            _write(settings.output_dir / path, table)
    citation = cite("quality", package_versions(), has_members=has_members, has_changes=len(changes) > 0)
    write_group_logs(settings, citation, "CITATION_quality.md")
    run = RunInfo(
        citation.methods, cohort.left_out, notes, cohort.source, {"level": "group"}, package_versions(),
        sloppy=bool(cohort.source.get("sloppy")),
    )  # fmt: skip
    means = pd.DataFrame(volumes.mean(axis=1), columns=list(cohort.names))
    page = quality_page(run, settings.output_dir, images, means, structures, power, changes)
    page.save((names.logs(settings.output_dir) / names.QUALITY_REPORT).with_suffix(".json"))
    return write_text(page.html(), settings.output_dir / names.QUALITY_REPORT)


def _write(path: Path, table: pd.DataFrame, structures: Sequence[str] = ()) -> None:
    """Write a table and its sidecar; `structures` have a column of volumes, and one of standard deviations."""
    write_table(table, path)
    columns = names.table_columns(f"group_{path.stem}")
    for name in structures:
        columns |= {name: columns["volume_mean"], f"{name}_sd": columns["volume_sd"]}
    shown = {name: column for name, column in columns.items() if name in table}
    write_json(describe_columns(shown), path.with_suffix(".json"))


def _read_verdicts(output_dir: Path, people: pd.DataFrame, notes: list[str]) -> pd.DataFrame:
    """Rows of every image's table of structures, with the column image; none of older versions, without verdicts."""
    ending, without, tables = names.OUTPUTS["regions_tsv"].name(""), [], [pd.DataFrame(columns=["image", *VERDICTS])]
    for participant, session, image in people[["participant_id", "session_id", "observation"]].itertuples(index=False):
        path = Path(output_dir, participant, *([session] if isinstance(session, str) else []), "anat", image + ending)
        try:
            tables.append(pd.read_csv(path, sep="\t", na_values="n/a", usecols=VERDICTS).assign(image=image))
        except (OSError, ValueError):
            without.append(image)
    if without:
        notes.append(f"Images without verdicts (their table of structures is missing, old or damaged): {some(without)}.")
    return pd.concat(tables, ignore_index=True)


def _describe_images(cohort: Cohort, volumes: np.ndarray, verdicts: pd.DataFrame) -> pd.DataFrame:
    """Row per image, see `quality_page`."""
    distances, deviations = robust_distances(volumes.mean(axis=1))
    images = cohort.people[["participant_id", "session_id"]].assign(image=cohort.people["observation"])
    known = images["image"].isin(verdicts["image"])
    for verdict in ("unreliable", "caution"):
        count = verdicts.loc[verdicts["verdict"] == verdict, "image"].value_counts()
        images[f"n_{verdict}"] = images["image"].map(count).fillna(0).where(known)
    doubtful = verdicts[verdicts["verdict"].isin(["unreliable", "caution"])]
    doubtful = doubtful.sort_values(["verdict", "cv"], ascending=False, kind="stable")
    worst = doubtful.groupby("image")["name"].agg(list).to_dict()
    images["worst"] = [some(worst.get(image, []), shown=3) for image in images["image"]]
    images["distance"] = distances
    odd = np.nan_to_num(np.abs(deviations)).argmax(axis=1)
    images["odd"] = pd.Series([f"{cohort.names[f]} {signed(deviations[i, f])}" for i, f in enumerate(odd)]).where(
        distances > OUTLYING
    )
    return images


def _describe_structures(cohort: Cohort, volumes: np.ndarray, verdicts: pd.DataFrame) -> pd.DataFrame:
    """Row per structure: name, mean, low, high (for adults of any age), n_outside, cv, npv, unreliable."""
    table = pd.DataFrame({"name": cohort.names, "mean": volumes.mean(axis=(0, 1))})
    table["low"], table["high"] = adult_limits(cohort.names)
    outside = ~verdicts["volume_mean"].between(verdicts["volume_low"], verdicts["volume_high"])
    outside = outside.where(verdicts["volume_low"].notna())
    by_name = verdicts.assign(outside=outside, unreliable=verdicts["verdict"] == "unreliable").groupby("name")
    table["n_outside"] = table["name"].map(by_name["outside"].sum(min_count=1))
    table["unreliable"] = table["name"].map(by_name["unreliable"].mean())
    if cohort.members is None:
        return table.assign(cv=np.nan, npv=np.nan)
    return table.merge(numerical_variability(cohort)[["name", "cv", "npv"]], on="name")


def _find_changes(bids_dir: Path, cohort: Cohort, volumes: np.ndarray, notes: list[str]) -> pd.DataFrame:
    """`paired_changes` of participants with several sessions, with the days between them; what to note about these."""
    with_session = cohort.people.dropna(subset=["session_id"]).groupby("participant_id", sort=False)
    days = {
        participant: order_sessions(bids_dir, participant, sessions)
        for participant, sessions in with_session["session_id"].unique().items()
        if len(sessions) > 1
    }
    if undated := [participant for participant, of in days.items() if np.isnan(list(of.values())).any()]:
        notes.append(
            f"Sessions without a date (acq_time in *_sessions.tsv or *_scans.tsv) are in the order of their labels: "
            f"{some(undated)}. Check that this is their order in time."
        )
    kinds = cohort.people.groupby(["participant_id", "session_id"])["observation"].agg(comparable)
    if mixed := [p for p in days if kinds[p].map(sorted).map(str).nunique() > 1]:
        notes.append(f"Sessions differ in more than time (other entities in the names of their images): {some(mixed)}.")
    changes = paired_changes(cohort.people, cohort.names, volumes, {p: list(of) for p, of in days.items()})
    if len(changes):
        at = zip(changes["participant_id"], changes["session_id"], strict=True)
        changes.insert(3, "days", [days[participant][session] for participant, session in at])
    return changes


def _volumes_table(cohort: Cohort, volumes: np.ndarray, images: pd.DataFrame) -> pd.DataFrame:
    """Row per image: ids, number of unreliable structures, distance; then mean volumes, and SDs over members."""
    volumes = np.concatenate([volumes.sum(axis=2, keepdims=True), volumes], axis=2)  # the brain first
    columns = ["brain", *cohort.names]
    table = images[["participant_id", "session_id", "image", "n_unreliable", "distance"]].dropna(axis=1, how="all")
    means = pd.DataFrame(volumes.mean(axis=1), columns=columns)
    if cohort.members is None:
        return pd.concat([table, means], axis=1)
    return pd.concat([table, means, pd.DataFrame(volumes.std(axis=1, ddof=1), columns=[f"{c}_sd" for c in columns])], axis=1)
