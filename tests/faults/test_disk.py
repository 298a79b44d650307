"""A disk that fills up while it is written, and things in the way of an output."""

import shutil
import subprocess

import pytest

from tests.faults.conftest import digests, work_of


def test_file_too_large_for_the_disk_is_named_and_costs_nothing(app, whole, tmp_path):
    """A limit on the size of a file fails as a full disk does, in the middle of a write."""
    out = tmp_path / "out"
    code, log = app.run(out, {"RLIMIT_FSIZE": 20_000})
    assert code in (1, 74), log
    assert "ERROR: " in log and ("disk is full" in log or "work directory" in log), log
    assert "Traceback" not in log
    assert not list(out.rglob("*.part"))
    assert app.run(out)[0] == 0
    assert digests(out) == whole


@pytest.fixture
def small_disk(tmp_path):
    """Mount a file system of a given size."""
    mounted = []

    def mount(kib: int):
        place = tmp_path / f"disk{kib}"
        place.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "none", place])
        if done.returncode:
            pytest.skip("needs the right to mount a tmpfs")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("what", ["output", "work"])
def test_full_disk_is_named_and_the_same_command_goes_on(
    app, whole, tmp_path, small_disk, full, what
):
    if not full:
        pytest.skip("long form only (BIDS_VARAUG_FAULTS=full)")
    for kib in (64, 256, 600, 1000) if what == "output" else (64, 1000):
        out = tmp_path / f"out{kib}"
        target = out if what == "output" else work_of(out)
        disk = small_disk(kib)
        target.symlink_to(disk)
        code, log = app.run(out)
        print(
            what,
            kib,
            "KiB: exit code",
            code,
            [line for line in log.splitlines() if "ERROR" in line],
        )
        if code == 0:
            continue
        assert code in (1, 73, 74) and "ERROR: " in log and "space" in log.lower(), log
        assert "Traceback" not in log
        subprocess.run(["mount", "-o", "remount,size=200m", disk], check=True)
        code, log = app.run(out)
        assert code == 0, log
        assert digests(out) == whole
        for place in disk.iterdir():
            shutil.rmtree(place) if place.is_dir() else place.unlink()


def test_folder_in_the_way_is_named_and_a_read_only_file_replaced(app, whole, tmp_path):
    out = tmp_path / "out"
    path = out / "sub-01" / "anat" / "sub-01_desc-brain_mask.nii.gz"
    path.mkdir(parents=True)
    old = path.with_name("sub-01_seg-varaug_desc-consensus_dseg.nii.gz")
    old.write_bytes(b"of an earlier version")
    old.chmod(0o444)
    code, log = app.run(out)
    assert code == 1
    assert any(line.startswith("ERROR: ") and path.name in line for line in log.splitlines()), log
    path.rmdir()
    assert app.run(out)[0] == 0
    assert digests(out) == whole
