"""Weights on disk: what is written is read."""

import torch
from safetensors.torch import load_file

from bids_varaug.models.ensemble import NetworkShape, sha256_of
from bids_varaug.models.unet import FORMAT, build_network, load_weights, save_weights


def test_weights_are_those_of_half_precision(tmp_path):
    network, path = build_network(NetworkShape(5, (16, 24), 8), 1), tmp_path / "a.safetensors"
    assert save_weights(network, path) == sha256_of(path)
    weights = load_weights(path)
    for name, p in network.named_parameters():
        assert torch.equal(weights[name], p.half().float())
    assert {p.dtype for p in load_file(path).values()} == {getattr(torch, FORMAT)}


def test_a_member_of_the_standard_shape_takes_less_than_5_mb(tmp_path):
    """So that 21 of them stay below 100 MB."""
    path = tmp_path / "a.safetensors"
    save_weights(build_network(NetworkShape(32)), path)
    assert path.stat().st_size * 21 < 100e6
