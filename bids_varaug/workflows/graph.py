"""The participant level as a graph: scans side by side, members one after another."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from nipype import MapNode, Node, Workflow
from nipype.interfaces.base import BaseInterface
from nipype.interfaces.utility import IdentityInterface, Merge

from bids_varaug import __version__
from bids_varaug.derivatives.names import ScanRequest
from bids_varaug.inputs.scans import Scan
from bids_varaug.models.ensemble import identify
from bids_varaug.segmentation.shifts import GRIDS
from bids_varaug.workflows.interfaces import (
    AverageGrids,
    Conform,
    FuseMembers,
    SegmentMember,
    WriteReport,
    WriteScan,
)
from bids_varaug.workflows.plan import STEP_GB, Plan

# With the version: what another one left in the work directory may be of another kind.
WORKFLOW_NAME = "bids_varaug_" + re.sub(r"\W", "_", __version__)


def init_participants_wf(plan: Plan, scans: Sequence[Scan], finished: Mapping[str, Sequence[str]]) -> Workflow:
    """Segment every scan and write one report for each participant.

    Parameters
    ----------
    plan : members to run, baseline included, and how
    scans : images whose content is there
    finished : derivatives of scans, by their prefix, that need no step any more but the report
    """
    workflow = Workflow(WORKFLOW_NAME, base_dir=str(plan.settings.work_dir))
    subjects: dict[str, list[Scan]] = {}
    for scan in scans:
        subjects.setdefault(scan.subject, []).append(scan)
    for subject, theirs in subjects.items():
        label = node_name(f"sub-{subject}")
        gather = Node(Merge(len(theirs)), f"gather_{label}")
        gather.run_without_submitting = True  # not worth a job
        requests = [ScanRequest(plan.settings, scan, plan.ensemble, plan.members) for scan in theirs]
        report = Node(WriteReport(requests=requests), f"report_{label}", mem_gb=STEP_GB["report"])
        for number, scan in enumerate(theirs, start=1):
            if scan.prefix in finished:
                gather.inputs.trait_set(**{f"in{number}": list(finished[scan.prefix])})
                continue
            scan_wf = init_scan_wf(plan, scan, node_name(scan.prefix))
            workflow.connect(scan_wf, "outputnode.derivatives", gather, f"in{number}")
        workflow.connect(gather, "out", report, "derivatives")
    return workflow


def init_scan_wf(plan: Plan, scan: Scan, name: str) -> Workflow:
    """Segment one T1w image with every member and write its derivatives.

    Inputs
    ------
    none: the scan is in the signature

    Outputs
    -------
    derivatives : files written for this scan
    """
    settings, ensemble, locator = plan.settings, plan.ensemble, plan.locator
    threads = settings.omp_nthreads
    by_locator = {"member": locator, "identity": identify(ensemble, locator)}
    conform = _node(Conform(in_file=str(scan.path), **_where(plan)), "conform", threads)
    grid = {"voxel_size": plan.voxel_size, "multiple": ensemble.network.multiple}
    conform.inputs.trait_set(trust=settings.trust, **grid)
    if not settings.sloppy:  # the whole head at 2 mm takes a second: nothing to be gained
        conform.inputs.trait_set(**by_locator)
    posteriors = Node(Merge(2), "posteriors")  # of all members, in their order
    posteriors.run_without_submitting = True
    families = [member.family for member in plan.members]
    fuse = _node(FuseMembers(families=families, family_maps=settings.family_maps), "fuse")
    request = ScanRequest(settings, scan, ensemble, plan.members)
    write = _node(WriteScan(request=request, num_threads=threads), "write", threads)
    outputnode = Node(IdentityInterface(["derivatives"]), "outputnode")

    workflow = Workflow(name)
    if settings.grids > 1:
        grids = _segment_node(plan, "grids", offset=list(GRIDS[settings.grids]))
        grids.inputs.trait_set(**by_locator)
        average = _node(AverageGrids(member=locator, n_grids=settings.grids), "average")
        workflow.connect(conform, "head_file", grids, "head_file")
        workflow.connect(grids, "posterior_file", average, "posterior_files")
        if locator in plan.members:
            workflow.connect(average, "posterior_file", posteriors, "in1")
    if members := plan.single_pass:
        identities = [identify(ensemble, member) for member in members]
        segment = _segment_node(plan, "segment", member=members, identity=identities)
        workflow.connect(conform, "head_file", segment, "head_file")
        workflow.connect(segment, "posterior_file", posteriors, "in2")
        if settings.grids > 1:
            workflow.connect(average, "shift_file", segment, "shift_file")
    workflow.connect([
        (conform, write, [("geometry_file", "geometry_file")]),
        (posteriors, fuse, [("out", "posterior_files")]),
        (posteriors, write, [("out", "posterior_files")]),
        (fuse, write, [("mean_file", "mean_file"), ("maps_file", "maps_file"),
                       ("counts_file", "counts_file")]),
        (write, outputnode, [("out_files", "derivatives")]),
    ])  # fmt: skip
    return workflow


def _node(interface: BaseInterface, name: str, n_procs: int = 1) -> Node:
    return Node(interface, name, n_procs=n_procs, mem_gb=STEP_GB[name])


def _segment_node(plan: Plan, name: str, **iterated: list) -> MapNode:
    """Node that segments once for each item of the iterated inputs."""
    node = MapNode(
        SegmentMember(**_where(plan)), list(iterated), name,
        n_procs=plan.settings.omp_nthreads, mem_gb=plan.segment_gb,
    )  # fmt: skip
    node.inputs.trait_set(**iterated)
    return node


def _where(plan: Plan) -> dict[str, Any]:
    """Inputs of a step that runs a network."""
    return {
        "ensemble": str(plan.ensemble.directory),
        "device": plan.settings.device,
        "num_threads": plan.settings.omp_nthreads,
    }


def node_name(prefix: str) -> str:
    """A scan's prefix as nipype wants it: letters, digits and underscores, still unique.

    Examples
    --------
    >>> node_name("sub-01_acq-a+b")
    'sub_01_acq_a_x2b_b'
    """
    bare = prefix.replace("-", "_")
    return re.sub(r"[^0-9a-zA-Z_]", lambda character: f"_x{ord(character[0]):x}_", bare)
