from __future__ import annotations

import gzip
import warnings

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from bids_varaug.errors import ScanError
from bids_varaug.images.intensity import standardise
from bids_varaug.images.load import load_t1w

SHAPE = (80, 72, 75)


@pytest.fixture
def image():
    noise = np.random.default_rng(1).normal(size=SHAPE)
    return np.round(100 + 400 * gaussian_filter(noise, 2)).clip(0, 199).astype(np.int16)


def edited_header(path, **fields):
    """Change header fields of a written .nii.gz, whatever nibabel thinks of them."""
    content = bytearray(gzip.decompress(path.read_bytes()))
    header = np.ndarray((), nib.Nifti1Header.template_dtype, buffer=content)
    for name, value in fields.items():
        header[name] = value
    path.write_bytes(gzip.compress(bytes(content), 1))
    return path


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.float32, np.float64])
@pytest.mark.parametrize("name", ["sub-01_T1w.nii", "sub-01_T1w.nii.gz"])
def test_values_are_those_that_nibabel_reads(save, image, dtype, name):
    path = save(image.astype(dtype), name=name)
    assert np.array_equal(load_t1w(path).data, standardise(nib.load(path).get_fdata()))


@pytest.mark.parametrize("slope", [0.5, 1e-9, 3.7e20])
def test_slope_and_intercept_change_nothing(save, image, slope):
    path = edited_header(save(image), scl_slope=slope, scl_inter=-3)
    assert np.array_equal(load_t1w(path).data, standardise(image))


def test_negative_slope_turns_dark_and_bright_round(save, image):
    path = edited_header(save(200 - image), scl_slope=-1, scl_inter=200)
    assert np.array_equal(load_t1w(path).data, standardise(image))


def test_nifti2_is_read(tmp_path, image):
    nib.save(nib.Nifti2Image(image, np.eye(4)), tmp_path / "x_T1w.nii.gz")
    assert np.array_equal(load_t1w(tmp_path / "x_T1w.nii.gz").data, standardise(image))


def test_big_endian_is_read(tmp_path, image):
    header = nib.Nifti1Header(endianness=">")
    header.set_data_dtype(np.dtype(">i2"))
    nib.save(nib.Nifti1Image(image, np.eye(4), header), tmp_path / "x_T1w.nii")
    assert np.array_equal(load_t1w(tmp_path / "x_T1w.nii").data, standardise(image))


def test_header_extensions_are_skipped(tmp_path, image):
    scan = nib.Nifti1Image(image, np.eye(4))
    scan.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"x" * 1000))
    nib.save(scan, tmp_path / "x_T1w.nii.gz")
    assert np.array_equal(load_t1w(tmp_path / "x_T1w.nii.gz").data, standardise(image))


def test_trailing_singleton_dimension_is_squeezed(save, image):
    volume = load_t1w(save(image[..., None]))
    assert volume.data.shape == SHAPE


def test_affine_is_the_headers(save, image):
    affine = np.array([[0, 0, 1.2, -9], [-1, 0, 0, 80], [0, 1, 0, 3.5], [0, 0, 0, 1]])
    np.testing.assert_allclose(load_t1w(save(image, affine)).affine, affine, atol=1e-5)


def wrapped_at(image, percent):
    """Values of which so many overflow 16 bits."""
    grainy = image + np.random.default_rng(0).normal(0, 5, image.shape)
    scaled = grainy * 32767 / np.percentile(grainy, 100 - percent)
    return scaled.astype(np.int64).astype(np.int16)


def bad_nan(save, image):
    image = image.astype(np.float32)
    image[3:5, 4, 5] = np.nan, np.inf
    return save(image)


def bad_text(save, image):
    path = save(image)
    path.write_text("not an image\n" * 100)
    return path


def bad_gzipped_text(save, image):
    path = save(image)
    path.write_bytes(gzip.compress(b"not an image\n" * 100))
    return path


def bad_empty(save, image):
    path = save(image)
    path.write_bytes(b"")
    return path


def bad_empty_gzip(save, image):
    path = save(image)
    path.write_bytes(gzip.compress(b""))
    return path


def bad_truncated(save, image):
    path = save(image)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def bad_truncated_plain(save, image):
    path = save(image, name="sub-01_T1w.nii")
    path.write_bytes(path.read_bytes()[:-100])
    return path


def bad_trailer(save, image):
    path = save(image)
    path.write_bytes(path.read_bytes()[:-4])
    return path


def bad_checksum(save, image):
    path = save(image)
    content = bytearray(path.read_bytes())
    content[-8] ^= 1
    path.write_bytes(content)
    return path


def bad_link(save, image):
    path = save(image)
    path.unlink()
    path.symlink_to("../.git/annex/objects/absent")
    return path


def bad_absent(save, image):
    path = save(image)
    path.unlink()
    return path


CASES = {
    "empty file": (bad_empty, "is empty"),
    "empty gzip": (bad_empty_gzip, "truncated"),
    "truncated": (bad_truncated, "damaged|truncated"),
    "truncated plain": (bad_truncated_plain, "truncated"),
    "without its gzip trailer": (bad_trailer, "damaged"),
    "wrong checksum": (bad_checksum, "damaged"),
    "text": (bad_text, "Not a gzipped file"),
    "compressed text": (bad_gzipped_text, "not a NIfTI"),
    "dangling link": (bad_link, "datalad get"),
    "absent": (bad_absent, "no such file"),
    "NaN": (bad_nan, "2 of 432,000 voxels"),
    "4D": (lambda save, i: save(np.stack([i, i], -1)), r"80 x 72 x 75 x 2"),
    "RGB": (lambda save, i: save(np.zeros(SHAPE, "u1,u1,u1").view([("R", "u1"), ("G", "u1"),
            ("B", "u1")])), "type RGB"),
    "complex": (lambda save, i: save(i.astype(np.complex64)), "type complex"),
    "constant": (lambda save, i: save(np.full(SHAPE, 7, np.int16)), "every voxel is 7"),
    "2D": (lambda save, i: save(i[:, :, 0]), "field of view"),
    "too small": (lambda save, i: save(i[:, :, :69]),
                  "view of 80 x 72 x 69 mm; that of a whole head is 70 to 600 mm.*use an image of the whole brain"),
    "too large": (lambda save, i: save(np.resize(i, (130, 72, 75)),
                  np.diag([5.0, 1, 1, 1])), "view of 650 x 72 x 75 mm.*crop the image"),
    "fine voxels": (lambda save, i: save(i, np.diag([0.2, 1, 1, 1])), "voxels of 0.2 x 1 x 1"),
    "coarse voxels": (lambda save, i: save(i, np.diag([1, 1, 6.0, 1])), "voxels of 1 x 1 x 6"),
    "no orientation": (lambda save, i: edited_header(save(i), qform_code=0, sform_code=0),
                       "left and right"),
    "singular": (lambda save, i: edited_header(save(i), srow_z=0), "singular"),
    "sheared": (lambda save, i: edited_header(save(i), srow_z=[0, 2, 0.5, 0]), "sheared"),
    "no voxel size": (lambda save, i: edited_header(save(i), pixdim=[1, 0, 1, 1, 0, 0, 0, 0],
                      qform_code=1, sform_code=0), "singular"),
    "few values wrapped": (lambda save, i: save(wrapped_at(i, 0.3)), "wrapped around"),
    "NaN affine": (lambda save, i: edited_header(save(i), srow_x=np.nan), "affine has NaN"),
    "enormous": (lambda save, i: edited_header(save(i), dim=[3, 32767, 32767, 32767, 1, 1, 1, 1]),
                 "header claims 32767"),
    "larger than it can hold": (
        lambda save, i: edited_header(
            save(np.zeros(SHAPE, np.uint8)), dim=[3, 550, 550, 550, 1, 1, 1, 1]),
        "can hold"),
    "negative shape": (lambda save, i: edited_header(save(i), dim=[3, 80, -72, 75, 1, 1, 1, 1]),
                       "impossible shape|damaged"),
    "no dimensions": (lambda save, i: edited_header(save(i), dim=0), "impossible|field|damaged"),
    "unknown type": (lambda save, i: edited_header(save(i), datatype=999), "damaged|type"),
    "pair": (lambda save, i: edited_header(save(i), magic=b"ni1"), "pair"),
    "data in the header": (lambda save, i: edited_header(save(i), vox_offset=100),
                           "vox offset 100"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_image_is_refused_with_its_name_and_reason(save, image, case):
    make, message = CASES[case]
    path = make(save, image)
    with warnings.catch_warnings(), pytest.raises(ScanError, match=message) as caught:
        warnings.simplefilter("error")
        load_t1w(path)
    assert str(caught.value).startswith(path.name)
    assert "--bids" not in str(caught.value)  # what holds for datasets is said where there is one


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_damaged_header_gives_an_image_or_a_scan_error(save, image, data):
    path = save(image[:72, :72, :72].astype(np.uint8), name="x_T1w.nii")
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, 351))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        volume = load_t1w(path)
    except ScanError:
        return
    assert volume.data.ndim == 3 and np.isfinite(volume.data).all()
