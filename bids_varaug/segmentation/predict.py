"""Segment one volume with one network."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import label, maximum_filter
from scipy.sparse import csr_array, diags_array, vstack

from bids_varaug.images.intensity import normalise_intensity
from bids_varaug.models.unet import Features, UNet
from bids_varaug.segmentation.posterior import BACKGROUND_CUT, SparsePosterior, sparse_rows

SLABS = 8  # at once
RIM = 4  # voxels around the brain whose posterior is kept


@torch.inference_mode()
def segment_volume(network: UNet, image: np.ndarray) -> SparsePosterior:
    """Return the class posterior of one head.

    What is not connected with the brain (specks in neck, scalp and meninges) becomes sure background, and so does
    everything more than `RIM` voxels away from it. The last layer runs a few slabs at a time, of which only voxels
    stay that are not surely background: the dense posterior (1 GB for a whole head and 32 classes) never exists.

    Within `MonteCarloArithmetic` what torch computes is perturbed: intensities, network, softmax. The largest component
    and its surroundings are found by scipy, exactly.

    Parameters
    ----------
    network : in evaluation mode, on the device to use
    image : (X, Y, Z) float32, any unit, head box of the network grid, RAS; sides are multiples of
        ``network.shape.multiple``, else a `ValueError`
    """
    if image.ndim != 3 or any(side % network.shape.multiple for side in image.shape):
        raise ValueError(f"image of shape {image.shape}: sides must be multiples of {network.shape.multiple}")
    device = next(network.parameters()).device
    tensor = normalise_intensity(torch.from_numpy(np.ascontiguousarray(image)).to(device))
    features = network.features_by_slabs(tensor[None, None])
    parts = [_classify(network, part) for part in features.by_slabs(SLABS)]
    del features
    labels = np.concatenate([part for part, _ in parts])
    rows = vstack([part for _, part in parts], format="csr")
    del parts
    found = labels > 0
    brain = largest_component(found)
    labels[~brain] = 0
    # A speck beside the brain goes with its posterior: the consensus would bring it back.
    near = maximum_filter(brain.view(np.uint8), size=2 * RIM + 1).astype(bool) & (brain | ~found)
    rows = diags_array(near.ravel().astype(np.float32)) @ rows
    rows.eliminate_zeros()
    return SparsePosterior(labels, rows)


def _classify(network: UNet, part: Features) -> tuple[np.ndarray, csr_array]:
    """Return labels (S, Y, Z) uint8 and sparse rows of a few slabs."""
    logits = network.classify(part)[0].movedim(0, -1)
    posterior = F.softmax(logits, dim=-1).flatten(0, 2)
    stored = posterior[:, 0] <= 1 - BACKGROUND_CUT
    labels = logits.argmax(-1).to(torch.uint8)
    rows = sparse_rows(posterior[stored].cpu().numpy(), stored.cpu().numpy())
    return labels.cpu().numpy(), rows


def largest_component(mask: np.ndarray) -> np.ndarray:
    """Keep the largest face-connected part of a mask (X, Y, Z) bool.

    >>> largest_component(np.array([[[1, 1, 0, 1]]], bool)).astype(int).tolist()
    [[[1, 1, 0, 0]]]
    """
    parts, n_parts = label(mask)
    if n_parts < 2:
        return mask.copy()
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    return parts == sizes.argmax()
