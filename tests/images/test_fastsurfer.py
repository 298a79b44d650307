import csv
import hashlib

import nibabel as nib
import numpy as np
import pytest

from bids_varaug.derivatives.io import write_image
from bids_varaug.images.conform import resample_map
from bids_varaug.images.fastsurfer import (
    conform,
    is_conformed,
    prepare_volume,
    robust_range,
    target_grid,
    voxel_size_of,
)
from bids_varaug.images.load import read_t1w

LIA_1MM = np.array([[-1, 0, 0, 128], [0, 0, 1, -128], [0, -1, 0, 128], [0, 0, 0, 1.0]])


def rows_of(path):
    with open(path) as stream:
        return list(csv.DictReader(stream, delimiter="\t"))


def numbers(text, kind=float):
    return [kind(value) for value in text.replace("x", ",").split(",")]


def affine_of(row, prefix="affine"):
    affine = np.eye(4)
    for i in range(3):
        affine[i] = [float(row[f"{prefix}_{i}{j}"]) for j in range(4)]
    return affine


def formula(name, golden):
    """Inputs that the reference data describe in words."""
    oblique = np.asanyarray(nib.load(golden / "conform_oblique_input.nii.gz").dataobj)
    small = (oblique // 7).astype(np.int16)
    turned = small[:, ::-1].transpose(1, 2, 0)
    if name == "obliquehires":
        return (small * 3 + 11).astype(np.int16)
    if name == "fov":
        return turned.astype(np.int16)
    outlier = turned.astype(np.int32)
    outlier[40, 30, 30] = 100_000
    return outlier


@pytest.mark.parametrize(
    "name",
    ["rorden", "colin27", "pumi", "ds002748", "oblique", "obliquehires", "uint8dark", "negative", "outlier", "fov"],
)
def test_images_are_conformed_to_the_bit(golden, shared_data, name):
    row = next(row for row in rows_of(golden / "conform.tsv") if row["name"] == name)
    if row["input"] == "formula":
        data = formula(name, golden)
    else:
        image = nib.load((shared_data.parent if row["input"].startswith("data") else golden) / row["input"])
        data = np.asanyarray(image.dataobj).reshape(image.shape[:3])
    assert hashlib.sha256(np.ascontiguousarray(data).tobytes()).hexdigest() == row["input_voxels_sha256"]
    affine, zooms = affine_of(row, "input_affine"), numbers(row["input_zooms"])
    assert is_conformed(data, affine, zooms) == (row["is_conform"] == "True")
    conformed, target = conform(data, affine, zooms)
    np.testing.assert_allclose(target, affine_of(row), atol=1e-5)
    assert conformed.shape == (int(row["size"]),) * 3
    assert hashlib.sha256(np.ascontiguousarray(conformed).tobytes()).hexdigest() == row["sha256"]
    if data.dtype != np.uint8:
        np.testing.assert_allclose(robust_range(data), (float(row["src_min"]), float(row["scale"])), rtol=1e-6)


def test_grids_are_those_of_fastsurfer(golden):
    for row in rows_of(golden / "conform_grid.tsv"):
        zooms, shape = numbers(row["zooms"]), numbers(row["shape"], int)
        for asked, column in ((None, "min"), (1.0, "one"), (0.8, "p8")):
            size, side = target_grid(zooms, shape, asked)
            assert (size, side) == (pytest.approx(float(row[f"{column}_voxel"]), rel=1e-7), int(row[f"{column}_size"]))


def test_intensity_ranges_are_those_of_fastsurfer(golden):
    few = np.zeros((10, 10, 10))
    few.flat[:5] = 50
    r, arrays = np.random.RandomState, {"few": few, "allzero": np.zeros((10, 10, 10)), "const": np.full((20,) * 3, 7.0)}
    arrays["gauss"] = r(5).normal(100, 30, (40, 40, 40))
    draws = r(5)
    arrays["sparse"] = (draws.rand(40, 40, 40) < 0.02) * draws.randint(1, 900, (40, 40, 40))
    arrays["outlier"] = r(5).rand(40, 40, 40)
    arrays["outlier"].flat[777] = 1e6
    arrays["int16neg"] = r(5).randint(-200, 2000, (40, 40, 40)).astype(np.int16)
    arrays["expo"] = np.floor(r(5).exponential(200, (50, 50, 50))).astype(np.int16)
    for row in rows_of(golden / "conform_intensity.tsv"):
        data = arrays[row["name"]]
        assert data.sum(dtype=float) == pytest.approx(float(row["sum"]))
        assert robust_range(data) == pytest.approx((float(row["src_min"]), float(row["scale"])))


def test_what_passes_as_conformed_is_what_fastsurfer_lets_pass(golden):
    for row in rows_of(golden / "conform_check.tsv"):
        affine, shape = affine_of(row), numbers(row["shape"], int)
        zooms = np.linalg.norm(affine[:3, :3], axis=0)
        passes = is_conformed(np.zeros(shape, row["dtype"]), affine, zooms)
        assert passes == (row["is_conform"] == "True"), row["name"]


def test_the_voxel_size_is_known_from_the_header(save, tmp_path):
    fine = save(np.zeros((40, 40, 40), np.int16), np.diag([0.7, 0.8, 0.8, 1]))
    assert voxel_size_of(fine) == pytest.approx(0.7)
    (tmp_path / "damaged_T1w.nii.gz").write_bytes(b"no image")
    assert voxel_size_of(tmp_path / "damaged_T1w.nii.gz") == voxel_size_of(tmp_path / "absent_T1w.nii.gz") == 1.0


def test_a_mirror_image_is_not_taken_for_conformed():
    assert is_conformed(np.zeros((256,) * 3, np.uint8), LIA_1MM, (1, 1, 1))
    assert not is_conformed(np.zeros((256,) * 3, np.uint8), LIA_1MM @ np.diag([-1, 1, 1, 1]), (1, 1, 1))


@pytest.fixture
def small_head(save):
    """A bright ellipsoid, 76 x 90 x 84 mm, in an LPS image of 1 mm with even sides."""
    shape = (96, 112, 104)
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*[np.arange(n) - n / 2 for n in shape], indexing="ij"))
    inside = ((grid / np.array([38, 45, 42])[:, None, None, None]) ** 2).sum(0) < 1
    data = (np.where(inside, 700, 0) + rng.integers(0, 40, shape)).astype(np.int16)
    return save(data, np.diag([-1.0, -1, 1, 1])), data


def test_labels_return_to_the_voxels_that_they_came_from(small_head):
    path, data = small_head
    volume, geometry = prepare_volume(path)
    assert volume.shape == (256, 256, 256)
    assert geometry.conformed_shape == (256, 256, 256)
    box = tuple(slice(a, b) for a, b in zip(geometry.box.start, geometry.box.stop, strict=True))
    back = resample_map((volume[box] > 128).astype(np.uint8), geometry, order=0)
    np.testing.assert_array_equal(back, data > 500)


def test_the_box_holds_the_head_with_a_rim_and_no_more(small_head):
    volume, geometry = prepare_volume(small_head[0])
    outside = volume.copy()
    box = tuple(slice(a, b) for a, b in zip(geometry.box.start, geometry.box.stop, strict=True))
    outside[box] = 0
    assert (outside < 128).all()
    assert np.prod(geometry.box.shape) < 1.5 * 96 * 112 * 104


@pytest.mark.parametrize(
    ("size", "shape", "said"),
    [(3.0, (60, 60, 60), "3 mm are larger than 1.5 mm"), (0.5, (160, 160, 160), "0.5 mm are smaller than the 0.7 mm"),
     (1.0, (270, 96, 96), "270 mm, is larger than the 256 mm")],
)  # fmt: skip
def test_images_that_fastsurfer_was_not_made_for_are_warned_of(save, size, shape, said):
    data = np.random.default_rng(0).integers(0, 50, shape).astype(np.int16)
    data[tuple(slice(n // 4, -n // 4) for n in shape)] += 500
    _, geometry = prepare_volume(save(data, np.diag([size, size, size, 1])))
    assert any(said in warning for warning in geometry.warnings)


def test_odd_sizes_are_blurred_unless_whole_voxels_are_asked_for():
    data = np.random.default_rng(0).integers(0, 255, (61, 63, 65)).astype(np.uint8)
    blurred, _ = conform(data, np.eye(4), (1, 1, 1))
    sharp, _ = conform(data, np.eye(4), (1, 1, 1), whole_voxels=True)
    of_image, of_sharp, of_blurred = (np.bincount(a.ravel(), minlength=256)[1:] for a in (data, sharp, blurred))
    np.testing.assert_array_equal(of_sharp, of_image)
    assert (of_blurred != of_image).any()
    even = data[:60, :62, :64]
    plain, whole = (conform(even, np.eye(4), (1, 1, 1), whole_voxels=whole) for whole in (False, True))
    np.testing.assert_array_equal(plain[0], whole[0])
    np.testing.assert_array_equal(plain[1], whole[1])


def test_bytes_are_not_rescaled_even_with_a_slope(tmp_path):
    data = np.zeros((80, 80, 80), np.uint8)
    data[20:60, 20:60, 20:60] = 40 + np.arange(40)[:, None, None] // 2
    path = tmp_path / "slope.nii.gz"
    write_image(data, np.eye(4), path, slope=2.0)
    assert read_t1w(path).values.max() == 2 * data.max()
    assert prepare_volume(path)[0].max() == 2 * data.max()
