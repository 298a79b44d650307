"""``examples/babs.yaml`` against our parser, and against BABS where it is installed."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from bids_varaug import __version__
from bids_varaug.cli import parser

MAKE_SCRIPT = """
import sys
from babs.container import Container
from babs.input_datasets import InputDatasets
from babs.system import System
level, source, folder = sys.argv[1:]
container = Container("containers", "bids-varaug-0-1-0", source)
datasets = InputDatasets(level, container.config["input_datasets"])
for dataset in datasets:
    dataset.set_babs_project_analysis_path(folder)
container.generate_bash_run_bidsapp(folder + "/app.sh", datasets, level)
container.generate_bash_participant_job(folder + "/job.sh", datasets, level, System("slurm"))
"""


@pytest.fixture
def config(root) -> dict:
    return yaml.safe_load((root / "examples" / "babs.yaml").read_text())


def test_flags_exist_and_the_version_is_ours(config):
    arguments = {k: v for k, v in config["bids_app_args"].items() if not k.startswith("$")}
    actions = parser.build_parser()._option_string_actions
    for flag, value in arguments.items():
        assert isinstance(value, str), f"{flag}: BABS takes text only"
        assert (actions[flag].nargs == 0) == (value == ""), flag
    assert config["zip_foldernames"] == {"bids_varaug": __version__.replace(".", "-")}


@pytest.mark.parametrize("level", ["subject", "session"])
def test_babs_makes_a_command_line_that_our_parser_takes(level, config, root, tmp_path):
    program = shutil.which("babs")
    if program is None:
        pytest.skip("babs is not installed (pip install babs)")
    if level == "session":
        config["bids_app_args"]["$SESSION_SELECTION_FLAG"] = "--session-label"
    source = tmp_path / "babs.yaml"
    source.write_text(yaml.safe_dump(config, sort_keys=False))
    subprocess.run(
        [Path(program).with_name("python"), "-c", MAKE_SCRIPT, level, source, tmp_path],
        check=True, capture_output=True,
    )  # fmt: skip
    for name in ("app.sh", "job.sh"):
        subprocess.run(["bash", "-n", tmp_path / name], check=True)
    script = (tmp_path / "app.sh").read_text().replace("\\\n", " ")
    (command,) = re.findall("^singularity run .*", script, re.MULTILINE)
    values = {"${PWD}": "/job", "${subid}": "sub-01", "$sesid": "ses-a"}
    for name, value in values.items():
        command = command.replace(name, value)
    words = shlex.split(command)
    given = parser.build_parser().parse_args(words[words.index("/job/inputs/data/BIDS") :])
    assert given.participant_labels == ["sub-01"]  # `parse_settings` strips the prefixes
    assert list(given.session_labels) == (["ses-a"] if level == "session" else [])
    assert str(given.output_dir) == "/job/outputs/bids_varaug"
    assert str(given.work_dir) == "/job/.git/tmp/wkdir"
