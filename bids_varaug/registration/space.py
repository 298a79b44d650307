"""The spaces and grids that images can be written in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SPACE = "MNI152NLin2009cAsym"
"""The one template whose labels are known (ICBM 152 2009c, nonlinear, asymmetric; Fonov et al. 2011)."""


@dataclass(frozen=True)
class Grid:
    """Voxels in the template's space."""

    shape: tuple[int, int, int]
    affine: np.ndarray  # (4, 4) float64, voxel -> mm, RAS+


def _grid(shape: tuple[int, int, int], origin: Sequence[float], size: float) -> Grid:
    affine = np.diag([size, size, size, 1.0])
    affine[:3, 3] = origin
    return Grid(shape, affine)


GRIDS = {
    1: _grid((193, 229, 193), (-96.0, -132.0, -78.0), 1.0),
    2: _grid((97, 115, 97), (-96.5, -132.5, -78.5), 2.0),
}
"""TemplateFlow's, by resolution: ``res`` in its template_description.json."""


@dataclass(frozen=True)
class OutputSpace:
    """A space and a resolution to write images in."""

    name: str
    resolution: int | None = None  # None is 1 mm, which names do not tell

    @classmethod
    def parse(cls, text: str) -> OutputSpace:
        """Read ``NAME`` or ``NAME:res-N``.

        >>> OutputSpace.parse("MNI152NLin2009cAsym:res-2")
        OutputSpace(name='MNI152NLin2009cAsym', resolution=2)
        """
        name, _, resolution = text.partition(":res-")
        return cls(name, int(resolution) if resolution else None)

    @property
    def grid(self) -> Grid:
        """Its voxels."""
        return GRIDS[self.resolution or 1]

    @property
    def entity(self) -> str:
        """What names of files have: ``_res-2``, or nothing."""
        return f"_res-{self.resolution}" if self.resolution else ""
