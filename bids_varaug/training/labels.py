"""Label tables for training: which ids there are, what the network learns, what looks like what.

A table that training cannot use is refused with a `UserError` that names the file.
"""

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
        table = pd.read_csv(stream, sep="\t", dtype={"also": str})
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
        "mirror": table["index"] if "mirror" in table else mirror_ids(table, str(source)),
        "tissue": is_air.map({True: "air", False: "brain"}),
        "t1_mean": is_air.map({True: 0.02, False: 0.6}),
        "t1_sd": is_air.map({True: 0.02, False: 0.25}),
    }
    filled = {name: table[name].fillna(value) if name in table else value for name, value in defaults.items()}
    table = table.assign(also=table.get("also"), **filled)
    unknown = (set(table["target"]) | set(table["mirror"])) - set(ids)
    if unknown or set(table["tissue"]) - set(TISSUES):
        raise UserError(
            f"{source}: targets and mirrors must be ids of the table (not {sorted(unknown)}), tissues one of {TISSUES}."
        )
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
        raise UserError(
            f"{directory}: label tables that differ ({found[0].name}, {found[1].name}, ...). Give the one to use with "
            "--label-table."
        )
    return found[0] if found else None
