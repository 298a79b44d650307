"""Labels and volumes as FreeSurfer keeps them, for programs that read its subjects directory."""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import cast

import nibabel as nib
import numpy as np
import pandas as pd

from bids_varaug import __version__
from bids_varaug.derivatives.io import COMPRESSION, write_table
from bids_varaug.derivatives.names import BRAIN_VOLUMES, ScanRequest
from bids_varaug.derivatives.sidecars import SLOPPY_NOTE
from bids_varaug.errors import UsageError
from bids_varaug.files import replacing, write_text
from bids_varaug.inputs.freesurfer import COLUMN_HEADERS
from bids_varaug.inputs.scans import Scan
from bids_varaug.inputs.tables import some
from bids_varaug.models.ensemble import Label
from bids_varaug.models.fastsurfer_labels import LEFT_TO_RIGHT

_OURS = "# generating_program bids_varaug"
_VENTRICLES = r"(?:.*-)?(?:(?:Lateral|3rd|4th)-Ventricle|Inf-Lat-Vent)"
_SUBCORTICAL = r".*-(?:Thalamus|Caudate|Putamen|Pallidum|Hippocampus|Amygdala|Accumbens-area|VentralDC)"
# As mri_segstats writes them, with the structures that each is the sum of. FreeSurfer measures cortex and white matter
# from surfaces.
_MEASURES = {
    "BrainSeg, BrainSegVol, Brain Segmentation Volume": r"(?!Brain-Stem).*",
    "BrainSegNotVent, BrainSegVolNotVent, Brain Segmentation Volume Without Ventricles":
        rf"(?!Brain-Stem|{_VENTRICLES}$).*",
    "lhCortex, lhCortexVol, Left hemisphere cortical gray matter volume": "Left-Cerebral-Cortex",
    "rhCortex, rhCortexVol, Right hemisphere cortical gray matter volume": "Right-Cerebral-Cortex",
    "Cortex, CortexVol, Total cortical gray matter volume": ".*-Cerebral-Cortex",
    "lhCerebralWhiteMatter, lhCerebralWhiteMatterVol, Left hemisphere cerebral white matter volume":
        "Left-Cerebral-White-Matter",
    "rhCerebralWhiteMatter, rhCerebralWhiteMatterVol, Right hemisphere cerebral white matter volume":
        "Right-Cerebral-White-Matter",
    "CerebralWhiteMatter, CerebralWhiteMatterVol, Total cerebral white matter volume": ".*-Cerebral-White-Matter",
    "SubCortGray, SubCortGrayVol, Subcortical gray matter volume": _SUBCORTICAL,
    "TotalGray, TotalGrayVol, Total gray matter volume": rf"{_SUBCORTICAL}|.*-Cortex",
}  # fmt: skip
_FLUID = rf"{_VENTRICLES}|.*-choroid-plexus|CSF"
_BELOW = r"Brain-Stem|.*-Cerebellum-(?:White-Matter|Cortex)"  # the tentorium
# FastSurfer has no measure of the cortex, and counts hypointensities to the white matter of their side.
_FASTSURFER_MEASURES = {
    text: pattern for text, pattern in _MEASURES.items() if "Cortex" not in text and "TotalGray" not in text
} | {
    "BrainSegNotVent, BrainSegVolNotVent, Brain Segmentation Volume Without Ventricles":
        rf"(?!(?:Brain-Stem|{_FLUID})$).*",
    "SupraTentorial, SupraTentorialVol, Supratentorial volume": rf"(?!(?:{_BELOW})$).*",
    "SupraTentorialNotVent, SupraTentorialVolNotVent, Supratentorial volume without ventricles":
        rf"(?!(?:{_BELOW}|{_FLUID})$).*",
}  # fmt: skip
_HYPOINTENSITIES = 77
_LEFT_OUT = r".*-Cerebral-(?:Cortex|White-Matter)"  # of the table, as FreeSurfer does: they are among the measures
_COLUMNS = (
    ("Index", "Index", "NA"), ("SegId", "Segmentation Id", "NA"), ("NVoxels", "Number of Voxels", "unitless"),
    ("Volume_mm3", "Volume", "mm^3"), ("StructName", "Structure Name", "NA"), ("normMean", "Intensity normMean", "MR"),
    ("normStdDev", "Intensity normStdDev", "MR"), ("normMin", "Intensity normMin", "MR"),
    ("normMax", "Intensity normMax", "MR"), ("normRange", "Intensity normRange", "MR"),
)  # fmt: skip


def check_subjects(subjects_dir: Path, scans: Iterable[Scan]) -> None:
    """Refuse to write beside files of another program; `UsageError` says whose folders have such."""
    foreign: dict[str, Path] = {}
    for scan in scans:
        folder = subjects_dir / scan.prefix
        if theirs := [path.relative_to(folder) for path in sorted(folder.rglob("*")) if _is_foreign(path)]:
            foreign[scan.prefix] = theirs[0]
    if foreign:
        raise UsageError(
            f"--freesurfer-dir {subjects_dir}: another program made {next(iter(foreign.values()))} of "
            f"{some(list(foreign))}. Choose another folder."
        )


def _is_foreign(path: Path) -> bool:
    if path.name in ("aseg.stats", "aseg+DKT.stats"):
        return _OURS not in path.read_text("utf-8", errors="replace")
    return path.is_file() and "varaug" not in path.name


def write_freesurfer(
    request: ScanRequest, labels: np.ndarray, affine: np.ndarray, t1w: np.ndarray, regions: pd.DataFrame,
    brain_volumes: Mapping[str, float],
) -> list[Path]:  # fmt: skip
    """Write a scan into the subjects directory of the settings; return the files.

    ``mri/aseg.varaug.mgz`` has the consensus `labels` (X, Y, Z) of the T1w's own grid, ``stats/aseg.stats`` what
    FreeSurfer measures of them and of the intensities `t1w`, ``stats/aseg.varaug.tsv`` the table of `regions`.
    `brain_volumes` are the `BRAIN_VOLUMES` [mm3]. Raises as `check_subjects`.
    """
    measures = _measures(_MEASURES, regions.set_index("name")["volume_mean"])
    measures["Mask, MaskVol, Mask Volume"] = brain_volumes["brain_mask"]
    shown = regions[~regions["name"].str.fullmatch(_LEFT_OUT)].rename(columns={"volume_mean": "volume"})
    about = f"""Volumes are means over the members of the ensemble; their spread is in aseg.varaug.tsv. Cortex and white
# matter are counts of voxels. Intensities are those of the T1w image as it is.
# MaskVol: {BRAIN_VOLUMES["brain_mask"].description}
# Excluding Cortical Gray and White Matter"""
    return _write_subject(request, "aseg", labels, affine, t1w, regions, measures, shown, about)


def write_fastsurfer(request: ScanRequest, labels: np.ndarray, affine: np.ndarray, regions: pd.DataFrame) -> list[Path]:
    """Write a scan that FastSurfer's networks segmented into the subjects directory of the settings, as FastSurfer.

    ``mri/aparc.DKTatlas+aseg.varaug.mgz`` has the consensus `labels` (N, N, N) of FastSurfer's grid, of the affine,
    ``stats/aseg+DKT.stats`` their volumes, corrected for partial volume, and ``stats/aseg+DKT.varaug.tsv`` the table of
    `regions`. The intensities that decide about partial volume are those of the conformed T1w image; FastSurfer takes
    them after a correction of the bias field. Raises as `check_subjects`.
    """
    from bids_varaug.images.fastsurfer import conform  # with torch, as those below
    from bids_varaug.images.load import read_t1w, voxel_volume
    from bids_varaug.segmentation.fastsurfer import brain_mask
    from bids_varaug.segmentation.partial_volume import corrected_volumes

    stored, settings = read_t1w(request.scan.path, request.settings.trust), request.settings
    image, _ = conform(stored.values, stored.affine, stored.sizes, stored.data.dtype, settings.whole_voxels)
    voxel, shown = voxel_volume(affine), regions[["index", "name"]]
    shown = shown.assign(volume=corrected_volumes(labels, image, shown["index"].tolist()) * voxel)
    measures = fastsurfer_measures(shown.set_index("name")["volume"], labels, voxel)
    measures["Mask, MaskVol, Mask Volume"] = float(np.count_nonzero(brain_mask(labels))) * voxel
    about = """Volumes are those of the consensus labels on FastSurfer's grid, corrected for partial volume. The spread
# of the members is in aseg+DKT.varaug.tsv, where volumes are counts of voxels.
# Intensities, of partial volume too, are those of the T1w image, conformed by FastSurfer's rules and not corrected for
# the bias field. FastSurfer takes orig_nu.mgz: corrected by N4, with white matter scaled to 105.
# MaskVol: FastSurfer's mask, of the labels grown by five voxels and shrunk by four"""
    return _write_subject(request, "aseg+DKT", labels, affine, image, regions, measures, shown, about)


def fastsurfer_measures(volumes: pd.Series, labels: np.ndarray, voxel: float) -> dict[str, float]:
    """Return what FastSurfer writes above its table, but for the mask: text of the line -> mm3.

    `volumes` [mm3] are those of all structures by name; `labels` (X, Y, Z) are FreeSurfer's ids, voxels are of `voxel`
    mm3.
    """
    from bids_varaug.segmentation.partial_volume import left_voxels

    measures, both = _measures(_FASTSURFER_MEASURES, volumes), int(np.count_nonzero(labels == _HYPOINTENSITIES))
    left = left_voxels(labels, _HYPOINTENSITIES, tuple(LEFT_TO_RIGHT))
    counts = {"lh": left, "rh": both - left, "": both}
    for text in measures:
        measures[text] += voxel * counts.get(text.partition("CerebralWhiteMatter")[0], 0)
    return measures


def _measures(patterns: Mapping[str, str], volumes: pd.Series) -> dict[str, float]:
    parts = {text: volumes[volumes.index.str.fullmatch(pattern)] for text, pattern in patterns.items()}
    return {text: float(part.sum()) for text, part in parts.items() if len(part)}


def _write_subject(
    request: ScanRequest, kind: str, labels: np.ndarray, affine: np.ndarray, image: np.ndarray, regions: pd.DataFrame,
    measures: Mapping[str, float], shown: pd.DataFrame, about: str,
) -> list[Path]:  # fmt: skip
    """Write labels, statistics of the structures `shown` (index, name, volume), regions and colours.

    `kind` begins the names of the statistics.
    """
    from bids_varaug.images.load import voxel_volume  # with torch, which the main process does without

    root = cast(Path, request.settings.freesurfer_dir)
    check_subjects(root, [request.scan])
    subject, color_file = root / request.scan.prefix, root / f"{kind}.varaug.LUT.txt"
    volume = subject / "mri" / f"{kind.replace('aseg+DKT', 'aparc.DKTatlas+aseg')}.varaug.mgz"
    # No name and no time in gzip's header, for equal bytes.
    with replacing(volume) as raw, gzip.GzipFile("", "wb", COMPRESSION, raw, mtime=0) as stream:
        stream.write(nib.MGHImage(labels, affine).to_bytes())
    head = f"""# Title Segmentation Statistics
#
{_OURS}
# cvs_version bids_varaug {__version__}
# anatomy_type volume
#
# subjectname {request.scan.prefix}
{_lines("# Measure {}, {:f}, mm^3", measures.items())}
# {about}
# {SLOPPY_NOTE if request.settings.sloppy else ""}
# SegVolFile {volume.relative_to(subject)}
# ColorTable {color_file.name}
# InVolFile {request.scan.relative}
# VoxelVolume_mm3 {voxel_volume(affine):g}
"""
    rows = _rows(labels, image, shown)
    for number, (column, field, unit) in enumerate(_COLUMNS, start=1):
        head += f"# TableCol {number:2d} ColHeader {column}\n# TableCol {number:2d} FieldName {field}\n"
        head += f"# TableCol {number:2d} Units     {unit}\n"
    names = " ".join(column for column, _, _ in _COLUMNS)
    head += f"# NRows {len(rows)}\n# NTableCols {len(_COLUMNS)}\n{COLUMN_HEADERS}  {names}\n"
    table = _lines("{:3d} {:3d}  {:8d} {:10.3f}  {:30s} {:10.4f} {:10.4f} {:10.4f} {:10.4f} {:10.4f}", rows)
    return [
        volume,
        write_text(f"{head}{table}\n", subject / "stats" / f"{kind}.stats"),
        write_table(regions, subject / "stats" / f"{kind}.varaug.tsv"),
        write_text(color_table(request.ensemble.labels), color_file),
    ]


def _rows(labels: np.ndarray, image: np.ndarray, shown: pd.DataFrame) -> list[tuple]:
    """Cells of the table of structures; intensities of one that no voxel has are 0."""
    inside = labels > 0
    voxels = pd.Series(np.asarray(image[inside], np.float64)).groupby(labels[inside])
    measured = voxels.agg(["count", "mean", "std", "min", "max"]).reindex(shown["index"]).fillna(0.0)
    return [
        (number, index, int(count), volume, name, mean, std, low, high, high - low)
        for number, (index, name, volume, (count, mean, std, low, high)) in enumerate(
            zip(shown["index"], shown["name"], shown["volume"], measured.to_numpy(), strict=True), start=1
        )
    ]


def color_table(labels: Iterable[Label]) -> str:
    """Labels in the form of ``FreeSurferColorLUT.txt``."""
    rows = [
        (label.index, label.name if label.index else "Unknown", *bytes.fromhex(label.color.removeprefix("#")), 0)
        for label in labels
    ]
    return f"#No. Label Name:{'':27s}R   G   B   A\n" + _lines("{:<4d} {:37s} {:3d} {:3d} {:3d} {:3d}", rows) + "\n"


def _lines(form: str, rows: Iterable[Iterable]) -> str:
    return "\n".join(form.format(*row) for row in rows)
