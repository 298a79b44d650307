"""Segment one volume with one network."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import label, maximum_filter

from bids_varaug.images.intensity import normalise_intensity
from bids_varaug.models.unet import Features, UNet
from bids_varaug.segmentation.posterior import BACKGROUND_CUT, SparsePosterior

SLABS = 8  # at once; even, since two slabs of voxels are one of the network's body
RIM = 4  # voxels around the brain whose posterior is kept


@torch.inference_mode()
def segment_volume(network: UNet, image: np.ndarray) -> SparsePosterior:
    """Return the class posterior of one head.

    What is not connected with the brain (specks in neck and scalp) becomes background, and so does
    everything more than `RIM` voxels away from it. The last layer runs a few slabs at a time, once
    for the labels and once for the posterior near the brain, so that the dense posterior (1 GB for
    a whole head and 32 classes) never exists.

    Within `MonteCarloArithmetic` what torch computes is perturbed: intensities, network, softmax.
    The largest component and its surroundings are found by scipy, exactly.

    Parameters
    ----------
    network : in evaluation mode, on the device to use
    image : (X, Y, Z) float32, any unit, head box of the network grid, RAS; sides are multiples
        of ``network.shape.multiple``

    Returns
    -------
    SparsePosterior

    Raises
    ------
    ValueError
        If a side is not such a multiple.
    """
    multiple = network.shape.multiple
    if image.ndim != 3 or any(side % multiple for side in image.shape):
        raise ValueError(f"image of shape {image.shape}: sides must be multiples of {multiple}")
    device = next(network.parameters()).device
    tensor = normalise_intensity(torch.from_numpy(np.ascontiguousarray(image)).to(device))
    features = network.features_by_slabs(tensor[None, None])
    features = Features(features.body, features.rim)  # the deep levels are for training only
    labels = np.concatenate([
        network.classify(part)[0].argmax(0).to(torch.uint8).cpu().numpy()
        for part in _slabs(features)
    ])  # fmt: skip
    brain = largest_component(labels > 0)
    labels[~brain] = 0
    near = maximum_filter(brain.view(np.uint8), size=2 * RIM + 1).astype(bool)
    counts, voxels, rows = [], [], []
    for start, part in zip(range(0, image.shape[0], SLABS), _slabs(features), strict=True):
        inside = near[start : start + SLABS].reshape(SLABS, -1)
        if not inside.any():
            counts += [0] * SLABS
            continue
        logits = network.classify(part)[0].permute(1, 2, 3, 0).flatten(1, 2)
        posterior = F.softmax(logits, dim=-1)
        stored = torch.from_numpy(inside).to(device) & (posterior[..., 0] <= 1 - BACKGROUND_CUT)
        counts += stored.sum(1).tolist()
        voxels.append(stored.nonzero()[:, 1].to(torch.int32).cpu().numpy())
        rows.append(posterior[stored].cpu().numpy())
    return SparsePosterior(
        labels=labels,
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        voxels=np.concatenate(voxels) if voxels else np.empty(0, np.int32),
        posterior=np.concatenate(rows) if rows else np.empty((0, network.shape.n_classes), "f4"),
    )


def _slabs(features: Features) -> Iterator[Features]:
    """Cut features into `SLABS` slabs of voxels, which are half as many of the body."""
    for start in range(0, features.rim.shape[2], SLABS):
        stop = start + SLABS
        yield Features(features.body[:, :, start // 2 : stop // 2], features.rim[:, :, start:stop])


def largest_component(mask: np.ndarray) -> np.ndarray:
    """Keep the largest face-connected part of a mask.

    Parameters
    ----------
    mask : (X, Y, Z) bool

    Returns
    -------
    (X, Y, Z) bool, all False where `mask` is

    Examples
    --------
    >>> largest_component(np.array([[[1, 1, 0, 1]]], bool)).astype(int).tolist()
    [[[1, 1, 0, 0]]]
    """
    parts, n_parts = label(mask)
    if n_parts < 2:
        return mask.copy()
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    return parts == sizes.argmax()
