"""Time to start: --help, one participant of a large dataset, and listing all of it.

    python benchmarks/startup.py [--participants 5000] [--repeats 3] [--folder DIR]

The dataset has two sessions a participant, each with a T1w image, a bold series and their sidecars;
all images are links to one file. Each line is of a whole process: the shortest wall time of the
repeats, with the files in the page cache, and the processor time of that process and those it has
waited for. "work begins" when the first step of the graph makes its folder. --folder keeps the
dataset for another time.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np

PROGRAM = str(Path(sys.executable).with_name("bids_varaug"))
PYBIDS = (
    "import sys; from bids import BIDSLayout; layout = BIDSLayout(sys.argv[1], validate=False); "
    "print(len(layout.get(suffix='T1w', extension='.nii.gz')))"
)


def make_dataset(bids_dir: Path, n_participants: int) -> None:
    """Write a valid dataset of hard links to one 3 mm head and one short series."""
    bids_dir.mkdir(parents=True)
    write_json(bids_dir / "dataset_description.json",
               {"Name": "Start-up", "BIDSVersion": "1.10.0", "DatasetType": "raw"})  # fmt: skip
    (bids_dir / "README").write_text("Hard links to one image, made by benchmarks/startup.py.\n")
    write_json(bids_dir / "task-rest_bold.json", {"TaskName": "rest", "RepetitionTime": 2.0})
    affine = np.diag([3.0, 3, 3, 1])
    grid = np.meshgrid(*(np.linspace(-1.15, 1.15, n) for n in (48, 56, 48)), indexing="ij")
    radius = np.sqrt(sum(g**2 for g in grid))
    head = np.select([radius < 0.5, radius < 0.75, radius < 0.85, radius < 1], [900, 600, 100, 800])
    series = nib.Nifti1Image(np.zeros((4, 4, 4, 2), np.int16), affine)
    series.header.set_xyzt_units("mm", "sec")
    series.header["pixdim"][4] = 2
    images = {"T1w": nib.Nifti1Image(head.astype(np.float32), affine), "task-rest_bold": series}
    for name, image in images.items():
        nib.save(image, bids_dir.parent / f"{name}.nii.gz")
    for number in range(1, n_participants + 1):
        for session in "ab":
            stem = f"sub-{number:04d}_ses-{session}"
            for kind, name in (("anat", "T1w"), ("func", "task-rest_bold")):
                folder = bids_dir / f"sub-{number:04d}" / f"ses-{session}" / kind
                folder.mkdir(parents=True)
                os.link(bids_dir.parent / f"{name}.nii.gz", folder / f"{stem}_{name}.nii.gz")
                write_json(folder / f"{stem}_{name}.json", {"MagneticFieldStrength": 3})


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content))


def run(command: list[str], work: Path | None = None) -> tuple[float, float]:
    """Wall and processor seconds to the end or, given the work directory, until work begins."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                               start_new_session=True)  # fmt: skip
    if work is None:
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            sys.exit(f"{' '.join(command)} failed:\n{process.stderr.read().decode()}")
        return time.perf_counter() - started, usage.ru_utime + usage.ru_stime
    while not list(work.glob("*/*/conform")):
        if process.poll() is not None:
            sys.exit(f"ended before work began:\n{process.stderr.read().decode()}")
        time.sleep(0.01)
    wall = time.perf_counter() - started
    ticks = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[11:15]
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return wall, sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


def report(what: str, repeats: int, command: list[str], work: Path | None = None) -> None:
    """Print one line."""
    times = []
    for _ in range(repeats):
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)
        times.append(run(command, work))
    wall, processor = min(times)
    print(f"{what:58s} {wall:7.2f} s, processor {processor:7.2f} s", flush=True)


def main() -> None:
    """Parse the command line and print everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--participants", type=int, default=5000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch)
        bids_dir, work = folder / "bids", Path(scratch) / "work"
        if not bids_dir.exists():
            make_dataset(bids_dir, arguments.participants)
        app = [PROGRAM, str(bids_dir), str(Path(scratch) / "out"), "participant", "-w", str(work)]
        one = ["--participant-label", f"{arguments.participants // 2:04d}"]
        unchecked = ["--skip-bids-validation"]
        report("--help", arguments.repeats, [PROGRAM, "--help"])
        report("one participant, until work begins", arguments.repeats, app + one, work)
        report("the same without validation", arguments.repeats, app + one + unchecked, work)
        report("all listed (--dry-run), without validation", 1, [*app, *unchecked, "--dry-run"])
        report("plain pybids, the same tree", 1, [sys.executable, "-c", PYBIDS, str(bids_dir)])


if __name__ == "__main__":
    main()
