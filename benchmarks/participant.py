"""Time and memory of the participant level on one head.

    python benchmarks/participant.py path/to/sub-01_T1w.nii.gz [--threads 2] [--yardstick]

Prints the time of each step, run one after another in this process, then wall time and peak memory
(proportional set size of the whole process tree) of the command itself. ``--yardstick`` adds one
view of a FastSurfer-sized 2.5D network on 256 slices of 256 x 256, untrained, on the same machine.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import torch

from bids_varaug.derivatives.names import ScanRequest
from bids_varaug.derivatives.scan import write_scan
from bids_varaug.images.conform import prepare_head
from bids_varaug.inputs.scans import find_scans
from bids_varaug.machine import use_threads
from bids_varaug.models.ensemble import load_ensemble, select_members
from bids_varaug.reports.participant import write_subject_report
from bids_varaug.segmentation.fuse import summarise_members
from bids_varaug.segmentation.predict import crop_with_member, segment_with_member
from bids_varaug.settings import Settings


@contextmanager
def timed(what: str):
    """Print how long the block took."""
    started = time.perf_counter()
    yield
    print(f"{what:42s} {time.perf_counter() - started:7.2f} s", flush=True)


def make_dataset(t1w: Path, folder: Path) -> Path:
    """Put one image into a dataset of its own."""
    anat = folder / "bids" / "sub-01" / "anat"
    anat.mkdir(parents=True)
    extension = ".nii.gz" if t1w.name.endswith(".gz") else ".nii"
    shutil.copy(t1w, anat / f"sub-01_T1w{extension}")
    description = {"Name": "One head", "BIDSVersion": "1.10.0", "DatasetType": "raw"}
    (folder / "bids" / "dataset_description.json").write_text(json.dumps(description))
    return folder / "bids"


def time_steps(bids_dir: Path, folder: Path, threads: int, ensemble_name: str) -> None:
    """Run each step in this process."""
    settings = Settings(bids_dir, folder / "steps", "participant", folder / "work")
    (scan,) = find_scans(settings).scans
    ensemble = load_ensemble(ensemble_name)
    members = select_members(ensemble, ["all"])
    work = folder / "work"
    work.mkdir()
    with timed("read, conform, crop"):
        head, geometry = prepare_head(scan.path, ensemble.voxel_size, ensemble.network.multiple)
    with timed("localise the brain"):
        head, geometry = crop_with_member(
            head, geometry, ensemble_name, ensemble.baseline, "cpu", threads
        )
    geometry.save(work / "geometry.json")
    print(f"head box {head.shape}, native {geometry.native_shape}")
    paths = [work / f"{member.id}.safetensors" for member in members]
    for member, path in zip(members, paths, strict=True):
        with timed(f"member {member.id}"):
            segment_with_member(head, geometry, ensemble_name, member, path, "cpu", threads)
    with timed(f"fuse, maps and counts of {len(members)} members"):
        families = [member.family for member in members]
        summary = summarise_members(paths, families, ensemble.temperature, work)
    with timed("to the native grid, derivatives"):
        request = ScanRequest(settings, ensemble, members, scan)
        write_scan(request, work / "geometry.json", paths, summary, work, threads)
    with timed("report"):
        write_subject_report([request])


def tree_memory(pid: int) -> int:
    """Proportional set size of a process and its descendants, bytes."""
    total = 0
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total = int(line.split()[1]) * 1024
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                total += tree_memory(int(child))
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return total  # it ended meanwhile
    return total


def time_command(bids_dir: Path, folder: Path, threads: int, ensemble: str) -> None:
    """Run the command as a user would, and watch its memory."""
    program = Path(sys.executable).with_name("bids_varaug")
    command = [str(program), str(bids_dir), str(folder / "out"), "participant", "--ensemble",
               ensemble, "-w", str(folder / "command-work"), "--nprocs", str(threads),
               "--skip-bids-validation"]  # fmt: skip
    started = time.perf_counter()
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    peak = 0

    def watch():
        nonlocal peak
        while process.poll() is None:
            peak = max(peak, tree_memory(process.pid))
            time.sleep(0.2)

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait()
    watcher.join()
    print(f"{'the command, exit code ' + str(code):42s} {time.perf_counter() - started:7.2f} s")
    print(f"{'peak memory of its processes':42s} {peak / 2**30:7.2f} GiB")


class CompetitiveBlock(torch.nn.Module):
    """Three 5 x 5 convolutions of 64 channels joined by maximum, as in FastSurferCNN."""

    def __init__(self, n_in: int):
        super().__init__()
        self.layers = torch.nn.ModuleList(
            torch.nn.Sequential(
                torch.nn.PReLU(), torch.nn.Conv2d(n, 64, kernel, padding=kernel // 2),
                torch.nn.BatchNorm2d(64),
            )
            for n, kernel in ((n_in, 5), (64, 5), (64, 1))
        )  # fmt: skip

    def forward(self, x):
        """(B, C, X, Y) -> (B, 64, X, Y)."""
        for layer in self.layers:
            y = layer(x)
            x = torch.maximum(x, y) if x.shape == y.shape else y
        return x


def yardstick(slices: int = 32) -> None:
    """One view of a network of FastSurferCNN's size: 7 slices in, 79 classes out, 9 blocks."""
    torch.manual_seed(0)
    down = [CompetitiveBlock(n) for n in (7, 64, 64, 64)]
    bottom, up = CompetitiveBlock(64), [CompetitiveBlock(64) for _ in range(4)]
    head = torch.nn.Conv2d(64, 79, 1)
    x = torch.rand(slices, 7, 256, 256)
    started = time.perf_counter()
    with torch.inference_mode():
        for start in range(0, slices, 8):
            y, skips = x[start : start + 8], []
            for block in down:
                y = block.eval()(y)
                skips.append(y)
                y = torch.nn.functional.max_pool2d(y, 2)
            y = bottom.eval()(y)
            for block in up:
                y = torch.nn.functional.interpolate(y, scale_factor=2)
                y = block.eval()(torch.maximum(y, skips.pop()))
            head(y).softmax(1)
    seconds = (time.perf_counter() - started) * 256 / slices
    what = "FastSurfer-sized 2.5D network, three views"
    print(f"{what:42s} {3 * seconds:7.2f} s (from {slices} of 256 slices of one view)")


def main() -> None:
    """Parse the command line and print everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("t1w", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ensemble", default="aseg31")
    parser.add_argument("--yardstick", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bids_dir = make_dataset(arguments.t1w, folder)
        use_threads(arguments.threads)
        time_command(bids_dir, folder, arguments.threads, arguments.ensemble)
        time_steps(bids_dir, folder, arguments.threads, arguments.ensemble)
    if arguments.yardstick:
        yardstick()


if __name__ == "__main__":
    sys.exit(main())
