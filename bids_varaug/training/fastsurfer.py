"""What FastSurfer's networks learn: classes of a label map, weights of voxels and the loss.

Rules and constants are those of FastSurfer 2.4.0-dev (commit 7c45785e), but that the weights do not fail where a class
is absent. Label maps are (X, Y, Z), of ids or of class numbers, on FastSurfer's grid.
"""

from __future__ import annotations

from importlib.resources import files
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy import ndimage

from bids_varaug.errors import ScanError
from bids_varaug.models.fastsurfer_labels import (
    LEFT_TO_RIGHT,
    NETWORK_IDS,
    RIGHT,
    RIGHT_PARCELS,
    SAGITTAL_IDS,
    read_labels,
)
from bids_varaug.segmentation.slices import AXES
from bids_varaug.training.labels import LabelScheme, make_scheme

_REPLACED = {
    80: 77, 85: 0, 29: 0, 61: 0, 62: 41, 30: 2, 72: 24, 3: 0, 42: 0,
    25: 77, 57: 77, 136: 31, 137: 31, 163: 63, 164: 63,  # of the table of synthetic images
}  # fmt: skip
"""Ids without a class, and what stands for them; cortex without a parcel is left out."""
_CALLOSUM = (251, 255)
_FILL_SIGMA = 5.0
LEAST_SUM = 50  # of the class numbers of a slice that is learnt from
_CUBE = np.ones((3, 3, 3), bool)


def parcel_scheme() -> LabelScheme:
    """Return the scheme of synthetic images whose cortex has the parcels; its targets are for `network_ids`."""
    path = files("bids_varaug") / "data" / "training_labels.tsv"
    with path.open() as stream:
        table = pd.read_csv(stream, sep="\t", dtype={"also": str})
    cortex = table[table["index"].isin((3, 42))].assign(side=(RIGHT, 2 * RIGHT))
    parcels = pd.DataFrame([(label.index, label.name) for label in read_labels()], columns=["index", "name"])
    parcels["side"] = parcels["index"] // RIGHT * RIGHT
    parcels = parcels.merge(cortex[["side", "tissue", "t1_mean", "t1_sd"]])
    parcels["mirror"] = 3 * RIGHT + 2 * (parcels["index"] % RIGHT) - parcels["index"]
    table = pd.concat([table, parcels.drop(columns="side")])
    return make_scheme(table.assign(target=table["index"].where(table["tissue"] != "head", 0)), str(path))


def network_ids(parcels: np.ndarray, without_callosum: np.ndarray | None = None) -> np.ndarray:
    """Return an ``aparc.DKTatlas+aseg`` with the ids that the networks know, `NETWORK_IDS`.

    `without_callosum` is the ``aseg.auto_noCCseg`` of the same head, from which the corpus callosum is taken. A
    `ScanError` names ids that are no class.
    """
    ids = parcels.astype(np.int32)
    if without_callosum is not None:
        callosum = (ids >= _CALLOSUM[0]) & (ids <= _CALLOSUM[1])
        ids[callosum] = without_callosum[callosum]
    for old, new in _REPLACED.items():
        ids[ids == old] = new
    own_class = np.isin(ids, RIGHT_PARCELS)  # before the filling: what that adds on the right gets a shared class
    for unknown in (RIGHT, 2 * RIGHT):
        ids = _fill(ids, unknown)
    ids = np.where((ids > 2 * RIGHT) & (ids < 3 * RIGHT) & ~own_class, ids - RIGHT, ids)
    if other := sorted(set(np.unique(ids).tolist()) - set(NETWORK_IDS)):
        named = ", ".join(map(str, other))
        raise ScanError(f"labels {named} are no classes of FastSurfer. Give maps of aparc.DKTatlas+aseg.")
    return ids


def _fill(ids: np.ndarray, unknown: int) -> np.ndarray:
    """Give cortex of no known parcel to the parcel of its hemisphere that has most voxels around."""
    region = ids == unknown
    if not region.any():
        return ids
    shell = ndimage.binary_dilation(region, ndimage.generate_binary_structure(3, 2)) & ~region
    parcels = [i for i in np.unique(ids[shell]) if unknown < i < unknown + RIGHT]
    if not parcels:
        return np.where(region, 0, ids)
    shares = [ndimage.gaussian_filter(1000.0 * (ids == parcel), _FILL_SIGMA)[region] for parcel in parcels]
    result = ids.copy()
    result[region] = np.array(parcels)[np.argmax(shares, axis=0)]
    return result


def to_classes(ids: np.ndarray, plane: str) -> np.ndarray:
    """Number the ids of `network_ids` as the network of a plane does, (X, Y, Z) uint8."""
    if plane != "sagittal":
        return np.searchsorted(NETWORK_IDS, ids).astype(np.uint8)
    one_sided = np.where(ids > 2 * RIGHT, ids - RIGHT, ids)
    for left, right in LEFT_TO_RIGHT.items():
        one_sided[one_sided == left] = right
    return np.searchsorted(SAGITTAL_IDS, one_sided).astype(np.uint8)


def voxel_weights(
    classes: np.ndarray, plane: str, most: float = 5, edge: float = 5, sulci: float = 0, cortex_border: bool = False
) -> np.ndarray:
    """Return the weights of voxels in the cross-entropy, (X, Y, Z) float32.

    Rare classes weigh more, up to `most` (median over classes of the number of voxels / that of the class). `edge` is
    added where the class changes along an axis, `sulci` where closing the cortex fills it (deep sulci, strands of white
    matter), and half of it, rounded down, at the outer border of the cortex, if wanted.
    """
    counts = np.bincount(classes.ravel())
    with np.errstate(divide="ignore"):
        weights = np.minimum(np.median(counts[counts > 0]) / counts, most)[classes]
    weights += edge * np.any(np.gradient(classes.astype(np.float64)), axis=0)
    if sulci:
        cortex = classes > np.searchsorted(SAGITTAL_IDS if plane == "sagittal" else NETWORK_IDS, RIGHT) - 1
        weights += sulci * (cortex ^ ndimage.binary_closing(cortex, _CUBE))
        if cortex_border:
            brain = classes > 0
            weights += sulci // 2 * (brain & ~ndimage.binary_erosion(brain, _CUBE) & cortex)
    return weights.astype(np.float32)


def slices_to_learn(classes: np.ndarray, plane: str) -> np.ndarray:
    """Numbers of the slices that hold enough labels."""
    rows, columns, _ = AXES[plane]
    return np.flatnonzero(classes.sum(axis=(rows, columns), dtype=np.int64) > LEAST_SUM)


class Loss(NamedTuple):
    """Parts of the loss, scalars."""

    total: torch.Tensor
    dice: torch.Tensor
    cross_entropy: torch.Tensor


def combined_loss(logits: torch.Tensor, classes: torch.Tensor, weights: torch.Tensor) -> Loss:
    """Return the sum of weighted cross-entropy and Dice loss.

    `logits` (B, K, H, W); `classes` (B, H, W) int64; `weights` (B, H, W). Dice is the mean over all classes, absent
    ones and the background too, of all images of the batch together; the cross-entropy the plain mean over pixels.
    """
    cross_entropy = (weights * F.cross_entropy(logits, classes, reduction="none")).mean()
    posterior = logits.softmax(dim=1)
    truth = F.one_hot(classes, logits.shape[1]).movedim(-1, 1).to(posterior.dtype)
    overlap = (posterior * truth).sum(dim=(0, 2, 3))
    sizes = posterior.sum(dim=(0, 2, 3)) + truth.sum(dim=(0, 2, 3))
    dice = (1 - 2 * overlap / (sizes + 0.001)).mean()
    return Loss(dice + cross_entropy, dice, cross_entropy)
