"""Derivatives in the template's space of a head that is the template itself, moved: no network is needed."""

import json
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from bids_varaug.derivatives import names
from bids_varaug.derivatives.in_space import write_in_spaces
from bids_varaug.derivatives.io import write_image
from bids_varaug.images.conform import Box, Geometry
from bids_varaug.inputs.scans import Scan
from bids_varaug.models.ensemble import load_ensemble
from bids_varaug.registration.space import GRIDS, SPACE, OutputSpace
from bids_varaug.registration.template import load_template
from bids_varaug.registration.transforms import Registration, grid_points, head_points, sample
from bids_varaug.registration.velocity import coefficient_shape
from bids_varaug.settings import Settings
from tests.derivatives.conftest import MEMBERS

COARSE = OutputSpace(SPACE, 2)
MOVED = np.array([[-1.0, 0, 0, 5], [0, 1, 0, -20], [0, 0, 1, 10], [0, 0, 0, 1]]) @ np.diag([-1, 1, 1, 1])


def registrations(folder, shifts) -> list:
    """Files of affines that differ by shifts along x [mm], without a deformation but for a bulge."""
    coefficients = np.zeros(coefficient_shape(GRIDS[2].shape), np.float32)
    coefficients[1, 20:28, 25:33, 20:28] = 0.4
    paths = []
    for n, shift in enumerate(shifts):
        affine = MOVED.copy()
        affine[0, 3] += shift
        paths.append(folder / f"{n}.npz")
        Registration(affine, coefficients).save(paths[-1])
    return paths


@pytest.fixture(scope="module")
def request_(tmp_path_factory) -> names.ScanRequest:
    """Outputs in the grid of a T1w image: the template's, 20 mm further back, stored from right to left."""
    root = tmp_path_factory.mktemp("in_space")
    ensemble = load_ensemble("aseg31")
    labels = load_template([label.index for label in ensemble.labels]).labels[::-1]
    ids = np.array([label.index for label in ensemble.labels], np.int16)
    flip = np.diag([-1.0, 1, 1, 1])
    flip[0, 3] = labels.shape[0] - 1
    affine = MOVED @ GRIDS[2].affine @ flip
    path = root / "bids/sub-01/anat/sub-01_T1w.nii.gz"
    path.parent.mkdir(parents=True)
    t1w = (labels * 9.0 + np.arange(labels.shape[1])[:, None]).astype(np.float32)
    nib.save(nib.Nifti1Image(t1w, affine), path)
    spaces = (f"{SPACE}:res-2",)
    settings = Settings(root / "bids", root / "out", "participant", root / "work", output_spaces=spaces)
    scan = Scan(path=path, entities={"subject": "01"}, relative="sub-01/anat/sub-01_T1w.nii.gz")
    request = names.ScanRequest(settings, ensemble, MEMBERS, scan)
    for key, data in {
        "consensus_dseg": ids[labels],
        "unreliable_mask": labels == 3,
        "entropy": (labels % 3).astype(np.float32),
        "sigbits": np.full(labels.shape, 7.0, np.float32),
    }.items():
        write_image(data, affine, request.path(key))
    box = Box((0, 0, 0), labels.shape)
    Geometry(2.0, box, labels.shape, affine, labels.shape, affine, 1e6, ()).save(root / "geometry.json")
    return request


@pytest.fixture(scope="module")
def written(request_, tmp_path_factory) -> list:
    files = registrations(tmp_path_factory.mktemp("registrations"), (0.0, -1.0, 0.0, 1.0))
    return write_in_spaces(request_, request_.settings.work_dir.parent / "geometry.json", files)


def image(request_, key):
    return nib.load(request_.path(key, space=COARSE))


def test_every_output_of_the_space_is_written_on_its_grid(request_, written):
    assert set(written) == {request_.path(key, space=COARSE) for key in names.SPACE_OUTPUTS}
    for path in written:
        if path.suffix == ".gz":
            found = nib.load(path)
            assert found.shape == GRIDS[2].shape and np.allclose(found.affine, GRIDS[2].affine)
            assert int(found.header["sform_code"]) == 4  # MNI152


def test_labels_come_back_to_the_template(request_, written):
    """Where the deformation does nothing they are the same."""
    template = load_template([label.index for label in request_.ensemble.labels]).labels
    ids = np.array([label.index for label in request_.ensemble.labels])
    found = np.asarray(image(request_, "dseg_in_space").dataobj)
    assert np.array_equal(found[:30], ids[template][:30])
    assert (found != ids[template]).any()  # by the bulge


def test_images_are_those_of_the_transform_in_the_file(request_, written):
    points = grid_points(GRIDS[2])
    registration = Registration.load(registrations(request_.settings.work_dir.parent, (0.0,))[0])
    at = head_points(registration, registration.field(GRIDS[2]), GRIDS[2], points)
    t1w = nib.load(request_.scan.path)
    expected = sample(np.asarray(t1w.dataobj), t1w.affine, at).reshape(GRIDS[2].shape)
    assert np.array_equal(np.asarray(image(request_, "t1w_in_space").dataobj), expected)


def test_maps_are_stored_as_those_in_the_grid_of_the_t1w(request_, written):
    stored = {key: image(request_, key) for key in names.SPACE_OUTPUTS if not key.endswith("_space") or "_in_" in key}
    kinds = {key: (one.get_data_dtype().name, int(one.header["intent_code"])) for key, one in stored.items()}
    assert kinds == {
        "t1w_in_space": ("float32", 0), "dseg_in_space": ("int16", 1002), "unreliable_in_space": ("uint8", 0),
        "entropy_in_space": ("int16", 1001), "sigbits_in_space": ("int16", 1001), "displacement_sd": ("int16", 1001),
    }  # fmt: skip
    for key, step in (("entropy_in_space", 1 / 1024), ("sigbits_in_space", 1 / 16)):
        assert stored[key].dataobj.slope == step
        assert f"steps of {step:.4g}" in json.loads(request_.sidecar(key, space=COARSE).read_bytes())["Precision"]
    header = stored["dseg_in_space"].header
    assert (header["aux_file"].item(), header["cal_max"]) == (b"seg-varaug_dseg.tsv", 60)


def test_spread_is_that_of_the_members_affines(request_, written):
    sd = np.asarray(image(request_, "displacement_sd").dataobj)
    brain = np.asarray(image(request_, "dseg_in_space").dataobj) > 0
    assert np.median(sd[brain]) == pytest.approx(1.0, rel=1e-3)
    figures = json.loads(request_.sidecar("to_space", space=COARSE).read_bytes())
    assert figures["DisplacementSDMedian"] == pytest.approx(1.0, rel=1e-3)
    assert figures["AffineFramewiseDisplacementMax"] == pytest.approx(1.0, rel=1e-3)
    assert (figures["NumberOfMembers"], figures["ShareOfFolds"]) == (3, 0.0)
    assert figures["InverseErrorMax"] < 0.05


def test_sidecars_name_transform_and_resolution(request_, written):
    about = json.loads(request_.sidecar("entropy_in_space", space=COARSE).read_bytes())
    assert about["Transform"] == f"bids::sub-01/anat/sub-01_from-T1w_to-{SPACE}_mode-image_xfm.h5"
    assert about["Resolution"].startswith("Voxels of 2 mm")
    assert about["Units"] == "bit" and "SpatialReference" not in about


def test_without_members_an_earlier_spread_is_removed(request_, written, tmp_path):
    path = request_.path("displacement_sd", space=COARSE)
    kept = path.read_bytes()
    again = write_in_spaces(
        request_, request_.settings.work_dir.parent / "geometry.json", registrations(tmp_path, (0.0,))
    )
    assert path not in again and not path.exists()
    path.write_bytes(kept)


def test_at_1_mm_without_res_in_the_name(request_, written, tmp_path):
    fine = replace(request_, settings=replace(request_.settings, output_spaces=(SPACE,)))
    paths = write_in_spaces(fine, request_.settings.work_dir.parent / "geometry.json", registrations(tmp_path, (0.0,)))
    (dseg,) = (path for path in paths if path.name.endswith("_dseg.nii.gz"))
    assert dseg.name == f"sub-01_space-{SPACE}_seg-varaug_desc-consensus_dseg.nii.gz"
    assert nib.load(dseg).shape == GRIDS[1].shape
