"""The temperature that makes an ensemble's mean posterior as sure as it is right."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar

from bids_varaug.models.ensemble import Ensemble
from bids_varaug.models.unet import Features, UNet
from bids_varaug.models.weights import load_member
from bids_varaug.training.subjects import TrainingSubject
from bids_varaug.training.synthesis import SyntheticImageGenerator

SHAPE = (160, 192, 160)
N_VOXELS = 20_000  # of each image
_BOUNDS = (0.25, 8.0)


@dataclass(frozen=True)
class Calibration:
    """The temperature, and the cross-entropy (nat per voxel) without and with it."""

    temperature: float
    cross_entropy_before: float
    cross_entropy: float


def calibrate(
    ensemble: Ensemble,
    subjects: Sequence[TrainingSubject],
    generator: SyntheticImageGenerator,
    images_per_subject: int = 2,
    seed: int = 700_000,
) -> Calibration:
    """Find the temperature T of the mean posterior p: that of least cross-entropy of p^(1/T).

    The mean is that of the perturbed members (of the baseline where it is alone), on images of
    subjects that training left out [1]_, at voxels within and around the brain.

    Parameters
    ----------
    subjects : on the generator's device, not used in training
    seed : of the images

    Returns
    -------
    Calibration
        Its temperature is above 1 where the mean posterior was too sure.

    References
    ----------
    .. [1] Guo et al. (2017), On calibration of modern neural networks, ICML; on calibrating the
       mean and not the members: Rahaman & Thiery (2021), Uncertainty quantification and deep
       ensembles, NeurIPS.
    """
    perturbed = [m for m in ensemble.members if not m.is_baseline] or list(ensemble.members)
    drawn = [
        _draw(generator, subject, ensemble.voxel_size, seed + images_per_subject * number + again)
        for number, subject in enumerate(subjects)
        for again in range(images_per_subject)
    ]

    def logits() -> Iterator[torch.Tensor]:
        for member in perturbed:
            network = load_member(ensemble, member, str(generator.device))
            yield torch.cat([logits_at(network, image, voxels) for image, _, voxels in drawn])

    log_mean = log_mean_posterior(logits())
    truth = torch.cat([target.reshape(-1)[voxels].long().cpu() for _, target, voxels in drawn])
    found = minimize_scalar(
        lambda log_t: cross_entropy(log_mean, truth, math.exp(log_t)),
        bounds=tuple(math.log(t) for t in _BOUNDS),
        method="bounded",
        options={"xatol": 1e-3},
    )
    temperature = round(math.exp(found.x), 3)
    before, after = (cross_entropy(log_mean, truth, t) for t in (1.0, temperature))
    return Calibration(temperature, round(before, 5), round(after, 5))


def log_mean_posterior(logits: Iterable[torch.Tensor]) -> torch.Tensor:
    """Logarithm of the members' mean posterior, (V, K) float64.

    Parameters
    ----------
    logits : (V, K) float32, of one member after another
    """
    total, n_members = torch.zeros((), dtype=torch.float64), 0
    for one in logits:
        total = total + one.double().softmax(-1)
        n_members += 1
    return (total / n_members).log()


def cross_entropy(log_mean: torch.Tensor, truth: torch.Tensor, temperature: float) -> float:
    """Mean cross-entropy of a posterior at a temperature, nat.

    Parameters
    ----------
    log_mean : (V, K) float64, logarithm of the mean posterior
    truth : (V,) int64
    """
    return float(F.nll_loss(F.log_softmax(log_mean / temperature, dim=-1), truth))


@torch.inference_mode()
def logits_at(network: UNet, image: torch.Tensor, voxels: torch.Tensor) -> torch.Tensor:
    """Return logits (V, K) float32, on the CPU, at voxels (V,) int64 of the flattened image.

    Parameters
    ----------
    image : (X, Y, Z) float32, on the network's device; X even
    voxels : ascending
    """
    features = network.features_by_slabs(image[None, None])
    n_plane, rows = image[0].numel(), []
    for x in range(0, len(image), 2):  # two slabs of voxels are one of the network's body
        part = Features(features.body[:, :, x // 2 : x // 2 + 1], features.rim[:, :, x : x + 2])
        inside = voxels[(voxels >= x * n_plane) & (voxels < (x + 2) * n_plane)] - x * n_plane
        rows.append(network.classify(part)[0].flatten(1)[:, inside].T.cpu())
    return torch.cat(rows)


def _draw(
    generator: SyntheticImageGenerator, subject: TrainingSubject, voxel_size: float, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return an image, its target and (ascending) voxels drawn from in and around the brain."""
    image, target = generator.draw(subject, SHAPE, voxel_size, seed)
    near = F.max_pool3d((target > 0).float()[None, None], 9, 1, 4)[0, 0].reshape(-1) > 0
    candidates = near.nonzero()[:, 0]
    rng = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(candidates), generator=rng)[:N_VOXELS].to(candidates.device)
    return image, target, candidates[chosen].sort().values
