"""Variances of partial sums, against following each of them in plain Python."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bids_varaug.numerics import sums
from bids_varaug.numerics.specification import DIGITS, MODES, RoundingSpecification
from bids_varaug.numerics.sums import blocks_of, blocks_of_products, bridge, energies, partial_sums

SPECS = [
    RoundingSpecification("rr", 24, 24),
    RoundingSpecification("rr", 24, 24, lanes=4),
    RoundingSpecification("mca", 20, 24, lanes=16),
    RoundingSpecification("pb", 24, 24, fma=True),
    RoundingSpecification("sr", 12, 24, lanes=2, fma=True),
]


def square_ulps(value):
    return 4.0 ** math.frexp(value)[1]


def brute_force(terms, spec):
    """Sum of 4^e over the partial sums that are rounded, in the order of the reference, but the last.

    Adding to 0, or 0, rounds nothing, unless exact results are rounded too; the first term of a lane is never rounded.
    """
    lanes, partial, total, after = spec.lanes, [0.0] * spec.lanes, 0.0, 0.0
    for number, term in enumerate(terms):
        before = partial[number % lanes]
        after = partial[number % lanes] = before + term
        inexact = (term != 0 and before != 0) or (spec.rounds_exact and number >= lanes)
        if inexact and after != 0:
            total += square_ulps(after)
    joined, n = lanes // 2, min(lanes, len(terms))
    while joined:
        for lane in range(n - joined):
            after = partial[lane] + partial[lane + joined]
            inexact = partial[lane] != 0 and partial[lane + joined] != 0
            if (inexact or spec.rounds_exact) and after != 0:
                total += square_ulps(after)
            partial[lane] = after
        joined, n = joined // 2, min(n, joined)
    return total - square_ulps(partial[0])


def rows(dtype="float32", shape=(3, 400, 40), seed=0):
    x = np.random.default_rng(seed).normal(size=shape)
    x[:, 10:130] = 0
    return torch.from_numpy(x.astype(dtype))


def expected(terms, spec):
    """(A, n, B) -> (A, B): variance of the sums."""
    places = np.ndindex(terms.shape[0], terms.shape[2])
    found = [brute_force(terms[a, :, b].tolist(), spec) for a, b in places]
    return spec.of_partial_sum * 4.0**-spec.precision * np.reshape(found, (len(terms), -1))


def assert_close(found, truth, each=2.0, pooled=1.1):
    """Standard deviations: nearly each within a factor, and pooled over all."""
    ratio = np.sqrt(found / truth)
    assert np.mean((ratio > 1 / each) & (ratio < each)) > 0.9
    assert 1 / pooled < math.sqrt(found.mean() / truth.mean()) < pooled


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_sums_carry_their_partial_sums(spec, dtype):
    x = rows(dtype)
    blocks = blocks_of(x, (1,))
    assert_close(blocks.variance(spec, 0.0), expected(x.double().numpy(), spec))
    np.testing.assert_allclose(blocks.totals.sum(0), x.double().sum(1), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(blocks.energy, x.double().square().sum(1), rtol=1e-9)
    np.testing.assert_array_equal(blocks.counts.sum(0), (x != 0).sum(1))


@pytest.mark.parametrize("kind", ["positive", "cancelling in order"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_drift_of_partial_sums_is_seen(spec, kind):
    x = torch.from_numpy(np.random.default_rng(1).uniform(0.1, 1, size=(20, 600, 1)))
    if kind != "positive":
        x[:, 300:] *= -1.001
    truth = expected(x.numpy(), spec)
    assert_close(blocks_of(x, (1,)).variance(spec, 0.0), truth, each=1.3, pooled=1.25)
    products = blocks_of_products(x[:, :, 0].numpy(), np.ones((600, 1)))
    assert_close(products.variance(spec, 0.0), truth, each=1.3, pooled=1.25)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_samples_of_products_are_added_up_term_by_term(spec):
    x = rows("float64", (3, 300, 5), 3)
    found = partial_sums(x[:, :, 0].numpy(), x[1].numpy(), spec)
    terms = (x[:, :, :1] * x[1]).numpy()
    variance = spec.per_energy * spec.of_partial_sum * found.squares
    np.testing.assert_allclose(variance[0], expected(terms, spec)[0], rtol=0.02)
    np.testing.assert_allclose(found.energy, (terms**2).sum(1), rtol=0.3)
    np.testing.assert_allclose(found.totals, terms.sum(1))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_products_of_centred_numbers_are_summed(spec):
    x, other = rows(seed=1), rows(seed=2)
    centre, other_centre = x.mean(1), other.mean(1)
    blocks = blocks_of(x, (1,), other, centre, other_centre)
    terms = (x.double() - centre.double()[:, None]) * (other.double() - other_centre.double()[:, None])
    assert_close(blocks.variance(spec, 0.0), expected(terms.numpy(), spec))
    energy = terms.square().sum(1).numpy()
    added = blocks.variance(spec, 1.0) - blocks.variance(spec, 0.0)
    np.testing.assert_allclose(added, spec.per_energy * energy, rtol=1e-4)


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**100])
def test_neither_small_nor_large_numbers_lose_their_variance(scale):
    spec, x = SPECS[0], rows()
    plain, scaled = blocks_of(x, (1,)), blocks_of(x * np.float32(scale), (1,))
    np.testing.assert_allclose(scaled.variance(spec, 1.0), plain.variance(spec, 1.0) * scale**2, rtol=1e-6)


@pytest.mark.parametrize("spec", SPECS[:3], ids=str)
def test_sums_are_those_of_any_memory_layout(spec):
    x, shared = rows(shape=(2, 250, 40)), rows(shape=(2, 250, 1), seed=1).expand(2, 250, 40)
    layouts = [
        (x, shared),
        (x, shared.clone()),
        (x.permute(2, 1, 0).contiguous().permute(2, 1, 0), shared),
        (x.repeat_interleave(2, 1)[:, ::2], shared),
        (shared, x),
    ]
    first, *others = (blocks_of(a, (1,), b) for a, b in layouts)
    for other in others:
        np.testing.assert_allclose(other.totals, first.totals, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(other.variance(spec, 1.0), first.variance(spec, 1.0), rtol=1e-6)


@pytest.mark.parametrize("dims", [(0,), (1,), (2,), (0, 2), (1, 2), (0, 1, 2)])
def test_axes_are_summed_in_their_order(dims):
    x = rows("float64", (4, 160, 5), 9)
    kept = [d for d in range(3) if d not in dims]
    flat = x.permute(*kept, *dims).reshape(-1, math.prod(x.shape[d] for d in dims), 1)
    one = blocks_of(flat, (1,))
    for tensor in (x, x.permute(2, 0, 1).contiguous().permute(1, 2, 0)):
        blocks = blocks_of(tensor, dims)
        assert blocks.energy.shape == tuple(x.shape[d] for d in kept)
        np.testing.assert_allclose(blocks.totals.sum(0).reshape(-1, 1), one.totals.sum(0), rtol=1e-6)
        found = blocks.variance(SPECS[0], 0.0).reshape(-1, 1)
        np.testing.assert_allclose(found, one.variance(SPECS[0], 0.0), rtol=1e-6)


def test_other_devices_sum_alike():
    x, other, centre = rows(seed=1), rows(seed=2), rows(seed=3).mean(1)
    starts = np.array([0, 100, 250, 400])
    middle = centre.double().numpy()
    by_torch = sums._add_blocks_with_torch([x, other], (middle, middle), starts)
    found = np.zeros((3, 3, 3, 40))
    flats, strides = zip(*(sums.flat_view(t) for t in (x, other)), strict=True)
    sums._add_blocks_serial(*flats, *strides, True, middle, middle, starts, found)
    np.testing.assert_allclose(by_torch.numpy(), found, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("lanes", [1, 4, 16])
@pytest.mark.parametrize("n_terms", [64, 1000])
def test_bridge_is_the_mean_over_orders_of_the_terms(n_terms, lanes):
    rng = np.random.default_rng(6)
    terms = rng.normal(0.3, 1.0, size=n_terms)
    total, repeats = 0.0, 400
    for _ in range(repeats):
        order = rng.permutation(terms)
        for lane in range(lanes):
            total += (np.cumsum(order[lane::lanes]) ** 2)[1:].sum()
        partial, joined = [order[lane::lanes].sum() for lane in range(lanes)], lanes // 2
        while joined:
            partial = [partial[i] + partial[i + joined] for i in range(joined)]
            total += np.square(partial).sum()
            joined //= 2
        total -= partial[0] ** 2
    a, b = bridge(n_terms, lanes)
    expected = a * terms.sum() ** 2 + b * (terms**2).sum()
    assert total / repeats == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_energies_are_sums_of_squares(order):
    x = rows(shape=(7, 9, 600)).permute(order).contiguous().permute(*np.argsort(order).tolist())
    weights = np.linspace(0, 2, 9)
    truth = (x.double().square() * torch.from_numpy(weights)[:, None]).sum(1)
    torch.testing.assert_close(energies(x, weights), truth)


def test_all_formats_have_a_specification():
    for digits in DIGITS.values():
        for mode in MODES:
            spec = RoundingSpecification(mode, digits, digits)
            assert spec.of_result > 0 and spec.of_product >= spec.of_operand
            assert RoundingSpecification(mode, digits, digits, fma=True).of_product == 2 * spec.of_operand
