"""Make the label map of the template: fuse label maps of many people on the template's grid.

    ANTS_RANDOM_SEED=1 python benchmarks/template_labels.py LABELS_DIR PRIORS_DIR TEMPLATE_T1W OUT.nii.gz
        --cache DIR [--minutes 4]

LABELS_DIR and PRIORS_DIR are SynthSeg's ``training_label_maps`` and ``labels_classes_priors`` (Apache-2.0),
TEMPLATE_T1W is ``tpl-MNI152NLin2009cAsym_res-01_desc-brain_T1w.nii.gz``. Of each label map a T1w image is drawn (each
structure of the brain with its mean intensity), registered to the template with ANTs SyN at 2 mm (antspyx), and the
labels are brought along. Each voxel takes the label of most people, ties go to the lower id.

``bids_varaug/data/tpl-MNI152NLin2009cAsym_res-02_desc-aseg31_dseg.nii.gz`` was made so from all 20 maps. With one
thread and ANTS_RANDOM_SEED set the bits are the same every time. Maps that are in the cache are not registered again;
with ``--minutes`` it stops after that time, and the same command goes on.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS", "1")

import nibabel as nib
import numpy as np

from bids_varaug.derivatives.io import write_image
from bids_varaug.registration.space import GRIDS
from bids_varaug.training.labels import load_scheme

EXTRACEREBRAL = 500  # SynthSeg's ids of what is no brain begin here


def draw_t1w(labels: np.ndarray, priors: Path) -> np.ndarray:
    """Brain-extracted T1w image of a label map: each structure has its mean intensity.

    `generation_classes.npy` has more classes than the priors have columns; those of one contrast fit.
    """
    ids = np.load(priors / "generation_labels.npy").astype(int)
    classes = np.load(priors / "generation_classes_contrast_specific.npy").astype(int)
    means = np.load(priors / "prior_means_t1.npy")[0]
    intensity = np.zeros(max(ids.max(), labels.max()) + 1, np.float32)
    intensity[ids] = means[classes]
    intensity[0] = intensity[EXTRACEREBRAL:] = 0
    return intensity[labels]


def warp_labels(path: Path, priors: Path, fixed: Any) -> np.ndarray:
    """Target ids of a label map on the grid of `fixed`, an ANTsImage: (X, Y, Z) uint8."""
    import ants

    scheme = load_scheme()
    image = nib.load(path)
    ids = np.asarray(image.dataobj).astype(int)
    targets = np.zeros(ids.max() + 1, np.uint8)
    known = scheme.ids[scheme.ids <= ids.max()]
    targets[known] = np.array(scheme.target_ids)[scheme.targets[: len(known)]]

    def as_ants(data: np.ndarray) -> Any:
        return ants.from_nibabel_nifti(nib.Nifti1Image(data.astype(np.float32), image.affine))

    moving = ants.crop_image(as_ants(draw_t1w(ids, priors)), as_ants(ids > 0), 1)
    small = ants.resample_image(moving, (2, 2, 2), use_voxels=False, interp_type=0)
    found = ants.registration(fixed, small, "SyN", random_seed=1)
    moved = ants.apply_transforms(fixed, as_ants(targets[ids]), found["fwdtransforms"], "nearestNeighbor")
    return np.rint(moved.numpy()).astype(np.uint8)


def main() -> None:
    """Parse the command line, register, vote, write."""
    import ants

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("labels_dir", "priors_dir", "template_t1w", "out", "--cache"):
        parser.add_argument(name, type=Path, **({"required": True} if name.startswith("--") else {}))
    parser.add_argument("--minutes", type=float, default=np.inf)
    options = parser.parse_args()
    start = time.monotonic()
    grid = GRIDS[2]
    template = ants.from_nibabel_nifti(nib.load(options.template_t1w))
    reference = ants.from_nibabel_nifti(nib.Nifti1Image(np.zeros(grid.shape, np.float32), grid.affine))
    fixed = ants.resample_image_to_target(ants.smooth_image(template, 0.8, True), reference, "linear")
    options.cache.mkdir(parents=True, exist_ok=True)
    votes = None
    for path in sorted(options.labels_dir.glob("*.nii.gz")):
        kept = options.cache / path.name.replace(".nii.gz", ".npy")
        if not kept.exists():
            if time.monotonic() - start > 60 * options.minutes:
                print(f"Stopped before {path.name}: run the same command again.")
                return
            before = time.monotonic()
            np.save(kept, warp_labels(path, options.priors_dir, fixed))
            print(f"{path.name}: {time.monotonic() - before:.0f} s", flush=True)
        labels = np.load(kept)
        if votes is None:
            ids = np.array(load_scheme().target_ids, np.uint8)
            votes = np.zeros((len(ids), *labels.shape), np.uint8)
        votes += labels == ids[:, None, None, None]
    write_image(ids[votes.argmax(axis=0)], grid.affine, options.out)


if __name__ == "__main__":
    main()
