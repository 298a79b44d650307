"""What training minimises: cross-entropy plus soft Dice."""

from __future__ import annotations

import torch
import torch.nn.functional as F

DEEP_WEIGHT = 0.4  # of the mean loss of the decoder's coarser levels


def segmentation_loss(
    logits: torch.Tensor, target: torch.Tensor, balanced: bool = False
) -> torch.Tensor:
    """Mean cross-entropy plus one minus the mean soft Dice of the structures present.

    Parameters
    ----------
    logits : (V, K) float32
    target : (V,) int64, class index, 0 = background
    balanced : weigh a voxel by one over the square root of its class's voxels, so that small
        structures are learnt early; the posteriors are then no longer calibrated

    Returns
    -------
    () float32
    """
    log_p = F.log_softmax(logits, dim=1)
    log_true = log_p.gather(1, target[:, None])
    count = torch.bincount(target, minlength=logits.shape[1]).to(log_p.dtype)
    weight = count.clamp_min(1.0).rsqrt()[target] if balanced else torch.ones_like(count)[target]
    cross_entropy = -(weight * log_true[:, 0]).sum() / weight.sum()
    # Not index_add, whose order of sums changes from run to run on a GPU
    overlap = torch.zeros_like(log_p).scatter(1, target[:, None], log_true.exp()).sum(0)
    dice = (2 * overlap + 1.0) / (log_p.exp().sum(0) + count + 1.0)
    present = count[1:] > 0
    if not bool(present.any()):
        return cross_entropy
    return cross_entropy + 1.0 - dice[1:][present].mean()


def training_loss(
    network,
    image: torch.Tensor,
    target: torch.Tensor,
    seed: int,
    balanced: bool = False,
    body_only: bool = False,
) -> torch.Tensor:
    """Loss of the finest logits, plus that of the decoder's coarser levels.

    The finest logits are those of every second voxel along two axes, at a phase drawn from `seed`:
    a quarter of the voxels gives the same gradient on average; the last layer and the softmax of
    all would take half of a training step. With `body_only` they are those of
    `UNet.coarse_logits`. Each deep level is compared with the label in the middle of each of its
    voxels.

    Parameters
    ----------
    network : UNet
    image : (X, Y, Z) float32
    target : (X, Y, Z) uint8
    balanced : see `segmentation_loss`
    body_only : the image is on the grid of the network's body
    """
    if body_only:
        logits, levels = network.coarse_logits(image[None, None])
        sampled = target
    else:
        a, b = seed % 2, (seed // 2) % 2
        features = network.features(image[None, None])
        logits, levels = network.classify_rows(features, a, b), features.deep
        sampled = target[a::2, :, b::2]
    loss = _loss_of_rows(logits, sampled, balanced)
    deep = []
    for level, head in zip(levels, network.deep_heads, strict=True):
        step = image.shape[0] // level.shape[2]
        middle = (slice(step // 2, None, step),) * 3
        deep.append(_loss_of_rows(head(level).movedim(1, -1), target[middle], balanced))
    return loss + DEEP_WEIGHT * torch.stack(deep).mean() if deep else loss


def _loss_of_rows(logits: torch.Tensor, target: torch.Tensor, balanced: bool) -> torch.Tensor:
    rows = logits.reshape(-1, logits.shape[-1]).float()
    return segmentation_loss(rows, target.reshape(-1).long(), balanced)
