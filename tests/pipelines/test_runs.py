"""Repeated runs: folders, resuming, failures."""

import io
import json
import signal
import subprocess
import sys
import time

import pytest

from bids_varaug.cli.perturb import compare_main, perturb_main


def perturb(folder, *command, n=3):
    return perturb_main([str(folder), "--n", str(n), "--nprocs", "2", "--seed", "5", "--", *map(str, command)])


def outputs(folder, pattern="*/out.txt"):
    return {path.parent.name: path.read_bytes() for path in folder.glob(pattern)}


@pytest.fixture(autouse=True)
def cache(library, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_runs_differ_among_each_other_and_the_same_seed_repeats_them(program, tmp_path, capsys):
    assert perturb(tmp_path / "one", program, "{run}/out.txt") == 0
    said = capsys.readouterr().err
    assert "asks libm for" in said and "3 of 3 runs with noise succeeded" in said
    first = outputs(tmp_path / "one")
    assert sorted(first) == ["ieee", "mca01", "mca02", "mca03"] and len(set(first.values())) == 4
    assert perturb(tmp_path / "two", program, "{run}/out.txt", n=4) == 0
    second = outputs(tmp_path / "two")
    assert {name: second[name] for name in first} == first  # more runs leave the first ones what they are
    record = json.loads((tmp_path / "one/logs/mca01.json").read_text())
    assert record["calls"] > 6000 and record["problem"] == ""


def test_each_line_of_progress_is_written_at_once(program, tmp_path, monkeypatch):
    """With its end: runs end side by side, and others may write between two pieces of a line."""
    told = []

    class Recorder(io.StringIO):
        def write(self, text):
            told.append(text)
            return len(text)

    monkeypatch.setattr(sys, "stderr", Recorder())
    assert perturb(tmp_path / "out", program, "{run}/out.txt") == 0
    lines = [text for text in told if "done in" in text]
    assert len(lines) == 4 and all(text.endswith("\n") for text in lines)


def test_what_is_done_is_not_run_again_and_another_request_is_refused(program, tmp_path, capsys):
    folder = tmp_path / "out"
    assert perturb(folder, program, "{run}/out.txt") == 0
    (folder / "mca02/out.txt").write_text("kept")
    (folder / "logs/mca03.json").write_text("{")  # as of a run that was killed
    before = outputs(folder)
    (folder / "mca03/rest").write_text("of the killed run")
    assert perturb(folder, program, "{run}/out.txt") == 0
    assert outputs(folder) == before and not (folder / "mca03/rest").exists()
    assert perturb(folder, program, "{run}/other.txt") == 64
    assert "another command" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("")
    assert perturb(tmp_path / "full", program, "{run}/out.txt") == 64
    assert "not empty" in capsys.readouterr().err


def test_processor_time_is_of_all_that_a_run_starts_and_not_of_waiting(program, tmp_path):
    script = tmp_path / "busy.sh"
    busy = f'{sys.executable} -c "import time\nwhile time.process_time() < 0.3: pass"'
    script.write_text(f'#!/bin/sh\nsleep 1\n{busy}\nexec {program} "$1/out.txt"\n')
    script.chmod(0o755)
    assert perturb(tmp_path / "out", script, "{run}", n=1) == 0
    record = json.loads((tmp_path / "out/logs/mca01.json").read_text())
    assert record["processor_seconds"] >= 0.3
    assert record["seconds"] >= 1 and record["seconds"] - record["processor_seconds"] > 0.5


def test_a_failing_run_leaves_the_others(program, tmp_path, capsys):
    """A shell script hands the noise on; it fails in the second run alone."""
    script = tmp_path / "script.sh"
    script.write_text(f'#!/bin/sh\ncase $1 in *mca02) echo lost; exit 3;; esac\nexec {program} "$1/out.txt"\n')
    script.chmod(0o755)
    assert perturb(tmp_path / "out", script, "{run}") == 1
    said = capsys.readouterr().err
    assert "mca02: exit code 3" in said and "failed: mca02" in said
    assert sorted(outputs(tmp_path / "out")) == ["ieee", "mca01", "mca03"]
    assert "lost" in (tmp_path / "out/logs/mca02.txt").read_text()


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        ([], 64, "no command was given"),
        (["no-such-program", "{run}"], 65, "no such program"),
        (["true", "{run}"], 1, "none of the functions of libm"),
        (["PROGRAM", "out.txt"], 64, "does not say where it writes"),
        (["PROGRAM", "{run}/out.txt", "f0"], 1, "wrote nothing into"),
        (["sh", "-c", "env -u LD_PRELOAD PROGRAM {run}/out.txt"], 1, "no call of libm was reached"),
    ],
)
def test_what_cannot_be_is_told(program, tmp_path, command, code, message, capsys):
    (tmp_path / "script").write_text(f"#!/bin/sh\n{' '.join(command[2:])}\n".replace("PROGRAM", str(program)))
    if command[:1] == ["sh"]:  # sh itself asks nothing of libm
        script = tmp_path / "run.sh"
        script.write_text(f"#!/bin/sh\nenv -u LD_PRELOAD {program} $1/out.txt\n")
        script.chmod(0o755)
        command = [script, "{run}"]
    command = [str(program) if part == "PROGRAM" else part for part in command]
    assert perturb(tmp_path / "out", *command, n=1) == code
    assert message in capsys.readouterr().err


def test_an_interrupted_run_ends_its_programs_and_is_resumed(program, tmp_path):
    script = tmp_path / "slow.sh"
    script.write_text(f'#!/bin/sh\n[ -e {tmp_path}/go ] || sleep 60\nexec {program} "$1/out.txt"\n')
    script.chmod(0o755)
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored in background jobs
        "from bids_varaug.cli.perturb import perturb_main; sys.exit(perturb_main())"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "out"), "--n", "1", "--", str(script), "{run}"]
    process = subprocess.Popen(command)
    deadline = time.monotonic() + 60
    while not (tmp_path / "out/ieee").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    (tmp_path / "go").touch()
    assert subprocess.run(command, check=False).returncode == 0
    assert sorted(outputs(tmp_path / "out")) == ["ieee", "mca01"]


def test_runs_of_text_alone_cannot_be_compared(program, tmp_path, capsys):
    assert perturb(tmp_path / "out", program, "{run}/out.txt") == 0
    assert compare_main([str(tmp_path / "out"), "-o", str(tmp_path / "compared")]) == 65
    assert "no images, affine matrices or tables" in capsys.readouterr().err
