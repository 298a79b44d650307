"""The participant level: select images, check what can be checked, segment, report."""

from __future__ import annotations

import logging
import re
import shutil
import sys
from collections.abc import Collection, Iterable, Sequence
from itertools import groupby
from operator import attrgetter
from pathlib import Path

from nipype import MapNode, Node, Workflow
from nipype.interfaces.base import BaseInterface
from nipype.interfaces.utility import IdentityInterface, Merge, Select

from bids_varaug import __version__
from bids_varaug.derivatives import names
from bids_varaug.derivatives.citation import write_logs
from bids_varaug.derivatives.freesurfer import check_subjects
from bids_varaug.derivatives.names import ScanRequest
from bids_varaug.derivatives.provenance import check_rerun, recorded_settings, run_origin
from bids_varaug.derivatives.sidecars import write_dataset_files
from bids_varaug.errors import ExitCode, UserError
from bids_varaug.files import hold_participants
from bids_varaug.inputs import validation
from bids_varaug.inputs.scans import Scan, Selection, find_scans, select_participants
from bids_varaug.machine import caches_below
from bids_varaug.settings import Settings
from bids_varaug.workflows import plugins
from bids_varaug.workflows.interfaces import (
    Conform,
    FuseMembers,
    Register,
    SegmentMember,
    WriteReport,
    WriteScan,
)
from bids_varaug.workflows.plan import (
    STEP_GB,
    Plan,
    check_memory,
    describe_cost,
    is_finished,
    make_plan,
    remove_steps,
    warn_of_disk,
)

# With the version: what another one left in the work directory may be of another kind.
WORKFLOW_NAME = "bids_varaug_" + re.sub(r"\W", "_", __version__)


def run_participants(settings: Settings) -> ExitCode:
    """Segment every T1w image that the settings select.

    What concerns one image is printed, and the others go on; raises `UserError` if nothing can be done.
    """
    plugins.configure_nipype(settings)
    if settings.reports_only:
        return _draw_again(settings)
    plan = make_plan(settings)
    settings = plan.settings
    plugins.check_plugin(settings)
    check_memory(plan)
    selection = _select(settings)
    check_rerun(settings.output_dir, run_origin(plan), selection.scans)
    if settings.freesurfer_dir is not None:
        check_subjects(settings.freesurfer_dir, selection.scans)
    if settings.dry_run:
        members = ", ".join(member.id for member in plan.members)
        print(f"{len(selection.scans)} T1w image(s), members {members}:")
        for scan in selection.scans:
            print(f"  {scan.relative}")
        if selection.scans:
            print(f"This takes {describe_cost(plan, len(selection.scans))}")
        return ExitCode.SUBJECT_FAILED if selection.errors else ExitCode.DONE
    write_dataset_files(plan)
    write_logs(plan)
    complete = _segment(plan, selection.scans) and not selection.errors
    return ExitCode.DONE if complete else ExitCode.SUBJECT_FAILED


def _draw_again(settings: Settings) -> ExitCode:
    """Draw the reports of images that have outputs, with the settings that made these."""
    selection = _select(settings)
    recorded = recorded_settings(settings, selection.scans)
    subjects = {scan.subject for scan in selection.scans if scan.prefix in recorded}
    plans: dict[str, Plan] = {}
    requests = []
    for scan in selection.scans:
        if scan.prefix not in recorded and scan.subject in subjects:
            print(f"Note: {scan.relative} has no outputs and is left out of the report.", file=sys.stderr)
            continue
        made = recorded.get(scan.prefix, settings)
        if repr(made) not in plans:
            plans[repr(made)] = plan = make_plan(made)
            check_rerun(settings.output_dir, run_origin(plan), ())
        requests.append(plans[repr(made)].request(scan))
    if settings.dry_run:
        print(*dict.fromkeys(names.report(settings.output_dir, request.scan.subject) for request in requests), sep="\n")
        return ExitCode.SUBJECT_FAILED if selection.errors else ExitCode.DONE
    for plan in plans.values():
        write_dataset_files(plan)
        write_logs(plan)
    return ExitCode.DONE if write_reports(requests) and not selection.errors else ExitCode.SUBJECT_FAILED


def _select(settings: Settings) -> Selection:
    """Validate the dataset and find the images; print what is left out, and why."""
    # Before the validator, which takes its time with a large dataset.
    participants = select_participants(settings)
    if not settings.skip_bids_validation:
        chosen = settings.participant_labels or settings.exclude_participant_labels
        validation.validate_input(settings.bids_dir, participants if chosen else ())
    selection = find_scans(settings)
    for kind, texts in (("WARNING", selection.notes), ("ERROR", selection.errors)):
        for text in texts:
            print(f"{kind}: {text}", file=sys.stderr)
    return selection


def _segment(plan: Plan, scans: Sequence[Scan]) -> bool:
    """Segment what no other process works on now; return whether every scan succeeded."""
    folders = (names.logs(plan.settings.output_dir), plan.settings.work_dir)
    with hold_participants({scan.subject for scan in scans}, folders) as held:
        free = [scan for scan in scans if scan.subject in held]
        complete = _run_steps(plan, free) if free else False
    return complete and len(free) == len(scans)


def _run_steps(plan: Plan, scans: Sequence[Scan]) -> bool:
    """Run the workflow; return whether every scan succeeded."""
    settings = plan.settings
    root = settings.work_dir / WORKFLOW_NAME
    folders = {scan.prefix: root / node_name(scan.prefix) for scan in scans}
    # By a run with --clean-workdir.
    finished = {scan.prefix for scan in scans if is_finished(plan.request(scan), folders[scan.prefix])}
    done = f"; {len(finished)} of them are done" if finished else ""
    print(f"{len(scans)} T1w image(s), {len(plan.members)} member(s) each, on {settings.device}{done}", file=sys.stderr)
    left = {folder.name: prefix for prefix, folder in folders.items() if prefix not in finished}
    warn_of_disk(plan, [root / name for name in left])
    on_written = remove_steps if settings.clean_workdir else None
    reports = {f"report_{node_name(who)}": f"report of {who}" for who in (f"sub-{scan.subject}" for scan in scans)}
    progress = plugins.ProgressLog(root, left, len(plan.members), reports, on_written)
    workflow = init_participants_wf(plan, scans, finished)
    no_error = plugins.run_workflow(workflow, settings, progress)
    if no_error and settings.plugin_name in plugins.SUBMIT_ONLY:
        print("Submitted. The reports are written when the jobs are done.", file=sys.stderr)
        return True
    # nipype raises nothing where it fails to read what a step left.
    failed = progress.failed | (set(left.values()) - progress.written)
    if no_error and not failed:
        if settings.clean_workdir:
            steps = {name.partition(".")[0] for name in workflow.list_node_names()}
            _remove_work(root, steps | {folder.name for folder in folders.values()})
        subjects = sorted({scan.subject for scan in scans})
        more = f" and {len(subjects) - 1} more" if len(subjects) > 1 else ""
        print(f"Done. Open {names.report(settings.output_dir, subjects[0])}{more}.", file=sys.stderr)
        return True
    # A participant's report waits for all of their scans: without the failed ones it is made here.
    hit = {scan.subject for scan in scans if scan.prefix in failed}
    write_reports([plan.request(scan) for scan in scans if scan.subject in hit and scan.prefix not in failed])
    others = "Stopped there" if settings.stop_on_first_crash else "The other scans are done"
    details = f"{others}; details are in {names.logs(settings.output_dir)}."
    print(f"ERROR: not finished: {', '.join(sorted(failed)) or 'see above'}. {details}", file=sys.stderr)
    return False


def _remove_work(root: Path, folders: Iterable[str]) -> None:
    """Remove what this run left in the work directory, and nothing of jobs that share it."""
    for folder in folders:
        shutil.rmtree(root / folder, ignore_errors=True)
    try:
        root.rmdir()
        shutil.rmtree(caches_below(root.parent), ignore_errors=True)
    except OSError:
        print(f"{root}: not removed, it is not empty.", file=sys.stderr)


def write_reports(requests: Sequence[ScanRequest]) -> bool:
    """Draw reports from derivatives that are there; return whether all could be drawn."""
    from bids_varaug.reports.participant import write_subject_report  # matplotlib

    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    complete = True
    for _, group in groupby(requests, attrgetter("scan.subject")):
        theirs = list(group)
        try:
            print(f"Wrote {write_subject_report(theirs)}.", file=sys.stderr)
        except UserError as error:
            print(f"ERROR: {error}", file=sys.stderr)
            complete = False
    return complete


def init_participants_wf(plan: Plan, scans: Iterable[Scan], finished: Collection[str]) -> Workflow:
    """Segment every scan, side by side, and write one report for each participant.

    Of scans whose prefix is among `finished` only the report is drawn.
    """
    workflow = Workflow(WORKFLOW_NAME, base_dir=str(plan.settings.work_dir))
    for subject, group in groupby(scans, attrgetter("subject")):
        label, theirs = node_name(f"sub-{subject}"), list(group)
        gather = Node(Merge(len(theirs)), f"gather_{label}", run_without_submitting=True)  # not worth a job
        report = _node(WriteReport(requests=[plan.request(scan) for scan in theirs]), f"report_{label}")
        for number, scan in enumerate(theirs, start=1):
            if scan.prefix in finished:
                gather.inputs.trait_set(**{f"in{number}": []})
            else:
                scan_wf = init_scan_wf(plan, scan, node_name(scan.prefix))
                workflow.connect(scan_wf, "outputnode.derivatives", gather, f"in{number}")
        workflow.connect(gather, "out", report, "derivatives")
    return workflow


def init_scan_wf(plan: Plan, scan: Scan, name: str) -> Workflow:
    """Segment one T1w image with every member; ``outputnode.derivatives`` are the files written for it."""
    settings, ensemble, threads = plan.settings, plan.ensemble, plan.settings.omp_nthreads
    where = {"ensemble": str(ensemble.directory), "device": settings.device, "num_threads": threads}
    conform = _node(Conform(in_file=str(scan.path), trust=settings.trust, **where), "conform", threads)
    conform.inputs.trait_set(voxel_size=plan.voxel_size, multiple=ensemble.multiple)
    conform.inputs.trait_set(fastsurfer=ensemble.is_fastsurfer, whole_voxels=settings.whole_voxels)
    if not settings.sloppy and not ensemble.is_fastsurfer:  # the head at 2 mm takes a second: nothing to be gained
        conform.inputs.member = plan.locator
    mem_gb = plan.segment_gb_of(scan)
    segment = MapNode(SegmentMember(**where), ["member"], "segment", n_procs=threads, mem_gb=mem_gb)
    segment.inputs.member = list(plan.members)
    families = [member.family for member in plan.members]
    fuse = _node(FuseMembers(families=families, temperature=ensemble.temperature), "fuse")
    fuse.inputs.family_maps = settings.family_maps
    write = _node(WriteScan(request=plan.request(scan), num_threads=threads), "write", threads)
    outputnode = Node(IdentityInterface(["derivatives"]), "outputnode")

    workflow = Workflow(name)
    workflow.connect([
        (conform, segment, [("head_file", "head_file"), ("geometry_file", "geometry_file")]),
        (conform, write, [("geometry_file", "geometry_file")]),
        (segment, fuse, [("posterior_file", "posterior_files")]),
        (segment, write, [("posterior_file", "posterior_files")]),
        (fuse, write, [("mean_file", "mean_file"), ("maps_file", "maps_file"), ("counts_file", "counts_file")]),
        (write, outputnode, [("out_files", "derivatives")]),
    ])  # fmt: skip
    if settings.output_spaces:
        register_wf = init_register_wf(plan, scan)
        workflow.connect([
            (conform, register_wf, [("geometry_file", "inputnode.geometry_file")]),
            (fuse, register_wf, [("mean_file", "inputnode.mean_file")]),
            (segment, register_wf, [("posterior_file", "inputnode.posterior_files")]),
            (register_wf, write, [("outputnode.registration_files", "registration_files")]),
        ])  # fmt: skip
    return workflow


def init_register_wf(plan: Plan, scan: Scan) -> Workflow:
    """Register the consensus, and each perturbed member where there are several, to the template.

    ``outputnode.registration_files`` are in this order; posteriors are those of all members.
    """
    inputnode = Node(IdentityInterface(["geometry_file", "mean_file", "posterior_files"]), "inputnode")
    perturbed = [n for n, member in enumerate(plan.members) if member in plan.perturbed]
    select = Node(Select(index=perturbed), "perturbed", run_without_submitting=True)
    posteriors = Node(Merge(2 if len(perturbed) > 1 else 1), "registered", run_without_submitting=True)
    ids = [int(label.index) for label in plan.ensemble.labels]
    interface = Register(label_ids=ids, n_iterations=plan.settings.refine, name=scan.path.name)
    register = MapNode(interface, ["posterior_file"], "register", mem_gb=STEP_GB["register"])
    outputnode = Node(IdentityInterface(["registration_files"]), "outputnode")
    workflow = Workflow("template")
    workflow.connect([
        (inputnode, posteriors, [("mean_file", "in1")]),
        (inputnode, register, [("geometry_file", "geometry_file")]),
        (posteriors, register, [("out", "posterior_file")]),
        (register, outputnode, [("registration_file", "registration_files")]),
    ])  # fmt: skip
    if len(perturbed) > 1:
        workflow.connect([
            (inputnode, select, [("posterior_files", "inlist")]),
            (select, posteriors, [("out", "in2")]),
        ])  # fmt: skip
    return workflow


def _node(interface: BaseInterface, name: str, n_procs: int = 1) -> Node:
    return Node(interface, name, n_procs=n_procs, mem_gb=STEP_GB[name.partition("_")[0]])


def node_name(prefix: str) -> str:
    """A scan's prefix as nipype wants it: letters, digits and underscores, still unique.

    >>> node_name("sub-01_acq-a+b")
    'sub_01_acq_a_x2b_b'
    """
    bare = prefix.replace("-", "_")
    return re.sub(r"[^0-9a-zA-Z_]", lambda character: f"_x{ord(character[0]):x}_", bare)
