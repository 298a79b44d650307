"""Nothing is written but the output, the work directory and temporary files (Linux, strace)."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bids_varaug.machine import CACHES
from tests.workflows.test_group import bids, output  # noqa: F401

CALLS = """open openat openat2 creat truncate mkdir mkdirat rmdir rename renameat renameat2 unlink
unlinkat link linkat symlink symlinkat mknod mknodat chmod fchmodat chown lchown fchownat utimensat
chdir""".split()
CALL = re.compile(r"(\w+)\((.*)\)\s+= \d")  # those that fail have written nothing
PATH = re.compile(r'(?:(?:AT_FDCWD|\d+)<([^>]*)>, )?"((?:[^"\\]|\\.)*)"')


@pytest.fixture(scope="module")
def strace() -> list[str]:
    """Command that runs another and notes who wrote where, one file for each process."""
    command = ["strace", "-qq", "-y", "--seccomp-bpf", "-ff", "-e", "trace=" + ",".join(CALLS)]
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed (apt-get install strace)")
    tried = subprocess.run([*command, "-o", os.devnull, "true"], capture_output=True, text=True)
    if tried.returncode != 0:
        pytest.skip(f"strace cannot trace here: {tried.stderr.strip()}")
    return command


def written(trace: Path, start: Path) -> set[Path]:
    """Files and folders that one process opened for writing, made, moved or removed."""
    found, here = set(), str(start)
    for line in trace.read_text(errors="replace").splitlines():
        call = CALL.match(line)
        if call is None:
            continue
        name, arguments = call.groups()
        paths = PATH.findall(arguments)
        if name == "chdir":
            here = os.path.join(here, paths[0][1])
            continue
        if name.startswith("open") and not re.search("O_WRONLY|O_RDWR|O_CREAT", arguments):
            continue
        if "link" in name and not name.startswith("unlink"):
            paths = paths[-1:]  # what a link points to is not written
        found |= {Path(os.path.normpath(os.path.join(here, *path))) for path in paths}
    return found


def write_traced(strace: list[str], folder: Path, arguments: list[str]) -> set[Path]:
    """Run the app as a user who has set nothing, and return what it wrote."""
    for name in ("home", "t", "trace"):  # a socket in t has a path of at most 107 bytes
        (folder / name).mkdir()
    environment = {name: value for name, value in os.environ.items() if name not in CACHES}
    # Python's own bytecode is written when a package is installed.
    environment |= {"PYTHONDONTWRITEBYTECODE": "1", "HOME": str(folder / "home"),
                    "TMPDIR": str(folder / "t")}  # fmt: skip
    program = "import sys; from bids_varaug.cli.run import main; sys.exit(main())"
    done = subprocess.run(
        [*strace, "-o", str(folder / "trace" / "of"), sys.executable, "-c", program, *arguments],
        env=environment, cwd=folder, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return set().union(*(written(trace, folder) for trace in (folder / "trace").iterdir()))


def elsewhere(paths: set[Path], *allowed: Path) -> set[Path]:
    """Those of `paths` that are neither below `allowed` nor a device, semaphore or process."""
    allowed = (*allowed, Path("/dev"), Path("/proc"))
    return {p for p in paths if not any(p.is_relative_to(folder) for folder in allowed)}


def test_participant_level_writes_output_work_and_temporary_files_only(strace, app, tmp_path):
    out, work = tmp_path / "out", tmp_path / "out-work"
    arguments = app.arguments(
        out, "--participant-label", "02", "--members", "ieee", "--nprocs", "1"
    )
    arguments.remove("--skip-bids-validation")
    paths = write_traced(strace, tmp_path, arguments)
    assert out / "sub-02.html" in paths or any(p.parent == out for p in paths)
    assert {p.name for p in (work / "caches").iterdir()} == set(CACHES.values())
    assert elsewhere(paths, out, work, tmp_path / "t") == set()
    assert list((tmp_path / "t").iterdir()) == []


def test_group_level_writes_output_work_and_temporary_files_only(strace, bids, output, tmp_path):  # noqa: F811
    work = tmp_path / "work"
    arguments = [str(bids), str(output), "group", "-w", str(work), "--brainage-model", "ridge",
                 "--augmentation", "mean"]  # fmt: skip
    paths = write_traced(strace, tmp_path, arguments)
    assert any(p.parent == output for p in paths)
    assert elsewhere(paths, output, work, tmp_path / "t") == set()
    assert list((tmp_path / "t").iterdir()) == []


def test_dry_run_writes_temporary_files_only(strace, app, tmp_path):
    paths = write_traced(strace, tmp_path, app.arguments(tmp_path / "out", "--dry-run"))
    assert any(p.is_relative_to(tmp_path / "t") for p in paths)
    assert elsewhere(paths, tmp_path / "t") == set()
    assert list((tmp_path / "t").iterdir()) == []
