"""One member segments one head, with a given number of threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch

from bids_varaug.errors import ScanError
from bids_varaug.images.conform import Geometry
from bids_varaug.machine import keep_freed_memory, release_freed_memory, use_threads
from bids_varaug.models.ensemble import Member, load_ensemble
from bids_varaug.models.unet import UNet
from bids_varaug.models.weights import load_member
from bids_varaug.numerics import MonteCarloArithmetic
from bids_varaug.segmentation.localise import crop_to_brain
from bids_varaug.segmentation.posterior import load_posterior, save_posterior
from bids_varaug.segmentation.predict import segment_volume
from bids_varaug.segmentation.shifts import Offset, move_to_grid, shift_posterior


def segment_with_member(
    head: np.ndarray,
    ensemble_name: str,
    member: Member,
    out: Path,
    device: str,
    num_threads: int,
    offset: Offset = (0, 0, 0),
    shift: Path | None = None,
) -> None:
    """Load a member of the ensemble (or of `round_inference` of it), segment, and write its posterior to `out`.

    The head (X, Y, Z) is float32, on the network grid. `offset` is that of the grid to segment on, see `move_to_grid`,
    and `shift` a file of the change that several grids make, see `shift_posterior`; None adds nothing. `EnsembleError`
    if the weights are damaged, `ScanError` if the device runs out of memory.
    """
    with _network(ensemble_name, member, device, num_threads, head) as network:
        with arithmetic_of(member):
            sparse = segment_volume(network, move_to_grid(head, offset))
        if shift is not None:
            sparse = shift_posterior(sparse, load_posterior(shift))
        save_posterior(out, sparse)


def crop_with_member(
    head: np.ndarray, geometry: Geometry, ensemble_name: str, member: Member, device: str, num_threads: int
) -> tuple[np.ndarray, Geometry]:
    """Load a member and cut out what it takes for the brain; see `crop_to_brain`, raises as `segment_with_member`."""
    with _network(ensemble_name, member, device, num_threads, head) as network:
        return crop_to_brain(network, head, geometry)


@contextmanager
def _network(ensemble_name: str, member: Member, device: str, num_threads: int, head: np.ndarray) -> Iterator[UNet]:
    """Load a member; afterwards give back the memory that an idle worker would keep."""
    keep_freed_memory()
    use_threads(num_threads)
    try:
        yield load_member(load_ensemble(ensemble_name), member, device)
    except torch.OutOfMemoryError as error:
        raise ScanError(
            f"{device}: not enough memory for a head of {head.shape} voxels. Use --device cpu or a GPU with more "
            "memory."
        ) from error
    finally:
        release_freed_memory()


def arithmetic_of(member: Member) -> AbstractContextManager:
    """Return the arithmetic in which a member segments: plain, or random rounding of what torch computes.

    What comes before and after (resampling, fusion) runs in numpy, scipy and numba, and is never perturbed.
    """
    if not member.is_rounded:
        return nullcontext()
    return MonteCarloArithmetic(mode="rr", precision=member.precision, seed=member.seed)
