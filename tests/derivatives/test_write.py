import errno
import gzip
import os
import stat

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from bids_varaug.derivatives import write
from bids_varaug.errors import OutputError

AFFINE = np.array([[-2.0, 0, 0, 8], [0, 0, 2, -9], [0, -2, 0, 10], [0, 0, 0, 1]])


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(5, 6, 40)).astype("float32")


@pytest.fixture
def annexed(tmp_path):
    """An output as git-annex leaves it: a link to a read-only file."""
    content = tmp_path / "objects" / "key"
    content.parent.mkdir()
    content.write_text("old")
    content.chmod(0o444)
    link = tmp_path / "out.json"
    link.symlink_to(content)
    return link, content


def test_image_is_read_back_as_written(tmp_path, image):
    path = write.write_image(image, AFFINE, tmp_path / "a.nii.gz")
    read = nib.load(path)
    assert np.array_equal(read.get_fdata(dtype="float32"), image)
    assert np.array_equal(read.affine, AFFINE)


def test_plain_nifti_is_not_compressed(tmp_path, image):
    path = write.write_image(image, AFFINE, tmp_path / "a.nii")
    assert path.stat().st_size == 352 + image.nbytes


def test_equal_data_gives_equal_bytes(tmp_path, image):
    one = write.write_image(image, AFFINE, tmp_path / "one.nii.gz").read_bytes()
    two = write.write_image(image.copy("F"), AFFINE, tmp_path / "two.nii.gz").read_bytes()
    assert one == two


def test_gzip_header_has_neither_time_nor_name(tmp_path, image):
    head = write.write_image(image, AFFINE, tmp_path / "a.nii.gz").read_bytes()[:10]
    assert head[3:8] == b"\0\0\0\0\0"


def test_series_is_read_back_as_written(tmp_path, image):
    path = write.write_image_series(
        iter([image, image + 1]), (*image.shape, 2), AFFINE, tmp_path / "t.nii.gz", "f4"
    )
    read = nib.load(path).get_fdata(dtype="float32")
    assert np.array_equal(read, np.stack([image, image + 1], axis=3))


def test_series_of_another_type_than_announced_is_refused(tmp_path, image):
    with pytest.raises(ValueError, match="float32"):
        write.write_image_series([image], image.shape, AFFINE, tmp_path / "t.nii", "uint8")


def test_series_with_a_volume_missing_leaves_no_file(tmp_path, image):
    with pytest.raises(ValueError, match="1 volumes instead of 2"):
        write.write_image_series(
            iter([image]), (*image.shape, 2), AFFINE, tmp_path / "t.nii.gz", "f4"
        )
    assert os.listdir(tmp_path) == []


def test_slope_keeps_probabilities_in_a_byte(tmp_path):
    steps = np.arange(0, 256, 4, dtype="uint8").reshape(4, 4, 4)
    path = write.write_image_series(
        [steps], steps.shape, AFFINE, tmp_path / "p.nii.gz", "uint8", slope=1 / 255
    )
    assert nib.load(path).get_fdata() == pytest.approx(steps / 255)
    assert nib.load(path).get_data_dtype() == np.uint8


def test_mask_of_bool_becomes_bytes(tmp_path):
    path = write.write_image(np.eye(3, dtype=bool)[..., None], AFFINE, tmp_path / "m.nii.gz")
    assert nib.load(path).get_data_dtype() == np.uint8


def test_source_orientation_codes_are_carried_over(tmp_path, image):
    source = nib.Nifti1Image(image, AFFINE)
    source.set_sform(AFFINE, 4)
    source.set_qform(AFFINE, 2)
    path = write.write_image(image, AFFINE, tmp_path / "a.nii.gz", source_header=source.header)
    header = nib.load(path).header
    assert (int(header["qform_code"]), int(header["sform_code"])) == (2, 4)
    assert np.array_equal(header.get_qform(), source.header.get_qform())


def test_qform_only_source_stays_qform_only(tmp_path, image):
    source = nib.Nifti1Image(image, AFFINE)
    source.set_sform(None, 0)
    source.set_qform(AFFINE, 1)
    path = write.write_image(image, AFFINE, tmp_path / "a.nii.gz", source_header=source.header)
    assert int(nib.load(path).header["sform_code"]) == 0
    assert np.allclose(nib.load(path).affine, AFFINE)


def test_source_without_codes_gets_scanner_coordinates(tmp_path, image):
    source = nib.Nifti1Image(image, None)
    path = write.write_image(image, AFFINE, tmp_path / "a.nii.gz", source_header=source.header)
    assert int(nib.load(path).header["sform_code"]) == 1
    assert np.allclose(nib.load(path).affine, AFFINE)


def test_big_endian_source_does_not_swap_the_output(tmp_path, image):
    source = nib.Nifti1Header(endianness=">")
    source.set_data_shape(image.shape)
    source.set_sform(AFFINE, 1)
    path = write.write_image(image, AFFINE, tmp_path / "a.nii.gz", source_header=source)
    assert np.allclose(nib.load(path).affine, AFFINE)
    assert np.array_equal(nib.load(path).get_fdata(dtype="float32"), image)


def test_table_writes_missing_values_as_bids_wants(tmp_path):
    table = pd.DataFrame({"name": ["a", None], "cv": [0.123456789, np.nan], "index": [1, 2]})
    path = write.write_table(table, tmp_path / "t.tsv")
    assert path.read_bytes() == b"name\tcv\tindex\na\t0.123457\t1\nn/a\tn/a\t2\n"


def test_json_ends_with_a_line_end_and_keeps_order(tmp_path):
    path = write.write_json({"b": 1, "a": "µ"}, tmp_path / "x" / "a.json")
    assert path.read_text(encoding="utf-8") == '{\n  "b": 1,\n  "a": "µ"\n}\n'


def test_bytes_that_are_no_text_do_not_cost_the_output(tmp_path):
    path = write.write_text(os.fsdecode(b"/data/\xff"), tmp_path / "a.html")
    assert path.read_text(encoding="utf-8") == r"/data/\udcff"


def test_json_refuses_nan(tmp_path):
    with pytest.raises(ValueError):
        write.write_json({"a": float("nan")}, tmp_path / "a.json")


def test_annexed_output_is_replaced_as_a_link(annexed):
    link, content = annexed
    write.write_text("new", link)
    assert not link.is_symlink()
    assert link.read_text() == "new"
    assert content.read_text() == "old"


def test_permissions_follow_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        path = write.write_text("x", tmp_path / "a.txt")
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, 74), (errno.EACCES, 73)])
def test_failed_write_names_the_file_and_leaves_the_old_one(tmp_path, monkeypatch, number, code):
    path = tmp_path / "a.nii.gz"
    path.write_text("old")

    def fail(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(write.os, "fsync", fail)
    with pytest.raises(OutputError, match="a.nii.gz") as caught:
        write.write_image(np.zeros((3, 3, 3), "uint8"), AFFINE, path)
    assert caught.value.exit_code == code
    assert os.listdir(tmp_path) == ["a.nii.gz"]
    assert path.read_text() == "old"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full (Linux)")
def test_really_full_disk_is_reported_as_such(tmp_path, monkeypatch):
    real_open = type(tmp_path).open
    monkeypatch.setattr(
        type(tmp_path),
        "open",
        lambda self, mode="r", **k: (
            open("/dev/full", "wb") if "x" in mode else real_open(self, mode, **k)
        ),
    )
    with pytest.raises(write.DiskError, match="disk is full"):
        write.write_image(np.zeros((64, 64, 64), "float32"), AFFINE, tmp_path / "a.nii")


def test_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), write.replacing(path) as stream:
        stream.write(b"half")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["a.txt"]
    assert path.read_text() == "old"


def test_leftover_of_a_killed_run_is_removed(tmp_path):
    leftover = tmp_path / ".a.txt.0123abcd.part"
    leftover.write_text("half")
    os.utime(leftover, (0, 0))
    write.write_text("x", tmp_path / "a.txt")
    assert os.listdir(tmp_path) == ["a.txt"]


def test_unwritable_place_is_an_output_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be created"):
        write.write_text("x", tmp_path / "file" / "a.txt")


def test_compressed_image_is_one_whole_gzip_stream(tmp_path, image):
    path = write.write_image(image, AFFINE, tmp_path / "a.nii.gz")
    assert len(gzip.decompress(path.read_bytes())) == 352 + image.nbytes
