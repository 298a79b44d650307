"""Clocks that jump, the C locale, file names that are no UTF-8."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.conftest import digests, work_of

TEN_YEARS = 10 * 365 * 86_400


@pytest.mark.parametrize("jump", [-TEN_YEARS, TEN_YEARS])
def test_work_directory_of_another_time_is_used_or_done_again(app, whole, tmp_path, full, jump):
    """As after a clock was set: everything that is there seems to come from far away."""
    if jump < 0 and not full:
        pytest.skip("long form only (BIDS_VARAUG_FAULTS=full)")
    out = tmp_path / "out"
    process = app.start(out)
    while not list(work_of(out).rglob("mca01.safetensors")) and process.exitcode is None:
        process.join(timeout=0.05)
    process.kill()
    process.join()
    then = time.time() + jump
    for folder in (out, work_of(out)):
        for path in folder.rglob("*"):
            os.utime(path, (then, then), follow_symlinks=False)
    code, log = app.run(out)
    assert code == 0, log
    assert {k: v for k, v in digests(out).items() if not k.endswith(".part")} == whole


def test_clock_that_jumps_during_the_run(app, whole, tmp_path, full):
    """The main process, whose loop waits for its workers, sees another year at each look."""
    if not full:
        pytest.skip("long form only (BIDS_VARAUG_FAULTS=full)")
    out = tmp_path / "out"
    jump = ("import itertools, time; real = time.time; "
            f"jumps = itertools.cycle([0, {-TEN_YEARS}, {TEN_YEARS}, -3600]); "
            "time.time = lambda: real() + next(jumps); ")  # fmt: skip
    process = start_program(app.arguments(out), dict(os.environ), before=jump)
    _, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors
    assert digests(out) == whole


def test_c_locale_and_names_that_are_no_utf8(app, whole, tmp_path):
    """Python's own UTF-8 mode off, so that the locale counts."""
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/bad\xff & <b>caf\xc3\xa9")
    out = Path(folder) / "out"
    environment = os.environ | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    process = start_program(app.arguments(out, *app.linear), environment)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert b"Traceback" not in errors
    assert digests(out) == whole


def start_program(arguments, environment, before: str = "") -> subprocess.Popen:
    code = before + "import sys; from bids_varaug.cli.run import main; sys.exit(main())"
    return subprocess.Popen([sys.executable, "-c", code, *arguments], env=environment,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)  # fmt: skip
