"""What members are trained on: label tables, label maps, and the T1w images beside them.

What training cannot use is refused with a `UserError` that names the file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import cast

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from nibabel.spatialimages import SpatialImage
from scipy import ndimage
from scipy.spatial import cKDTree

from bids_varaug.errors import UserError
from bids_varaug.images.intensity import normalise_intensity

TISSUES = ("air", "brain", "ventricle", "csf", "head")
_OTHER_SIDE = {"left": "right", "lh": "rh", "l": "r", "right": "left", "rh": "lh", "r": "l"}
_SIDE = re.compile(r"left|right|(?<![a-z])(?:lh|rh|l|r)(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True)
class LabelScheme:
    """The G generation classes (what synthesis draws) and the target classes (what is learnt)."""

    ids: np.ndarray  # (G,) int32, label ids, 0 first
    names: tuple[str, ...]
    targets: np.ndarray  # (G,) uint8, class index k of the target, 0 = background
    mirror: np.ndarray  # (G,) uint8, generation class on the other side (itself for midline structures)
    tissue: np.ndarray  # (G,) uint8, index into `TISSUES`
    t1_mean: np.ndarray  # (G,) float32, T1w intensity relative to white matter = 1
    t1_sd: np.ndarray  # (G,) float32, its spread over people
    target_ids: tuple[int, ...]  # of each target class, background first, as the next
    target_names: tuple[str, ...]
    # Further ids of label maps, and what they count as: one id of `ids`, or one for each side.
    also: Mapping[int, tuple[int, ...]] = field(default_factory=dict)


def load_scheme(path: Path | None = None) -> LabelScheme:
    """Read a label table, by default that of FreeSurfer's ids.

    A TSV with the columns index and name, as BIDS has it (``*_dseg.tsv``). Optional columns: target (the id that the
    network learns; default: its own), mirror (the id on the other side; default: that whose name has left and right
    exchanged), tissue (air, brain, ventricle, csf or head; default: brain), t1_mean and t1_sd (of the T1w intensity,
    white matter = 1; default: any), also (ids that count as this one, such as ``31`` or ``77,251-255``; an id of two
    rows goes to the nearer of the two structures).
    """
    source = path or files("bids_varaug") / "data" / "training_labels.tsv"
    with source.open() as stream:
        return make_scheme(pd.read_csv(stream, sep="\t", dtype={"also": str}), str(source))


def make_scheme(table: pd.DataFrame, source: str) -> LabelScheme:
    """Complete and check a label table, see `load_scheme`; `UserError` names the `source`."""
    if missing := {"index", "name"} - set(table):
        raise UserError(f"{source}: the label table lacks the column(s) {sorted(missing)}.")
    if not (table["index"] == 0).any():
        table = pd.concat([pd.DataFrame({"index": [0], "name": ["background"]}), table])
    table = table.sort_values("index").reset_index(drop=True)
    ids = pd.Index(table["index"])
    if not ids.is_unique or len(ids) > 255:
        raise UserError(f"{source}: ids must be unique, and at most 255 with the background's 0.")
    is_air = table["index"] == 0
    defaults = {
        "target": table["index"],
        "mirror": table["index"] if "mirror" in table else mirror_ids(table, source),
        "tissue": is_air.map({True: "air", False: "brain"}),
        "t1_mean": is_air.map({True: 0.02, False: 0.6}),
        "t1_sd": is_air.map({True: 0.02, False: 0.25}),
    }
    filled = {name: table[name].fillna(value) if name in table else value for name, value in defaults.items()}
    table = table.assign(also=table.get("also"), **filled)
    unknown = (set(table["target"]) | set(table["mirror"])) - set(ids)
    if unknown or set(table["tissue"]) - set(TISSUES):
        ids_text = f"targets and mirrors must be ids of the table (not {sorted(unknown)})"
        raise UserError(f"{source}: {ids_text}, tissues one of {TISSUES}.")
    targets = pd.Index([0, *sorted(set(table["target"].astype(int)) - {0})])
    return LabelScheme(
        ids=table["index"].to_numpy(np.int32),
        names=tuple(table["name"]),
        targets=targets.get_indexer(table["target"]).astype(np.uint8),
        mirror=ids.get_indexer(table["mirror"]).astype(np.uint8),
        tissue=pd.Index(TISSUES).get_indexer(table["tissue"]).astype(np.uint8),
        t1_mean=table["t1_mean"].to_numpy(np.float32),
        t1_sd=table["t1_sd"].to_numpy(np.float32),
        target_ids=tuple(targets.tolist()),
        target_names=tuple(table["name"][ids.get_indexer(targets)]),
        also=_parse_also(table),
    )


def _parse_also(table: pd.DataFrame) -> dict[int, tuple[int, ...]]:
    """Return for each further id the ids of the rows that list it (``31`` or ``77,251-255``)."""
    ids: dict[int, tuple[int, ...]] = {}
    for index, text in table[["index", "also"]].dropna().itertuples(index=False):
        for part in text.split(","):
            first, _, last = part.partition("-")
            for also in range(int(first), int(last or first) + 1):
                ids[also] = (*ids.get(also, ()), int(index))
    return {also: rows for also, rows in ids.items() if also not in set(table["index"])}


def other_side(name: str) -> str | None:
    """Return the name of a structure's counterpart, None for one without a side.

    >>> other_side("Left-Hippocampus"), other_side("ctx_rh_insula"), other_side("Brain-Stem")
    ('Right-Hippocampus', 'ctx_lh_insula', None)
    """
    found = _SIDE.search(name)
    if found is None:
        return None
    side = found[0]
    other = _OTHER_SIDE[side.lower()]
    other = other.upper() if side.isupper() else other.title() if side[0].isupper() else other
    return name[: found.start()] + other + name[found.end() :]


def mirror_ids(table: pd.DataFrame, source: str) -> pd.Series:
    """Return for each row of a label table (index, name) the id on the other side, its own where it has no side."""
    id_of = dict(zip(table["name"], table["index"], strict=True))
    others = {name: other_side(name) for name in id_of}
    alone = [f"{name} (no {other})" for name, other in others.items() if other is not None and other not in id_of]
    if alone:
        raise UserError(
            f"{source}: structures of one side without a counterpart: {', '.join(alone[:5])}. Training mirrors half of "
            "the images, so each needs one: add the rows, or a column 'mirror' with the id of the other side (its own "
            "where there is none)."
        )
    return table["name"].map({name: id_of.get(other, id_of[name]) for name, other in others.items()})


def find_label_table(directory: Path) -> Path | None:
    """Return the table of a folder's label maps (``*dseg.tsv``), None where there is none."""
    found = sorted(directory.rglob("*dseg.tsv"))
    if len({path.read_bytes() for path in found}) > 1:
        differ = f"label tables that differ ({found[0].name}, {found[1].name}, ...)"
        raise UserError(f"{directory}: {differ}. Give the one to use with --label-table.")
    return found[0] if found else None


_IS_LEFT = re.compile(r"left|lh|(?<![a-z])l(?![a-z])", re.IGNORECASE)
_MIDLINE_SHARE, _MIDLINE_MM = 0.95, 6.0  # brain stems are a few millimetres off
_MIN_VOXELS = 200


@dataclass(frozen=True)
class TrainingSubject:
    """What images are drawn from."""

    classes: torch.Tensor  # (X, Y, Z) uint8, generation class, RAS axes, 1 mm
    # (X, Y, Z) float32, in [0, 1.5] as `normalise_intensity` leaves it; None to draw synthetic images only.
    t1w: torch.Tensor | None = None


def find_label_maps(directory: Path) -> list[Path]:
    """Return the label maps of a folder or of a BIDS derivative (``*_dseg.nii.gz``), sorted; at least one."""
    found = sorted(directory.rglob("*_dseg.nii*")) or sorted(directory.glob("*.nii*"))
    if not found:
        raise UserError(f"{directory}: no label map (*_dseg.nii.gz or *.nii.gz) to train on.")
    return found


def load_subjects(
    paths: Sequence[Path], scheme: LabelScheme, device: str, with_images: bool = False
) -> list[TrainingSubject]:
    """Read label maps and, if wanted, the T1w image beside each, which one at least must have."""
    subjects = []
    for path in paths:
        classes = load_label_map(path, scheme)
        check_laterality(classes, scheme, path)
        t1w = load_t1w_of(path) if with_images else None
        subjects.append(TrainingSubject(torch.from_numpy(classes).to(device), None if t1w is None else t1w.to(device)))
    if with_images and all(subject.t1w is None for subject in subjects):
        raise UserError(
            f"{paths[0].parent}: no *_T1w.nii.gz beside any label map. Put them there (the name up to _T1w is that of "
            "the label map up to its _desc-, _seg- or _dseg), or leave out --real-share."
        )
    return subjects


def open_image(path: Path) -> SpatialImage:
    """Return an image whose voxels are not read yet."""
    return cast(SpatialImage, nib.load(path))


def load_label_map(path: Path, scheme: LabelScheme) -> np.ndarray:
    """Read a label map as generation classes, (X, Y, Z) uint8 in RAS orientation at 1 mm, cropped to the head."""
    image = nib.as_closest_canonical(open_image(path))
    zooms = np.array(image.header.get_zooms()[:3])
    if not np.allclose(zooms, 1.0, atol=0.01):
        raise UserError(f"{path}: voxels of {zooms} mm; training needs label maps at 1 mm.")
    values = np.asanyarray(image.dataobj)
    labels = values.astype(np.int32)
    if not np.array_equal(labels, values):
        raise UserError(f"{path}: fractional values; a label map holds whole numbers.")
    if not labels.any():
        raise UserError(f"{path}: the label map is empty.")
    labels = merge_labels(labels[ndimage.find_objects((labels != 0).view(np.uint8))[0]], scheme)
    unknown = np.setdiff1d(labels, scheme.ids)
    if unknown.size:
        raise UserError(
            f"{path}: label(s) {unknown.tolist()[:10]} are not in the label table; add a row for each, or pass a table "
            "with --label-table."
        )
    return np.searchsorted(scheme.ids, labels).astype(np.uint8)


def merge_labels(labels: np.ndarray, scheme: LabelScheme) -> np.ndarray:
    """Replace ids (X, Y, Z) that the table lists as `also` by those that they count as.

    An id without a side (FreeSurfer's corpus callosum, WM hypointensities) goes, voxel by voxel, to the side of the
    nearest voxel of the same target structure; without such voxels it stays. Voxels are about as long as wide.
    """
    merged = labels.copy()
    present = [int(i) for i in np.unique(labels) if int(i) in scheme.also]
    for also in (i for i in present if len(scheme.also[i]) == 1):
        merged[labels == also] = scheme.also[also][0]
    whole = merged.copy()
    for sides in {scheme.also[i] for i in present if len(scheme.also[i]) > 1}:
        voxels = np.argwhere(np.isin(labels, [i for i in present if scheme.also[i] == sides]))
        distances = np.full((len(sides), len(voxels)), np.inf)
        for n, side in enumerate(sides):
            same = scheme.ids[scheme.targets == scheme.targets[scheme.ids == side]]
            if len(near := np.argwhere(np.isin(whole, same))):
                distances[n] = cKDTree(near, balanced_tree=False, compact_nodes=False).query(voxels)[0]
        if np.isfinite(distances).any():
            merged[tuple(voxels.T)] = np.array(sides)[distances.argmin(axis=0)]
    return merged


def image_of(label_map: Path) -> Path | None:
    """Find the T1w image beside a label map, which must be on the same grid; None without one."""
    stem = re.split("_dseg|_desc-|_seg-", label_map.name)[0]
    found = sorted(label_map.parent.glob(f"{stem}_T1w.nii*")) or sorted(label_map.parent.glob(f"{stem}_*T1w.nii*"))
    if not found:
        return None
    image, labels = open_image(found[0]), open_image(label_map)
    if image.shape != labels.shape or not np.allclose(image.affine, labels.affine, atol=1e-3):
        raise UserError(
            f"{found[0]}: not on the grid of its label map {label_map.name}. Resample one to the other, or leave out "
            "--real-share."
        )
    return found[0]


def load_t1w_of(label_map: Path) -> torch.Tensor | None:
    """Read the T1w image of a label map, on its grid, as `TrainingSubject` holds it; None without one."""
    path = image_of(label_map)
    if path is None:
        return None
    image, labels = open_image(path), open_image(label_map)
    data = nib.as_closest_canonical(image).get_fdata(dtype=np.float32)
    inside = np.asanyarray(nib.as_closest_canonical(labels).dataobj) != 0
    (box,) = ndimage.find_objects(inside.view(np.uint8))
    return normalise_intensity(torch.from_numpy(np.ascontiguousarray(data[box])))


def check_laterality(classes: np.ndarray, scheme: LabelScheme, path: Path) -> None:
    """Check that no left structure of a label map (as `load_label_map` reads it) lies to the right of its counterpart.

    A learnt structure without a counterpart must not lie on one side of the middle only, and away from it.
    """
    mirror, names = scheme.mirror, scheme.names
    is_single = mirror == np.arange(len(names))
    counts = np.stack([np.bincount(plane.ravel(), minlength=len(names)) for plane in classes])
    total = counts.sum(0)
    x = np.arange(len(counts))
    centre = x @ counts / np.maximum(total, 1)
    for k in np.flatnonzero(~is_single & (total > 0) & (total[mirror] > 0)):
        if _IS_LEFT.search(names[k]) and centre[k] > centre[mirror[k]]:
            raise UserError(
                f"{path}: {names[k]} lies to the right of {names[mirror[k]]}. Either the label table has them the "
                "wrong way round, or the image's affine is wrong."
            )
    learnt = scheme.targets > 0
    inside = counts[:, learnt].sum(1)
    middle = x @ inside / max(inside.sum(), 1)
    left_share = counts[: round(middle)].sum(0) / np.maximum(total, 1)
    one_sided = np.maximum(left_share, 1 - left_share) > _MIDLINE_SHARE
    one_sided &= np.abs(centre - middle) > _MIDLINE_MM
    alone = np.flatnonzero(learnt & is_single & one_sided & (total > _MIN_VOXELS))
    if alone.size:
        raise UserError(
            f"{path}: {names[alone[0]]} lies on one side of the head and has no counterpart in the label table. "
            "Training mirrors half of the images: add a column 'mirror' with the id of the other side."
        )
