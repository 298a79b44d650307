"""Where a head box lies: all that is needed to bring its maps back to the T1w's own grid."""

from __future__ import annotations

import json
from dataclasses import dataclass
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
        values = {
            "voxel_size": self.voxel_size,
            "box": [list(self.box.start), list(self.box.shape)],
            "conformed_shape": list(self.conformed_shape),
            "conformed_affine": self.conformed_affine.tolist(),
            "native_shape": list(self.native_shape),
            "native_affine": self.native_affine.tolist(),
            "foreground_volume": self.foreground_volume,
            "warnings": list(self.warnings),
        }
        path.write_text(json.dumps(values), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Geometry:
        """Read what `save` wrote."""
        values = json.loads(path.read_text(encoding="utf-8"))
        start, shape = (tuple(part) for part in values["box"])
        return cls(
            voxel_size=values["voxel_size"],
            box=Box(start=start, shape=shape),
            conformed_shape=tuple(values["conformed_shape"]),
            conformed_affine=np.array(values["conformed_affine"]),
            native_shape=tuple(values["native_shape"]),
            native_affine=np.array(values["native_affine"]),
            foreground_volume=values["foreground_volume"],
            warnings=tuple(values["warnings"]),
        )
