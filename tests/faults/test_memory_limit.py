"""Too little memory is told before the kernel's killer acts."""

import gzip
import os
import re
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import nibabel as nib
import pytest

from bids_varaug.machine import WORKER_MODULES, memory_bound

MEMINFO = "MemTotal:       {total} kB\nMemFree:        1000 kB\nMemAvailable:   {free} kB\n"


def machine(root: Path, total_gib: int = 64, free_gib: int = 32) -> Path:
    (root / "proc" / "self").mkdir(parents=True)
    text = MEMINFO.format(total=total_gib << 20, free=free_gib << 20)
    (root / "proc" / "meminfo").write_text(text)
    return root


def group(root: Path, membership: str, folder: str, files: dict[str, str]) -> None:
    (root / "proc" / "self" / "cgroup").write_text(membership)
    place = root / "sys" / "fs" / "cgroup" / folder
    place.mkdir(parents=True)
    for name, text in files.items():
        (place / name).write_text(text + "\n")


def test_without_control_groups_the_machine_is_the_bound(tmp_path):
    bound = memory_bound(machine(tmp_path))
    assert (bound.total, bound.free) == (64, 32)


def test_limit_of_the_group_above_counts_and_file_cache_is_free(tmp_path):
    """As in a Slurm job: the step's own group has no limit, the job's has."""
    root = machine(tmp_path)
    files = {
        "memory.max": str(4 * 2**30),
        "memory.current": str(3 * 2**30),
        "memory.stat": f"anon 5\ninactive_file {2**30}",
    }
    group(root, "0::/job/step\n", "job", files)
    bound = memory_bound(root)
    assert (bound.total, bound.free) == (4, 2)
    assert bound.source.endswith("job/memory.max")


def test_version_1_in_a_container_that_sees_only_its_own_top(tmp_path):
    root = machine(tmp_path)
    files = {
        "memory.limit_in_bytes": str(2 * 2**30),
        "memory.usage_in_bytes": "0",
        "memory.stat": "cache 0\ntotal_inactive_file 0",
    }
    group(root, "5:memory:/docker/abc\n4:cpu:/\n", "memory", files)
    assert memory_bound(root).total == 2


@pytest.mark.parametrize("unlimited", ["max", str(2**63 - 4096)])
def test_group_without_limit_is_none(tmp_path, unlimited):
    root = machine(tmp_path)
    files = {"memory.max": unlimited, "memory.current": "0", "memory.stat": "anon 0"}
    group(root, "0::/\n", "", files)
    assert memory_bound(root).total == 64


def run_limited(app, out: Path, gib: float) -> tuple[int, str]:
    """Run the app as after ``ulimit -v``: in a new process, since torch maps 0.6 GiB, built for CUDA 3 GiB."""
    code = (
        f"import resource, sys; resource.setrlimit(resource.RLIMIT_AS, ({int(gib * 2**30)},) * 2); "
        "from bids_varaug.cli.run import main; sys.exit(main())"
    )
    command = [sys.executable, "-c", code, *app.arguments(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stderr


def test_address_space_below_the_need_is_refused_before_anything_is_written(app, tmp_path):
    code, log = run_limited(app, tmp_path / "out", 1.5)
    assert code == 64, log
    assert "Not enough memory: the largest step needs 1.6 GB" in log and "ulimit -v" in log
    assert not (tmp_path / "out").exists()


def test_address_space_of_the_libraries_counts(app, tmp_path):
    """Above what a step uses, and below what it and the libraries map."""
    code, log = run_limited(app, tmp_path / "out", 1.7)
    assert code == 64, log
    [need] = re.findall(r"Not enough memory: the largest step needs ([\d.]+) GB .* 1.7 GB \(ulimit -v\)", log)
    assert float(need) > 1.8
    assert not (tmp_path / "out").exists()


def test_what_workers_import_exists():
    assert all(find_spec(name) for name in WORKER_MODULES)


def test_image_too_large_for_the_memory_names_need_and_free(app, tmp_path):
    """700^3 voxels: the header is enough to know."""
    bids_dir = tmp_path / "bids"
    (bids_dir / "sub-01" / "anat").mkdir(parents=True)
    header = nib.Nifti1Header()
    header.set_data_shape((700, 700, 700))
    header.set_data_dtype("u1")
    header.set_sform([[0.35, 0, 0, 0], [0, 0.35, 0, 0], [0, 0, 0.35, 0], [0, 0, 0, 1]], 1)
    header["vox_offset"] = 352
    path = bids_dir / "sub-01" / "anat" / "sub-01_T1w.nii.gz"
    path.write_bytes(gzip.compress(header.binaryblock + bytes(4 + 1000)))
    (bids_dir / "dataset_description.json").write_text('{"Name": "x", "BIDSVersion": "1.10.0"}')
    large = type(app)(bids_dir, app.ensemble, app.linear)
    code, log = large.run(tmp_path / "out", {"RLIMIT_AS": 5 << 30})
    assert code == 1, log
    assert "sub-01_T1w.nii.gz: 700 x 700 x 700 voxels need about 5.1 GB" in log
    assert "Traceback" not in log


def remove_group(place: Path, patience: float = 5.0) -> None:
    """Remove a control group as soon as its last processes, which are about to end, have ended."""
    deadline = time.monotonic() + patience
    while (place / "cgroup.procs").read_text() and time.monotonic() < deadline:
        time.sleep(0.02)
    place.rmdir()


def test_control_group_too_small_is_refused_by_a_real_kernel(app, tmp_path, full):
    if not full:
        pytest.skip("long form only (BIDS_VARAUG_FAULTS=full)")
    v1, v2 = Path("/sys/fs/cgroup/memory/varaug-test"), Path("/sys/fs/cgroup/varaug-test")
    place = v1 if v1.parent.is_dir() else v2
    limit = "memory.limit_in_bytes" if place == v1 else "memory.max"
    try:
        place.mkdir()
        (place / limit).write_text(str(1 << 30))
    except OSError as error:
        pytest.skip(f"needs the right to make a control group ({error})")
    join = f"import os; open('{place}/cgroup.procs', 'w').write(str(os.getpid())); "
    code = join + "import sys; from bids_varaug.cli.run import main; sys.exit(main())"
    try:
        command = [sys.executable, "-c", code, *app.arguments(tmp_path / "out")]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    finally:
        remove_group(place)
    assert done.returncode == 64, done.stderr
    assert f"there are 1.0 GB (limit in {place / limit})" in done.stderr
