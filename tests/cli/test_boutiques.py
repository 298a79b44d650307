"""The Boutiques descriptor and the parser describe the same command line."""

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bids_varaug.cli import parser
from bids_varaug.errors import ExitCode
from tests.workflows.conftest import describe, small_ensemble, write_t1w

__all__ = ["small_ensemble"]  # fixture

DESCRIPTOR = Path(__file__).parents[2] / "boutiques.json"
NOT_DESCRIBED = {"-h", "--help", "--version"}


@pytest.fixture(scope="module")
def descriptor() -> dict:
    return json.loads(DESCRIPTOR.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def inputs(descriptor) -> dict[str, dict]:
    """Inputs by flag."""
    return {
        entry["command-line-flag"]: entry
        for entry in descriptor["inputs"]
        if "command-line-flag" in entry
    }


@pytest.fixture(scope="module")
def actions() -> dict[str, argparse.Action]:
    return parser.build_parser()._option_string_actions


def test_every_described_flag_exists(inputs, actions):
    assert set(inputs) <= set(actions)


def test_every_flag_is_described_once(inputs, actions):
    described = [actions[flag].dest for flag in inputs]
    dests = {a.dest for flag, a in actions.items() if flag not in NOT_DESCRIBED}
    assert sorted(described) == sorted(dests)


def test_positional_arguments_come_in_order(descriptor):
    positionals = [e["id"] for e in descriptor["inputs"] if "command-line-flag" not in e]
    assert positionals == ["bids_dir", "output_dir", "level"]


def test_command_line_names_every_input_once(descriptor):
    keys = re.findall(r"\[[A-Z_]+\]", descriptor["command-line"])
    assert keys == [entry["value-key"] for entry in descriptor["inputs"]]


def test_switches_lists_and_choices_agree(inputs, actions):
    for flag, entry in inputs.items():
        action = actions[flag]
        assert (entry["type"] == "Flag") == (action.nargs == 0), flag
        assert entry.get("list", False) == (action.nargs == "+"), flag
        assert entry.get("value-choices") == (list(action.choices) if action.choices else None)


def test_meanings_are_those_of_the_help(inputs, actions):
    for flag, entry in inputs.items():
        action = actions[flag]
        told = action.help % vars(action)
        # --help shows the form of a value in its own place.
        text = entry["description"].replace(f", {action.metavar}:", ":")
        assert text == f"{told[0].upper()}{told[1:]}.", flag


def test_files_and_numbers_agree(inputs, actions):
    for flag, entry in inputs.items():
        read = actions[flag].type
        assert (entry["type"] == "File") == (read is parser.existing_file), flag
        is_number = getattr(read, "__qualname__", "").startswith("whole_number")
        assert (entry["type"] == "Number") == is_number, flag


def test_bounds_are_the_first_and_last_numbers_taken(inputs, actions):
    for flag, entry in inputs.items():
        for bound, beyond in (("minimum", -1), ("maximum", 1)):
            if bound in entry:
                read = actions[flag].type
                assert read(str(entry[bound])) == entry[bound], flag
                with pytest.raises(argparse.ArgumentTypeError):
                    read(str(entry[bound] + beyond))


def test_defaults_agree(inputs, actions):
    for flag, entry in inputs.items():
        if "default-value" in entry:
            assert entry["default-value"] == actions[flag].default, flag


def test_suggested_memory_is_enough_for_the_largest_step(descriptor):
    from bids_varaug.workflows.plan import STEP_GB

    assert descriptor["suggested-resources"]["ram"] >= STEP_GB["segment"]


def test_error_codes_are_those_of_the_program(descriptor):
    codes = {entry["code"] for entry in descriptor["error-codes"]}
    assert codes == {int(code) for code in ExitCode} - {0}


@pytest.fixture(scope="module")
def bosh():
    """Run Boutiques' own program; returns its standard output."""
    program = shutil.which("bosh")
    if program is None:
        pytest.skip("bosh is not installed (pip install boutiques)")

    def run(*arguments: str, **options) -> str:
        done = subprocess.run(
            [program, *arguments], capture_output=True, text=True, check=False, **options
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done.stdout

    return run


def test_bosh_finds_the_descriptor_valid(bosh):
    assert bosh("validate", str(DESCRIPTOR)).strip().endswith("OK")


def test_bosh_makes_a_command_line_that_says_what_the_invocation_says(
    bosh, descriptor, inputs, actions, tmp_path
):
    (tmp_path / "a b.txt").write_text("x")
    invocation = {"bids_dir": "/data/b i", "output_dir": "out", "level": "group"}
    invocation |= {entry["id"]: _example(entry, tmp_path) for entry in inputs.values()}
    path = tmp_path / "invocation.json"
    path.write_text(json.dumps(invocation))
    told = bosh("exec", "simulate", "-i", str(path), str(DESCRIPTOR), cwd=tmp_path)
    program, *line = shlex.split(told.strip().splitlines()[-1])
    assert program == "bids_varaug"
    given = vars(parser.build_parser().parse_args(line))
    assert str(given["bids_dir"]) == "/data/b i"
    for flag, entry in inputs.items():
        action, wanted = actions[flag], invocation[entry["id"]]
        if entry["type"] == "Flag":
            assert given[action.dest] == (1 if flag == "--verbose" else True), flag
        else:
            read = action.type or str
            many = entry.get("list", False)
            expected = [read(v) for v in wanted] if many else read(str(wanted))
            assert given[action.dest] == expected, flag


def _example(entry: dict, folder: Path) -> object:
    """A value that is not the default."""
    texts = {
        "mem": "6G", "device": "cpu", "members": "seed01", "compare": f"fs={folder}",
        "output_spaces": "MNI152NLin2009cAsym:res-2",
    }  # fmt: skip
    value = {
        "Flag": True,
        "File": str(folder / "a b.txt"),
        "Number": entry.get("minimum", 0) + 3,
        "String": texts.get(entry["id"], "x1"),
    }[entry["type"]]
    value = entry["value-choices"][-1] if "value-choices" in entry else value
    return [value] if entry.get("list") else value


def test_bosh_launches_the_program_on_a_dataset(bosh, small_ensemble, tmp_path):
    write_t1w(describe(tmp_path / "bids"), "sub-01")
    invocation = {
        "bids_dir": "bids", "output_dir": "out", "level": "participant", "members": ["ieee"],
        "ensemble": str(small_ensemble), "participant_label": ["01"], "nprocs": 1,
    }  # fmt: skip
    (tmp_path / "invocation.json").write_text(json.dumps(invocation))
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    told = bosh(
        "exec", "launch", "--no-container", "--skip-data-collection", str(DESCRIPTOR),
        "invocation.json", cwd=tmp_path, env={"PATH": path, "HOME": str(tmp_path), "NO_ET": "1"},
    )  # fmt: skip
    assert "sub-01.html" in told
    assert (tmp_path / "out/sub-01/anat/sub-01_seg-varaug_desc-consensus_dseg.nii.gz").is_file()
