"""The Boutiques descriptor and the parser describe the same command line."""

import argparse
import json
import re
from pathlib import Path

import pytest

from bids_varaug.cli import parser
from bids_varaug.cli.exit_codes import ExitCode

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


def test_defaults_agree(inputs, actions):
    for flag, entry in inputs.items():
        if "default-value" in entry:
            assert entry["default-value"] == actions[flag].default, flag


def test_suggested_memory_is_enough_for_the_largest_step(descriptor):
    from bids_varaug.workflows.participant import LARGEST_STEP_GB

    assert descriptor["suggested-resources"]["ram"] >= LARGEST_STEP_GB


def test_error_codes_are_those_of_the_program(descriptor):
    codes = {entry["code"] for entry in descriptor["error-codes"]}
    assert codes == {int(code) for code in ExitCode} - {0}
