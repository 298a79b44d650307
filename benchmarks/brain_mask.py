"""The brain mask beside those of other programs, by radius of the closing and rim.

    python benchmarks/brain_mask.py T1W.nii.gz ... --cache DIR [--radii 6 10] [--rims 0 1 2]

The baseline segments each image once; labels stay in DIR. References:

``deepbet``
    mask of deepbet (Fisch et al. 2024, doi:10.1016/j.compbiomed.2024.108845; PyPI, weights included), where it is
    installed;
``aseg``
    all voxels of FreeSurfer's aseg, filled, where ``derivatives/`` of the dataset has it: structures alone;
``MaskVol``, ``eTIV``
    of FreeSurfer's aseg.stats there, ml.

For each radius and rim [mm] (radius 0: the structures, filled): volume [ml], Dice with deepbet, share of deepbet's mask
that is covered and share of ours outside of it, share of the aseg that is covered.
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from heads import print_markdown
from nibabel.orientations import apply_orientation, io_orientation, ornt_transform

import bids_varaug
from bids_varaug.images.load import voxel_volume
from bids_varaug.segmentation.brain import depth_of_brain, fill_holes

TO_ML = 1e-3


def segment(t1w: Path, cache: Path) -> nib.Nifti1Image:
    """Labels of the baseline on the image's grid."""
    path = cache / t1w.name.replace("_T1w", "_dseg")
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        nib.save(bids_varaug.segment(t1w, members="ieee").labels, path)
    return nib.load(path)


def deepbet_mask(t1w: Path, cache: Path, like: nib.Nifti1Image) -> np.ndarray | None:
    """Mask of deepbet on the grid of `like`, None where it is not installed."""
    try:
        from deepbet import run_bet
    except ImportError:
        return None
    path = cache / t1w.name.replace("_T1w", "_deepbet")
    if not path.exists():
        run_bet([str(t1w)], mask_paths=[str(path)], no_gpu=True)
    mask = nib.load(path)  # of RAS orientation
    turn = ornt_transform(io_orientation(mask.affine), io_orientation(like.affine))
    return apply_orientation(np.asarray(mask.dataobj) > 0, turn)


def freesurfer(t1w: Path) -> tuple[np.ndarray | None, dict[str, float]]:
    """Filled aseg on the image's grid, and measures [ml] of its statistics."""
    stem = t1w.name.split("_T1w")[0]
    for folder in t1w.parents:
        for aseg in folder.glob(f"derivatives/*/**/{stem}_desc-aseg_dseg.nii.gz"):
            lines = (aseg.parents[1] / "aseg.stats").read_text().splitlines()
            fields = [line.split(", ") for line in lines if line.startswith("# Measure")]
            wanted = {f[1]: float(f[3]) * TO_ML for f in fields if f[1] in ("MaskVol", "eTIV")}
            return fill_holes(np.asarray(nib.load(aseg).dataobj) > 0), wanted
    return None, {}


def compare(t1w: Path, cache: Path, shapes: list[tuple[float, float]]) -> list[dict]:
    """Rows of one image, a row for each radius and rim."""
    image = segment(t1w, cache)
    structures = np.asarray(image.dataobj) > 0
    voxel, size = voxel_volume(image.affine) * TO_ML, float(np.mean(image.header.get_zooms()[:3]))
    other, (aseg, measures) = deepbet_mask(t1w, cache, image), freesurfer(t1w)
    rows = []
    for radius, rim in shapes:
        depth = depth_of_brain(structures, size, radius, rim)
        mask = fill_holes(structures | (depth > 0))
        row = {"head": t1w.name.split("_T1w")[0], "radius": radius, "rim": rim, "volume": mask.sum() * voxel}
        if other is not None:
            shared = (mask & other).sum()
            row |= {
                "deepbet": other.sum() * voxel, "dice": 2 * shared / (mask.sum() + other.sum()),
                "covered": shared / other.sum(), "outside": 1 - shared / mask.sum(),
            }  # fmt: skip
        if aseg is not None:
            row["aseg_covered"] = (mask & aseg).sum() / aseg.sum()
        rows.append(row | measures)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path, nargs="+")
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--radii", type=float, nargs="+", default=[6, 10])
    parser.add_argument("--rims", type=float, nargs="+", default=[0, 1, 2])
    given = parser.parse_args()
    shapes = [(0.0, 0.0), *product(given.radii, given.rims)]
    table = pd.DataFrame([row for t1w in given.images for row in compare(t1w, given.cache, shapes)])
    print_markdown(table.set_index("head"))
    print_markdown(table.groupby(["radius", "rim"]).mean(numeric_only=True))


if __name__ == "__main__":
    main()
