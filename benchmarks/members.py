"""Members on one head as the program runs them: the baseline on several grids, then the others."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bids_varaug.models.ensemble import Ensemble, Member
from bids_varaug.models.weights import load_member
from bids_varaug.segmentation.posterior import SparsePosterior, load_posterior, save_posterior
from bids_varaug.segmentation.predict import segment_volume
from bids_varaug.segmentation.shifts import GRIDS, average_grids, move_to_grid, shift_posterior


class Members:
    """Segments one head with any member.

    Parameters
    ----------
    ensemble : Ensemble
    head : (X, Y, Z) float32, head box on the network grid
    n_grids : one of `GRIDS`
    folder : scratch space
    finder : who segments it on all grids; the baseline where it is None
    """

    def __init__(
        self,
        ensemble: Ensemble,
        head: np.ndarray,
        n_grids: int,
        folder: Path,
        finder: Member | None = None,
    ):
        self._ensemble, self._head = ensemble, head
        self._finder = finder or ensemble.baseline or ensemble.members[0]
        self._mean = self._shift = None
        if n_grids == 1:
            return
        network = load_member(ensemble, self._finder)
        paths = []
        for number, offset in enumerate(GRIDS[n_grids]):
            paths.append(folder / f"grid{number}.safetensors")
            save_posterior(paths[-1], segment_volume(network, move_to_grid(head, offset)), {})
        files = folder / "grids.safetensors", folder / "shift.safetensors"
        average_grids(paths, GRIDS[n_grids], *files)
        self._mean, self._shift = map(load_posterior, files)

    def segment(self, member: Member) -> SparsePosterior:
        """Return its posterior."""
        if self._mean is not None and member == self._finder:
            return self._mean
        sparse = segment_volume(load_member(self._ensemble, member), self._head)
        return sparse if self._shift is None else shift_posterior(sparse, self._shift)
