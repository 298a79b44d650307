"""The temperature that makes the mean posterior as sure as it is right."""

import math

import pytest
import torch

from bids_varaug.models.ensemble import NetworkShape
from bids_varaug.models.unet import build_network
from bids_varaug.training.train import cross_entropy, log_mean_posterior, logits_at


@pytest.mark.parametrize("true", [0.5, 2.0])
def test_cross_entropy_is_least_at_the_temperature_that_the_truth_was_drawn_with(true):
    rng = torch.Generator().manual_seed(0)
    mean = (3 * torch.randn(40_000, 4, generator=rng)).log_softmax(-1)
    truth = torch.multinomial((mean / true).softmax(-1), 1, generator=rng)[:, 0]
    scores = {t: cross_entropy(mean, truth, t) for t in (0.8 * true, true, 1.25 * true)}
    assert min(scores, key=scores.get) == true


def test_cross_entropy_is_minus_the_log_probability_of_the_truth_at_the_temperature():
    mean = torch.tensor([[0.64, 0.36]]).log()
    assert cross_entropy(mean, torch.tensor([0]), 1.0) == pytest.approx(-math.log(0.64))
    # Roots 0.8 and 0.6, scaled to sum to 1
    assert cross_entropy(mean, torch.tensor([0]), 2.0) == pytest.approx(-math.log(0.8 / 1.4))


def test_mean_is_that_of_the_posteriors_and_not_of_the_logits():
    members = torch.tensor([[4.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    mean = (1 / (1 + math.exp(-4)) + 0.5) / 2
    assert log_mean_posterior(members).exp()[0].tolist() == pytest.approx([mean, 1 - mean])


def test_logits_at_voxels_are_those_of_the_whole_image():
    network = build_network(NetworkShape(3, (8, 8), 4)).eval()
    image = torch.rand(8, 12, 16, generator=torch.Generator().manual_seed(1))
    voxels = torch.zeros(image.shape, dtype=torch.bool)
    voxels.view(-1)[[0, 1, 383, 384, 700, 8 * 12 * 16 - 1]] = True
    with torch.inference_mode():
        whole = network(image[None, None])[0]
    torch.testing.assert_close(logits_at(network, image, voxels), whole[:, voxels].T,
                               rtol=1e-4, atol=1e-5)  # fmt: skip
