"""Label maps as training data: which ids there are, what they become, what looks like what."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd

from bids_varaug.errors import UserError

TISSUES = ("air", "brain", "csf", "head")


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


def load_scheme(path: Path | None = None) -> LabelScheme:
    """Read a label table (TSV: index, name, target, mirror, tissue, t1_mean, t1_sd).

    Raises
    ------
    UserError
        If a column is missing, an id is listed twice, or a target or mirror id is not in the table.
    """
    source = path or files("bids_varaug") / "data" / "training_labels.tsv"
    with source.open() as stream:
        table = pd.read_csv(stream, sep="\t")
    missing = {"index", "name", "target", "mirror", "tissue", "t1_mean", "t1_sd"} - set(table)
    if missing:
        raise UserError(f"{source}: the label table lacks the column(s) {sorted(missing)}.")
    table = table.sort_values("index").reset_index(drop=True)
    ids = table["index"].to_numpy(np.int32)
    if len(set(ids)) < len(ids) or ids[0] != 0 or len(ids) > 255:
        raise UserError(f"{source}: ids must be unique, include 0, and number at most 255.")
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
    )


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
    unknown = np.setdiff1d(np.unique(labels), scheme.ids)
    if unknown.size:
        raise UserError(
            f"{path}: label(s) {unknown.tolist()[:10]} are not in the label table; add a row for "
            "each, or pass a table with --label-table."
        )
    inside = np.argwhere(labels > 0)
    if inside.size == 0:
        raise UserError(f"{path}: the label map is empty.")
    start, stop = inside.min(0), inside.max(0) + 1
    box = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
    return np.searchsorted(scheme.ids, labels[box]).astype(np.uint8)
