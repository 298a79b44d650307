"""One member segments one head, with a given number of threads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from bids_varaug.errors import ScanError
from bids_varaug.models.ensemble import load_ensemble, load_member
from bids_varaug.models.memory import keep_freed_memory, release_freed_memory
from bids_varaug.segmentation.posterior import save_posterior
from bids_varaug.segmentation.predict import segment_volume


def segment_with_member(
    head: np.ndarray, ensemble_name: str, member_id: str, out: Path, device: str, num_threads: int
) -> None:
    """Load a member, segment, and write its posterior to `out`.

    Parameters
    ----------
    head : (X, Y, Z) float32, head box on the network grid

    Raises
    ------
    EnsembleError
        If the member's weights are damaged.
    ScanError
        If the device runs out of memory.
    """
    keep_freed_memory()
    torch.set_num_threads(num_threads)
    ensemble = load_ensemble(ensemble_name)
    member = next(m for m in ensemble.members if m.id == member_id)
    network = load_member(ensemble, member, device)
    try:
        sparse = segment_volume(network, head)
    except torch.OutOfMemoryError as error:
        raise ScanError(
            f"{device}: not enough memory for a head of {head.shape} voxels. Use --device cpu or a "
            "GPU with more memory."
        ) from error
    save_posterior(
        out, sparse, {"member": member.id, "family": member.family, "sha256": member.sha256}
    )
    del network, sparse
    release_freed_memory()
