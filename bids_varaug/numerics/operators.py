"""Which torch operators round, and how the noise of each is modelled.

Operators are told apart by the name that torch's dispatcher gives them, without overload. What is
in `EXACT` returns numbers that were there before, or no numbers: it is left alone. What is in
`MODELS` is perturbed by the model of its many instructions; any other operator that returns
floating-point numbers is taken for one instruction per element.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from bids_varaug.numerics.operator_models import MODELS

# Copies, views, comparisons, indexing, rounding to integers, what only changes signs or chooses
# between numbers, random numbers (rounded when they were drawn), and what allocates.
EXACT = frozenset(
    """
    _unsafe_view _reshape_alias abs neg negative sign sgn relu hardtanh relu6 leaky_relu_ threshold
    threshold_backward hardtanh_backward clamp clamp_min clamp_max clip maximum minimum fmax fmin
    max min amax amin aminmax copysign max_pool1d max_pool2d_with_indices
    max_pool2d_with_indices_backward max_pool3d_with_indices max_pool3d_with_indices_backward
    max_unpool2d max_unpool3d adaptive_max_pool2d adaptive_max_pool3d copy copy_ clone _to_copy to
    contiguous empty empty_like empty_strided new_empty new_empty_strided new_zeros new_ones
    new_full zeros zeros_like ones ones_like full full_like fill fill_ zero_ eye any all as_strided
    unbind split chunk cat stack index index_select index_fill index_copy gather scatter
    slice_scatter select_scatter diagonal_scatter as_strided_scatter take take_along_dim masked_fill
    masked_scatter masked_select where roll flip rot90 tril triu diag diag_embed repeat
    repeat_interleave constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d
    replication_pad1d replication_pad2d replication_pad3d select_backward slice_backward unfold_copy
    upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d
    _upsample_nearest_exact2d _upsample_nearest_exact3d pixel_shuffle pixel_unshuffle
    channel_shuffle round floor ceil trunc frac eq ne lt le gt ge isnan isfinite isinf lift_fresh
    lift _local_scalar_dense rand randn rand_like randn_like randint uniform_ normal_ bernoulli
    bernoulli_ exponential_ random_ arange resize_ set_ set_data record_stream is_same_size sort
    topk argmax argmin argsort kthvalue median mode unique_consecutive nonzero embedding
    scalar_tensor frexp ldexp logical_and logical_or logical_not logical_xor isclose equal
    nan_to_num nan_to_num_ complex real imag view_as_real _conj _pack_padded_sequence
    _resize_output_ _unsafe_index searchsorted bucketize device layout
    """.split()
)


def _is_power_of_two(given) -> bool:
    factor = _number(given.get("other"))
    return given.get("rounding_mode") is not None or (
        factor is not None and factor != 0 and abs(math.frexp(factor)[0]) == 0.5
    )


def _adds_zero(given) -> bool:
    return _number(given.get("other")) == 0


def _copies(given) -> bool:
    return not given.get("accumulate") and given.get("reduce") in (None, "amax", "amin")


# What is exact for some arguments
_EXACT_FOR: dict[str, Callable[[dict], bool]] = {
    **dict.fromkeys(("mul", "multiply", "div", "divide"), _is_power_of_two),
    **dict.fromkeys(("add", "sub", "subtract"), _adds_zero),
    "pow": lambda given: _number(given.get("exponent")) in (0, 1),
    **dict.fromkeys(
        ("index_put", "_index_put_impl", "_unsafe_index_put", "scatter_reduce", "put"), _copies
    ),
}


def _number(value) -> float | None:
    """A scalar, or a tensor that holds one on the CPU; None for anything else."""
    if isinstance(value, int | float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, torch.Tensor) and value.dim() == 0 and value.device.type == "cpu":
        number = math.inf if value.is_complex() else float(value.detach())
        return number if math.isfinite(number) else None
    return None


@dataclass(frozen=True)
class Operator:
    """What is known of one of torch's operators.

    Parameters
    ----------
    name : without overload
    names : of the arguments, in order
    defaults : of those that have one
    views : which of its results are views of an argument, unchanged
    written : names of the arguments that it changes
    not_returned : those of them that are not among its results
    is_exact : whether it rounds nothing, whatever its arguments
    is_exact_for : whether it rounds nothing for the arguments given; None: never so
    model : of its many instructions; None: one instruction per element
    """

    name: str
    names: tuple[str, ...]
    defaults: dict
    views: frozenset[int]
    written: tuple[str, ...]
    not_returned: tuple[str, ...]
    is_exact: bool
    is_exact_for: Callable[[dict], bool] | None
    model: Callable | None

    def given(self, args, kwargs) -> dict:
        """Arguments by name."""
        return self.defaults | dict(zip(self.names, args, strict=False)) | kwargs

    def rounds_nothing(self, args, kwargs) -> bool:
        """Whether no number of the result is rounded.

        Examples
        --------
        >>> mul = operator_of(torch.ops.aten.mul.Tensor)
        >>> mul.rounds_nothing((torch.ones(2), 0.5), {}), mul.rounds_nothing((torch.ones(2), 3), {})
        (True, False)
        """
        if self.is_exact or self.is_exact_for is None:
            return self.is_exact
        return self.is_exact_for(self.given(args, kwargs))


@cache
def operator_of(func) -> Operator:
    """Return what is known of an operator, by its schema and its name."""
    schema, name = func._schema, func.overloadpacket.__name__
    one = name.removeprefix("_foreach_")
    base = one.removesuffix("_")
    written = {
        a.name: a.alias_info.before_set
        for a in schema.arguments
        if a.alias_info is not None and a.alias_info.is_write
    }
    aliases = {i: r.alias_info for i, r in enumerate(schema.returns) if r.alias_info is not None}
    views = frozenset(i for i, alias in aliases.items() if not alias.is_write)
    returned = set().union(*(alias.before_set for alias in aliases.values()))
    return Operator(
        name=name,
        names=tuple(a.name for a in schema.arguments),
        defaults={a.name: a.default_value for a in schema.arguments if a.has_default_value()},
        views=views,
        written=tuple(written),
        not_returned=tuple(key for key, alias in written.items() if not alias & returned),
        is_exact=one in EXACT or base in EXACT or bool(views and not written),
        is_exact_for=_EXACT_FOR.get(base),
        model=MODELS.get(name, MODELS.get(name.removesuffix("_"))),
    )
