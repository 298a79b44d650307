"""Register one posterior: affine from barycentres, then the deformation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from bids_varaug.errors import ScanError
from bids_varaug.images.conform import Geometry
from bids_varaug.machine import use_threads
from bids_varaug.registration.affine import barycentres, fit_affine, one_hot
from bids_varaug.registration.template import Template, load_template
from bids_varaug.registration.transforms import Registration
from bids_varaug.registration.velocity import coefficient_shape, fit_velocity
from bids_varaug.segmentation.fuse import SparsePosterior, load_posterior


def register_posterior(
    sparse: SparsePosterior, geometry: Geometry, template: Template, n_iterations: int, start: np.ndarray | None = None
) -> Registration:
    """Register a posterior on the head box to the template; without iterations it is the affine and `start` alone.

    `start` are coefficients of a velocity to begin with, see `registration.velocity`. ValueError, with the reason, if
    the segmentation determines no affine.
    """
    n_classes = sparse.rows.shape[1]
    to_box = np.eye(4)
    to_box[:3, 3] = geometry.box.start
    head_mass, head = barycentres(sparse.rows, sparse.labels.shape, geometry.conformed_affine @ to_box)
    labels, grid = template.labels, template.grid
    mass, points = barycentres(one_hot(labels, n_classes), labels.shape, grid.affine)
    affine = fit_affine(points, head, mass, head_mass)
    if n_iterations == 0:
        return Registration(affine, np.zeros(coefficient_shape(grid.shape), np.float32) if start is None else start)
    # The template's voxels, brought to the head by the affine, are a grid as any other.
    pulled = replace(geometry, native_shape=grid.shape, native_affine=affine @ grid.affine)
    moving = np.zeros((*grid.shape, n_classes), np.uint8)
    sparse.to_native(pulled, moving)
    return Registration(affine, fit_velocity(moving, labels, n_iterations, start))


def register_file(
    posterior: Path, geometry: Path, label_ids: list[int], n_iterations: int, name: str, out: Path
) -> None:
    """Register the posterior in a file and write `out`; ScanError that tells `name` if it determines no affine.

    On one thread, whatever the machine has: sums of several would have other bits, and there are many members.
    """
    use_threads(1)
    template = load_template(label_ids)
    try:
        registration = register_posterior(load_posterior(posterior), Geometry.load(geometry), template, n_iterations)
    except ValueError as error:
        raise ScanError(
            f"{name}: cannot be registered to the template: {error}. Look at its segmentation: run without "
            "--output-spaces, or leave the image out with --bids-filter-file."
        ) from error
    registration.save(out)
