"""Repeated runs of another pipeline: FreeSurfer-style stats directories, or a table of members."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd

from bids_varaug.brainage.cohort import Cohort
from bids_varaug.errors import NoInputError, UserError
from bids_varaug.inputs.freesurfer import find_stats, read_aseg_stats
from bids_varaug.inputs.matching import plain_label

SUBJECT = re.compile(r"sub-[0-9a-zA-Z+]+")
SESSION = re.compile(r"ses-[0-9a-zA-Z+]+")
KEYS = ("participant_id", "session_id", "member")


def read_repeated_runs(path: Path) -> Cohort:
    """Volumes of repeated runs of another pipeline on the same images.

    `path` is a folder with tables of FreeSurfer or FastSurfer (``aseg.stats``, ``aseg+DKT.stats``, or others of
    volumes; one kind is read), several per person: ``sub-01[/ses-1]/run-1/stats/aseg.stats``, or any folders of which
    one names the person (``sub-...``; without such, the first folder is the person). Or a table (``.tsv``, or a folder
    with just one), with columns participant_id, optional session_id, member, and features in mm3.

    The cohort has no ages. Runs are the members, in the order of their names; people with fewer runs than others have
    NaN for the rest; those with a single run are in `left_out`. Only structures that every run has are kept. A
    UserError says that there is neither; that a file is damaged, lacks columns, repeats a run, or spells a person in
    two ways; or that nobody has two runs.
    """
    path = Path(path)
    if path.suffix == ".stats":
        raise UserError(f"{path}: one run has no spread. Give the folder above those of all people and runs.")
    if not path.exists():
        raise NoInputError(f"{path}: no such folder or table. Give --compare NAME=DIR.")
    if path.is_dir():
        if stats := find_stats(path):
            return _cohort(pd.DataFrame([_stats_row(files, path) for files in stats]), path)
        tables = sorted(path.glob("*.tsv"))
        if len(tables) != 1:
            raise NoInputError(
                f"{path}: no aseg.stats or aseg+DKT.stats in any folder below, and {len(tables)} tables (*.tsv), not "
                "one. Give a folder with sub-*/run-*/stats/aseg.stats, or a table with the columns participant_id, "
                "member and one per structure."
            )
        path = tables[0]
    return _cohort(_read_members_table(path), path)


def _stats_row(files: list[Path], root: Path) -> dict[str, object]:
    parts = files[0].relative_to(root).parts[:-1]
    parts = parts[:-1] if parts[-1:] == ("stats",) else parts
    if not parts:
        raise UserError(f"{files[0]}: belongs to nobody. Give the folder above, with a folder per person and run.")
    text = "/".join(parts)
    subject, session = SUBJECT.search(text), SESSION.search(text)
    volumes = {name: volume for file in files for name, volume in read_aseg_stats(file).items()}
    ids = (subject[0] if subject else parts[0], session[0] if session else None, text)
    return {**dict(zip(KEYS, ids, strict=True)), **volumes}


def _read_members_table(path: Path) -> pd.DataFrame:
    try:
        table = pd.read_csv(path, sep="\t", na_values="n/a", dtype=dict.fromkeys(KEYS, str))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a table with tabs ({error}).") from error
    missing = [key for key in ("participant_id", "member") if key not in table]
    if missing:
        raise UserError(
            f"{path}: no column {' and '.join(missing)}. A table of repeated runs has the columns participant_id, "
            "member and one per structure."
        )
    incomplete = table[["participant_id", "member"]].isna().any(axis=1)
    if incomplete.any():
        raise UserError(f"{path}, line {incomplete.argmax() + 2}: participant_id or member is missing.")
    texts = [c for c in table if c not in KEYS and not pd.api.types.is_numeric_dtype(table[c])]
    if texts:
        raise UserError(
            f"{path}: column {texts[0]} is not numeric. Remove it, or correct its values; missing ones are n/a."
        )
    return table if "session_id" in table else table.assign(session_id=None)


def _cohort(table: pd.DataFrame, path: Path) -> Cohort:
    """Runs of a person stacked as members."""
    table = table.assign(session_id=table["session_id"].fillna(""))
    keys = ["participant_id", "session_id"]
    repeated = table.duplicated([*keys, "member"])
    if repeated.any():
        row = table[repeated].iloc[0]
        raise UserError(f"{path}: run {row['member']} of {row['participant_id']} is there twice. Remove one.")
    unlike = pd.Series(table["participant_id"].unique())
    unlike = unlike[unlike.map(plain_label).duplicated(keep=False)]
    if len(unlike):
        raise UserError(
            f"{path}: {' and '.join(sorted(unlike, key=plain_label)[:2])}: one person in two spellings? Write the ids "
            "of all runs of a person alike."
        )
    names = [c for c in table.columns if c not in KEYS and table[c].notna().all()]
    if not names:
        raise UserError(f"{path}: no structure has a volume in every run.")
    table = table.sort_values([*keys, "member"])
    table["run"] = table.groupby(keys).cumcount()
    runs = table.groupby(keys)["run"].transform("size")
    single = table.loc[runs < 2, keys].agg(lambda row: "_".join(filter(None, row)), axis=1)
    left_out = dict.fromkeys(single, f"one run in {path}, which has no spread")
    wide = table[runs > 1].pivot(index=keys, columns="run", values=names)
    if wide.empty:
        raise UserError(
            f"{path}: nobody has two runs, so there is no spread to compare. Numerical variability needs the same "
            "image processed several times."
        )
    members = wide.to_numpy(np.float64).reshape(len(wide), len(names), -1).transpose(0, 2, 1).copy()
    people = [(person, session or None, "_".join(filter(None, (person, session)))) for person, session in wide.index]
    frame = pd.DataFrame(people, columns=[*keys, "observation"], dtype=object).assign(age=np.nan, sex=None, site=None)
    ids = tuple(f"run{number:02d}" for number in range(1, members.shape[1] + 1))
    baseline = np.nanmean(members, axis=1)
    return Cohort(frame, tuple(names), baseline, members, ids, left_out, {"table": path.name}, unit="mm3")
