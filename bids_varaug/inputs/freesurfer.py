"""Tables of FreeSurfer and FastSurfer: volumes (``*.stats``), and minimum Dice as papers publish it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd

from bids_varaug.errors import UserError

# Of several tables in a folder, the first that most folders have: the final one of FreeSurfer and FastSurfer, then
# those of FastSurfer's segmentation alone, then any other of volumes.
STATS = ("aseg.stats", "aseg+DKT.stats", "aseg+DKT.VINN.stats", "aseg.VINN.stats")
_STATS = re.compile(r"(?P<side>[lr]h)?\.?(?P<kind>(?:aseg|aparc)[\w.+-]*\.stats)")
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


def read_aseg_stats(path: Path) -> dict[str, float]:
    """Volumes [mm3] of one table of FreeSurfer or FastSurfer, by structure.

    Cortex and cerebral white matter come from the ``# Measure`` lines, where there are such; in FreeSurfer these are
    measured from the surfaces, not by counting voxels. The cortex of a table of parcels (``aseg+DKT.stats``,
    ``lh.aparc.DKTatlas.stats``) is their sum. A UserError says that the file cannot be read, or has no complete table.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from error
    header = next((line for line in lines if line.startswith(COLUMN_HEADERS)), COLUMN_HEADERS)
    columns = header.removeprefix(COLUMN_HEADERS).split()
    volume_at = next((columns.index(c) for c in ("Volume_mm3", "GrayVol") if c in columns), None)
    if "StructName" not in columns or volume_at is None:
        raise UserError(
            f"{path}: no line '{COLUMN_HEADERS}' with StructName and Volume_mm3, so this is no aseg.stats, or only the "
            "beginning of one. Run that pipeline again for this image."
        )
    name_at, side = columns.index("StructName"), re.match(r"[lr]h(?=\.)", Path(path).name)
    volumes = {}
    for number, line in enumerate(lines, start=1):
        fields = line.split()
        try:
            if line.startswith("# Measure"):
                _, short, _, value, _ = (part.strip() for part in line.split(","))
                if short in MEASURES:
                    volumes[MEASURES[short]] = float(value)
            elif fields and not line.startswith("#"):
                name = f"ctx-{side[0]}-{fields[name_at]}" if side else fields[name_at]
                # The table's own value replaces a measure: it is a count of voxels.
                volumes[RENAMED.get(name, name)] = float(fields[volume_at])
        except (ValueError, IndexError) as error:
            raise UserError(
                f"{path}, line {number}: {line.strip()[:60]!r} is not a complete line of the table. Run that pipeline "
                "again for this image."
            ) from error
    if not volumes:
        raise UserError(f"{path}: the table of structures is empty.")
    for hemisphere, cortex in (("lh", "Left-Cerebral-Cortex"), ("rh", "Right-Cerebral-Cortex")):
        parcels = [v for name, v in volumes.items() if name.startswith(f"ctx-{hemisphere}-")]
        if parcels:
            volumes[cortex] = sum(parcels)
    return volumes


def find_stats(root: Path) -> list[list[Path]]:
    """Tables of one kind, by folder; a folder may have one for each hemisphere."""
    kinds: dict[str, dict[Path, list[Path]]] = {}
    for file in sorted(root.rglob("*.stats")):
        if found := _STATS.fullmatch(file.name):
            kinds.setdefault(found["kind"], {}).setdefault(file.parent, []).append(file)
    most = max(map(len, kinds.values()), default=0)
    order = [kind for kind in (*STATS, *sorted(kinds)) if 2 * len(kinds.get(kind, ())) >= most]
    return list(kinds[order[0]].values()) if kinds else []


def read_minimum_dice_csv(path: Path) -> pd.DataFrame:
    """Minimum Dice over repeated runs, as papers publish it: a row per person, a column per region.

    Regions have FreeSurfer's names; a column of ids is not numbers, or called ``subjectID``. Returns a row per region,
    the columns of `variability.compare_pipelines`: name, dice_min (mean over people), n_participants; ratio and cv are
    NaN. A UserError says that it cannot be read, or holds anything but Dice coefficients.
    """
    try:
        table = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a table with commas ({error}).") from error
    dice = table.drop(columns="subjectID", errors="ignore").select_dtypes("number")
    dice = dice.rename(columns=RENAMED).dropna(axis=1, how="all")
    if dice.empty or not (dice.isna() | ((dice >= 0) & (dice <= 1))).all(axis=None):
        raise UserError(
            f"{path}: no table of minimum Dice (a row per person, a column per region, values from 0 to 1). Repeated "
            "runs of volumes are a table with tabs, .tsv."
        )
    found = dice.agg(["mean", "count"]).T.rename_axis("name").reset_index()
    return found.rename(columns={"mean": "dice_min", "count": "n_participants"}).assign(ratio=np.nan, cv=np.nan)
