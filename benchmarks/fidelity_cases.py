"""What `fidelity.py` compares: the data, and each operator as torch and as the reference runs it.

A `Case` is one torch operator on one set of data. Its data are made from a seed, its torch side is
what a user would write (gradients by `torch.autograd.grad`, forward and backward in one go), and
its reference side is the same thing, forward and backward, with every instruction rounded.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import torch
import torch.nn.functional as F
from nilearn.datasets import load_mni152_template

from bids_varaug.models.ensemble import NetworkShape
from bids_varaug.models.unet import UNet, build_network, fold, unfold
from tests.numerics import reference
from tests.numerics.reference import Arithmetic

Arrays = dict[str, np.ndarray]
Tensors = dict[str, torch.Tensor]

RANDOM, POSITIVE, SHUFFLED, IN_ORDER, IMAGE, OFFSET, BLOB, SPARSE = KINDS = (
    "random",  # standard normal
    "positive",  # uniform in (0, 1)
    "cancelling, shuffled",  # sums a thousandth of their terms' sum, or less; terms in any order
    "cancelling, in order",  # the same, all positive terms first
    "image",  # of a head, for several channels: its convolution, normalised and rectified
    "offset",  # normal, mean 30 standard deviations away from 0
    "blob",  # of convolutions: a dark image with a cube that is a thousand times brighter
    "sparse",  # of convolutions: most numbers are 0
)
CANCELLING = 1e-3  # how much the negative terms differ from the positive ones
NORM_SHAPE = (64, 10, 10, 10)


@dataclass(frozen=True)
class Case:
    """One operator on one set of data.

    Attributes
    ----------
    operator, size, kind : its names
    arrays : makes the data, arrays by name: float64, or integers for places
    by_torch : tensors to results, by name
    by_reference : arrays and arithmetic to results, by the same names
    units : for each result in how many parts along its first axes it falls whose rounding errors
        are independent of each other; each element is one where it is not in here
    quick : whether a quick run has it
    channels_last : whether images lie in memory with channels last
    """

    operator: str
    size: str
    kind: str
    arrays: Callable[[], Arrays]
    by_torch: Callable[[Tensors], Tensors]
    by_reference: Callable[[Arrays, Arithmetic], Arrays]
    units: dict[str, int]
    quick: bool = True
    channels_last: bool = False

    @property
    def label(self) -> str:
        """Operator, size and kind of data."""
        return f"{self.operator}, {self.size}, {self.kind}"


def all_cases(images: Images) -> list[Case]:
    """List all cases, those of one operator together."""
    return [*sums(images), *products(images), *convolutions(images), *norms(images), *softs(images)]


# --------------------------------------------------------------------------------------------------
# Data


class Images:
    """Real T1w images, from which patches and feature maps are taken.

    Parameters
    ----------
    path : a T1w image or a folder that has some (``*T1w.nii*``); None: the MNI152 template that
        comes with nilearn

    Raises
    ------
    FileNotFoundError
        If there are none.
    """

    def __init__(self, path: Path | None = None):
        if path is None:
            volumes, self.name = [load_mni152_template(resolution=1)], "MNI152 template"
        else:
            files = sorted(path.rglob("*T1w.nii*")) if path.is_dir() else [path]
            if not files:
                raise FileNotFoundError(f"{path}: no file is called *T1w.nii*")
            volumes = [nibabel.load(file) for file in files]
            self.name = ", ".join(file.name for file in files)
        self.volumes = [_unit_range(volume.get_fdata(dtype="float32")) for volume in volumes]

    def patch(self, shape: tuple[int, int, int], seed: int) -> np.ndarray:
        """Cut a patch (X, Y, Z) out of one of the heads."""
        rng = np.random.default_rng(seed)
        volume = self.volumes[seed % len(self.volumes)]
        # In the middle half of the volume, at a voxel that is not background
        quarter = [n // 4 for n in volume.shape]
        middle = volume[tuple(slice(q, n - q) for q, n in zip(quarter, volume.shape, strict=True))]
        places = np.argwhere(middle > middle.mean())
        centre = places[rng.integers(len(places))] + quarter
        sizes = zip(centre, shape, volume.shape, strict=True)
        start = [max(0, min(c - n // 2, m - n)) for c, n, m in sizes]
        return volume[tuple(slice(s, s + n) for s, n in zip(start, shape, strict=True))]

    def features(
        self, n_channels: int, shape: tuple[int, int, int], seed: int, rectify: bool = True
    ) -> np.ndarray:
        """Convolve a patch with random kernels 3x3x3, (C, X, Y, Z); normalise and rectify that."""
        patch = torch.from_numpy(self.patch(shape, seed).copy())[None, None]
        rng = torch.Generator().manual_seed(seed)
        kernels = torch.randn(n_channels, 1, 3, 3, 3, generator=rng) * (2 / 27) ** 0.5
        maps = F.conv3d(patch, kernels, padding=1)
        if rectify:
            maps = F.relu(F.instance_norm(maps))
        return maps[0].double().numpy()

    def lines(self, n_rows: int, n: int, seed: int) -> np.ndarray:
        """Pieces of n voxels, (R, n), as they lie in memory, from within the head."""
        volume = self.volumes[seed % len(self.volumes)].reshape(-1)
        starts = np.linspace(volume.size // 4, 3 * volume.size // 4 - n, n_rows).astype(int)
        return np.stack([volume[start : start + n] for start in starts]).astype("float64")


def _unit_range(volume: np.ndarray) -> np.ndarray:
    low, high = volume.min(), volume.max()
    return (volume - low) / (high - low)


def draw(rng: np.random.Generator, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    """Draw data whose rows, along the last axis, are of one of the kinds but the image."""
    if kind == RANDOM:
        return rng.normal(size=shape)
    if kind == POSITIVE:
        return rng.uniform(size=shape)
    if kind == OFFSET:
        return 30 + rng.normal(size=shape)
    terms = np.concatenate(cancelling(rng, (*shape[:-1], shape[-1] // 2)), axis=-1)
    odd = CANCELLING * rng.uniform(size=(*shape[:-1], shape[-1] % 2))
    terms = np.concatenate([terms, odd], axis=-1)
    return rng.permuted(terms, axis=-1) if kind == SHUFFLED else terms


def cancelling(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Positive numbers and almost their negatives."""
    terms = rng.uniform(size=shape)
    return terms, -terms * (1 + CANCELLING * rng.normal(size=shape))


def uneven(rng: np.random.Generator, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    """Images (N, C, X, Y, Z): as `draw`, or with a bright cube of a quarter of the side, or mostly 0."""
    if kind == SPARSE:
        return rng.normal(size=shape) * (rng.uniform(size=shape) < 0.1)
    x = draw(rng, RANDOM if kind == BLOB else kind, shape)
    if kind == BLOB:
        first, size = shape[-1] // 2, max(2, shape[-1] // 4)
        x[(..., *[slice(first, first + size)] * 3)] *= 1000
    return x


def sparse(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Gradients as a rectifier passes them on: half are 0."""
    return rng.normal(size=shape) * (rng.uniform(size=shape) < 0.5)


def cancelling_factors(
    rng: np.random.Generator,
    kind: str,
    left: tuple[int, ...],
    right: tuple[int, ...],
    axes: tuple[int, int],
) -> tuple[np.ndarray, np.ndarray]:
    """Two factors the sum of whose products over one axis of each cancels.

    Parameters
    ----------
    rng : source of random numbers
    kind : `SHUFFLED`, where signs also alternate within each half, or `IN_ORDER`
    left, right : shapes
    axes : of `left` and of `right`
    """
    n = left[axes[0]]
    half = n // 2

    def with_length(shape, axis, length):
        return (*shape[:axis], length, *shape[axis + 1 :])

    first, second = cancelling(rng, with_length(left, axes[0], half))
    last = CANCELLING * rng.uniform(size=with_length(left, axes[0], n % 2))
    factors = rng.uniform(size=with_length(right, axes[1], half))
    factor = rng.uniform(size=with_length(right, axes[1], n % 2))
    if kind == SHUFFLED:
        factors *= rng.choice([-1.0, 1.0], size=factors.shape)
    a = np.concatenate([first, -second, last], axis=axes[0])
    b = np.concatenate([factors, -factors, factor], axis=axes[1])
    order = rng.permutation(n) if kind == SHUFFLED else np.arange(n)
    return a.take(order, axis=axes[0]), b.take(order, axis=axes[1])


# --------------------------------------------------------------------------------------------------
# Sums and means


def sums(images: Images) -> Iterator[Case]:
    """Sums, means and variances of 64 rows."""

    def arrays(kind, n):
        rng = np.random.default_rng(n)
        return {"x": images.lines(64, n, n) if kind == IMAGE else draw(rng, kind, (64, n))}

    for n, kind in itertools.product((216, 8192), KINDS[:5]):
        for operator, by_torch, by_reference in (
            ("sum", lambda t: {"y": t["x"].sum(1)}, reference_sum),
            ("mean", lambda t: {"y": t["x"].mean(1)}, reference_mean),
            ("var_mean", torch_variance, reference_variance),
        ):
            yield Case(
                operator,
                f"{n} terms",
                kind,
                lambda kind=kind, n=n: arrays(kind, n),
                by_torch,
                by_reference,
                {},
                quick=n == 8192 and operator != "mean",
            )


def torch_variance(tensors: Tensors) -> Tensors:
    """Mean and variance."""
    variance, mean = torch.var_mean(tensors["x"], dim=1, correction=0)
    return {"variance": variance, "mean": mean}


def reference_sum(arrays: Arrays, arithmetic: Arithmetic) -> Arrays:
    return {"y": reference.total(arrays["x"], arithmetic)}


def reference_mean(arrays: Arrays, arithmetic: Arithmetic) -> Arrays:
    total = reference.total(arrays["x"], arithmetic.at(0))
    return {"y": _divide(total, arrays["x"].shape[1], arithmetic.at(1))}


def reference_variance(arrays: Arrays, arithmetic: Arithmetic) -> Arrays:
    """Mean and variance in two passes."""
    x = arrays["x"]
    mean = reference_mean(arrays, arithmetic.at(0))["y"]
    distance = reference.add(x, -mean[:, None], arithmetic.at(1))
    total = reference.dot(distance, distance, arithmetic.at(2))
    return {"variance": _divide(total, x.shape[1], arithmetic.at(3)), "mean": mean}


def _divide(array, number, arithmetic):
    return reference.divide(array, np.array(number, array.dtype), arithmetic)


# --------------------------------------------------------------------------------------------------
# Matrix products


def products(images: Images) -> Iterator[Case]:
    """Matrix times vector, matrix times matrix, and a linear layer, 64 elements of each."""

    def arrays(kind, n, shape, biased):
        rng = np.random.default_rng([n, *shape])
        left, right = (shape[0], n), (n, shape[1])
        if kind == IMAGE:
            a, b = image_windows(images, shape[0], n), rng.normal(size=right) * (2 / n) ** 0.5
        elif kind in (SHUFFLED, IN_ORDER):
            a, b = cancelling_factors(rng, kind, left, right, (1, 0))
        else:
            a, b = draw(rng, kind, left), draw(rng, kind, right)
        bias = {"bias": rng.normal(size=shape[1])} if biased else {}
        return {"a": a, "b": b, "places": sample(rng, shape, 64)} | bias

    for operator, (rows, columns), by_torch, lengths in (
        ("mv", (512, 1), lambda t: torch.mv(t["a"], t["b"][:, 0]), (864, 8192)),
        ("mm", (256, 32), lambda t: torch.mm(t["a"], t["b"]), (27, 216, 864, 2592, 8192)),
        ("linear", (512, 32), lambda t: F.linear(t["a"], t["b"].mT, t["bias"]), (96, 864)),
    ):
        for n, kind in itertools.product(lengths, KINDS[:5]):
            yield Case(
                operator,
                f"{n} terms, {rows} x {columns}",
                kind,
                lambda n=n, kind=kind, shape=(rows, columns), biased=operator == "linear": arrays(
                    kind, n, shape, biased
                ),
                lambda t, by_torch=by_torch: {"y": by_torch(t).reshape(-1)[t["places"]]},
                reference_product,
                {},
                quick=operator == "mm" and n in (27, 864),
            )


def sample(rng: np.random.Generator, shape: tuple[int, ...], n: int) -> np.ndarray:
    """Flat places of n elements of a result."""
    return np.sort(rng.choice(np.prod(shape), n, replace=False))


def image_windows(images: Images, n_rows: int, n: int) -> np.ndarray:
    """What a kernel 3x3x3 sees of feature maps, (R, n); R <= 512."""
    maps = images.features(-(-n // 27), (10, 10, 10), n)
    windows = np.lib.stride_tricks.sliding_window_view(maps, (3, 3, 3), axis=(1, 2, 3))
    return np.moveaxis(windows, 0, 3).reshape(512, -1)[:n_rows, :n]


def reference_product(arrays: Arrays, arithmetic: Arithmetic) -> Arrays:
    """Some elements of a matrix product."""
    a, b = arrays["a"], arrays["b"]
    row, column = np.unravel_index(arrays["places"], (len(a), b.shape[1]))
    y = reference.dot(a[row], b.T[column], arithmetic.at(0))
    if "bias" in arrays:
        y = reference.add(y, arrays["bias"][column], arithmetic.at(1))
    return {"y": y}


# --------------------------------------------------------------------------------------------------
# Convolution


def convolutions(images: Images) -> Iterator[Case]:
    """Convolution with 'same' padding and its two gradients, some elements of each.

    So many channels are summed over, forward those of the input, backward those of the output; the
    gradient of the kernels is a sum over the voxels of two samples, of side 16 at most. All but the
    first are as wide as in a network, in channels-last memory as there.
    """
    parts = (
        ("conv3d", forward_data, torch_convolution, reference_convolution),
        ("conv3d input gradient", backward_data, torch_input_gradient, reference_input_gradient),
        ("conv3d weight gradient", weight_data, torch_weight_gradient, reference_weight_gradient),
    )
    for (operator, data, by_torch, by_reference), geometry, kind in itertools.product(
        parts, GEOMETRIES, (*KINDS[:5], BLOB, SPARSE)
    ):
        if geometry in FEWER_KINDS and kind in (POSITIVE, SHUFFLED, BLOB):
            continue
        side = weight_side(geometry) if data is weight_data else geometry.side
        yield Case(
            operator,
            f"{geometry}, {side}^3 voxels",
            kind,
            lambda data=data, geometry=geometry, kind=kind: data(images, kind, geometry),
            by_torch,
            by_reference,
            {},
            quick=geometry.summed == 32 and geometry.k == 3,
            channels_last=geometry.others > 2,
        )


@dataclass(frozen=True)
class Geometry:
    """Sizes of a convolution: channels summed over, other channels, kernel and image sides."""

    summed: int
    others: int
    k: int
    side: int

    def __str__(self) -> str:
        return f"{self.summed} to {self.others} channels, {self.k}^3"

    @property
    def space(self) -> tuple[int, int, int]:
        """Shape of the image."""
        return (self.side,) * 3


GEOMETRIES = (
    Geometry(8, 2, 3, 6),
    Geometry(8, 8, 3, 32),
    Geometry(32, 32, 3, 16),
    Geometry(96, 96, 3, 8),
    Geometry(32, 32, 1, 16),
)
FEWER_KINDS = GEOMETRIES[3:]


def forward_data(images: Images, kind: str, geometry: Geometry) -> Arrays:
    """Input, kernels, and a bias where kernels are 1x1x1."""
    rng = np.random.default_rng([geometry.summed, geometry.others, geometry.k])
    shape = (1, geometry.summed, *geometry.space)
    kernels = (geometry.others, geometry.summed, *[geometry.k] * 3)
    if kind == IMAGE:
        x = images.features(geometry.summed, geometry.space, geometry.summed)[None]
        weight = rng.normal(size=kernels) * (2 / np.prod(kernels[1:])) ** 0.5
    elif kind in (SHUFFLED, IN_ORDER):
        x, weight = cancelling_factors(rng, kind, shape, kernels, (1, 1))
    else:
        x, weight = uneven(rng, kind, shape), draw(rng, kind if kind == POSITIVE else RANDOM, kernels)
    places = sample(rng, (1, geometry.others, *geometry.space), 256)
    arrays = {"x": x, "weight": weight, "places": places}
    return arrays | {"bias": rng.normal(size=geometry.others)} if geometry.k == 1 else arrays


def backward_data(images: Images, kind: str, geometry: Geometry) -> Arrays:
    """Gradient of the output, and kernels."""
    arrays = forward_data(images, kind, geometry)
    rng = np.random.default_rng([geometry.summed, geometry.others, geometry.k, 1])
    gradient = sparse(rng, arrays["x"].shape) if kind == IMAGE else arrays["x"]
    weight = arrays["weight"].swapaxes(0, 1)
    return {"gradient": gradient, "weight": weight, "places": arrays["places"]}


def weight_side(geometry: Geometry) -> int:
    """Side of the two images whose voxels the gradient of the kernels sums over."""
    return min(16, geometry.side)


def weight_data(images: Images, kind: str, geometry: Geometry) -> Arrays:
    """Gradient of the output and input for two samples, and kernels of 0."""
    rng = np.random.default_rng([geometry.summed, geometry.others, geometry.k, 2])
    space = (weight_side(geometry),) * 3
    shape, gradient_shape = ((2, n, *space) for n in (geometry.summed, geometry.others))
    if kind == IMAGE:
        seeds = (geometry.summed, geometry.summed + 1)
        x = np.stack([images.features(geometry.summed, space, seed) for seed in seeds])
        gradient = sparse(rng, gradient_shape)
    elif kind in (SHUFFLED, IN_ORDER):
        x, gradient = cancelling_factors(rng, kind, shape, gradient_shape, (0, 0))
    else:
        x, gradient = uneven(rng, kind, shape), uneven(rng, SPARSE if kind == BLOB else kind, gradient_shape)
    weight = np.zeros((geometry.others, geometry.summed, *[geometry.k] * 3))
    places = sample(rng, weight.shape, 64)
    return {"gradient": gradient, "x": x, "weight": weight, "places": places}


def torch_convolution(tensors: Tensors) -> Tensors:
    """Forward."""
    x, weight = tensors["x"], tensors["weight"]
    y = F.conv3d(x, weight, tensors.get("bias"), padding=weight.shape[-1] // 2)
    return {"y": y.reshape(-1)[tensors["places"]]}


def torch_input_gradient(tensors: Tensors) -> Tensors:
    """Gradient with respect to the input."""
    gradient, weight = tensors["gradient"], tensors["weight"]
    x = gradient.new_zeros(1, weight.shape[1], *gradient.shape[2:]).requires_grad_()
    y = F.conv3d(x, weight, padding=weight.shape[-1] // 2)
    return {"dx": torch.autograd.grad(y, x, gradient)[0].reshape(-1)[tensors["places"]]}


def torch_weight_gradient(tensors: Tensors) -> Tensors:
    """Gradient with respect to the kernels."""
    weight = tensors["weight"].detach().requires_grad_()
    y = F.conv3d(tensors["x"], weight, padding=weight.shape[-1] // 2)
    dweight = torch.autograd.grad(y, weight, tensors["gradient"])[0]
    return {"dweight": dweight.reshape(-1)[tensors["places"]]}


def convolution_windows(x: np.ndarray, k: int) -> np.ndarray:
    """What the kernel sees at each voxel, (N, C, X, Y, Z, k, k, k), with zeros as padding."""
    padded = np.pad(x, [(0, 0), (0, 0), *[(k // 2, k // 2)] * 3])
    return np.lib.stride_tricks.sliding_window_view(padded, (k, k, k), axis=(2, 3, 4))


def reference_elements(x, weight, places, arithmetic: Arithmetic) -> tuple[np.ndarray, np.ndarray]:
    """Elements of `reference.conv3d` of one sample, in its order; and their channels."""
    _, channel, *voxel = np.unravel_index(places, (1, len(weight), *x.shape[2:]))
    windows = convolution_windows(x, weight.shape[-1])[0].transpose(1, 2, 3, 0, 4, 5, 6)
    rows, kernels = windows[tuple(voxel)], weight[channel]
    n = len(places)
    return reference.dot(rows.reshape(n, -1), kernels.reshape(n, -1), arithmetic), channel


def reference_convolution(arrays: Arrays, arithmetic: Arithmetic) -> Arrays:
    """Forward."""
    x, weight, places = arrays["x"], arrays["weight"], arrays["places"]
    y, channel = reference_elements(x, weight, places, arithmetic.at(0))
    if "bias" in arrays:
        y = reference.add(y, arrays["bias"][channel], arithmetic.at(1))
    return {"y": y}


def reference_input_gradient(arrays: Arrays, arithmetic: Arithmetic) -> Arrays:
    """Gradient with respect to the input: elements of `reference.conv3d_input_gradient`."""
    flipped = arrays["weight"][:, :, ::-1, ::-1, ::-1].swapaxes(0, 1)
    gradient, places = arrays["gradient"], arrays["places"]
    return {"dx": reference_elements(gradient, flipped, places, arithmetic)[0]}


def reference_weight_gradient(arrays: Arrays, arithmetic: Arithmetic) -> Arrays:
    """Gradient with respect to the kernels: elements of `reference.conv3d_weight_gradient`."""
    gradient, weight, places = arrays["gradient"], arrays["weight"], arrays["places"]
    out, channel, *tap = np.unravel_index(places, weight.shape)
    windows = convolution_windows(arrays["x"], weight.shape[-1]).transpose(1, 5, 6, 7, 0, 2, 3, 4)
    rows, slopes = windows[(channel, *tap)], gradient.swapaxes(0, 1)[out]
    n = len(places)
    return {"dweight": reference.dot(slopes.reshape(n, -1), rows.reshape(n, -1), arithmetic)}


# --------------------------------------------------------------------------------------------------
# Normalisation


def norms(images: Images) -> Iterator[Case]:
    """Instance normalisation in the project's two ways and layer normalisation, with gradients."""
    c, *space = NORM_SHAPE
    voxels = f"{c} channels {'x'.join(map(str, space))}"
    for (operator, size, shape, groups, units, normalise), kind in itertools.product(
        (
            ("group_norm", f"2 x {voxels}", (2, *NORM_SHAPE), c, 2 * c, torch_instance_norm),
            ("batch_norm", f"1 x {voxels}", (1, *NORM_SHAPE), None, c, torch_batch_norm),
            ("layer_norm", "64 x 256 features", (64, 256), 1, 64, torch_layer_norm),
        ),
        KINDS,
    ):
        yield Case(
            operator,
            size,
            kind,
            lambda shape=shape, kind=kind: norm_data(images, kind, shape),
            lambda tensors, normalise=normalise: torch_norm(tensors, normalise),
            lambda arrays, arithmetic, groups=groups: reference_norm(arrays, groups, arithmetic),
            {"y": units, "dx": units},
            quick=operator == "batch_norm" or kind in (RANDOM, IMAGE),
            channels_last=operator == "batch_norm",
        )


def norm_data(images: Images, kind: str, shape: tuple[int, ...]) -> Arrays:
    """Input, gradient of the output, scale and shift."""
    rng = np.random.default_rng(shape)
    rows = (shape[0], shape[1], int(np.prod(shape[2:]))) if len(shape) > 2 else shape
    if kind == IMAGE:
        x = norm_image(images, shape)
        gradient = sparse(rng, shape)
    else:
        x = draw(rng, kind, rows).reshape(shape)
        # Features of a row share its errors: with slopes of one sign so would all their gradients.
        slopes = RANDOM if kind == OFFSET or len(shape) == 2 else kind
        gradient = draw(rng, slopes, rows).reshape(shape)
    return {
        "x": x,
        "gradient": gradient,
        "scale": rng.uniform(0.5, 1.5, size=shape[1]),
        "shift": rng.normal(size=shape[1]),
    }


def norm_image(images: Images, shape: tuple[int, ...]) -> np.ndarray:
    """Convolved patches; for rows of features, those of neighbouring voxels."""
    if len(shape) > 2:
        maps = [images.features(shape[1], shape[2:], seed, False) for seed in range(shape[0])]
        return np.stack(maps)
    return images.features(shape[1], (4, 4, 4), 0, False).reshape(shape[1], -1).T[: shape[0]]


def torch_norm(tensors: Tensors, normalise: Callable) -> Tensors:
    """Forward, then backward."""
    wanted = [tensors[name].detach().requires_grad_() for name in ("x", "scale", "shift")]
    y = normalise(*wanted)
    gradients = torch.autograd.grad(y, wanted, tensors["gradient"])
    return {"y": y} | dict(zip(("dx", "dscale", "dshift"), gradients, strict=True))


def torch_instance_norm(x, scale, shift):
    return F.group_norm(x, x.shape[1], scale, shift)


def torch_batch_norm(x, scale, shift):
    return F.batch_norm(x, None, None, scale, shift, training=True)


def torch_layer_norm(x, scale, shift):
    return F.layer_norm(x, x.shape[1:], scale, shift)


def reference_norm(arrays: Arrays, groups: int | None, arithmetic: Arithmetic) -> Arrays:
    """Forward, then backward from the forward pass's own statistics."""
    x, scale, shift = arrays["x"], arrays["scale"], arrays["shift"]
    y, mean, inverse_std = reference.normalise(x, scale, shift, groups, arithmetic.at(0))
    gradients = reference.normalise_gradient(
        arrays["gradient"], x, mean, inverse_std, scale, groups, arithmetic.at(1)
    )
    return {"y": y} | dict(zip(("dx", "dscale", "dshift"), gradients, strict=True))


# --------------------------------------------------------------------------------------------------
# Softmax


def softs(images: Images) -> Iterator[Case]:
    """Softmax over 32 classes of 512 voxels, logits of standard deviation 3, and its gradient."""

    def arrays(kind):
        rng = np.random.default_rng(32)
        if kind == IMAGE:
            logits = images.features(32, (8, 8, 8), 32, False).reshape(32, -1).T
            logits = (logits - logits.mean()) / logits.std()
        else:
            logits = draw(rng, kind, (512, 32))
        gradient = draw(rng, RANDOM if kind == IMAGE else kind, (512, 32))
        return {"x": 3 * logits, "gradient": gradient}

    for kind in (RANDOM, POSITIVE, IMAGE):
        yield Case(
            "softmax",
            "512 x 32 classes",
            kind,
            lambda kind=kind: arrays(kind),
            torch_softmax,
            reference_softmax,
            {"y": 512, "dx": 512},
        )


def torch_softmax(tensors: Tensors) -> Tensors:
    """Forward, then backward."""
    x = tensors["x"].detach().requires_grad_()
    y = F.softmax(x, dim=1)
    return {"y": y, "dx": torch.autograd.grad(y, x, tensors["gradient"])[0]}


def reference_softmax(arrays: Arrays, arithmetic: Arithmetic) -> Arrays:
    """Forward, then backward from the forward pass's own result."""
    y = reference.softmax(arrays["x"], 1, arithmetic.at(0))
    return {"y": y, "dx": reference.softmax_gradient(arrays["gradient"], y, 1, arithmetic.at(1))}


# --------------------------------------------------------------------------------------------------
# A whole network


def small_network(images: Images, side: int) -> tuple[UNet, torch.Tensor]:
    """Build a narrow network whose logits have standard deviation 3, and a patch to segment.

    Returns
    -------
    network : in float32
    image : (1, 1, side, side, side) float32
    """
    network = build_network(NetworkShape(n_classes=4, channels=(8, 12, 16), rim_channels=4))
    image = torch.from_numpy(images.patch((side,) * 3, 0).copy())[None, None]
    with torch.no_grad():
        spread = float(network.train()(image).std())
        for parameter in (
            network.body_head.weight,
            network.body_head.bias,
            network.rim_head.weight,
        ):
            parameter.mul_(3 / spread)
    return network, image


def reference_network(
    network: UNet, image: np.ndarray, arithmetic: Arithmetic, by_slabs: bool = False
) -> np.ndarray:
    """`UNet.forward` with every instruction rounded.

    Parameters
    ----------
    network : float32 or float64
    image : (1, 1, X, Y, Z), same dtype
    arithmetic : how to round
    by_slabs : whether statistics are pooled from slabs, as the network does in inference

    Returns
    -------
    logits (1, K, X, Y, Z)
    """
    steps = (arithmetic.at(step) for step in itertools.count())

    def convolve(x, layer):
        bias = None if layer.bias is None else _array(layer.bias)
        return reference.conv3d(x, _array(layer.weight), bias, next(steps))

    def block(x, layers):
        x = convolve(x, layers[0])
        scale, shift = _array(layers[1].weight), _array(layers[1].bias)
        if by_slabs:
            return np.maximum(reference_norm_by_slabs(x, scale, shift, next(steps)), 0)
        return np.maximum(reference.normalise(x, scale, shift, None, next(steps))[0], 0)

    skips, x = [], _exactly(fold, image)
    for level, (first, second) in enumerate(network.encoder):
        x = block(block(x if level == 0 else _exactly(F.max_pool3d, x, 2), first), second)
        skips.append(x)
    skips.pop()
    for lateral, layers in zip(network.laterals, network.decoder, strict=True):
        x = _exactly(F.interpolate, convolve(x, lateral), scale_factor=2, mode="nearest")
        x = block(reference.add(x, skips.pop(), next(steps)), layers)
    fine = np.concatenate([_exactly(unfold, convolve(x, network.unfold)), image], axis=1)
    rim = convolve(block(fine, network.rim), network.rim_head)
    return reference.add(_exactly(unfold, convolve(x, network.body_head)), rim, next(steps))


def reference_norm_by_slabs(x, scale, shift, arithmetic: Arithmetic) -> np.ndarray:
    """`models.unet.InstanceNorm` without gradients: mean and variance pooled from slabs along X."""
    n_slabs, n_channels = x.shape[2], x.shape[1]
    slabs = x[0].swapaxes(0, 1).reshape(n_slabs * n_channels, -1)
    of_slabs = reference_variance({"x": slabs}, arithmetic.at(0))
    means, variances = (
        {"x": of_slabs[name].reshape(n_slabs, n_channels).T} for name in ("mean", "variance")
    )
    mean = reference_mean(means, arithmetic.at(1))["y"]
    between = reference_variance(means, arithmetic.at(2))["variance"]
    within = reference_mean(variances, arithmetic.at(3))["y"]
    variance = reference.add(within, between, arithmetic.at(4))
    variance = reference.add(variance, np.array(1e-5, x.dtype), arithmetic.at(5))
    deviation = reference.sqrt(variance, arithmetic.at(6))
    inverse = reference.divide(np.array(1, x.dtype), deviation, arithmetic.at(7))
    mean, inverse, scale, shift = (
        values.reshape(1, -1, 1, 1, 1) for values in (mean, inverse, scale, shift)
    )
    distance = reference.add(x, -mean, arithmetic.at(8))
    normal = reference.multiply(distance, inverse, arithmetic.at(9))
    return reference.multiply_add(normal, scale, shift, arithmetic.at(10))


def _array(parameter):
    return parameter.detach().contiguous().numpy()


def _exactly(operator, x, *args, **options):
    """Apply a torch operator that only moves or compares numbers."""
    return operator(torch.from_numpy(np.ascontiguousarray(x)), *args, **options).numpy()
