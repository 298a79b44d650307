"""Dice of every member and of the consensus against label maps; are the members equivalent?

    python benchmarks/accuracy.py IMAGES_DIR ... [--ensemble aseg31] [--members ieee mca seed]
        [--harmonise] [--grids 4]

Each IMAGES_DIR holds ``*_T1w.nii.gz`` with a ``*_dseg.nii.gz`` (FreeSurfer ids) beside each: real
images, or those of ``benchmarks/synthetic_heads.py``. With ``--harmonise`` FreeSurfer's choroid
plexus counts as lateral ventricle, and its corpus callosum and hypointensities do not count.

Prints a TSV with one row for each image and member (mean over the structures present), and one for
each image and structure of the consensus; then, on the standard error, each member's difference
from the baseline over the images, with a 90 % confidence interval and the p-value of two one-sided
t-tests (Schuirmann 1987) against a difference of `--margin` or more.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
from aseg import harmonise
from members import Members
from scipy import stats

from bids_varaug.machine import keep_freed_memory
from bids_varaug.models.ensemble import BASELINE, Ensemble, load_ensemble, select_members
from bids_varaug.models.weights import load_member
from bids_varaug.segmentation.fuse import fuse_members
from bids_varaug.segmentation.posterior import save_posterior
from bids_varaug.segmentation.shifts import GRIDS
from bids_varaug.training.monitor import LabelledImage, PreparedImage, find_labelled_images


def score(
    image: LabelledImage, ensemble: Ensemble, members, folder: Path, options: argparse.Namespace
) -> dict[str, float]:
    """Print the rows of one image; return the mean Dice of each member."""
    name = image.t1w.name.split("_T1w")[0]
    finder = load_member(ensemble, ensemble.baseline or ensemble.members[0])
    ids = [label.index for label in ensemble.labels]
    prepared = PreparedImage(image, finder, ensemble.voxel_size, ids)
    if options.harmonise:
        prepared.truth = harmonise(prepared.truth)
    segmenter = Members(ensemble, prepared.head, options.grids, folder)
    paths, means = [], {}
    for member in members:
        sparse = segmenter.segment(member)
        means[member.id] = float(np.nanmean(prepared.dice(sparse)))
        print(f"{name}\t{member.id}\tmean\t{means[member.id]:.4f}", flush=True)
        if member.family != BASELINE or len(members) == 1:
            paths.append(folder / f"{member.id}.safetensors")
            save_posterior(paths[-1], sparse, {})
    scores = prepared.dice(fuse_members(paths).mean)
    print(f"{name}\tconsensus\tmean\t{np.nanmean(scores):.4f}")
    for label, value in zip(ensemble.labels[1:], scores, strict=True):
        print(f"{name}\tconsensus\t{label.name}\t{value:.4f}")
    return means


def report_equivalence(table: list[dict[str, float]], margin: float) -> None:
    """Print, for each member, its difference from the baseline and whether that is negligible."""
    print(f"member\tdifference from {BASELINE}\t90 % interval\tp (|difference| >= {margin})",
          file=sys.stderr)  # fmt: skip
    for member in table[0]:
        if member == BASELINE:
            continue
        differences = np.array([row[member] - row[BASELINE] for row in table])
        sem = stats.sem(differences)
        low, high = stats.t.interval(0.9, len(differences) - 1, differences.mean(), sem)
        p = max(
            stats.ttest_1samp(differences, -margin, alternative="greater").pvalue,
            stats.ttest_1samp(differences, margin, alternative="less").pvalue,
        )
        print(f"{member}\t{differences.mean():+.4f}\t{low:+.4f} to {high:+.4f}\t{p:.2g}",
              file=sys.stderr)  # fmt: skip


def main() -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path, nargs="+")
    parser.add_argument("--ensemble", default="aseg31")
    parser.add_argument("--members", nargs="+", default=["all"])
    parser.add_argument("--harmonise", action="store_true")
    parser.add_argument("--grids", type=int, choices=tuple(GRIDS), default=4)
    parser.add_argument("--margin", type=float, default=0.01, help="Dice that does not matter")
    options = parser.parse_args()
    keep_freed_memory()
    ensemble = load_ensemble(options.ensemble)
    members = select_members(ensemble, options.members)
    names = {label.index: label.name for label in ensemble.labels}
    print("image\tmember\tstructure\tdice")
    table = []
    with tempfile.TemporaryDirectory() as folder:
        for directory in options.images:
            for image in find_labelled_images(directory, names):
                table.append(score(image, ensemble, members, Path(folder), options))
    if len(table) > 1 and len(members) > 1 and BASELINE in table[0]:
        report_equivalence(table, options.margin)


if __name__ == "__main__":
    main()
