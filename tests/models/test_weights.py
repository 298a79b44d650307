"""Weights on disk: whole, and as what separates a member from the trunk."""

import pytest
import torch
from safetensors.torch import load_file

from bids_varaug.models.checksum import sha256_of
from bids_varaug.models.shape import NetworkShape
from bids_varaug.models.unet import build_network
from bids_varaug.models.weights import load_weights, save_weights

SHAPE = NetworkShape(5, (16, 24), 8)
KERNEL = "encoder.0.1.0.weight"


def moved(network, size, seed):
    """A copy whose weights moved by `size` of their own, as a short training would."""
    other = build_network(SHAPE)
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p, q in zip(other.parameters(), network.parameters(), strict=True):
            p.copy_(q + size * q.std().nan_to_num(1.0) * torch.randn(q.shape, generator=draws))
    return other


def worst(state, network, relative_to):
    """Largest error of a kernel, over the largest difference from `relative_to` in its row."""
    start = dict(relative_to.named_parameters())
    ratios = []
    for name, p in network.named_parameters():
        if p.ndim > 1:
            error = (state[name] - p).abs().flatten(1).amax(1)
            ratios.append((error / (p - start[name]).abs().flatten(1).amax(1)).max())
    return float(max(ratios))


@pytest.fixture
def trunk(tmp_path):
    network = build_network(SHAPE, 1).requires_grad_(False)
    path = tmp_path / "trunk.safetensors"
    return network, path, save_weights(network, path)


def test_whole_weights_are_those_of_half_precision(trunk):
    network, path, checksum = trunk
    for name, p in network.named_parameters():
        assert torch.equal(load_weights(path)[name], p.half().float())
    assert checksum == sha256_of(path)


def test_a_member_is_kept_to_half_a_step_of_its_rows(trunk, tmp_path):
    network, path, _ = trunk
    member = moved(network, 0.01, 2).requires_grad_(False)
    save_weights(member, tmp_path / "a.safetensors", network)
    state = load_weights(tmp_path / "a.safetensors", path)
    # What half precision does to the trunk is the same for all members, and not an error here.
    shift = {n: p.half().float() - p for n, p in network.named_parameters()}
    state = {n: p - shift[n] for n, p in state.items()}
    assert worst(state, member, network) <= 0.5 / 127 + 1e-3
    for name, p in member.named_parameters():
        if p.ndim < 2:
            torch.testing.assert_close(state[name], p, rtol=0, atol=1e-7)


def test_a_member_that_hardly_left_its_base_keeps_the_difference(trunk, tmp_path):
    """As a Monte Carlo member from the baseline: 0.3 % of the way from the trunk."""
    start, start_path, _ = trunk
    baseline = moved(start, 0.01, 2).requires_grad_(False)
    perturbed = moved(baseline, 3e-5, 3).requires_grad_(False)
    save_weights(baseline, tmp_path / "ieee.safetensors", start)
    there = load_weights(tmp_path / "ieee.safetensors", start_path)[KERNEL]
    true = (perturbed.state_dict()[KERNEL] - baseline.state_dict()[KERNEL]).flatten()

    def error(network, *paths):
        """Of the difference from the baseline that comes back, relative to the true one."""
        save_weights(perturbed, tmp_path / "mca01.safetensors", network)
        back = load_weights(tmp_path / "mca01.safetensors", *paths)[KERNEL]
        return float(((back - there).flatten() - true).norm() / true.norm())

    assert error(baseline, start_path, tmp_path / "ieee.safetensors") < 0.02
    assert error(start, start_path) > 0.5  # what base is for


def test_an_unmoved_row_stays_where_it_is(trunk, tmp_path):
    network, path, _ = trunk
    save_weights(network, tmp_path / "same.safetensors", network)
    same = load_weights(tmp_path / "same.safetensors", path)
    assert all(torch.equal(same[name], p) for name, p in load_weights(path).items())


def test_a_members_file_is_half_the_size(tmp_path):
    network = build_network(NetworkShape(32), 0)
    save_weights(network, tmp_path / "whole.safetensors")
    save_weights(build_network(network.shape, 1), tmp_path / "member.safetensors", network)
    sizes = [(tmp_path / f"{n}.safetensors").stat().st_size for n in ("whole", "member")]
    assert sizes[1] < 0.52 * sizes[0]


def test_types_on_disk_are_what_they_should_be(trunk, tmp_path):
    network, path, _ = trunk
    save_weights(moved(network, 0.1, 1), tmp_path / "a.safetensors", network)
    tensors = load_file(tmp_path / "a.safetensors")
    assert tensors["body_head.weight"].dtype == torch.int8
    assert tensors["body_head.weight.step"].shape == (8 * 5,)
    assert tensors["rim.1.weight"].dtype == torch.float32


def test_a_member_of_another_trunk_does_not_load(trunk, tmp_path):
    network, path, _ = trunk
    save_weights(moved(network, 0.1, 1), tmp_path / "a.safetensors", network)
    other = build_network(NetworkShape(5, (16, 24, 24), 8), 1)
    save_weights(build_network(other.shape, 2), tmp_path / "b.safetensors", other)
    with pytest.raises((KeyError, RuntimeError)):
        load_weights(tmp_path / "b.safetensors", path)
