"""What training minimises: cross-entropy plus soft Dice."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def segmentation_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy plus one minus the mean soft Dice of the structures present.

    Parameters
    ----------
    logits : (V, K) float32
    target : (V,) int64, class index, 0 = background

    Returns
    -------
    () float32
    """
    log_p = F.log_softmax(logits, dim=1)
    cross_entropy = F.nll_loss(log_p, target)
    truth = F.one_hot(target, logits.shape[1]).to(log_p.dtype)
    p = log_p.exp()
    count = truth.sum(0)
    overlap = (p * truth).sum(0)
    dice = (2 * overlap + 1.0) / (p.sum(0) + count + 1.0)
    present = count[1:] > 0
    if not bool(present.any()):
        return cross_entropy
    return cross_entropy + 1.0 - dice[1:][present].mean()


def sampled_loss(network, image: torch.Tensor, target: torch.Tensor, seed: int) -> torch.Tensor:
    """Loss on every second voxel along two axes, at a phase drawn from `seed`.

    A quarter of the voxels gives the same gradient on average; the last layer and the softmax of
    all voxels would take half of a training step.

    Parameters
    ----------
    network : UNet
    image : (X, Y, Z) float32
    target : (X, Y, Z) uint8
    """
    a, b = seed % 2, (seed // 2) % 2
    logits = network.classify_rows(network.features(image[None, None]), a, b)
    labels = target[a::2, :, b::2].reshape(-1).long()
    return segmentation_loss(logits.reshape(-1, logits.shape[-1]).float(), labels)
