"""Write heads drawn from label maps as images with their true labels.

    python benchmarks/synthetic_heads.py LABELS_DIR OUT_DIR [--last 3] [--per-map 2]

From each of the last label maps of LABELS_DIR (those that training left out), heads at 1 mm of five
kinds, in OUT_DIR as ``<map>x<number>x<kind>_T1w.nii.gz`` with a ``_desc-aseg_dseg.nii.gz`` beside:

t1        the contrast of a T1w image, as far from it as in training
sharp     the same, but never with voxels thicker than 1 mm
any       one intensity for each structure, whatever it is
inverted  the t1 head with bright and dark exchanged
t2        as in a T2w image: fluid brightest, then grey matter, then white matter

Warps, bias, noise and the removal of the skull are those of training, as is, in all but ``sharp``,
the resolution: 4 in 10 heads have thicker voxels, up to 4 mm. Ventricles are never thinned.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np

from bids_varaug.training.labels import LabelScheme, TrainingSubject, find_label_maps, load_scheme, load_subjects
from bids_varaug.training.synthesis import SynthesisSettings, SyntheticImageGenerator

KINDS = ("t1", "sharp", "any", "inverted", "t2")
SHAPE = (160, 224, 192)
FIRST_SEED = 90_000


def t2_scheme(scheme: LabelScheme) -> LabelScheme:
    """Return the scheme with the order of a T2w image's intensities: 1.25 minus that of T1w.

    Air, bone and what else is dark in both stays dark.
    """
    means = np.where(scheme.t1_mean < 0.15, scheme.t1_mean, 1.25 - scheme.t1_mean)
    return replace(scheme, t1_mean=means.astype(np.float32))


def draw(
    kind: str, subject: TrainingSubject, scheme: LabelScheme, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return image (X, Y, Z) float32 and label ids (X, Y, Z) int16 of one head."""
    share = 1.0 if kind == "any" else 0.0
    used = t2_scheme(scheme) if kind == "t2" else scheme
    settings = SynthesisSettings(random_contrast_share=share, thin_share=0.0)
    if kind == "sharp":
        settings = replace(settings, low_resolution_share=0.0)
    generator = SyntheticImageGenerator(used, settings)
    image, target = (part.numpy() for part in generator.draw(subject, SHAPE, 1.0, seed))
    if kind == "inverted":
        image = np.where(image > 0.05, 1.1 - np.minimum(image, 1.05), image)
    return image, np.asarray(scheme.target_ids)[target].astype(np.int16)


def main() -> None:
    """Parse the command line and write the heads."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("labels", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--last", type=int, default=3)
    parser.add_argument("--per-map", type=int, default=2)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    options = parser.parse_args()
    scheme = load_scheme()
    options.out.mkdir(parents=True, exist_ok=True)
    for n_map, path in enumerate(find_label_maps(options.labels)[-options.last :]):
        name = "".join(c for c in path.name.split(".")[0] if c.isalnum())
        [subject] = load_subjects([path], scheme, "cpu")
        for number in range(options.per_map):
            for kind in options.kinds:  # one seed: the same head in each contrast
                seed = FIRST_SEED + options.per_map * n_map + number
                image, labels = draw(kind, subject, scheme, seed)
                stem = options.out / f"{name}x{number}x{kind}"
                nib.save(nib.Nifti1Image(image, np.eye(4)), f"{stem}_T1w.nii.gz")
                nib.save(nib.Nifti1Image(labels, np.eye(4)), f"{stem}_desc-aseg_dseg.nii.gz")


if __name__ == "__main__":
    main()
