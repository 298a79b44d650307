"""A small template, a head that is the template moved by a known transform, and its posterior."""

from dataclasses import dataclass

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from bids_varaug.images.conform import Box, Geometry
from bids_varaug.registration.space import Grid
from bids_varaug.registration.template import Template
from bids_varaug.segmentation.fuse import SparsePosterior, sparse_rows

SHAPE = (41, 45, 43)
CENTRES = np.array([[0, 0, 0], [14, 4, 0], [-14, 4, 2], [0, -16, 4], [2, 14, -12], [-4, 0, 14]], float)


def blobs(points: np.ndarray) -> np.ndarray:
    """Classes of points (N, 3), mm: balls of 9 mm around `CENTRES`, 20 mm around the first."""
    distances = np.linalg.norm(points[:, None] - CENTRES, axis=2) - np.array([11, 0, 0, 0, 0, 0])
    nearest = distances.argmin(axis=1)
    return np.where(distances.min(axis=1) < 9, nearest + 1, 0).astype(np.uint8)


def grid_points(shape, affine) -> np.ndarray:
    voxels = np.indices(shape).reshape(3, -1).T
    return voxels @ affine[:3, :3].T + affine[:3, 3]


@pytest.fixture(scope="session")
def template() -> Template:
    affine = np.diag([2.0, 2, 2, 1])
    affine[:3, 3] = -np.array(SHAPE) + 1.0
    labels = blobs(grid_points(SHAPE, affine)).reshape(SHAPE)
    return Template(labels, Grid(SHAPE, affine))


@dataclass(frozen=True)
class Head:
    affine: np.ndarray  # template mm -> head mm
    sparse: SparsePosterior
    geometry: Geometry


def make_head(affine: np.ndarray, bend: float = 0.0) -> Head:
    """The template under an affine, after waves of up to `bend` mm along x; hard posterior on 2 mm voxels."""
    shape, box = (64, 64, 64), np.diag([2.0, 2, 2, 1])
    box[:3, 3] = affine[:3, 3] - 63
    points = (grid_points(shape, box) - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T
    points[:, 0] += bend * np.cos(points[:, 1] / 6)
    classes = blobs(points)
    posterior = np.eye(7, dtype=np.float32)[classes]
    stored = classes > 0
    sparse = SparsePosterior(classes.reshape(shape), sparse_rows(posterior[stored], stored))
    geometry = Geometry(2.0, Box((0, 0, 0), shape), shape, box, shape, box, 1e6, ())
    return Head(affine, sparse, geometry)


@pytest.fixture(scope="session")
def turned() -> np.ndarray:
    """An affine: 12 degrees about an oblique axis, scales of 0.9 to 1.15, 30 mm."""
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_rotvec([0.1, -0.05, 0.18]).as_matrix() @ np.diag([0.9, 1.15, 1.05])
    affine[:3, 3] = (30, -12, 7)
    return affine


@pytest.fixture(scope="session")
def head(turned) -> Head:
    return make_head(turned, bend=3.5)
