"""The participant level as a graph: scans side by side, members one after another."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from nipype import MapNode, Node, Workflow
from nipype.interfaces.utility import IdentityInterface, Merge

from bids_varaug import __version__
from bids_varaug.derivatives.request import ScanRequest
from bids_varaug.inputs.scans import Scan
from bids_varaug.models.ensemble import Ensemble, Member, identify
from bids_varaug.reports.request import ReportRequest
from bids_varaug.segmentation.grids import GRIDS
from bids_varaug.settings import Settings
from bids_varaug.workflows.finished import finished_outputs
from bids_varaug.workflows.interfaces import (
    AverageGrids,
    Conform,
    FuseMembers,
    LocateBrain,
    SegmentMember,
    WriteReport,
    WriteScan,
)

# Peak memory of each step on a 256^3 whole head, GB (benchmarks/participant.py), rounded up. That
# of a member varies between processes, 2.4 to 3.0; under random rounding it was 2.2 to 2.4.
CONFORM_GB, LOCATE_GB, SEGMENT_GB, FUSE_GB, WRITE_GB, REPORT_GB = 1.0, 1.2, 3.0, 1.2, 1.6, 1.0
AVERAGE_GB = 0.8
LIBRARIES_GB = 0.6  # of SEGMENT_GB; the rest goes with the number of voxels
# What a pass leaves in the work directory at 1 mm, GB (a brain of 1.5 l, 32 classes).
POSTERIOR_GB = 0.07

# With the version: what another one left in the work directory may be of another kind.
WORKFLOW_NAME = "bids_varaug_" + re.sub(r"\W", "_", __version__)


def init_participants_wf(
    settings: Settings,
    scans: Sequence[Scan],
    ensemble: Ensemble,
    members: Sequence[Member],
    finished: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> Workflow:
    """Segment every scan and write one report for each participant.

    Parameters
    ----------
    scans : images whose content is there
    members : which members to run, baseline included
    finished : derivatives of scans, by their prefix, that need no step any more but the report
    """
    workflow = Workflow(WORKFLOW_NAME, base_dir=str(settings.work_dir))
    subjects: dict[str, list[Scan]] = {}
    for scan in scans:
        subjects.setdefault(scan.subject, []).append(scan)
    for subject, theirs in subjects.items():
        gather = Node(Merge(len(theirs)), f"gather_{node_name('sub-' + subject)}")
        gather.run_without_submitting = True  # not worth a job
        report = _node(
            WriteReport(request=ReportRequest(settings, ensemble, tuple(members), tuple(theirs))),
            f"report_{node_name('sub-' + subject)}", 1, REPORT_GB,
        )  # fmt: skip
        for number, scan in enumerate(theirs, start=1):
            if scan.prefix in finished:
                gather.inputs.trait_set(**{f"in{number}": list(finished[scan.prefix])})
                continue
            scan_wf = init_scan_wf(settings, scan, ensemble, members, node_name(scan.prefix))
            workflow.connect(scan_wf, "outputnode.derivatives", gather, f"in{number}")
        workflow.connect(gather, "out", report, "derivatives")
    return workflow


def find_finished(
    settings: Settings, scans: Sequence[Scan], ensemble: Ensemble, members: Sequence[Member]
) -> dict[str, list[str]]:
    """Derivatives of the scans that a run with ``--clean-workdir`` wrote, by prefix."""
    root = settings.work_dir / WORKFLOW_NAME
    found = {
        scan.prefix: finished_outputs(
            ScanRequest(settings, scan, ensemble, tuple(members)), root / node_name(scan.prefix)
        )
        for scan in scans
    }
    return {prefix: outputs for prefix, outputs in found.items() if outputs is not None}


def segment_gb(settings: Settings, ensemble: Ensemble) -> float:
    """Peak memory of a member on a head of 256 x 256 x 256 mm, GB."""
    voxels = (SEGMENT_GB - LIBRARIES_GB) / network_voxel_size(settings, ensemble) ** 3
    return LIBRARIES_GB + voxels


def suitable_grids(settings: Settings, ensemble: Ensemble) -> int:
    """On how many grids the baseline is to segment, where ``--grids`` leaves that open.

    Of members that share no training it is not known whether they move with the baseline.
    """
    return 1 if settings.sloppy or ensemble.trunk is None else 4


def n_passes(settings: Settings, ensemble: Ensemble, members: Sequence[Member]) -> int:
    """How many times a scan is segmented."""
    on_several = settings.grids if settings.grids > 1 else 0
    return on_several + len(on_first_grid(settings, ensemble, members))


def work_gb(settings: Settings, ensemble: Ensemble, members: Sequence[Member]) -> float:
    """What the members of one scan leave in the work directory, GB."""
    n_files = n_passes(settings, ensemble, members) + (2 if settings.grids > 1 else 0)
    return POSTERIOR_GB * n_files / network_voxel_size(settings, ensemble) ** 3


def finder_of(ensemble: Ensemble, members: Sequence[Member]) -> Member:
    """Return the member that looks for the brain and segments it on several grids."""
    return ensemble.baseline or members[0]


def on_first_grid(
    settings: Settings, ensemble: Ensemble, members: Sequence[Member]
) -> list[Member]:
    """Return the members that segment once: of several grids, the finder segments on all."""
    finder = finder_of(ensemble, members)
    return [member for member in members if member != finder or settings.grids == 1]


def network_voxel_size(settings: Settings, ensemble: Ensemble) -> float:
    """Voxel size of the network grid, mm."""
    return ensemble.voxel_size * (2 if settings.sloppy else 1)


def init_scan_wf(
    settings: Settings, scan: Scan, ensemble: Ensemble, members: Sequence[Member], name: str
) -> Workflow:
    """Segment one T1w image with every member and write its derivatives.

    Inputs
    ------
    none: the scan is in the signature

    Outputs
    -------
    derivatives : files written for this scan
    """
    threads = settings.omp_nthreads
    voxel_size = network_voxel_size(settings, ensemble)
    conform = _node(
        Conform(
            in_file=str(scan.path), voxel_size=voxel_size, multiple=ensemble.network.multiple,
            trust=settings.trust,
        ),
        "conform", 1, CONFORM_GB,
    )  # fmt: skip
    finder = finder_of(ensemble, members)
    others = on_first_grid(settings, ensemble, members)
    posteriors = Node(Merge(2), "posteriors")  # of all members, in their order
    posteriors.run_without_submitting = True
    fuse = _node(FuseMembers(families=[member.family for member in members]), "fuse", 1, FUSE_GB)
    write = _node(
        WriteScan(
            request=ScanRequest(settings, scan, ensemble, tuple(members)), num_threads=threads
        ),
        "write", threads, WRITE_GB,
    )  # fmt: skip
    outputnode = Node(IdentityInterface(["derivatives"]), "outputnode")

    workflow = Workflow(name)
    head = conform
    if not settings.sloppy:  # the whole head at 2 mm takes a second: nothing to be gained
        head = _node(
            LocateBrain(
                ensemble=str(ensemble.directory), member=finder, device=settings.device,
                identity=identify(ensemble, finder), num_threads=threads,
            ),
            "locate", threads, LOCATE_GB,
        )  # fmt: skip
        workflow.connect(conform, "head_file", head, "head_file")
        workflow.connect(conform, "geometry_file", head, "geometry_file")
    if settings.grids > 1:
        grids = _segment_node("grids", "offset", settings, ensemble)
        grids.inputs.offset = list(GRIDS[settings.grids])
        grids.inputs.trait_set(member=finder, identity=identify(ensemble, finder))
        average = _node(
            AverageGrids(member=finder, n_grids=settings.grids), "average", 1, AVERAGE_GB
        )
        workflow.connect(head, "head_file", grids, "head_file")
        workflow.connect(grids, "posterior_file", average, "posterior_files")
        if finder in members:
            workflow.connect(average, "posterior_file", posteriors, "in1")
    if others:
        segment = _segment_node("segment", ["member", "identity"], settings, ensemble)
        segment.inputs.member = others
        segment.inputs.identity = [identify(ensemble, member) for member in others]
        workflow.connect(head, "head_file", segment, "head_file")
        workflow.connect(segment, "posterior_file", posteriors, "in2")
        if settings.grids > 1:
            workflow.connect(average, "shift_file", segment, "shift_file")
    workflow.connect([
        (head, write, [("geometry_file", "geometry_file")]),
        (posteriors, fuse, [("out", "posterior_files")]),
        (posteriors, write, [("out", "posterior_files")]),
        (fuse, write, [("mean_file", "mean_file"), ("maps_file", "maps_file"),
                       ("counts_file", "counts_file")]),
        (write, outputnode, [("out_files", "derivatives")]),
    ])  # fmt: skip
    return workflow


def _segment_node(
    name: str, iterfield: str | list[str], settings: Settings, ensemble: Ensemble
) -> MapNode:
    interface = SegmentMember(
        ensemble=str(ensemble.directory),
        device=settings.device,
        num_threads=settings.omp_nthreads,
    )
    gb = segment_gb(settings, ensemble)
    return MapNode(interface, iterfield, name, n_procs=settings.omp_nthreads, mem_gb=gb)


def _node(interface, name: str, n_procs: int, mem_gb: float) -> Node:
    return Node(interface, name, n_procs=n_procs, mem_gb=mem_gb)


def node_name(prefix: str) -> str:
    """A scan's prefix as nipype wants it: letters, digits and underscores, still unique.

    Examples
    --------
    >>> node_name("sub-01_acq-a+b")
    'sub_01_acq_a_x2b_b'
    """
    bare = prefix.replace("-", "_")
    return re.sub(r"[^0-9a-zA-Z_]", lambda character: f"_x{ord(character[0]):x}_", bare)
