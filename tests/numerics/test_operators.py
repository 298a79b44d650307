"""The table of operators: complete, and true for each class."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bids_varaug.numerics import MonteCarloArithmetic, RoundingWarning, context, products
from bids_varaug.numerics.operators import CLASSES, DECOMPOSED, EXACT, ONCE, UNKNOWN, operator_of
from tests.numerics.bounds import normal, uniform

COMPOSITE = "CompositeImplicitAutograd"


def native_operators():
    """Of torch's own schemas, those that return tensors and are no composition of others."""
    for schema in torch._C._jit_get_all_schemas():
        if not schema.name.startswith("aten::") or not any("Tensor" in str(r.type) for r in schema.returns):
            continue
        try:
            func = getattr(getattr(torch.ops.aten, schema.name[6:]), schema.overload_name or "default")
            if not torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), COMPOSITE):
                yield func
        except (AttributeError, RuntimeError):  # of torch.jit alone
            continue


def test_every_native_operator_is_in_the_table():
    unknown = {func.name() for func in native_operators() if operator_of(func).kind == UNKNOWN}
    assert not unknown
    assert {operator_of(func).kind for func in native_operators()} <= set(CLASSES)


def test_what_is_to_be_decomposed_can_be():
    """By name: overloads that write to `out` may stay whole."""
    names = {operator_of(f).name for f in native_operators() if operator_of(f).kind == DECOMPOSED}
    lost = {f.name() for f in native_operators() if operator_of(f).kind == ONCE and operator_of(f).name in names}
    assert all("out" in name for name in lost), lost


# ----------------------------------------------------------------------------------------------------------------------
# Each operator that can be called with made-up tensors

def made_up(func):
    """Arguments of an operator, or None where they cannot be guessed."""
    args = []
    for argument in func._schema.arguments:
        if argument.has_default_value() or argument.kwarg_only:
            continue
        kind = str(argument.type)
        if kind == "Tensor":
            args.append(uniform(6, 6, low=0.5, high=0.9, seed=len(args)))
        elif kind in ("float", "number", "Scalar"):
            args.append(0.7)
        elif kind == "int":
            args.append(1)
        elif kind == "bool":
            args.append(True)
        elif kind.startswith("Optional"):
            args.append(None)
        elif kind.startswith("List[Tensor"):
            args.append([uniform(6, 6, low=0.5, high=0.9, seed=s) for s in (1, 2)])
        else:
            return None
    return args


def outcome(func, seed):
    """Floating-point numbers that a call returns, None where it fails."""
    torch.manual_seed(0)
    try:
        args = made_up(func)
        if args is None or any(a.alias_info is not None for a in func._schema.arguments):
            return None
        with MonteCarloArithmetic("rr", 10, seed=seed) if seed is not None else torch.no_grad():
            result = func(*args)
    except Exception:  # made-up arguments do not suit every operator
        return None
    tensors = [t for t in (result if isinstance(result, tuple | list) else [result]) if isinstance(t, torch.Tensor)]
    kept = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in tensors if t.layout == torch.strided]
    found = [t.double().reshape(-1) for t in kept if t.is_floating_point()]
    found = torch.cat(found) if found else torch.empty(0)
    return found if found.numel() and torch.isfinite(found).all() and found.any() else None


NOT_DRAWN = {  # their random numbers, or uninitialised memory, are not those of one seed
    "empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided", "resize", "_fill",
}  # fmt: skip
# Made-up arguments may crash what is for internal use, or of other devices and layouts
NOT_CALLED = ("_", "cudnn", "miopen", "mkldnn", "mps", "quantize", "sparse", "lstm", "batch_norm_", "from_file")
OVERLOADS = ("default", "Tensor", "Scalar", "dim_IntList", "int")
STAY = {  # made-up operands give 0, 1, whole numbers or what was there before
    "lerp", "_masked_scale", "native_dropout_backward", "linalg_matrix_exp", "special_hermite_polynomial_h",
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
def test_two_seeds_differ_where_an_operator_rounds_and_only_there():
    called, wrong = set(), []
    for func in native_operators():
        operator = operator_of(func)
        if operator.name.startswith(NOT_CALLED):
            continue
        if func._overloadname not in OVERLOADS or operator.name in NOT_DRAWN:
            continue
        plain = outcome(func, None)
        if plain is None:
            continue
        first, second = outcome(func, 1), outcome(func, 2)
        if first is None or second is None:
            continue
        called.add(operator.name)
        same = torch.equal(first, second)
        if operator.kind == EXACT and not operator.is_random and not (same and torch.equal(first, plain)):
            wrong.append(f"{func.name()} is exact, but rounds")
        moves = operator.kind != EXACT and not torch.equal(plain, plain.round()) and not operator.is_random
        if moves and same and operator.name not in STAY:
            wrong.append(f"{func.name()} is {operator.kind}, but two seeds agree")
    assert not wrong
    assert len(called) > 230


# ----------------------------------------------------------------------------------------------------------------------
# Composite operators against what they stand for

A, B = normal(500, 30), normal(500, 30, seed=1)
Q, K, V = (normal(2, 4, 48, 32, seed=s) for s in range(3))
IMAGE = normal(2, 3, 12, 12, seed=4)
LSTM, GRU = torch.nn.LSTM(12, 16), torch.nn.GRU(12, 16)
SERIES = normal(8, 4, 12, seed=5)
PLACES = torch.arange(30).repeat(500)


def by_cells(layer, cell):
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in layer.state_dict().items()})
    state = (torch.zeros(4, 16), torch.zeros(4, 16)) if isinstance(layer, torch.nn.LSTM) else torch.zeros(4, 16)
    outputs = []
    for x in SERIES:
        state = cell(x, state)
        outputs.append(state[0] if isinstance(state, tuple) else state)
    return torch.stack(outputs)


def attention(q, k, v):
    return torch.softmax(q @ k.mT / math.sqrt(32), -1) @ v


def gradients(function, *tensors):
    tensors = [t.clone().requires_grad_() for t in tensors]
    y = function(*tensors)
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(y, tensors, torch.ones_like(y) + y.detach())])


TWIDDLES = {
    2**k: torch.polar(torch.ones(2 ** (k - 1)), -2 * math.pi * torch.arange(2 ** (k - 1)) / 2**k)[:, None]
    for k in range(2, 9)
}  # fmt: skip


def fft_by_stages(x):
    """Radix-2 transform along the first axis."""
    n = len(x)
    if n == 1:
        return x
    even, odd = fft_by_stages(x[::2]), fft_by_stages(x[1::2])
    odd = odd * TWIDDLES[n] if n > 2 else odd
    return torch.cat([even + odd, even - odd])


SAME = {
    "attention": (lambda: F.scaled_dot_product_attention(Q, K, V), lambda: attention(Q, K, V)),
    "attention, backward": (
        lambda: gradients(F.scaled_dot_product_attention, Q, K, V), lambda: gradients(attention, Q, K, V),
    ),
    "LSTM": (lambda: LSTM(SERIES)[0], lambda: by_cells(LSTM, torch.nn.LSTMCell(12, 16))),
    "GRU": (lambda: GRU(SERIES)[0], lambda: by_cells(GRU, torch.nn.GRUCell(12, 16))),
    "cumsum": (lambda: A.cumsum(0)[-1], lambda: A.sum(0)),
    "index_add": (lambda: torch.zeros(30).index_add(0, PLACES, A.reshape(-1)), lambda: A.sum(0)),
    "scatter_add": (lambda: torch.zeros(1, 30).scatter_add(0, torch.zeros(500, 30).long(), A)[0], lambda: A.sum(0)),
    "index_put": (
        lambda: torch.zeros(30).index_put((PLACES,), A.reshape(-1), accumulate=True), lambda: A.sum(0),
    ),
    "embedding_bag": (lambda: F.embedding_bag(torch.arange(500)[None], A, mode="sum"), lambda: A.sum(0)),
    "nansum": (lambda: A.nansum(0), lambda: A.sum(0)),
    "einsum": (lambda: torch.einsum("ki,kj->ij", A, B), lambda: A.T @ B),
    "logsumexp": (lambda: A.logsumexp(0), lambda: (A - A.amax(0)).exp().sum(0).log() + A.amax(0)),
    "cdist": (
        lambda: torch.cdist(A.T, B.T, compute_mode="donot_use_mm_for_euclid_dist"),
        lambda: (A.T[:, None] - B.T[None]).square().sum(-1).sqrt(),
    ),
    "average pooling": (
        lambda: F.avg_pool2d(IMAGE, 3, 1),
        lambda: F.conv2d(IMAGE.flatten(0, 1)[:, None], torch.full((1, 1, 3, 3), 1 / 9)),
    ),
    "interpolation": (
        lambda: F.interpolate(IMAGE, scale_factor=2, mode="bilinear"),
        lambda: torch._decomp.decomposition_table[torch.ops.aten.upsample_bilinear2d.vec](
            IMAGE, None, False, [2.0, 2.0]
        ),
    ),
    "FFT": (lambda: torch.fft.fft(A[:256].to(torch.complex64), dim=0), lambda: fft_by_stages(A[:256] + 0j)),
    "complex products": (
        lambda: (A[:48, :] + 1j * B[:48, :]).T @ (A[48:96, :] + 1j * B[:48, :])[:, :9],
        lambda: ((A[:48, :, None] + 1j * B[:48, :, None]) * (A[48:96, None, :9] + 1j * B[:48, None, :9])).sum(0),
    ),
}  # fmt: skip


def spread(run, n=24, **options):
    results = []
    for seed in range(n):
        with MonteCarloArithmetic(seed=seed, **options), torch.set_grad_enabled(True):
            y = run().detach()
        results.append((torch.view_as_real(y) if y.is_complex() else y).double())
    return float(torch.stack(results).var(0).mean().sqrt())


@pytest.mark.parametrize("name", SAME)
def test_composite_operators_have_the_spread_of_what_they_stand_for(name):
    one, written_out = (spread(run) for run in SAME[name])
    assert 0.75 < one / written_out < 1.33


def test_running_statistics_of_batch_normalisation_are_perturbed():
    def run():
        layer = torch.nn.BatchNorm2d(3)
        layer(3 + IMAGE)
        return torch.stack([layer.running_mean, layer.running_var])

    results = []
    for seed in range(24):
        with MonteCarloArithmetic(seed=seed):
            results.append(run())
    assert (torch.stack(results).std(0) > 0).all()
    torch.testing.assert_close(torch.stack(results).mean(0), run(), rtol=1e-6, atol=1e-6)


def test_solving_shows_the_condition_of_the_matrix():
    """Errors of x are those of the matrix times its condition, as perturbation theory says."""
    good = torch.eye(20) + 0.1 * normal(20, 20)
    bad = good.clone()
    bad[0] = bad[1] + 1e-3 * bad[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spreads = [spread(lambda m=m: torch.linalg.solve(m, good[0]) / torch.linalg.solve(m, good[0]).norm())
                   for m in (good, bad)]  # fmt: skip
    assert spreads[1] > 20 * spreads[0]


LABELS = (uniform(1, 1, 8, 8, 8) * 5).round()
GRID = uniform(1, 8, 8, 8, 3, low=-1.0)
GRID_2D = uniform(1, 8, 8, 2, low=-1.0)
EXACT_CALLS = {
    "grid_sample, nearest": lambda: F.grid_sample(LABELS, GRID, mode="nearest", align_corners=False),
    "grid_sample, nearest, 2D": lambda: F.grid_sample(LABELS[:, 0, :1], GRID_2D, mode="nearest", align_corners=False),
    "cummax": lambda: A.cummax(0)[0],
    "histc": lambda: A.histc(20),
    "fmod": lambda: A.fmod(0.25),
    "unfold": lambda: F.unfold(IMAGE, 3),
    "fake quantisation": lambda: torch.fake_quantize_per_tensor_affine(A, 0.1, 0, -8, 7),
    "integer sum": lambda: PLACES.sum(),
    "index_put": lambda: A.index_put((torch.tensor([1]),), torch.tensor(0.1)),
}


@pytest.mark.parametrize("name", EXACT_CALLS)
def test_exact_operators_stay_on_their_grid(name):
    with MonteCarloArithmetic("rr", 8, seed=1):
        assert torch.equal(EXACT_CALLS[name](), EXACT_CALLS[name]())
        inside = EXACT_CALLS[name]()
    assert torch.equal(inside, EXACT_CALLS[name]())


# ----------------------------------------------------------------------------------------------------------------------
# Warnings and refusals


def test_operators_without_a_model_warn_once_by_name(monkeypatch):
    monkeypatch.setattr(context, "_warned", set())
    with MonteCarloArithmetic(seed=1), pytest.warns(RoundingWarning, match="logcumsumexp is many instructions"):
        A.logcumsumexp(0)
    with MonteCarloArithmetic(seed=2), warnings.catch_warnings():
        warnings.simplefilter("error")
        A.logcumsumexp(0)
        torch.relu(A @ B.T).mean()


def test_operators_of_extensions_warn_and_round_once(monkeypatch):
    monkeypatch.setattr(context, "_warned", set())

    @torch.library.custom_op("varaug_test::thirds", mutates_args=())
    def thirds(x: torch.Tensor) -> torch.Tensor:
        return x / 3

    with MonteCarloArithmetic("rr", 8, seed=1), pytest.warns(RoundingWarning, match="thirds is not known"):
        y = thirds(A)
    assert not torch.equal(y, A / 3)
    torch.testing.assert_close(y, A / 3, rtol=2**-7, atol=0)


def test_quantised_sparse_and_nested_tensors_are_refused():
    with MonteCarloArithmetic():
        with pytest.raises(TypeError, match="dense"):
            torch.quantize_per_tensor(A, 0.1, 0, torch.qint8)
        with pytest.raises(TypeError, match="dense"):
            torch.eye(3).to_sparse() * 1.1
    nested = torch.nested.nested_tensor([A, A[:3]])
    with MonteCarloArithmetic(), pytest.raises(TypeError, match="nested"):
        torch.mul(nested, 1.1)


# ----------------------------------------------------------------------------------------------------------------------
# Equal odds, and the exact centre


def test_equal_odds_take_either_neighbour_and_leave_exact_results_alone():
    x, y = uniform(20_000, low=1.0, high=2.0), uniform(20_000, low=1.0, high=2.0, seed=1)
    exact = x.double() / y.double()
    nearest = exact.float()
    low = torch.where(nearest.double() > exact, torch.nextafter(nearest, torch.tensor(0.0)), nearest)
    high = torch.nextafter(low, torch.tensor(9.0))
    with MonteCarloArithmetic("random", seed=3):
        result, sums = x / y, torch.arange(20.0) + 3.0
    inexact = low.double() != exact
    assert ((result == low) | (result == high))[inexact].all()
    share = float((result == high)[inexact].double().mean())
    assert abs(share - 0.5) < 5 * 0.5 / math.sqrt(int(inexact.sum()))
    assert torch.equal(sums, torch.arange(20.0) + 3.0)


@pytest.mark.parametrize("centre", ["torch", "exact"])
def test_single_results_are_centred_on_the_exact_one_if_asked(centre):
    x = uniform(2000, low=1.0, high=2.0)
    exact, ulp = x.double().sqrt(), 2.0**-23
    total = torch.zeros(2000, dtype=torch.float64)
    for seed in range(200):
        with MonteCarloArithmetic("rr", seed=seed, centre=centre):
            total += x.sqrt().double()
    error = float(((total / 200 - exact) / ulp).square().mean().sqrt())
    by_chance = math.sqrt(1 / 6 / 200)
    assert (error < 1.1 * by_chance) if centre == "exact" else (error > 5 * by_chance)


@pytest.mark.parametrize("scale", [1.0, 1e30, 1e-30])
@pytest.mark.parametrize("function", [torch.std, torch.linalg.vector_norm, torch.Tensor.norm])
def test_squares_neither_overflow_nor_vanish(function, scale):
    x = normal(50) * scale
    with MonteCarloArithmetic(seed=1):
        found = function(x)
    torch.testing.assert_close(found, function(x.double()).float())


def test_decompositions_agree_with_torch():
    z, image = torch.complex(normal(6), normal(6, seed=1)), uniform(1, 1, 32, 32)
    grid = F.affine_grid(torch.eye(2, 3)[None] * 0.93, (1, 1, 32, 32), align_corners=False)
    rows = normal(4, 6)
    calls = [
        lambda: z.var(),
        lambda: torch.std_mean(z, correction=0)[0],
        lambda: torch.logsumexp(z, 0),
        lambda: F.grid_sample(image, grid, align_corners=False),
        lambda: F.grid_sample(image, grid, mode="bicubic", align_corners=False),
        lambda: torch.tensor([1.0, math.inf, 3.0]).cumsum(0),
        lambda: rows.var(1, keepdim=True),
        lambda: torch.std(rows, (0, 1), correction=0),
        lambda: torch.linalg.vector_norm(rows, 3, 1),
        lambda: torch.softmax(rows, 1, out=torch.empty(0)),
        lambda: torch.var(rows, 0, out=torch.empty(0)),
        lambda: torch.func.hessian(lambda q: (q**3).sum())(rows[0]),
    ]
    for call in calls:
        truth = call()
        with warnings.catch_warnings(), MonteCarloArithmetic(seed=1):
            warnings.simplefilter("ignore")
            torch.testing.assert_close(call(), truth)


def test_what_is_exact_in_a_decomposition_stays():
    x = normal(50).requires_grad_()
    for seed in range(20):
        with MonteCarloArithmetic(seed=seed):
            largest = torch.linalg.vector_norm(x, math.inf)
            (slope,) = torch.autograd.grad(largest, x)
            assert torch.isfinite(slope).all() and largest == x.detach().abs().max()
            assert torch.ones(1001).norm(0) == 1001
            assert F.layer_norm(x[:1].detach(), (1,)) == 0 and torch.tensor([0.3]).var(correction=0) == 0


@pytest.mark.parametrize(
    "function, low, high",
    [(torch.sigmoid, 0, 1), (torch.tanh, -1, 1), (torch.erf, -1, 1), (lambda x: torch.softmax(x, 0), 0, 1),
     (lambda x: torch.log_softmax(x, 0), -math.inf, 0)],
)  # fmt: skip
@pytest.mark.parametrize("mode", ["rr", "ud", "sr"])
def test_functions_stay_in_their_range(function, low, high, mode):
    x = torch.cat([torch.full((100,), 60.0), torch.full((1,), 200.0)])
    for accumulation in ("fast", "none"):
        with MonteCarloArithmetic(mode, seed=3, accumulation=accumulation):
            y = function(x)
        assert y.min() >= low and y.max() <= high


def test_factors_of_scattered_sums_count_squared():
    source, place = uniform(1000), torch.zeros(1000, dtype=torch.long)

    def spread(factor):
        results = []
        for seed in range(100):
            with MonteCarloArithmetic(seed=seed):
                results.append(float(torch.zeros(1).index_add(0, place, source, alpha=factor)))
        return np.std(results) / abs(np.mean(results))

    truth = spread(1)
    assert all(0.7 < spread(factor) / truth < 1.4 for factor in (-1, -3, 0.5))


def test_linear_algebra_of_complex_numbers_is_refused():
    with MonteCarloArithmetic(), pytest.raises(TypeError, match="real numbers"):
        torch.linalg.pinv(torch.complex(normal(3, 3), normal(3, 3, seed=1)))


def fused_attention(q, k, v, **options):
    return F.scaled_dot_product_attention(q[None, None], k[None, None], v[None, None], **options)


WEIGHT_NORM = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(6, 3))
MASK = torch.linspace(0, 1, 25).reshape(5, 5) > 0.3


@pytest.mark.parametrize(
    "function",
    [
        *(lambda a, b, c, p=p: torch.cdist(a, b, p) for p in (1.0, 2.0, 3.0, math.inf)),
        *(lambda a, b, c, p=p: F.pdist(a, p) for p in (1.0, 2.0)),
        lambda a, b, c: torch.dist(a, b, 3),
        lambda a, b, c: WEIGHT_NORM(a),
        lambda a, b, c: F.bilinear(a, b, torch.linspace(-1, 1, 72).reshape(2, 6, 6)),
        fused_attention,
        lambda a, b, c: fused_attention(a, b, c, is_causal=True),
        lambda a, b, c: fused_attention(a, b, c, attn_mask=MASK),
        lambda a, b, c: torch.softmax(a, 0) + torch.log_softmax(b, 1) + c.logsumexp(0),
        lambda a, b, c: torch.stack(torch._foreach_norm([a, b, c])),
        lambda a, b, c: a.std(0) * torch.linalg.vector_norm(b, 1, 0) + c.var(0),
        lambda a, b, c: F.group_norm(a[None], 5) + F.layer_norm(b, (6,)) * c.norm(3),
        lambda a, b, c: torch.linalg.vector_norm(torch.complex(a, b), dim=1) + c.sum(1),
        lambda a, b, c: torch.softmax(a.sum(), 0) + torch.addr(a, b[:, 0], c[0]),
        lambda a, b, c: torch.addbmm(a[:, :5], b[None].expand(3, 5, 6), c.T[None].expand(3, 6, 5)),
        lambda a, b, c: torch.addmm(a[:, :5], b, c.T, beta=0.5, alpha=3),
        lambda a, b, c: F.conv_transpose1d(a[None], b[:, :2, None] + c[:, :2, None], stride=2),
        lambda a, b, c: F.conv1d(a[None], (b + c)[:, None, :3], groups=5),
        lambda a, b, c: F.conv2d(a[None, None], b[None, None, :3, :3], c[0, :1], padding=1, dilation=2),
        lambda a, b, c: (a @ b.T).cumprod(0) + c.prod(),
    ],
)
@pytest.mark.parametrize("direct", [True, False])
def test_values_and_gradients_agree_with_torch(function, direct, monkeypatch):
    if not direct:  # as where operators are large
        monkeypatch.setattr(products, "DIRECT", 0)
        monkeypatch.setattr(products, "_DIRECT_IMAGES", 0)

    def run():
        operands = [normal(5, 6, seed=seed).requires_grad_() for seed in range(3)]
        y = function(*operands)
        gradients = torch.autograd.grad(y.square().sum(), operands, allow_unused=True, materialize_grads=True)
        return [y.detach(), *gradients]

    truth = run()
    with MonteCarloArithmetic(seed=2):
        found = run()
    torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-3)
    assert any(not torch.equal(a, b) for a, b in zip(found, truth, strict=True))


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"attn_mask": MASK}])
def test_attention_that_was_computed_outside_is_differentiated_inside(options):
    operands = [normal(5, 6, seed=seed).requires_grad_() for seed in range(3)]
    y = fused_attention(*operands, **options).square().sum()
    truth = torch.autograd.grad(y, operands, retain_graph=True)
    with MonteCarloArithmetic(seed=2):
        found = torch.autograd.grad(y, operands)
    torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-4)
    assert not torch.equal(found[0], truth[0])
