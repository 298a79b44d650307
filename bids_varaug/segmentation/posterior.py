"""A posterior on disk: only the voxels that are not surely background, slab by slab."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

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
    """Write one safetensors file, aside first and renamed."""
    partial = path.with_suffix(".partial")
    try:
        save_file(
            {
                "labels": sparse.labels,
                "offsets": sparse.offsets,
                "voxels": sparse.voxels,
                "posterior": sparse.posterior,
            },
            partial,
            metadata,
        )
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load_posterior(path: Path) -> SparsePosterior:
    """Read the whole of what `save_posterior` or the fusion wrote."""
    tensors = load_file(path)
    return SparsePosterior(**{name: tensors[name] for name in SparsePosterior.__annotations__})
