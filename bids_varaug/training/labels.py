"""Label tables for training: which ids there are, what the network learns, what looks like what."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

import numpy as np
import pandas as pd

from bids_varaug.errors import UserError

TISSUES = ("air", "brain", "ventricle", "csf", "head")
_ANY_MEAN, _ANY_SD = 0.6, 0.25  # of an intensity that nothing is known about

_OTHER_SIDE = {"left": "right", "lh": "rh", "l": "r", "right": "left", "rh": "lh", "r": "l"}
_SIDE = re.compile(r"left|right|(?<![a-z])(?:lh|rh|l|r)(?![a-z])", re.IGNORECASE)


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
    t1_mean, t1_sd : (G,) float32, T1w intensity relative to white matter = 1, its spread over
        people
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

    A TSV with the columns index and name, as BIDS has it (``*_dseg.tsv``). Optional columns:
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
    table = _with_defaults(table, str(source))
    ids = pd.Index(table["index"])
    if not ids.is_unique or len(ids) > 255:
        raise UserError(f"{source}: ids must be unique, and at most 255 with the background's 0.")
    unknown = (set(table["target"]) | set(table["mirror"])) - set(ids)
    if unknown or set(table["tissue"]) - set(TISSUES):
        raise UserError(
            f"{source}: targets and mirrors must be ids of the table (not {sorted(unknown)}), "
            f"tissues one of {TISSUES}."
        )
    targets = pd.Index([0, *sorted(set(table["target"]) - {0})])
    return LabelScheme(
        ids=table["index"].to_numpy(np.int32),
        names=tuple(table["name"]),
        targets=targets.get_indexer(table["target"]).astype(np.uint8),
        mirror=ids.get_indexer(table["mirror"]).astype(np.uint8),
        tissue=pd.Index(TISSUES).get_indexer(table["tissue"]).astype(np.uint8),
        t1_mean=table["t1_mean"].to_numpy(np.float32),
        t1_sd=table["t1_sd"].to_numpy(np.float32),
        target_ids=tuple(int(i) for i in targets),
        target_names=tuple(table["name"][ids.get_indexer(targets)]),
        also=_parse_also(table),
    )


def _with_defaults(table: pd.DataFrame, source: str) -> pd.DataFrame:
    """Add the background and the columns that may be left out."""
    if not (table["index"] == 0).any():
        background = {"index": 0, "name": "background", "target": 0, "mirror": 0, "tissue": "air",
                      "t1_mean": 0.02, "t1_sd": 0.02}  # fmt: skip
        row = pd.DataFrame([{name: background.get(name) for name in table}])
        table = pd.concat([row, table], ignore_index=True)
    table = table.sort_values("index").reset_index(drop=True)
    is_air = table["index"] == 0
    if "mirror" not in table:
        table["mirror"] = mirror_ids(table, source)
    defaults = {
        "target": table["index"],
        "tissue": np.where(is_air, "air", "brain"),
        "t1_mean": np.where(is_air, 0.02, _ANY_MEAN),
        "t1_sd": np.where(is_air, 0.02, _ANY_SD),
    }
    return table.assign(**{name: v for name, v in defaults.items() if name not in table})


def _parse_also(table: pd.DataFrame) -> dict[int, tuple[int, ...]]:
    """Return for each further id the ids of the rows that list it (``31`` or ``77,251-255``)."""
    ids: dict[int, tuple[int, ...]] = {}
    for index, text in zip(table["index"], table.get("also", ()), strict=False):
        for part in str(text).split(",") if pd.notna(text) else ():
            first, _, last = part.partition("-")
            for also in range(int(first), int(last or first) + 1):
                ids[also] = (*ids.get(also, ()), int(index))
    return {also: rows for also, rows in ids.items() if also not in set(table["index"])}


def other_side(name: str) -> str | None:
    """Return the name of a structure's counterpart, None for one without a side.

    Examples
    --------
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


def mirror_ids(table: pd.DataFrame, source: str) -> list[int]:
    """Return for each row of a label table (index, name) the id on the other side.

    Raises
    ------
    UserError
        If a structure is named left or right and its counterpart is not in the table.
    """
    id_of = dict(zip(table["name"], table["index"], strict=True))
    others = [other_side(name) for name in table["name"]]
    alone = [f"{name} (no {other})" for name, other in zip(table["name"], others, strict=True)
             if other is not None and other not in id_of]  # fmt: skip
    if alone:
        raise UserError(
            f"{source}: structures of one side without a counterpart: {', '.join(alone[:5])}. "
            "Training mirrors half of the images, so each needs one: add the rows, or a column "
            "'mirror' with the id of the other side (its own where there is none)."
        )
    return [int(id_of.get(other, i)) for other, i in zip(others, table["index"], strict=True)]


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
