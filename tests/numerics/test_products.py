"""Noise of matrix products: where operands lie in memory does not matter, nor does their size."""

from __future__ import annotations

import pytest
import torch

from bids_varaug.numerics import products
from bids_varaug.numerics.products import DIRECT, perturb_product
from bids_varaug.numerics.specification import RoundingSpecification

M, K, N = 90, 70, 130


def noise(a, b, bias=None, layout=None, seed=1):
    """What is added to the product, in units of the product's spread."""
    y = a @ b if bias is None else torch.addmm(bias, a, b)
    perturbed = y.clone() if layout is None else layout(y)
    bias = None if bias is None else bias.expand(y.shape)
    perturb_product(perturbed, a, b, bias, RoundingSpecification("rr", 24, 24), seed)
    return ((perturbed.double() - y.double()) / float(y.std())).flatten()


def operands(scale=1.0):
    assert DIRECT < M * K * N
    rng = torch.Generator().manual_seed(0)
    return scale * torch.randn(M, K, generator=rng), torch.randn(K, N, generator=rng)


def test_noise_is_that_of_any_memory_layout():
    a, b = operands()
    bias = torch.linspace(-1, 1, N)
    as_they_are = noise(a, b, bias)
    transposed = noise(a.T.contiguous().T, b.T.contiguous().T, bias)
    with_gaps = noise(a.repeat(1, 2)[:, :K], b.repeat(1, 2)[:, :N], bias)
    into_columns = noise(a, b, bias, lambda y: y.T.contiguous().T)
    for other in (transposed, with_gaps, into_columns):
        assert float(torch.corrcoef(torch.stack([as_they_are, other]))[0, 1]) > 0.99


@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
def test_sample_tells_what_all_partial_sums_tell(scale, monkeypatch):
    a, b = operands(scale)
    sampled = torch.stack([noise(a, b, seed=seed) for seed in range(20)])
    monkeypatch.setattr(products, "DIRECT", M * K * N)
    followed = torch.stack([noise(a, b, seed=seed) for seed in range(20)])
    assert 0.93 < float(sampled.std() / followed.std()) < 1.07


def test_columns_have_noise_of_their_own_size():
    a, b = operands()
    sizes = torch.logspace(-6, 3, N)
    spread = torch.stack([noise(a, b * sizes, seed=seed) for seed in range(20)])
    spread = spread.reshape(20, M, N).std((0, 1)) / sizes.double()
    assert float(spread.max() / spread.min()) < 2


def test_infinity_and_nan_stay_where_they_are():
    a, b = operands()
    a[3], b[:, 5] = torch.inf, torch.nan
    y = a @ b
    perturbed = y.clone()
    perturb_product(perturbed, a, b, None, RoundingSpecification("rr", 24, 24), 1)
    assert torch.equal(perturbed.isnan(), y.isnan())
    assert torch.equal(perturbed.isinf(), y.isinf())
