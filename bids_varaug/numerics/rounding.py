"""Monte Carlo arithmetic under stock torch: results of inexact operators are randomly rounded.

Random rounding (Parker 1997) replaces the rounded result of an operation by
``round(x + 2^(e-t) xi)`` with x the exact result and xi uniform in (-1/2, 1/2). An operator only
hands over x already rounded to float32; the part that was rounded away is itself close to uniform
over one unit in the last place (ulp), so that the perturbed result is the given one plus
``round(u1 + u2)`` ulp with u1, u2 uniform in (-1/2, 1/2): -1 or +1 ulp with probability 1/8 each,
0 with probability 3/4. That is what is drawn here, once per operator result.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

_ELEMENTS_PER_WORD = 21  # three random bits each, of a 64-bit word
_BLOCK = 21 * 1024
_INFINITY_BITS = 0x7F800000

# Operators whose float32 result is exact, or is no arithmetic at all: what they return was
# rounded before. Everything else that returns float32 is perturbed.
EXACT_OPERATORS = frozenset(
    """
    abs neg sign relu threshold threshold_backward clamp clamp_min clamp_max maximum
    minimum max min amax amin max_pool3d_with_indices max_pool3d_with_indices_backward
    max_pool3d_with_indices_backward_default copy_ clone _to_copy contiguous empty empty_like
    empty_strided new_empty new_empty_strided new_zeros new_full zeros zeros_like ones ones_like
    full full_like fill_ zero_ view _unsafe_view reshape _reshape_alias permute transpose t expand
    expand_as squeeze unsqueeze slice select narrow aminmax any all _record_function_enter_new
    _record_function_exit as_strided detach detach_ alias unbind split
    split_with_sizes chunk cat stack index index_put index_put_ index_select gather scatter
    scatter_ masked_fill masked_fill_ where roll flip constant_pad_nd select_backward
    slice_backward upsample_nearest3d round floor ceil trunc eq ne lt le gt ge isnan isfinite
    isinf lift_fresh _local_scalar_dense rand randn uniform_ normal_ bernoulli_ arange resize_
    set_ set_data record_stream is_same_size sort topk argmax argmin kthvalue
    """.split()
)


class MonteCarloArithmetic(TorchDispatchMode):
    """Context manager: inside it, inexact float32 operators return randomly rounded results.

    Forward pass, backward pass and optimiser step are all covered when they run inside. The same
    seed gives the same bits, whatever the number of threads of the perturbation itself.

    Parameters
    ----------
    seed : names the stream of perturbations
    mode : only "rr" (random rounding of results)
    precision : virtual precision in bits; only 24, that of float32

    Notes
    -----
    One rounding per operator: the accumulated error of the many instructions within one
    convolution is not modelled, so that its spread is understated by about sqrt(K) for sums of K
    terms. Operators with other dtypes are left alone. Multi-tensor (`_foreach_`, fused)
    optimisers are perturbed through the tensors they change.

    Raises
    ------
    ValueError
        For any other mode or precision.
    """

    def __init__(self, seed: int, mode: str = "rr", precision: int = 24):
        super().__init__()
        if mode != "rr" or precision != 24:
            raise ValueError(
                f"mode={mode!r}, precision={precision}: this version has mode='rr' at precision=24"
            )
        self.seed = seed
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run the operator, then perturb the float32 tensors that it computed."""
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in EXACT_OPERATORS or name.removesuffix("_") in EXACT_OPERATORS:
            return result
        changed = args[0] if result is None and args else result  # _foreach_add_ returns None
        for tensor in _tensors(changed):
            if tensor.dtype == torch.float32 and tensor.numel():
                self.calls += 1
                perturb_(tensor, self.seed, self.calls)
        return result


def perturb_(tensor: torch.Tensor, seed: int, call: int) -> None:
    """Move each element of a float32 tensor by -1, 0 or +1 ulp (odds 1:6:1), in place.

    Zeros, infinities and NaN stay what they are, finite numbers stay finite. Any strides.
    """
    if tensor.device.type != "cpu":
        _perturb_with_torch(tensor, seed, call)
        return
    dense = tensor if _is_dense(tensor) else tensor.contiguous()
    bits = dense.detach().as_strided((dense.numel(),), (1,)).numpy().view(np.int32)
    _add_ulps(bits, np.uint64(_stream(seed, call)))
    if dense is not tensor:
        tensor.detach().copy_(dense)


def _perturb_with_torch(tensor, seed: int, call: int) -> None:
    """Do the same with torch operators, for devices without a kernel of their own."""
    rng = torch.Generator(tensor.device).manual_seed(_stream(seed, call) >> 1)
    draw = torch.randint(0, 8, tensor.shape, generator=rng, device=tensor.device, dtype=torch.int32)
    bits = tensor.detach().contiguous().view(torch.int32)
    moved = bits + (draw == 1).int() - (draw == 0).int()
    magnitude = bits & 0x7FFFFFFF
    inexact = (magnitude > 0) & (magnitude < _INFINITY_BITS)
    inexact &= (moved & 0x7FFFFFFF) < _INFINITY_BITS
    tensor.detach().copy_(torch.where(inexact, moved, bits).view(torch.float32))


def _stream(seed: int, call: int) -> int:
    return int(np.random.SeedSequence([seed, call]).generate_state(1, np.uint64)[0])


def _tensors(result):
    if isinstance(result, torch.Tensor):
        yield result
    elif isinstance(result, tuple | list):
        for item in result:
            yield from _tensors(item)


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill one block of memory without gaps or overlaps, in any order."""
    return torch._debug_has_internal_overlap(tensor) == 0 and (
        tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last_3d)
        if tensor.dim() == 5
        else tensor.is_contiguous()
    )


@numba.njit(parallel=True, cache=True)
def _add_ulps(bits, stream):
    n_blocks = (bits.size + _BLOCK - 1) // _BLOCK
    for block in numba.prange(n_blocks):
        stop = min(bits.size, (block + 1) * _BLOCK)
        # A counter-based generator: the draw of an element depends on its place only.
        counter = stream + np.uint64(block) * np.uint64(_BLOCK)
        for start in range(block * _BLOCK, stop, _ELEMENTS_PER_WORD):
            counter += np.uint64(0x9E3779B97F4A7C15)
            word = counter
            word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            word = word ^ (word >> np.uint64(31))
            for i in range(start, min(stop, start + _ELEMENTS_PER_WORD)):
                draw = np.int32(word & np.uint64(7))
                word >>= np.uint64(3)
                value = bits[i]
                magnitude = value & np.int32(0x7FFFFFFF)
                # 0 and infinity/NaN are exact; the largest finite number must not overflow.
                if 0 < magnitude < np.int32(0x7F7FFFFF):
                    bits[i] = value + np.int32(draw == 1) - np.int32(draw == 0)
