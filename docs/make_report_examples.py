"""Make the two reports that "Read your first report" explains, a good one and a bad one.

    python docs/make_report_examples.py WORK_DIR

The good image is the MNI152 template that nilearn carries. The bad one is the same head as if it
had moved all the time: k-space of many poses, noise, slices of 5 mm. The app segments both.
The figures that the page shows go to docs/images, and the worst rows of both tables are printed.
Run it again when the reports or the shipped ensemble change; it takes five minutes on two cores.
"""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from nibabel.processing import resample_to_output
from PIL import Image
from scipy.ndimage import affine_transform, gaussian_filter1d

from bids_varaug.cli.run import main

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent / "examples"))

from make_demo_dataset import make_demo_dataset  # noqa: E402

N_POSES = 24
NOD_DEG, SHIFT_MM = 6.0, 6.0  # standard deviations, about the left-right axis and along y
NOISE = 0.08  # of the brightest voxel
SLICE_MM = 5.0
FIGURES = ("consensus", "entropy", "volumes")
WIDTH, QUALITY = 1200, 88  # of the pictures in the documentation


def pose(volume: np.ndarray, degrees: float, shift: float) -> np.ndarray:
    """Nod a head (X, Y, Z) about its centre, and shift it by so many voxels along y."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    matrix = np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
    centre = (np.array(volume.shape) - 1) / 2
    offset = centre - matrix @ ([*centre, 0, shift, 0])
    return affine_transform(volume, matrix, offset=offset, order=1)


def move(volume: np.ndarray, spacing: float, seed: int) -> np.ndarray:
    """Image of a head whose pose changes while the phase-encoding lines (y) are read."""
    rng = np.random.default_rng(seed)
    k_space = np.zeros(volume.shape, dtype=np.complex64)
    for lines in np.array_split(np.arange(volume.shape[1]), N_POSES):
        moved = pose(volume, rng.normal(0, NOD_DEG), rng.normal(0, SHIFT_MM) / spacing)
        k_space[:, lines] = np.fft.fftshift(np.fft.fftn(moved), axes=1)[:, lines]
    image = np.fft.ifftn(np.fft.ifftshift(k_space, axes=1))
    noise = rng.normal(0, NOISE * volume.max(), (2, *image.shape))
    return np.abs(image + noise[0] + 1j * noise[1]).astype(np.float32)


def write_damaged_head(t1w: Path, subject: str) -> Path:
    """Write the damaged copy of `t1w` as another participant of the same dataset."""
    image = nib.load(t1w)
    spacing = float(image.header.get_zooms()[2])
    moved = move(image.get_fdata(dtype=np.float32), spacing, seed=0)
    sigma = SLICE_MM / spacing / 2.355  # a slice profile whose width at half maximum is SLICE_MM
    thick = nib.Nifti1Image(gaussian_filter1d(moved, sigma, axis=2), image.affine)
    damaged = resample_to_output(thick, (1, 1, SLICE_MM), order=1)
    values = np.rint(damaged.get_fdata(dtype=np.float32)).astype(np.int16)
    out = nib.Nifti1Image(values, damaged.affine)
    out.header.set_xyzt_units("mm", "sec")
    bids_dir = t1w.parents[2]
    path = bids_dir / f"sub-{subject}" / "anat" / f"sub-{subject}_T1w.nii.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(out.to_bytes(), compresslevel=6, mtime=0))
    participants = bids_dir / "participants.tsv"
    participants.write_text(participants.read_text() + f"sub-{subject}\tn/a\tn/a\n")
    return path


def show(derivatives: Path, subject: str, name: str) -> None:
    """Copy the figures of a participant, smaller, and print the worst rows of the table."""
    for figure in FIGURES:
        source = derivatives / f"sub-{subject}" / "figures" / f"sub-{subject}_desc-{figure}_T1w.png"
        picture = Image.open(source).convert("RGB")
        picture.thumbnail((WIDTH, picture.height))
        target = DOCS / "images" / f"report-{name}-{figure}.jpg"
        picture.save(target, quality=QUALITY, optimize=True)
        print(target, target.stat().st_size)
    anat = derivatives / f"sub-{subject}" / "anat"
    table = pd.read_table(next(anat.glob("*desc-consensus_dseg.tsv")))
    print(table["verdict"].value_counts().to_string())
    columns = ["name", "verdict", "volume_mean", "volume_std", "cv", "expected_dice", "reason"]
    print(table.sort_values("expected_dice")[columns].head(12).to_string(index=False))


if __name__ == "__main__":
    work_dir = Path(sys.argv[1])
    good = make_demo_dataset(work_dir / "bids")
    write_damaged_head(good, "moved")
    out = work_dir / "derivatives"
    code = main([str(work_dir / "bids"), str(out), "participant", "-w", str(work_dir / "work")])
    if code == 0:
        show(out, "mni152", "good")
        show(out, "moved", "bad")
    sys.exit(code)
