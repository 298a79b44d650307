"""Repeated runs of another pipeline: FreeSurfer-style stats directories, or a table of members."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd

from bids_varaug.brainage.cohort import Cohort
from bids_varaug.errors import NoInputError, UserError

ASEG = "aseg.stats"
COLUMN_HEADERS = "# ColHeaders"
# FreeSurfer's own table leaves out cortex and cerebral white matter; these lines have them.
MEASURES = {
    "lhCortexVol": "Left-Cerebral-Cortex",
    "rhCortexVol": "Right-Cerebral-Cortex",
    "lhCerebralWhiteMatterVol": "Left-Cerebral-White-Matter",
    "rhCerebralWhiteMatterVol": "Right-Cerebral-White-Matter",
    "lhCorticalWhiteMatterVol": "Left-Cerebral-White-Matter",  # until FreeSurfer 5
    "rhCorticalWhiteMatterVol": "Right-Cerebral-White-Matter",
}
RENAMED = {"Left-Thalamus-Proper": "Left-Thalamus", "Right-Thalamus-Proper": "Right-Thalamus"}
SUBJECT = re.compile(r"sub-[0-9a-zA-Z+]+")
SESSION = re.compile(r"ses-[0-9a-zA-Z+]+")
KEYS = ("participant_id", "session_id", "member")


def read_repeated_runs(path: Path) -> Cohort:
    """Volumes of repeated runs of another pipeline on the same images.

    Parameters
    ----------
    path : Path
        A folder with ``aseg.stats`` files, several per person: ``sub-01[/ses-1]/run-1/stats/
        aseg.stats``, or any folders of which one names the person (``sub-...``; without such, the
        first folder is the person). Or a table (``.tsv``, or a folder with just one), with columns
        participant_id, optional session_id, member, and features in mm3.

    Returns
    -------
    Cohort
        Without ages. Runs are the members, in the order of their names; people with fewer runs
        than others have NaN for the rest; those with a single run are in `left_out`. Only
        structures that every run has are kept. `baseline` is the mean of the runs.

    Raises
    ------
    NoInputError
        If there is neither.
    UserError
        If a file is damaged, lacks columns, repeats a run, or nobody has two runs.
    """
    path = Path(path)
    if path.is_file():
        return _cohort(_read_members_table(path), path)
    if not path.is_dir():
        raise NoInputError(f"{path}: no such folder or table. Give --compare NAME=DIR.")
    stats = sorted(path.rglob(ASEG))
    if stats:
        return _cohort(pd.DataFrame([_stats_row(file, path) for file in stats]), path)
    tables = sorted(path.glob("*.tsv"))
    if len(tables) == 1:
        return _cohort(_read_members_table(tables[0]), tables[0])
    raise NoInputError(
        f"{path}: no {ASEG} in any folder below, and {len(tables)} tables (*.tsv) instead of one. "
        "Give a folder with sub-*/run-*/stats/aseg.stats, or a table with the columns "
        "participant_id, member and one per structure."
    )


def read_minimum_dice_csv(path: Path) -> pd.DataFrame:
    """Minimum Dice over repeated runs, as papers publish it: a row per person, a column per region.

    Parameters
    ----------
    path : Path
        With commas; regions by FreeSurfer's names, and a column of ids (not numbers, or called
        ``subjectID``).

    Returns
    -------
    one row per region, the columns of `population.compare_pipelines`
        name, dice_min (mean over people), n_participants; ratio and cv are NaN

    Raises
    ------
    UserError
        If it cannot be read, or holds anything but Dice coefficients.
    """
    try:
        table = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a table with commas ({error}).") from error
    dice = table.drop(columns="subjectID", errors="ignore").select_dtypes("number")
    dice = dice.rename(columns=RENAMED).dropna(axis=1, how="all")
    if dice.empty or not (dice.isna() | ((dice >= 0) & (dice <= 1))).all(axis=None):
        raise UserError(
            f"{path}: no table of minimum Dice (a row per person, a column per region, values from "
            "0 to 1). Repeated runs of volumes are a table with tabs, .tsv."
        )
    return pd.DataFrame(
        {"name": dice.columns, "dice_min": dice.mean().to_numpy(), "ratio": np.nan, "cv": np.nan,
         "n_participants": dice.notna().sum().to_numpy()}
    )  # fmt: skip


def read_aseg_stats(path: Path) -> dict[str, float]:
    """Volumes [mm3] of one FreeSurfer or FastSurfer ``aseg.stats``, by structure.

    Cortex and cerebral white matter come from the ``# Measure`` lines, where there are such; in
    FreeSurfer these are measured from the surfaces, not by counting voxels.

    Raises
    ------
    UserError
        If the file cannot be read, or has no complete table.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from error
    header = next((line for line in lines if line.startswith(COLUMN_HEADERS)), None)
    columns = header.removeprefix(COLUMN_HEADERS).split() if header else []
    if "StructName" not in columns or "Volume_mm3" not in columns:
        raise UserError(
            f"{path}: no line '{COLUMN_HEADERS}' with StructName and Volume_mm3, so this is no "
            "aseg.stats, or only the beginning of one. Run that pipeline again for this image."
        )
    name_at, volume_at = columns.index("StructName"), columns.index("Volume_mm3")
    volumes = {}
    for number, line in enumerate(lines, start=1):
        fields = line.split()
        try:
            if line.startswith("# Measure"):
                _, short, _, value, _ = (part.strip() for part in line.split(","))
                if short in MEASURES:
                    volumes[MEASURES[short]] = float(value)
            elif fields and not line.startswith("#"):
                name = RENAMED.get(fields[name_at], fields[name_at])
                # The table's own value wins over a measure: it is a count of voxels.
                volumes[name] = float(fields[volume_at])
        except (ValueError, IndexError) as error:
            raise UserError(
                f"{path}, line {number}: {line.strip()[:60]!r} is not a complete line of the "
                "table. Run that pipeline again for this image."
            ) from error
    if not volumes:
        raise UserError(f"{path}: the table of structures is empty.")
    return volumes


def _stats_row(file: Path, root: Path) -> dict[str, object]:
    parts = list(file.relative_to(root).parts[:-1])
    if parts and parts[-1] == "stats":
        parts.pop()
    text = "/".join(parts)
    subject, session = SUBJECT.search(text), SESSION.search(text)
    if not parts:
        raise UserError(
            f"{file}: belongs to nobody. Give the folder above, with a folder per person and run."
        )
    return {
        "participant_id": subject[0] if subject else parts[0],
        "session_id": session[0] if session else None,
        "member": text,
        **read_aseg_stats(file),
    }


def _read_members_table(path: Path) -> pd.DataFrame:
    try:
        table = pd.read_csv(path, sep="\t", na_values="n/a", dtype={key: str for key in KEYS})
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a table with tabs ({error}).") from error
    missing = [key for key in ("participant_id", "member") if key not in table]
    if missing:
        raise UserError(
            f"{path}: no column {' and '.join(missing)}. A table of repeated runs has the "
            "columns participant_id, member and one per structure."
        )
    incomplete = table["participant_id"].isna() | table["member"].isna()
    if incomplete.any():
        raise UserError(
            f"{path}, line {int(np.flatnonzero(incomplete)[0]) + 2}: participant_id or member is "
            "missing."
        )
    if "session_id" not in table:
        table["session_id"] = None
    texts = [c for c in table if c not in KEYS and not pd.api.types.is_numeric_dtype(table[c])]
    if texts:
        raise UserError(
            f"{path}: column {texts[0]} is not numeric. Remove it, or mend its values; missing "
            "ones are n/a."
        )
    return table


def _cohort(table: pd.DataFrame, path: Path) -> Cohort:
    """Runs of a person stacked as members."""
    table = table.assign(session_id=table["session_id"].fillna(""))
    keys = ["participant_id", "session_id"]
    repeated = table.duplicated([*keys, "member"])
    if repeated.any():
        row = table[repeated].iloc[0]
        raise UserError(
            f"{path}: run {row['member']} of {row['participant_id']} is there twice. Remove one."
        )
    names = [c for c in table.columns if c not in KEYS and table[c].notna().all()]
    if not names:
        raise UserError(f"{path}: no structure has a volume in every run.")
    people, stacks, left_out = [], [], {}
    for (participant, session), runs in table.groupby(keys, sort=True):
        observation = "_".join(filter(None, (participant, session)))
        if len(runs) < 2:
            left_out[observation] = f"one run in {path}, which has no spread"
            continue
        stacks.append(runs.sort_values("member")[names].to_numpy(np.float64))
        people.append(
            {"participant_id": participant, "session_id": session or None}
            | {"observation": observation, "age": np.nan, "sex": None, "site": None}
        )
    if not stacks:
        raise UserError(
            f"{path}: nobody has two runs, so there is no spread to compare. Numerical variability "
            "needs the same image processed several times."
        )
    n_runs = max(len(stack) for stack in stacks)
    members = np.full((len(stacks), n_runs, len(names)), np.nan)
    for row, stack in enumerate(stacks):
        members[row, : len(stack)] = stack
    return Cohort(
        people=pd.DataFrame(people),
        names=tuple(names),
        baseline=np.nanmean(members, axis=1),
        members=members,
        member_ids=tuple(f"run{number:02d}" for number in range(1, n_runs + 1)),
        left_out=left_out,
        source={"table": path.name},
        unit="mm3",
    )
