"""The derivatives of one scan, from a work directory made by hand."""

from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from bids_varaug.cli.settings import Settings
from bids_varaug.derivatives.names import OUTPUTS
from bids_varaug.derivatives.scan import Intermediate, ScanRequest, write_scan
from bids_varaug.images.crop import Box
from bids_varaug.images.geometry import Geometry
from bids_varaug.inputs.scans import Scan
from bids_varaug.models.ensemble import Ensemble, Label, Member
from bids_varaug.models.shape import NetworkShape
from bids_varaug.segmentation.posterior import SparsePosterior, save_posterior

SHAPE = (6, 6, 6)
SPREAD = ("entropy", "sigbits", "std", "unreliable_mask")
LABELS = (Label(0, "Background", "#000000"), Label(17, "Left-Hippocampus", "#dcd814"))
MEMBERS = tuple(
    Member(name, name.rstrip("0123456789"), 0, None, "", "a" * 64)
    for name in ("ieee", "mca01", "mca02")
)


@pytest.fixture
def request_(tmp_path) -> ScanRequest:
    """Three members on a T1w whose grid is the network's."""
    path = tmp_path / "raw" / "sub-01" / "anat" / "sub-01_T1w.nii.gz"
    path.parent.mkdir(parents=True)
    nib.save(nib.Nifti1Image(np.zeros(SHAPE, np.float32), np.eye(4)), path)
    settings = Settings(tmp_path / "raw", tmp_path / "out", "participant", tmp_path / "work")
    scan = Scan(path, {"subject": "01"}, "sub-01/anat/sub-01_T1w.nii.gz")
    shape = NetworkShape(2, (16, 16), 16)
    ensemble = Ensemble("small", "1", Path(), 1.0, LABELS, shape, MEMBERS, {})
    return ScanRequest(settings, scan, ensemble, MEMBERS)


@pytest.fixture
def files(tmp_path) -> Intermediate:
    """One labelled voxel in every member; maps that tell each other apart."""
    geometry = Geometry(1.0, Box((0, 0, 0), SHAPE), SHAPE, np.eye(4), SHAPE, np.eye(4), 300.0, ())
    geometry.save(tmp_path / "geometry.json")
    labels = np.zeros(SHAPE, np.uint8)
    labels[2, 3, 4] = 1
    offsets = np.array([0, 0, 0, 1, 1, 1, 1], np.int64)
    rows = np.array([[0.2, 0.8]], np.float32)
    sparse = SparsePosterior(labels, offsets, np.array([3 * 6 + 4], np.int32), rows)
    save_posterior(tmp_path / "mean.safetensors", sparse, {})
    maps = {"entropy": 0.5, "std": 0.1, "sigbits": 3.0}
    maps = {name: np.full(SHAPE, value, np.float32) for name, value in maps.items()}
    np.savez(tmp_path / "maps.npz", unreliable=labels > 0, **maps)
    counts = np.tile(np.array([215, 1], np.int64), (3, 1))
    np.savez(
        tmp_path / "counts.npz",
        volumes=counts,
        intersections=np.tile(counts[0], (3, 3, 1)),
        entropy_mean=np.array([0.0, 0.5]),
    )
    mean = tmp_path / "mean.safetensors"
    return Intermediate(
        tmp_path / "geometry.json", mean, tmp_path / "maps.npz", tmp_path / "counts.npz",
        (mean,) * 3,
    )  # fmt: skip


def outputs(request: ScanRequest) -> set[str]:
    """Keys of what lies in the output folder, of images and tables."""
    where = request.settings.output_dir, request.scan
    return {k for k, o in OUTPUTS.items() if not o.per_member and o.path(*where).exists()}


def test_every_output_but_those_of_members_is_written(request_, files, tmp_path):
    write_scan(request_, files, tmp_path)
    assert outputs(request_) == set(OUTPUTS) - {"member_dseg"}


def test_spread_of_an_earlier_run_is_not_left_beside_a_consensus_without_one(
    request_, files, tmp_path
):
    write_scan(request_, files, tmp_path)
    alone = replace(request_, members=MEMBERS[:1])
    counts = dict(np.load(files.counts))
    counts["volumes"], counts["intersections"] = (
        counts["volumes"][:1], counts["intersections"][:1, :1],
    )  # fmt: skip
    np.savez(files.counts, **counts)
    write_scan(alone, replace(files, posteriors=files.posteriors[:1]), tmp_path)
    assert outputs(alone) == set(OUTPUTS) - {"member_dseg", *SPREAD}
    folder = request_.settings.output_dir / "sub-01" / "anat"
    assert not list(folder.glob("*_statmap.json")) + list(folder.glob("*unreliable*"))


def test_posterior_is_stored_in_steps_of_a_255th(request_, files, tmp_path):
    write_scan(request_, files, tmp_path)
    path = OUTPUTS["mean_probseg"].path(request_.settings.output_dir, request_.scan)
    image = nib.load(path)
    assert image.get_data_dtype() == np.uint8
    assert image.get_fdata()[2, 3, 4] == pytest.approx([0.2, 0.8], abs=1 / 510)
    assert image.get_fdata()[0, 0, 0].tolist() == pytest.approx([1, 0])


def test_labels_are_freesurfer_ids(request_, files, tmp_path):
    write_scan(request_, files, tmp_path)
    path = OUTPUTS["consensus_dseg"].path(request_.settings.output_dir, request_.scan)
    labels = np.asarray(nib.load(path).dataobj)
    assert labels[2, 3, 4] == 17 and np.count_nonzero(labels) == 1
