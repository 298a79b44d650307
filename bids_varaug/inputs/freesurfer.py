"""Tables of volumes (``*.stats``) of FreeSurfer and FastSurfer."""

from __future__ import annotations

import re
from pathlib import Path

from bids_varaug.errors import UserError

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
