"""Which torch operators round, and how the noise of each is modelled: the table data/operators.tsv.

Operators are told apart by the name that torch's dispatcher gives them, without overload, final underscore and
``_foreach_``; a name with ``*`` stands for a family, for names that are not listed. Views, and what torch itself
composes of other operators, are recognised by their schema and need no line there.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from importlib.resources import files
from typing import Any

import torch

from bids_varaug.numerics import norms, products, reductions
from bids_varaug.numerics.decompositions import decomposition_of

EXACT, ELEMENTWISE, MODELLED, DECOMPOSED, APPROXIMATE, ONCE, REFUSED, UNKNOWN = CLASSES = (
    "exact",  # returns numbers that were there before, whole numbers, random numbers, or none
    "elementwise",  # one instruction per element, rounded once
    "modelled",  # many instructions; the error of all of them by a formula
    "decomposed",  # many instructions; runs as the operators it consists of
    "approximate",  # linear algebra: operands perturbed as backward stability allows, then one rounding; warns
    "once",  # many instructions, rounded once per element: too little; warns
    "refused",  # quantised, sparse and nested tensors, private formats
    "unknown",  # not in this table, such as an extension's: rounded once per element; warns
)



def _read_table() -> tuple[dict[str, str], dict[str, Callable[..., None]]]:
    """Class of each operator or pattern of names, and the models, by data/operators.tsv."""
    modules = {"norms": norms, "products": products, "reductions": reductions}
    kinds, models = {}, {}
    with (files("bids_varaug") / "data" / "operators.tsv").open(encoding="utf-8") as stream:
        for row in csv.DictReader(stream, delimiter="\t"):
            kinds[row["operator"]] = row["class"]
            if row["model"] != "n/a":
                module, _, function = row["model"].partition(".")
                models[row["operator"]] = getattr(modules[module], function)
    return kinds, models


CLASS_OF, _MODEL_OF = _read_table()
# Ranges that results do not leave, whichever way they are rounded
_RANGES = {
    **dict.fromkeys(("sigmoid", "hardsigmoid", "_softmax", "softmax", "_safe_softmax"), (0.0, 1.0)),
    **dict.fromkeys(("tanh", "erf", "sin", "cos"), (-1.0, 1.0)),
    **dict.fromkeys(("_log_softmax", "log_softmax", "log_sigmoid_forward"), (-math.inf, 0.0)),
}
_COMPLEX_MODELS = {"mul": reductions.complex_product, "div": reductions.complex_product}


# ----------------------------------------------------------------------------------------------------------------------
# What is exact for some arguments


def _is_power_of_two(given: dict[str, Any]) -> bool:
    factor = _number(given.get("other"))
    return given.get("rounding_mode") is not None or (
        factor is not None and factor != 0 and abs(math.frexp(factor)[0]) == 0.5
    )


def _adds_zero(given: dict[str, Any]) -> bool:
    return _number(given.get("other")) == 0


def _copies(given: dict[str, Any]) -> bool:
    return not given.get("accumulate") and given.get("reduce") in (None, "amax", "amin")


def _takes_largest(given: dict[str, Any]) -> bool:
    order = given.get("ord", given.get("p"))
    return order is not None and float(order) in (math.inf, -math.inf, 0.0)


def _takes_nearest(given: dict[str, Any]) -> bool:
    return given.get("interpolation_mode") == 1


_EXACT_FOR: dict[str, Callable[[dict[str, Any]], bool]] = {
    **dict.fromkeys(("mul", "multiply", "div", "divide"), _is_power_of_two),
    **dict.fromkeys(("add", "sub", "subtract"), _adds_zero),
    "pow": lambda given: _number(given.get("exponent")) in (0, 1),
    **dict.fromkeys(("index_put", "_index_put_impl", "_unsafe_index_put", "put"), _copies),
    "scatter_reduce": lambda given: given["reduce"] in ("amax", "amin"),
    "segment_reduce": lambda given: given["reduce"] in ("max", "min"),
    "linalg_vector_norm": _takes_largest,
    "norm": _takes_largest,
    "index_reduce": lambda given: given["reduce"] in ("amax", "amin"),
    **dict.fromkeys(("grid_sampler_2d", "grid_sampler_3d"), _takes_nearest),
    **dict.fromkeys(("_embedding_bag", "_embedding_bag_forward_only"), lambda given: given.get("mode") == 2),
}


def _number(value: Any) -> float | None:
    """A scalar, or a tensor that holds one on the CPU; None for anything else."""
    if isinstance(value, int | float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, torch.Tensor) and value.dim() == 0 and value.device.type == "cpu":
        number = math.inf if value.is_complex() else float(value.detach())
        return number if math.isfinite(number) else None
    return None


# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operator:
    """What is known of one of torch's operators.

    Parameters
    ----------
    name : without overload, final underscore and ``_foreach_``
    kind : one of `CLASSES`
    names : of the arguments, in order
    defaults : of those that have one
    views : which of its results are views of an argument, unchanged
    written : names of the arguments that it changes
    not_returned : those of them that are not among its results
    is_random : whether it draws random numbers
    is_exact_for : whether it rounds nothing for the arguments given; None: never so
    model : of its many instructions; None: one instruction per element
    decomposition : what it consists of
    range : which its real results do not leave
    """

    name: str
    kind: str
    names: tuple[str, ...]
    defaults: dict[str, Any]
    views: frozenset[int]
    written: tuple[str, ...]
    not_returned: tuple[str, ...]
    is_random: bool
    is_exact_for: Callable[[dict[str, Any]], bool] | None
    model: Callable[..., None] | None
    decomposition: Callable[..., Any] | None
    range: tuple[float, float] | None

    def given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments by name."""
        return self.defaults | dict(zip(self.names, args, strict=False)) | kwargs

    def rounds_nothing(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether no number of the result is rounded.

        Examples
        --------
        >>> mul = operator_of(torch.ops.aten.mul.Tensor)
        >>> mul.rounds_nothing((torch.ones(2), 0.5), {}), mul.rounds_nothing((torch.ones(2), 3), {})
        (True, False)
        """
        return self.kind == EXACT or (self.is_exact_for is not None and self.is_exact_for(self.given(args, kwargs)))

    def model_for(self, result: Any) -> Callable[..., None] | None:
        """The model of many instructions; products of complex numbers are such."""
        first = result[0] if isinstance(result, tuple | list) and result else result
        if isinstance(first, torch.Tensor) and first.is_complex() and self.name in _COMPLEX_MODELS:
            return _COMPLEX_MODELS[self.name]
        return self.model


def _class_of(name: str) -> str:
    if name in CLASS_OF:
        return CLASS_OF[name]
    return next((kind for pattern, kind in CLASS_OF.items() if "*" in pattern and fnmatchcase(name, pattern)), UNKNOWN)


@cache
def operator_of(func: torch._ops.OpOverload) -> Operator:
    """Return what is known of an operator, by its schema and its name."""
    schema, packet = func._schema, func.overloadpacket.__name__
    name = packet.removeprefix("_foreach_").removesuffix("_") if not packet.startswith("__") else packet
    written = {
        a.name: a.alias_info.before_set
        for a in schema.arguments
        if a.alias_info is not None and a.alias_info.is_write
    }
    aliases = {i: r.alias_info for i, r in enumerate(schema.returns) if r.alias_info is not None}
    views = frozenset(i for i, alias in aliases.items() if not alias.is_write)
    returned = set().union(*(alias.before_set for alias in aliases.values()))
    kind = _class_of(name) if func.namespace == "aten" else UNKNOWN
    decomposition = None
    if views and not written:
        kind = EXACT
    elif kind == DECOMPOSED:
        decomposition = decomposition_of(func)
        kind = DECOMPOSED if decomposition is not None else ONCE
    elif kind == UNKNOWN and not written and not any("Tensor" in str(r.type) for r in schema.returns):
        kind = EXACT
    return Operator(
        name=name,
        kind=kind,
        names=tuple(a.name for a in schema.arguments),
        defaults={a.name: a.default_value for a in schema.arguments if a.has_default_value()},
        views=views,
        written=tuple(written),
        not_returned=tuple(key for key, alias in written.items() if not alias & returned),
        is_random=torch.Tag.nondeterministic_seeded in func.tags,
        is_exact_for=_EXACT_FOR.get(name),
        model=_MODEL_OF.get(name) if kind in (MODELLED, APPROXIMATE) and not packet.startswith("_foreach_") else None,
        decomposition=decomposition,
        range=_RANGES.get(name),
    )
