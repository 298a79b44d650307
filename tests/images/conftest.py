from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest

from bids_varaug.images.conform import Box, Geometry


def grids(conformed_affine, conformed_shape, native_affine, native_shape, box=None):
    """A geometry with these grids; the box is the whole conformed grid by default."""
    box = box or Box((0, 0, 0), tuple(conformed_shape))
    conformed_affine = np.asarray(conformed_affine, float)
    return Geometry(1.0, box, tuple(conformed_shape), conformed_affine, tuple(native_shape),
                    np.asarray(native_affine, float), 0.0, ())  # fmt: skip


@pytest.fixture
def head():
    """A bright ellipsoid 80 x 90 x 84 mm with noise around it, (96, 104, 100) float32, 1 mm."""
    shape = (96, 104, 100)
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij"))
    inside = ((grid / np.array([0.83, 0.87, 0.84])[:, None, None, None]) ** 2).sum(0) < 1
    return (100 * inside + rng.rayleigh(5, shape)).astype(np.float32)


@pytest.fixture
def save(tmp_path):
    """Write an array as NIfTI and return its path."""

    def write(data, affine=None, name="sub-01_T1w.nii.gz"):
        path = tmp_path / name
        nib.save(nib.Nifti1Image(data, np.eye(4) if affine is None else affine), path)
        return path

    return write
