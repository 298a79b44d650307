"""What each image is segmented with, the memory and disk space that this takes, and what is done already."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bids_varaug import __version__
from bids_varaug.derivatives.names import Run, ScanRequest
from bids_varaug.errors import UsageError
from bids_varaug.files import write_json
from bids_varaug.inputs.scans import Scan
from bids_varaug.machine import WORKER_MODULES, memory_bound, resolve_device
from bids_varaug.models.ensemble import (
    Member,
    check_member,
    load_ensemble,
    round_inference,
    select_members,
    sha256_of,
)
from bids_varaug.registration.space import OutputSpace
from bids_varaug.registration.template import find_template_t1w, load_template
from bids_varaug.settings import Settings

# Peak memory of each step on a 256^3 whole head, GB (benchmarks/participant.py), rounded up.
STEP_GB = {"conform": 1.2, "segment": 3.0, "fuse": 1.2, "register": 1.2, "write": 1.6, "report": 1.0}
FASTSURFER_GB = 2.5  # at 1 mm, in place of "segment"; the sum of logits grows with the number of voxels
LIBRARIES_GB = 0.6  # of a member's; the rest is proportional to the number of voxels
# What a pass leaves in the work directory at 1 mm, GB (a brain of 1.5 l, 32 classes).
POSTERIOR_GB = 0.07
OUTPUT_GB = 0.04  # derivatives and report of a 256^3 head
# Processor time on a 256^3 head, s (benchmarks/participant.py on two processors): a pass at 1 mm, and all other steps.
PASS_S, OTHER_STEPS_S = 9.0, 32.0
# Of a registration (benchmarks/registration.py): its affine, an iteration of --refine. Of an output space: time, and GB
# of results by resolution, of which the transforms are 0.02.
AFFINE_S, ITERATION_S, SPACE_S = 0.4, 0.5, 8.0
SPACE_GB = {1: 0.05, 2: 0.025}
RECORD = "write/finished.json"  # with --clean-workdir, the one file of a scan that stays in the work directory


@dataclass(frozen=True)
class Plan(Run):
    """A run, and what it takes."""

    @property
    def locator(self) -> Member:
        """The member that locates the brain."""
        return self.ensemble.baseline or self.members[0]

    @property
    def segment_gb(self) -> float:
        """Peak memory of a member on a head of 256 x 256 x 256 mm, GB."""
        if self.ensemble.is_fastsurfer:
            return FASTSURFER_GB
        return LIBRARIES_GB + (STEP_GB["segment"] - LIBRARIES_GB) / self.voxel_size**3

    def segment_gb_of(self, scan: Scan) -> float:
        """Peak memory of a member on one image, GB: FastSurfer's grid is as fine as the image's."""
        if not self.ensemble.is_fastsurfer:
            return self.segment_gb
        from bids_varaug.images.fastsurfer import voxel_size_of

        return LIBRARIES_GB + (FASTSURFER_GB - LIBRARIES_GB) / voxel_size_of(scan.path) ** 3

    def request(self, scan: Scan) -> ScanRequest:
        """What is asked for of one scan."""
        return ScanRequest(self.settings, self.ensemble, self.members, scan)


def make_plan(settings: Settings) -> Plan:
    """Load the ensemble, choose members and device, check the weights; raises `UsageError`, `EnsembleError`."""
    device = resolve_device(settings.device)
    ensemble = load_ensemble(settings.ensemble)
    if ensemble.is_fastsurfer and settings.sloppy:
        raise UsageError("--sloppy: FastSurfer's networks segment on their own grid of at most 1 mm. Leave it out.")
    if settings.whole_voxels and not ensemble.is_fastsurfer:
        raise UsageError("--whole-voxels is for FastSurfer's networks; others do not shift images. Leave it out.")
    if settings.output_spaces and ensemble.is_fastsurfer:
        raise UsageError(
            "--output-spaces: the registration follows the template's labels, which have the cortex whole, and "
            "FastSurfer's networks have it in parcels. Leave it out, or run the shipped ensemble with it, into another "
            "output folder."
        )
    n_members = settings.n_members
    if settings.sloppy and n_members is None and settings.members == ("all",):
        n_members = 1  # of each perturbed family, beside the baseline
    members = select_members(ensemble, settings.members, n_members)
    counts = Counter(member.family for member in members if not member.is_baseline)
    if few := [f"{n} of {family}" for family, n in counts.items() if n < (n_members or 0)]:
        print(f"Note: --n-members {n_members}: ensemble {ensemble.name} has {', '.join(few)}.", file=sys.stderr)
    members += round_inference(ensemble, settings.perturb_inference, settings.random_seed)
    for member in members:
        check_member(ensemble, member)
    template_t1w = None
    if settings.output_spaces:
        load_template([int(label.index) for label in ensemble.labels])  # before hours of work
        template_t1w = find_template_t1w(settings.allow_downloads)
    return Plan(replace(settings, device=device, template_t1w=template_t1w), ensemble, members)


def check_memory(plan: Plan) -> None:
    """Raise a `UsageError`, before anything is written, for a memory limit with which no step can run."""
    settings, need = plan.settings, max(plan.segment_gb, STEP_GB["write"])
    if settings.mem_gb is not None and settings.mem_gb < need:
        raise UsageError(
            f"--mem {settings.mem_gb:g}G: the largest step needs {need:.1f} GB. Increase --mem, or leave it out."
        )
    if settings.dry_run or not settings.runs_here:
        return
    bound = memory_bound()
    if bound.source == "ulimit -v" and bound.total >= need:
        need += _unused_address_space(bound.total)
    if bound.total < need:
        raise UsageError(
            f"Not enough memory: the largest step needs {need:.1f} GB for a head of 256 mm, and there are "
            f"{bound.total:.1f} GB ({bound.source}). The kernel would kill it. Ask for more (docker --memory, sbatch "
            "--mem, ulimit -v), or use --sloppy for a first look."
        )
    if bound.free < need:
        print(
            f"WARNING: the largest step needs {need:.1f} GB, and {bound.free:.1f} of {bound.total:.1f} GB are free "
            f"({bound.source}). If it is killed, resume with the same -w.",
            file=sys.stderr,
        )


def _unused_address_space(limit: float) -> float:
    """GiB that a worker's libraries map and do not use (3, if torch is built for CUDA), which ``ulimit -v`` counts.

    All of `limit` where they do not fit into it. 0 on macOS, which does not enforce it.
    """
    if not sys.platform.startswith("linux"):
        return 0.0
    code = (
        f"import resource, {', '.join(WORKER_MODULES)}\n"
        "mapped, used = map(int, open('/proc/self/statm').read().split()[:2])\n"
        "print((mapped - used) * resource.getpagesize() / 2**30)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return float(done.stdout) if done.returncode == 0 else limit


def warn_of_disk(plan: Plan, folders: Sequence[Path]) -> None:
    """Warn, before hours of work, if images (with these folders) will fill the disk of the work directory."""
    settings = plan.settings
    n_images = min(settings.nprocs, len(folders)) if settings.clean_workdir else len(folders)
    there = sum(path.stat().st_size for folder in folders for path in folder.glob("segment/**/*.safetensors"))
    need = n_images * _work_gb(plan) - there / 1e9
    free = shutil.disk_usage(settings.work_dir).free / 1e9
    if need > free:
        space = f"the members of {n_images} image(s) need about {need:.0f} GB more there, and {free:.0f} GB are free"
        other = "--clean-workdir, which removes those of an image once it is written"
        use = "a smaller --nprocs" if settings.clean_workdir else other
        print(f"WARNING: {settings.work_dir}: {space}. Choose another -w, or use {use}.", file=sys.stderr)


def _work_gb(plan: Plan) -> float:
    """What an image leaves in the work directory, GB."""
    return len(plan.members) * POSTERIOR_GB / plan.voxel_size**3


def describe_cost(plan: Plan, n_images: int) -> str:
    """Say what so many images take, for heads of 256 mm and processors as those that were measured."""
    settings = plan.settings
    at_once = min(settings.nprocs, n_images) if settings.clean_workdir else n_images
    spaces, n_perturbed = [OutputSpace.parse(space) for space in settings.output_spaces], len(plan.perturbed)
    results = n_images * (OUTPUT_GB + sum(SPACE_GB[space.resolution or 1] for space in spaces))
    disk = f"{at_once * _work_gb(plan):.1f} GB in the work directory, {results:.1f} GB of results"
    if settings.device != "cpu":
        return f"{disk}. The time on {settings.device} is not known."
    seconds = len(plan.members) * PASS_S / plan.voxel_size**3 + OTHER_STEPS_S + SPACE_S * len(spaces)
    if spaces:  # the consensus is registered, and each member where there are several
        seconds += (n_perturbed + (n_perturbed > 1)) * (AFFINE_S + ITERATION_S * settings.refine)
    seconds *= n_images / settings.nprocs
    time = f"{seconds / 3600:.1f} h" if seconds > 7200 else f"{max(1, round(seconds / 60))} min"
    return f"about {time} on {settings.nprocs} processor(s), {disk}, for heads of 256 mm."


def record_finished(request: ScanRequest, outputs: Sequence[Path], scan_folder: Path) -> None:
    """Note in the work directory what was written, sidecars too, for which request."""
    sidecars = (path.with_name(path.name.partition(".")[0] + ".json") for path in outputs)
    files = [*outputs, *(path for path in sidecars if path.is_file())]
    record = {"Request": _text_of(request), "SHA256": {str(path): sha256_of(path) for path in files}}
    write_json(record, scan_folder / RECORD)


def is_finished(request: ScanRequest, scan_folder: Path) -> bool:
    """Whether all that an earlier run wrote for this request is as it was."""
    try:
        record = json.loads((scan_folder / RECORD).read_text(encoding="utf-8"))
        digests = {path: sha256_of(Path(path)) for path in record["SHA256"]}
        return (record["Request"], record["SHA256"]) == (_text_of(request), digests)
    except (OSError, ValueError, KeyError, TypeError):
        return False  # absent or damaged: the steps run


def remove_steps(scan_folder: Path) -> None:
    """Remove the steps of a scan that is written, gigabytes, but for the record."""
    if (scan_folder / RECORD).is_file():
        for step in scan_folder.iterdir():
            if step.name != "write":
                shutil.rmtree(step, ignore_errors=True)


def _text_of(request: ScanRequest) -> str:
    """All that the derivatives of a scan depend on; the ensemble's text has all checksums."""
    settings, scan = request.settings, request.scan
    status = scan.path.stat()
    return repr((
        __version__, settings.output_dir, settings.sloppy, settings.write_members, settings.family_maps,
        settings.whole_voxels, settings.freesurfer_dir, settings.output_spaces, settings.refine,
        scan, status.st_size, status.st_mtime_ns, request.ensemble, request.members,
    ))  # fmt: skip
