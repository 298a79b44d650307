"""Several processes at once on one output directory."""

import gzip
import json
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest

from bids_varaug.errors import OutputError
from bids_varaug.files import hold_participants
from tests.workflows.test_participant import digests

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT_FILES = {
    ".bidsignore", "dataset_description.json", "descriptions.json", "descriptions.tsv",
    "seg-varaug_dseg.tsv", "sub-01.html", "sub-02.html",
}  # fmt: skip
SETTINGS = ("--members", "ieee", "seed", "--nprocs", "1")


@pytest.fixture(scope="module")
def plain(pair, linear, tmp_path_factory):
    """What one process makes of both participants."""
    out = tmp_path_factory.mktemp("plain") / "out"
    assert pair(out, *linear, *SETTINGS) == 0
    return out


class WholePage(HTMLParser):
    """Raises on a page that does not end as it began."""

    def __init__(self, text: str):
        super().__init__()
        self.ended = False
        self.feed(text)
        assert self.ended

    def handle_endtag(self, tag):
        self.ended = tag == "html"


READERS = {
    ".gz": lambda path: gzip.decompress(path.read_bytes()),
    ".json": lambda path: json.loads(path.read_text()),
    ".tsv": lambda path: pd.read_csv(path, sep="\t"),
    ".toml": lambda path: tomllib.loads(path.read_text()),
    ".html": lambda path: WholePage(path.read_text()),
}


def read_all(out: Path) -> None:
    """Read whatever is there now; raises where a file is not whole."""
    for path in out.rglob("*"):
        if path.suffix in READERS and not path.name.startswith("."):
            READERS[path.suffix](path)


def run_together(out: Path, *commands) -> list[tuple[int, str]]:
    """Exit code and error output of processes started at once; reads the outputs all the while."""
    code = "import sys; from bids_varaug.cli.run import main; sys.exit(main())"
    processes = [
        subprocess.Popen([sys.executable, "-c", code, *command], stderr=subprocess.PIPE, text=True)
        for command in commands
    ]
    try:
        while any(process.poll() is None for process in processes):
            read_all(out)
            time.sleep(0.05)
        return [(p.returncode, p.communicate()[1]) for p in processes]
    finally:
        for process in processes:
            process.kill()


def assert_as_plain(out: Path, plain: Path) -> None:
    read_all(out)
    assert digests(out) == digests(plain)
    assert {path.name for path in out.iterdir() if path.is_file()} == ROOT_FILES
    leftovers = [p for p in out.rglob(".*") if p.is_file() and p.name != ".bidsignore"]
    assert leftovers == []


def test_two_participants_at_once_are_as_one_run_of_both(pair, plain, linear, tmp_path):
    out = tmp_path / "out"
    commands = [
        pair.arguments(out, *linear, *SETTINGS, "--participant-label", label)
        for label in ("01", "02")
    ]
    for code, error in run_together(out, *commands):
        assert code == 0, error
    assert_as_plain(out, plain)


@pytest.mark.parametrize("work", ["same", "other"])
def test_participant_started_twice_is_done_once(pair, plain, linear, tmp_path, work):
    out = tmp_path / "out"
    command = pair.arguments(out, *linear, *SETTINGS)  # sub-01 first, of two
    again = [*command, "-w", str(tmp_path / "other")] if work == "other" else command
    answers = run_together(out, command, again)
    assert sorted(code for code, _ in answers) == [0, 1]
    refused = next(error for code, error in answers if code == 1)
    assert "sub-01: another run works on it (process " in refused
    assert_as_plain(out, plain)
    assert list(tmp_path.rglob("*.lock")) == []


HOLD = """
import sys, time
from pathlib import Path
from bids_varaug.files import hold_participants
with hold_participants(["01", "02"], [Path(sys.argv[1])]) as held:
    print(*sorted(held), flush=True)
    time.sleep(300)
"""


def test_what_a_killed_process_held_is_free(tmp_path, capsys):
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline().split() == ["01", "02"]
        with hold_participants({"02", "03"}, (tmp_path,)) as held:
            assert held == {"03"}
        assert f"ERROR: sub-02: another run works on it (process {other.pid}" in (
            capsys.readouterr().err
        )
    finally:
        other.kill()
        other.communicate()
    with hold_participants({"02", "03"}, (tmp_path,)) as held:
        assert held == {"02", "03"}
    assert [path.name for path in tmp_path.iterdir()] == [".sub-01.lock"]


def test_lock_that_cannot_be_made_is_an_output_error(tmp_path):
    (tmp_path / "work").write_text("")
    with pytest.raises(OutputError, match=r"work/\.sub-01\.lock: cannot be created"):
        with hold_participants({"01"}, (tmp_path / "work",)):
            pass
