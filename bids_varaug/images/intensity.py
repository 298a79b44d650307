"""Intensity scaling shared by training and inference, so that both see the same numbers."""

from __future__ import annotations

import torch


def normalise_intensity(image: torch.Tensor) -> torch.Tensor:
    """Scale an image so that its floor is 0 and its bright end about 1.

    Floor: the 0.5th percentile of all voxels. Bright end: the 99.5th percentile of the voxels
    above the floor, so that the amount of empty background does not matter. Values are clipped
    to [0, 1.5]. Percentiles come from every 3rd voxel along each axis.

    Parameters
    ----------
    image : (X, Y, Z) float32, any unit

    Returns
    -------
    (X, Y, Z) float32, in [0, 1.5]; all zero where the image is constant
    """
    sample = image[::3, ::3, ::3].reshape(-1)
    floor = _quantile(sample, 0.005)
    above = sample[sample > floor]
    if above.numel() == 0:
        return torch.zeros_like(image)
    top = _quantile(above, 0.995)
    return ((image - floor) / (top - floor).clamp_min(1e-6)).clamp_(0.0, 1.5)


def _quantile(values: torch.Tensor, q: float) -> torch.Tensor:
    # torch.quantile refuses more than 16M values; the nearest order statistic is enough here.
    rank = 1 + round(q * (values.numel() - 1))
    return values.kthvalue(rank).values
