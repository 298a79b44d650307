"""A head of ellipsoids: both sides of cortex, white matter, ventricles and hippocampus."""

import nibabel as nib
import numpy as np
import pytest

SPACING = 2.0
# id left, id right, centre of the right one [mm from the middle], semi-axes [mm]; later covers.
PARTS = (
    (3, 42, (0, 0, 0), (46, 60, 46)),
    (2, 41, (0, 0, 0), (38, 52, 38)),
    (4, 43, (10, 0, 4), (7, 26, 9)),
    (17, 53, (22, -6, -16), (7, 16, 7)),
)


def ellipsoid(grid, centre, axes):
    return sum(((g - c) / a) ** 2 for g, c, a in zip(grid, centre, axes, strict=True)) <= 1


@pytest.fixture(scope="session")
def head():
    """(64, 80, 64) int16, FreeSurfer ids, RAS, 2 mm; 24 is the fluid around the brain."""
    shape = (64, 80, 64)
    grid = [SPACING * (g - (n - 1) / 2) for g, n in zip(np.indices(shape), shape, strict=True)]
    labels = np.where(ellipsoid(grid, (0, 0, 0), (51, 65, 51)), 24, 0).astype(np.int16)
    for left, right, (x, y, z), axes in PARTS:
        labels[ellipsoid(grid, (x, y, z), axes) & (grid[0] > 0)] = right
        labels[ellipsoid(grid, (-x, y, z), axes) & (grid[0] < 0)] = left
    return labels


@pytest.fixture(scope="session")
def head_file(head, tmp_path_factory):
    path = tmp_path_factory.mktemp("template") / "labels.nii.gz"
    nib.save(nib.Nifti1Image(head, np.diag([SPACING] * 3 + [1])), path)
    return path
