"""Left and right: which structure is whose counterpart, and whether a label map agrees."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from bids_varaug.errors import UserError

if TYPE_CHECKING:
    from bids_varaug.training.labels import LabelScheme

_OTHER = {"left": "right", "lh": "rh", "l": "r"}
_OTHER |= {right: left for left, right in _OTHER.items()}
_WORD = re.compile(r"left|right|(?<![a-z])(?:lh|rh|l|r)(?![a-z])", re.IGNORECASE)
_MIDLINE_SHARE, _MIDLINE_MM = 0.95, 6.0  # brain stems are a few millimetres off
_MIN_VOXELS = 200


def other_side(name: str) -> str | None:
    """Return the name of a structure's counterpart, None for one without a side.

    Examples
    --------
    >>> other_side("Left-Hippocampus"), other_side("ctx_rh_insula"), other_side("Brain-Stem")
    ('Right-Hippocampus', 'ctx_lh_insula', None)
    """
    found = _WORD.search(name)
    if found is None:
        return None
    side = found[0]
    other = _OTHER[side.lower()]
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
    ids, alone = [], []
    for index, name in zip(table["index"], table["name"], strict=True):
        other = other_side(name)
        if other is not None and other not in id_of:
            alone.append(f"{name} (no {other})")
        ids.append(int(id_of.get(other, index)))
    if alone:
        raise UserError(
            f"{source}: structures of one side without a counterpart: {', '.join(alone[:5])}. "
            "Mirrored images are drawn for training, so each needs one: add the rows, or a column "
            "'mirror' with the id of the other side (its own where there is none)."
        )
    return ids


def check_sides(classes: np.ndarray, scheme: LabelScheme, path: Path) -> None:
    """Make sure that left structures lie to the left, and those of one side have a counterpart.

    Parameters
    ----------
    classes : (X, Y, Z) uint8, generation class, RAS axes

    Raises
    ------
    UserError
        If a left structure lies to the right of its counterpart, or a learnt structure without
        a counterpart lies on one side of the middle only, and away from it.
    """
    mirror, names = scheme.mirror, scheme.names
    counts = np.stack([np.bincount(plane.ravel(), minlength=len(names)) for plane in classes])
    total = counts.sum(0)
    paired = np.flatnonzero((mirror != np.arange(len(names))) & (total > 0))
    x = np.arange(len(counts))
    with np.errstate(invalid="ignore"):
        centre = (x[:, None] * counts).sum(0) / total
    for k in paired:
        is_left = re.search(r"left|lh|(?<![a-z])l(?![a-z])", names[k], re.IGNORECASE)
        if is_left and total[mirror[k]] and centre[k] > centre[mirror[k]]:
            raise UserError(
                f"{path}: {names[k]} lies to the right of {names[mirror[k]]}. Either the label "
                "table has them the wrong way round, or the image's affine is wrong."
            )
    learnt = scheme.targets > 0
    inside = counts[:, learnt].sum(1)
    middle = (x * inside).sum() / max(inside.sum(), 1)
    for k in np.flatnonzero(learnt & (mirror == np.arange(len(names))) & (total > _MIN_VOXELS)):
        left = counts[: round(middle), k].sum() / total[k]
        if max(left, 1 - left) > _MIDLINE_SHARE and abs(centre[k] - middle) > _MIDLINE_MM:
            raise UserError(
                f"{path}: {names[k]} lies on one side of the head and has no counterpart in the "
                "label table. Mirrored images are drawn for training: add a column 'mirror' with "
                "the id of the other side."
            )
