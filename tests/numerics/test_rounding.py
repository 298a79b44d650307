"""Monte Carlo arithmetic: right odds, right operators, same seed same bits."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bids_varaug.numerics import MonteCarloArithmetic
from bids_varaug.numerics.rounding import _perturb_with_torch, perturb_


def ulps_moved(before, after):
    return after.contiguous().view(torch.int32) - before.contiguous().view(torch.int32)


@pytest.mark.parametrize("perturb", [perturb_, _perturb_with_torch])
def test_odds_are_one_six_one(perturb):
    # False-alarm rate: 5 standard errors on 3 counts, about 2e-6; the seed is fixed anyway.
    x = torch.randn(400_000, generator=torch.Generator().manual_seed(0))
    y = x.clone()
    perturb(y, seed=7, call=1)
    moved = ulps_moved(x, y)
    for step, share in ((-1, 1 / 8), (0, 3 / 4), (1, 1 / 8)):
        error = (share * (1 - share) / x.numel()) ** 0.5
        assert abs(float((moved == step).float().mean()) - share) < 5 * error
    assert set(moved.unique().tolist()) == {-1, 0, 1}


def test_streams_of_different_seeds_and_calls_are_uncorrelated():
    draws = []
    for seed, call in ((1, 1), (2, 1), (1, 2)):
        x = torch.ones(200_000)
        perturb_(x, seed, call)
        draws.append(ulps_moved(torch.ones(200_000), x).double().numpy())
    correlation = np.corrcoef(draws) - np.eye(3)
    assert np.abs(correlation).max() < 5 / 200_000**0.5


@pytest.mark.parametrize("perturb", [perturb_, _perturb_with_torch])
def test_special_values_stay(perturb):
    special = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), torch.finfo().max]
    x = torch.tensor(special * 200)
    y = x.clone()
    perturb(y, seed=3, call=1)
    assert torch.equal(torch.isnan(x), torch.isnan(y))
    finite = x[~torch.isnan(x)]
    moved = y[~torch.isnan(x)]
    largest = finite == torch.finfo().max
    assert torch.equal(finite[~largest], moved[~largest])
    assert torch.isfinite(moved[largest]).all()


@given(st.integers(0, 2**31), st.sampled_from([(5,), (3, 4), (2, 3, 4, 5), (1, 4, 2, 3, 2), (0,)]))
@settings(max_examples=30, deadline=None)
def test_any_layout_moves_by_at_most_one_ulp(seed, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    layouts = [x.clone(), x.clone().movedim(0, -1)]
    if x.dim() == 5:
        layouts.append(x.contiguous(memory_format=torch.channels_last_3d).clone())
        layouts.append(x.clone()[:, ::2])
    for layout in layouts:
        before = layout.clone()
        perturb_(layout, seed, 1)
        assert layout.shape == before.shape
        assert layout.numel() == 0 or int(ulps_moved(before, layout).abs().max()) <= 1


def test_same_seed_same_bits_and_another_seed_other_bits():
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    results = []
    for seed in (1, 1, 2):
        with MonteCarloArithmetic(seed=seed):
            results.append(torch.softmax(x @ x, dim=1))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_exact_operators_are_left_alone():
    x = torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(0))
    with MonteCarloArithmetic(seed=1):
        for result, expected in (
            (torch.relu(x), x.clamp_min(0)),
            (x.permute(2, 1, 0).contiguous().permute(2, 1, 0), x),
            (torch.cat([x, x])[:4], x),
            (x.neg().abs(), x.abs()),
            (torch.max_pool3d(x[None], 1)[0], x),
        ):
            assert torch.equal(result, expected)


def test_forward_backward_and_update_are_perturbed():
    def step(context):
        layer = torch.nn.Linear(64, 64, bias=False)
        torch.nn.init.constant_(layer.weight, 0.1)
        optimiser = torch.optim.AdamW(layer.parameters(), lr=0.1)
        x = torch.linspace(0.1, 1.7, 64 * 8).reshape(8, 64)
        with context:
            output = layer(x)
            output.square().mean().backward()
            gradient = layer.weight.grad.clone()
            optimiser.step()
        return output.detach(), gradient, layer.weight.detach()

    plain = step(torch.enable_grad())
    perturbed = step(MonteCarloArithmetic(seed=5))
    for a, b in zip(plain, perturbed, strict=True):
        assert not torch.equal(a, b)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("arguments", [{"mode": "pb"}, {"precision": 11}])
def test_what_this_version_lacks_is_refused(arguments):
    with pytest.raises(ValueError, match="precision=24"):
        MonteCarloArithmetic(seed=1, **arguments)


def test_in_place_variants_of_exact_operators_are_exact_too():
    values = torch.linspace(-50.0, 50.0, 9999)
    with MonteCarloArithmetic(seed=0):
        rounded = values.clone().round_()
        clamped = values.clone().neg_().abs_().clamp_max_(20.0)
    assert torch.equal(rounded, values.round())
    assert torch.equal(clamped, values.abs().clamp_max(20.0))
