"""Make a BIDS dataset of one head from the MNI152 template that nilearn carries.

    python examples/make_demo_dataset.py demo/bids

The image is the ICBM 2009a asymmetric T1w template at 1 mm as nilearn ships it (no download): the
average of 152 young adults, skull removed. An average is smoother than any real head, so it shows
what comes out, not how well the segmentation does.
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path

import nibabel as nib
import numpy as np

SUBJECT = "mni152"
FULL_SCALE = 1000  # of the int16 image; nilearn scales the template to 0..1

DESCRIPTION = {
    "Name": "MNI152 template as a demonstration of bids_varaug",
    "BIDSVersion": "1.10.0",
    "DatasetType": "raw",
    "License": "ICBM 2009 template terms, see README",
    "Authors": ["McConnell Brain Imaging Centre, Montreal Neurological Institute"],
    "Acknowledgements": "Template redistributed by nilearn, https://nilearn.github.io",
    "ReferencesAndLinks": ["https://doi.org/10.1016/j.neuroimage.2010.07.033"],
}
README = """\
# MNI152 template

One "participant": the ICBM 2009a nonlinear asymmetric T1w template at 1 mm, an average of 152
young adults with the skull removed, as nilearn carries it (`load_mni152_template`), stored as
int16.
Made by bids_varaug's examples/make_demo_dataset.py.

Copyright (C) 1993-2009 Louis Collins, McConnell Brain Imaging Centre, Montreal Neurological
Institute, McGill University. Permission to use, copy, modify, and distribute this software and its
documentation for any purpose and without fee is hereby granted, provided that the above copyright
notice appear in all copies.

Fonov et al. (2011), Unbiased average age-appropriate atlases for pediatric studies, NeuroImage
54(1), 313-327, doi:10.1016/j.neuroimage.2010.07.033.
"""
PARTICIPANTS = f"participant_id\tage\tsex\nsub-{SUBJECT}\tn/a\tn/a\n"
COLUMNS = {
    "age": {"Description": "Age; none, the image is an average", "Units": "year"},
    "sex": {"Description": "Sex; none, the image is an average"},
}
SIDECAR = {"Modality": "MR", "Description": "Average of 152 T1w images, skull removed"}


def make_demo_dataset(bids_dir: Path) -> Path:
    """Write the dataset (again, with the same bytes); returns the T1w file."""
    from nilearn.datasets import load_mni152_template

    anat = bids_dir / f"sub-{SUBJECT}" / "anat"
    anat.mkdir(parents=True, exist_ok=True)
    for path, content in (
        (bids_dir / "dataset_description.json", DESCRIPTION),
        (bids_dir / "participants.json", COLUMNS),
        (anat / f"sub-{SUBJECT}_T1w.json", SIDECAR),
    ):
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (bids_dir / "README.md").write_text(README, encoding="utf-8")
    (bids_dir / "participants.tsv").write_text(PARTICIPANTS, encoding="utf-8")

    template = load_mni152_template(resolution=1)
    voxels = np.rint(template.get_fdata(dtype=np.float32) * FULL_SCALE).astype(np.int16)
    image = nib.Nifti1Image(voxels, template.affine)
    image.set_sform(template.affine, 4)  # 4: MNI space
    image.set_qform(template.affine, 4)
    image.header.set_xyzt_units("mm", "sec")
    path = anat / f"sub-{SUBJECT}_T1w.nii.gz"
    # No time stamp, so that a second run does not make the work directory of the first stale.
    path.write_bytes(gzip.compress(image.to_bytes(), compresslevel=6, mtime=0))
    return path


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bids_dir", type=Path, help="where to write the dataset")
    print(make_demo_dataset(parser.parse_args().bids_dir))


if __name__ == "__main__":
    main()
