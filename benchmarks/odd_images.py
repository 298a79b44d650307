"""How far volumes move when one head comes with another header, grid or scale of intensities.

    python benchmarks/odd_images.py T1W [--kinds header grid intensity]

T1W: a whole head of about 1 mm. It is cut to the head, brought to RAS+, and then given in ways that
must not matter; each line tells the volumes of the baseline against those of the head as it was, or
why the image was refused.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy.ndimage import affine_transform

from bids_varaug.errors import ScanError
from bids_varaug.images.conform import bounds, prepare_head
from bids_varaug.images.intensity import standardise
from bids_varaug.images.load import voxel_volume
from bids_varaug.models.ensemble import BASELINE, load_ensemble
from bids_varaug.models.unet import load_member
from bids_varaug.segmentation.predict import crop_to_brain, segment_volume

HEAD = 0.08  # of the brightest: what is above is not air
KINDS = ("header", "grid", "intensity")


def main() -> None:
    """Print a line for each way of giving the head."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("t1w", type=Path)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--ensemble", default="aseg31")
    arguments = parser.parse_args()
    ensemble = load_ensemble(arguments.ensemble)
    member = next(member for member in ensemble.members if member.id == BASELINE)
    network = load_member(ensemble, member, "cpu")

    def volumes(image: nib.Nifti1Image) -> np.ndarray:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "sub-01_T1w.nii"
            nib.save(image, path)
            head, geometry = prepare_head(path, ensemble.voxel_size, ensemble.network.multiple)
        for warning in geometry.warnings:
            print(f"    WARNING: {warning}")
        head, geometry = crop_to_brain(network, head, geometry)
        counts = np.bincount(segment_volume(network, head).labels.ravel())[1:]
        return counts * voxel_volume(geometry.conformed_affine)

    data = cut(nib.as_closest_canonical(nib.load(arguments.t1w)))
    reference = volumes(nib.Nifti1Image(data, np.eye(4)))
    names = [label.name for label in ensemble.labels[1:]]
    for kind in arguments.kinds:
        print(kind)
        for name, scale, image in globals()[kind](data):
            try:
                ratios = volumes(image) / reference / scale
            except ScanError as error:
                print(f"  {name}: refused: {error}")
                continue
            worst = int(np.abs(np.log(ratios)).argmax())
            off = int((np.abs(ratios - 1) > 0.1).sum())
            print(f"  {name}: mean x{ratios.mean():.3f}, {off} of {len(ratios)} off by over 10 %, "
                  f"worst {names[worst]} x{ratios[worst]:.2f}", flush=True)  # fmt: skip


def cut(image: nib.Nifti1Image) -> np.ndarray:
    """Cut an image to its head and a margin of 6 voxels."""
    data = np.asanyarray(image.dataobj)
    low, high = bounds(standardise(data) > HEAD)
    low, high = np.maximum(low - 6, 0), np.minimum(high + 6, data.shape)
    return np.ascontiguousarray(data[tuple(slice(a, b) for a, b in zip(low, high, strict=True))])


def header(data: np.ndarray) -> Iterator[tuple[str, float, nib.Nifti1Image]]:
    """The same voxels with contradicting headers: name, true scale of volumes, image."""

    def made(sform, qform, **fields):
        image = nib.Nifti1Image(data, np.eye(4))
        image.header.set_qform(*qform)
        image.header.set_sform(*sform)
        for name, value in fields.items():
            image.header[name] = value
        return nib.Nifti1Image(data, None, image.header)

    one, large = np.eye(4), np.diag([1.05, 1.05, 1.05, 1])
    template = rotation(12, 0) @ np.diag([1.15, 1.2, 1.1, 1])
    mirrored = np.diag([-1.0, 1, 1, 1])
    yield "sform 1 mm, qform and pixdim 1.05 mm", 1.05**3, made((one, 1), (large, 1))
    yield "sform of a template, qform of the scanner", 1, made((template, 4), (one, 1))
    yield "sform of a template alone", 1, made((template, 4), (one, 0))
    yield "mirror images", 1, made((one, 1), (mirrored, 1))
    yield "metres", 1, made((np.diag([1e-3] * 3 + [1]), 1), (np.diag([1e-3] * 3 + [1]), 1),
                            xyzt_units=1)  # fmt: skip
    yield "voxels of 1.0009 mm", 1.0009**3, nib.Nifti1Image(data, np.diag([1.0009] * 3 + [1]))


def grid(data: np.ndarray) -> Iterator[tuple[str, float, nib.Nifti1Image]]:
    """The head sampled on oblique and sheared grids, and padded."""
    for axis in range(3):
        for degrees in (4, 10, 20, 30, 44):
            turn = rotation(degrees, axis)
            yield f"oblique {degrees} degrees, axis {axis}", 1, sampled(data, turn)
    for degrees in (4, 20, 30):
        shear = np.eye(4)
        shear[1:3, 2] = np.sin(np.deg2rad(degrees)), np.cos(np.deg2rad(degrees))
        yield f"sheared {degrees} degrees", 1, sampled(data, shear)
    yield "padded with 20 voxels", 1, nib.Nifti1Image(np.pad(data, 20), np.eye(4))


def intensity(data: np.ndarray) -> Iterator[tuple[str, float, nib.Nifti1Image]]:
    """The head with other units, offsets, types, padding and backgrounds."""
    rng = np.random.default_rng(0)
    x, air = data.astype(np.int64), standardise(data) < HEAD / 2
    top = float(data.max())
    for name, values in {
        "times 1e-9": (x * 1e-9).astype(np.float32),
        "times 3.3": (x * 3.3).astype(np.float32),
        "plus 1000": (x + 1000).astype(np.int32),
        "uint16 plus 32768": (x + 32768).astype(np.uint16),
        "padded below air": np.pad(x + 300, 20, constant_values=0).astype(np.int32),
        "padded above air": np.pad(x + 300, 20, constant_values=30_000).astype(np.int32),
        "background brighter than the brain": np.where(air, 2 * top, x).astype(np.float32),
        "noise of MP2RAGE": np.where(air, rng.uniform(0, top, x.shape), x).astype(np.float32),
        "16-bit overflow": (x * (70_000 / top)).astype(np.int64).astype(np.int16),
    }.items():
        yield name, 1, nib.Nifti1Image(values, np.eye(4))


def rotation(degrees: float, axis: int) -> np.ndarray:
    """Return the (4, 4) rotation about an axis."""
    turn, angle = np.eye(4), np.deg2rad(degrees)
    i, j = [other for other in range(3) if other != axis]
    turn[i, i] = turn[j, j] = np.cos(angle)
    turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
    return turn


def sampled(data: np.ndarray, axes: np.ndarray) -> nib.Nifti1Image:
    """Return the head as a scanner with such axes (4, 4) would have sampled it; cubic splines."""
    inverse = np.linalg.inv(axes[:3, :3])
    shape = np.ceil(np.abs(inverse) @ data.shape).astype(int)
    affine = axes.copy()
    affine[:3, 3] = (np.array(data.shape) - 1) / 2 - axes[:3, :3] @ (shape - 1) / 2
    moved = affine_transform(
        data.astype(np.float32), affine[:3, :3], affine[:3, 3], output_shape=tuple(shape)
    )
    return nib.Nifti1Image(moved.clip(0), affine)


if __name__ == "__main__":
    main()
