"""Weights on disk: safetensors in half precision."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from bids_varaug.atomic import replacing
from bids_varaug.errors import EnsembleError
from bids_varaug.models.ensemble import Ensemble, Member, check_member, sha256_of
from bids_varaug.models.trunk import add_differences, files_of
from bids_varaug.models.unet import UNet, build_network

FORMAT = "float16"
"""What weights are written in; it changes one by 2e-4 of its size."""


def save_weights(network: UNet, path: Path) -> str:
    """Write weights as `FORMAT` and return the file's SHA-256."""
    write_tensors(path, {name: p.detach().cpu().half() for name, p in network.named_parameters()})
    return sha256_of(path)


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file as `atomic.replacing` does: a kill or a full disk leaves the old one."""
    content = save({name: p.contiguous() for name, p in tensors.items()}, metadata)
    with replacing(path) as stream:
        stream.write(content)


def load_weights(*paths: Path) -> dict[str, torch.Tensor]:
    """Return a state dictionary in float32: whole weights, and files that add to them (see `models.trunk`)."""
    weights = {name: p.float() for name, p in load_file(paths[0]).items()}
    for path in paths[1:]:
        weights = add_differences(weights, load_file(path))
    return weights


def load_member(ensemble: Ensemble, member: Member, device: str = "cpu") -> UNet:
    """Build a member's network in float32, in evaluation mode; an `EnsembleError` if its weights cannot be used."""
    check_member(ensemble, member)
    paths = [ensemble.directory / file for file, _, _ in files_of(ensemble, member)]
    network = build_network(ensemble.network)
    try:
        network.load_state_dict(load_weights(*paths))
    except (SafetensorError, RuntimeError, KeyError) as error:
        raise EnsembleError(f"{paths[-1]}: weights do not fit the manifest's network: {error}") from None
    return network.to(device).eval().requires_grad_(False)
