"""Files are whole or absent, and what cannot be written is explained."""

import errno
import os
import stat

import numpy as np
import pytest

from bids_varaug import files
from bids_varaug.derivatives.io import write_image
from bids_varaug.errors import DiskError, OutputError


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


def test_json_ends_with_a_line_end_and_keeps_order(tmp_path):
    path = files.write_json({"b": 1, "a": "µ"}, tmp_path / "x" / "a.json")
    assert path.read_text(encoding="utf-8") == '{\n  "b": 1,\n  "a": "µ"\n}\n'


def test_bytes_that_are_no_text_do_not_cost_the_output(tmp_path):
    path = files.write_text(os.fsdecode(b"/data/\xff"), tmp_path / "a.html")
    assert path.read_text(encoding="utf-8") == r"/data/\udcff"


def test_json_refuses_nan(tmp_path):
    with pytest.raises(ValueError):
        files.write_json({"a": float("nan")}, tmp_path / "a.json")


def test_annexed_output_is_replaced_as_a_link(annexed):
    link, content = annexed
    files.write_text("new", link)
    assert not link.is_symlink()
    assert link.read_text() == "new"
    assert content.read_text() == "old"


def test_permissions_follow_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        path = files.write_text("x", tmp_path / "a.txt")
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, 74), (errno.EIO, 74), (errno.EACCES, 73)])
def test_failed_write_names_the_file_and_leaves_the_old_one(tmp_path, monkeypatch, number, code):
    path = tmp_path / "a.nii.gz"
    path.write_text("old")

    def fail(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(OutputError, match="a.nii.gz") as caught:
        write_image(np.zeros((3, 3, 3), "uint8"), np.eye(4), path)
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
    with pytest.raises(DiskError, match="disk is full"):
        write_image(np.zeros((64, 64, 64), "float32"), np.eye(4), tmp_path / "a.nii")


def test_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), files.replacing(path) as stream:
        stream.write(b"half")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["a.txt"]
    assert path.read_text() == "old"


def test_leftover_of_a_killed_run_is_removed(tmp_path):
    leftover = tmp_path / ".a.txt.0123abcd.part"
    leftover.write_text("half")
    os.utime(leftover, (0, 0))
    files.write_text("x", tmp_path / "a.txt")
    assert os.listdir(tmp_path) == ["a.txt"]


def test_unwritable_place_is_an_output_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be created"):
        files.write_text("x", tmp_path / "file" / "a.txt")
