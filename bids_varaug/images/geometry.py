"""Where a head box lies: all that is needed to bring its maps back to the T1w's own grid."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from bids_varaug.images.crop import Box


@dataclass(frozen=True)
class Geometry:
    """The grids of one scan.

    Attributes
    ----------
    voxel_size : of the conformed grid, mm
    box : the head box in the conformed grid, or the part of it that holds the brain
    conformed_shape, native_shape : voxels
    conformed_affine, native_affine : (4, 4) float64, voxel -> mm, RAS+ world
    foreground_volume : of the head, or of the brain in a brain-extracted image, mm3
    warnings : what the image's grid and field of view say against it
    """

    voxel_size: float
    box: Box
    conformed_shape: tuple[int, int, int]
    conformed_affine: np.ndarray
    native_shape: tuple[int, int, int]
    native_affine: np.ndarray
    foreground_volume: float
    warnings: tuple[str, ...]

    def save(self, path: Path) -> None:
        """Write as JSON; numbers survive to the last bit."""
        path.write_text(json.dumps(asdict(self), default=np.ndarray.tolist), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Geometry:
        """Read what `save` wrote."""
        values = json.loads(path.read_text(encoding="utf-8"))
        values["box"] = Box(*map(tuple, values["box"].values()))
        for name, value in values.items():
            if name.endswith("_affine"):
                values[name] = np.array(value)
            elif isinstance(value, list):
                values[name] = tuple(value)
        return cls(**values)
