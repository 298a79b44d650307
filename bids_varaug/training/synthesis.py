"""Draw an image with any contrast from a label map (domain randomisation).

The idea is that of SynthSeg (Billot et al. 2023) and of arXiv:2507.13458: a network that has seen
every contrast, resolution and artefact is not surprised by a real scanner. Everything random comes
from one generator, so that a seed names an image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from bids_varaug.images.intensity import normalise_intensity
from bids_varaug.training.heads import Head
from bids_varaug.training.labels import TISSUES, LabelScheme


@dataclass(frozen=True)
class SynthesisSettings:
    """How far images are randomised; lengths in mm, angles in degrees, rest relative.

    `thin_share` of the images of 1 mm or less have ventricles that were made thinner.
    `real_share` of the draws from a head that has a T1w image show that image, warped and degraded.
    """

    rotation: float = 15.0
    scaling: float = 0.15
    shear: float = 0.03
    elastic_coarse: float = 3.5
    elastic_fine: float = 0.8
    whole_head_share: float = 0.5
    random_contrast_share: float = 0.33
    low_resolution_share: float = 0.4
    max_thickness: float = 4.0
    bias: float = 0.35
    noise: float = 0.08
    gamma: float = 0.25
    thin_share: float = 0.75
    real_share: float = 0.0


class Randomiser:
    """Draws images; holds the label scheme as tensors on one device."""

    def __init__(self, scheme: LabelScheme, settings: SynthesisSettings, device: str = "cpu"):
        self.settings = settings
        self.device = torch.device(device)
        self.n = len(scheme.ids)
        self.targets = torch.from_numpy(scheme.targets).to(self.device)
        self.mirror = torch.from_numpy(scheme.mirror).to(self.device)
        self.tissue = torch.from_numpy(scheme.tissue).to(self.device)
        self.mean = torch.from_numpy(scheme.t1_mean).to(self.device)
        self.sd = torch.from_numpy(scheme.t1_sd).to(self.device)

    def draw(
        self, head: Head, shape: tuple[int, int, int], voxel_size: float, seed: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return one random image and its target labels.

        Parameters
        ----------
        head : on the same device
        shape : sides of the window to draw, voxels
        voxel_size : of the window, mm
        seed : names the draw

        Returns
        -------
        image : shape float32, in [0, 1.5] as `normalise_intensity` leaves it
        target : shape uint8, class index
        """
        rng = torch.Generator(self.device).manual_seed(seed)
        places = self._sample_places(head, shape, voxel_size, rng)
        flipped = self._chance(rng, 0.5)
        classes = _nearest(head.classes, places)
        if flipped:
            classes = self.mirror[classes.flip(0).long()]
        if head.t1w is not None and self._chance(rng, self.settings.real_share):
            image = _linear(head.t1w, places)
            image = image.flip(0) if flipped else image
        else:
            thin_share = self.settings.thin_share if voxel_size <= 1 else 0.0
            if thin_share and self._chance(rng, thin_share):
                self._thin_ventricles(classes, voxel_size, rng)
            image = self._paint(classes, voxel_size, rng)
        image = self._strip(image, classes, voxel_size, rng)
        image = self._degrade(image, voxel_size, rng)
        return normalise_intensity(image), self.targets[classes.long()]

    def _uniform(self, rng, low: float, high: float, size=()) -> torch.Tensor:
        return low + (high - low) * torch.rand(size, generator=rng, device=self.device)

    def _chance(self, rng, probability: float) -> bool:
        return bool(self._uniform(rng, 0.0, 1.0) < probability)

    def _normal(self, rng, *size: int) -> torch.Tensor:
        return torch.randn(size, generator=rng, device=self.device)

    def _field(self, rng, shape, spacing: float, channels: int = 1) -> torch.Tensor:
        """Smooth noise (channels, *shape), knots `spacing` voxels apart, about unit variance."""
        knots = [max(2, round(side / spacing) + 1) for side in shape]
        field = self._normal(rng, channels, *knots)
        for n, side in zip(knots, shape, strict=True):
            # Linearly along one axis, which moves to the end: five times as fast as trilinearly
            knot = torch.eye(n, device=self.device)[None]
            line = F.interpolate(knot, size=side, mode="linear", align_corners=True)[0]
            field = torch.tensordot(field, line, ([1], [0]))
        return field

    def _sample_places(self, head, shape, voxel_size, rng) -> list[torch.Tensor]:
        """Return where in the head (voxels, per axis) a placed, turned, warped window looks."""
        s = self.settings
        matrix = self._linear_map(rng) * voxel_size
        centre = self._window_centre(head, rng)
        warp = s.elastic_coarse * self._field(rng, shape, 40.0 / voxel_size, 3)
        warp += s.elastic_fine * self._field(rng, shape, 12.0 / voxel_size, 3)
        grids = [torch.arange(n, device=self.device) - (n - 1) / 2 for n in shape]
        places = []
        for axis in range(3):
            x = (matrix[axis, 0] * grids[0])[:, None, None] + (matrix[axis, 1] * grids[1])[:, None]
            places.append(x + matrix[axis, 2] * grids[2] + warp[axis] + centre[axis])
        return places

    def _linear_map(self, rng) -> torch.Tensor:
        s = self.settings
        angles = torch.deg2rad(self._uniform(rng, -s.rotation, s.rotation, (3,)))
        turn = torch.eye(3, device=self.device)
        for axis, angle in enumerate(angles):
            i, j = [(1, 2), (0, 2), (0, 1)][axis]
            step = torch.eye(3, device=self.device)
            step[i, i] = step[j, j] = torch.cos(angle)
            step[i, j], step[j, i] = -torch.sin(angle), torch.sin(angle)
            turn = turn @ step
        overall = 1 + 0.7 * self._uniform(rng, -s.scaling, s.scaling)
        scale = overall * (1 + 0.4 * self._uniform(rng, -s.scaling, s.scaling, (3,)))
        shear = torch.eye(3, device=self.device) + self._uniform(rng, -s.shear, s.shear, (3, 3))
        return turn @ torch.diag(scale) @ shear

    def _window_centre(self, head, rng) -> torch.Tensor:
        """Most windows look at the brain, some anywhere in the head."""
        sides = torch.tensor(head.classes.shape, device=self.device, dtype=torch.float32)
        brain = (self.targets[head.classes[::8, ::8, ::8].long()] > 0).nonzero().float() * 8
        middle = (brain.amin(0) + brain.amax(0)) / 2
        if self._chance(rng, 0.1):
            return self._uniform(rng, 0.25, 0.75, (3,)) * sides
        return middle + self._uniform(rng, -1.0, 1.0, (3,)) * 16.0

    def _thin_ventricles(self, classes, voxel_size, rng) -> None:
        """Give the outer voxels of ventricles to what lies beside them, on some sides, in patches.

        A dozen label maps hold few of the narrow ventricles that most young adults have.
        """
        fluid = (self.tissue == TISSUES.index("ventricle"))[classes.long()]
        for side in torch.randperm(6, generator=rng, device=self.device).tolist():
            axis, from_below = side // 2, side % 2
            n = classes.shape[axis] - 1
            here, there = (
                [x.narrow(axis, start, n) for x in (classes, fluid)]
                for start in (from_below, 1 - from_below)
            )
            patches = self._field(rng, here[0].shape, 8.0 / voxel_size)[0]
            covered = patches > self._uniform(rng, -1.5, 1.5)
            peeled = here[1] & ~there[1] & covered
            here[0][peeled] = there[0][peeled]
            here[1][peeled] = False

    def _paint(self, classes, voxel_size, rng) -> torch.Tensor:
        """One Gaussian per structure; head tissues get texture and internal boundaries."""
        n = self.n
        if self._chance(rng, self.settings.random_contrast_share):
            mean = self._uniform(rng, 0.05, 1.0, (n,))
            mean[0] = self._uniform(rng, 0.0, 0.1)
        else:
            spread = self._uniform(rng, 0.5, 1.8)
            mean = self.mean + spread * self.sd * self._normal(rng, n)
        mean = torch.where(self.mirror.long() < torch.arange(n, device=self.device),
                           mean[self.mirror.long()], mean)  # fmt: skip
        mean = (mean + 0.01 * self._normal(rng, n)).clamp_(0.0, 1.6)
        spread = self._uniform(rng, 0.005, 0.07, (n,))
        is_head = self.tissue == TISSUES.index("head")
        texture = torch.where(is_head, self._uniform(rng, 0.0, 0.35, (n,)), 0.0)
        sharpness = self._uniform(rng, 0.5, 6.0)
        lumps = torch.tanh(sharpness * self._field(rng, classes.shape, 9.0 / voxel_size)[0])
        index = classes.long()
        grain = self._normal(rng, *classes.shape)
        image = mean[index] + spread[index] * grain + texture[index] * lumps
        return image.clamp_min_(0.0)

    def _strip(self, image, classes, voxel_size, rng) -> torch.Tensor:
        """Remove what is not brain, as a skull-stripping tool would: more or less well."""
        if self._chance(rng, self.settings.whole_head_share):
            return image
        tissue = self.tissue[classes.long()]
        keep = (tissue == TISSUES.index("brain")) | (tissue == TISSUES.index("ventricle"))
        if self._chance(rng, 0.7):
            keep |= tissue == TISSUES.index("csf")
        width = 2 * int(self._uniform(rng, 0.6, 2.6) / voxel_size + 0.5) + 1
        soft = keep.float()[None, None]
        for axis in range(3):  # a box is three lines: a third of the time
            line = [width if a == axis else 1 for a in range(3)]
            soft = F.avg_pool3d(soft, line, 1, [n // 2 for n in line])
        soft = soft[0, 0]
        wobble = self._uniform(rng, 0.0, 0.15) * self._field(rng, image.shape, 15.0 / voxel_size)[0]
        threshold = self._uniform(rng, 0.15, 0.6)
        return torch.where(soft + wobble > threshold, image, 0.0)

    def _degrade(self, image, voxel_size, rng) -> torch.Tensor:
        """Bias field, gamma, blur, slice thickness, noise."""
        s = self.settings
        bias = self._uniform(rng, 0.0, s.bias) * self._field(rng, image.shape, 70.0 / voxel_size)[0]
        image = image * torch.exp(bias)
        peak = image.amax().clamp_min(1e-6)
        image = peak * (image / peak) ** torch.exp(s.gamma * self._normal(rng, 1))
        for axis in range(3):
            sigma = float(self._uniform(rng, 0.0, 0.75)) / voxel_size
            image = _blur(image, axis, sigma)
        if self._chance(rng, s.low_resolution_share):
            image = self._thick_slices(image, voxel_size, rng)
        level = s.noise * self._uniform(rng, 0.0, 1.0) ** 2
        noisy = (image + level * self._normal(rng, *image.shape)).abs_()
        # A brain-extracted image keeps an exactly empty background.
        return torch.where(image > 1e-4, noisy, image if self._chance(rng, 0.8) else noisy)

    def _thick_slices(self, image, voxel_size, rng) -> torch.Tensor:
        shape = image.shape
        thickness = self._uniform(rng, voxel_size, max(self.settings.max_thickness, voxel_size))
        sides = [float(thickness)] * 3
        if self._chance(rng, 0.5):
            thick = int(self._uniform(rng, 0, 3))
            sides = [float(thickness) if axis == thick else voxel_size for axis in range(3)]
        small = [max(8, round(n * voxel_size / t)) for n, t in zip(shape, sides, strict=True)]
        low = F.interpolate(image[None, None], size=small, mode="area")
        return F.interpolate(low, size=tuple(shape), mode="trilinear", align_corners=False)[0, 0]


def _nearest(classes: torch.Tensor, places: list[torch.Tensor]) -> torch.Tensor:
    """Return the classes at the voxels nearest to `places`, 0 outside."""
    index = torch.zeros(places[0].shape, dtype=torch.int64, device=classes.device)
    inside = torch.ones(places[0].shape, dtype=torch.bool, device=classes.device)
    for x, side in zip(places, classes.shape, strict=True):
        x = x.round().long()
        inside &= (x >= 0) & (x < side)
        index = index * side + x
    index[~inside] = 0
    found = classes.reshape(-1)[index]
    found[~inside] = 0
    return found


def _linear(image: torch.Tensor, places: list[torch.Tensor]) -> torch.Tensor:
    """Return an image (X, Y, Z) at `places`, trilinearly, 0 outside."""
    sides = zip(places[::-1], image.shape[::-1], strict=True)  # the last axis comes first
    grid = torch.stack([2 * x / (side - 1) - 1 for x, side in sides], dim=-1)
    return F.grid_sample(image[None, None], grid[None], align_corners=True)[0, 0]


def _blur(image: torch.Tensor, axis: int, sigma: float) -> torch.Tensor:
    """Gaussian blur along one axis by a three-point kernel of the same variance (sigma < 0.8)."""
    weight = min(sigma**2 / 2, 0.33)
    if weight < 1e-3:
        return image
    before, after = image.roll(1, axis), image.roll(-1, axis)
    return (1 - 2 * weight) * image + weight * (before + after)
