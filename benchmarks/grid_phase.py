"""How far volumes move when the same image falls on the network's grid a little differently.

    python benchmarks/grid_phase.py T1W.nii.gz ... [--ensemble aseg31] [--grids 2]

Each image is segmented by the baseline eight times: as it is, and without the first plane of voxels
along one, two or all three axes, which takes nothing of a head away and moves the network's grid by
half a voxel of the image, or its blocks of 2x2x2 voxels by one where the image has the network's
voxel size. Prints the coefficient of variation of each structure's volume over the eight beside
that over the `seed` members on the image as it is, and the means over structures.
"""

from __future__ import annotations

import argparse
import tempfile
from itertools import product
from pathlib import Path

import nibabel as nib
import numpy as np

from bids_varaug.models.ensemble import Ensemble, load_ensemble, select_members
from bids_varaug.models.load import load_member
from bids_varaug.models.memory import keep_freed_memory
from bids_varaug.segmentation.grids import segment_on_grids
from bids_varaug.training.monitor import PreparedHead


def count_voxels(head: PreparedHead, network, n_classes: int, n_grids: int) -> np.ndarray:
    """Volume of each structure in voxels of the network's grid, (K - 1,)."""
    labels = segment_on_grids(network, head.head, n_grids).labels
    return np.bincount(labels.ravel(), minlength=n_classes)[1:]


def volumes_by_phase(t1w: Path, ensemble: Ensemble, n_grids: int) -> np.ndarray:
    """Volumes by the baseline on the eight grids, (8, K - 1) voxels."""
    network = load_member(ensemble, ensemble.baseline)
    image, found = nib.load(t1w), []
    with tempfile.TemporaryDirectory() as folder:
        for first in product((0, 1), repeat=3):
            cropped = Path(folder) / "cropped_T1w.nii.gz"
            nib.save(image.slicer[tuple(slice(i, None) for i in first)], cropped)
            head = PreparedHead(cropped, network, ensemble.voxel_size)
            found.append(count_voxels(head, network, len(ensemble.labels), n_grids))
    return np.array(found)


def volumes_by_seed(t1w: Path, ensemble: Ensemble, n_grids: int) -> np.ndarray:
    """Volumes by the `seed` members, (M, K - 1) voxels."""
    finder = load_member(ensemble, ensemble.baseline)
    head = PreparedHead(t1w, finder, ensemble.voxel_size)
    networks = (load_member(ensemble, m) for m in select_members(ensemble, ["seed"]))
    return np.array([count_voxels(head, n, len(ensemble.labels), n_grids) for n in networks])


def coefficient_of_variation(volumes: np.ndarray) -> np.ndarray:
    """Return the standard deviation (N - 1) over the mean, along the first axis."""
    return volumes.std(axis=0, ddof=1) / volumes.mean(axis=0)


def main() -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("heads", nargs="+", type=Path)
    parser.add_argument("--ensemble", default="aseg31")
    parser.add_argument("--grids", type=int, choices=(1, 2), default=1)
    options = parser.parse_args()
    keep_freed_memory()
    ensemble = load_ensemble(options.ensemble)
    names = [label.name for label in ensemble.labels[1:]]
    print("image\tstructure\tvolume_mean\tcv_grid\tlargest_difference\tcv_seed")
    for t1w in options.heads:
        phases = volumes_by_phase(t1w, ensemble, options.grids)
        spread = np.ptp(phases, axis=0) / phases.mean(axis=0)
        columns = (
            phases.mean(axis=0) * ensemble.voxel_size**3,
            coefficient_of_variation(phases),
            spread,
            coefficient_of_variation(volumes_by_seed(t1w, ensemble, options.grids)),
        )
        for name, volume, *shares in zip(names, *columns, strict=True):
            print(t1w.name, name, f"{volume:.0f}", *(f"{x:.4f}" for x in shares), sep="\t")
        means = (f"{column.mean():.4f}" for column in columns[1:])
        print(t1w.name, "mean", "", *means, sep="\t", flush=True)


if __name__ == "__main__":
    main()
