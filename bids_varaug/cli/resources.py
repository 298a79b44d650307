"""Whether there is memory and disk for what was asked, told before the work begins."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from bids_varaug.errors import UsageError
from bids_varaug.inputs.scans import Scan
from bids_varaug.machine import memory_bound
from bids_varaug.models.ensemble import Ensemble, Member
from bids_varaug.settings import Settings
from bids_varaug.workflows.participant import WRITE_GB, node_name, segment_gb, work_gb
from bids_varaug.workflows.plugins import runs_here


def check_memory(settings: Settings, ensemble: Ensemble) -> None:
    """Refuse, before anything is written, a memory limit with which no step can run.

    Raises
    ------
    UsageError
        With what is needed, what there is, and who limits it.
    """
    need = max(segment_gb(settings, ensemble), WRITE_GB)
    if settings.mem_gb is not None and settings.mem_gb < need:
        raise UsageError(
            f"--mem {settings.mem_gb:g}G: the largest step needs {need:.1f} GB. Give it at "
            "least that, or leave --mem out."
        )
    if settings.dry_run or settings.reports_only or not runs_here(settings):
        return
    bound = memory_bound()
    if bound.total < need:
        raise UsageError(
            f"Not enough memory: the largest step needs {need:.1f} GB for a head of 256 mm, and "
            f"there are {bound.total:.1f} GB ({bound.source}). The kernel would kill it. Ask for "
            "more (docker --memory, sbatch --mem, ulimit -v), or give --sloppy for a first look."
        )
    if bound.free < need:
        print(
            f"WARNING: the largest step needs {need:.1f} GB, and {bound.free:.1f} of "
            f"{bound.total:.1f} GB are free ({bound.source}). If it is killed, give the same -w "
            "to go on.",
            file=sys.stderr,
        )


def warn_of_disk(
    settings: Settings,
    scans: Sequence[Scan],
    ensemble: Ensemble,
    members: Sequence[Member],
    root: Path,
) -> None:
    """Say before hours of work that the work directory will be full before they end.

    Parameters
    ----------
    scans : those that are not finished
    root : folder of the workflow in the work directory; members that are there already count
    """
    each = work_gb(settings, ensemble, members)
    at_once = min(settings.nprocs, len(scans)) if settings.clean_workdir else len(scans)
    there = sum(
        path.stat().st_size
        for scan in scans
        for step in ("segment", "grids", "average")
        for path in (root / node_name(scan.prefix) / step).glob("**/*.safetensors")
    )
    need, free = at_once * each - there / 1e9, shutil.disk_usage(settings.work_dir).free / 1e9
    if need > free:
        print(
            f"WARNING: {settings.work_dir}: the members of {at_once} image(s) need about "
            f"{need:.0f} GB more there, and {free:.0f} GB are free. Give -w another place"
            + (", or a smaller --nprocs." if settings.clean_workdir else
               ", or --clean-workdir, which keeps those of an image until it is written."),
            file=sys.stderr,
        )  # fmt: skip
