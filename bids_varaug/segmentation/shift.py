"""What the baseline gains from several grids, given to the other members.

Where a head lies on the grid moves the volumes of members that share most of their training nearly
alike. A member's posterior is therefore moved by what several grids change in the baseline's: a
control variate, which costs the passes of one member and leaves what members differ by as it is.
"""

from __future__ import annotations

import numpy as np

from bids_varaug.machine import compiled
from bids_varaug.segmentation.posterior import SparsePosterior


def shift_posterior(sparse: SparsePosterior, shift: SparsePosterior) -> SparsePosterior:
    """Add a change of the posterior, as of `average_grids`.

    Below 0 is set to 0, and what is left scaled to sum to 1.

    Parameters
    ----------
    sparse : a member's
    shift : the same box and classes; its `posterior` sums to 0 over K, its labels do not count

    Returns
    -------
    SparsePosterior
        A voxel is stored if it is in either.
    """
    shape, n_classes = sparse.labels.shape, sparse.posterior.shape[1]
    rows, changes = _row_numbers(sparse), _row_numbers(shift)
    stored = (rows >= 0) | (changes >= 0)
    by_slab = stored.reshape(shape[0], -1)
    posterior = np.empty((np.count_nonzero(stored), n_classes), np.float32)
    chosen = np.empty(len(posterior), np.uint8)
    _fill(posterior, chosen, sparse.posterior, shift.posterior, rows[stored], changes[stored])
    labels = np.zeros(shape, np.uint8)
    labels[stored] = chosen
    return SparsePosterior(
        labels=labels,
        offsets=np.concatenate([[0], np.cumsum(by_slab.sum(axis=1))]).astype(np.int64),
        voxels=by_slab.nonzero()[1].astype(np.int32),
        posterior=posterior,
    )


def _row_numbers(sparse: SparsePosterior) -> np.ndarray:
    """Return the row of each voxel, -1 where none is stored: (X, Y, Z) int32."""
    numbers = np.full(sparse.labels.shape, -1, np.int32)
    slabs = np.repeat(np.arange(len(numbers)), np.diff(sparse.offsets))
    numbers.reshape(len(numbers), -1)[slabs, sparse.voxels] = np.arange(len(sparse.voxels))
    return numbers


@compiled()
def _fill(posterior, chosen, members, changes, member_rows, change_rows):
    """Add row by row; what a member does not store (-1) is background for sure."""
    n_classes = posterior.shape[1]
    for u in range(len(posterior)):
        total = np.float32(0)
        best = 0
        for k in range(n_classes):
            if member_rows[u] >= 0:
                value = members[member_rows[u], k]
            else:
                value = np.float32(1.0 if k == 0 else 0.0)
            if change_rows[u] >= 0:
                value = max(value + changes[change_rows[u], k], np.float32(0))
            posterior[u, k] = value
            total += value
            if value > posterior[u, best]:
                best = k
        chosen[u] = best
        if change_rows[u] >= 0:
            for k in range(n_classes):
                posterior[u, k] /= total
