import gzip
import os

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from bids_varaug.derivatives import io

AFFINE = np.array([[-2.0, 0, 0, 8], [0, 0, 2, -9], [0, -2, 0, 10], [0, 0, 0, 1]])


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(5, 6, 40)).astype("float32")


def test_image_is_read_back_as_written(tmp_path, image):
    path = io.write_image(image, AFFINE, tmp_path / "a.nii.gz")
    read = nib.load(path)
    assert np.array_equal(read.get_fdata(dtype="float32"), image)
    assert np.array_equal(read.affine, AFFINE)


def test_plain_nifti_is_not_compressed(tmp_path, image):
    path = io.write_image(image, AFFINE, tmp_path / "a.nii")
    assert path.stat().st_size == 352 + image.nbytes


def test_equal_data_gives_equal_bytes(tmp_path, image):
    one = io.write_image(image, AFFINE, tmp_path / "one.nii.gz").read_bytes()
    two = io.write_image(image.copy("F"), AFFINE, tmp_path / "two.nii.gz").read_bytes()
    assert one == two


def test_gzip_header_has_neither_time_nor_name(tmp_path, image):
    head = io.write_image(image, AFFINE, tmp_path / "a.nii.gz").read_bytes()[:10]
    assert head[3:8] == b"\0\0\0\0\0"


def test_series_is_read_back_as_written(tmp_path, image):
    series = np.stack([image, image + 1], axis=3)
    path = io.write_image(series, AFFINE, tmp_path / "t.nii.gz")
    assert np.array_equal(nib.load(path).get_fdata(dtype="float32"), series)


def test_an_error_leaves_no_file(tmp_path, image):
    with pytest.raises(nib.spatialimages.HeaderDataError):
        io.write_image(image.astype("float16"), AFFINE, tmp_path / "t.nii.gz")
    assert os.listdir(tmp_path) == []


def test_more_steps_than_an_integer_holds_are_refused():
    with pytest.raises(ValueError, match="33 has too many steps of 0.000976562"):
        io.in_steps(np.array([33.0], np.float32), 1 / 1024)


def test_slope_keeps_probabilities_in_a_byte(tmp_path):
    steps = np.arange(0, 256, 4, dtype="uint8").reshape(4, 4, 4)
    path = io.write_image(steps, AFFINE, tmp_path / "p.nii.gz", slope=1 / 255)
    assert nib.load(path).get_fdata() == pytest.approx(steps / 255)
    assert nib.load(path).get_data_dtype() == np.uint8


def test_mask_of_bool_becomes_bytes(tmp_path):
    path = io.write_image(np.eye(3, dtype=bool)[..., None], AFFINE, tmp_path / "m.nii.gz")
    assert nib.load(path).get_data_dtype() == np.uint8


def test_source_orientation_codes_are_carried_over(tmp_path, image):
    source = nib.Nifti1Image(image, AFFINE)
    source.set_sform(AFFINE, 4)
    source.set_qform(AFFINE, 2)
    path = io.write_image(image, AFFINE, tmp_path / "a.nii.gz", source_header=source.header)
    header = nib.load(path).header
    assert (int(header["qform_code"]), int(header["sform_code"])) == (2, 4)
    assert np.array_equal(header.get_qform(), source.header.get_qform())


def test_qform_only_source_stays_qform_only(tmp_path, image):
    source = nib.Nifti1Image(image, AFFINE)
    source.set_sform(None, 0)
    source.set_qform(AFFINE, 1)
    path = io.write_image(image, AFFINE, tmp_path / "a.nii.gz", source_header=source.header)
    assert int(nib.load(path).header["sform_code"]) == 0
    assert np.allclose(nib.load(path).affine, AFFINE)


def test_source_without_codes_gets_scanner_coordinates(tmp_path, image):
    source = nib.Nifti1Image(image, None)
    path = io.write_image(image, AFFINE, tmp_path / "a.nii.gz", source_header=source.header)
    assert int(nib.load(path).header["sform_code"]) == 1
    assert np.allclose(nib.load(path).affine, AFFINE)


def test_big_endian_source_does_not_swap_the_output(tmp_path, image):
    source = nib.Nifti1Header(endianness=">")
    source.set_data_shape(image.shape)
    source.set_sform(AFFINE, 1)
    path = io.write_image(image, AFFINE, tmp_path / "a.nii.gz", source_header=source)
    assert np.allclose(nib.load(path).affine, AFFINE)
    assert np.array_equal(nib.load(path).get_fdata(dtype="float32"), image)


def test_table_writes_missing_values_as_bids_wants(tmp_path):
    table = pd.DataFrame({"name": ["a", None], "cv": [0.123456789, np.nan], "index": [1, 2]})
    path = io.write_table(table, tmp_path / "t.tsv")
    assert path.read_bytes() == b"name\tcv\tindex\na\t0.123457\t1\nn/a\tn/a\t2\n"


def test_compressed_image_is_one_whole_gzip_stream(tmp_path, image):
    path = io.write_image(image, AFFINE, tmp_path / "a.nii.gz")
    assert len(gzip.decompress(path.read_bytes())) == 352 + image.nbytes
