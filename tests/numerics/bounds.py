"""Statistical bounds that tests of the engine share: 5 standard errors, seeds fixed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    ),
]
INTEGERS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


def normal(*shape, dtype=torch.float32, seed=0):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(dtype)


def uniform(*shape, low=0.0, high=1.0, dtype=torch.float32, seed=0):
    values = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (low + (high - low) * values).to(dtype)


def steps(before, after):
    """How many numbers of the format each element moved, away from zero positive."""
    kind = INTEGERS[before.dtype]
    moved = after.contiguous().view(kind).to(torch.int64) - before.contiguous().view(kind)
    return moved.cpu()


def errors_in_ulps(before, after, precision):
    """Differences in units of ``2^(e - t)`` of the first, float64."""
    exponent = torch.frexp(before.detach())[1].double()
    difference = after.detach().double() - before.detach().double()
    return (difference / torch.exp2(exponent - precision)).cpu().numpy().reshape(-1)


def assert_mean(sample, expected, sd):
    sample = np.asarray(sample, "f8")
    assert abs(sample.mean() - expected) <= 5 * sd / math.sqrt(sample.size)


def assert_variance(sample, expected, slack=0.0):
    """Within 5 standard errors, taken from the sample's own fourth moment, and `slack`."""
    squares = np.asarray(sample, "f8") ** 2
    error = squares.std() / math.sqrt(squares.size)
    assert abs(squares.mean() - expected) <= 5 * error + slack * expected


def assert_odds(moved, odds):
    """Shares of the values of `moved`: odds by value, nothing else."""
    moved = np.asarray(moved).reshape(-1)
    assert set(np.unique(moved).tolist()) <= set(odds)
    total = sum(odds.values())
    for value, weight in odds.items():
        share = weight / total
        error = math.sqrt(share * (1 - share) / moved.size)
        assert abs(np.mean(moved == value) - share) <= 5 * error


def assert_uncorrelated(*samples):
    correlation = np.corrcoef([np.asarray(s, "f8").reshape(-1) for s in samples])
    np.fill_diagonal(correlation, 0)
    assert np.abs(correlation).max() <= 5 / math.sqrt(np.asarray(samples[0]).size)
