"""FastSurfer's networks segment a head slice by slice, and their three views become one posterior.

Each view adds its logits, weighted, to a sum in float16, coronal, sagittal, axial, as FastSurfer 2.4.0-dev does; its
label is the class of the largest sum. Only the slices and the voxels of the box around the head are computed, and what
a network says of empty slices is computed once: neither changes anything in the box.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from scipy.ndimage import maximum_filter
from scipy.sparse import csr_array

from bids_varaug.images.conform import Box, extract, insert
from bids_varaug.models.fastsurfer import Vinn
from bids_varaug.models.fastsurfer_labels import IDS, NETWORK_IDS, RIGHT, RIGHT_PARCELS
from bids_varaug.segmentation.fastsurfer import split_hemispheres
from bids_varaug.segmentation.fuse import BACKGROUND_CUT, SparsePosterior, sparse_rows

AXES = {"coronal": (0, 1, 2), "sagittal": (2, 1, 0), "axial": (2, 0, 1)}
"""Axes of the volume that are a slice's rows and columns, and along which slices lie."""
WEIGHTS = {"coronal": 0.4, "sagittal": 0.2, "axial": 0.4}
RIM = 4  # voxels around what has a label, whose posterior is kept
SMALLEST = 1e-4
"""Smaller probabilities are left out. FastSurfer's networks tell 79 classes apart, most of which are nowhere near."""
_BEFORE, _AFTER = 3, 3  # slices beside the one that is labelled
_COLUMNS = np.array([IDS.index(i) for i in NETWORK_IDS])  # of a segmentation's posterior
_ONE_SIDED = np.array([i for i in NETWORK_IDS if RIGHT < i < 2 * RIGHT and i + RIGHT not in RIGHT_PARCELS])
_LEFT, _RIGHT = (np.searchsorted(IDS, _ONE_SIDED + shift) for shift in (0, RIGHT))


def thick_slice(volume: np.ndarray, plane: str, number: int) -> np.ndarray:
    """Return a slice between its neighbours, (7, H, W) float32 in [0, 1]; `volume` is (X, Y, Z) uint8.

    Beyond the first and the last slice, these are repeated.
    """
    rows, columns, across = AXES[plane]
    numbers = np.clip(np.arange(number - _BEFORE, number + _AFTER + 1), 0, volume.shape[across] - 1)
    return volume.transpose(across, rows, columns)[numbers].astype(np.float32) / np.float32(255)


@torch.inference_mode()
def add_view(
    total: torch.Tensor,
    network: Vinn,
    plane: str,
    volume: np.ndarray,
    voxel_size: float,
    box: Box,
    arithmetic: AbstractContextManager | None = None,
) -> None:
    """Add the weighted logits of one view to the sum of those before.

    Parameters
    ----------
    total : (X, Y, Z, 79) float16, of the box, on the network's device; changed in place
    network : of the plane, with one class for each of `NETWORK_IDS`
    volume : (N, N, N) uint8, of `images.fastsurfer.conform`
    voxel_size : mm
    box : the part of the volume to segment
    arithmetic : in which the network runs
    """
    rows, columns, across = AXES[plane]
    windows = [slice(start, stop) for start, stop in zip(box.start, box.stop, strict=True)]
    scale = torch.full((1, 2), float(np.float32(1) / np.float32(voxel_size)), device=total.device)
    of_nothing = None
    for number, part in enumerate(total.permute(across, rows, columns, 3), start=box.start[across]):
        image = thick_slice(volume, plane, number)
        logits = None if image.any() else of_nothing
        if logits is None:
            with arithmetic or nullcontext():
                logits = network(torch.from_numpy(np.ascontiguousarray(image)).to(total.device)[None], scale)[0]
            logits = logits[:, windows[rows], windows[columns]].permute(1, 2, 0).contiguous()
            of_nothing = of_nothing if image.any() else logits
        part.add_(logits, alpha=WEIGHTS[plane])


@torch.inference_mode()
def label_views(total: torch.Tensor) -> np.ndarray:
    """Return the most probable class of each voxel, (X, Y, Z) uint8, the lower of equals; `total` is of `add_view`."""
    classes = np.empty(total.shape[:3], np.uint8)  # filled, since small arrays between what slabs take leave holes
    for x, slab in enumerate(total):
        classes[x] = slab.float().argmax(-1).cpu().numpy()
    return classes


@torch.inference_mode()
def segment_slices(
    networks: dict[str, Vinn],
    volume: np.ndarray,
    voxel_size: float,
    box: Box,
    arithmetic: AbstractContextManager | None = None,
) -> SparsePosterior:
    """Return the class posterior in the box; arguments as of `add_view`, result as of `posterior_of_views`.

    `networks` are those of each plane, in the order of adding.
    """
    device = next(next(iter(networks.values())).parameters()).device
    total = torch.zeros((*box.shape, len(NETWORK_IDS)), dtype=torch.float16, device=device)
    for plane, network in networks.items():
        add_view(total, network, plane, volume, voxel_size, box, arithmetic)
    return posterior_of_views(total, box, volume.shape)


@torch.inference_mode()
def posterior_of_views(total: torch.Tensor, box: Box, shape: tuple[int, ...]) -> SparsePosterior:
    """Return labels, those of FastSurfer to the voxel, and the posterior, of the classes `IDS`.

    The posterior is the softmax of the sum of logits, `total` of `add_view` in the box of a volume of `shape`. That of
    a class which both hemispheres share goes to the side that the label of the voxel has, or to the side of the white
    matter around it. Probabilities below `SMALLEST` count as 0, the others are scaled to sum to 1. What lies more than
    `RIM` voxels away from any label is sure background.

    The sum, more than 1 GB for a head, is emptied: memory holds it beside the parts of the posterior, or these beside
    the whole, not all three.
    """
    ids = np.array(NETWORK_IDS, np.int16)[label_views(total)]
    whole, right = split_hemispheres(insert(ids, box, shape))
    final, right = extract(whole, box), extract(right, box)
    del whole
    near = maximum_filter((ids > 0).view(np.uint8), size=2 * RIM + 1).astype(bool)
    slabs = (_rows_of(total[x], *(part[x].ravel() for part in (near, ids, final, right))) for x in range(len(ids)))
    parts = [_pack(slab) for slab in slabs]
    total.untyped_storage().resize_(0)
    values, classes, counts = map(np.concatenate, zip(*parts, strict=True))
    del parts
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    rows = csr_array((values, classes.astype(np.int32), starts), shape=(len(counts), len(IDS)))
    return SparsePosterior(np.searchsorted(IDS, final).astype(np.uint8), rows)


def _rows_of(
    total: torch.Tensor, near: np.ndarray, ids: np.ndarray, final: np.ndarray, right: np.ndarray
) -> csr_array:
    """Sparse rows of a slab (Y, Z, 79); `ids`, before hemispheres were told apart, and `final` ids are (Y * Z,)."""
    values = torch.softmax(total.float().flatten(0, 1), dim=1).cpu().numpy()
    stored = near & (values[:, 0] <= 1 - BACKGROUND_CUT)
    values[values < SMALLEST] = 0
    values /= values.sum(axis=1, keepdims=True)
    posterior = np.zeros((np.count_nonzero(stored), len(IDS)), np.float32)
    posterior[:, _COLUMNS] = values[stored]
    ids, final, right = ids[stored], final[stored], right[stored]
    posterior[np.ix_(right, _RIGHT)] = posterior[np.ix_(right, _LEFT)]
    posterior[np.ix_(right, _LEFT)] = 0
    # The voxel's own class follows its label, which is decided by parts, not by voxels.
    given = np.where(np.isin(ids, _ONE_SIDED) & right, ids + RIGHT, ids)
    other = np.flatnonzero(given != final)
    here, there = np.searchsorted(IDS, given[other]), np.searchsorted(IDS, final[other])
    posterior[other, there] += posterior[other, here]
    posterior[other, here] = 0
    return sparse_rows(posterior, stored)


def _pack(rows: csr_array) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values, their classes (uint8) and how many each voxel has.

    Copies, made when what the slab took is free again: else they lie between its holes, which are lost.
    """
    return rows.data.copy(), rows.indices.astype(np.uint8), np.diff(rows.indptr)

