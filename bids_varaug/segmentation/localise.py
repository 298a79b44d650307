"""Where in the head the brain is: found once, at half the resolution, for all members."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from bids_varaug.images.conform import Geometry
from bids_varaug.images.crop import Box, bounds, enclose, extract
from bids_varaug.models.unet import UNet
from bids_varaug.segmentation.predict import segment_volume

MARGIN_MM = 8.0
"""Beyond what is found at half the resolution, on each side, before the sides are rounded up."""
_PLAUSIBLE_CM3 = (400.0, 2500.0)


def localise_brain(network: UNet, head: np.ndarray, voxel_size: float) -> Box:
    """Return the part of a head box that holds the brain.

    The network segments the head at half the resolution, which takes an eighth of the time. What it finds is enlarged
    by `MARGIN_MM` and to sides that the network takes. Where that is no brain by its size (400 to 2500 cm3), the whole
    head is returned.

    Parameters
    ----------
    network : trained on images of both resolutions
    head : as the image of `segment_volume`
    voxel_size : of the network grid, mm
    """
    multiple = network.shape.multiple
    half = F.avg_pool3d(torch.from_numpy(np.ascontiguousarray(head))[None], 2)[0].numpy()
    # Empty voxels after it, to two multiples at least: the network cannot normalise a level of one voxel.
    missing = [max(-side % multiple, 2 * multiple - side) for side in half.shape]
    brain = segment_volume(network, np.pad(half, [(0, n) for n in missing])).labels > 0
    low_cm3, high_cm3 = _PLAUSIBLE_CM3
    if not low_cm3 <= brain.sum() * (2 * voxel_size) ** 3 / 1000 <= high_cm3:
        return Box((0, 0, 0), head.shape)
    margin = round(MARGIN_MM / voxel_size)
    low, high = bounds(brain)
    return enclose(2 * low - margin, 2 * high + margin, head.shape, multiple)


def crop_to_brain(network: UNet, head: np.ndarray, geometry: Geometry) -> tuple[np.ndarray, Geometry]:
    """Cut the part that holds the brain out of a head box (see `localise_brain`); returns it and its geometry."""
    part = localise_brain(network, head, geometry.voxel_size)
    return extract(head, part), replace(geometry, box=part.within(geometry.box))
