"""The context manager: what rounds, how strongly, where, and what is refused.

Bounds are 5 standard errors, seeds are fixed.
"""

from __future__ import annotations

import math
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bids_varaug.numerics import MonteCarloArithmetic
from bids_varaug.numerics.context import _mixed
from bids_varaug.numerics.specification import DIGITS
from bids_varaug.numerics.specification import RoundingSpecification as Rule
from tests.numerics.bounds import (
    DEVICES,
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
N = 60_000
MODES = ("rr", "pb", "mca", "sr", "ud")
FORMATS = [(F32, None), (F32, 20), (F32, 11), (F32, 5), (F64, None), (F64, 40), (F64, 24)]


def sample(dtype=F32, n=N, seed=0):
    """Numbers whose roots fill two binades."""
    return uniform(n, low=1.0, high=16.0, dtype=dtype, seed=seed)


# --------------------------------------------------------------------------------------------------
# One instruction


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [F32, F64])
def test_odds_of_random_rounding_are_one_ten_one(dtype, device):
    x = sample(dtype).to(device)
    with MonteCarloArithmetic("rr", seed=1):
        y = x.sqrt()
    assert_odds(steps(x.sqrt(), y), {-1: 1, 0: 10, 1: 1})


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", ["rr", "sr", "ud"])
@pytest.mark.parametrize("dtype, precision", FORMATS)
def test_variance_of_one_result_is_that_of_the_rule(dtype, precision, mode, device):
    digits = DIGITS[dtype]
    rule = Rule(mode, precision or digits, digits)
    x = sample(dtype).to(device)
    with MonteCarloArithmetic(mode, precision, seed=2):
        y = x.sqrt()
    errors = errors_in_ulps(x.sqrt(), y, rule.precision)
    # Up-down at the format's own precision starts from a number of the format
    expected = 1.0 if mode == "ud" and rule.precision == digits else rule.of_result
    # Up-down rounds ties away from zero, and below a power of two the grid is finer
    slack = 2.0 ** -((rule.digits - rule.precision) + 1) + 2.0**-rule.precision if mode == "ud" else 0.0
    assert abs(errors.mean()) <= 5 * math.sqrt(expected / errors.size) + slack
    assert_variance(errors, expected, 0.01 + 2 * 2.0**-rule.precision)


@pytest.mark.parametrize("mode", ["pb", "mca"])
@pytest.mark.parametrize("dtype, precision", [(F32, 18), (F32, 11), (F64, 45), (F64, 24)])
def test_perturbed_operands_add_their_share(dtype, precision, mode):
    rule = Rule(mode, precision, DIGITS[dtype])
    x, y = (uniform(N, low=1.0, high=1.4, dtype=dtype, seed=s) for s in (1, 2))
    with MonteCarloArithmetic(mode, precision, seed=3):
        product, ratio = x * y, x / y
    for exact, result, weight in (
        (x * y, product, x**2 + y**2),
        (x / y, ratio, 1 / y**2 + (x / y**2) ** 2),
    ):
        of_operands = rule.of_operand * weight.double() * 4.0 ** (1 - precision)
        exponent = torch.frexp(exact)[1].double()
        own = (rule.of_result - rule.of_format) * torch.exp2(2 * (exponent - precision))
        scaled = (result.double() - exact.double()) / (of_operands + own).sqrt()
        assert_mean(scaled, 0, 1)
        assert_variance(scaled, 1, 0.02)


def test_errors_of_random_rounding_are_uniform_at_low_precision():
    x = sample()
    with MonteCarloArithmetic("rr", 8, seed=1):
        y = x.sqrt()
    errors = errors_in_ulps(x.sqrt(), y, 8)
    assert np.abs(errors).max() <= 0.5 + 2**-14
    shares = np.histogram(errors, bins=10, range=(-0.5, 0.5))[0] / N
    assert np.abs(shares - 0.1).max() <= 5 * math.sqrt(0.09 / N)


@pytest.mark.parametrize("dtype, precision", [(F32, 10), (F64, 30), (F16, 6), (BF16, 5)])
def test_stochastic_rounding_takes_a_neighbour_on_the_grid(dtype, precision):
    x = sample(dtype)
    with MonteCarloArithmetic("sr", precision, seed=4):
        y = x.sqrt()
    exponent = torch.frexp(x.sqrt())[1].double()
    ulp = torch.exp2(exponent - precision)
    on_grid = y.double() / ulp
    assert torch.equal(on_grid, on_grid.round())
    errors = errors_in_ulps(x.sqrt(), y, precision)
    assert np.abs(errors).max() < 1
    assert_mean(errors, 0, 0.5)


def test_stochastic_rounding_goes_up_by_the_fraction():
    x = torch.full((N,), 1 + 2**-9 + 2**-11)  # a quarter of the way at t = 10
    with MonteCarloArithmetic("sr", 10, seed=5):
        y = x * torch.ones(N)
    assert_odds((y - 1) * 2**9, {1: 3, 2: 1})


@pytest.mark.parametrize("dtype, precision", [(F32, None), (F32, 10), (F64, None), (F64, 30)])
def test_up_down_always_moves_by_one_ulp(dtype, precision):
    t = precision or DIGITS[dtype]
    # The grid's own numbers, so that the nearest is the number itself; powers of two apart
    x = (1 + (torch.arange(1, N + 1) % (2 ** min(t - 1, 9) - 1) + 1) * 2.0 ** -min(t - 1, 9)).to(
        dtype
    )
    with MonteCarloArithmetic("ud", precision, seed=6):
        y = x * torch.ones(N, dtype=dtype)
    assert_odds(np.rint(errors_in_ulps(x, y, t)), {-1: 1, 1: 1})
    assert np.abs(np.abs(errors_in_ulps(x, y, t)) - 1).max() == 0


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("mode, odds", [("rr", (1, 10, 1)), ("sr", (1, 10, 1)), ("ud", (1, 0, 1))])
def test_sixteen_bit_results_round_once_at_their_own_precision(dtype, mode, odds):
    x = sample(dtype)
    with MonteCarloArithmetic(mode, seed=7):
        y = x.sqrt()
    assert y.dtype == dtype
    assert_odds(steps(x.sqrt(), y), dict(zip((-1, 0, 1), odds, strict=True)))


@pytest.mark.parametrize("dtype, digits", [(F16, 11), (BF16, 8)])
def test_sixteen_bit_results_round_at_the_lesser_precision(dtype, digits):
    x = sample(dtype)
    for precision, used in ((24, digits), (6, 6)):
        with MonteCarloArithmetic("rr", precision, seed=8):
            y = x.sqrt()
        assert_variance(errors_in_ulps(x.sqrt(), y, used), Rule("rr", used, digits).of_result, 0.02)


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_autocast_rounds_products_in_its_format_once(dtype):
    x, weight = uniform(256, 64, low=0.5), uniform(64, 64, low=0.5, seed=1)
    with torch.autocast("cpu", dtype=dtype):
        plain = x @ weight
        with MonteCarloArithmetic("rr", seed=9) as context:
            y = x @ weight
            calls = context.calls
            z = x.sqrt()
    assert y.dtype == dtype and z.dtype == F32
    assert calls == 1  # autocast's conversions are exact
    assert_odds(steps(plain, y), {-1: 1, 0: 10, 1: 1})
    assert_odds(steps(x.sqrt(), z), {-1: 1, 0: 10, 1: 1})


def test_power_of_two_and_adding_zero_are_exact():
    x = normal(1000)
    with MonteCarloArithmetic("mca", 8, seed=1) as context:
        for y, expected in (
            (x * 2, x * 2),
            (x / 8, x / 8),
            (0.25 * x, x / 4),
            (x * torch.tensor(-4.0), -4 * x),
            (x + 0, x),
            (x - 0.0, x),
            (x**1, x),
            (torch.div(x, 0.3, rounding_mode="floor"), None),
        ):
            assert expected is None or torch.equal(y, expected)
        assert context.calls == 0
        assert not torch.equal(x * 3, 3 * x.clone())
    with MonteCarloArithmetic("rr", 8, seed=1):
        assert not torch.equal(x * 0.3 + 0.1, x * 0.3 + 0.1)


# --------------------------------------------------------------------------------------------------
# Special values


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("precision", [None, 6])
def test_special_values_stay(dtype, mode, precision, device):
    info = torch.finfo(dtype)
    special = [0.0, -0.0, math.inf, -math.inf, math.nan, info.max, -info.max, info.tiny]
    x = torch.tensor(special, dtype=dtype, device=device).repeat(400)
    ones = torch.ones_like(x)
    with MonteCarloArithmetic(mode, precision, seed=3):
        y = x * ones
    kept = ~torch.isfinite(x) | (x == 0)
    torch.testing.assert_close(x[kept], y[kept], rtol=0, atol=0, equal_nan=True)
    if mode in ("pb", "mca"):  # a perturbed operand may be what the product overflows from
        x, y = x[x.abs() != info.max], y[x.abs() != info.max]
    assert torch.isfinite(y[torch.isfinite(x)]).all()


@pytest.mark.parametrize("dtype", [F32, F64])
def test_subnormal_numbers_stay_under_a_dither(dtype):
    x = torch.finfo(dtype).tiny * uniform(1000, low=0.01, high=0.9, dtype=dtype)
    with MonteCarloArithmetic("rr", seed=3):
        assert torch.equal(x * torch.ones_like(x), x)


def test_division_by_zero_stays_what_it_is():
    x = torch.tensor([1.0, -1.0, 0.0])
    with MonteCarloArithmetic("mca", 8, seed=0):
        y = x / torch.zeros(3)
    assert y[0] == math.inf and y[1] == -math.inf and torch.isnan(y[2])


# --------------------------------------------------------------------------------------------------
# Exact operators

X = normal(2, 4, 6, 6)
CUBE = normal(1, 2, 4, 4, 4)
INDEX = torch.tensor([2, 0, 3, 3])
EXACT_CALLS = {
    "abs": lambda: X.abs(),
    "neg": lambda: -X,
    "sign": lambda: X.sign(),
    "relu": lambda: torch.relu(X),
    "relu_": lambda: X.clone().relu_(),
    "hardtanh": lambda: F.hardtanh(X),
    "relu6": lambda: F.relu6(X),
    "threshold": lambda: F.threshold(X, 0.1, 0.0),
    "clamp": lambda: X.clamp(-0.5, 0.5),
    "clamp_min_": lambda: X.clone().clamp_min_(0.1),
    "maximum": lambda: torch.maximum(X, X.flip(1)),
    "fmin": lambda: torch.fmin(X, X.flip(1)),
    "max": lambda: X.max(),
    "amax": lambda: X.amax(1),
    "aminmax": lambda: torch.aminmax(X)[0],
    "max of axis": lambda: X.max(dim=1)[0],
    "copysign": lambda: torch.copysign(X, X.flip(0)),
    "max_pool1d": lambda: F.max_pool1d(X[0], 2),
    "max_pool2d": lambda: F.max_pool2d(X, 2),
    "max_pool3d": lambda: F.max_pool3d(CUBE, 2),
    "adaptive_max_pool3d": lambda: F.adaptive_max_pool3d(CUBE, 2),
    "clone": lambda: X.clone(),
    "copy_": lambda: torch.empty(2, 4, 6, 6).copy_(X),
    "to": lambda: X.double(),
    "to half": lambda: X.half(),
    "contiguous": lambda: X.transpose(0, 1).contiguous(),
    "channels last": lambda: X.contiguous(memory_format=torch.channels_last),
    "zeros_like": lambda: torch.zeros_like(X),
    "full": lambda: torch.full((3,), 0.1),
    "fill_": lambda: torch.empty(3).fill_(0.1),
    "eye": lambda: torch.eye(3),
    "cat": lambda: torch.cat([X, X]),
    "stack": lambda: torch.stack([X, X]),
    "unbind": lambda: X.unbind(1)[2],
    "split": lambda: X.split(2, 1)[1],
    "chunk": lambda: X.chunk(3, 2)[1],
    "index": lambda: X[:, INDEX],
    "index_select": lambda: X.index_select(1, INDEX),
    "index_put": lambda: torch.index_put(X, (torch.tensor([1]),), torch.tensor(0.1)),
    "gather": lambda: X.gather(1, INDEX.reshape(1, 4, 1, 1).expand(2, 4, 6, 6)),
    "scatter": lambda: X.scatter(1, INDEX[:1].reshape(1, 1, 1, 1), 0.1),
    "masked_fill": lambda: X.masked_fill(X > 0, 0.1),
    "masked_select": lambda: X.masked_select(X > 0),
    "where": lambda: torch.where(X > 0, X, 0.1),
    "roll": lambda: X.roll(1, 2),
    "flip": lambda: X.flip(1),
    "tril": lambda: X.tril(),
    "repeat": lambda: X.repeat(2, 1, 1, 1),
    "pad": lambda: F.pad(X, (1, 2)),
    "reflect": lambda: F.pad(X, (1, 2, 0, 1), mode="reflect"),
    "replicate": lambda: F.pad(X, (1, 2, 0, 1), mode="replicate"),
    "upsample_nearest2d": lambda: F.interpolate(X, scale_factor=2),
    "upsample_nearest3d": lambda: F.interpolate(CUBE, scale_factor=2),
    "pixel_shuffle": lambda: F.pixel_shuffle(X, 2),
    "round": lambda: X.round(),
    "floor_": lambda: X.clone().floor_(),
    "frac": lambda: X.frac(),
    "compare": lambda: (X > 0.1) & (X < 0.9) | (X.flip(0) == X),
    "rand": lambda: torch.rand(5, generator=torch.Generator().manual_seed(1)),
    "randn": lambda: torch.randn(5, generator=torch.Generator().manual_seed(1)),
    "uniform_": lambda: torch.empty(5).uniform_(generator=torch.Generator().manual_seed(1)),
    "sort": lambda: X.sort()[0],
    "topk": lambda: X.topk(2)[0],
    "argmax": lambda: X.argmax(1),
    "median": lambda: X.median(),
    "embedding": lambda: F.embedding(INDEX, X[0, 0]),
    "nan_to_num": lambda: X.nan_to_num(),
    "one_hot": lambda: F.one_hot(INDEX),
    "item": lambda: torch.tensor(X[0, 0, 0, 0].item()),
    "foreach neg": lambda: torch._foreach_neg([X, X])[1],
    "foreach zero": lambda: _zeroed(),
    "integers": lambda: INDEX * 3 + 1,
    "dtype view": lambda: X.view(torch.int32),
    "transposed": lambda: X.mT,
    "permute": lambda: X.permute(1, 0, 2, 3),
    "expand": lambda: X[:, :1].expand(2, 4, 6, 6),
    "unfold": lambda: X.unfold(2, 3, 1),
    "diagonal": lambda: X.diagonal(0, 2, 3),
    "squeeze": lambda: X[:, :1].squeeze(1),
    "detach": lambda: X.detach(),
    "reshape": lambda: X.reshape(8, 36),
    "slice": lambda: X[:, 1:3, ::2],
}


def _zeroed():
    tensors = [X.clone(), X.clone()]
    torch._foreach_zero_(tensors)
    return tensors[1]


@pytest.mark.parametrize("mode", ["rr", "mca"])
@pytest.mark.parametrize("name", EXACT_CALLS)
def test_exact_operators_are_left_alone(name, mode):
    expected = EXACT_CALLS[name]()
    with MonteCarloArithmetic(mode, 8, seed=1) as context:
        result = EXACT_CALLS[name]()
    assert torch.equal(result, expected) and context.calls == 0
    assert result.stride() == expected.stride()


def test_gradients_of_exact_operators_are_exact():
    def gradient():
        x = CUBE.clone().requires_grad_()
        y = F.pad(F.max_pool3d(F.relu(x), 2)[:, :1], (1, 1)).permute(0, 2, 1, 3, 4)
        return torch.autograd.grad(y, x, torch.ones_like(y))[0]

    with MonteCarloArithmetic("rr", 8, seed=1):
        inside = gradient()
    assert torch.equal(inside, gradient())


# --------------------------------------------------------------------------------------------------
# Memory


def layouts():
    x = normal(2, 3, 4, 5, 6)
    wide = normal(2, 3, 4, 5, 12)
    return {
        "contiguous": x,
        "channels last": x.contiguous(memory_format=torch.channels_last_3d),
        "transposed": x.transpose(1, 4),
        "with gaps": wide[..., ::2],
        "expanded": x[:, :1].expand(2, 3, 4, 5, 6),
        "one element": x[:1, :1, :1, :1, :1],
        "reversed axes": x.permute(4, 3, 2, 1, 0),
    }


@pytest.mark.parametrize("mode", ["rr", "ud", "mca"])
@pytest.mark.parametrize("name", layouts())
def test_any_layout_keeps_its_strides_and_moves_a_little(name, mode):
    x = layouts()[name]
    plain = x.exp()
    with MonteCarloArithmetic(mode, seed=3):
        y = x.exp()
    assert y.stride() == plain.stride() and y.dtype == plain.dtype
    moved = steps(plain, y)
    assert int(moved.abs().max()) <= (16 if mode == "mca" else 1)
    assert x.numel() == 1 or int((moved != 0).sum()) > 0


def test_writing_to_a_view_perturbs_that_part_alone():
    for number, part in enumerate(
        (np.s_[:, 1], np.s_[2:4], np.s_[:, ::3], np.s_[5, 5], np.s_[1:1])
    ):
        x = uniform(8, 12, low=1.0, high=2.0)
        plain = x.clone()
        plain[part] *= 3
        with MonteCarloArithmetic("ud", 8, seed=number):
            x[part].mul_(3)
        changed = torch.zeros(8, 12, dtype=torch.bool)
        changed[part] = True
        assert torch.equal(x != plain, changed)


def test_out_and_in_place_are_perturbed_where_they_are():
    x = uniform(1000, low=1.0, high=2.0)
    out, same = torch.empty(1000), x.clone()
    pointers = out.data_ptr(), same.data_ptr()
    with MonteCarloArithmetic("ud", 8, seed=1):
        returned = torch.exp(x, out=out)
        same.exp_()
    assert returned is out and (out.data_ptr(), same.data_ptr()) == pointers
    for y in (out, same):
        assert not (y == x.exp()).any()
        assert np.abs(errors_in_ulps(x.exp(), y, 8)).max() <= 3


def test_in_place_models_write_where_they_should():
    a, b, c = normal(20, 30), normal(30, 10, seed=1), normal(20, 10, seed=2)
    plain = torch.addmm(c, a, b)
    out = torch.empty(20, 10)
    with MonteCarloArithmetic("rr", 12, seed=1):
        torch.mm(a, b, out=out)
        c.addmm_(a, b)
    for y, expected in ((out, a @ b), (c, plain)):
        assert not torch.equal(y, expected)
        torch.testing.assert_close(y, expected, rtol=0, atol=0.05)


@pytest.mark.parametrize("mode", MODES)
def test_empty_tensors_and_scalars(mode):
    with MonteCarloArithmetic(mode, seed=1):
        assert torch.exp(torch.empty(0, 3)).shape == (0, 3)
        assert torch.empty(3, 0).sum().item() == 0
        assert torch.equal(torch.empty(2, 0) @ torch.empty(0, 3), torch.zeros(2, 3))
        assert torch.softmax(torch.empty(0, 3), 1).shape == (0, 3)
        assert torch.log_softmax(torch.empty(3, 0), 1).shape == (3, 0)
        assert F.conv3d(torch.empty(0, 2, 4, 4, 4), torch.ones(1, 2, 3, 3, 3)).shape[0] == 0
        assert torch.isfinite(torch.tensor(2.0).exp())
        assert abs(torch.tensor(3.0).sum().item() - 3) < 1e-6
        assert torch.isfinite(torch.softmax(torch.tensor(2.0), 0))
        assert torch.isfinite(torch.tensor([1.5]).mean())


def test_views_stay_views_in_modes_that_perturb_operands():
    x = normal(4, 6)
    with MonteCarloArithmetic("mca", 8, seed=1):
        views = [x.t(), x[1:], x.view(-1), x.detach(), x[None].expand(2, 4, 6), x.diagonal()]
    for view in views:
        assert view.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert torch.equal(views[0], x.t())


def test_operands_are_not_changed():
    x, y = normal(50, 50), normal(50, 50, seed=1)
    kept = x.clone(), y.clone()
    for mode in MODES:
        with MonteCarloArithmetic(mode, 8, seed=1):
            x * y, x @ y, torch.softmax(x, 1), torch.cat([x, y]).sum(), torch.addcmul(x, x, y)
    assert torch.equal(x, kept[0]) and torch.equal(y, kept[1])


# --------------------------------------------------------------------------------------------------
# Contexts, threads, seeds


def test_the_innermost_context_alone_rounds():
    x = sample(n=1000)
    with MonteCarloArithmetic("ud", 6, seed=1) as outer:
        with MonteCarloArithmetic("rr", 20, seed=2) as inner:
            y = x.sqrt()
        assert (outer.calls, inner.calls) == (0, 1)
        z = x.sqrt()
    assert np.abs(errors_in_ulps(x.sqrt(), y, 20)).max() <= 1
    assert np.abs(errors_in_ulps(x.sqrt(), z, 6)).min() > 0.49
    assert outer.calls == 1
    with MonteCarloArithmetic("rr", 20, seed=2):
        alone = x.sqrt()
    assert torch.equal(y, alone)


def test_the_innermost_context_alone_rounds_models_too():
    x = normal(64, 64)
    with MonteCarloArithmetic("rr", 20, seed=2):
        alone = F.conv2d(x[None, None], x[None, None, :5, :5]), x @ x, x.var()
    with (
        MonteCarloArithmetic("ud", 6, seed=1) as outer,
        MonteCarloArithmetic("rr", 20, seed=2),
    ):
        nested = F.conv2d(x[None, None], x[None, None, :5, :5]), x @ x, x.var()
    assert outer.calls == 0
    for a, b in zip(alone, nested, strict=True):
        assert torch.equal(a, b)


def test_outside_nothing_rounds():
    x = sample(n=100)
    context = MonteCarloArithmetic("ud", 6)
    with pytest.raises(KeyError), context:
        raise KeyError
    assert torch.equal(x.sqrt(), x.sqrt()) and context.calls == 0


def test_other_threads_are_left_alone():
    x, found = sample(n=1000), []
    with MonteCarloArithmetic("ud", 6, seed=1):
        thread = threading.Thread(target=lambda: found.append(x.sqrt()))
        thread.start()
        thread.join()
    assert torch.equal(found[0], x.sqrt())


def test_backward_inside_rounds_and_outside_does_not():
    x = sample(n=1000).requires_grad_()
    y = x.sqrt()
    (plain,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    with MonteCarloArithmetic("ud", 8, seed=1):
        (inside,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
        z = x.sqrt()
    assert not (inside == plain).any()
    torch.testing.assert_close(inside, plain, rtol=2**-5, atol=0)
    ratio = torch.autograd.grad(z.sum(), x)[0] * 2 * z
    torch.testing.assert_close(ratio, torch.ones(1000), rtol=1e-6, atol=0)


def small_step(seed, **options):
    network = torch.nn.Sequential(
        torch.nn.Conv3d(2, 6, 3, padding=1),
        torch.nn.GroupNorm(2, 6),
        torch.nn.ReLU(),
        torch.nn.Conv3d(6, 4, 1),
    )
    for number, parameter in enumerate(network.parameters()):
        parameter.data.copy_(normal(*parameter.shape, seed=number))
    labels = (normal(1, 10, 10, 10) > 0).long()
    with MonteCarloArithmetic(seed=seed, **options) if seed is not None else torch.enable_grad():
        loss = F.cross_entropy(network(normal(1, 2, 10, 10, 10)), labels)
        loss.backward()
    return [loss.detach()] + [p.grad for p in network.parameters()]


@pytest.mark.parametrize("accumulation", ["fast", "none"])
@pytest.mark.parametrize("mode", ["rr", "sr"])
def test_same_seed_same_bits_and_another_seed_other_bits(mode, accumulation):
    options = {"mode": mode, "precision": 18, "accumulation": accumulation}
    first, again, other = (small_step(seed, **options) for seed in (1, 1, 2))
    plain = small_step(None)
    for a, b, c, d in zip(first, again, other, plain, strict=True):
        assert torch.equal(a, b)
        if a.numel() >= 8:  # of fewer numbers all may be the same
            assert not torch.equal(a, c) and not torch.equal(a, d)
        torch.testing.assert_close(a, d, rtol=0.01, atol=0.01 * float(d.abs().max()))


def test_the_number_of_threads_does_not_change_the_noise():
    import numba

    x = sample(n=100_000)
    before = torch.get_num_threads(), numba.get_num_threads()
    results = []
    try:
        for n in (1, min(2, numba.config.NUMBA_NUM_THREADS)):
            torch.set_num_threads(n)
            numba.set_num_threads(n)
            with MonteCarloArithmetic("rr", 12, seed=1):
                results.append((x.sqrt(), (x.half() * 1.1), x.reshape(100, 10, 10, 10) * 1.1))
    finally:
        torch.set_num_threads(before[0])
        numba.set_num_threads(before[1])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_seeds_calls_and_entries_are_uncorrelated():
    x = torch.full((N,), 1.7)
    draws = []
    for seed in (1, 2, 3):
        context = MonteCarloArithmetic("rr", 10, seed=seed)
        for _ in range(2):
            with context:
                draws.append((x.sqrt() - x.sqrt()).numpy())
    assert_uncorrelated(*draws)
    first = MonteCarloArithmetic("rr", 10, seed=1)
    with first:
        both = (x.sqrt() - x.sqrt()).numpy()
    assert np.array_equal(both, draws[0])


def test_neighbours_in_memory_are_uncorrelated():
    with MonteCarloArithmetic("rr", 10, seed=1):
        errors = (torch.full((2**17,), 1.7).sqrt()).double().numpy() - math.sqrt(1.7)
    for lag in (1, 2, 64, 8192):
        assert_uncorrelated(errors[lag:], errors[:-lag])


def test_a_seed_may_be_any_whole_number():
    assert len({_mixed(s) for s in (0, 1, 2**31, 2**63, 2**64 - 1, 2**64 + 1)}) >= 5
    x = sample(n=100)
    with MonteCarloArithmetic("rr", 10, seed=2**200 + 7):
        assert not torch.equal(x.sqrt(), x.sqrt())


# --------------------------------------------------------------------------------------------------
# Inference mode, optimisers, layers


def test_inference_mode_rounds_too():
    layer, x = torch.nn.Linear(30, 30), normal(50, 30)
    with torch.inference_mode():
        plain = layer(x)
        with MonteCarloArithmetic("rr", 12, seed=1) as context:
            y = torch.softmax(layer(x), 1)
            z = layer(x)
            z.add_(0.1)
    assert context.calls >= 4
    assert not torch.equal(z - 0.1, plain) and y.shape == z.shape


OPTIMISERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=False),
    "SGD foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=False),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_the_optimiser_step_is_perturbed(name):
    def update(context):
        parameters = [
            torch.nn.Parameter(uniform(40, 50, low=1.0, high=2.0, seed=s)) for s in (1, 2)
        ]
        optimiser = OPTIMISERS[name](parameters)
        for _ in range(2):
            for number, parameter in enumerate(parameters):
                parameter.grad = normal(40, 50, seed=10 + number)
            with context:
                optimiser.step()
        return [p.detach() for p in parameters]

    plain = update(torch.enable_grad())
    perturbed = update(MonteCarloArithmetic("rr", 16, seed=1))
    for a, b in zip(plain, perturbed, strict=True):
        assert float((a != b).float().mean()) > 0.9
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


LAYERS = {
    "conv1d": lambda x, w: F.conv1d(x.flatten(2), w[:, :, 0, 0]),
    "conv2d": lambda x, w: F.conv2d(x.flatten(3), w[:, :, 0]),
    "conv3d": lambda x, w: F.conv3d(x, w, padding=1),
    "strided": lambda x, w: F.conv3d(x, w, stride=2, padding=1),
    "dilated": lambda x, w: F.conv3d(x, w, dilation=2, padding=2),
    "grouped": lambda x, w: F.conv3d(x, w[:, :1], padding=1, groups=4),
    "transposed": lambda x, w: F.conv_transpose3d(x, w.transpose(0, 1), stride=2),
    "batch norm": lambda x, w: F.batch_norm(x, None, None, w[0, :, 0, 0, 0], training=True),
    "batch norm, given": lambda x, w: F.batch_norm(x, torch.zeros(4), torch.ones(4)),
    "instance norm": lambda x, w: F.instance_norm(x, weight=w[0, :, 0, 0, 0]),
    "group norm": lambda x, w: F.group_norm(x, 2, w[0, :, 0, 0, 0]),
    "layer norm": lambda x, w: F.layer_norm(x, x.shape[4:], w.flatten()[:6]),
    "softmax": lambda x, w: torch.softmax(x, 1),
    "log softmax": lambda x, w: torch.log_softmax(x, 1),
    "cross entropy": lambda x, w: F.cross_entropy(x, (x[:, 0] > 0).long()),
    "linear": lambda x, w: F.linear(x, w.flatten()[:18].reshape(3, 6)),
    "matmul": lambda x, w: x @ x.mT,
    "gelu": lambda x, w: F.gelu(x),
    "mean": lambda x, w: x.mean((2, 3, 4)),
    "norm": lambda x, w: torch.linalg.vector_norm(x, dim=1),
    "std": lambda x, w: x.std((0, 2)),
    "average pooling": lambda x, w: F.avg_pool3d(x, 2),
    "mse": lambda x, w: F.mse_loss(x, x.detach() * 0.9),
    "bilinear": lambda x, w: F.interpolate(x, scale_factor=2, mode="trilinear"),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("accumulation", ["fast", "none"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_run_forward_and_backward_with_noise(name, accumulation, device):
    def run(context):
        x = normal(2, 4, 6, 6, 6, seed=1).to(device).requires_grad_()
        w = normal(4, 4, 3, 3, 3, seed=2).to(device).requires_grad_()
        with context:
            y = LAYERS[name](x, w)
            y.backward(normal(*y.shape, seed=3).to(device))
        return [t.detach() for t in (y, x.grad, w.grad) if t is not None]

    if name == "batch norm, given" and device != "cpu":
        pytest.skip("its statistics are on the CPU")
    plain = run(torch.enable_grad())
    for mode in ("rr", "mca"):
        noisy = run(MonteCarloArithmetic(mode, 18, seed=1, accumulation=accumulation))
        assert len(plain) == len(noisy)
        for number, (a, b) in enumerate(zip(plain, noisy, strict=True)):
            assert a.shape == b.shape and a.stride() == b.stride() and torch.isfinite(b).all()
            if (name, number) != ("average pooling", 1) and a.any():
                assert not torch.equal(a, b)
            scale = float(a.abs().max()) + float(b.abs().max())
            torch.testing.assert_close(a, b, rtol=0, atol=2**-11 * scale + 1e-7)


def test_without_accumulation_a_sum_rounds_once():
    x = uniform(N, 16, low=0.5)
    plain = [x.sum(1), x.mean(1)]
    with MonteCarloArithmetic("rr", seed=2, accumulation="none") as context:
        noisy = [x.sum(1), x.mean(1)]
    assert context.calls == 2
    for a, b in zip(plain, noisy, strict=True):
        assert_odds(steps(a, b), {-1: 1, 0: 10, 1: 1})
    with MonteCarloArithmetic("rr", seed=2):
        assert int(steps(plain[0], x.sum(1)).abs().max()) > 1


# --------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"mode": "cestac"}, "mode='cestac'"),
        ({"precision": 1}, "precision=1"),
        ({"precision": 54}, "precision=54"),
        ({"precision": 10.5}, "precision=10.5"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 0.5}, "seed=0.5"),
        ({"accumulation": "some"}, "accumulation='some'"),
        ({"lanes": 3}, "lanes=3"),
        ({"lanes": 0}, "lanes=0"),
        ({"lanes": 2.0}, "lanes=2.0"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        MonteCarloArithmetic(**arguments)


def test_more_precision_than_the_format_has_names_both():
    with MonteCarloArithmetic("rr", 53, seed=1):
        assert torch.ones(3, dtype=F64).exp().dtype == F64
        with pytest.raises(ValueError, match=r"precision=53.*float32 has 24 bits"):
            torch.ones(3).exp()


def test_formats_that_are_not_known_are_refused():
    x = torch.ones(4)
    with MonteCarloArithmetic():
        with pytest.raises(TypeError, match="float8_e4m3fn"):
            x.to(torch.float8_e4m3fn).sum()
        with pytest.raises(TypeError, match="sparse"):
            torch.eye(3).to_sparse() * 1.1
        assert (torch.ones(3, device="meta") * 1.1).is_meta  # it has no numbers


def formula(x):
    return (x * 1.1).sin() + x


class Formula(torch.nn.Module):
    def forward(self, x):
        return formula(x)


def within(x):
    with MonteCarloArithmetic("rr", 8, seed=1):
        return formula(x)


class Within(torch.nn.Module):
    def forward(self, x):
        return within(x)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("compiled_before", [False, True])
def test_compiled_functions_run_uncompiled_inside(compiled_before):
    x = normal(100)
    torch._dynamo.reset()
    compiled = torch.compile(formula, backend="eager")
    if compiled_before:
        compiled(x)
    with MonteCarloArithmetic("rr", 8, seed=1) as context:
        y = compiled(x)
    assert context.calls == 3
    assert torch.equal(y, within(x)) and not torch.equal(y, formula(x))


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_backward_pass_is_refused():
    x = torch.linspace(1, 2, 50, requires_grad=True)
    compiled = torch.compile(lambda v: (v.exp() * v.sin()).sum(), backend="aot_eager")
    for backward in (torch.Tensor.backward, lambda y: torch.autograd.grad(y, x)):
        y = compiled(x)
        with MonteCarloArithmetic(), pytest.raises(RuntimeError, match="run the forward pass"):
            backward(y)
    with MonteCarloArithmetic():
        compiled(x).backward()
    assert x.grad is not None


def test_a_context_within_a_compiled_function_rounds_or_is_refused():
    x = normal(100)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(within, backend="eager")(x), within(x))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(within, backend="eager", fullgraph=True)(x)
    torch._dynamo.reset()
    with MonteCarloArithmetic(), pytest.raises(RuntimeError, match="fullgraph"):
        torch.compile(formula, backend="eager", fullgraph=True)(x)


@pytest.mark.filterwarnings("ignore")
def test_recorded_functions_round_inside():
    x = normal(100)
    functions = [
        torch.jit.trace(formula, (x,)),
        torch.jit.script(formula),
        torch.export.export(Formula(), (x,)).module(),
    ]
    for function in functions:
        function(x), function(x)  # so that torch.jit optimises
        with MonteCarloArithmetic("rr", 8, seed=1) as context:
            y = function(x)
        assert context.calls == 3
        assert torch.equal(y, within(x))


@pytest.mark.filterwarnings("ignore")
def test_recording_inside_is_refused():
    x = normal(100)
    with pytest.raises(RuntimeError, match="record it outside"):
        torch.jit.trace(within, (x,))
    with pytest.raises(RuntimeError, match="record it outside"):
        torch.export.export(Within(), (x,), strict=False)
    with MonteCarloArithmetic(), pytest.raises(RuntimeError, match="record it outside"):
        torch.export.export(Formula(), (x,), strict=False)
    with MonteCarloArithmetic(), pytest.raises(RuntimeError):
        torch.jit.trace(formula, (x,))  # torch's own, of all dispatch modes
    with pytest.raises(torch.jit.frontend.NotSupportedError):
        torch.jit.script(within)
