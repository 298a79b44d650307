"""How reliable a group's volumes are: tables and a page; no ages are needed."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bids_varaug.brainage.cohort import Cohort
from bids_varaug.brainage.variability import numerical_variability
from bids_varaug.derivatives import names
from bids_varaug.derivatives.citation import Citation, cite, write_group_logs
from bids_varaug.derivatives.io import read_mask_volumes, read_regions, write_table
from bids_varaug.derivatives.sidecars import describe_columns, package_versions
from bids_varaug.files import write_json
from bids_varaug.inputs.participants import order_sessions
from bids_varaug.inputs.tables import some
from bids_varaug.reports.group import RunInfo, quality_page
from bids_varaug.settings import Settings
from bids_varaug.variability.longitudinal import paired_changes
from bids_varaug.variability.power import MIN_PEOPLE, power_table
from bids_varaug.variability.quality import LIMITS, robust_distances, split_reasons


def write_quality(settings: Settings, cohort: Cohort, notes: Sequence[str]) -> Path:
    """Write the tables and the page of the reliability of a cohort's volumes [mm3]; return the page."""
    volumes = cohort.baseline[:, None] if cohort.members is None else cohort.members
    added: list[str] = []
    observations = cohort.people.set_index("observation")["participant_id"].to_dict()
    columns = ["cv", "verdict", "reason", "volume_mean", "volume_low", "volume_high"]
    verdicts, _ = read_regions(settings.output_dir, columns, observations)
    if without := [image for image in observations if image not in set(verdicts["image"])]:
        added.append(f"Images without verdicts (table of structures missing, old or damaged): {some(without)}.")
    shared, own = split_reasons(verdicts)
    verdicts = verdicts.assign(has_own=[len(reasons) > 0 for reasons in own])
    changes = _find_changes(settings.bids_dir, cohort, volumes, added)
    note(added)
    images = _describe_images(cohort, volumes, verdicts)
    structures = _describe_structures(cohort, volumes, verdicts)
    power = pd.DataFrame()
    if structures["npv"].notna().any():
        power = power_table(cohort.names, structures["npv"], cohort.people["participant_id"].nunique())
    sums = np.concatenate([volumes.sum(axis=2, keepdims=True), volumes], axis=2)
    measured = pd.Index(["brain", *cohort.names])
    means = pd.DataFrame(sums.mean(axis=1), columns=measured)
    spread = pd.DataFrame(sums.std(axis=1, ddof=1) if cohort.members is not None else None, columns=measured + "_sd")
    ids = images[["participant_id", "session_id", "image", "n_unreliable", "distance"]]
    wide = pd.concat([ids, means, spread], axis=1)
    wide.insert(ids.shape[1] + 1, "brain_mask", images["image"].map(read_mask_volumes(settings.output_dir)))
    wide = wide.dropna(axis=1, how="all")
    for path, table in {"phenotype/volumes": wide, "phenotype/changes": changes, "models/power": power}.items():
        if len(table):
            _write(settings.output_dir / f"{path}.tsv", table)
    citation = cite("quality", has_members=cohort.members is not None, has_changes=len(changes) > 0)
    run = run_info(settings, cohort, [*notes, *added], citation, {}, "CITATION_quality")
    page = quality_page(run, settings.output_dir, images, means, structures, power, changes, shared)
    return page.write(settings.output_dir, names.QUALITY_REPORT)


def note(news: Sequence[str]) -> None:
    """Tell the user."""
    for text in news:
        print(f"Note: {text}", file=sys.stderr)


def run_info(
    settings: Settings, cohort: Cohort, notes: Sequence[str], citation: Citation, shown: Mapping[str, Any],
    log: str = "CITATION_group",
) -> RunInfo:  # fmt: skip
    """Write the logs; return what a page says of the run, `shown` among its settings."""
    write_group_logs(settings, citation, log)
    shown, sloppy = {"level": "group", **shown}, bool(cohort.source.get("sloppy"))
    return RunInfo(citation.methods, cohort.left_out, notes, cohort.source, shown, package_versions(), sloppy=sloppy)


def _write(path: Path, table: pd.DataFrame) -> None:
    """Write a table and its sidecar; columns that are not in ``columns.tsv`` are volumes and their SDs."""
    write_table(table, path)
    known = names.table_columns(f"group_{path.stem}")
    volume, sd = known.get("volume_mean"), known.get("volume_sd")
    columns = {name: known.get(name, sd if name.endswith("_sd") else volume) for name in table}
    sidecar = describe_columns({name: column for name, column in columns.items() if column})
    write_json(sidecar, path.with_suffix(".json"))


def _describe_images(cohort: Cohort, volumes: np.ndarray, verdicts: pd.DataFrame) -> pd.DataFrame:
    """Row per image, see `quality_page`."""
    distances, deviations = robust_distances(volumes.mean(axis=1))
    images = cohort.people.rename(columns={"observation": "image"})[["participant_id", "session_id", "image"]]
    is_caution = (verdicts["verdict"] == "caution") & verdicts["has_own"]
    are = {name: verdicts["verdict"] == name for name in ("unreliable", "unknown")} | {"caution": is_caution}
    counts = {f"n_{name}": images["image"].map(rows.groupby(verdicts["image"]).sum()) for name, rows in are.items()}
    doubtful = verdicts[are["unreliable"] | is_caution]
    worst = doubtful.sort_values(["verdict", "cv"], ascending=False).groupby("image")["name"].agg(list).to_dict()
    odd = np.nan_to_num(np.abs(deviations)).argmax(axis=1)
    return images.assign(
        **counts,
        distance=distances,
        worst=[some(worst.get(image, []), shown=2) for image in images["image"]],
        odd=np.array(cohort.names)[odd],
        deviation=deviations[np.arange(len(odd)), odd],
    )


def _describe_structures(cohort: Cohort, volumes: np.ndarray, verdicts: pd.DataFrame) -> pd.DataFrame:
    """Row per structure, see `quality_page`."""
    table = pd.DataFrame({"name": cohort.names, "mean": volumes.mean(axis=(0, 1))})
    limits = LIMITS.drop_duplicates("name").set_index("name")[["low", "high"]]  # of adults of any age
    table = table.join(limits, on=table["name"].str.removeprefix("Left-").str.removeprefix("Right-"))
    outside = (verdicts["volume_mean"] < verdicts["volume_low"]) | (verdicts["volume_mean"] > verdicts["volume_high"])
    table["n_outside"] = table["name"].map(outside.groupby(verdicts["name"]).sum())
    table["unreliable"] = table["name"].map((verdicts["verdict"] == "unreliable").groupby(verdicts["name"]).mean())
    if cohort.members is None:
        return table.assign(cv=np.nan, npv=np.nan)
    enough = cohort.people["participant_id"].nunique() >= MIN_PEOPLE
    return table.assign(
        cv=np.sqrt(volumes.var(axis=1, ddof=1).mean(axis=0)) / table["mean"],
        npv=numerical_variability(cohort)["npv"] if enough else np.nan,
    )


def _find_changes(bids_dir: Path, cohort: Cohort, volumes: np.ndarray, notes: list[str]) -> pd.DataFrame:
    """`paired_changes` of participants with several sessions, with the days between them."""
    sessions = cohort.people.dropna(subset=["session_id"]).groupby("participant_id", sort=False)["session_id"].unique()
    days = {who: order_sessions(bids_dir, who, labels) for who, labels in sessions.items() if len(labels) > 1}
    if undated := [who for who, since in days.items() if np.isnan([*since.values()]).any()]:
        notes.append(
            "Sessions without one legible date (acq_time in *_sessions.tsv or *_scans.tsv, such as 2021-03-14) "
            f"are in the order of their labels: {some(undated)}. Check that this is their order in time."
        )
    changes = paired_changes(cohort.people, cohort.names, volumes, {who: list(since) for who, since in days.items()})
    if len(changes):
        at = zip(changes["participant_id"], changes["session_id"], strict=True)
        changes.insert(3, "days", [days[who][session] for who, session in at])
    return changes
