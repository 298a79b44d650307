"""What holds for any shape, layout, format and number; examples by hypothesis, always the same."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bids_varaug.numerics import MonteCarloArithmetic
from bids_varaug.numerics.specification import DIGITS
from tests.numerics.bounds import steps

examples = settings(derandomize=True, deadline=None, max_examples=40)
MODES = ("rr", "pb", "mca", "sr", "ud")
FORMATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SPECIAL = (0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, -2.0)

# One instruction each, and by how many numbers of the format a result may move at full precision:
# by one, and by what its perturbed operands amount to in pb and mca
ONE_INSTRUCTION = {
    "sqrt": lambda x: x.abs().sqrt(),
    "times": lambda x: x * torch.full_like(x, 1.7),
    "by": lambda x: x / 1.3,
    "in place": lambda x: x.clone().mul_(3),
    "out": lambda x: torch.div(x, 3, out=torch.empty_like(x)),
}
EXACT = {
    "neg": lambda x: -x,
    "relu": torch.relu,
    "double": lambda x: x * 2,
    "flip": lambda x: x.flip(0),
    "cat": lambda x: torch.cat([x, x]),
    "clamp": lambda x: x.clamp(-0.5, 0.5),
    "where": lambda x: torch.where(x > 0, x, -x),
    "transpose": lambda x: x.movedim(0, -1),
    "clone": lambda x: x.clone(),
    "to": lambda x: x.to(torch.float64),
}


@st.composite
def tensors(draw, special=True, formats=FORMATS):
    """Of one to four axes, in any order of memory, with gaps, repeats, and special values."""
    shape = draw(st.lists(st.integers(0, 6), min_size=1, max_size=4))
    dtype = draw(st.sampled_from(formats))
    step = draw(st.sampled_from([1, 1, 2]))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    x = torch.randn([*shape[:-1], shape[-1] * step], generator=rng, dtype=torch.float64)
    x = x * 2.0 ** draw(st.integers(-8, 8))
    if special and x.numel():
        chosen = draw(st.lists(st.sampled_from(SPECIAL), max_size=4))
        places = torch.randint(0, x.numel(), (len(chosen),), generator=rng)
        x.view(-1)[places] = torch.tensor(chosen, dtype=torch.float64)
    x = x.to(dtype)[..., ::step]
    if draw(st.booleans()):
        x = x.permute(draw(st.permutations(range(x.dim()))))
    if draw(st.booleans()) and x.shape[0] == 1:
        x = x.expand(3, *x.shape[1:])
    return x


@given(tensors(), st.sampled_from(sorted(ONE_INSTRUCTION)), st.sampled_from(MODES), st.booleans())
@examples
def test_one_instruction_keeps_its_form_and_moves_a_little(x, name, mode, is_coarse):
    operator = ONE_INSTRUCTION[name]
    precision = DIGITS[x.dtype] - 3 if is_coarse else None
    plain, kept = operator(x), x.clone()
    with MonteCarloArithmetic(mode, min(precision or 99, 53) if is_coarse else None, seed=1):
        y = operator(x)
    assert (y.shape, y.dtype, y.stride()) == (plain.shape, plain.dtype, plain.stride())
    torch.testing.assert_close(x, kept, rtol=0, atol=0, equal_nan=True)
    unmoved = ~torch.isfinite(plain) | (plain == 0)
    torch.testing.assert_close(y[unmoved], plain[unmoved], rtol=0, atol=0, equal_nan=True)
    moved = steps(plain, y)[~unmoved.cpu()].abs()
    limit = {"rr": 1, "sr": 1, "ud": 2, "pb": 3, "mca": 4}[mode] * (8 if is_coarse else 1)
    assert not moved.numel() or int(moved.max()) <= limit + 1
    assert torch.isfinite(y[~unmoved]).all()


@given(tensors(), st.sampled_from(sorted(EXACT)), st.sampled_from(MODES))
@examples
def test_exact_operators_return_the_same_bits(x, name, mode):
    expected = EXACT[name](x)
    with MonteCarloArithmetic(mode, 8 if x.dtype != torch.bfloat16 else 6, seed=1) as context:
        y = EXACT[name](x)
    assert context.calls == 0 and y.stride() == expected.stride()
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)


@given(
    tensors(special=False),
    st.sampled_from(MODES),
    st.sampled_from(["fast", "none"]),
    st.integers(0, 2**64),
)
@examples
def test_the_same_seed_gives_the_same_bits(x, mode, accumulation, seed):
    def run():
        with MonteCarloArithmetic(mode, seed=seed, accumulation=accumulation):
            y = (x * 1.1).sum(0) + x.mean(-1).sum()
            return (
                y,
                torch.softmax(x, -1),
                x.movedim(0, -1) @ x.movedim(0, -1).mT if x.dim() > 1 else y,
            )

    for a, b in zip(run(), run(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@given(
    tensors(special=False, formats=(torch.float32, torch.float64)),
    st.sampled_from(MODES),
    st.sampled_from(["fast"]),
    st.sampled_from([1, 4, 16]),
    st.booleans(),
)
@examples
def test_sums_keep_their_form_and_stay_close(x, mode, accumulation, lanes, fma):
    def run(tensor):
        return tensor.sum(0), tensor.mean(-1, keepdim=True), torch.linalg.vector_norm(tensor, dim=0)

    plain = run(x)
    with MonteCarloArithmetic(mode, seed=3, accumulation=accumulation, lanes=lanes, fma=fma):
        noisy = run(x)
    size = float(x.abs().sum()) + float(x.norm()) if x.numel() else 0.0
    for a, b in zip(plain, noisy, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
        torch.testing.assert_close(
            b, a, rtol=0, atol=100 * torch.finfo(x.dtype).eps * size, equal_nan=True
        )


@given(tensors(), st.sampled_from(["fast"]))
@examples
def test_sums_keep_infinity_and_nan(x, accumulation):
    x = x.float()
    plain = x.sum(0), x.mean(-1), torch.log_softmax(x, -1)
    with MonteCarloArithmetic("rr", seed=3, accumulation=accumulation):
        noisy = x.sum(0), x.mean(-1), torch.log_softmax(x, -1)
    for a, b in zip(plain, noisy, strict=True):
        assert torch.equal(a.isnan(), b.isnan())
        assert torch.equal(a.isinf(), b.isinf())
