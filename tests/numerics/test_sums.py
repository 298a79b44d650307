"""Variances of partial sums, against following each of them in plain Python."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bids_varaug.numerics import reductions
from bids_varaug.numerics.accumulation import (
    bridge,
    follow_products,
    follow_sums,
    modelled_variance,
    unthinned,
)
from bids_varaug.numerics.reductions import deviation_of_positive_sum, draws, follow
from bids_varaug.numerics.specification import DIGITS, How, Rule

RULES = [
    Rule("rr", 24, 24),
    Rule("rr", 24, 24, lanes=4),
    Rule("mca", 20, 24, lanes=16),
    Rule("pb", 24, 24, fma=True),
    Rule("sr", 12, 24, lanes=2, fma=True),
]


def square_ulps(value):
    return 4.0 ** math.frexp(value)[1]


def brute_force(terms, rule):
    """Sum of 4^e over the partial sums that are rounded, in the order of the reference.

    Adding to 0, or 0, rounds nothing, unless exact results are rounded too; the first term of a
    lane is never rounded.
    """
    lanes, partial, total = rule.lanes, [0.0] * rule.lanes, 0.0
    for number, term in enumerate(terms):
        before = partial[number % lanes]
        after = partial[number % lanes] = before + term
        inexact = (term != 0 and before != 0) or (rule.rounds_exact and number >= lanes)
        if inexact and after != 0:
            total += square_ulps(after)
    joined, n = lanes // 2, min(lanes, len(terms))
    while joined:
        for lane in range(n - joined):
            after = partial[lane] + partial[lane + joined]
            inexact = partial[lane] != 0 and partial[lane + joined] != 0
            if (inexact or rule.rounds_exact) and after != 0:
                total += square_ulps(after)
            partial[lane] = after
        joined, n = joined // 2, min(n, joined)
    return total


def rows(dtype="float32", shape=(3, 200, 5), seed=0):
    x = np.random.default_rng(seed).normal(size=shape)
    x[:, 10:30] = 0
    return x.astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_sums_are_followed_term_by_term(rule, dtype):
    x = rows(dtype)
    walk = follow_sums(x, rule)
    for a, b in np.ndindex(walk.sums.shape):
        expected = rule.of_partial_sum * rule.unit * brute_force(x[a, :, b].tolist(), rule)
        assert walk.sums[a, b] == pytest.approx(expected, rel=0.02)
    np.testing.assert_allclose(walk.total, x.sum(1, "f8"), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(walk.energy, (x.astype("f8") ** 2).sum(1), rtol=1e-4)
    after_first = (np.arange(x.shape[1]) >= rule.lanes)[None, :, None]
    counted = (x != 0) | (rule.rounds_exact & after_first)
    np.testing.assert_array_equal(walk.count, counted.sum(1))
    assert not walk.products.any()
    np.testing.assert_array_equal(walk.variance, walk.sums + walk.products)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_products_of_centred_numbers_are_followed(rule):
    x, other = rows(seed=1), rows(seed=2)
    centre, other_centre = x.mean(1), other.mean(1)
    walk = follow_sums(x, rule, other, centre, other_centre)
    terms = (x - centre[:, None]).astype("f8") * (other - other_centre[:, None])
    for a, b in np.ndindex(walk.sums.shape):
        expected = rule.of_partial_sum * rule.unit * brute_force(terms[a, :, b], rule)
        assert walk.sums[a, b] == pytest.approx(expected, rel=0.05)
    energy = (terms**2).sum(1)
    np.testing.assert_allclose(walk.products, rule.of_product * rule.per_energy * energy, rtol=1e-4)
    np.testing.assert_allclose(walk.total, terms.sum(1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_matrix_products_are_followed(rule, dtype):
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(6, 90)).astype(dtype), rng.normal(size=(90, 4)).astype(dtype)
    a[:, 3:9] = 0
    walk = follow_products(a, b, rule)
    for i, j in np.ndindex(6, 4):
        sums = brute_force((a[i] * b[:, j]).tolist(), rule)
        expected = rule.of_partial_sum * rule.unit * sums
        assert walk.sums[i, j] == pytest.approx(expected, rel=0.02)
    # The units of products are taken to be as large as usual for their energy
    terms = a[:, :, None].astype("f8") * b
    of_products = np.exp2(2.0 * np.frexp(terms)[1]) * (terms != 0)
    expected = rule.of_product * rule.unit * of_products.sum(1)
    np.testing.assert_allclose(walk.products, expected, rtol=0.4)
    assert walk.products.mean() == pytest.approx(expected.mean(), rel=0.1)
    np.testing.assert_allclose(walk.total, a.astype("f8") @ b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**100])
def test_neither_small_nor_large_numbers_lose_their_variance(scale):
    rule, x, other = RULES[0], rows(), rows(seed=4)
    tiny = np.float32(scale)
    plain, scaled = follow_sums(x, rule), follow_sums(x * tiny, rule)
    np.testing.assert_allclose(scaled.variance, plain.variance * scale**2, rtol=1e-6)
    a, b = x[0, :20], other[0, :5].T[:, :5].T
    product = follow_products(a, np.ascontiguousarray(b), rule).variance
    of_scaled = follow_products(a * tiny, np.ascontiguousarray(b), rule).variance
    np.testing.assert_allclose(of_scaled / scale**2, product, rtol=1e-6)


def test_long_and_wide_sums_run_in_parallel_with_the_same_result():
    rule = Rule("rr", 24, 24)
    x = np.random.default_rng(5).normal(size=(2, 3000, 40)).astype("f4")
    together = follow_sums(x, rule)
    apart = [follow_sums(x[:, :, b : b + 1], rule).variance for b in range(40)]
    np.testing.assert_allclose(together.variance, np.concatenate(apart, 1), rtol=1e-3)
    pairs = follow_sums(x, rule, x)
    apart = [follow_sums(x[:, :, b : b + 1], rule, x[:, :, b : b + 1]).variance for b in (0, 39)]
    np.testing.assert_allclose(pairs.variance[:, [0, 39]], np.concatenate(apart, 1), rtol=1e-3)
    a, b = np.ascontiguousarray(x[0, :, :].T), x[1, :, :]
    whole = follow_products(a, b, rule).variance
    row = follow_products(a[:1], b[:, :3], rule).variance
    np.testing.assert_allclose(whole[:1, :3], row, rtol=1e-3)


@pytest.mark.parametrize("rule", RULES[:3])
def test_sums_are_those_of_any_memory_layout(rule):
    x, shared = rows(shape=(2, 5000, 11)), rows(shape=(2, 5000, 1), seed=1)
    shared = np.broadcast_to(shared, x.shape)
    layouts = [
        (x, shared),
        (x, shared.copy()),
        (shared, x),
        (x.transpose(2, 1, 0).copy().transpose(2, 1, 0), shared),
        (np.repeat(x, 2, axis=1)[:, ::2], shared),
    ]
    first, *others = (follow_sums(a, rule, b) for a, b in layouts)
    for other in others:
        np.testing.assert_array_equal(other.count, first.count)
        np.testing.assert_allclose(other.variance, first.variance, rtol=1e-6)
        np.testing.assert_allclose(other.total, first.total, rtol=1e-6)


@pytest.mark.parametrize("lanes", [1, 4, 16])
@pytest.mark.parametrize("n_terms", [1, 7, 64, 1000])
def test_bridge_is_the_mean_over_orders_of_the_terms(n_terms, lanes):
    rng = np.random.default_rng(6)
    terms = rng.normal(0.3, 1.0, size=n_terms)
    used = max(1, min(lanes, n_terms))
    total = 0.0
    repeats = 400
    for _ in range(repeats):
        order = rng.permutation(terms)
        for lane in range(used):
            total += (np.cumsum(order[lane::used]) ** 2).sum()
        partial, joined = [order[lane::used].sum() for lane in range(used)], used // 2
        while joined and used & (used - 1) == 0:
            partial = [partial[i] + partial[i + joined] for i in range(joined)]
            total += np.square(partial).sum()
            joined //= 2
    a, b = bridge(n_terms, lanes)
    expected = a * terms.sum() ** 2 + b * (terms**2).sum()
    if used & (used - 1) == 0:
        assert total / repeats == pytest.approx(expected, rel=0.1 if n_terms >= 64 else 0.6)
    else:  # more lanes than terms
        assert 0.3 < total / repeats / expected < 3


@pytest.mark.parametrize("lanes", [1, 16])
@pytest.mark.parametrize("drift", [0.0, 1.0])
def test_thinned_sums_tell_about_all_terms(drift, lanes):
    rule = Rule("rr", 24, 24, lanes=lanes)
    x = (drift + np.random.default_rng(7).normal(size=(1, 4096, 64))).astype("f4")
    full, thin = follow_sums(x, rule), follow_sums(x[:, 4::8], rule)
    found = unthinned(thin, 8, full.total, rule)
    assert 1 / 4 < found.variance.mean() / full.variance.mean() < 4  # 64 sums tell little
    without_total = unthinned(thin, 8, None, rule)
    if drift:
        assert 1 / 4 < without_total.variance.mean() / full.variance.mean() < 4
    if lanes > 1:
        return
    in_order = np.sort(x, axis=1)  # far from independent: a large drift
    full, thin = follow_sums(in_order, rule), follow_sums(in_order[:, 4::8], rule)
    found = unthinned(thin, 8, full.total, rule)
    assert 1 / 4 < found.variance.mean() / full.variance.mean() < 4


def test_model_of_independent_terms_is_right_on_average():
    rule = Rule("rr", 24, 24)
    rng = np.random.default_rng(8)
    a, b = rng.normal(size=(64, 500)).astype("f4"), rng.normal(size=(500, 64)).astype("f4")
    followed = follow_products(a, b, rule).variance.mean()
    y, energy = a.astype("f8") @ b, (a.astype("f8") ** 2) @ (b.astype("f8") ** 2)
    assert modelled_variance(y, energy, 500, rule).mean() == pytest.approx(followed, rel=0.1)


# --------------------------------------------------------------------------------------------------
# Tensors


@pytest.mark.parametrize("dims", [(0,), (1,), (2,), (0, 2), (1, 2), (0, 1, 2)])
def test_axes_are_summed_in_the_order_of_memory(dims):
    x = torch.from_numpy(rows("float64", (4, 60, 5), 9))
    how = How(RULES[0], True, 0)
    kept = [d for d in range(3) if d not in dims]
    for tensor in (x, x.permute(2, 0, 1).contiguous().permute(1, 2, 0)):
        walk = follow(tensor, dims, how)
        flat = x.permute(*kept, *dims).reshape(*[x.shape[d] for d in kept], -1)
        np.testing.assert_allclose(walk.total, flat.sum(-1).numpy(), rtol=1e-9, atol=1e-9)
        for place in np.ndindex(*walk.sums.shape):
            terms = flat[place].reshape(-1).tolist()
            expected = RULES[0].of_partial_sum * RULES[0].unit * brute_force(terms, RULES[0])
            assert walk.sums[place] == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("lanes", [1, 16])
@pytest.mark.parametrize("pairs", [False, True])
def test_other_devices_follow_sums_alike(lanes, pairs):
    rule = Rule("rr", 24, 24, lanes=lanes)
    x, other = (torch.from_numpy(rows(seed=s, shape=(3, 400, 20))) for s in (1, 2))
    centre, other_centre = x.mean(1), other.mean(1)
    given = (other, centre, other_centre) if pairs else (None, None, None)
    by_torch = reductions._follow_with_torch(x, rule, *given)
    compiled = follow_sums(x.numpy(), rule, *(g.numpy() if pairs else None for g in given))
    assert by_torch.variance.mean() == pytest.approx(compiled.variance.mean(), rel=0.25)
    np.testing.assert_allclose(by_torch.total, compiled.total, rtol=1e-3, atol=1e-2)
    np.testing.assert_allclose(by_torch.energy, compiled.energy, rtol=1e-3)
    np.testing.assert_array_equal(by_torch.count, compiled.count)
    if lanes == 1:
        np.testing.assert_allclose(by_torch.sums, compiled.sums, rtol=0.05)


def test_positive_sums_of_equal_terms():
    rule = Rule("rr", 24, 24)
    y = torch.full((3,), 1000 * 0.7)
    followed = follow_sums(np.full((1, 1000, 1), 0.7, "f4"), rule).variance[0, 0]
    deviation = deviation_of_positive_sum(y, 1000, rule)
    assert float(deviation[0]) == pytest.approx(math.sqrt(followed), rel=0.3)
    assert not deviation_of_positive_sum(y, 1, rule).any()


def test_draws_have_variance_one_and_streams_of_their_own():
    first, other, second = draws(1, 40_000), draws(2, 40_000), draws(1, 40_000, 1)
    assert abs(first.var() - 1) < 5 * math.sqrt(2 / 40_000)
    for x in (other, second):
        assert abs(np.corrcoef(first, x)[0, 1]) < 5 / 200
    np.testing.assert_array_equal(first, draws(1, 40_000))


def test_all_formats_have_a_rule():
    for digits in DIGITS.values():
        for mode in ("rr", "pb", "mca", "sr", "ud"):
            rule = Rule(mode, digits, digits)
            assert rule.of_result > 0 and rule.of_product >= rule.of_operand
            assert Rule(mode, digits, digits, fma=True).of_product == 2 * rule.of_operand
