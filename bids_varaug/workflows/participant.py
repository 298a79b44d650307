"""The participant level: select images, check what can be checked, segment, report."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from bids_varaug.brainage.provenance import check_rerun, run_origin
from bids_varaug.derivatives import names
from bids_varaug.derivatives.logs import write_logs
from bids_varaug.derivatives.names import ScanRequest
from bids_varaug.derivatives.sidecars import write_dataset_files
from bids_varaug.errors import ExitCode, UserError
from bids_varaug.inputs import validation
from bids_varaug.inputs.scans import Scan, Selection, find_scans, select_participants
from bids_varaug.locks import hold_participants
from bids_varaug.machine import caches_below
from bids_varaug.settings import Settings
from bids_varaug.workflows import plugins
from bids_varaug.workflows.finished import finished_outputs, remove_steps
from bids_varaug.workflows.graph import WORKFLOW_NAME, init_participants_wf, node_name
from bids_varaug.workflows.plan import Plan, check_memory, make_plan, warn_of_disk


def run_participants(settings: Settings) -> ExitCode:
    """Segment every T1w image that the settings select.

    Raises
    ------
    UserError
        If nothing can be done; what concerns one image is printed, and the others go on.
    """
    plugins.configure_nipype(settings)
    plan = make_plan(settings)
    settings = plan.settings
    plugins.check_plugin(settings)
    check_memory(plan)
    selection = _select(settings)
    origin = run_origin(settings, plan.ensemble, plan.members)
    check_rerun(settings.output_dir, origin, () if settings.reports_only else selection.scans)
    if settings.dry_run:
        members = ", ".join(member.id for member in plan.members)
        print(f"{len(selection.scans)} T1w image(s), members {members}:")
        for scan in selection.scans:
            print(f"  {scan.relative}")
        return ExitCode.SUBJECT_FAILED if selection.complaints else ExitCode.DONE
    write_dataset_files(
        settings.bids_dir, settings.output_dir, plan.ensemble.labels, plan.members,
        sloppy=settings.sloppy,
    )  # fmt: skip
    write_logs(settings, plan.ensemble, plan.members)
    step = write_reports if settings.reports_only else _segment
    complete = step(plan, selection.scans) and not selection.complaints
    return ExitCode.DONE if complete else ExitCode.SUBJECT_FAILED


def _select(settings: Settings) -> Selection:
    """Validate the dataset and find the images; print what is left out, and why."""
    # Before the validator, which takes its time with a large dataset.
    participants = select_participants(settings)
    if not settings.skip_bids_validation:
        chosen = settings.participant_labels or settings.exclude_participant_labels
        validation.validate_input(settings.bids_dir, participants if chosen else ())
    selection = find_scans(settings)
    for note in selection.notes:
        print(f"WARNING: {note}", file=sys.stderr)
    for complaint in selection.complaints:
        print(f"ERROR: {complaint}", file=sys.stderr)
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
    finished = {}  # derivatives that a run with --clean-workdir wrote
    for scan in scans:
        request = ScanRequest(settings, scan, plan.ensemble, plan.members)
        outputs = finished_outputs(request, folders[scan.prefix])
        if outputs is not None:
            finished[scan.prefix] = outputs
    print(
        f"{len(scans)} T1w image(s), {len(plan.members)} member(s) each, on {settings.device}"
        + (f"; {len(finished)} of them are done" if finished else ""),
        file=sys.stderr,
    )
    left = {folders[s.prefix]: s.prefix for s in scans if s.prefix not in finished}
    warn_of_disk(plan, list(left))
    progress = plugins.ProgressLog(
        root, {folder.name: prefix for folder, prefix in left.items()}, plan.n_passes,
        remove_steps if settings.clean_workdir else None,
    )  # fmt: skip
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
        _print_done(settings, scans)
        return True
    # A participant's report waits for all of their scans: without the failed ones it is made here.
    hit = {scan.subject for scan in scans if scan.prefix in failed}
    rest = [scan for scan in scans if scan.subject in hit and scan.prefix not in failed]
    write_reports(plan, rest)
    others = "Stopped there" if settings.stop_on_first_crash else "The other scans are done"
    print(
        f"ERROR: not finished: {', '.join(sorted(failed)) or 'see above'}. {others}; details are in "
        f"{names.logs(settings.output_dir)}.",
        file=sys.stderr,
    )
    return False


def _print_done(settings: Settings, scans: Sequence[Scan]) -> None:
    subjects = sorted({scan.subject for scan in scans})
    more = f" and {len(subjects) - 1} more" if len(subjects) > 1 else ""
    print(f"Done. Open {names.report(settings.output_dir, subjects[0])}{more}.", file=sys.stderr)


def _remove_work(root: Path, folders: Iterable[str]) -> None:
    """Remove what this run left in the work directory, and nothing of jobs that share it."""
    for folder in folders:
        shutil.rmtree(root / folder, ignore_errors=True)
    try:
        root.rmdir()
        shutil.rmtree(caches_below(root.parent), ignore_errors=True)
    except OSError:
        print(f"{root}: not removed, it is not empty.", file=sys.stderr)


def write_reports(plan: Plan, scans: Sequence[Scan]) -> bool:
    """Draw reports from derivatives that are there; return whether all could be drawn."""
    from bids_varaug.reports.participant import write_subject_report  # matplotlib

    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    complete = True
    for subject in dict.fromkeys(scan.subject for scan in scans):
        theirs = [scan for scan in scans if scan.subject == subject]
        requests = [ScanRequest(plan.settings, scan, plan.ensemble, plan.members) for scan in theirs]
        try:
            print(f"Wrote {write_subject_report(requests)}.", file=sys.stderr)
        except UserError as error:
            print(f"ERROR: {error}", file=sys.stderr)
            complete = False
    return complete
