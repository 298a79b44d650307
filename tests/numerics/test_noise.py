"""Noise added in place: the compiled kernels, and the plain torch that other devices run.

Both are held to the same statistics. Bounds are 5 standard errors, seeds are fixed.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bids_varaug.numerics.noise import (
    ChannelNoise,
    perturb_,
    perturb_channels_,
    round_,
    torch_perturb_,
    torch_round_,
)
from bids_varaug.numerics.specification import DIGITS, dither_width
from bids_varaug.numerics.specification import RoundingSpecification as Rule
from tests.numerics.bounds import (
    assert_mean,
    assert_odds,
    assert_uncorrelated,
    assert_variance,
    errors_in_ulps,
    normal,
    steps,
    uniform,
)

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
N = 100_000
QUIET = Rule("pb", 24, 24)  # its last rounding adds nothing




def by_torch(tensor, variance, spec, stream):
    torch_perturb_(tensor, variance.sqrt().to(tensor.dtype), 0.0, spec, stream)


ROUND = pytest.mark.parametrize("rounded", [round_, torch_round_])
PERTURB = pytest.mark.parametrize("perturbed", [perturb_, by_torch])
CHANNELS = pytest.mark.parametrize("perturbed", [perturb_channels_])


# --------------------------------------------------------------------------------------------------
# Rounding once


@pytest.mark.parametrize("variance", [1 / 12, 1 / 6, 1 / 3, 5.0, 1e3, 1e9])
def test_dither_has_the_variance_asked_for(variance):
    width = dither_width(variance)
    draws = np.random.default_rng(0).uniform(-width / 2, width / 2, 400_000)
    assert_variance(np.rint(draws), variance)


@ROUND
@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64])
def test_odds_at_the_precision_of_the_format(dtype, rounded):
    for mode, middle in (("rr", 10), ("mca", 10), ("sr", 10), ("ud", 0)):
        x = uniform(N, low=1.0, high=2.0, dtype=dtype)
        y = x.clone()
        rounded(y, Rule(mode, DIGITS[dtype], DIGITS[dtype]), 7)
        assert_odds(steps(x, y), {-1: 1, 0: middle, 1: 1})


@ROUND
def test_precision_bounding_leaves_results_alone(rounded):
    x = normal(N)
    y = x.clone()
    rounded(y, QUIET, 1)
    assert torch.equal(x, y)


@ROUND
@pytest.mark.parametrize("mode", ["rr", "sr", "ud"])
@pytest.mark.parametrize("dtype, precision", [(F32, 18), (F32, 10), (F64, 30), (F16, 7), (BF16, 5)])
def test_variance_at_a_virtual_precision(dtype, precision, mode, rounded):
    rule = Rule(mode, precision, DIGITS[dtype])
    x = uniform(N, low=1.0, high=2.0, dtype=dtype, seed=3)
    y = x.clone()
    rounded(y, rule, 2**64 - 3)
    errors = errors_in_ulps(x, y, precision)
    # Numbers of the format lie on few fractions of the grid, ties among them
    slack = 2.0 ** -((rule.digits - rule.precision) + 1) + 2.0**-precision if mode == "ud" else 0.0
    assert abs(errors.mean()) <= 5 * math.sqrt(rule.of_result / N) + slack
    assert_variance(errors, rule.of_result, 4.0**-(rule.digits - rule.precision) + (mode == "ud") * 2.0**-precision)
    if mode != "rr":
        on_grid = y.double() / torch.exp2(torch.frexp(y)[1].double() - precision)
        assert torch.equal(on_grid, on_grid.round())


@ROUND
@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64])
@pytest.mark.parametrize("mode", ["rr", "sr", "ud"])
def test_special_values_stay(dtype, mode, rounded):
    info = torch.finfo(dtype)
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, info.max, -info.max])
    x = torch.tensor(special.tolist(), dtype=F64).to(dtype).repeat(200)
    x[x.isinf().roll(3)] = info.max
    for precision in (DIGITS[dtype], 5):
        y = x.clone()
        rounded(y, Rule(mode, precision, DIGITS[dtype]), 5)
        kept = ~torch.isfinite(x) | (x == 0)
        torch.testing.assert_close(x[kept], y[kept], rtol=0, atol=0, equal_nan=True)
        assert torch.isfinite(y[torch.isfinite(x)]).all()


@ROUND
def test_strides_and_values_around_a_part_stay(rounded):
    rule = Rule("ud", 8, 24)
    x = uniform(6, 8, 10, low=1.0, high=2.0)
    for view in (
        lambda t: t[:, ::2],
        lambda t: t.permute(2, 0, 1),
        lambda t: t[1:3, :, 4],
        lambda t: t[2, 3, 4],
        lambda t: t[:, :0],
    ):
        y = x.clone()
        part = view(y)
        rounded(part, rule, 1)
        touched = torch.zeros_like(x, dtype=torch.bool)
        view(touched).fill_(True)
        assert torch.equal(y != x, touched)


# --------------------------------------------------------------------------------------------------
# Noise of a given standard deviation


@PERTURB
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("mode", ["pb", "rr", "sr", "ud"])
def test_deviation_adds_to_the_last_rounding(dtype, mode, perturbed):
    precision = 12
    rule = Rule(mode, precision, DIGITS[dtype])
    x = uniform(N, low=1.1, high=1.9, dtype=dtype)
    ulp = 2.0 ** (1 - precision)
    deviation = ulp * uniform(N, low=0.5, high=3.0, dtype=dtype, seed=1)
    y = x.clone()
    perturbed(y, deviation.double() ** 2, rule, 11)
    own = 0.0 if mode == "pb" else rule.of_result
    scaled = (y - x).double() / (deviation.double() ** 2 + own * ulp**2).sqrt()
    assert_mean(scaled, 0, 1)
    assert_variance(scaled, 1, 0.01)
    assert float(scaled.abs().max()) > 3


@PERTURB
def test_infinite_deviations_and_numbers_do_no_harm(perturbed):
    x = torch.tensor([1.0, math.inf, math.nan, torch.finfo(F32).max, 0.0] * 100)
    y = x.clone()
    perturbed(y, torch.full_like(x, 1e38).double() ** 2, Rule("rr", 24, 24), 3)
    assert torch.equal(x.isinf(), y.isinf()) and torch.equal(x.isnan(), y.isnan())


@PERTURB
def test_deviations_follow_their_elements_in_any_layout(perturbed):
    x = torch.ones(8, 9, 10)
    deviation = torch.zeros(8, 9, 10)
    deviation[2, :, 3] = 0.1
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        y = x.permute(order).contiguous().permute(*np.argsort(order).tolist())
        perturbed(y, deviation**2, QUIET, 3)
        assert ((y != 1) <= (deviation > 0)).all() and (y != 1).sum() > 5
    wide = torch.ones(8, 9, 20)
    perturbed(wide[..., ::2], deviation**2, QUIET, 3)
    y = wide[..., ::2]
    assert ((y != 1) <= (deviation > 0)).all() and (y != 1).sum() > 5
    assert (wide[..., 1::2] == 1).all()


def test_empty_tensors_stay_as_they_are():
    rows, image = torch.empty(0, 3), torch.empty(0, 3, 1, 1, 1)
    perturb_(rows, torch.empty(0, 3), QUIET, 0)
    round_(rows, QUIET, 0)
    perturb_channels_(image, ChannelNoise(np.ones(3)), QUIET, 0)
    assert (rows.shape, image.shape) == ((0, 3), (0, 3, 1, 1, 1))


def test_streams_are_uncorrelated():
    noise, dither = [], []
    for stream in (0, 1, 2**32, 2**63):
        perturb_(y := torch.ones(N), torch.full((N,), 0.01**2), QUIET, stream)
        round_(z := torch.full((N,), 1.5), Rule("rr", 12, 24), stream)
        noise.append(y - 1)
        dither.append(z - 1.5)
    assert_uncorrelated(*noise)
    assert_uncorrelated(*dither)


# --------------------------------------------------------------------------------------------------
# Noise of channels

SHAPE = (2, 3, 8, 12, 10)


def laid_out(tensor, layout):
    """A copy."""
    if layout == "gaps":
        return torch.stack([tensor, tensor], -1)[..., 0]
    return tensor.clone(memory_format=layout)


LAYOUTS = pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last_3d, "gaps"], ids=str
)
QUADRATIC, OFFSET = np.array([1e-6, 4e-6, 0.0]), np.array([0.5, -1.0, 0.0])
LINEAR = np.array([1e-5, 0.0, 2e-5])
SLOPE, INTERCEPT = np.array([1e-3, -2e-3, 0.0]), np.array([0.0, 3e-3, -1e-3])


def column(values):
    return torch.from_numpy(values).reshape(1, -1, 1, 1, 1)


def repeated(perturbed, x, layout, given, rule, n):
    """Results for n streams, (n, ...) float64."""
    results = []
    for stream in range(n):
        y = laid_out(x, layout)
        strides = y.stride()
        perturbed(y, given, rule, 1000 + stream)
        assert y.stride() == strides
        results.append(y.double())
    return torch.stack(results)


@CHANNELS
@LAYOUTS
@pytest.mark.parametrize("dtype", [F32, F64])
def test_noise_grows_with_the_distance_from_the_offset(dtype, layout, perturbed):
    x = normal(*SHAPE, dtype=dtype)
    given = ChannelNoise(QUADRATIC, offset=OFFSET)
    variance = column(QUADRATIC) * (x.double() - column(OFFSET)) ** 2
    rule = Rule("pb", DIGITS[dtype], DIGITS[dtype])
    errors = repeated(perturbed, x, layout, given, rule, 80) - x.double()
    assert not errors[:, :, 2].any()
    away = variance > 1e-10  # where rounding to float32 is negligible
    for channel in (0, 1):
        chosen = away[:, channel]
        scaled = errors[:, :, channel][:, chosen] / variance[:, channel][chosen].sqrt()
        assert_mean(scaled, 0, 1)
        assert abs(float(scaled.square().mean()) - 1) < 0.02
        # Each element by itself
        assert float(scaled.square().mean(0).min()) > 0.3
        assert float(scaled.square().mean(0).max()) < 2.2


@CHANNELS
@LAYOUTS
def test_noise_of_an_energy(layout, perturbed):
    x = normal(*SHAPE)
    energy = uniform(2, *SHAPE[2:], low=0.1, high=4.0)
    given = ChannelNoise(QUADRATIC, LINEAR, OFFSET, energy)
    variance = column(QUADRATIC) * (x.double() - column(OFFSET)) ** 2
    variance = variance + column(LINEAR) * energy[:, None].double()
    kept = energy.clone()
    errors = repeated(perturbed, x, layout, given, QUIET, 60) - x.double()
    assert torch.equal(energy, kept)
    for channel in range(3):
        chosen = variance[:, channel] > 1e-10
        scaled = errors[:, :, channel][:, chosen] / variance[:, channel][chosen].sqrt()
        assert_mean(scaled, 0, 1)
        assert abs(float(scaled.square().mean()) - 1) < 0.02


@CHANNELS
@LAYOUTS
def test_what_a_channel_shares_follows_the_companion(layout, perturbed):
    x = normal(*SHAPE)
    companion = laid_out(normal(*SHAPE, seed=1), layout)
    for other in (None, companion):
        given = ChannelNoise(
            0 * QUADRATIC, slope=SLOPE, intercept=INTERCEPT, companion=other, offset=OFFSET
        )
        common = column(SLOPE) * (x if other is None else other).double() + column(INTERCEPT)
        for rule in (QUIET, Rule("sr", 20, 24)):
            y = laid_out(x, layout)
            perturbed(y, given, rule, 3)
            tolerance = 1e-6 if rule is QUIET else 2.0**-17
            torch.testing.assert_close(y.double(), x.double() + common, rtol=0, atol=tolerance)


@CHANNELS
@LAYOUTS
@pytest.mark.parametrize("mode, precision", [("rr", 24), ("sr", 12), ("ud", 12)])
def test_everything_at_once(mode, precision, layout, perturbed):
    rule = Rule(mode, precision, 24)
    x = normal(*SHAPE)
    companion = laid_out(normal(*SHAPE, seed=1), layout)
    energy = uniform(2, *SHAPE[2:], low=0.1, high=4.0)
    given = ChannelNoise(QUADRATIC, LINEAR, OFFSET, energy, SLOPE, INTERCEPT, companion)
    common = column(SLOPE) * companion.double() + column(INTERCEPT)
    variance = column(QUADRATIC) * (x.double() - column(OFFSET)) ** 2
    variance = variance + column(LINEAR) * energy[:, None].double()
    results = repeated(perturbed, x, layout, given, rule, 60)
    ulp = torch.exp2(torch.frexp(x)[1].double() - precision)
    variance = variance + rule.of_result * ulp**2
    chosen = variance > 1e-8
    scaled = (results - x.double() - common)[:, chosen] / variance.sqrt()[chosen]
    assert_mean(scaled, 0, 1.5)
    assert abs(float(scaled.square().mean()) - 1) < 0.1
    if mode != "rr":
        on_grid = results / torch.exp2(torch.frexp(results)[1].double() - precision)
        assert torch.equal(on_grid, on_grid.round())


@CHANNELS
@LAYOUTS
def test_channels_keep_infinity_and_nan(layout, perturbed):
    x = normal(*SHAPE)
    x[0, 1, 2, 3, 4], x[1, 0, 5], x[0, 2, 1, 1, 1] = math.inf, math.nan, torch.finfo(F32).max
    for given in (
        ChannelNoise(QUADRATIC, offset=OFFSET),
        ChannelNoise(QUADRATIC, LINEAR, energy=torch.ones(2, 8, 12, 10)),
        ChannelNoise(QUADRATIC, slope=SLOPE, intercept=INTERCEPT, companion=x),
    ):
        for rule in (Rule("rr", 24, 24), Rule("sr", 10, 24)):
            y = laid_out(x, layout)
            perturbed(y, given, rule, 3)
            assert torch.equal(y.isnan(), x.isnan()) and torch.equal(y.isinf(), x.isinf())


def test_small_energies_do_not_underflow():
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        x = torch.zeros(1, 2, 8, 8, 64).contiguous(memory_format=layout)
        energy = torch.full((1, 8, 8, 64), 1e-30)
        given = ChannelNoise(np.zeros(2), np.full(2, 1e-14), energy=energy)
        perturb_channels_(x, given, QUIET, 1)
        assert_variance(x.double().numpy().reshape(-1) / 1e-22, 1.0, 0.1)


def test_both_memory_orders_have_noise_of_their_own_and_large_ones_run_in_parallel():
    x = torch.ones(1, 4, 32, 32, 32)
    given = ChannelNoise(np.full(4, 1e-4))
    planes, rows = x.clone(), x.contiguous(memory_format=torch.channels_last_3d).clone()
    perturb_channels_(planes, given, QUIET, 5)
    perturb_channels_(rows, given, QUIET, 5)
    assert_uncorrelated(planes[0], rows[0])
    for y in (planes, rows):
        assert_variance((y - 1).reshape(-1) / 1e-2, 1.0, 0.01)
        assert_uncorrelated(*y[0].reshape(4, -1))
    again = x.clone()
    perturb_channels_(again, given, QUIET, 5)
    assert torch.equal(again, planes)


# ----------------------------------------------------------------------------------------------------------------------
# The generator


def draws_of(stream, n=2**20):
    """Noise of standard deviation 1, in float64."""
    y = torch.zeros(n, dtype=F64)
    perturb_(y, torch.ones(n, dtype=F64), Rule("pb", 53, 53), stream)
    return y.numpy()


def test_generator_has_no_autocorrelation_at_any_lag_to_4096():
    """The largest of 8192 standard normal numbers is beyond 5.5 once in 3,000 seeds."""
    for stream in (1, 2**40 + 7):
        g = draws_of(stream)
        spectrum = np.abs(np.fft.rfft(g, 2 * g.size)) ** 2
        correlation = np.fft.irfft(spectrum)[1:4097] / (g.var() * g.size)
        assert np.abs(correlation).max() * math.sqrt(g.size) < 5.5


def test_generator_is_equally_distributed_and_its_streams_are_apart():
    first, second = draws_of(3), draws_of(4)
    assert_mean(first, 0, 1)
    assert abs(first.var() - 1) < 5 * math.sqrt(2 / first.size)
    below = np.sort(first)[:: first.size // 64][1:]
    shares = np.histogram(second, [-np.inf, *below, np.inf])[0] / second.size
    expected = np.diff([0.0, *np.arange(1, len(below) + 1) / 64, 1.0])
    assert np.abs(shares - expected).max() < 6 * math.sqrt(2 / 64 / second.size) + 2e-3
    assert_uncorrelated(first, second)
    dithers = []
    for stream in (3, 4):
        y = torch.full((2**20,), 1.5)
        round_(y, Rule("rr", 4, 24), stream)
        dithers.append(y.numpy() - 1.5)
    shares = np.histogram(dithers[0], 64)[0] / 2**20
    assert np.abs(shares[1:-1] - 1 / 64).max() < 6 * math.sqrt(1 / 64 / 2**20)
    assert_uncorrelated(*dithers)
