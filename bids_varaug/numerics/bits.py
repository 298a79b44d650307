"""The bits of floats inside compiled kernels, and casts that do not widen."""

from __future__ import annotations

from numba import types
from numba.core import cgutils  # noqa: F401 (numba's intrinsics need it loaded)
from numba.extending import intrinsic

_BITS = {types.float32: types.int32, types.float64: types.int64}
_FLOATS = {bits: floating for floating, bits in _BITS.items()}


def _reinterpreted(value, target):
    def build(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], context.get_value_type(target))

    return target(value), build


@intrinsic
def bits_of(typing_context, value):
    """The bits of a float as an integer of its width."""
    return _reinterpreted(value, _BITS[value])


@intrinsic
def float_of(typing_context, bits):
    """The float of these bits."""
    return _reinterpreted(bits, _FLOATS[bits])


@intrinsic
def size_of(typing_context, bits):
    """Bytes of an integer."""
    n_bytes = bits.bitwidth // 8

    def build(context, builder, signature, arguments):
        return context.get_constant(types.int64, n_bytes)

    return types.int64(bits), build


@intrinsic
def like(typing_context, value, template):
    """The value, in the template's type: numba widens 32-bit arithmetic otherwise."""

    def build(context, builder, signature, arguments):
        return context.cast(builder, arguments[0], value, template)

    return template(value, template), build
