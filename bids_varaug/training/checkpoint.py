"""Training state on disk: safetensors, written aside and renamed, so a kill leaves the last one."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

MOMENTS = ("exp_avg", "exp_avg_sq", "momentum")


def save_checkpoint(path: Path, network, optimiser, step: int, fingerprint: str) -> None:
    """Write weights, moments and step; what was there before stays until this is complete."""
    tensors = {}
    for name, parameter in network.named_parameters():
        tensors[f"weight/{name}"] = parameter.detach().contiguous()
        state = optimiser.state_of(parameter)
        for moment in MOMENTS:
            if moment in state:
                tensors[f"{moment}/{name}"] = state[moment].contiguous()
        if "step" in state:  # a parameter that a stage leaves alone counts fewer than the run
            tensors[f"step/{name}"] = state["step"].clone()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    try:
        save_file(tensors, partial, {"step": str(step), "fingerprint": fingerprint})
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load_checkpoint(path: Path, network, optimiser, fingerprint: str) -> int | None:
    """Restore what `save_checkpoint` wrote and return the step; None where another recipe wrote it.

    Raises
    ------
    safetensors.SafetensorError
        If the file is damaged.
    """
    with safe_open(path, "pt", device=str(next(network.parameters()).device)) as file:
        metadata = file.metadata()
        if metadata["fingerprint"] != fingerprint:
            return None
        step = int(metadata["step"])
        keys = set(file.keys())
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                parameter.copy_(file.get_tensor(f"weight/{name}"))
                state = optimiser.state_of(parameter)
                for moment in MOMENTS:
                    if f"{moment}/{name}" in keys:
                        state[moment] = _like(file.get_tensor(f"{moment}/{name}"), parameter)
                if f"step/{name}" in keys:
                    state["step"] = file.get_tensor(f"step/{name}")
    return step


def _like(moment: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    # Same memory layout as the parameter, or the update would run in another order of elements.
    return torch.empty_like(parameter, memory_format=torch.preserve_format).copy_(moment)
