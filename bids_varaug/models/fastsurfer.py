"""FastSurferVINN: three 2D networks, one for each plane, that see seven slices at once at any voxel size.

Architecture, names of parameters and arithmetic are those of FastSurfer (Henschel et al. 2020, NeuroImage 219, 117012;
Henschel et al. 2022, NeuroImage 251, 118933), commit 7c45785e, so that its checkpoints give the same logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from bids_varaug.errors import EnsembleError
from bids_varaug.models.ensemble import PLANES, Ensemble, Member, VinnShape, check_member, sha256_of
from bids_varaug.models.fastsurfer_labels import NETWORK_IDS, SAGITTAL_CHANNELS, SAGITTAL_IDS
from bids_varaug.models.unet import write_tensors

LEVELS = 4  # of pooling

Size = tuple[int, int]
Factors = tuple[np.float32, np.float32]


class CompetitiveBlock(nn.Module):
    """Four 3x3 convolutions, each normalised; the larger of a layer's result and what came before goes on.

    The block ends on a normalisation: the activation, one PReLU with a single slope, is that of the next one. With
    `normalise_input` it takes an image, or features that no block has made, and normalises them instead. `names` is
    what its normalisations are called.
    """

    def __init__(self, n_in: int, n_out: int, names: str = "bn", normalise_input: bool = False):
        super().__init__()
        self.names, self.normalise_input = names, normalise_input
        if normalise_input:
            self.bn0 = nn.BatchNorm2d(n_in)
        for layer in range(4):
            setattr(self, f"conv{layer}", nn.Conv2d(n_out if layer else n_in, n_out, 3, padding=1))
            setattr(self, f"{names}{layer + 1}", nn.BatchNorm2d(n_out))
        self.prelu = nn.PReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, C', H, W), before the activation."""
        largest = self._layer(0, self.bn0(x) if self.normalise_input else self.prelu(x))
        if not self.normalise_input and x.shape == largest.shape:
            largest = torch.maximum(x, largest)
        for layer in (1, 2):
            largest = torch.maximum(self._layer(layer, self.prelu(largest)), largest)
        return self._layer(3, self.prelu(largest))

    def _layer(self, number: int, x: torch.Tensor) -> torch.Tensor:
        convolved = getattr(self, f"conv{number}")(x)
        return getattr(self, f"{self.names}{number + 1}")(convolved)


class Classifier(nn.Module):
    """A 1x1 convolution, under the name that FastSurfer gives it."""

    def __init__(self, n_in: int, n_classes: int):
        super().__init__()
        self.conv = nn.Conv2d(n_in, n_classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, K, H, W)."""
        return self.conv(x)


class Vinn(nn.Module):
    """Thick slices (B, 7, H, W) float32 in [0, 1] and their scales -> logits (B, K, H, W) of the middle slice.

    Between the first and the last block everything happens on a grid of `shape.grid` x `shape.grid` pixels of 1 mm.
    """

    def __init__(self, shape: VinnShape, n_classes: int):
        super().__init__()
        self.grid, width = shape.grid, shape.filters
        self.encode1 = CompetitiveBlock(shape.rim_filters, width, normalise_input=True)
        for name in [f"encode{n}" for n in range(2, LEVELS + 1)] + ["bottleneck"]:
            self.add_module(name, CompetitiveBlock(width, width))
        for level in range(LEVELS, 0, -1):
            self.add_module(f"decode{level}", CompetitiveBlock(width, width))
        self.inp_block = CompetitiveBlock(shape.n_slices, shape.rim_filters, "gn", normalise_input=True)
        self.outp_block = CompetitiveBlock(width + shape.rim_filters, width, "gn")
        self.classifier = Classifier(width, n_classes)

    def forward(self, image: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Return logits (B, K, H, W).

        `image` is (B, 7, H, W) float32. `scale` (B, 2) float32 is 1 mm / voxel size along rows and columns.
        """
        rim = self.inp_block(image)
        inner, size = (self.grid, self.grid), cast(Size, tuple(image.shape[2:]))
        parts = []
        for run in _runs_of_equal(scale):
            part, factors = resize(rim[run], inner, cast(Factors, tuple(scale[run.start].cpu().numpy())))
            parts.append((run, part, factors))
        body = self._body(_join([part for _, part, _ in parts]))
        outer = [resize(body[run], size, _inverse(factors))[0] for run, _, factors in parts]
        return self.classifier(self.outp_block(torch.cat([_join(outer), rim], dim=1)))

    def _body(self, x: torch.Tensor) -> torch.Tensor:
        skips = []
        for level in range(1, LEVELS + 1):
            skip = self.get_submodule(f"encode{level}")(x)
            x, places = F.max_pool2d(skip, 2, return_indices=True)
            skips.append((skip, places))
        x = self.get_submodule("bottleneck")(x)
        for level in range(LEVELS, 0, -1):
            skip, places = skips.pop()
            x = self.get_submodule(f"decode{level}")(torch.maximum(F.max_unpool2d(x, places, [2, 2]), skip))
        return x


def _inverse(factors: Factors) -> Factors:
    return np.float32(1) / factors[0], np.float32(1) / factors[1]


def _join(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _runs_of_equal(scale: torch.Tensor) -> Iterator[slice]:
    """Cut a batch where the scale changes."""
    changes = (scale[1:] != scale[:-1]).any(dim=1).nonzero().ravel() + 1
    edges = [0, *changes.tolist(), len(scale)]
    return (slice(start, stop) for start, stop in pairwise(edges))


def resize(x: torch.Tensor, target: Size, scale: Factors) -> tuple[torch.Tensor, Factors]:
    """Sample images (B, C, H, W) `1 / scale` times as densely, and cut or fill them with 0 at the end to `target`.

    Bilinear. Returns the result, (B, C, *target), and the factors by which pixels really became larger, which differ a
    little from `scale` because sizes are whole numbers. They are computed in float32 as FastSurfer does: sizes that
    come out whole depend on it.

    >>> _, factors = resize(torch.ones(1, 1, 366, 100), (256, 256), (np.float32(1 / 0.7), np.float32(1)))
    >>> [float(factor) for factor in factors]
    [1.42578125, 1.0]
    """
    seen, sizes, factors = [], [], []
    for n, wanted, factor in zip(x.shape[2:], target, scale, strict=True):
        needed = int(np.float32(wanted) * factor)
        seen.append(min(needed, n))
        sizes.append(wanted if needed <= n else int(np.float32(n) / factor))
        factors.append(np.float32(seen[-1] / sizes[-1]))
    x = x[:, :, : seen[0], : seen[1]]
    if tuple(x.shape[2:]) != tuple(sizes):
        x = F.interpolate(x, size=sizes, mode="bilinear", align_corners=False)
    missing = [wanted - size for wanted, size in zip(target, sizes, strict=True)]
    return F.pad(x, (0, missing[1], 0, missing[0])) if any(missing) else x, cast(Factors, tuple(factors))


def n_classes_of(plane: str) -> int:
    """Number of classes of a plane's network: the sagittal one cannot tell left from right."""
    return len(SAGITTAL_IDS if plane == "sagittal" else NETWORK_IDS)


def build_planes(shape: VinnShape, seed: int = 0) -> dict[str, Vinn]:
    """Return freshly initialised networks of the three planes; the same seed gives the same weights."""
    networks = {}
    with torch.random.fork_rng(devices=[]):
        for number, plane in enumerate(PLANES):
            torch.manual_seed(3 * seed + number)
            networks[plane] = network = Vinn(shape, n_classes_of(plane))
            for module in network.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="leaky_relu")
    return networks


def save_planes(path: Path, planes: dict[str, dict[str, torch.Tensor]], metadata: dict[str, str] | None = None) -> str:
    """Write the state dictionaries of a member's planes to one safetensors file, and return its SHA-256."""
    tensors = {f"{plane}.{name}": tensor for plane, state in planes.items() for name, tensor in state.items()}
    write_tensors(path, tensors, metadata)
    return sha256_of(path)


def load_planes(ensemble: Ensemble, member: Member, device: str = "cpu") -> dict[str, Vinn]:
    """Build a member's networks in evaluation mode, in the order in which their logits are added.

    The sagittal one's classifier gets a row for each of the classes of the other planes. An `EnsembleError` if the
    weights cannot be used.
    """
    networks = load_trained(ensemble, member)
    give_both_sides(networks["sagittal"])
    return {plane: network.to(device).eval().requires_grad_(False) for plane, network in networks.items()}


def load_trained(ensemble: Ensemble, member: Member) -> dict[str, Vinn]:
    """Build a member's networks as they were trained; raises as `load_planes`."""
    check_member(ensemble, member)
    path = ensemble.directory / member.file
    networks = build_planes(cast(VinnShape, ensemble.network))
    try:
        tensors = load_file(path)
        for plane, network in networks.items():
            state = {name.removeprefix(f"{plane}."): t for name, t in tensors.items() if name.startswith(f"{plane}.")}
            network.load_state_dict(state)
    except (SafetensorError, RuntimeError) as error:
        raise EnsembleError(f"{path}: weights do not fit the manifest's network: {error}") from None
    return networks


def give_both_sides(sagittal: Vinn) -> None:
    """Repeat the rows of the sagittal classifier, so that it gives the 79 classes of the other planes, in place."""
    conv = sagittal.classifier.conv
    rows = torch.tensor(SAGITTAL_CHANNELS)
    conv.weight, conv.bias = (nn.Parameter(cast(torch.Tensor, p).detach()[rows]) for p in (conv.weight, conv.bias))
