"""Draw an image with any contrast from a label map (domain randomisation).

The idea is that of SynthSeg (Billot et al. 2023) and of arXiv:2507.13458: a network that has seen every contrast,
resolution and artefact is not surprised by a real scanner. Everything random comes from one generator: a seed names an
image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from bids_varaug.images.intensity import normalise_intensity
from bids_varaug.training.labels import TISSUES, LabelScheme, TrainingSubject


@dataclass(frozen=True)
class SynthesisSettings:
    """How far images are randomised; lengths in mm, angles in degrees, rest relative.

    `thin_share` of the images of 1 mm or less have ventricles that were made thinner. `real_share` of the draws from a
    subject with a T1w image show that image, warped and degraded.
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


class _Random:
    """Random numbers on one device, for one window."""

    def __init__(self, seed: int, device: torch.device, voxel_size: float):
        self.generator = torch.Generator(device).manual_seed(seed)
        self.device = device
        self.voxel_size = voxel_size

    def uniform(self, low: float, high: float, size: Sequence[int] = ()) -> torch.Tensor:
        return low + (high - low) * torch.rand(size, generator=self.generator, device=self.device)

    def chance(self, probability: float) -> bool:
        return bool(self.uniform(0.0, 1.0) < probability)

    def normal(self, *size: int) -> torch.Tensor:
        return torch.randn(size, generator=self.generator, device=self.device)

    def field(self, shape: Sequence[int], spacing: float, channels: int = 1) -> torch.Tensor:
        """Smooth noise (channels, *shape), knots `spacing` mm apart, about unit variance."""
        knots = [max(2, round(side / (spacing / self.voxel_size)) + 1) for side in shape]
        field = self.normal(channels, *knots)
        for n, side in zip(knots, shape, strict=True):
            # Linearly along one axis, which moves to the end: five times as fast as trilinearly
            knot = torch.eye(n, device=self.device)[None]
            line = F.interpolate(knot, size=side, mode="linear", align_corners=True)[0]
            field = torch.tensordot(field, line, ([1], [0]))
        return field


class SyntheticImageGenerator:
    """Draws images; holds the label scheme as tensors on one device."""

    off_centre_share = 0.1  # of the windows, which are anywhere in the head
    displacement = 16.0  # mm along each axis, at most: of the other windows from the middle of the brain

    def __init__(self, scheme: LabelScheme, settings: SynthesisSettings, device: str = "cpu"):
        self.settings = settings
        self.device = torch.device(device)
        self.targets = torch.from_numpy(scheme.targets).to(self.device)
        self.mirror = torch.from_numpy(scheme.mirror).to(self.device)
        self.tissue = torch.from_numpy(scheme.tissue).to(self.device)
        self.mean = torch.from_numpy(scheme.t1_mean).to(self.device)
        self.sd = torch.from_numpy(scheme.t1_sd).to(self.device)

    def draw(
        self, subject: TrainingSubject, shape: tuple[int, int, int], voxel_size: float, seed: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return one random image (float32, in [0, 1.5] as `normalise_intensity` leaves it) and its classes (uint8).

        Both fill a window of `shape` voxels of `voxel_size` mm; `subject` is on the same device.
        """
        rng = _Random(seed, self.device, voxel_size)
        classes, points, flipped = self._draw_classes(subject, shape, rng)
        if subject.t1w is not None and rng.chance(self.settings.real_share):
            image = _linear(subject.t1w, points)
            image = image.flip(0) if flipped else image
        else:
            thin_share = self.settings.thin_share if voxel_size <= 1 else 0.0
            if thin_share and rng.chance(thin_share):
                self._thin_ventricles(classes, rng)
            image = self._paint(classes, rng)
        return self._finish(image, classes, rng), self.targets[classes.long()]

    def draw_targets(
        self, subject: TrainingSubject, shape: tuple[int, int, int], voxel_size: float, seed: int
    ) -> torch.Tensor:
        """Return the classes of `draw_contrasts` alone."""
        classes, _, _ = self._draw_classes(subject, shape, _Random(seed, self.device, voxel_size))
        return self.targets[classes.long()]

    def draw_contrasts(
        self, subject: TrainingSubject, shape: tuple[int, int, int], voxel_size: float, seed: int, n: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `n` synthetic images (n, *shape) of one anatomy, each as `draw` gives it, and its classes."""
        rng = _Random(seed, self.device, voxel_size)
        classes, _, _ = self._draw_classes(subject, shape, rng)
        images = [self._finish(self._paint(classes, rng), classes, rng) for _ in range(n)]
        return torch.stack(images), self.targets[classes.long()]

    def _draw_classes(
        self, subject: TrainingSubject, shape: Sequence[int], rng: _Random
    ) -> tuple[torch.Tensor, list[torch.Tensor], bool]:
        """Return generation classes, where in the head each voxel is taken from, and whether sides were swapped."""
        points = self._sample_points(subject, shape, rng)
        flipped = rng.chance(0.5)
        classes = _nearest(subject.classes, points)
        return (self.mirror[classes.flip(0).long()] if flipped else classes), points, flipped

    def _finish(self, image: torch.Tensor, classes: torch.Tensor, rng: _Random) -> torch.Tensor:
        return normalise_intensity(self._degrade(self._strip(image, classes, rng), rng))

    def _is(self, tissue: str, classes: torch.Tensor) -> torch.Tensor:
        return (self.tissue == TISSUES.index(tissue))[classes.long()]

    def _sample_points(self, subject: TrainingSubject, shape: Sequence[int], rng: _Random) -> list[torch.Tensor]:
        """Return where in the head (voxels, per axis) a placed, turned, warped window looks."""
        s = self.settings
        matrix = self._linear_map(rng) * rng.voxel_size
        centre = self._window_centre(subject, rng)
        warp = s.elastic_coarse * rng.field(shape, 40.0, 3)
        warp += s.elastic_fine * rng.field(shape, 12.0, 3)
        grid = [torch.arange(n, device=self.device) - (n - 1) / 2 for n in shape]
        points = []
        for axis in range(3):
            x = (matrix[axis, 0] * grid[0])[:, None, None] + (matrix[axis, 1] * grid[1])[:, None]
            points.append(x + matrix[axis, 2] * grid[2] + warp[axis] + centre[axis])
        return points

    def _linear_map(self, rng: _Random) -> torch.Tensor:
        s = self.settings
        angles = torch.deg2rad(rng.uniform(-s.rotation, s.rotation, (3,)))
        rotation = torch.eye(3, device=self.device)
        for (i, j), angle in zip(((1, 2), (0, 2), (0, 1)), angles, strict=True):
            step = torch.eye(3, device=self.device)
            step[i, i] = step[j, j] = torch.cos(angle)
            step[i, j], step[j, i] = -torch.sin(angle), torch.sin(angle)
            rotation = rotation @ step
        overall = 1 + 0.7 * rng.uniform(-s.scaling, s.scaling)
        scale = overall * (1 + 0.4 * rng.uniform(-s.scaling, s.scaling, (3,)))
        shear = torch.eye(3, device=self.device) + rng.uniform(-s.shear, s.shear, (3, 3))
        return rotation @ torch.diag(scale) @ shear

    def _window_centre(self, subject: TrainingSubject, rng: _Random) -> torch.Tensor:
        """Most windows look at the brain, some anywhere in the head."""
        sides = torch.tensor(subject.classes.shape, device=self.device, dtype=torch.float32)
        brain = (self.targets[subject.classes[::8, ::8, ::8].long()] > 0).nonzero().float() * 8
        middle = (brain.amin(0) + brain.amax(0)) / 2
        if rng.chance(self.off_centre_share):
            return rng.uniform(0.25, 0.75, (3,)) * sides
        return middle + rng.uniform(-1.0, 1.0, (3,)) * self.displacement

    def _thin_ventricles(self, classes: torch.Tensor, rng: _Random) -> None:
        """Give the outer voxels of ventricles to what lies beside them, on some sides, in patches.

        A dozen label maps hold few of the narrow ventricles that most young adults have.
        """
        fluid = self._is("ventricle", classes)
        for side in torch.randperm(6, generator=rng.generator, device=self.device).tolist():
            axis, from_below = side // 2, side % 2
            n = classes.shape[axis] - 1
            voxels, is_fluid = (x.narrow(axis, from_below, n) for x in (classes, fluid))
            beside, beside_fluid = (x.narrow(axis, 1 - from_below, n) for x in (classes, fluid))
            in_patches = rng.field(voxels.shape, 8.0)[0] > rng.uniform(-1.5, 1.5)
            outer = is_fluid & ~beside_fluid & in_patches
            voxels[outer] = beside[outer]
            is_fluid[outer] = False

    def _paint(self, classes: torch.Tensor, rng: _Random) -> torch.Tensor:
        """One Gaussian per structure; head tissues get texture and internal boundaries."""
        n = len(self.mean)
        if rng.chance(self.settings.random_contrast_share):
            mean = rng.uniform(0.05, 1.0, (n,))
            mean[0] = rng.uniform(0.0, 0.1)
        else:
            spread = rng.uniform(0.5, 1.8)
            mean = self.mean + spread * self.sd * rng.normal(n)
        # Both sides of a structure look alike, but for a little.
        mirror = self.mirror.long()
        mean = mean[torch.minimum(mirror, torch.arange(n, device=self.device))]
        mean = (mean + 0.01 * rng.normal(n)).clamp_(0.0, 1.6)
        spread = rng.uniform(0.005, 0.07, (n,))
        is_head = self.tissue == TISSUES.index("head")
        texture = torch.where(is_head, rng.uniform(0.0, 0.35, (n,)), 0.0)
        sharpness = rng.uniform(0.5, 6.0)
        lumps = torch.tanh(sharpness * rng.field(classes.shape, 9.0)[0])
        index = classes.long()
        grain = rng.normal(*classes.shape)
        image = mean[index] + spread[index] * grain + texture[index] * lumps
        return image.clamp_min_(0.0)

    def _strip(self, image: torch.Tensor, classes: torch.Tensor, rng: _Random) -> torch.Tensor:
        """Remove what is not brain, as a skull-stripping tool would: more or less well."""
        if rng.chance(self.settings.whole_head_share):
            return image
        keep = self._is("brain", classes) | self._is("ventricle", classes)
        if rng.chance(0.7):
            keep |= self._is("csf", classes)
        width = 2 * int(rng.uniform(0.6, 2.6) / rng.voxel_size + 0.5) + 1
        soft = keep.float()[None, None]
        for axis in range(3):  # a box is three lines: a third of the time
            line = [width if a == axis else 1 for a in range(3)]
            soft = F.avg_pool3d(soft, line, 1, [n // 2 for n in line])
        wobble = rng.uniform(0.0, 0.15) * rng.field(image.shape, 15.0)[0]
        threshold = rng.uniform(0.15, 0.6)
        return torch.where(soft[0, 0] + wobble > threshold, image, 0.0)

    def _degrade(self, image: torch.Tensor, rng: _Random) -> torch.Tensor:
        """Bias field, gamma, blur, slice thickness, noise."""
        s = self.settings
        bias = rng.uniform(0.0, s.bias) * rng.field(image.shape, 70.0)[0]
        image = image * torch.exp(bias)
        peak = image.amax().clamp_min(1e-6)
        image = peak * (image / peak) ** torch.exp(s.gamma * rng.normal(1))
        for axis in range(3):
            image = _blur(image, axis, float(rng.uniform(0.0, 0.75)) / rng.voxel_size)
        if rng.chance(s.low_resolution_share):
            image = self._thick_slices(image, rng)
        level = s.noise * rng.uniform(0.0, 1.0) ** 2
        noisy = (image + level * rng.normal(*image.shape)).abs_()
        # A brain-extracted image keeps an exactly empty background.
        return torch.where(image > 1e-4, noisy, image if rng.chance(0.8) else noisy)

    def _thick_slices(self, image: torch.Tensor, rng: _Random) -> torch.Tensor:
        thin = rng.voxel_size
        thickness = float(rng.uniform(thin, max(self.settings.max_thickness, thin)))
        sides = [thickness] * 3
        if rng.chance(0.5):
            thick = int(rng.uniform(0, 3))
            sides = [thickness if axis == thick else thin for axis in range(3)]
        shape = tuple(image.shape)
        small = [max(8, round(n * thin / side)) for n, side in zip(shape, sides, strict=True)]
        low = F.interpolate(image[None, None], size=small, mode="area")
        return F.interpolate(low, size=shape, mode="trilinear", align_corners=False)[0, 0]


def _nearest(classes: torch.Tensor, points: list[torch.Tensor]) -> torch.Tensor:
    """Return the classes at the voxels nearest to `points`, 0 outside."""
    index = torch.zeros(points[0].shape, dtype=torch.int64, device=classes.device)
    inside = torch.ones(points[0].shape, dtype=torch.bool, device=classes.device)
    for x, side in zip(points, classes.shape, strict=True):
        x = x.round().long()
        inside &= (x >= 0) & (x < side)
        index = index * side + x
    index[~inside] = 0
    found = classes.reshape(-1)[index]
    found[~inside] = 0
    return found


def _linear(image: torch.Tensor, points: list[torch.Tensor]) -> torch.Tensor:
    """Return an image (X, Y, Z) at `points`, trilinearly, 0 outside."""
    sides = zip(points[::-1], image.shape[::-1], strict=True)  # the last axis comes first
    grid = torch.stack([2 * x / (side - 1) - 1 for x, side in sides], dim=-1)
    return F.grid_sample(image[None, None], grid[None], align_corners=True)[0, 0]


def _blur(image: torch.Tensor, axis: int, sigma: float) -> torch.Tensor:
    """Gaussian blur along one axis by a three-point kernel of the same variance (sigma < 0.8)."""
    weight = min(sigma**2 / 2, 0.33)
    if weight < 1e-3:
        return image
    before, after = image.roll(1, axis), image.roll(-1, axis)
    return (1 - 2 * weight) * image + weight * (before + after)
