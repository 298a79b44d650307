"""Label maps as training data: which ids there are, what they become, what looks like what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from scipy.spatial import cKDTree

from bids_varaug.errors import UserError
from bids_varaug.images.crop import bounds
from bids_varaug.training.sides import mirror_ids

TISSUES = ("air", "brain", "ventricle", "csf", "head")
_ANY_MEAN, _ANY_SD = 0.6, 0.25  # of an intensity that nothing is known about


@dataclass(frozen=True)
class LabelScheme:
    """The generation classes (what synthesis draws) and the target classes (what is learnt).

    Attributes
    ----------
    ids : (G,) int32, label id of each generation class, ids[0] = 0
    names : names of the generation classes
    targets : (G,) uint8, class index k of the target, 0 = background
    mirror : (G,) uint8, generation class on the other side (itself for midline structures)
    tissue : (G,) uint8, index into `TISSUES`
    t1_mean, t1_sd : (G,) float32, T1w intensity relative to white matter = 1, its spread over heads
    target_ids, target_names : id and name of each target class, background first
    also : further ids of label maps, and what they count as: one id of `ids`, or one for each side
    """

    ids: np.ndarray
    names: tuple[str, ...]
    targets: np.ndarray
    mirror: np.ndarray
    tissue: np.ndarray
    t1_mean: np.ndarray
    t1_sd: np.ndarray
    target_ids: tuple[int, ...]
    target_names: tuple[str, ...]
    also: Mapping[int, tuple[int, ...]] = field(default_factory=dict)


def load_scheme(path: Path | None = None) -> LabelScheme:
    """Read a label table, by default that of FreeSurfer's ids.

    A TSV with the columns index and name, as BIDS has it (``*_dseg.tsv``). More columns say more:
    target (the id that the network learns; default: its own), mirror (the id on the other side;
    default: that whose name has left and right exchanged), tissue (air, brain, ventricle, csf or
    head; default: brain), t1_mean and t1_sd (of the T1w intensity, white matter = 1; default: any),
    also (ids that count as this one, such as ``31`` or ``77,251-255``; an id of two rows goes to
    the nearer of the two structures).

    Raises
    ------
    UserError
        If a column is missing, an id is listed twice, a target or mirror id is not in the table,
        or a structure has no counterpart.
    """
    source = path or files("bids_varaug") / "data" / "training_labels.tsv"
    with source.open() as stream:
        table = pd.read_csv(stream, sep="\t", dtype={"also": str})
    missing = {"index", "name"} - set(table)
    if missing:
        raise UserError(f"{source}: the label table lacks the column(s) {sorted(missing)}.")
    table = _complete(table, str(source))
    ids = table["index"].to_numpy(np.int32)
    if len(set(ids)) < len(ids) or len(ids) > 255:
        raise UserError(f"{source}: ids must be unique, and at most 255 with the background's 0.")
    position = {int(i): n for n, i in enumerate(ids)}
    unknown = (set(table["target"]) | set(table["mirror"])) - set(position)
    if unknown or set(table["tissue"]) - set(TISSUES):
        raise UserError(
            f"{source}: targets and mirrors must be ids of the table (not {sorted(unknown)}), "
            f"tissues one of {TISSUES}."
        )
    target_ids = (0, *sorted(set(table["target"]) - {0}))
    class_of = {int(i): k for k, i in enumerate(target_ids)}
    return LabelScheme(
        ids=ids,
        names=tuple(table["name"]),
        targets=np.array([class_of[int(t)] for t in table["target"]], np.uint8),
        mirror=np.array([position[int(m)] for m in table["mirror"]], np.uint8),
        tissue=np.array([TISSUES.index(t) for t in table["tissue"]], np.uint8),
        t1_mean=table["t1_mean"].to_numpy(np.float32),
        t1_sd=table["t1_sd"].to_numpy(np.float32),
        target_ids=tuple(int(i) for i in target_ids),
        target_names=tuple(table["name"][position[int(i)]] for i in target_ids),
        also=_also(table),
    )


def _also(table: pd.DataFrame) -> dict[int, tuple[int, ...]]:
    ids: dict[int, tuple[int, ...]] = {}
    for index, text in zip(table["index"], table.get("also", ()), strict=False):
        for part in str(text).split(",") if pd.notna(text) else ():
            first, _, last = part.partition("-")
            for also in range(int(first), int(last or first) + 1):
                ids[also] = (*ids.get(also, ()), int(index))
    return {also: rows for also, rows in ids.items() if also not in set(table["index"])}


def _complete(table: pd.DataFrame, source: str) -> pd.DataFrame:
    """Add the background and the columns that may be left out."""
    if not (table["index"] == 0).any():
        background = {"index": 0, "name": "background", "target": 0, "mirror": 0, "tissue": "air",
                      "t1_mean": 0.02, "t1_sd": 0.02}  # fmt: skip
        row = pd.DataFrame([{name: background.get(name) for name in table}])
        table = pd.concat([row, table], ignore_index=True)
    table = table.sort_values("index").reset_index(drop=True)
    is_air = table["index"] == 0
    defaults = {
        "target": lambda: table["index"],
        "mirror": lambda: mirror_ids(table, source),
        "tissue": lambda: np.where(is_air, "air", "brain"),
        "t1_mean": lambda: np.where(is_air, 0.02, _ANY_MEAN),
        "t1_sd": lambda: np.where(is_air, 0.02, _ANY_SD),
    }
    return table.assign(**{n: make() for n, make in defaults.items() if n not in table})


def find_label_table(directory: Path) -> Path | None:
    """Return the table of a folder's label maps (``*dseg.tsv``), None where there is none.

    Raises
    ------
    UserError
        If there are several that differ.
    """
    found = sorted(directory.rglob("*dseg.tsv"))
    if len({path.read_bytes() for path in found}) > 1:
        raise UserError(
            f"{directory}: label tables that differ ({found[0].name}, {found[1].name}, ...). Give "
            "the one to use with --label-table."
        )
    return found[0] if found else None


def find_label_maps(directory: Path) -> list[Path]:
    """Return the label maps of a folder or of a BIDS derivative (``*_dseg.nii.gz``), sorted.

    Raises
    ------
    UserError
        If there is none.
    """
    found = sorted(directory.rglob("*_dseg.nii*")) or sorted(directory.glob("*.nii*"))
    if not found:
        raise UserError(f"{directory}: no label map (*_dseg.nii.gz or *.nii.gz) to train on.")
    return found


def load_label_map(path: Path, scheme: LabelScheme) -> np.ndarray:
    """Read a label map as generation classes in RAS orientation, cropped to the head.

    Returns
    -------
    (X, Y, Z) uint8, generation class, RAS axes, 1 mm

    Raises
    ------
    UserError
        If values are fractional or unknown, or voxels are not 1 mm.
    """
    image = nib.as_closest_canonical(nib.load(path))
    zooms = np.array(image.header.get_zooms()[:3])
    if not np.allclose(zooms, 1.0, atol=0.01):
        raise UserError(f"{path}: voxels of {zooms} mm; training needs label maps at 1 mm.")
    values = np.asanyarray(image.dataobj)
    labels = values.astype(np.int32)
    if not np.array_equal(labels, values):
        raise UserError(f"{path}: fractional values; a label map holds whole numbers.")
    if not labels.any():
        raise UserError(f"{path}: the label map is empty.")
    labels = merge_labels(labels[crop_to_labels(labels)], scheme)
    unknown = np.setdiff1d(np.unique(labels), scheme.ids)
    if unknown.size:
        raise UserError(
            f"{path}: label(s) {unknown.tolist()[:10]} are not in the label table; add a row for "
            "each, or pass a table with --label-table."
        )
    return np.searchsorted(scheme.ids, labels).astype(np.uint8)


def merge_labels(labels: np.ndarray, scheme: LabelScheme) -> np.ndarray:
    """Replace ids that the table lists as `also` by those that they count as.

    An id without a side (FreeSurfer's corpus callosum, WM hypointensities) goes, voxel by voxel, to
    the side of the nearest voxel of the same target structure; without such voxels it stays.

    Parameters
    ----------
    labels : (X, Y, Z) integer ids, voxels about as long as wide
    """
    present = [int(i) for i in np.unique(labels) if int(i) in scheme.also]
    merged = labels.copy()
    for also in (i for i in present if len(scheme.also[i]) == 1):
        merged[labels == also] = scheme.also[also][0]
    classes = dict(zip(scheme.ids.tolist(), scheme.targets.tolist(), strict=True))
    whole = merged.copy()
    for sides in {scheme.also[i] for i in present if len(scheme.also[i]) > 1}:
        voxels = np.argwhere(np.isin(labels, [i for i in present if scheme.also[i] == sides]))
        distances = np.full((len(sides), len(voxels)), np.inf)
        for n, side in enumerate(sides):
            same = [i for i in scheme.ids if classes[int(i)] == classes[side]]
            if len(near := np.argwhere(np.isin(whole, same))):
                tree = cKDTree(near, balanced_tree=False, compact_nodes=False)
                distances[n] = tree.query(voxels)[0]
        if np.isfinite(distances).any():
            merged[tuple(voxels.T)] = np.array(sides)[distances.argmin(axis=0)]
    return merged


def crop_to_labels(labels: np.ndarray) -> tuple[slice, ...]:
    """Return the smallest box (as an index) with all labels of a map (X, Y, Z)."""
    return tuple(slice(a, b) for a, b in zip(*bounds(labels != 0), strict=True))
