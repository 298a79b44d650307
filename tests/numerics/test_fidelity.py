"""Spread of the engine's results against instructions that are rounded one by one.

At small sizes: standard deviation over seeds relative to `reference`, pooled over elements and of each element.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bids_varaug.numerics import MonteCarloArithmetic, products
from tests.numerics import reference
from tests.numerics.reference import Arithmetic

SEEDS = 28
POOLED = (0.8, 1.25)
EACH = (0.5, 2.0)  # nine elements in ten; 28 seeds on either side spread the ratio by 0.8 to 1.25 alone
KINDS = ("random", "positive", "cancelling")
SETTINGS = {
    "lanes": {"lanes": 16},
    "fma": {"fma": True},
    "float64": {"dtype": "float64"},
    "both, lanes, fma": {"dtype": "float64", "lanes": 16, "fma": True},
}


def draw(rng, kind, *shape):
    """Rows along the last axis."""
    if kind == "random":
        return rng.normal(size=shape)
    x = rng.uniform(0.1, 1.0, size=shape)
    if kind == "cancelling":  # the second half undoes the first
        half = shape[-1] // 2
        x[..., half : 2 * half] = -x[..., :half] * (1 + 1e-3 * rng.normal(size=half))
    return x


def numbers(rng, kind, left, right):
    """Two factors whose products along the last axis of each are of a kind."""
    a, b = draw(rng, kind, *left), draw(rng, "positive" if kind != "random" else kind, *right)
    if kind == "cancelling":
        half = right[-1] // 2
        b[..., half : 2 * half] = b[..., :half]
    return a, b


# Operators: arrays, what torch does, what the reference does; results by name


def sum_data(rng, kind):
    return {"x": draw(rng, kind, 96, 600)}


def sum_torch(t):
    return {"sum": t["x"].sum(1), "mean": t["x"].mean(1)}


def sum_reference(a, arithmetic):
    n = np.array(a["x"].shape[1], a["x"].dtype)
    total = reference.total(a["x"], arithmetic.at(0))
    mean = reference.divide(reference.total(a["x"], arithmetic.at(1)), n, arithmetic.at(2))
    return {"sum": total, "mean": mean}


def norm_data(rng, kind):
    return {"x": draw(rng, kind, 96, 600)}


def spread_torch(t):
    return {"var": t["x"].var(1, correction=0), "norm": torch.linalg.vector_norm(t["x"], dim=1)}


def spread_reference(a, arithmetic):
    x, n = a["x"], np.array(a["x"].shape[1], a["x"].dtype)
    mean = reference.divide(reference.total(x, arithmetic.at(0)), n, arithmetic.at(1))
    distance = reference.add(x, -mean[:, None], arithmetic.at(2))
    squares = reference.dot(distance, distance, arithmetic.at(3))
    norm = reference.sqrt(reference.dot(x, x, arithmetic.at(5)), arithmetic.at(6))
    return {"var": reference.divide(squares, n, arithmetic.at(4)), "norm": norm}


def dot_data(rng, kind):
    a, b = numbers(rng, kind, (48, 400), (8, 400))
    return {"a": a, "b": b}


def dot_torch(t):
    return {
        "mm": t["a"] @ t["b"].T,
        "mv": t["a"] @ t["b"][0],
        "dot": torch.stack([torch.dot(row, t["b"][0]) for row in t["a"]]),
        "bmm": torch.bmm(t["a"][None], t["b"].T[None]),
    }


def dot_reference(a, arithmetic):
    rows = a["b"][:1].repeat(48, 0)
    return {
        "mm": reference.matmul(a["a"], np.ascontiguousarray(a["b"].T), arithmetic.at(0)),
        "mv": reference.dot(a["a"], rows, arithmetic.at(1)),
        "dot": reference.dot(a["a"], rows, arithmetic.at(2)),
        "bmm": reference.matmul(a["a"], np.ascontiguousarray(a["b"].T), arithmetic.at(3))[None],
    }


def conv_data(rng, kind):
    plain = "random" if kind in ("blob", "sparse") else kind
    x = np.moveaxis(draw(rng, plain, 2, 5, 5, 5, 8), -1, 1)
    weight = draw(rng, "random" if plain == "random" else "positive", 6, 8, 3, 3, 3)
    gradient = draw(rng, plain, 2, 6, 5, 5, 5)
    if kind == "blob":  # dark, but for a corner a thousand times brighter
        x[:, :, :2, :2, :2] *= 1000
    if kind == "sparse":  # as rectifiers pass on
        x *= rng.uniform(size=x.shape) < 0.3
        gradient *= rng.uniform(size=gradient.shape) < 0.1
    if kind == "cancelling":
        weight[:, 4:] = weight[:, :4]
        gradient[:, 3:] = -gradient[:, :3] * (1 + 1e-3 * rng.normal(size=(2, 3, 5, 5, 5)))
        weight[3:] = weight[:3]
    return {"x": x, "weight": weight, "gradient": gradient, "bias": rng.normal(size=6)}


def conv_torch(t):
    x, weight, bias = (t[k].detach().requires_grad_() for k in ("x", "weight", "bias"))
    y = F.conv3d(x, weight, bias, padding=1)
    dx, dweight, dbias = torch.autograd.grad(y, (x, weight, bias), t["gradient"])
    return {"y": y, "dx": dx, "dweight": dweight, "dbias": dbias}


def conv_reference(a, arithmetic):
    x, weight, gradient = a["x"], a["weight"], a["gradient"]
    return {
        "y": reference.conv3d(x, weight, a["bias"], arithmetic.at(0)),
        "dx": reference.conv3d_input_gradient(gradient, weight, arithmetic.at(1)),
        "dweight": reference.conv3d_weight_gradient(gradient, x, (3, 3, 3), arithmetic.at(2)),
        "dbias": reference.total(
            np.ascontiguousarray(gradient.swapaxes(0, 1)).reshape(6, -1), arithmetic.at(3)
        ),
    }


def channel_data(rng, kind):
    shape = (2, 24, 6, 6, 6)
    x = draw(rng, kind, 2, 24, 216).reshape(shape)
    gradient = draw(rng, kind, 2, 24, 216).reshape(shape)
    scale, shift = rng.uniform(0.5, 1.5, size=24), rng.normal(size=24)
    return {"x": x, "gradient": gradient, "scale": scale, "shift": shift}


def normalised_torch(normalise, names=("y", "dx", "dscale", "dshift")):
    def run(t):
        given = [t[k].detach().requires_grad_() for k in ("x", "scale", "shift")]
        y = normalise(*given)
        results = y, *torch.autograd.grad(y, given, t["gradient"])
        return dict(zip(names, results, strict=False))

    return run


def normalised_reference(groups):
    def run(a, arithmetic):
        x, scale = a["x"], a["scale"]
        y, mean, inverse = reference.normalise(x, scale, a["shift"], groups, arithmetic.at(0))
        gradients = reference.normalise_gradient(
            a["gradient"], x, mean, inverse, scale, groups, arithmetic.at(1)
        )
        return {"y": y} | dict(zip(("dx", "dscale", "dshift"), gradients, strict=True))

    return run


def row_data(rng, kind):
    x, gradient = draw(rng, kind, 48, 64), rng.normal(size=(48, 64))
    return {"x": x, "gradient": gradient, "scale": rng.uniform(0.5, 1.5, size=64)} | {
        "shift": rng.normal(size=64)
    }


def softmax_data(rng, kind):
    return {"x": 3 * draw(rng, kind, 200, 24), "gradient": draw(rng, kind, 200, 24)}


def softmax_torch(t):
    x = t["x"].detach().requires_grad_()
    y = torch.softmax(x, 1)
    return {"y": y, "dx": torch.autograd.grad(y, x, t["gradient"])[0]}


def softmax_reference(a, arithmetic):
    y = reference.softmax(a["x"], 1, arithmetic.at(0))
    return {"y": y, "dx": reference.softmax_gradient(a["gradient"], y, 1, arithmetic.at(1))}


OPERATORS = {
    "sum": (sum_data, sum_torch, sum_reference),
    "spread": (norm_data, spread_torch, spread_reference),
    "product": (dot_data, dot_torch, dot_reference),
    "conv3d": (conv_data, conv_torch, conv_reference),
    "batch_norm": (
        channel_data,
        normalised_torch(lambda x, a, b: F.batch_norm(x, None, None, a, b, training=True)),
        normalised_reference(None),
    ),
    "group_norm": (
        channel_data,
        normalised_torch(lambda x, a, b: F.group_norm(x, 12, a, b)),
        normalised_reference(12),
    ),
    "instance_norm": (  # torch sums its slopes of scale and shift sample by sample
        channel_data,
        normalised_torch(lambda x, a, b: F.instance_norm(x, weight=a, bias=b), ("y", "dx")),
        normalised_reference(24),
    ),
    "layer_norm": (
        row_data,
        normalised_torch(lambda x, a, b: F.layer_norm(x, (64,), a, b)),
        normalised_reference(1),
    ),
    "softmax": (softmax_data, softmax_torch, softmax_reference),
}


@cache
def arrays_of(operator, kind, dtype):
    rng = np.random.default_rng([*map(ord, operator)])
    data = OPERATORS[operator][0](rng, kind)
    return {name: np.ascontiguousarray(array, dtype) for name, array in data.items()}


def variance(run):
    """Variance over seeds of each element, by name."""
    results = [run(seed) for seed in range(SEEDS)]
    return {
        name: np.stack([np.asarray(r[name], "f8") for r in results]).var(0, ddof=1)
        for name in results[0]
    }


@cache
def expected(operator, kind, mode, precision, dtype, lanes, fma):
    arrays = arrays_of(operator, kind, dtype)
    arithmetic = Arithmetic("cestac" if mode == "random" else mode, 77, precision, lanes, fma)
    return variance(lambda seed: OPERATORS[operator][2](arrays, arithmetic.at(seed)))


def compared(operator, kind, mode="rr", precision=None, dtype="float32", lanes=1, fma=False, **options):
    """Variances of engine and reference, by name of the result."""
    tensors = {n: torch.from_numpy(a) for n, a in arrays_of(operator, kind, dtype).items()}

    def run(seed):
        with MonteCarloArithmetic(mode, precision, 1000 + seed, lanes=lanes, fma=fma, **options):
            results = OPERATORS[operator][1](tensors)
        return {name: value.detach().numpy() for name, value in results.items()}

    of_reference = expected(operator, kind, mode, precision, dtype, lanes, fma)
    return {name: (v, of_reference[name]) for name, v in variance(run).items()}


def pooled(found):
    return {name: math.sqrt(a.mean() / b.mean()) for name, (a, b) in found.items()}


def assert_within(found, limits=POOLED, share=0.9):
    ratios = pooled(found)
    assert all(limits[0] <= ratio <= limits[1] for ratio in ratios.values()), ratios
    for name, (a, b) in found.items():
        each = np.sqrt(a[b > 0] / b[b > 0])
        if each.size >= 40:
            inside = np.mean((each >= EACH[0]) & (each <= EACH[1]))
            assert inside >= share, (name, np.percentile(each, (5, 50, 95)))


MANY = ["sum", "product", "conv3d", "batch_norm", "layer_norm"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_spread_is_that_of_rounded_instructions(operator, kind):
    assert_within(compared(operator, kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("operator", ["product", "conv3d"])
def test_spread_by_a_sample_of_elements(operator, kind, monkeypatch):
    """As for large operators, of which not every element's partial sums are added up."""
    monkeypatch.setattr(products, "DIRECT", 0)
    monkeypatch.setattr(products, "_DIRECT_IMAGES", 0)
    assert_within(compared(operator, kind), (0.7, 1.4), 0.6)


@pytest.mark.parametrize("kind", ["blob", "sparse"])
def test_spread_of_uneven_images(kind):
    assert_within(compared("conv3d", kind))


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("operator", MANY)
def test_spread_with_lanes_fused_and_in_float64(operator, setting):
    assert_within(compared(operator, "random", **SETTINGS[setting]))


@pytest.mark.parametrize("mode, precision", [("pb", 24), ("mca", 24), ("sr", 16), ("ud", 24), ("random", 24)])
@pytest.mark.parametrize("operator", ["sum", "product", "batch_norm"])
def test_spread_in_other_modes(operator, mode, precision):
    found = compared(operator, "random", mode, precision)
    if operator == "product":  # the others are one column: its place on a grid matters
        found = {"mm": found["mm"], "bmm": found["bmm"]}
    # With equal odds the place of terms on the grid matters for each element
    assert_within(found, (0.7, 1.4), 0.8)


@pytest.mark.parametrize("operator, name", [("sum", "sum"), ("product", "mm"), ("conv3d", "y")])
def test_one_rounding_is_not_enough_for_many_terms(operator, name):
    for kind in KINDS:
        assert pooled(compared(operator, kind, accumulation="none"))[name] < 0.5


@pytest.mark.parametrize("operator, name", [("sum", "sum"), ("product", "mm"), ("conv3d", "y")])
def test_large_operators_are_centred_on_the_exact_result_if_asked(operator, name):
    tensors = {n: torch.from_numpy(a) for n, a in arrays_of(operator, "random", "float32").items()}
    exact = OPERATORS[operator][1]({n: t.double() for n, t in tensors.items()})[name]
    biases = []
    for centre in ("torch", "exact"):
        results = []
        for seed in range(2 * SEEDS):
            with MonteCarloArithmetic("rr", seed=seed, centre=centre):
                results.append(OPERATORS[operator][1](tensors)[name].detach().double())
        results = torch.stack(results)
        biases.append(float(((results.mean(0) - exact) / results.std(0)).square().mean().sqrt()))
    assert biases[1] < 1.25 / math.sqrt(2 * SEEDS) < biases[0]  # what the mean of so many samples has by chance
