"""Dice of every member and of the consensus against label maps.

    python benchmarks/accuracy.py IMAGES_DIR [--ensemble aseg31] [--synthetic LABELS_DIR --last 3]

IMAGES_DIR holds ``*_T1w.nii.gz`` with a ``*_dseg.nii.gz`` (FreeSurfer ids) beside each. With
``--synthetic``, also heads drawn from the last label maps of LABELS_DIR, which training left out.
Prints one TSV row per image and member, and one per image and structure for the consensus.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np

from bids_varaug.images.conform import conform
from bids_varaug.images.crop import extract, head_box
from bids_varaug.images.load import load_t1w
from bids_varaug.images.native import resample_posterior
from bids_varaug.models.ensemble import BASELINE, Ensemble, load_ensemble, load_member
from bids_varaug.models.memory import keep_freed_memory
from bids_varaug.segmentation.fuse import fuse_members
from bids_varaug.segmentation.locate import locate_brain
from bids_varaug.segmentation.posterior import SparsePosterior, load_posterior, save_posterior
from bids_varaug.segmentation.predict import segment_volume
from bids_varaug.training.heads import load_heads
from bids_varaug.training.labels import find_label_maps, load_scheme
from bids_varaug.training.monitor import find_labelled_images
from bids_varaug.training.synthesis import Randomiser, SynthesisSettings

SYNTHETIC_SHAPE = (160, 224, 224)


class Case:
    """A head with true labels (class indices on the grid that results are compared on)."""

    def __init__(self, name: str, head: np.ndarray, truth: np.ndarray, to_truth):
        self.name, self.head, self.truth, self.to_truth = name, head, truth, to_truth


def real_case(image, ensemble: Ensemble) -> Case:
    """One T1w image and its label map, compared on the image's own grid."""
    native = load_t1w(image.t1w)
    conformed = conform(native, ensemble.voxel_size)
    box = head_box(conformed.data, ensemble.voxel_size, multiple=ensemble.network.multiple)
    baseline = load_member(ensemble, ensemble.baseline or ensemble.members[0])
    part = locate_brain(baseline, extract(conformed.data, box), ensemble.voxel_size)
    box = part.within(box)
    ids = np.asarray(nib.load(image.labels).dataobj).astype(int)
    truth = np.zeros(ids.shape, np.uint8)
    for k, label in enumerate(ensemble.labels):
        truth[ids == label.index] = k

    def to_truth(sparse: SparsePosterior) -> np.ndarray:
        return resample_posterior(
            sparse.offsets, sparse.voxels, sparse.posterior, box, conformed.data.shape,
            conformed.affine, native.affine, native.data.shape, with_posterior=False,
        ).labels  # fmt: skip

    return Case(image.t1w.name.split("_T1w")[0], extract(conformed.data, box), truth, to_truth)


def synthetic_cases(labels_dir: Path, last: int) -> Iterator[Case]:
    """Yield heads drawn from label maps that training did not see."""
    scheme = load_scheme()
    randomiser = Randomiser(scheme, SynthesisSettings())
    for number, path in enumerate(find_label_maps(labels_dir)[-last:]):
        [head] = load_heads([path], scheme, "cpu")
        image, target = randomiser.draw(head, SYNTHETIC_SHAPE, 1.0, seed=90_000 + number)
        yield Case(f"synthetic-{path.name.split('.')[0]}", image.numpy(), target.numpy(),
                   lambda sparse: sparse.labels)  # fmt: skip


def dice(found: np.ndarray, truth: np.ndarray, n_classes: int) -> np.ndarray:
    """Dice of classes 1..K-1; NaN where the truth lacks the class."""
    sizes = np.bincount(found.ravel(), minlength=n_classes)
    true_sizes = np.bincount(truth.ravel(), minlength=n_classes)
    both = np.bincount(truth[found == truth], minlength=n_classes)
    scores = 2 * both / np.maximum(sizes + true_sizes, 1)
    return np.where(true_sizes > 0, scores, np.nan)[1:]


def score(case: Case, ensemble: Ensemble, folder: Path) -> None:
    """Print the rows of one case."""
    k = len(ensemble.labels)
    paths = []
    for member in ensemble.members:
        sparse = segment_volume(load_member(ensemble, member), case.head)
        mean = np.nanmean(dice(case.to_truth(sparse), case.truth, k))
        print(f"{case.name}\t{member.id}\tmean\t{mean:.4f}", flush=True)
        if member.family != BASELINE:
            paths.append(folder / f"{member.id}.safetensors")
            save_posterior(paths[-1], sparse, {})
    fuse_members(paths, folder / "mean.safetensors")
    scores = dice(case.to_truth(load_posterior(folder / "mean.safetensors")), case.truth, k)
    print(f"{case.name}\tconsensus\tmean\t{np.nanmean(scores):.4f}")
    for label, value in zip(ensemble.labels[1:], scores, strict=True):
        print(f"{case.name}\tconsensus\t{label.name}\t{value:.4f}")


def main() -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path)
    parser.add_argument("--ensemble", default="aseg31")
    parser.add_argument("--synthetic", type=Path)
    parser.add_argument("--last", type=int, default=3)
    arguments = parser.parse_args()
    keep_freed_memory()
    ensemble = load_ensemble(arguments.ensemble)
    print("image\tmember\tstructure\tdice")
    with tempfile.TemporaryDirectory() as name:
        names = {label.index: label.name for label in ensemble.labels}
        for image in find_labelled_images(arguments.images, names):
            score(real_case(image, ensemble), ensemble, Path(name))
        if arguments.synthetic:
            for case in synthetic_cases(arguments.synthetic, arguments.last):
                score(case, ensemble, Path(name))


if __name__ == "__main__":
    main()
