"""A posterior on disk: only the voxels that are not surely background, slab by slab."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from bids_varaug.segmentation.streams import PosteriorReader, PosteriorWriter

# Near the brain a voxel is stored unless its background probability exceeds 1 - BACKGROUND_CUT;
# left out, it counts as exactly background.
BACKGROUND_CUT = 1e-4


@dataclass(frozen=True)
class SparsePosterior:
    """Class probabilities on the head box.

    Attributes
    ----------
    labels : (X, Y, Z) uint8, most probable class
    offsets : (X + 1,) int64, rows of slab x are offsets[x]:offsets[x + 1]
    voxels : (N,) int32, place y * Z + z within its slab of each stored row, ascending
    posterior : (N, K) float32, sums to 1 over K
    """

    labels: np.ndarray
    offsets: np.ndarray
    voxels: np.ndarray
    posterior: np.ndarray


def save_posterior(path: Path, sparse: SparsePosterior, metadata: dict[str, str]) -> None:
    """Write one file, aside first and renamed; probabilities near 0 become 0 (see `packing`)."""
    writer = PosteriorWriter(path, sparse.labels.shape, sparse.posterior.shape[1], metadata)
    for start, stop in pairwise(sparse.offsets.tolist()):
        writer.write(sparse.voxels[start:stop], sparse.posterior[start:stop])
    writer.finish(sparse.labels)


def load_posterior(path: Path) -> SparsePosterior:
    """Read the whole of what `save_posterior`, the fusion or `average_grids` wrote.

    Raises
    ------
    UserError
        If the file is absent or damaged.
    """
    reader = PosteriorReader.open(path)
    posterior = np.empty((reader.offsets[-1], reader.n_classes), np.float32)
    voxels = np.empty(len(posterior), np.int32)
    labels = np.empty(reader.shape, np.uint8)
    for x, (start, stop) in enumerate(pairwise(reader.offsets.tolist())):
        slab, voxels[start:stop], posterior[start:stop] = reader.slab(x)
        labels[x] = slab.reshape(reader.shape[1:])
    return SparsePosterior(labels, reader.offsets, voxels, posterior)
