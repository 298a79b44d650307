"""Instruction-level Monte Carlo arithmetic: every multiply and every add is randomly rounded.

The yardstick for faster models of the same thing: slow (20 to 50 million instructions per second),
single-threaded, explicit about the order of the instructions. Functions take and return NumPy
arrays; the last argument, an `Arithmetic`, says how to round.

Order. A sum of n terms runs from the first to the last, n - 1 additions, the first term being the
first partial sum. With ``lanes=L``, partial sum l takes the terms l, l + L, l + 2L, ... as a
vectorised kernel does, and the partial sums are then added pairwise: l and l + L/2, and so on. In
a sum of products, product and addition are two instructions, each rounded; with ``fma=True`` they
are one, rounded once.

The gradient of ``matmul(a, b)`` is ``matmul(g, b.T)`` and ``matmul(a.T, g)``, that of a
convolution's bias is the `total` of the gradient over samples and voxels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from tests.numerics import reference_instructions as instructions
from tests.numerics.reference_instructions import MODES

# Format: bits of the significand, exponent of the smallest subnormal number
FORMATS = {np.dtype("float32"): (24, -149), np.dtype("float64"): (53, -1074)}


@dataclass(frozen=True)
class Arithmetic:
    """How instructions are rounded.

    An instruction's exact result is ``x = m 2^e`` with ``0.5 <= |m| < 1``; ``u = 2^(e-t)`` is its
    unit in the last place (ulp) at the virtual precision t, and "grid" means the multiples of u.
    The format (float32, float64) is that of the arrays.

    ======== =======================================================================================
    mode     result of an instruction
    ======== =======================================================================================
    rr       random rounding [1]_: ``x + u xi``, xi uniform in (-1/2, 1/2), then rounded to nearest
             *in the format*, not on the grid, as in Verificarlo [2]_. Where x lies on the grid it
             is left alone, as there. With t that of the format this is `sr`, but for x within
             half a ulp above a power of two.
    pb       precision bounding: each operand a becomes ``a + u_a xi``, exact or not; the result is
             rounded to nearest in the format
    mca      both; results are perturbed even where they lie on the grid, as in Verificarlo
    sr       stochastic rounding: to one of the two neighbours on the grid, up with the probability
             of the fraction of u that x lies above the lower one; unbiased
    cestac   random rounding of CESTAC and of Verrou's ``random``: to one of the two neighbours on
             the grid with probability 1/2 each; biased by the distance of x from their middle
    ud       up-down as in PRISM and Fuzzy PyTorch [3]_: x rounded to nearest on the grid, then one
             ulp away from or towards zero with probability 1/2 each, also where x lies on the grid
    ieee     to nearest on the grid, ties to even: no randomness
    ======== =======================================================================================

    Results on the grid are unchanged in rr, sr, cestac and ieee. Zeros, infinities and NaN pass
    unchanged in all modes. Subnormal results have the grid of the format's subnormal numbers.

    Parameters
    ----------
    mode : one of the above
    seed : not negative; names the stream of random numbers (SplitMix64, one step per random
        number). The same seed, arguments and function give the same bits on any machine.
    precision : virtual precision t in bits, 2 to 24 (float32) or 53 (float64); None: the format's
    lanes : interleaved partial sums in sums, a power of two
    fma : whether multiplying and adding is one instruction in sums of products and in
        normalisation

    Raises
    ------
    ValueError
        For anything else.

    References
    ----------
    .. [1] Parker (1997), Monte Carlo Arithmetic, UCLA CSD-970002.
    .. [2] Denis, de Oliveira Castro, Petit (2016), Verificarlo, ARITH.
    .. [3] github.com/yohanchatelain/prism, ``src/ud_scalar.h``; arXiv:2605.25991.

    Examples
    --------
    >>> third = divide(np.ones(1000, "float32"), np.full(1000, 3, "float32"), Arithmetic("sr", 1))
    >>> np.unique(third).size, bool(abs(third.mean(dtype="float64") - 1 / 3) < 2**-29)
    (2, True)
    """

    mode: str = "rr"
    seed: int = 0
    precision: int | None = None
    lanes: int = 1
    fma: bool = False

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(f"mode={self.mode!r}: must be one of {', '.join(MODES)}")
        if not isinstance(self.seed, int | np.integer) or self.seed < 0:
            raise ValueError(f"seed={self.seed!r}: must be an integer, 0 or more")
        if self.precision is not None and not (
            isinstance(self.precision, int | np.integer) and 2 <= self.precision <= 53
        ):
            raise ValueError(
                f"precision={self.precision!r}: must be an integer, 2 to 24 for float32, "
                "2 to 53 for float64"
            )
        if (
            not isinstance(self.lanes, int | np.integer)
            or self.lanes < 1
            or self.lanes & (self.lanes - 1)
        ):
            raise ValueError(f"lanes={self.lanes!r}: must be a power of two, 1 or more")

    def at(self, *place: int) -> Arithmetic:
        """The same with another, independent stream: one for each step of a computation.

        Two calls with one seed draw the same random numbers, so that their errors are correlated.

        Examples
        --------
        >>> Arithmetic(seed=3).at(0).seed != Arithmetic(seed=3).at(1).seed
        True
        """
        words = np.random.SeedSequence(self.seed, spawn_key=place).generate_state(1, np.uint64)
        return replace(self, seed=int(words[0]))


# --------------------------------------------------------------------------------------------------
# Element by element


def add(a: np.ndarray, b: np.ndarray, arithmetic: Arithmetic) -> np.ndarray:
    """Sum of two arrays, element by element.

    Parameters
    ----------
    a, b : float32 or float64, both the same; shapes that broadcast
    arithmetic : how to round

    Returns
    -------
    of the broadcast shape and the same dtype

    Raises
    ------
    ValueError
        If the dtypes or the shapes do not fit, or the precision exceeds the format's.
    """
    run = _Run(arithmetic, a=a, b=b)
    return run.array(run.add(a, b))


def multiply(a: np.ndarray, b: np.ndarray, arithmetic: Arithmetic) -> np.ndarray:
    """Product of two arrays, element by element; everything else as in `add`."""
    run = _Run(arithmetic, a=a, b=b)
    return run.array(run.multiply(a, b))


def multiply_add(a: np.ndarray, b: np.ndarray, c: np.ndarray, arithmetic: Arithmetic) -> np.ndarray:
    """``a b + c``, element by element: two instructions, or one if `arithmetic` has ``fma``.

    Everything else as in `add`.
    """
    run = _Run(arithmetic, a=a, b=b, c=c)
    return run.array(run.multiply_add(a, b, c))


def divide(a: np.ndarray, b: np.ndarray, arithmetic: Arithmetic) -> np.ndarray:
    """Quotient of two arrays, element by element; everything else as in `add`."""
    run = _Run(arithmetic, a=a, b=b)
    return run.array(run.divide(a, b))


def sqrt(a: np.ndarray, arithmetic: Arithmetic) -> np.ndarray:
    """Square root, element by element, NaN below 0; everything else as in `add`."""
    run = _Run(arithmetic, a=a)
    return run.array(run.sqrt(a))


def exp(a: np.ndarray, arithmetic: Arithmetic) -> np.ndarray:
    """Exponential, element by element, as one instruction; everything else as in `add`.

    The exact result is formed to about 90 bits.
    """
    run = _Run(arithmetic, a=a)
    return run.array(run.exp(a))


# --------------------------------------------------------------------------------------------------
# Sums


def total(x: np.ndarray, arithmetic: Arithmetic) -> np.ndarray:
    """Sum over the last axis.

    Parameters
    ----------
    x : (..., n), float32 or float64
    arithmetic : how to round, and in how many lanes to sum

    Returns
    -------
    (...), same dtype; 0 where n is 0

    Raises
    ------
    ValueError
        For another dtype, an array without axes, or a precision beyond the format's.
    """
    run = _Run(arithmetic, x=x)
    _require(x.ndim >= 1, f"x of shape {x.shape}: needs an axis to sum over")
    return run.array(run.total(_rows(x)).reshape(x.shape[:-1]))


def dot(a: np.ndarray, b: np.ndarray, arithmetic: Arithmetic) -> np.ndarray:
    """Inner product over the last axis.

    Parameters
    ----------
    a, b : (..., n), float32 or float64, the same shape and dtype
    arithmetic : how to round

    Returns
    -------
    (...), same dtype; 0 where n is 0

    Raises
    ------
    ValueError
        If shapes or dtypes do not fit, or the precision exceeds the format's.
    """
    run = _Run(arithmetic, a=a, b=b)
    _require(
        a.shape == b.shape and a.ndim >= 1,
        f"a of shape {a.shape}, b of shape {b.shape}: must be the same, with at least one axis",
    )
    return run.array(run.dot(_rows(a), _rows(b)).reshape(a.shape[:-1]))


def matmul(a: np.ndarray, b: np.ndarray, arithmetic: Arithmetic) -> np.ndarray:
    """Matrix product; each element is a `dot` of length K.

    Parameters
    ----------
    a : (M, K), float32 or float64
    b : (K, N), same dtype
    arithmetic : how to round

    Returns
    -------
    (M, N), same dtype

    Raises
    ------
    ValueError
        If shapes or dtypes do not fit, or the precision exceeds the format's.
    """
    run = _Run(arithmetic, a=a, b=b)
    _require(
        a.ndim == b.ndim == 2 and a.shape[1] == b.shape[0],
        f"a of shape {a.shape}, b of shape {b.shape}: must be (M, K) and (K, N)",
    )
    return run.array(run.dot(a, b.T, every_pair=True))


# --------------------------------------------------------------------------------------------------
# Convolution


def conv3d(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, arithmetic: Arithmetic
) -> np.ndarray:
    """Convolution (cross-correlation, as in torch) with stride 1 and zero padding, same size.

    Each output is one `dot` over input channels, then kernel X, Y, Z (the last fastest); the zeros
    of the padding are terms like others. The bias is added last, one instruction.

    Parameters
    ----------
    x : (N, C, X, Y, Z), float32 or float64
    weight : (O, C, KX, KY, KZ), odd sizes, same dtype
    bias : (O,), same dtype, or None
    arithmetic : how to round

    Returns
    -------
    (N, O, X, Y, Z), same dtype

    Raises
    ------
    ValueError
        If shapes or dtypes do not fit, or the precision exceeds the format's.
    """
    run = _Run(arithmetic, x=x, weight=weight, bias=bias)
    _require_convolution(x, weight.shape)
    _require(
        bias is None or bias.shape == weight.shape[:1],
        f"bias of shape {np.shape(bias)}: must be {weight.shape[:1]}, one per output channel",
    )
    return run.array(run.convolve(x, weight, bias))


def conv3d_input_gradient(
    gradient: np.ndarray, weight: np.ndarray, arithmetic: Arithmetic
) -> np.ndarray:
    """Gradient of `conv3d` with respect to its input.

    A convolution of the output's gradient with the kernels flipped in space and with input and
    output channels swapped; each element is one `dot` over O KX KY KZ terms.

    Parameters
    ----------
    gradient : (N, O, X, Y, Z), with respect to the output; float32 or float64
    weight : (O, C, KX, KY, KZ), odd sizes, same dtype
    arithmetic : how to round

    Returns
    -------
    (N, C, X, Y, Z), same dtype

    Raises
    ------
    ValueError
        If shapes or dtypes do not fit, or the precision exceeds the format's.
    """
    run = _Run(arithmetic, gradient=gradient, weight=weight)
    _require(weight.ndim == 5, f"weight of shape {weight.shape}: must be (O, C, KX, KY, KZ)")
    flipped = weight[:, :, ::-1, ::-1, ::-1].swapaxes(0, 1)
    _require_convolution(gradient, flipped.shape, "gradient", "weight (input, output channels)")
    return run.array(run.convolve(gradient, flipped, None))


def conv3d_weight_gradient(
    gradient: np.ndarray, x: np.ndarray, kernel: tuple[int, int, int], arithmetic: Arithmetic
) -> np.ndarray:
    """Gradient of `conv3d` with respect to its kernels.

    Each element is one `dot` over N X Y Z terms, samples first, then voxels (Z fastest); voxels
    whose input is padding are terms like others.

    Parameters
    ----------
    gradient : (N, O, X, Y, Z), with respect to the output; float32 or float64
    x : (N, C, X, Y, Z), the input, same dtype
    kernel : odd sizes KX, KY, KZ
    arithmetic : how to round

    Returns
    -------
    (O, C, KX, KY, KZ), same dtype

    Raises
    ------
    ValueError
        If shapes or dtypes do not fit, or the precision exceeds the format's.
    """
    run = _Run(arithmetic, gradient=gradient, x=x)
    _require(
        gradient.ndim == x.ndim == 5
        and gradient.shape[0] == x.shape[0]
        and gradient.shape[2:] == x.shape[2:],
        f"gradient of shape {gradient.shape}, x of shape {x.shape}: must be (N, O, X, Y, Z) and "
        "(N, C, X, Y, Z)",
    )
    n_out, n_in, size = gradient.shape[1], x.shape[1], x.shape[2:]
    _require_convolution(x, (n_out, n_in, *kernel))
    padded = _padded(x, kernel)
    rows = gradient.swapaxes(0, 1).reshape(n_out, -1)
    result = np.empty((n_out, n_in, *kernel))
    for offset in product(*map(range, kernel)):
        window = tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))
        shifted = padded[(slice(None), slice(None), *window)].swapaxes(0, 1).reshape(n_in, -1)
        result[(slice(None), slice(None), *offset)] = run.dot(rows, shifted, every_pair=True)
    return run.array(result)


# --------------------------------------------------------------------------------------------------
# Normalisation and softmax


def normalise(
    x: np.ndarray,
    scale: np.ndarray | None,
    shift: np.ndarray | None,
    groups: int | None,
    arithmetic: Arithmetic,
    epsilon: float = 1e-5,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Group, instance, layer or batch normalisation, in two passes.

    Over the n elements of a group: ``mean = total(x) / n``, ``d = x - mean``,
    ``variance = dot(d, d) / n``, ``r = 1 / sqrt(variance + epsilon)``, ``h = d r``,
    ``y = h scale + shift``; each operation is an instruction, sums as everywhere.

    Parameters
    ----------
    x : (N, C, ...), float32 or float64, not empty
    scale, shift : (C,), same dtype, or None
    groups : groups of channels within each sample: C is instance normalisation, 1 layer
        normalisation; None is batch normalisation with the batch's own statistics
    arithmetic : how to round
    epsilon : rounded to the dtype

    Returns
    -------
    y : as x
    mean, inverse_std : (N, groups), or (C,) for batch normalisation; r above

    Raises
    ------
    ValueError
        If shapes or dtypes do not fit, or the precision exceeds the format's.
    """
    run = _Run(arithmetic, x=x, scale=scale, shift=shift)
    _require_channels(x, groups, scale=scale, shift=shift)
    rows = _to_groups(x, groups)
    mean = run.divide(run.total(rows), rows.shape[1])
    distance = run.add(rows, -mean[:, None])
    variance = run.divide(run.dot(distance, distance), rows.shape[1])
    inverse = run.divide(1.0, run.sqrt(run.add(variance, float(x.dtype.type(epsilon)))))
    result = run.multiply(distance, inverse[:, None])
    if scale is not None and shift is not None:
        result = run.multiply_add(
            result, _channelwise(scale, x, groups), _channelwise(shift, x, groups)
        )
    elif scale is not None:
        result = run.multiply(result, _channelwise(scale, x, groups))
    elif shift is not None:
        result = run.add(result, _channelwise(shift, x, groups))
    shape = (-1,) if groups is None else (x.shape[0], groups)
    return (
        run.array(_from_groups(result, x.shape, groups)),
        run.array(mean.reshape(shape)),
        run.array(inverse.reshape(shape)),
    )


def normalise_gradient(
    gradient: np.ndarray,
    x: np.ndarray,
    mean: np.ndarray,
    inverse_std: np.ndarray,
    scale: np.ndarray | None,
    groups: int | None,
    arithmetic: Arithmetic,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients of `normalise`.

    With ``h = (x - mean) r`` and ``s = gradient scale``, over the n elements of a group:
    ``dx = r ((s - total(s) / n) - h dot(s, h) / n)``; over all elements of a channel, samples
    first: ``dscale = dot(gradient, h)``, ``dshift = total(gradient)``.

    Parameters
    ----------
    gradient : (N, C, ...), with respect to y; float32 or float64, not empty
    x : the input, same shape and dtype
    mean, inverse_std : as `normalise` returned them
    scale : (C,), same dtype, or None
    groups : as in `normalise`
    arithmetic : how to round

    Returns
    -------
    dx : as x
    dscale, dshift : (C,)

    Raises
    ------
    ValueError
        If shapes or dtypes do not fit, or the precision exceeds the format's.
    """
    run = _Run(arithmetic, gradient=gradient, x=x, mean=mean, inverse_std=inverse_std, scale=scale)
    _require_channels(x, groups, scale=scale)
    _require(gradient.shape == x.shape, f"gradient of shape {gradient.shape}: must be {x.shape}")
    shape = x.shape[1:2] if groups is None else (x.shape[0], groups)
    for name, array in {"mean": mean, "inverse_std": inverse_std}.items():
        _require(array.shape == shape, f"{name} of shape {array.shape}: must be {shape}")
    inverse = inverse_std.reshape(-1, 1)
    h = run.multiply(run.add(_to_groups(x, groups), -mean.reshape(-1, 1)), inverse)
    scaled = _to_groups(gradient, groups)
    if scale is not None:
        scaled = run.multiply(scaled, _channelwise(scale, x, groups))
    n = h.shape[1]
    mean_gradient = run.divide(run.total(scaled), n)[:, None]
    mean_product = run.divide(run.dot(scaled, h), n)[:, None]
    centred = run.add(scaled, -mean_gradient)
    dx = run.multiply(run.multiply_add(-h, mean_product, centred), inverse)
    by_channel = _to_groups(gradient, None)
    dscale = run.dot(by_channel, _to_groups(_from_groups(h, x.shape, groups), None))
    dshift = run.total(by_channel)
    return run.array(_from_groups(dx, x.shape, groups)), run.array(dscale), run.array(dshift)


def softmax(x: np.ndarray, axis: int, arithmetic: Arithmetic) -> np.ndarray:
    """Softmax ``exp(x - max) / total(exp(x - max))``, each operation an instruction.

    Parameters
    ----------
    x : float32 or float64, not empty
    axis : along which the result sums to 1
    arithmetic : how to round

    Returns
    -------
    as x

    Raises
    ------
    ValueError
        If the array has no such axis, for another dtype, or a precision beyond the format's.
    """
    run = _Run(arithmetic, x=x)
    _require_axis(x, axis)
    moved = np.moveaxis(x, axis, -1)
    rows = _rows(moved)
    powers = run.exp(run.add(rows, -rows.max(axis=1, keepdims=True)))
    result = run.divide(powers, run.total(powers)[:, None])
    return run.array(np.moveaxis(result.reshape(moved.shape), -1, axis))


def softmax_gradient(
    gradient: np.ndarray, y: np.ndarray, axis: int, arithmetic: Arithmetic
) -> np.ndarray:
    """Gradient of `softmax`: ``y (gradient - dot(gradient, y))``, each operation an instruction.

    Parameters
    ----------
    gradient : with respect to y; float32 or float64, not empty
    y : what `softmax` returned, same shape and dtype
    axis : as in `softmax`
    arithmetic : how to round

    Returns
    -------
    with respect to x, shape and dtype of y

    Raises
    ------
    ValueError
        If shapes or dtypes do not fit, or the precision exceeds the format's.
    """
    run = _Run(arithmetic, gradient=gradient, y=y)
    _require(gradient.shape == y.shape, f"gradient of shape {gradient.shape}: must be {y.shape}")
    _require_axis(y, axis)
    moved = np.moveaxis(y, axis, -1)
    rows, slopes = _rows(moved), _rows(np.moveaxis(gradient, axis, -1))
    result = run.multiply(rows, run.add(slopes, -run.dot(slopes, rows)[:, None]))
    return run.array(np.moveaxis(result.reshape(moved.shape), -1, axis))


# --------------------------------------------------------------------------------------------------
# Behind the functions above


class _Run:
    """One call of a public function: checked inputs, one stream of random numbers.

    Its methods take and return float64 arrays that hold numbers of the format.
    """

    def __init__(self, arithmetic: Arithmetic, **arrays):
        if not isinstance(arithmetic, Arithmetic):
            raise ValueError(f"arithmetic={arithmetic!r}: must be an Arithmetic")
        given = {name: array for name, array in arrays.items() if array is not None}
        dtypes = {name: getattr(array, "dtype", type(array)) for name, array in given.items()}
        if len(set(dtypes.values())) != 1 or next(iter(dtypes.values())) not in FORMATS:
            listed = ", ".join(f"{name}: {dtype}" for name, dtype in dtypes.items())
            raise ValueError(f"{listed}; must be arrays of one dtype, float32 or float64")
        self.dtype = next(iter(dtypes.values()))
        self.arithmetic = arithmetic
        digits, smallest = FORMATS[self.dtype]
        precision = digits if arithmetic.precision is None else int(arithmetic.precision)
        if precision > digits:
            raise ValueError(f"precision={precision}: must be 2 to {digits} for {self.dtype}")
        self.how = instructions.Rounding(
            MODES.index(arithmetic.mode),
            precision,
            digits,
            smallest,
            np.random.SeedSequence(arithmetic.seed).generate_state(1, np.uint64),
        )

    def array(self, result: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            return np.ascontiguousarray(result, self.dtype).reshape(np.shape(result))

    def add(self, a, b):
        return self._elementwise(instructions.ADD, a, b)

    def multiply(self, a, b):
        return self._elementwise(instructions.MULTIPLY, a, b)

    def divide(self, a, b):
        return self._elementwise(instructions.DIVIDE, a, b)

    def sqrt(self, a):
        return self._elementwise(instructions.SQRT, a)

    def exp(self, a):
        return self._elementwise(instructions.EXP, a)

    def multiply_add(self, a, b, c):
        if self.arithmetic.fma:
            return self._elementwise(instructions.MULTIPLY_ADD, a, b, c)
        return self.add(self.multiply(a, b), c)

    def total(self, rows):
        """(R, n) -> (R,)."""
        out = np.empty(len(rows))
        instructions.sum_rows(_float64(rows), np.empty(self.arithmetic.lanes), out, self.how)
        return out

    def dot(self, a, b, every_pair=False):
        """(R, n), (R, n) -> (R,); with `every_pair` (R, n), (S, n) -> (R, S)."""
        out = np.empty((len(a), len(b) if every_pair else 1))
        partial = np.empty(self.arithmetic.lanes)
        fma = bool(self.arithmetic.fma)
        instructions.dot_rows(_float64(a), _float64(b), every_pair, partial, fma, out, self.how)
        return out if every_pair else out[:, 0]

    def convolve(self, x, weight, bias):
        kernel = weight.shape[2:]
        n_out = weight.shape[0]
        padded = _padded(x, kernel)
        rows = weight.reshape(n_out, -1)
        result = np.empty((x.shape[0], n_out, *x.shape[2:]))
        for sample, plane in np.ndindex(x.shape[0], x.shape[2]):
            windows = np.lib.stride_tricks.sliding_window_view(
                padded[sample, :, plane : plane + kernel[0]], kernel, axis=(1, 2, 3)
            )[:, 0]  # (C, Y, Z, KX, KY, KZ)
            columns = np.moveaxis(windows, 0, 2).reshape(-1, rows.shape[1])
            products = self.dot(rows, columns, every_pair=True)
            result[sample, :, plane] = products.reshape(n_out, *x.shape[3:])
        return result if bias is None else self.add(result, bias.reshape(-1, 1, 1, 1))

    def _elementwise(self, operation, *arrays):
        arrays = np.broadcast_arrays(*(np.asarray(array, "float64") for array in arrays))
        flat = [_float64(array).reshape(-1) for array in arrays]
        out = np.empty(flat[0].size)
        instructions.elementwise(operation, *flat, *[flat[0]] * (3 - len(flat)), out, self.how)
        return out.reshape(arrays[0].shape)


def _float64(array):
    return np.require(array, "float64", ["C", "W"])


def _rows(array):
    """(..., n) -> (R, n)."""
    return array.reshape(int(np.prod(array.shape[:-1])), array.shape[-1])


def _padded(x, kernel):
    return np.pad(x, [(0, 0), (0, 0), *((k // 2, k // 2) for k in kernel)])


def _to_groups(x, groups):
    """(N, C, ...) -> (N groups, n), or (C, n) for batch normalisation."""
    if groups is None:
        return x.swapaxes(0, 1).reshape(x.shape[1], -1)
    return x.reshape(x.shape[0] * groups, -1)


def _from_groups(rows, shape, groups):
    if groups is None:
        return rows.reshape(shape[1], shape[0], *shape[2:]).swapaxes(0, 1)
    return rows.reshape(shape)


def _channelwise(values, x, groups):
    values = values.reshape(1, -1, *[1] * (x.ndim - 2))
    return _to_groups(np.broadcast_to(values, x.shape), groups)


def _require(condition, message):
    if not condition:
        raise ValueError(message)


def _require_axis(x, axis):
    _require(
        isinstance(axis, int | np.integer) and -x.ndim <= axis < x.ndim and x.size > 0,
        f"axis={axis!r} of an array of shape {x.shape}: must be one of its axes, none empty",
    )


def _require_convolution(x, weight_shape, name="x", weight_name="weight"):
    _require(
        x.ndim == 5
        and len(weight_shape) == 5
        and x.shape[1] == weight_shape[1]
        and all(k % 2 == 1 for k in weight_shape[2:]),
        f"{name} of shape {x.shape}, {weight_name} of shape {tuple(weight_shape)}: must be "
        "(N, C, X, Y, Z) and (O, C, KX, KY, KZ) with odd KX, KY, KZ",
    )


def _require_channels(x, groups, **per_channel):
    _require(x.ndim >= 2 and x.size > 0, f"x of shape {x.shape}: must be (N, C, ...), not empty")
    _require(
        groups is None
        or (isinstance(groups, int | np.integer) and groups >= 1 and x.shape[1] % groups == 0),
        f"groups={groups!r}: must be None or divide the {x.shape[1]} channels",
    )
    for name, array in per_channel.items():
        _require(
            array is None or array.shape == x.shape[1:2],
            f"{name} of shape {np.shape(array)}: must be {x.shape[1:2]}, one per channel",
        )
