"""A member's network, from the files of its ensemble."""

from __future__ import annotations

import torch
from safetensors import SafetensorError

from bids_varaug.errors import EnsembleError
from bids_varaug.models.ensemble import Ensemble, Member, check_member, files_of
from bids_varaug.models.unet import UNet, build_network
from bids_varaug.models.weights import load_weights


def load_member(ensemble: Ensemble, member: Member, device: str = "cpu") -> UNet:
    """Build a member's network in float32, in evaluation mode.

    Raises
    ------
    EnsembleError
        If its weights are missing, do not match the manifest's checksum, or do not fit.
    """
    check_member(ensemble, member)
    *bases, path = (ensemble.directory / file for file, _, _ in files_of(ensemble, member))
    network = build_network(ensemble.network)
    try:
        network.load_state_dict(load_weights(path, *bases))
    except (SafetensorError, RuntimeError, KeyError) as error:
        raise EnsembleError(f"{path}: weights do not fit the manifest's network: {error}") from None
    return network.to(device).to(memory_format=torch.channels_last_3d).eval().requires_grad_(False)
