"""Weights on disk: safetensors, whole or as what separates a member from another network."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save

from bids_varaug.derivatives.write import replacing
from bids_varaug.models.checksum import sha256_of
from bids_varaug.models.unet import UNet

STEP = ".step"
"""Ends the name of the tensor that holds the size of one integer step, for each row."""
_LEVELS = 127


def save_weights(network: UNet, path: Path, base: UNet | None = None) -> str:
    """Write weights and return the file's SHA-256.

    Without a base they are float16, which changes a weight by 2e-4 of its size: far less than
    what separates two seeds. With one, what separates them from the base is written: for each
    row of a matrix or kernel (its first axis) 8-bit integers and the size of their step, for
    vectors float32. That is half the size, and its error is at most 0.4 % of the largest
    difference in the row.

    Parameters
    ----------
    base : the network that the file adds to, in full precision

    Raises
    ------
    OutputError
        If the file cannot be written.
    """
    tensors = {name: p.detach().cpu() for name, p in network.named_parameters()}
    if base is None:
        tensors = {name: p.half() for name, p in tensors.items()}
    else:
        start = dict(base.named_parameters())
        tensors = _coded({name: p - start[name].detach().cpu() for name, p in tensors.items()})
    write_tensors(path, tensors)
    return sha256_of(path)


def write_tensors(
    path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file, aside first and renamed, so that a kill leaves the old one.

    Raises
    ------
    OutputError
        If it cannot be written; nothing half-written is left.
    """
    content = save({name: p.contiguous() for name, p in tensors.items()}, metadata)
    with replacing(path) as stream:
        stream.write(content)


def load_weights(path: Path, *bases: Path) -> dict[str, torch.Tensor]:
    """Return a state dictionary in float32.

    Parameters
    ----------
    bases : files that it adds to: whole weights, then differences

    Raises
    ------
    safetensors.SafetensorError
        If a file is damaged.
    KeyError
        If they do not belong together.
    """
    whole, *differences = (load_file(file) for file in (*bases, path))
    weights = {name: p.float() for name, p in whole.items()}
    for tensors in differences:
        weights = {
            name: weights[name] + _decoded(p, tensors.get(name + STEP))
            for name, p in tensors.items()
            if not name.endswith(STEP)
        }
    return weights


def _coded(differences: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, difference in differences.items():
        if difference.ndim < 2:
            tensors[name] = difference
            continue
        steps = difference.flatten(1).abs().amax(1) / _LEVELS
        levels = difference / _per_row(steps.clamp_min(torch.finfo(torch.float32).tiny), difference)
        tensors[name] = levels.round().to(torch.int8)
        tensors[name + STEP] = steps
    return tensors


def _decoded(coded: torch.Tensor, steps: torch.Tensor | None) -> torch.Tensor:
    return coded.float() if steps is None else coded.float() * _per_row(steps, coded)


def _per_row(steps: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return steps.view(-1, *[1] * (like.ndim - 1))
