"""The command ``bids_varaug``: from the command line to the exit code."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from bids_varaug.cli.parser import parse_settings
from bids_varaug.cli.paths import caches_below, keep_caches_below
from bids_varaug.errors import ExitCode, UserError
from bids_varaug.settings import Settings


def main(argv: Sequence[str] | None = None) -> int:
    """Run the app; returns the exit code, prints errors a user can mend without a traceback."""
    # The first process of a container is not ended by SIGTERM (docker stop) unless it handles it.
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        return int(run(parse_settings(argv)))
    except UserError as error:
        print(f"ERROR: {error}", file=sys.stderr)
        _kill_workers()
        return int(error.exit_code)
    except KeyboardInterrupt as interrupt:
        _kill_workers()
        print("Interrupted. Give the same -w to go on from what is done.", file=sys.stderr)
        return 128 + (interrupt.args[0] if interrupt.args else signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, _frame: object) -> None:
    raise KeyboardInterrupt(number)


def _kill_workers() -> None:
    """End workers at once, and what they are forked from.

    Python would wait for the steps that they are in, longer than docker does.
    """
    from multiprocessing import active_children

    from bids_varaug.workflows.workers import stop_workers_server

    for worker in active_children():
        worker.kill()
    stop_workers_server()


def run(settings: Settings) -> ExitCode:
    """Dispatch on the level of analysis."""
    os.environ.setdefault("NO_ET", "1")
    run_level = run_group_level if settings.level == "group" else run_participants
    # A dry run leaves nothing in the work directory.
    place = tempfile.TemporaryDirectory() if settings.dry_run else nullcontext(settings.work_dir)
    with place as folder:
        keep_caches_below(Path(folder))
        return run_level(settings)


def run_group_level(settings: Settings) -> ExitCode:
    """Score, fit or apply the brain-age model on what the participant level left."""
    from bids_varaug.workflows.group import run_group

    first = run_group(settings)
    if first is not None:
        print(f"Done. Open {first}.", file=sys.stderr)
    return ExitCode.DONE


def run_participants(settings: Settings) -> ExitCode:
    """Segment every T1w image that the settings select."""
    _ensure_home()
    # Imported here: --help must not wait for torch, pybids and nipype, which the server of the
    # workers imports at the same time.
    from bids_varaug.workflows.workers import start_workers_server

    start_workers_server(settings)
    from bids_varaug.brainage.provenance import check_rerun, run_origin
    from bids_varaug.cli.resources import check_memory
    from bids_varaug.derivatives import names
    from bids_varaug.inputs.scans import find_scans, select_participants
    from bids_varaug.inputs.validation import validate_input
    from bids_varaug.machine import resolve_device
    from bids_varaug.models.ensemble import (
        check_member,
        load_ensemble,
        round_inference,
        select_members,
    )
    from bids_varaug.workflows.participant import suitable_grids
    from bids_varaug.workflows.plugins import check_plugin, configure_nipype

    configure_nipype(settings, names.logs(settings.output_dir))
    settings = replace(settings, device=resolve_device(settings.device))
    ensemble = load_ensemble(settings.ensemble)
    settings = replace(settings, grids=settings.grids or suitable_grids(settings, ensemble))
    members = select_members(ensemble, settings.members, _members_per_family(settings))
    members += round_inference(ensemble, settings.perturb_inference, settings.random_seed)
    for member in members:
        check_member(ensemble, member)
    check_plugin(settings)
    check_memory(settings, ensemble)
    # Before the validator, which takes its time with a large dataset.
    participants = select_participants(settings)
    if not settings.skip_bids_validation:
        chosen = settings.participant_labels or settings.exclude_participant_labels
        validate_input(settings.bids_dir, participants if chosen else ())
    selection = find_scans(settings)
    for note in selection.notes:
        print(f"WARNING: {note}", file=sys.stderr)
    for complaint in selection.complaints:
        print(f"ERROR: {complaint}", file=sys.stderr)
    made_again = () if settings.reports_only else selection.scans
    check_rerun(settings.output_dir, run_origin(settings, ensemble, members), made_again)
    incomplete = ExitCode.SUBJECT_FAILED if selection.complaints else ExitCode.DONE
    if settings.dry_run:
        _print_plan(selection.scans, members)
        return incomplete
    from bids_varaug.derivatives.logs import write_logs
    from bids_varaug.derivatives.sidecars import write_dataset_files

    write_dataset_files(
        settings.bids_dir, settings.output_dir, ensemble.labels, members, sloppy=settings.sloppy
    )
    write_logs(settings, ensemble, members)
    step = _write_reports if settings.reports_only else _segment
    complete = step(settings, selection.scans, ensemble, members)
    return incomplete if complete else ExitCode.SUBJECT_FAILED


def _ensure_home() -> None:
    """Set HOME where it cannot be found: pybids and the validator do not start without.

    So it is with ``docker -u`` and a user id that the image has no name for.
    """
    if os.path.expanduser("~") == "~":
        os.environ["HOME"] = tempfile.gettempdir()


def _members_per_family(settings: Settings) -> int | None:
    """``--sloppy`` runs two members: one of each perturbed family, beside the baseline."""
    if settings.sloppy and settings.n_members is None and settings.members == ("all",):
        return 1
    return settings.n_members


def _print_plan(scans, members) -> None:
    print(f"{len(scans)} T1w image(s), members {', '.join(member.id for member in members)}:")
    for scan in scans:
        print(f"  {scan.relative}")


def _segment(settings: Settings, scans, ensemble, members) -> bool:
    """Segment what no other process works on now; return whether every scan succeeded."""
    from bids_varaug.derivatives import names
    from bids_varaug.locks import hold_participants

    folders = (names.logs(settings.output_dir), settings.work_dir)
    with hold_participants({scan.subject for scan in scans}, folders) as held:
        free = [scan for scan in scans if scan.subject in held]
        complete = _run_steps(settings, free, ensemble, members) if free else False
    return complete and len(free) == len(scans)


def _run_steps(settings: Settings, scans, ensemble, members) -> bool:
    """Run the workflow; return whether every scan succeeded."""
    from bids_varaug.cli.resources import warn_of_disk
    from bids_varaug.derivatives import names
    from bids_varaug.workflows.finished import remove_steps
    from bids_varaug.workflows.participant import (
        WORKFLOW_NAME,
        find_finished,
        init_participants_wf,
        n_passes,
        node_name,
    )
    from bids_varaug.workflows.plugins import (
        ProgressLog,
        run_workflow,
        submits_only,
    )

    log_dir = names.logs(settings.output_dir)
    root = settings.work_dir / WORKFLOW_NAME
    finished = find_finished(settings, scans, ensemble, members)
    print(
        f"{len(scans)} T1w image(s), {len(members)} member(s) each, on {settings.device}"
        + (f"; {len(finished)} of them are done" if finished else ""),
        file=sys.stderr,
    )
    left = [scan for scan in scans if scan.prefix not in finished]
    warn_of_disk(settings, left, ensemble, members, root)
    on_written = remove_steps if settings.clean_workdir else None
    progress = ProgressLog(root, len(left), n_passes(settings, ensemble, members), on_written)
    workflow = init_participants_wf(settings, scans, ensemble, members, finished)
    no_error = run_workflow(workflow, settings, progress)
    if no_error and submits_only(settings):
        print("Submitted. The reports come when the jobs are done.", file=sys.stderr)
        return True
    # nipype raises nothing where it fails to read what a step left.
    progress.failed |= {node_name(scan.prefix) for scan in left} - progress.scans_done
    if no_error and not progress.failed:
        if settings.clean_workdir:
            _remove_work(root, workflow, map(node_name, finished))
        subjects = sorted({scan.subject for scan in scans})
        first = names.report(settings.output_dir, subjects[0])
        more = f" and {len(subjects) - 1} more" if len(subjects) > 1 else ""
        print(f"Done. Open {first}{more}.", file=sys.stderr)
        return True
    # A participant's report waits for all of their scans: without the failed ones it is made here.
    hit = {scan.subject for scan in scans if node_name(scan.prefix) in progress.failed}
    written = [scan for scan in scans if node_name(scan.prefix) not in progress.failed]
    _write_reports(settings, [scan for scan in written if scan.subject in hit], ensemble, members)
    failed = ", ".join(sorted(progress.failed)) or "see above"
    others = "Stopped there" if settings.stop_on_first_crash else "The other scans are done"
    print(f"ERROR: not finished: {failed}. {others}; details are in {log_dir}.", file=sys.stderr)
    return False


def _remove_work(root: Path, workflow, finished: Iterable[str] = ()) -> None:
    """Remove what this run left in the work directory, and nothing of jobs that share it."""
    for folder in {name.partition(".")[0] for name in workflow.list_node_names()} | set(finished):
        shutil.rmtree(root / folder, ignore_errors=True)
    try:
        root.rmdir()
        shutil.rmtree(caches_below(root.parent), ignore_errors=True)
    except OSError:
        print(f"{root}: not removed, it is not empty.", file=sys.stderr)


def _write_reports(settings: Settings, scans, ensemble, members) -> bool:
    """Draw the reports again from derivatives that are there (``--reports-only``)."""
    from bids_varaug.reports.subject import ReportRequest, write_subject_report

    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    complete = True
    for subject in dict.fromkeys(scan.subject for scan in scans):
        theirs = tuple(scan for scan in scans if scan.subject == subject)
        try:
            path = write_subject_report(ReportRequest(settings, ensemble, tuple(members), theirs))
            print(f"Wrote {path}.", file=sys.stderr)
        except UserError as error:
            print(f"ERROR: {error}", file=sys.stderr)
            complete = False
    return complete
