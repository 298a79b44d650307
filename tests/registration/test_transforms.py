import nibabel as nib
import numpy as np
import pytest

from bids_varaug.registration.register import register_posterior
from bids_varaug.registration.spread import check_quality
from bids_varaug.registration.transforms import (
    Registration,
    grid_points,
    head_points,
    sample,
    sample_labels,
    write_itk,
)


@pytest.fixture(scope="module")
def registered(head, template) -> Registration:
    return register_posterior(head.sparse, head.geometry, template, 60)


def test_there_and_back_is_where_one_was(registered, template):
    forward, inverse = registered.field(template.grid), registered.field(template.grid, inverse=True)
    quality = check_quality(registered, template, forward, inverse)
    assert np.abs(forward).max() > 2.0
    assert quality.folds == 0 and quality.inverse_mean < 0.01 and quality.inverse_max < 0.05  # mm


def test_saved_registration_is_the_same(registered, tmp_path):
    registered.save(tmp_path / "r.npz")
    again = Registration.load(tmp_path / "r.npz")
    assert np.array_equal(again.affine, registered.affine)
    assert np.array_equal(again.coefficients, registered.coefficients)


def test_sampled_ramp_is_linear_and_zero_outside():
    ramp = np.arange(10.0)[:, None, None] * np.ones((1, 4, 4))
    affine = np.diag([2.0, 2, 2, 1])
    points = np.array([[3.0, 2, 2], [18.9, 2, 2], [19.1, 2, 2], [-0.9, 2, 2], [-1.1, 2, 2]]).T
    assert sample(ramp, affine, points).tolist() == [1.5, 9.0, 0.0, 0.0, 0.0]


def test_label_with_the_largest_weight_wins_and_ties_go_to_the_lower():
    labels = np.zeros((3, 2, 2), np.int16)
    labels[1:] = 7
    labels[2] = 3
    points = np.array([[0.4, 0, 0], [0.6, 0, 0], [1.5, 0, 0], [2.6, 0, 0]]).T
    assert sample_labels(labels, np.eye(4), points).tolist() == [0, 7, 3, 0]


def test_the_same_registration_gives_the_same_file(registered, template, tmp_path):
    paths = [write_itk(registered, template.grid, tmp_path / f"{n}.h5") for n in range(2)]
    assert paths[0].read_bytes() == paths[1].read_bytes()


@pytest.fixture(scope="module")
def image(head) -> nib.Nifti1Image:
    """A smooth image on a flipped grid in the space of the head."""
    affine = np.diag([-2.0, 2, 2, 1])
    affine[:3, 3] = head.affine[:3, 3] + [60, -60, -60]
    at = np.indices((61, 61, 61)) / 8
    return nib.Nifti1Image((np.sin(at[0]) + np.cos(at[1] + at[2])).astype(np.float32), affine)


def resampled(registered, template, image) -> np.ndarray:
    points = head_points(registered, registered.field(template.grid), template.grid, grid_points(template.grid))
    return sample(np.asarray(image.dataobj), image.affine, points).reshape(template.grid.shape)


def test_nitransforms_reads_the_file_and_resamples_to_the_same_image(registered, template, image, tmp_path):
    manip = pytest.importorskip("nitransforms.manip", reason="nitransforms missing")
    resampling = pytest.importorskip("nitransforms.resampling")
    path = write_itk(registered, template.grid, tmp_path / "x_xfm.h5")
    reference = nib.Nifti1Image(np.zeros(template.grid.shape, np.float32), template.grid.affine)
    chain = manip.load(path, fmt="itk")
    theirs = np.asarray(resampling.apply(chain, image, reference=reference, order=1, mode="nearest").dataobj)
    ours = resampled(registered, template, image)
    inside = ours != 0
    assert inside.mean() > 0.5
    assert np.abs(theirs - ours)[inside].max() < 1e-3 * np.ptp(ours)


def test_ants_reads_the_file_and_resamples_to_the_same_image(registered, template, image, tmp_path):
    ants = pytest.importorskip("ants", reason="antspyx missing")
    path = write_itk(registered, template.grid, tmp_path / "x_xfm.h5")
    fixed = ants.from_nibabel_nifti(nib.Nifti1Image(np.zeros(template.grid.shape, np.float32), template.grid.affine))
    theirs = ants.apply_transforms(fixed, ants.from_nibabel_nifti(image), [str(path)], "linear").numpy()
    ours = resampled(registered, template, image)
    assert np.abs(theirs - ours).max() < 1e-3 * np.ptp(ours)


def test_ants_maps_points_forth_and_back(registered, template, tmp_path):
    """Forward then inverse, both by ANTs from our files, within 0.05 mm."""
    ants = pytest.importorskip("ants", reason="antspyx missing")
    pd = pytest.importorskip("pandas")
    files = [write_itk(registered, template.grid, tmp_path / f"{i}_xfm.h5", inverse=i) for i in (False, True)]
    voxels = np.argwhere(template.labels > 0)[::7]
    points = voxels @ template.grid.affine[:3, :3].T + template.grid.affine[:3, 3]
    table = pd.DataFrame(points * [-1, -1, 1], columns=["x", "y", "z"])  # ITK's points are LPS
    there = ants.apply_transforms_to_points(3, table, [str(files[0])])
    back = ants.apply_transforms_to_points(3, there, [str(files[1])])
    assert np.abs(there[["x", "y", "z"]].to_numpy() - table.to_numpy()).max() > 10
    assert np.linalg.norm(back[["x", "y", "z"]].to_numpy() - table.to_numpy(), axis=1).max() < 0.05
