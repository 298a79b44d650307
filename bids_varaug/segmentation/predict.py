"""One network segments one head: locate the brain, classify its voxels, write the posterior."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import label, maximum_filter
from scipy.sparse import csr_array, diags_array, vstack

from bids_varaug.errors import ScanError
from bids_varaug.images.conform import Box, Geometry, bounds, enclose, extract
from bids_varaug.images.intensity import normalise_intensity
from bids_varaug.machine import keep_freed_memory, release_freed_memory, use_threads
from bids_varaug.models.ensemble import Member, load_ensemble
from bids_varaug.models.fastsurfer import load_planes
from bids_varaug.models.fastsurfer_labels import IDS
from bids_varaug.models.unet import Features, UNet, load_member
from bids_varaug.numerics import MonteCarloArithmetic
from bids_varaug.segmentation.fastsurfer import WHITE
from bids_varaug.segmentation.fuse import BACKGROUND_CUT, SparsePosterior, save_posterior, sparse_rows
from bids_varaug.segmentation.slices import segment_slices

SLABS = 8  # at once
RIM = 4  # voxels around the brain whose posterior is kept


@torch.inference_mode()
def segment_volume(network: UNet, image: np.ndarray) -> SparsePosterior:
    """Return the class posterior of one head.

    `image` is (X, Y, Z) float32 of any unit, the head box on the network grid, RAS; sides are multiples of
    ``network.shape.multiple``, else that is a ValueError. `network` is in evaluation mode, on the device to use.

    What is not connected with the brain (specks in neck, scalp and meninges) becomes sure background, and so does
    everything more than `RIM` voxels away from it. The last layer runs a few slabs at a time, of which only voxels
    stay that are not surely background: the dense posterior (1 GB for a whole head and 32 classes) never exists.

    Within `MonteCarloArithmetic` what torch computes is perturbed: intensities, network, softmax. The largest component
    and its surroundings are found by scipy, exactly.
    """
    if image.ndim != 3 or any(side % network.shape.multiple for side in image.shape):
        raise ValueError(f"image of shape {image.shape}: sides must be multiples of {network.shape.multiple}")
    device = next(network.parameters()).device
    tensor = normalise_intensity(torch.from_numpy(np.ascontiguousarray(image)).to(device))
    features = network.features_by_slabs(tensor[None, None])
    parts = [_classify(network, part) for part in features.by_slabs(SLABS)]
    del features
    labels = np.concatenate([part for part, _ in parts])
    rows = vstack([part for _, part in parts], format="csr")
    del parts
    found = labels > 0
    brain = largest_component(found)
    labels[~brain] = 0
    # A speck beside the brain goes with its posterior: the consensus would bring it back.
    near = maximum_filter(brain.view(np.uint8), size=2 * RIM + 1).astype(bool) & (brain | ~found)
    rows = diags_array(near.ravel().astype(np.float32)) @ rows
    rows.eliminate_zeros()
    return SparsePosterior(labels, rows)


def _classify(network: UNet, part: Features) -> tuple[np.ndarray, csr_array]:
    """Return labels (S, Y, Z) uint8 and sparse rows of a few slabs."""
    logits = network.classify(part)[0].movedim(0, -1)
    posterior = F.softmax(logits, dim=-1).flatten(0, 2)
    stored = posterior[:, 0] <= 1 - BACKGROUND_CUT
    labels = logits.argmax(-1).to(torch.uint8)
    rows = sparse_rows(posterior[stored].cpu().numpy(), stored.cpu().numpy())
    return labels.cpu().numpy(), rows


def largest_component(mask: np.ndarray) -> np.ndarray:
    """Keep the largest face-connected part of a mask (X, Y, Z) bool.

    >>> largest_component(np.array([[[1, 1, 0, 1]]], bool)).astype(int).tolist()
    [[[1, 1, 0, 0]]]
    """
    parts, n_parts = label(mask)
    if n_parts < 2:
        return mask.copy()
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    return parts == sizes.argmax()


MARGIN_MM = 8.0
"""Beyond what is found at half the resolution, on each side, before the sides are rounded up."""
_PLAUSIBLE_CM3 = (400.0, 2500.0)


def localise_brain(network: UNet, head: np.ndarray, voxel_size: float) -> Box:
    """Return the part of a head box that holds the brain.

    The network, which has seen images of both in training, segments the head (as the image of `segment_volume`, with
    voxels of `voxel_size` mm) at half the resolution: an eighth of the time. What it finds is enlarged by `MARGIN_MM`
    and to sides that the network takes. Where that is no brain by its size (400 to 2500 cm3), the whole head is
    returned.
    """
    multiple = network.shape.multiple
    half = F.avg_pool3d(torch.from_numpy(np.ascontiguousarray(head))[None], 2)[0].numpy()
    # Empty voxels after it, to two multiples at least: the network cannot normalise a level of one voxel.
    missing = [max(-side % multiple, 2 * multiple - side) for side in half.shape]
    brain = segment_volume(network, np.pad(half, [(0, n) for n in missing])).labels > 0
    low_cm3, high_cm3 = _PLAUSIBLE_CM3
    if not low_cm3 <= brain.sum() * (2 * voxel_size) ** 3 / 1000 <= high_cm3:
        return Box((0, 0, 0), head.shape)
    margin = round(MARGIN_MM / voxel_size)
    low, high = bounds(brain)
    return enclose(2 * low - margin, 2 * high + margin, head.shape, multiple)


def crop_to_brain(network: UNet, head: np.ndarray, geometry: Geometry) -> tuple[np.ndarray, Geometry]:
    """Cut the part that holds the brain out of a head box (see `localise_brain`); returns it and its geometry."""
    part = localise_brain(network, head, geometry.voxel_size)
    return extract(head, part), replace(geometry, box=part.within(geometry.box))


def segment_with_member(
    head: np.ndarray, geometry: Geometry, ensemble_name: str, member: Member, out: Path, device: str, num_threads: int
) -> None:
    """Load a member of the ensemble (or of `round_inference` of it), segment, and write its posterior to `out`.

    The head (X, Y, Z) is float32, on the network grid; for FastSurfer, it is the volume of
    `images.fastsurfer.prepare_volume`. `EnsembleError` if the weights are damaged, `ScanError` if the device runs out
    of memory.
    """
    ensemble = load_ensemble(ensemble_name)
    with _computing(device, num_threads, head):
        if ensemble.is_fastsurfer:
            planes = load_planes(ensemble, member, device)
            sparse = segment_slices(planes, head, geometry.voxel_size, geometry.box, arithmetic_of(member))
            _warn_of_missing_white(sparse, member)
        else:
            network = load_member(ensemble, member, device)
            with arithmetic_of(member):
                sparse = segment_volume(network, head)
        save_posterior(out, sparse)


def _warn_of_missing_white(sparse: SparsePosterior, member: Member) -> None:
    missing = [str(white) for white in WHITE if not (sparse.labels == IDS.index(white)).any()]
    if missing:
        found = f"no voxel has label {' or '.join(missing)}, the white matter of a side"
        print(f"WARNING: {member.id}: {found}: cortex that both sides share is all given to the left.", file=sys.stderr)


def crop_with_member(
    head: np.ndarray, geometry: Geometry, ensemble_name: str, member: Member, device: str, num_threads: int
) -> tuple[np.ndarray, Geometry]:
    """Load a member and cut out what it takes for the brain; see `crop_to_brain`, raises as `segment_with_member`."""
    with _computing(device, num_threads, head):
        return crop_to_brain(load_member(load_ensemble(ensemble_name), member, device), head, geometry)


@contextmanager
def _computing(device: str, num_threads: int, head: np.ndarray) -> Iterator[None]:
    """Use threads and memory as a worker should; afterwards give back the memory that an idle one would keep."""
    keep_freed_memory()
    use_threads(num_threads)
    try:
        yield
    except torch.OutOfMemoryError as error:
        need = f"not enough memory for a head of {head.shape} voxels"
        raise ScanError(f"{device}: {need}. Use --device cpu or a GPU with more memory.") from error
    finally:
        release_freed_memory()


def arithmetic_of(member: Member) -> AbstractContextManager:
    """Return the arithmetic in which a member segments: plain, or random rounding of what torch computes.

    What comes before and after (resampling, fusion) runs in numpy, scipy and numba, and is never perturbed.
    """
    if not member.is_rounded:
        return nullcontext()
    return MonteCarloArithmetic(mode="rr", precision=member.precision, seed=member.seed)
