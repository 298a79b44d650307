"""The segmentation network, a 3D U-Net whose body works at half the resolution of its output, and its weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from bids_varaug.errors import EnsembleError
from bids_varaug.files import replacing
from bids_varaug.models.ensemble import Ensemble, Member, NetworkShape, check_member, sha256_of


class Features(NamedTuple):
    """What the last layers classify.

    `body` is (B, C, X/2, Y/2, Z/2), at half resolution; `rim` is (B, R, X, Y, Z); `deep` holds the decoder's coarser
    levels, deepest first, each twice as fine as the one before.
    """

    body: torch.Tensor
    rim: torch.Tensor
    deep: tuple[torch.Tensor, ...] = ()

    def by_slabs(self, n_slabs: int) -> Iterator[Features]:
        """Cut into parts of `n_slabs` voxels along x (an even number: a body voxel is two slabs), without `deep`."""
        for start in range(0, self.rim.shape[2], n_slabs):
            stop = start + n_slabs
            yield Features(self.body[:, :, start // 2 : stop // 2], self.rim[:, :, start:stop])


class InstanceNorm(nn.Module):
    """Normalise each channel of each image over space, then scale and shift.

    In training with a single image this is batch normalisation with the batch's own statistics, whose CPU kernels are
    up to 40 times faster in channels-last memory (backward, bfloat16) than those of group or instance normalisation.
    Their sums are split by the number of threads. Without gradients the statistics are therefore summed slab by slab,
    and do not depend on the number of threads.
    """

    def __init__(self, n_channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_channels))
        self.bias = nn.Parameter(torch.zeros(n_channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x normalised, same shape (B, C, X, Y, Z)."""
        if x.shape[0] > 1:
            return F.group_norm(x, x.shape[1], self.weight, self.bias)
        if self.training or torch.is_grad_enabled():
            return F.batch_norm(x, None, None, self.weight, self.bias, training=True)
        return self.apply_statistics(x, *pool_statistics([slab_statistics(x)]))

    def apply_statistics(self, x: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
        """Normalise by a mean and a variance (C,) that are known already."""
        return F.batch_norm(x, mean, variance, self.weight, self.bias, training=False)


def slab_statistics(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return variance and mean (X, C) float32 of each slab along the first axis of one image."""
    slabs = x[0].float().movedim(0, -1).flatten(1, 2)
    mean = slabs.mean(1)
    # Moments, not torch.var_mean, which takes three times as long in this memory layout. They are taken about the
    # first slab's mean, so that no digits cancel where the mean is large.
    centred = slabs - mean[:1, None]
    return (centred * centred).mean(1) - (mean - mean[:1]) ** 2, mean


def pool_statistics(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and variance (C,) of all slabs together, which are of one size."""
    variances, means = (torch.cat(values) for values in zip(*parts, strict=True))
    return means.mean(0), variances.mean(0) + means.var(0, correction=0)


class ConvBlock(nn.Sequential):
    """3x3x3 convolution, instance normalisation, ReLU."""

    def __init__(self, n_in: int, n_out: int):
        convolution = nn.Conv3d(n_in, n_out, 3, padding=1, bias=False)
        super().__init__(convolution, InstanceNorm(n_out), nn.ReLU(inplace=True))

    @property
    def layers(self) -> tuple[nn.Conv3d, InstanceNorm, nn.ReLU]:
        """The three, to be used apart."""
        return cast("tuple[nn.Conv3d, InstanceNorm, nn.ReLU]", tuple(self))


class UNet(nn.Module):
    """Image (B, 1, X, Y, Z) float32 -> logits (B, K, X, Y, Z).

    The image is folded 2x2x2 into 8 channels: the costly body runs at 2 mm for a 1 mm image, and its field of view
    covers the head. Each body voxel says for each of its 8 subvoxels what it is; a thin rim of full-resolution
    features, which see the image itself, corrects the borders. X, Y, Z must be multiples of `shape.multiple`.
    """

    def __init__(self, shape: NetworkShape):
        super().__init__()
        self.shape = shape
        widths, rim = shape.channels, shape.rim_channels
        pairs = zip((8, *widths), widths, strict=False)
        self.encoder = nn.ModuleList(nn.Sequential(ConvBlock(n_in, n), ConvBlock(n, n)) for n_in, n in pairs)
        self.laterals = nn.ModuleList()
        self.decoder = nn.ModuleList()
        for deep, shallow in zip(widths[:0:-1], widths[-2::-1], strict=True):
            self.laterals.append(nn.Conv3d(deep, shallow, 1))
            self.decoder.append(ConvBlock(shallow, shallow))
        # Only training uses these: they teach the deep levels where left and right are.
        self.deep_heads = nn.ModuleList(nn.Conv3d(width, shape.n_classes, 1) for width in widths[-2:0:-1])
        self.unfold = nn.Conv3d(widths[0], 8 * rim, 1)
        self.rim = ConvBlock(rim + 1, rim)
        # Rows are ordered as `unfold` wants them: (x, y, z) of the subvoxel, then the class.
        self.body_head = nn.Conv3d(widths[0], 8 * shape.n_classes, 1)
        self.rim_head = nn.Conv3d(rim, shape.n_classes, 1, bias=False)

    def features(self, image: torch.Tensor) -> Features:
        """Return what `classify` takes, for an image (B, 1, X, Y, Z) float32."""
        x, deep = self.body(fold(image))
        convolution, norm, rectify = self.rim.layers
        weight, n_fine = convolution.weight, self.shape.rim_channels
        # Two sums instead of one: backward, 17 channels take 1.6 times as long as 16 and 1.
        fine = F.conv3d(_to_channels_last(unfold(self.unfold(x))), weight[:, :n_fine], padding=1)
        fine = fine + F.conv3d(_to_channels_last(image), weight[:, n_fine:], padding=1)
        return Features(x, rectify(norm(fine)), deep)

    def body(self, cubes: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Return the body's features and those of its coarser levels, for a folded image (B, 8, x, y, z) float32."""
        x = _to_channels_last(cubes)
        skips, deep = [], []
        for level, block in enumerate(self.encoder):
            x = block(x if level == 0 else F.max_pool3d(x, 2))
            skips.append(x)
        skips.pop()
        for lateral, block in zip(self.laterals, self.decoder, strict=True):
            x = F.interpolate(lateral(x), scale_factor=2, mode="nearest")
            x = block(x + skips.pop())
            deep.append(x)
        return x, tuple(deep[:-1])

    def features_by_slabs(self, image: torch.Tensor, n_slabs: int = 16) -> Features:
        """Return `features` of one image (1, 1, X, Y, Z) without gradients, the rim `n_slabs` (even) voxels at a time.

        Full-resolution features exist once, not three times: a whole head takes 1 GB, not 3.
        """
        x, deep = self.body(fold(image))
        convolution, norm, rectify = self.rim.layers
        length = image.shape[2]
        shape = (1, convolution.out_channels, *image.shape[2:])
        rim = torch.empty(shape, device=image.device, memory_format=torch.channels_last_3d)
        statistics = []
        # A slab of zeros at each end is the convolution's padding; a body voxel is two slabs.
        x_padded = F.pad(x, (0, 0, 0, 0, 1, 1))
        image_padded = F.pad(image, (0, 0, 0, 0, 1, 1))
        for start in range(0, length, n_slabs):
            stop = min(start + n_slabs, length)
            fine = unfold(self.unfold(x_padded[:, :, start // 2 : stop // 2 + 2]))[:, :, 1:-1]
            if start == 0:
                fine[:, :, 0] = 0.0
            if stop == length:
                fine[:, :, -1] = 0.0
            fine = torch.cat([fine, image_padded[:, :, start : stop + 2]], dim=1)
            part = F.conv3d(_to_channels_last(fine), convolution.weight, padding=(0, 1, 1))
            statistics.append(slab_statistics(part))
            rim[:, :, start:stop] = part
        mean, variance = pool_statistics(statistics)
        for part in rim.split(n_slabs, dim=2):
            part.copy_(rectify(norm.apply_statistics(part, mean, variance)))
        return Features(x, rim, deep)

    def coarse_logits(self, image: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Classify an image on the body's own grid, at an eighth of the cost of the whole network.

        The image (B, 1, x, y, z) float32, with sides that are multiples of half of ``shape.multiple``, stands for one
        twice as fine whose 2x2x2 cubes are constant. The logits (B, x, y, z, K) are the mean over the subvoxels. What
        the body learns this way the whole network can use. The decoder's coarser levels are as in `Features`.
        """
        x, deep = self.body(image.expand(-1, 8, -1, -1, -1))
        weight, bias = (parameter.flatten(0, 2).mean(0) for parameter in self._body_head_by_subvoxel())
        return F.linear(x.movedim(1, -1), weight, bias), deep

    def classify(self, features: Features) -> torch.Tensor:
        """Return logits (B, K, X, Y, Z); works on any slabs of the features that fit together."""
        return unfold(self.body_head(features.body)) + self.rim_head(features.rim)

    def classify_rows(self, features: Features, a: int, b: int) -> torch.Tensor:
        """Return ``classify(features)[:, :, a::2, :, b::2]`` with K last, for phases a and b (0 or 1)."""
        k = self.shape.n_classes
        weight, bias = (parameter[a, :, b].flatten(0, 1) for parameter in self._body_head_by_subvoxel())
        coarse = F.linear(features.body.movedim(1, -1), weight, bias)
        batch, x, y, z, _ = coarse.shape
        coarse = coarse.reshape(batch, x, y, z, 2, k).transpose(3, 4).reshape(batch, x, 2 * y, z, k)
        # Channels last first, or the gradient of the slice would have them in another order.
        rim = features.rim.movedim(1, -1)[:, a::2, :, b::2]
        return coarse + F.linear(rim, self.rim_head.weight.reshape(k, -1))

    def _body_head_by_subvoxel(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight (2, 2, 2, K, C) and bias (2, 2, 2, K) of the body's head."""
        shape = (2, 2, 2, self.shape.n_classes)
        bias = cast(torch.Tensor, self.body_head.bias)
        return self.body_head.weight.reshape(*shape, -1), bias.reshape(shape)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return logits (B, K, X, Y, Z)."""
        return self.classify(self.features(image))


def fold(image: torch.Tensor) -> torch.Tensor:
    """(B, 1, X, Y, Z) -> (B, 8, X/2, Y/2, Z/2): each 2x2x2 cube becomes 8 channels."""
    b, _, x, y, z = image.shape
    cubes = image.reshape(b, x // 2, 2, y // 2, 2, z // 2, 2)
    return cubes.permute(0, 2, 4, 6, 1, 3, 5).reshape(b, 8, x // 2, y // 2, z // 2)


def unfold(channels: torch.Tensor) -> torch.Tensor:
    """(B, 8 C, X, Y, Z) -> (B, C, 2X, 2Y, 2Z): the inverse arrangement of `fold`.

    In channels-last memory, which the network works in, whole runs of C numbers are moved.
    """
    b, c, x, y, z = channels.shape
    cubes = channels.movedim(1, -1).reshape(b, x, y, z, 2, 2, 2, c // 8)
    cubes = cubes.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(b, 2 * x, 2 * y, 2 * z, c // 8)
    return cubes.movedim(-1, 1)


def build_network(shape: NetworkShape, seed: int = 0) -> UNet:
    """Return a freshly initialised network; the same seed gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = UNet(shape)
    return network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]  # not in torch's stubs


def _to_channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last_3d)


FORMAT = "float16"
"""What weights are written in; it changes one by 2e-4 of its size."""


def save_weights(network: UNet, path: Path) -> str:
    """Write weights as `FORMAT` and return the file's SHA-256."""
    write_tensors(path, {name: p.detach().cpu().half() for name, p in network.named_parameters()})
    return sha256_of(path)


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file as `files.replacing` does: a kill or a full disk leaves the old one."""
    content = save({name: p.contiguous() for name, p in tensors.items()}, metadata)
    with replacing(path) as stream:
        stream.write(content)


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """Return a state dictionary in float32."""
    return {name: p.float() for name, p in load_file(path).items()}


def load_member(ensemble: Ensemble, member: Member, device: str = "cpu") -> UNet:
    """Build a member's network in float32, in evaluation mode; an `EnsembleError` if its weights cannot be used."""
    path, network = check_member(ensemble, member), build_network(cast(NetworkShape, ensemble.network))
    try:
        network.load_state_dict(load_weights(path))
    except (SafetensorError, RuntimeError) as error:
        raise EnsembleError(f"{path}: weights do not fit the manifest's network: {error}") from None
    return network.to(device).eval().requires_grad_(False)
