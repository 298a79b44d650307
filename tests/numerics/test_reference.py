"""Instruction-level arithmetic against closed forms, exact rationals, torch and published numbers.

Random numbers are seeded. Bands are 5 standard errors unless a test says otherwise: with another
seed a correct implementation would fail one comparison in about two million.
"""

from __future__ import annotations

import dataclasses
import math
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
import torch

from tests.numerics import reference
from tests.numerics.reference import Arithmetic

F32, F64 = np.dtype("float32"), np.dtype("float64")
DIGITS = {F32: 24, F64: 53}
N = 20_000


def full(value, dtype, n=N):
    return np.full(n, value, dtype)


def assert_frequency(observed, probability, n=N):
    assert abs(observed - probability) <= 5 * math.sqrt(probability * (1 - probability) / n) + 1e-12


def assert_variance(sample, expected):
    """Within 5 standard errors of a normal sample's variance: more than enough for these."""
    ratio = np.var(np.asarray(sample, F64), ddof=1) / expected
    assert abs(ratio - 1) <= 5 * math.sqrt(2 / (len(sample) - 1))


# --------------------------------------------------------------------------------------------------
# Without randomness


def any_numbers(dtype, n, seed):
    """Of any magnitude, a good part of them special."""
    rng = np.random.default_rng(seed)
    integers = np.dtype(f"uint{8 * dtype.itemsize}")
    numbers = rng.integers(0, 2 ** (8 * dtype.itemsize), n, integers).view(dtype)
    special = [0.0, -0.0, 1.0, 2.0, 1.5, np.inf, -np.inf, np.nan, np.finfo(dtype).max]
    special += [np.finfo(dtype).tiny, np.finfo(dtype).smallest_subnormal]
    chosen = rng.random(n) < 0.2
    return np.where(chosen, rng.choice(np.array(special, dtype), n), numbers)


def moderate_numbers(dtype, n, seed):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=n) * 2.0 ** rng.integers(-20, 20, n)).astype(dtype)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("numbers", [any_numbers, moderate_numbers])
def test_rounding_to_nearest_is_what_the_processor_does(dtype, numbers):
    a, b = numbers(dtype, N, 1), numbers(dtype, N, 2)
    ieee = Arithmetic("ieee")
    with np.errstate(all="ignore"):
        for ours, theirs in (
            (reference.add(a, b, ieee), a + b),
            (reference.multiply(a, b, ieee), a * b),
            (reference.divide(a, b, ieee), a / b),
            (reference.sqrt(np.abs(a), ieee), np.sqrt(np.abs(a))),
        ):
            np.testing.assert_array_equal(ours, theirs)
            number = ~np.isnan(theirs)
            np.testing.assert_array_equal(np.signbit(ours[number]), np.signbit(theirs[number]))


def test_sums_run_in_the_stated_order():
    x = moderate_numbers(F32, 5003, 0)
    assert reference.total(x, Arithmetic("ieee")) == np.cumsum(x)[-1]
    partial = [np.cumsum(x[lane::4])[-1] for lane in range(4)]
    in_lanes = (partial[0] + partial[2]) + (partial[1] + partial[3])
    assert reference.total(x, Arithmetic("ieee", lanes=4)) == in_lanes
    y = moderate_numbers(F32, 5003, 1)
    assert reference.dot(x, y, Arithmetic("ieee")) == np.cumsum(x * y)[-1]


@pytest.mark.parametrize("n", [0, 1, 2, 3, 5, 15, 16, 17])
def test_every_term_counts_once_in_any_number_of_lanes(n):
    x = (2.0 ** np.arange(n)).astype(F32)
    for lanes in (1, 2, 4, 16):
        assert reference.total(x, Arithmetic("sr", lanes=lanes)) == 2**n - 1
        for fma in (False, True):
            arithmetic = Arithmetic("rr", lanes=lanes, fma=fma)
            assert reference.dot(x, np.full_like(x, 3), arithmetic) == 3 * (2**n - 1)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_fused_multiply_add_rounds_once(dtype):
    a, b = moderate_numbers(dtype, 500, 3), moderate_numbers(dtype, 500, 4)
    error = [
        float(Fraction(x) * Fraction(y) - Fraction(p))
        for x, y, p in zip(a.tolist(), b.tolist(), (a * b).tolist(), strict=True)
    ]
    fused = reference.multiply_add(a, b, -(a * b), Arithmetic("ieee", fma=True))
    assert fused.tolist() == error and np.any(fused != 0)
    assert not np.any(reference.multiply_add(a, b, -(a * b), Arithmetic("ieee")))
    pair = np.stack([np.ones_like(a), a], axis=1), np.stack([-(a * b), b], axis=1)
    assert reference.dot(*pair, Arithmetic("ieee", fma=True)).tolist() == error


def test_exponential_is_correctly_rounded():
    x = np.random.default_rng(0).uniform(-30, 30, 300)
    with localcontext(prec=60):
        exact = [Decimal(value).exp() for value in x.tolist()]
    assert reference.exp(x, Arithmetic("ieee")).tolist() == [float(value) for value in exact]
    extremes = np.array([0, -0.0, 709.7, 800, -800, np.inf, -np.inf, np.nan])
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(
            reference.exp(extremes, Arithmetic("sr")), np.exp(extremes), rtol=4e-16
        )


@pytest.mark.parametrize("mode", reference.MODES)
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_special_values_pass(mode, dtype):
    arithmetic = Arithmetic(mode)
    zero, one, inf, nan = np.array([[0.0], [1.0], [np.inf], [np.nan]], dtype)
    assert reference.add(zero, zero, arithmetic) == 0
    assert reference.multiply(zero, one, arithmetic) == 0
    assert reference.add(inf, one, arithmetic) == np.inf
    assert reference.divide(one, zero, arithmetic) == np.inf
    assert reference.divide(one, inf, arithmetic) == 0
    for result in (
        reference.add(nan, one, arithmetic),
        reference.add(inf, -inf, arithmetic),
        reference.multiply(zero, inf, arithmetic),
        reference.sqrt(-one, arithmetic),
        reference.multiply_add(one, nan, one, arithmetic),
    ):
        assert np.isnan(result[0])
    large = full(np.finfo(dtype).max, dtype, 3)
    assert np.all(np.isinf(reference.multiply(large, large, arithmetic)))
    small = full(5 * np.finfo(dtype).smallest_subnormal, dtype, 100)
    halves = reference.multiply(small, full(0.5, dtype, 100), arithmetic)
    steps = np.unique(halves / np.finfo(dtype).smallest_subnormal)
    assert set(steps) <= {1.0, 2.0, 3.0, 4.0}


# --------------------------------------------------------------------------------------------------
# One instruction: closed forms

EXACT = {
    "add": lambda a, b: Fraction(a) + Fraction(b),
    "multiply": lambda a, b: Fraction(a) * Fraction(b),
    "divide": lambda a, b: Fraction(a) / Fraction(b),
    "sqrt": lambda a: Fraction(Decimal(a).sqrt()),
    "exp": lambda a: Fraction(Decimal(a).exp()),
}


@pytest.mark.parametrize("operation", EXACT)
@pytest.mark.parametrize(
    ("dtype", "precision"), [(F32, 24), (F32, 11), (F32, 2), (F64, 53), (F64, 52), (F64, 24)]
)
def test_stochastic_rounding_goes_up_with_the_fraction(operation, dtype, precision):
    """Also the mean is then the exact result; its neighbours come from exact rationals."""
    for operands in ((1.2345678, 0.0712345), (0.43210987, 0.56789012), (7.1234567, -4.3)):
        numbers = [float(dtype.type(x)) for x in operands]
        if operation in ("sqrt", "exp"):
            numbers = numbers[:1]
        with localcontext(prec=80):
            exact = EXACT[operation](*numbers)
        unit = Fraction(2) ** (math.frexp(abs(float(exact)))[1] - precision)
        below = exact // unit * unit
        fraction = float((exact - below) / unit)
        arrays = [full(x, dtype) for x in numbers]
        for mode, chance in (("sr", fraction), ("cestac", 0.5)):
            arithmetic = Arithmetic(mode, seed=1, precision=precision)
            result = getattr(reference, operation)(*arrays, arithmetic)
            if fraction == 0:
                chance = 0.0
            assert set(np.unique(result).tolist()) <= {float(below), float(below + unit)}
            assert_frequency(np.mean(result == float(below + unit)), chance)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_below_a_power_of_two_the_grid_is_finer(dtype):
    unit = 2.0 ** -DIGITS[dtype]  # just below 1
    result = reference.add(full(1, dtype), full(-unit / 4, dtype), Arithmetic("sr", seed=2))
    assert set(np.unique(result).tolist()) == {1 - unit, 1.0}
    assert_frequency(np.mean(result == 1), 0.75)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_random_rounding_at_full_precision_is_stochastic_rounding(dtype):
    """round(k + f + xi) is k + 1 with probability f: variance f (1 - f) ulp^2."""
    ulp = float(np.finfo(dtype).eps)
    for fraction in (0.125, 0.5, 0.8125):
        step = full((2 + fraction) * ulp, dtype)
        result = reference.add(full(1.25, dtype), step, Arithmetic("rr", seed=3))
        assert_frequency(np.mean(result == 1.25 + 3 * ulp), fraction)
        assert set(np.unique((result - 1.25) / ulp)) == {2.0, 3.0}


def test_random_rounding_keeps_the_format():
    """At t=22, x in the format: j/4 ulp of t, j = round(4 xi), odds 1:2:2:2:1 for -2..2."""
    unit = 2.0**-21
    result = reference.add(
        full(1.25, F32), full(unit / 4, F32), Arithmetic("rr", seed=4, precision=22)
    )
    moved = (result.astype(F64) - 1.25 - unit / 4) * 4 / unit
    for j, odds in zip(range(-2, 3), (1, 2, 2, 2, 1), strict=True):
        assert_frequency(np.mean(moved == j), odds / 8)
    # Far below the format's precision the noise is uniform over one ulp of t
    coarse = Arithmetic("rr", seed=5, precision=11)
    result = reference.add(full(1.25, F32), full(0.1, F32), coarse).astype(F64)
    assert_variance(result, (2.0**-10) ** 2 / 12)
    assert np.abs(result - 1.35).max() <= 2.0**-11 + 2.0**-22
    assert abs(result.mean() - 1.25 - float(F32.type(0.1))) < 5 * 2.0**-10 / math.sqrt(12 * N)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_operands_are_perturbed_by_one_ulp_each(dtype):
    """Variance of (a + u xi)(b + u xi'): (a^2 + b^2) u^2 / 12; mca adds the result's u_r^2 / 12."""
    a, b, unit = 1.25, 1.75, 2.0**-10
    arrays = full(a, dtype), full(b, dtype)
    bounded = (a**2 + b**2) * unit**2 / 12
    pb = reference.multiply(*arrays, Arithmetic("pb", seed=6, precision=11))
    assert_variance(pb, bounded)
    mca = reference.multiply(*arrays, Arithmetic("mca", seed=7, precision=11))
    assert_variance(mca, bounded + (2 * unit) ** 2 / 12)
    # a + b = 3: both operands' ulp is half the result's
    pb = reference.add(*arrays, Arithmetic("pb", seed=8, precision=11))
    assert_variance(pb, 2 * unit**2 / 12)
    quotient = reference.divide(*arrays, Arithmetic("pb", seed=9, precision=11))
    assert_variance(quotient, (1 / b**2 + a**2 / b**4) * unit**2 / 12)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_operands_are_perturbed_at_full_precision(dtype):
    """Chances that the result moves; u the ulp in [1, 2), xi and xi' uniform in (-1/2, 1/2)."""
    unit = float(np.finfo(dtype).eps)
    pb = Arithmetic("pb", seed=10)

    def moved(operation, *operands, arithmetic=pb):
        return getattr(reference, operation)(*(full(x, dtype) for x in operands), arithmetic)

    # 1.25 x 1.75, ulp 2u: where |1.75 xi + 1.25 xi'| > 1
    assert_frequency(np.mean(moved("multiply", 1.25, 1.75) != 2.1875), 0.25 / 2.1875)
    # 1.25 + 1.75, ulp 2u: |xi + xi'| > 1 never happens; with the result's 2u xi'' in mca it does
    assert np.all(moved("add", 1.25, 1.75) == 3)
    mca = Arithmetic("mca", seed=10)
    # |xi + xi' + 2 xi''| > 1: by conditioning on the triangular xi + xi', E max(0, |s|) / 2 = 1/6
    assert_frequency(np.mean(moved("add", 1.25, 1.75, arithmetic=mca) != 3), 1 / 6)
    # 1.5 / 1.5 = 1 + u (xi - xi') / 1.5; numbers below 1 are u/2 apart
    assert_frequency(np.mean(moved("divide", 1.5, 1.5) > 1), 0.25**2 / 2)
    assert_frequency(np.mean(moved("divide", 1.5, 1.5) < 1), 0.625**2 / 2)
    # sqrt(1 + 2u xi) = 1 + u xi at one bit less
    less = Arithmetic("pb", seed=11, precision=DIGITS[dtype] - 1)
    assert_frequency(np.mean(moved("sqrt", 1, arithmetic=less) < 1), 0.25)
    # exp(1 + u xi) = e + e u xi, ulp 2u
    with localcontext(prec=80):
        place = Decimal(1).exp() / Decimal(2 * unit)
        fraction = float(place - int(place))
        below = float(int(place) * Decimal(2 * unit))
    chance = 0.5 + (fraction - 0.5) / (math.e / 2)
    assert_frequency(np.mean(moved("exp", 1) > below), min(1.0, max(0.0, chance)))
    # 1.25 x 1.75 + 4, ulp 4u: |1.75 xi + 1.25 xi' + 4 xi''| > 2, by conditioning E |s| / 4
    fused = moved("multiply_add", 1.25, 1.75, 4, arithmetic=Arithmetic("pb", seed=12, fma=True))
    drawn = np.random.default_rng(0).uniform(-0.5, 0.5, (2, 1_000_000))
    spread = np.abs(1.75 * drawn[0] + 1.25 * drawn[1]).mean() / 4
    assert_frequency(np.mean(fused != 6.1875), spread)


@pytest.mark.parametrize("mode", ["rr", "sr", "cestac"])
@pytest.mark.parametrize("precision", [24, 12])
def test_exact_results_stay(mode, precision):
    arithmetic = Arithmetic(mode, precision=precision)
    rng = np.random.default_rng(0)
    a, b = rng.integers(-40, 40, (2, N)).astype(F32)
    np.testing.assert_array_equal(reference.add(a, b, arithmetic), a + b)
    np.testing.assert_array_equal(reference.multiply(a, b, arithmetic), a * b)
    squares = a * a
    np.testing.assert_array_equal(reference.sqrt(squares, arithmetic), np.abs(a))


def test_up_down_moves_the_nearest_number_by_one_ulp():
    a, b = moderate_numbers(F32, N, 5), moderate_numbers(F32, N, 6)
    result = reference.multiply(a, b, Arithmetic("ud", seed=1))
    bits = result.view(np.int32).astype(int) - (a * b).view(np.int32)
    assert set(np.unique(bits)) == {-1, 1}
    assert_frequency(np.mean(bits == 1), 0.5)
    ones = reference.multiply(full(1, F32), full(1, F32), Arithmetic("ud", seed=1))
    assert set(np.unique(ones).tolist()) == {1 - 2.0**-24, 1 + 2.0**-23}


# --------------------------------------------------------------------------------------------------
# Sums of many terms


def predicted_variance(terms, lanes=1):
    """Of a sum under sr: one rounding of mean variance u^2 / 6 at each partial sum."""
    partial = [list(np.cumsum(terms[lane::lanes], dtype=F64)) for lane in range(lanes)]
    results = [value for lane in partial for value in lane[1:]]
    ends = [lane[-1] for lane in partial]
    while len(ends) > 1:
        half = len(ends) // 2
        ends = [ends[i] + ends[i + half] for i in range(half)]
        results += ends
    ulps = 2.0 ** (np.frexp(results)[1] - 24)
    return np.sum(ulps**2) / 6


def test_variance_of_a_sum_within_one_binade():
    """n equal terms with fraction f of an ulp: n f (1 - f) ulp^2, without any approximation."""
    ulp, fraction, n, repeats = 2.0**-23, 0.3125, 1000, 2000
    terms = np.full((repeats, n + 1), (40 + fraction) * ulp, F32)
    terms[:, 0] = 1
    sums = reference.total(terms, Arithmetic("sr", seed=1)).astype(F64)
    variance = n * fraction * (1 - fraction) * ulp**2
    assert_variance(sums, variance)
    expected = 1 + n * (40 + fraction) * ulp
    assert abs(sums.mean() - expected) < 5 * math.sqrt(variance / repeats)


@pytest.mark.parametrize("mode", ["sr", "rr"])
def test_variance_of_sums_and_the_gain_of_lanes(mode):
    terms = np.random.default_rng(3).uniform(size=2000).astype(F32)
    repeated = np.broadcast_to(terms, (1500, 2000))
    sums = {
        lanes: reference.total(repeated, Arithmetic(mode, seed=2, lanes=lanes)) for lanes in (1, 16)
    }
    for lanes, sample in sums.items():
        # The terms' own fractions add some 2 % to the uncertainty of the prediction
        ratio = np.var(sample.astype(F64), ddof=1) / predicted_variance(terms, lanes)
        assert 0.8 < ratio < 1.2
    assert sums[16].astype(F64).std() < 0.15 * sums[1].astype(F64).std()


# --------------------------------------------------------------------------------------------------
# Published harmonic sums

LARGEST = 150_000
REPEATS = 120


def harmonic_sums(mode, sizes):
    """(R, S) float64: 1 + 1/2 + ... + 1/n in float32, every quotient and every sum rounded."""
    sums, start = np.empty((REPEATS, len(sizes)), F32), 0
    arithmetic = Arithmetic(mode, seed=1)
    for i, size in enumerate(sizes):
        n = np.broadcast_to(np.arange(start + 1, size + 1, dtype=F32), (REPEATS, size - start))
        terms = reference.divide(np.ones_like(n), n, arithmetic.at(i, 0))
        if i > 0:
            terms = np.concatenate([sums[:, i - 1 : i], terms], axis=1)
        sums[:, i] = reference.total(terms, arithmetic.at(i, 1))
        start = size
    return sums.astype(F64)


def agreement(published, sums):
    """Published over ours: ratio of variances (pooled over n and builds), mean and rms of z."""
    ours = sums.var(axis=0, ddof=1)
    deviation, mean = published["std"].to_numpy(), published["mean"].to_numpy()
    variance_ratio = np.mean(deviation**2 * 3 / 2 / ours)  # ddof 0, 3 repeats
    z = (mean - sums.mean(axis=0)) / np.sqrt(ours * (1 / 3 + 1 / REPEATS))
    return variance_ratio, z.mean(), np.sqrt(np.mean(z**2))


@pytest.fixture(scope="module")
def harmonic(request):
    """Function (mode, tools) -> agreement of each tool, both builds pooled."""
    shared_data = request.getfixturevalue("shared_data")
    table = pd.read_csv(shared_data / "paper_tables/fuzzy-pytorch/harmonic-numerics.csv")
    table = table[table.iterations <= LARGEST]
    sizes = np.sort(table.iterations.unique())

    def compare(mode, tools):
        sums = np.tile(harmonic_sums(mode, sizes), 2)
        found = {}
        for tool in tools:
            rows = table[table.tool == tool].sort_values(["mode", "iterations"])
            assert rows.iterations.tolist() == sizes.tolist() * 2
            found[tool] = agreement(rows, sums)
        return found

    return compare


@pytest.mark.parametrize(
    ("mode", "tools", "others"),
    [
        ("sr", ["prism_sr", "verrou_sr", "sr"], ["prism_ud", "verrou_cestac"]),
        ("rr", ["prism_sr", "verrou_sr", "sr"], ["prism_ud", "verrou_cestac"]),
        ("ud", ["prism_ud"], ["prism_sr", "verrou_cestac"]),
        ("cestac", ["verrou_cestac"], ["prism_ud", "verrou_sr"]),
        ("mca", ["verificarlo"], ["prism_ud", "verrou_cestac"]),
    ],
)
def test_published_harmonic_sums(harmonic, mode, tools, others):
    """1 + 1/2 + ... + 1/n has the mean and spread that arXiv:2605.25991 found with each tool.

    63 values of n from 100 to 150,000, two builds of each tool, 3 repeats of each: 252 degrees of
    freedom, a standard error of 9 % of the pooled variance ratio; ours, with 120 repeats shared by
    all n, adds some 6 %. The band of the ratio is 4 standard errors down and 5 up. The mean and
    rms of z have standard errors of 0.18 (our mean is shared) and 0.06.

    Three things that the table does not say, or that differ from what one might expect:

    - prism_ud is *not* one of the two neighbours of the exact result with probability 1/2 each:
      that is CESTAC (mode cestac, verrou_cestac), which drifts upwards and is 4 times too wide
      here. PRISM moves the nearest number by one ulp either way (mode ud).
    - Verificarlo's mode is not recorded. Its default, mca, fits both builds pooled (variance ratio
      1.0); the builds differ from each other (optimised 0.8, debugging 1.2 for n up to a million),
      so that rr fits the optimised one as well (1.15) and not the other (1.85). rr is therefore
      compared with the tools for stochastic rounding, which it is at full precision.
    - cadna's spread is 8 times wider than that of its rounding mode (cestac), the same in both
      builds; whatever it holds, it is left out.
    """
    found = harmonic(mode, tools + others)
    for tool in tools:
        variance_ratio, mean_z, rms_z = found[tool]
        assert 0.6 < variance_ratio < 1.5, tool
        assert abs(mean_z) < 0.9 and 0.7 < rms_z < 1.3, tool
    for tool in others:
        variance_ratio, _, rms_z = found[tool]
        assert not (0.6 < variance_ratio < 1.5 and rms_z < 1.3), tool


# --------------------------------------------------------------------------------------------------
# Composed functions: unbiased about torch in float64

SEEDS = 24


def float32(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(F32)


def in_torch(function, *arrays):
    """Result in float64, and the gradients of its inner product with what gradient() gives."""
    inputs = [torch.tensor(array, dtype=torch.float64, requires_grad=True) for array in arrays]
    result = function(*inputs)
    result.backward(torch.tensor(gradient(result.shape), dtype=torch.float64))
    return result.detach().numpy(), [x.grad.numpy() for x in inputs]


def gradient(shape):
    return float32(*shape, seed=99)


def assert_unbiased(function, exact, rms=1.4):
    """Mean error over its own standard error has rms 1 over the elements, and is some ulp at most.

    `function` takes an Arithmetic. With R seeds z is t-distributed with R - 1 degrees of freedom;
    rms 1.4 is 5 standard errors off for 100 independent elements. Few elements, or errors shared
    through a rounded mean or standard deviation, ask for more room.
    """
    sample = np.stack([function(Arithmetic("sr", seed)) for seed in range(SEEDS)]).astype(F64)
    assert sample.shape[1:] == exact.shape
    deviation = sample.std(axis=0, ddof=1)
    moving = deviation > 0
    assert moving.mean() > 0.9
    z = (sample.mean(axis=0) - exact)[moving] * np.sqrt(SEEDS) / deviation[moving]
    assert np.sqrt(np.mean(z**2)) < rms
    assert np.abs(sample - exact).max() < 100 * 2.0**-24 * np.abs(exact).max()


def test_matmul():
    a, b = float32(12, 30, seed=1), float32(30, 10, seed=2)
    exact, (for_a, for_b) = in_torch(torch.matmul, a, b)
    assert_unbiased(lambda how: reference.matmul(a, b, how), exact)
    g = gradient(exact.shape)
    assert_unbiased(lambda how: reference.matmul(g, b.T, how), for_a)
    assert_unbiased(lambda how: reference.matmul(a.T, g, how), for_b)


def test_dot_and_total_over_the_last_axis():
    a, b = float32(3, 20, 40, seed=1), float32(3, 20, 40, seed=2)
    a64, b64 = a.astype(F64), b.astype(F64)
    assert_unbiased(lambda how: reference.dot(a, b, how), (a64 * b64).sum(-1))
    assert_unbiased(lambda how: reference.total(a, how), a64.sum(-1))


@pytest.mark.parametrize("kernel", [(3, 3, 3), (1, 3, 5)])
def test_convolution_and_its_gradients(kernel):
    x, weight, bias = float32(2, 3, 4, 5, 6), float32(4, 3, *kernel, seed=1), float32(4, seed=2)
    padding = [k // 2 for k in kernel]
    exact, (for_x, for_weight, for_bias) = in_torch(
        lambda *inputs: torch.nn.functional.conv3d(*inputs, padding=padding), x, weight, bias
    )
    g = gradient(exact.shape)
    assert_unbiased(lambda how: reference.conv3d(x, weight, bias, how), exact)
    assert_unbiased(lambda how: reference.conv3d_input_gradient(g, weight, how), for_x)
    assert_unbiased(lambda how: reference.conv3d_weight_gradient(g, x, kernel, how), for_weight)
    rows = np.ascontiguousarray(g.swapaxes(0, 1)).reshape(4, -1)
    assert_unbiased(lambda how: reference.total(rows, how), for_bias, rms=4)


def test_convolution_in_double_precision():
    x, weight = (float32(1, 2, 4, 4, 4).astype(F64), float32(2, 2, 3, 3, 3, seed=1).astype(F64))
    exact = torch.nn.functional.conv3d(torch.tensor(x), torch.tensor(weight), padding=1).numpy()
    result = reference.conv3d(x, weight, None, Arithmetic("rr"))
    assert result.dtype == F64
    assert 0 < np.abs(result - exact).max() < 1e-14
    single = reference.conv3d(x, weight, None, Arithmetic("rr", precision=24))
    assert 1e-8 < np.abs(single - exact).max() < 1e-5


def torch_norm(groups):
    def function(x, scale, shift):
        if groups is None:
            return torch.nn.functional.batch_norm(x, None, None, scale, shift, training=True)
        return torch.nn.functional.group_norm(x, groups, scale, shift)

    return function


@pytest.mark.parametrize("fma", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4, None])
def test_normalisation_and_its_gradients(groups, fma):
    x = float32(3, 4, 3, 4, 5) * 2 + 1
    scale, shift = float32(4, seed=1), float32(4, seed=2)
    exact, gradients = in_torch(torch_norm(groups), x, scale, shift)
    g = gradient(exact.shape)

    def forward(how):
        return reference.normalise(x, scale, shift, groups, _with(how, fma))

    def backward(how):
        _, mean, inverse_std = forward(how.at(0))
        return reference.normalise_gradient(
            g, x, mean, inverse_std, scale, groups, _with(how.at(1), fma)
        )

    assert_unbiased(lambda how: forward(how)[0], exact, rms=4)
    for i, expected in enumerate(gradients):
        assert_unbiased(lambda how, i=i: backward(how)[i], expected, rms=4)


def _with(arithmetic, fma):
    return dataclasses.replace(arithmetic, fma=fma)


def test_normalisation_without_scale_or_shift():
    x, scale, shift = float32(2, 3, 8), float32(3, seed=1), float32(3, seed=2)
    ieee = Arithmetic("ieee")
    bare, mean, inverse_std = reference.normalise(x, None, None, 3, ieee)
    assert mean.shape == inverse_std.shape == (2, 3)
    np.testing.assert_allclose(mean, x.mean(-1), rtol=1e-5)
    np.testing.assert_allclose(inverse_std, 1 / np.sqrt(x.var(-1) + 1e-5), rtol=1e-5)
    scaled = reference.normalise(x, scale, None, 3, ieee)[0]
    np.testing.assert_array_equal(scaled, bare * scale[:, None])
    shifted = reference.normalise(x, None, shift, 3, ieee)[0]
    np.testing.assert_array_equal(shifted, bare + shift[:, None])


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_softmax_and_its_gradient(axis):
    x = float32(5, 6, 7) * 2
    exact, (for_x,) = in_torch(lambda x: torch.softmax(x, axis), x)
    g = gradient(exact.shape)
    assert_unbiased(lambda how: reference.softmax(x, axis, how), exact)
    assert_unbiased(
        lambda how: reference.softmax_gradient(
            g, reference.softmax(x, axis, how.at(0)), axis, how.at(1)
        ),
        for_x,
    )


# --------------------------------------------------------------------------------------------------
# Seeds


def test_one_seed_gives_the_same_bits_everywhere():
    x, weight = float32(1, 2, 3, 3, 3), float32(2, 2, 3, 3, 3, seed=1)
    first, again = (reference.conv3d(x, weight, None, Arithmetic("rr", 5)) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert np.any(first != reference.conv3d(x, weight, None, Arithmetic("rr", 6)))
    # What was seen first, with numba 0.68 on x86-64
    third = reference.divide(full(1, F32, 4), full(3, F32, 4), Arithmetic("sr", 7))
    assert third.view(np.int32).tolist() == [0x3EAAAAAA, 0x3EAAAAAB, 0x3EAAAAAB, 0x3EAAAAAA]
    x = np.array([1.1, -2.3, 3.7, 5.9])
    squares = [1.2100000005720706, 5.2899999979056345, 13.690000000182385, 34.81000002737002]
    assert reference.multiply(x, x, Arithmetic("rr", 7, precision=30)).tolist() == squares


@pytest.mark.parametrize("other", [Arithmetic("sr", 1), Arithmetic("sr", 0).at(0)])
def test_seeds_are_uncorrelated(other):
    a, b = moderate_numbers(F32, N, 1), moderate_numbers(F32, N, 2)
    ups = [
        reference.multiply(a, b, how) > a.astype(F64) * b.astype(F64)
        for how in (Arithmetic("sr", 0), other)
    ]
    # Both errors have the same chance of going up in each element; remove it
    error = [up - (up_chance(a, b)) for up in ups]
    correlation = np.corrcoef(*error)[0, 1]
    assert abs(correlation) < 5 / math.sqrt(N)
    successive = np.corrcoef(error[0][1:], error[0][:-1])[0, 1]
    assert abs(successive) < 5 / math.sqrt(N)


def up_chance(a, b):
    exact = a.astype(F64) * b.astype(F64)
    place = exact / 2.0 ** (np.frexp(exact)[1] - 24)
    return place - np.floor(place)


# --------------------------------------------------------------------------------------------------
# Errors

X = np.zeros((2, 4, 3, 3, 3), F32)
W = np.zeros((5, 4, 3, 3, 3), F32)
A = Arithmetic()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Arithmetic("nearest"), "mode='nearest': must be one of ieee, rr"),
        (lambda: Arithmetic(precision=1), "precision=1: must be an integer, 2 to 24"),
        (lambda: Arithmetic(precision=54), "precision=54"),
        (lambda: Arithmetic(precision=11.5), "precision=11.5"),
        (lambda: Arithmetic(seed=-1), "seed=-1"),
        (lambda: Arithmetic(lanes=12), "lanes=12: must be a power of two"),
        (lambda: Arithmetic(lanes=0), "lanes=0"),
        (lambda: reference.sqrt(X, Arithmetic(precision=25)), "precision=25: must be 2 to 24 for"),
        (lambda: reference.add(X, X, "rr"), "arithmetic='rr': must be an Arithmetic"),
        (lambda: reference.add(X, X.astype(F64), A), "a: float32, b: float64; must be arrays"),
        (lambda: reference.exp(X.astype("int32"), A), "a: int32"),
        (lambda: reference.add(1.0, 2.0, A), "float"),
        (lambda: reference.add(X, np.zeros(7, F32), A), r"\(2, 4, 3, 3, 3\)"),
        (lambda: reference.total(F32.type(1), A), r"x of shape \(\)"),
        (lambda: reference.dot(X, W, A), "must be the same"),
        (lambda: reference.matmul(X[0, 0, 0], W[0, 0, 0, :2], A), r"\(M, K\) and \(K, N\)"),
        (lambda: reference.conv3d(X, W[:, :3], None, A), r"x of shape .* weight of shape"),
        (lambda: reference.conv3d(X, W[..., :2], None, A), "odd KX, KY, KZ"),
        (lambda: reference.conv3d(X, W, np.zeros(4, F32), A), r"bias of shape \(4,\)"),
        (lambda: reference.conv3d_input_gradient(X, W, A), "gradient of shape"),
        (lambda: reference.conv3d_input_gradient(X, W[0], A), "weight of shape"),
        (lambda: reference.conv3d_weight_gradient(X, X[:1], (3, 3, 3), A), "gradient of shape"),
        (lambda: reference.conv3d_weight_gradient(X, X, (3, 2, 3), A), "odd KX, KY, KZ"),
        (
            lambda: reference.normalise(X, None, None, 3, A),
            "groups=3: must be None or divide the 4",
        ),
        (lambda: reference.normalise(X, X[0, 0, 0, 0], None, 2, A), r"scale of shape \(3,\)"),
        (lambda: reference.normalise(X[:0], None, None, 2, A), "not empty"),
        (
            lambda: reference.normalise_gradient(X, X, X[0, 0, 0, 0], X[0, :, 0, 0, 0], None, 2, A),
            r"mean of shape \(3,\): must be \(2, 2\)",
        ),
        (
            lambda: reference.normalise_gradient(
                W, X, X[:, :2, 0, 0, 0], X[:, :2, 0, 0, 0], None, 2, A
            ),
            "gradient of shape",
        ),
        (lambda: reference.softmax(X, 5, A), "axis=5 of an array of shape"),
        (lambda: reference.softmax_gradient(X, W, 1, A), "gradient of shape"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
