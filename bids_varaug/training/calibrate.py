"""The temperature that makes an ensemble's mean posterior as sure as it is right."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar

from bids_varaug.models.ensemble import Ensemble
from bids_varaug.models.unet import UNet, load_member
from bids_varaug.training.labels import TrainingSubject
from bids_varaug.training.synthesis import SyntheticImageGenerator

SHAPE = (160, 192, 160)
N_VOXELS = 20_000  # of each image
IMAGES_PER_SUBJECT = 2
FIRST_SEED = 700_000
_LOG_BOUNDS = (math.log(0.25), math.log(8.0))


def calibrate(
    ensemble: Ensemble, subjects: Sequence[TrainingSubject], generator: SyntheticImageGenerator
) -> dict[str, float]:
    """Find the temperature T of the mean posterior p: that of least cross-entropy of p^(1/T).

    The mean is that of the perturbed members (of the baseline where it is alone), at voxels within and around the
    brain, on images of `subjects`, which training left out and the generator's device holds (Guo et al. 2017, On
    calibration of modern neural networks, ICML; on calibrating the mean and not the members: Rahaman & Thiery 2021,
    Uncertainty quantification and deep ensembles, NeurIPS).

    Returns ``temperature``, above 1 where the mean posterior was too sure; ``cross_entropy_before`` and
    ``cross_entropy``, without and with it, nat per voxel.
    """
    perturbed = [m for m in ensemble.members if not m.is_baseline] or list(ensemble.members)
    seeds = range(FIRST_SEED, FIRST_SEED + IMAGES_PER_SUBJECT * len(subjects))
    repeated = [subject for subject in subjects for _ in range(IMAGES_PER_SUBJECT)]
    drawn = [_draw(generator, *each, ensemble.voxel_size) for each in zip(repeated, seeds, strict=True)]

    def logits() -> Iterator[torch.Tensor]:
        for member in perturbed:
            network = load_member(ensemble, member, str(generator.device))
            yield torch.cat([logits_at(network, image, chosen) for image, _, chosen in drawn])

    log_mean = log_mean_posterior(logits())
    truth = torch.cat([target[chosen].long().cpu() for _, target, chosen in drawn])
    found = minimize_scalar(
        lambda log_t: cross_entropy(log_mean, truth, math.exp(log_t)),
        bounds=_LOG_BOUNDS,
        method="bounded",
        options={"xatol": 1e-3},
    )
    temperature = round(math.exp(found.x), 3)
    before, after = (round(cross_entropy(log_mean, truth, t), 5) for t in (1.0, temperature))
    return {"temperature": temperature, "cross_entropy_before": before, "cross_entropy": after}


def log_mean_posterior(logits: Iterable[torch.Tensor]) -> torch.Tensor:
    """Logarithm of the members' mean posterior, (V, K) float64, from the logits of one after another."""
    total, n_members = torch.zeros((), dtype=torch.float64), 0
    for one in logits:
        total = total + one.double().softmax(-1)
        n_members += 1
    return (total / n_members).log()


def cross_entropy(log_mean: torch.Tensor, truth: torch.Tensor, temperature: float) -> float:
    """Mean cross-entropy [nat] of a posterior, of which (V, K) logarithms are given, at a temperature."""
    return float(F.nll_loss(F.log_softmax(log_mean / temperature, dim=-1), truth))


@torch.inference_mode()
def logits_at(network: UNet, image: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Return logits (V, K) float32, on the CPU, at the voxels of an image (X even) where `chosen` (X, Y, Z) is True."""
    features = network.features_by_slabs(image[None, None])
    parts = zip(features.by_slabs(2), chosen.split(2), strict=True)
    return torch.cat([network.classify(part)[0][:, here].T.cpu() for part, here in parts])


def _draw(
    generator: SyntheticImageGenerator, subject: TrainingSubject, seed: int, voxel_size: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return an image, its target, and voxels drawn from in and around the brain, a mask."""
    image, target = generator.draw(subject, SHAPE, voxel_size, seed)
    near = F.max_pool3d((target > 0).float()[None, None], 9, 1, 4)[0, 0].reshape(-1) > 0
    candidates = near.nonzero()[:, 0]
    order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(seed))
    chosen = torch.zeros_like(near)
    chosen[candidates[order[:N_VOXELS].to(candidates.device)]] = True
    return image, target, chosen.view(target.shape)
