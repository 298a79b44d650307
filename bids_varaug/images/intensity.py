"""Intensities on one scale, whatever unit, offset and padding an image has."""

from __future__ import annotations

import numpy as np
import torch
from scipy.ndimage import label

PADDING_SHARE = 0.002  # of the voxels on the image's faces, or of all: a value that more have is no tissue's
MAX_SPIKE_SHARE = 1e-3  # at most 1e-4 in the real images at hand; 6e-3 with MP2RAGE's noise, 7e-3 where tissue wrapped
_MOST_LEVELS = 1 << 16
_EVERY = 3  # of the voxels along each axis, where quantiles are taken


def standardise(raw: np.ndarray, negative: bool = False) -> np.ndarray:
    """Scale a whole image (X, Y, Z) so that air is 0 and its brightest voxels about 1, float32.

    Air: the 0.5th percentile of the voxels that are no padding; what is below, and padding of whatever value, becomes
    0. Scaled images, ``a * x``, give the same bits, also shifted ones where their values are whole numbers, or were
    before they were scaled: such numbers are recovered from floating point by their spacing. `raw` is of any real type
    and unit, finite, not constant; `negative` says that bright is stored as small.
    """
    padding = _constants(_faces(raw))
    rest = raw[::_EVERY, ::_EVERY, ::_EVERY]
    rest = rest[~np.isin(rest, padding)]
    inner = _constants(rest)  # empty air within other padding; no saturated tissue
    padding = np.append(padding, inner[inner < rest.max(initial=0)])
    rest = rest[~np.isin(rest, padding)]
    if rest.size == 0 or rest.min() == rest.max():
        rest = raw.ravel()
    first, step = _spacing(np.unique(rest).astype(np.float64))

    def whole(part: np.ndarray) -> np.ndarray:
        part = (-1 if negative else 1) * (part.astype(np.float64) - first) / (step or 1)
        return np.rint(part) if step else part

    rest = whole(rest)
    air, top = np.quantile(rest, 0.005, method="lower"), rest.max()
    air = air if air < top else rest.min()
    result = np.empty(raw.shape, np.float32)
    for part, out in zip(raw, result, strict=True):
        out[...] = ((whole(part) - air) / (top - air)).clip(0)
    if (whole(padding) > air).any():  # tissue may have such values too, but not up to the edge
        parts, _ = label(np.isin(raw, padding))
        outside = np.unique(_faces(parts))
        result[np.isin(parts, outside[outside > 0])] = 0
    return result


def _faces(data: np.ndarray) -> np.ndarray:
    return np.concatenate([np.take(data, end, i).ravel() for i in range(3) for end in (0, -1)])


def _constants(data: np.ndarray) -> np.ndarray:
    """Values of more than `PADDING_SHARE` of the voxels (N,), nearly always side by side.

    The noise of air has frequent values too, where they are whole numbers, but no constant ones.
    """
    values, counts = np.unique(data, return_counts=True)
    runs, repeats = np.unique(data[1:][data[1:] == data[:-1]], return_counts=True)
    counts = counts[np.searchsorted(values, runs)]
    return runs[(counts > PADDING_SHARE * data.size) & (repeats > 0.75 * counts)]


def _spacing(levels: np.ndarray) -> tuple[float, float]:
    """Origin and step of equally spaced values (N,) float64, in order; step 0 where they are not.

    >>> _spacing(np.array([0.5, 1.0, 2.5]))
    (0.5, 0.5)
    """
    gaps = np.diff(levels)
    with np.errstate(all="ignore"):
        counts = np.rint(gaps / gaps.min())
        step = (levels[-1] - levels[0]) / counts.sum()
        steps = (levels - levels[0]) / step
    even = counts.sum() < _MOST_LEVELS and np.abs(steps - np.rint(steps)).max() < 0.1
    return float(levels[0]), float(step) if even else 0.0


def spike_share(image: np.ndarray) -> float:
    """Share of voxels of an image (X, Y, Z) that differ from both neighbours on a line by most of its range.

    Most: 0.75 of the range between the 0.5th and 99.5th percentiles, up on one side and down on the other. Partial
    volume keeps heads from it; noise over the whole range and wrapped values do not.
    """
    low, high = np.quantile(image[::_EVERY, ::_EVERY, ::_EVERY], [0.005, 0.995])
    spikes = voxels = 0
    for axis in range(3):
        lines = tuple(slice(None, None, 1 if other == axis else 2) for other in range(3))
        steps = np.moveaxis(np.diff(image[lines].clip(low, high), axis=axis), axis, 0)
        large = np.abs(steps) > 0.75 * (high - low)
        spikes += int(np.count_nonzero(large[1:] & large[:-1] & (steps[1:] * steps[:-1] < 0)))
        voxels += steps.size
    return spikes / voxels


def normalise_intensity(image: torch.Tensor) -> torch.Tensor:
    """Scale an image (X, Y, Z) float32 of any unit to [0, 1.5]: its floor to 0, its bright end to 1.

    Shared by training and inference, so that both see the same numbers. Floor: the 0.5th percentile of all voxels.
    Bright end: the 99.5th percentile of the voxels above the floor, so that the amount of empty background does not
    matter. Percentiles come from every 3rd voxel along each axis. A constant image becomes 0.
    """
    sample = image[::_EVERY, ::_EVERY, ::_EVERY].reshape(-1)
    floor = _quantile(sample, 0.005)
    above = sample[sample > floor]
    if above.numel() == 0:
        return torch.zeros_like(image)
    top = _quantile(above, 0.995)
    return ((image - floor) / (top - floor)).clamp_(0.0, 1.5)


def _quantile(values: torch.Tensor, q: float) -> torch.Tensor:
    # torch.quantile refuses more than 16M values; the nearest order statistic is enough here.
    rank = 1 + round(q * (values.numel() - 1))
    return values.kthvalue(rank).values
