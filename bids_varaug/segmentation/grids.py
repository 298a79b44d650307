"""The grids on which a head may be segmented; without torch, so that wiring imports it at once."""

from __future__ import annotations

from itertools import product

import numpy as np

Offset = tuple[int, int, int]

# The network's body works on blocks of 2x2x2 voxels. A grid that lies a voxel further along some
# axes cuts the head into other blocks; there are eight ways to. Each choice holds both cuts of an
# axis equally often, and that of four both cuts of each pair of axes (half a factorial design).
GRIDS: dict[int, tuple[Offset, ...]] = {
    1: ((0, 0, 0),),
    2: ((0, 0, 0), (1, 1, 1)),
    4: ((0, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 0)),
    8: tuple(product((0, 1), repeat=3)),
}


def move_to_grid(image: np.ndarray, offset: Offset) -> np.ndarray:
    """Return an image on the grid that lies `offset` voxels further along each axis.

    Parameters
    ----------
    image : (X, Y, Z)
    offset : 0 or 1 along each axis

    Returns
    -------
    (X, Y, Z), whose voxel v is voxel v + `offset` of `image`; the plane that would lie beyond the
    last repeats it

    Examples
    --------
    >>> move_to_grid(np.arange(4).reshape(4, 1, 1), (1, 0, 0)).ravel().tolist()
    [1, 2, 3, 3]
    """
    inside = image[tuple(slice(start, None) for start in offset)]
    return np.pad(inside, [(0, start) for start in offset], mode="edge")
