"""Muon: orthogonal updates of a known size, for the convolutions alone."""

import pytest
import torch

from bids_varaug.models.ensemble import NetworkShape
from bids_varaug.models.unet import build_network
from bids_varaug.training.optimiser import Muon, Optimiser, orthogonalise


@pytest.mark.parametrize("shape", [(8, 40), (40, 8), (12, 12)])
def test_orthogonalised_matrix_has_singular_values_near_one(shape):
    generator = torch.Generator().manual_seed(0)
    # Singular values from 1 down to 0.03: the iteration lifts the small ones.
    u, _, vh = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
    matrix = u @ torch.diag(torch.logspace(0, -1.5, min(shape))) @ vh
    values = torch.linalg.svdvals(orthogonalise(matrix))
    assert values.min() > 0.5
    assert values.max() < 1.3
    assert torch.sum(orthogonalise(matrix) * (u @ vh)) > 0.8 * min(shape)


def test_update_has_the_size_of_an_adamw_step_and_points_downhill():
    kernel = torch.nn.Parameter(torch.zeros(16, 8, 3, 3, 3))
    kernel.grad = torch.randn(kernel.shape, generator=torch.Generator().manual_seed(0))
    optimiser = Muon([kernel], lr=0.1)
    optimiser.step()
    assert float(kernel.detach().pow(2).mean().sqrt()) == pytest.approx(0.1 * 0.2, rel=0.3)
    assert float((kernel.detach() * kernel.grad).sum()) < 0


def test_every_weight_is_in_one_of_the_two():
    network = build_network(NetworkShape(4, (4, 8), 4))
    muon, adamw = Optimiser(network, 1e-4).parts
    kernels = [p for group in muon.param_groups for p in group["params"]]
    rest = [p for group in adamw.param_groups for p in group["params"]]
    assert all(p.shape[2:] == (3, 3, 3) for p in kernels)
    assert len(kernels) == 6  # two a level, one in the decoder, the rim
    assert len(kernels) + len(rest) == len(list(network.parameters()))


def test_zero_gradient_leaves_the_weights_finite():
    kernel = torch.nn.Parameter(torch.ones(4, 4, 3, 3, 3))
    kernel.grad = torch.zeros_like(kernel)
    Muon([kernel], lr=0.1).step()
    assert torch.equal(kernel.detach(), torch.ones(4, 4, 3, 3, 3))
