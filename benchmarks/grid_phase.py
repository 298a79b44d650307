"""How far volumes move when the same image falls on the network's grid a little differently.

    python benchmarks/grid_phase.py T1W.nii.gz ... [--ensemble aseg31] [--grids 4]

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
from members import Members

from bids_varaug.machine import keep_freed_memory
from bids_varaug.models.ensemble import Ensemble, load_ensemble, select_members
from bids_varaug.models.weights import load_member
from bids_varaug.segmentation.shifts import GRIDS
from bids_varaug.training.monitor import PreparedHead


def count_voxels(t1w: Path, ensemble: Ensemble, members, n_grids: int) -> np.ndarray:
    """Volumes by some members, (M, K - 1) voxels of the network's grid."""
    finder = load_member(ensemble, ensemble.baseline)
    head = PreparedHead(t1w, finder, ensemble.voxel_size).head
    with tempfile.TemporaryDirectory() as folder:
        segmenter = Members(ensemble, head, n_grids, Path(folder))
        labels = (segmenter.segment(member).labels for member in members)
        n_classes = len(ensemble.labels)
        return np.array([np.bincount(x.ravel(), minlength=n_classes)[1:] for x in labels])


def volumes_by_phase(t1w: Path, ensemble: Ensemble, n_grids: int) -> np.ndarray:
    """Volumes by the baseline on the eight grids, (8, K - 1) voxels."""
    image, found = nib.load(t1w), []
    with tempfile.TemporaryDirectory() as folder:
        for first in product((0, 1), repeat=3):
            cropped = Path(folder) / "cropped_T1w.nii.gz"
            nib.save(image.slicer[tuple(slice(i, None) for i in first)], cropped)
            found.append(count_voxels(cropped, ensemble, [ensemble.baseline], n_grids)[0])
    return np.array(found)


def coefficient_of_variation(volumes: np.ndarray) -> np.ndarray:
    """Return the standard deviation (N - 1) over the mean, along the first axis."""
    return volumes.std(axis=0, ddof=1) / volumes.mean(axis=0)


def main() -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("heads", nargs="+", type=Path)
    parser.add_argument("--ensemble", default="aseg31")
    parser.add_argument("--grids", type=int, choices=tuple(GRIDS), default=4)
    options = parser.parse_args()
    keep_freed_memory()
    ensemble = load_ensemble(options.ensemble)
    seeds = select_members(ensemble, ["seed"])
    names = [label.name for label in ensemble.labels[1:]]
    print("image\tstructure\tvolume_mean\tcv_grid\tlargest_difference\tcv_seed")
    for t1w in options.heads:
        phases = volumes_by_phase(t1w, ensemble, options.grids)
        spread = np.ptp(phases, axis=0) / phases.mean(axis=0)
        columns = (
            phases.mean(axis=0) * ensemble.voxel_size**3,
            coefficient_of_variation(phases),
            spread,
            coefficient_of_variation(count_voxels(t1w, ensemble, seeds, options.grids)),
        )
        for name, volume, *shares in zip(names, *columns, strict=True):
            print(t1w.name, name, f"{volume:.0f}", *(f"{x:.4f}" for x in shares), sep="\t")
        means = (f"{column.mean():.4f}" for column in columns[1:])
        print(t1w.name, "mean", "", *means, sep="\t", flush=True)


if __name__ == "__main__":
    main()
