"""How much repeated runs of a pipeline differ: label images, scalar images, warps, affine matrices and tables.

The runs' files are matched by their paths within the run. Spread is over the runs under noise; a run without noise
(``ieee``) is left out of it, unless there are no others.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import nibabel as nib
import numpy as np
import pandas as pd
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import SpatialImage
from scipy.io import loadmat

from bids_varaug.errors import NoInputError, UserError
from bids_varaug.images.load import voxel_volume
from bids_varaug.inputs.freesurfer import read_aseg_stats
from bids_varaug.models.ensemble import BASELINE
from bids_varaug.variability.measures import (
    FLOAT32_BITS,
    FLOAT64_BITS,
    bits_within,
    general_bits,
    pairwise_dice,
    region_counts,
    significant_bits,
    vote_entropy,
)

IMAGES = (".nii", ".nii.gz", ".mgz", ".mgh")
MAX_LABELS = 256
TISSUES = 9  # up to here labels are those of tissues, whatever the program calls them
LABELS_NAMED = re.compile(r"dseg|aseg|aparc|parc|label|atropos|tissue|_seg\b|\bseg\b|wmparc|ribbon", re.IGNORECASE)
RADIUS = 80.0  # mm, of the sphere of `displacement_between`
COLUMNS = ("file", "kind", "name", "n", "mean", "sd", "sd_p95", "sd_max", "unit", "cv", "sigbits", "sigbits_general",
           "dice_min", "dice_mean")  # fmt: skip


@dataclass
class Comparison:
    """What repeated runs have in common, and how they differ."""

    runs: list[str]
    table: pd.DataFrame  # `COLUMNS`; one row per file, or per structure or column of it
    maps: dict[str, tuple[str, np.ndarray, np.ndarray]] = field(default_factory=dict)  # by file: kind, values, affine
    volumes: pd.DataFrame = field(default_factory=pd.DataFrame)  # member, structures [mm3]
    notes: list[str] = field(default_factory=list)


def find_runs(folders: Sequence[Path]) -> dict[str, Path]:
    """Runs by name: the folders, or those of `pipelines.runs` in the one folder; at least two without the baseline.

    Raises `NoInputError` or `UserError` otherwise.
    """
    for folder in folders:
        if not folder.is_dir():
            raise NoInputError(f"{folder}: no such folder. Give the folders of the runs, or the one that holds them.")
    if len(folders) == 1:
        inside = sorted(path for path in folders[0].iterdir() if path.is_dir() and path.name != "logs")
        folders = [path for path in inside if path.name != BASELINE]
    runs = {path.name: path for path in folders}
    if len(runs) < len(folders):  # out1/run, out2/run
        runs = {str(path): path for path in folders}
    if len(runs) < 2:
        raise UserError(f"{', '.join(map(str, folders))}: fewer than two runs. One run has no spread.")
    return runs


def compare_runs(runs: Mapping[str, Path], names: Mapping[int, str]) -> Comparison:
    """Compare all files that every run has; `names` are those of labels, in images with more than tissues.

    A file of a kind that is unknown, or damaged, is noted. `UserError` if nothing can be compared.
    """
    found = Comparison(list(runs), pd.DataFrame(columns=list(COLUMNS)))
    paths = {run: {p.relative_to(at): p for p in sorted(at.rglob("*")) if p.is_file()} for run, at in runs.items()}
    common = [path for path in next(iter(paths.values())) if all(path in files for files in paths.values())]
    if lost := sorted({str(path) for files in paths.values() for path in files} - set(map(str, common))):
        found.notes.append(f"Not in every run, left out: {', '.join(lost[:5])}{' ...' if len(lost) > 5 else ''}.")
    rows: list[dict[str, object]] = []
    for path in common:
        files = [files[path] for files in paths.values()]
        try:
            rows += [{"file": str(path), "n": len(files)} | row for row in _compare_file(path, files, names, found)]
        except (OSError, ValueError, ImageFileError, UserError) as error:
            found.notes.append(f"{path}: left out, {error}")
    if not rows:
        raise UserError(
            f"{', '.join(map(str, runs.values()))}: no images, affine matrices or tables that all runs have. "
            + " ".join(found.notes)
        )
    found.table = pd.DataFrame(rows).reindex(columns=list(COLUMNS))
    return found


def _compare_file(
    path: Path, files: Sequence[Path], names: Mapping[int, str], found: Comparison
) -> Iterator[dict[str, object]]:
    if path.name.endswith(IMAGES):
        yield from _compare_images(path, [cast(SpatialImage, nib.load(file)) for file in files], names, found)
    elif (matrices := [read_affine(file) for file in files]) and all(m is not None for m in matrices):
        yield _compare_affines([m for m in matrices if m is not None])
    elif path.suffix in (".stats", ".tsv", ".csv"):
        yield from _compare_tables([_read_table(file) for file in files], path, found.notes)


def _compare_images(
    path: Path, images: Sequence[SpatialImage], names: Mapping[int, str], found: Comparison
) -> Iterator[dict[str, object]]:
    first = images[0]
    if any(image.shape != first.shape or not np.allclose(image.affine, first.affine, atol=1e-4) for image in images):
        raise ValueError("the runs' images have different grids")
    if first.ndim == 5 or (first.ndim == 4 and first.shape[3] == 3):
        spread, row = _compare_vectors(images)
        found.maps[str(path)] = ("displacement", spread, first.affine)
        yield row
    elif _are_labels(path, first):
        entropy, rows = _compare_labels(images, names, found)
        found.maps[str(path)] = ("labels", entropy, first.affine)
        yield from rows
    elif first.ndim == 3:
        spread, row = _compare_scalars(images)
        found.maps[str(path)] = ("scalar", spread, first.affine)
        yield row


def _are_labels(path: Path, image: SpatialImage) -> bool:
    """Whether an image says so, or has whole numbers and a name that labels have."""
    header = image.header
    if getattr(header, "get_intent", lambda: ("",))()[0] == "label":
        return True
    data = np.asanyarray(image.dataobj)
    return bool(LABELS_NAMED.search(path.name) and data.ndim == 3 and np.array_equal(data, np.rint(data)))


def _compare_labels(
    images: Sequence[SpatialImage], names: Mapping[int, str], found: Comparison
) -> tuple[np.ndarray, list[dict[str, object]]]:
    """Vote entropy [bit], and a row for each label."""
    stack = [np.asanyarray(image.dataobj).astype(np.int32) for image in images]
    ids = np.unique(np.concatenate([np.unique(labels) for labels in stack] + [[0]]))
    if len(ids) > MAX_LABELS:
        raise ValueError(f"has {len(ids)} labels, more than {MAX_LABELS}")
    classes = np.stack([np.searchsorted(ids, labels).astype(np.uint8).ravel() for labels in stack])
    background = int(np.searchsorted(ids, 0))
    counts = region_counts([classes], len(images), len(ids))
    dice = pairwise_dice(counts)[np.triu_indices(len(images), 1)]
    differ = (classes != classes[0]).any(axis=0)
    votes = (classes[:, differ] == np.arange(len(ids), dtype=np.uint8)[:, None, None]).sum(axis=1, dtype=np.uint8)
    entropy = np.zeros(stack[0].shape, np.float32)
    entropy.ravel()[differ] = vote_entropy(votes, len(images)) if differ.any() else 0
    volumes = counts.volumes * voxel_volume(images[0].affine)
    rows = []
    for k in (k for k in range(len(ids)) if k != background):
        name = names.get(int(ids[k]), str(ids[k])) if ids.max() > TISSUES else str(ids[k])
        row = _spread_of(volumes[:, k], FLOAT32_BITS) | {"kind": "labels", "name": name, "unit": "mm3"}
        rows.append(row | {"dice_min": np.nanmin(dice[:, k]), "dice_mean": np.nanmean(dice[:, k])})
        found.volumes[name] = volumes[:, k]
    return entropy, rows


def _spread_of(values: np.ndarray, most: float) -> dict[str, object]:
    """Mean, SD and significant bits of (M,) values, of which these have so many at most."""
    shift = values - values[0]  # exactly 0 where all are equal
    mean, sd = values[0] + shift.mean(), shift.std(ddof=1)
    return {
        "mean": mean, "sd": sd, "cv": sd / abs(mean) if mean else np.nan,
        "sigbits": float(significant_bits(mean, sd, most)), "sigbits_general": float(general_bits(values)),
    }  # fmt: skip


def _bits_of(image: SpatialImage) -> float:
    """Significant bits that voxels have at most."""
    return FLOAT64_BITS if image.get_data_dtype() == np.float64 else FLOAT32_BITS


def _moments(images: Sequence[SpatialImage]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, SD and greatest distance from the mean, voxel by voxel; one image at a time in memory, read twice."""
    def load(image: SpatialImage) -> np.ndarray:
        data = np.asarray(image.dataobj, np.float64)
        image.uncache()
        return np.nan_to_num(data, posinf=0.0, neginf=0.0)

    first = load(images[0])
    shift = np.zeros_like(first)  # stays exactly 0 where all are equal
    for image in images[1:]:
        shift += load(image) - first
    mean = first + shift / len(images)
    squares, farthest = np.zeros_like(mean), np.zeros_like(mean)
    for image in images:
        distance = load(image) - mean
        squares += distance**2
        np.maximum(farthest, np.abs(distance), out=farthest)
    return mean, np.sqrt(squares / (len(images) - 1)), farthest


def _compare_scalars(images: Sequence[SpatialImage]) -> tuple[np.ndarray, dict[str, object]]:
    """SD in the image's units, and a row over the voxels whose mean is not 0."""
    mean, sd, farthest = _moments(images)
    inside = mean != 0
    if not inside.any():
        raise ValueError("is 0 everywhere")
    row = _over_voxels(sd[inside]) | {"kind": "scalar", "mean": mean[inside].mean(), "unit": "as stored"}
    row["sigbits"] = float(np.median(significant_bits(mean[inside], sd[inside], _bits_of(images[0]))))
    row["sigbits_general"] = float(np.median(bits_within(farthest[inside] / np.abs(mean[inside]))))
    return sd, row


def _compare_vectors(images: Sequence[SpatialImage]) -> tuple[np.ndarray, dict[str, object]]:
    """SD of the displacement in mm, the root of the components' summed variances, and a row over all voxels.

    Significant bits are the mean over x, y and z, as Gonzalez Pepe et al. (2023, arXiv:2308.01939) have them.
    """
    mean, sd, farthest = (values.reshape(*values.shape[:3], -1) for values in _moments(images))
    if mean.shape[3] != 3:
        raise ValueError(f"has {mean.shape[3]} values in each voxel, and a displacement has 3")
    total = np.sqrt((sd**2).sum(axis=3))
    length = np.sqrt((mean**2).sum(axis=3))
    row = _over_voxels(total) | {"kind": "displacement", "mean": length.mean(), "unit": "mm"}
    moved = length > 0
    bits = significant_bits(mean[moved], sd[moved], _bits_of(images[0])).mean(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        general = bits_within(np.nan_to_num(farthest[moved] / np.abs(mean[moved]))).mean(axis=1)
    return total, row | {"sigbits": float(np.median(bits)), "sigbits_general": float(np.median(general))}


def _over_voxels(sd: np.ndarray) -> dict[str, object]:
    return {"sd": np.median(sd), "sd_p95": np.percentile(sd, 95), "sd_max": sd.max()}


def read_affine(path: Path) -> np.ndarray | None:
    """Affine of a file (4, 4), mm; None if it is none: of ITK and ANTs (.mat, .txt), FSL (4 x 4 numbers), FreeSurfer.

    A .lta of FreeSurfer is one if it is a RAS to RAS transform.
    """
    if path.suffix == ".mat":
        try:
            content = loadmat(path)
            name = next(key for key in content if key.startswith(("AffineTransform", "MatrixOffset", "Euler3D")))
            parameters, centre = content[name].ravel(), content["fixed"].ravel()
        except (ValueError, StopIteration, KeyError, TypeError, NotImplementedError):
            return _read_numbers(path)
        return _itk_affine(parameters, centre)
    if path.suffix not in (".txt", ".tfm", ".lta", ".xfm", ".dat"):
        return None
    text = path.read_text(encoding="utf-8", errors="replace")
    if (found := re.search(r"^Parameters: (.*)\nFixedParameters: (.*)$", text, re.MULTILINE)) is not None:
        return _itk_affine(*(np.array(part.split(), float) for part in found.groups()))
    if path.suffix == ".lta" and not re.search(r"^type\s*=\s*1", text, re.MULTILINE):
        return None
    rows = re.search(r"((?:^[-+\d.eE]+(?:[ \t]+[-+\d.eE]+){3}[ \t]*;?$\n?){3,4})", text, re.MULTILINE)
    return _as_affine(np.array(rows[1].replace(";", " ").split(), float)) if rows else None


def _read_numbers(path: Path) -> np.ndarray | None:
    try:
        return _as_affine(np.loadtxt(path).ravel())
    except (ValueError, UnicodeDecodeError):
        return None


def _as_affine(numbers: np.ndarray) -> np.ndarray | None:
    if len(numbers) not in (12, 16):
        return None
    return np.vstack([numbers[:12].reshape(3, 4), [0, 0, 0, 1]])


def _itk_affine(parameters: np.ndarray, centre: np.ndarray) -> np.ndarray | None:
    """Affine of ITK's matrix, translation and centre of rotation."""
    if len(parameters) != 12 or len(centre) != 3:
        return None
    matrix = parameters[:9].reshape(3, 3)
    return np.block([[matrix, (parameters[9:] + centre - matrix @ centre)[:, None]], [np.zeros((1, 3)), 1.0]])


def displacement_between(one: np.ndarray, other: np.ndarray, radius: float = RADIUS) -> float:
    """Root mean square distance [mm] of what two affines make of the points of a sphere about the origin.

    ``sqrt(r^2 / 5 tr(M'M) + t't)`` with [M t] their difference (Jenkinson 1999, FMRIB TR99MJ1), as in FSL's rmsdiff.

    >>> shifted = np.eye(4)
    >>> shifted[0, 3] = 2.0
    >>> displacement_between(np.eye(4), shifted)
    2.0
    """
    matrix, shift = np.split((one - other)[:3], [3], axis=1)
    return float(np.sqrt(radius**2 / 5 * (matrix**2).sum() + (shift**2).sum()))


def _compare_affines(matrices: Sequence[np.ndarray]) -> dict[str, object]:
    """Distances of the runs' affines from their mean, mm: root mean square (as an SD), and the largest."""
    mean = np.mean(matrices, axis=0)
    distances = np.array([displacement_between(matrix, mean) for matrix in matrices])
    sd = np.sqrt((distances**2).sum() / (len(matrices) - 1))
    return {"kind": "affine", "sd": sd, "sd_max": distances.max(), "unit": "mm"}


def _read_table(path: Path) -> pd.Series:
    """Numbers of a table by row and column; of aseg.stats, volumes [mm3] by structure.

    Rows are known by their texts, where these are unique, else by their number. A table whose first line is numbers has
    no header.
    """
    if path.suffix == ".stats":
        return pd.Series(read_aseg_stats(path))
    table = pd.read_csv(path, sep="\t" if path.suffix == ".tsv" else ",", header=None, dtype=str, na_values=["n/a"])
    if pd.to_numeric(table.iloc[0], errors="coerce").isna().all():
        table = table.iloc[1:].set_axis(table.iloc[0].astype(str), axis=1)
    numbers = table.apply(pd.to_numeric, errors="coerce")
    texts = table.loc[:, numbers.isna().all()].fillna("").agg(" ".join, axis=1)
    rows = texts if len(texts) and texts.str.strip().ne("").all() and texts.is_unique else range(1, len(table) + 1)
    numbers = numbers.dropna(axis=1, how="all").drop(columns="index", errors="ignore")
    values = {f"{row} {name}": x for name in numbers for row, x in zip(rows, numbers[name], strict=True)}
    return pd.Series(values, dtype=float).dropna()


def _compare_tables(tables: Sequence[pd.Series], path: Path, notes: list[str]) -> Iterator[dict[str, object]]:
    """Row for each number that all runs have."""
    joined = pd.DataFrame(list(tables))
    known = joined.dropna(axis=1)
    if len(known.columns) < len(joined.columns):
        notes.append(f"{path}: {len(joined.columns) - len(known.columns)} numbers that some runs lack are left out.")
    for name, values in known.items():
        yield _spread_of(values.to_numpy(float), FLOAT64_BITS) | {"kind": "table", "name": str(name)}
