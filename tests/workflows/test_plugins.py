"""How the graph runs when a step or a worker fails."""

import errno
import logging
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
from nipype import Node, Workflow
from nipype.interfaces.base import Undefined
from nipype.interfaces.utility import Function

from bids_varaug.errors import UsageError
from bids_varaug.settings import Settings
from bids_varaug.workflows.interfaces import Conform
from bids_varaug.workflows.participant import _remove_work, node_name
from bids_varaug.workflows.plugins import (
    ProgressLog,
    WorkersPlugin,
    check_plugin,
    configure_nipype,
    run_workflow,
)
from tests.workflows.conftest import head


def give(number):
    return number


def kill_own_worker(number):
    import os
    import signal

    os.kill(os.getpid(), signal.SIGKILL)


def fail(number):
    raise OSError(f"no {number}")


@pytest.fixture
def request_for(tmp_path):
    def make(**given) -> Settings:
        work = tmp_path / "work"
        return Settings(tmp_path / "in", tmp_path / "out", "participant", work, **given)

    return make


@pytest.fixture
def patience():
    """Fail instead of waiting for ever."""
    signal.alarm(180)
    yield
    signal.alarm(0)


def run(settings: Settings, **functions) -> tuple[bool, ProgressLog, Path]:
    """Run one node for each function, none of which depends on another."""
    configure_nipype(settings)
    workflow = Workflow("flow", base_dir=str(settings.work_dir))
    for name, function in functions.items():
        node = Node(Function(["number"], ["out"], function), name)
        node.inputs.number = 1
        workflow.add_nodes([node])
    root = settings.work_dir / "flow"
    progress = ProgressLog(root, {name: name for name in functions}, 1)
    return run_workflow(workflow, settings, progress), progress, root


def test_killed_worker_fails_its_step_and_the_others_go_on(request_for, patience, capfd):
    complete, progress, root = run(request_for(), bad=kill_own_worker, good=give)
    assert not complete and progress.failed == {"bad"}
    assert "a worker process was killed" in capfd.readouterr().err
    assert (root / "good" / "result_good.pklz").exists()


def step_of(root: Path, *parts: str, **inputs) -> SimpleNamespace:
    """What nipype tells of a step."""
    folder = root.joinpath(*parts)
    given = SimpleNamespace(**{"member": [], "offset": Undefined} | inputs)
    return SimpleNamespace(output_dir=lambda: str(folder), inputs=given)


def test_time_left_counts_writing_and_lines_have_a_time(tmp_path, capsys):
    progress = ProgressLog(tmp_path, {"sub_01": "sub-01"}, 2, started=time.monotonic() - 10)
    for name in ("ieee", "mca01"):
        progress(step_of(tmp_path, "sub_01", "segment", member=SimpleNamespace(id=name)), "end")
    first, last = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"\d\d:\d\d:\d\d sub-01: member mca01 done \(2 of 2 segmentations, about 15 s left\)", last)
    assert "about 40 s left" in first


def test_report_that_fails_is_called_by_its_participant(tmp_path, capsys):
    progress = ProgressLog(tmp_path, {}, 1, {"report_sub_001": "report of sub-001"})
    progress(step_of(tmp_path, "report_sub_001"), "exception")
    assert "report of sub-001: step failed" in capsys.readouterr().err


def test_first_idle_worker_gets_the_next_task():
    """And keeps the memory that it has; a second one starts when the first is busy."""
    pool = WorkersPlugin({"n_procs": 2}).pool
    try:
        first = pool.submit(os.getpid).result()
        assert {pool.submit(os.getpid).result() for _ in range(3)} == {first}
        slow = pool.submit(time.sleep, 5)
        second = pool.submit(os.getpid).result()
        assert second != first and not slow.done()
        slow.result()
        assert pool.submit(os.getpid).result() == first
    finally:
        pool.shutdown()


def test_killed_worker_takes_no_other_along():
    pool = WorkersPlugin({"n_procs": 2}).pool
    try:
        killed, other = pool.submit(kill_own_worker, 1), pool.submit(time.sleep, 1)
        assert isinstance(killed.exception(), BrokenProcessPool)
        assert other.exception() is None
        assert pool.submit(abs, -1).result() == 1
    finally:
        pool.shutdown()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_worker_ends_when_the_main_process_is_killed():
    code = (
        "import os, time; from bids_varaug.workflows.plugins import WorkersPlugin\n"
        "pool = WorkersPlugin({'n_procs': 1}).pool\n"
        "print(pool.submit(os.getpid).result(), flush=True); time.sleep(300)"
    )
    main = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    worker = Path("/proc") / main.stdout.readline().strip() / "stat"
    assert worker.exists()
    main.kill()
    main.communicate()
    deadline = time.monotonic() + 30
    while worker.exists() and worker.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline, "the worker goes on"
        time.sleep(0.1)


def test_scans_are_done_one_after_another(request_for, patience):
    """Of an interrupted run of hundreds, the first are done; nipype would do the first step of all."""
    configure_nipype(request_for())
    workflow = Workflow("flow", base_dir=str(request_for().work_dir))
    for scan in ("sub_01", "sub_02"):
        first, second = (Node(Function(["number"], ["out"], give), name) for name in ("first", "second"))
        first.inputs.number = 1
        steps = Workflow(scan)
        steps.connect(first, "out", second, "number")
        workflow.add_nodes([steps])
    done = []
    ended = lambda node, status: done.append(node.fullname) if status == "end" else None  # noqa: E731
    workflow.run(WorkersPlugin({"n_procs": 1, "status_callback": ended}))
    assert done == [f"flow.{scan}.{step}" for scan in ("sub_01", "sub_02") for step in ("first", "second")]


JUMPING_CLOCK = """
import itertools, sys, time
real, jumps = time.time, itertools.cycle([0, -3e8, 3e8, -3600])
time.time = lambda: real() + next(jumps)
from pathlib import Path
from bids_varaug.settings import Settings
from tests.workflows.test_plugins import give, run
folder = Path(sys.argv[1])
complete, *_ = run(Settings(folder, folder / "out", "participant", folder / "work"), one=give, two=give)
sys.exit(not complete)
"""


def test_clock_that_jumps_stops_nothing(tmp_path, root):
    """nipype's loop would sleep until a time of day, which may be years ahead."""
    command = [sys.executable, "-c", JUMPING_CLOCK, str(tmp_path)]
    subprocess.run(command, cwd=root, timeout=60, check=True)


def test_step_that_fails_in_this_process_is_no_crash(request_for, capfd):
    complete, progress, root = run(request_for(plugin={"plugin": "Linear"}), bad=fail, good=give)
    assert not complete and progress.failed == {"bad"}
    assert (root / "good" / "result_good.pklz").exists()
    assert "no 1" not in capfd.readouterr().err


def test_verbose_shows_why_a_step_failed(request_for, capfd):
    run(request_for(plugin={"plugin": "Linear"}, verbosity=1), bad=fail)
    assert "OSError: no 1" in capfd.readouterr().err
    configure_nipype(request_for())


def level_of_nodes():
    return logging.getLogger("nipype.workflow").level


@pytest.mark.parametrize(("verbosity", "level"), [(0, logging.CRITICAL), (2, logging.DEBUG)])
def test_workers_learn_how_much_to_log(request_for, verbosity, level):
    configure_nipype(request_for(verbosity=verbosity))
    pool = WorkersPlugin({"n_procs": 1}).pool
    try:
        assert pool.submit(level_of_nodes).result() == level
    finally:
        pool.shutdown()
        configure_nipype(request_for())


def test_unknown_plugin_is_refused_with_those_that_exist(request_for):
    with pytest.raises(UsageError, match="no plugin 'Foo'. It has .*SLURM"):
        check_plugin(request_for(plugin={"plugin": "Foo"}))


def test_cleaning_up_leaves_what_other_jobs_have_in_the_same_work_directory(tmp_path, capsys):
    for name in ("mine", "theirs"):
        (tmp_path / name).mkdir()
    _remove_work(tmp_path, ["mine"])
    assert os.listdir(tmp_path) == ["theirs"]
    (tmp_path / "theirs").rmdir()
    _remove_work(tmp_path, ["mine"])
    assert not tmp_path.exists()


def test_labels_that_nipype_cannot_name_still_differ():
    names = {node_name(prefix) for prefix in ("sub-1+2", "sub-12", "sub-1_acq-a.b", "sub-1_acq-ab")}
    assert len(names) == 4 and all(name.isidentifier() for name in names)


@pytest.fixture
def conform(tmp_path):
    def make(data) -> Conform:
        path = tmp_path / "sub-01_T1w.nii.gz"
        image = nib.Nifti1Image(np.asarray(data, np.float32), np.diag([3.0, 3, 3, 1]))
        nib.save(image, path)
        return Conform(in_file=str(path), voxel_size=3.0, multiple=16, ensemble="none")

    return make


def test_full_work_directory_is_told_with_its_name(conform, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match="No space"):
        conform(head()).run(cwd=str(tmp_path))
    error = capsys.readouterr().err
    assert f"ERROR: {tmp_path}: cannot read or write the work directory" in error
    assert "No space left" in error and "-w" in error


def test_cropped_head_is_told_with_its_name(conform, tmp_path, capsys):
    conform(head()[:, :, :28]).run(cwd=str(tmp_path))
    error = capsys.readouterr().err
    assert error.startswith("WARNING: ") and "sub-01_T1w.nii.gz: The head is cut" in error
