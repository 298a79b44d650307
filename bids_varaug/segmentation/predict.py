"""Segment one volume with one network."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from bids_varaug.images.intensity import normalise_intensity
from bids_varaug.models.unet import Features, UNet
from bids_varaug.segmentation.posterior import BACKGROUND_CUT, SparsePosterior

_SLABS_AT_ONCE = 8  # even: two slabs of voxels are one slab of the network's body


@torch.inference_mode()
def segment_volume(network: UNet, image: np.ndarray) -> SparsePosterior:
    """Return the class posterior of one head.

    The last layer and the softmax run a few slabs at a time, so that the dense posterior (1 GB for
    a whole head and 32 classes) never exists.

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
    features = network.features(tensor[None, None])
    body, rim = features.body, features.rim
    del features  # the deep levels are for training only
    labels = np.empty(image.shape, np.uint8)
    counts = np.zeros(image.shape[0], np.int64)
    voxels, rows = [], []
    for start in range(0, image.shape[0], _SLABS_AT_ONCE):
        stop = start + _SLABS_AT_ONCE
        part = Features(body[:, :, start // 2 : stop // 2], rim[:, :, start:stop])
        logits = network.classify(part)[0].permute(1, 2, 3, 0).flatten(1, 2)
        posterior = F.softmax(logits, dim=-1)
        best = posterior.argmax(-1).to(torch.uint8)
        labels[start:stop] = best.cpu().numpy().reshape(-1, *image.shape[1:])
        stored = posterior[..., 0] <= 1 - BACKGROUND_CUT
        counts[start:stop] = stored.sum(1).cpu().numpy()
        voxels.append(stored.nonzero()[:, 1].to(torch.int32).cpu().numpy())
        rows.append(posterior[stored].cpu().numpy())
    return SparsePosterior(
        labels=labels,
        offsets=np.concatenate([[0], np.cumsum(counts)]),
        voxels=np.concatenate(voxels),
        posterior=np.concatenate(rows),
    )
