"""Training state on disk: safetensors, written aside and renamed, so a kill leaves the last one."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from bids_varaug.errors import UserError
from bids_varaug.models.weights import write_tensors

MOMENTS = ("exp_avg", "exp_avg_sq", "momentum")


def save_checkpoint(path: Path, network, optimiser, step: int, fingerprint: str) -> None:
    """Write weights, moments and step; what was there before stays until this is complete.

    Raises
    ------
    OutputError
        If the file cannot be written; the last checkpoint is kept.
    """
    tensors = {}
    for name, parameter in network.named_parameters():
        tensors[f"weight/{name}"] = parameter.detach()
        state = optimiser.state_of(parameter)
        for moment in MOMENTS:
            if moment in state:
                tensors[f"{moment}/{name}"] = state[moment]
        if "step" in state:  # a parameter that a stage leaves alone counts fewer than the run
            tensors[f"step/{name}"] = state["step"].clone()
    write_tensors(path, tensors, {"step": str(step), "fingerprint": fingerprint})


def load_checkpoint(path: Path, network, optimiser, fingerprint: str) -> int:
    """Restore what `save_checkpoint` wrote and return the step.

    Raises
    ------
    UserError
        If the file is damaged, or another recipe wrote it.
    """
    try:
        return _restore(path, network, optimiser, fingerprint)
    except (SafetensorError, KeyError) as error:
        raise UserError(
            f"{path}: damaged checkpoint ({error}). Delete it to train this part again."
        ) from error


def _restore(path: Path, network, optimiser, fingerprint: str) -> int:
    with safe_open(path, "pt", device=str(next(network.parameters()).device)) as file:
        metadata = file.metadata()
        if metadata["fingerprint"] != fingerprint:
            raise UserError(
                f"{path}: checkpoint of another recipe, or of a device with other number formats. "
                "Resume with the flags and on the kind of device that wrote it, or train into an "
                "empty folder."
            )
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
