"""Tensors of any strides as flat memory."""

from __future__ import annotations

import torch


class Flat:
    """The elements of a tensor in memory order, written back on leaving."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor.detach()
        self.dense = self.tensor
        if not is_dense(self.dense):
            self.dense = self.tensor.contiguous()

    def __enter__(self) -> Flat:
        self.values = self.dense.as_strided((self.dense.numel(),), (1,))
        return self

    def like(self, values: torch.Tensor) -> torch.Tensor:
        """Values of the tensor's shape in the same order, (n,)."""
        if self.dense.is_contiguous():
            return values.contiguous().reshape(-1)
        ordered = torch.empty_like(self.dense).copy_(values)
        return ordered.as_strided((ordered.numel(),), (1,))

    def __exit__(self, *failure) -> None:
        if self.dense is not self.tensor:
            self.tensor.copy_(self.dense)


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill one block of memory without gaps or overlaps, in any order."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True
