"""Weights on disk: safetensors. Files of earlier ensembles add to the weights of others."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save

from bids_varaug.atomic import replacing
from bids_varaug.models.checksum import sha256_of
from bids_varaug.models.unet import UNet

FORMAT = "float16"
"""What weights are written in; it changes one by 2e-4 of its size."""
STEP = ".step"
"""Ends the name of the tensor that holds the size of one integer step, for each row."""


def save_weights(network: UNet, path: Path) -> str:
    """Write weights as `FORMAT` and return the file's SHA-256.

    Raises
    ------
    OutputError
        If the file cannot be written.
    """
    write_tensors(path, {name: p.detach().cpu().half() for name, p in network.named_parameters()})
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


def _decoded(coded: torch.Tensor, steps: torch.Tensor | None) -> torch.Tensor:
    return coded.float() if steps is None else coded.float() * _per_row(steps, coded)


def _per_row(steps: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return steps.view(-1, *[1] * (like.ndim - 1))
