"""A T1w image of a labelled head, as some scanner would see it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter

from bids_varaug.training.labels import TISSUES, LabelScheme, load_scheme

TEXTURE = {"air": 0.0, "brain": 0.02, "ventricle": 0.02, "csf": 0.02, "head": 0.12}
"""SD of the variation inside a structure, relative to white matter."""
TEXTURE_MM = 1.5
BIAS_MM = 70.0


@dataclass(frozen=True)
class Scanner:
    """What the images of one site have in common; intensities relative to white matter = 1.

    Attributes
    ----------
    noise : SD of the thermal noise in each of the two receiver channels
    bias : SD of the log of the receiver field
    blur : SD of the point spread, mm
    gamma : exponent of the contrast; below 1 fluid and cortex are brighter
    scale : intensity of white matter in the file's own unit
    """

    noise: float = 0.03
    bias: float = 0.1
    blur: float = 0.45
    gamma: float = 1.0
    scale: float = 1000.0


def draw_scanner(rng: np.random.Generator) -> Scanner:
    """A site's scanner: noise 2 to 4.5 %, a weak to moderate bias field, contrast within 15 %."""
    return Scanner(
        noise=float(rng.uniform(0.02, 0.045)),
        bias=float(rng.uniform(0.04, 0.15)),
        blur=float(rng.uniform(0.35, 0.6)),
        gamma=float(np.exp(rng.uniform(-0.15, 0.15))),
        scale=float(np.round(rng.uniform(400, 1500))),
    )


def draw_image(
    labels: np.ndarray,
    spacing: float,
    rng: np.random.Generator,
    *,
    scanner: Scanner | None = None,
    scheme: LabelScheme | None = None,
) -> np.ndarray:
    """Draw a T1w image: one Gaussian per structure, blur, bias field, contrast, Rician noise.

    As `bids_varaug.training.synthesis` does for training, but with the contrast of real scanners
    instead of any contrast. A map without a skull gives an image without one: exactly 0 outside.

    Parameters
    ----------
    labels : (X, Y, Z) integer, ids of the label scheme
    spacing : side of a voxel, mm
    rng : numpy Generator
    scanner : by default a quiet one of medium contrast
    scheme : label table with T1w intensities, by default the package's

    Returns
    -------
    (X, Y, Z) float32, >= 0, white matter near ``scanner.scale``

    Raises
    ------
    ValueError
        If an id is not in the label scheme.
    """
    scanner = scanner or Scanner()
    scheme = scheme or load_scheme()
    ids, inverse = np.unique(labels, return_inverse=True)
    if not np.isin(ids, scheme.ids).all():
        raise ValueError(f"ids without intensity: {np.setdiff1d(ids, scheme.ids).tolist()}")
    which = np.searchsorted(scheme.ids, ids)
    codes = inverse.reshape(labels.shape)

    # Both sides of a structure have one intensity, a fraction of the training's spread wide.
    jitter = rng.standard_normal(len(scheme.ids)).astype(np.float32)
    jitter = jitter[np.minimum(np.arange(len(scheme.ids)), scheme.mirror)]
    mean = np.clip(scheme.t1_mean + 0.4 * scheme.t1_sd * jitter, 0, None)[which]
    texture = np.array([TEXTURE[TISSUES[t]] for t in scheme.tissue], np.float32)[which]
    grain = gaussian_filter(
        rng.standard_normal(labels.shape, dtype=np.float32), TEXTURE_MM / 2.355 / spacing
    )
    grain /= grain.std()
    image = gaussian_filter(mean[codes] + texture[codes] * grain, scanner.blur / spacing)
    image = np.clip(image, 0, None) ** np.float32(scanner.gamma)
    image *= np.exp(scanner.bias * smooth_field(rng, labels.shape, BIAS_MM / spacing))
    image += scanner.noise * rng.standard_normal(labels.shape, dtype=np.float32)
    image = np.hypot(image, scanner.noise * rng.standard_normal(labels.shape, dtype=np.float32))
    if not (scheme.tissue[which] == TISSUES.index("head")).any():
        image[labels == 0] = 0
    return (scanner.scale * image).astype(np.float32)


def smooth_field(
    rng: np.random.Generator, shape: tuple[int, int, int], length: float
) -> np.ndarray:
    """Gaussian random field: cubic B-splines with independent normal coefficients.

    Parameters
    ----------
    rng : numpy Generator
    shape : of the field, voxels
    length : distance of the knots, voxels; nothing finer than about this is in the field

    Returns
    -------
    `shape` float32, mean 0, variance 1 at every voxel
    """
    weights = [_spline_weights(n, length) for n in shape]
    field = rng.standard_normal([w.shape[1] for w in weights], dtype=np.float32)
    for axis, w in enumerate(weights):
        # One short sum per voxel and axis, in an order that does not depend on threads.
        knots = np.moveaxis(field, axis, 0)
        first = np.argmax(w > 0, axis=1)
        taps = np.arange(4)
        near = np.minimum(first[:, None] + taps, w.shape[1] - 1)
        share = np.take_along_axis(w, near, 1) * (first[:, None] + taps < w.shape[1])
        spread = sum(share[:, tap].reshape(-1, 1, 1) * knots[near[:, tap]] for tap in range(4))
        field = np.moveaxis(spread, 0, axis)
    return np.ascontiguousarray(field)


def _spline_weights(n: int, length: float) -> np.ndarray:
    """Weights (n, knots) float32 of the cubic B-splines at n voxels, sum of squares 1 per voxel."""
    knots = int(np.ceil((n - 1) / length)) + 4
    distance = np.abs(np.arange(n)[:, None] / length + 1.5 - np.arange(knots)[None])
    near = 2 / 3 - distance**2 + distance**3 / 2
    far = np.clip(2 - distance, 0, None) ** 3 / 6
    weights = np.where(distance < 1, near, far)
    return (weights / np.sqrt((weights**2).sum(1, keepdims=True))).astype(np.float32)
