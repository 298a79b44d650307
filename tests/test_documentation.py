"""Commands and links in the documentation: nothing that is not there, nobody left to find out."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from bids_varaug.cli.convert import build_parser as build_convert_parser
from bids_varaug.cli.parser import build_parser
from bids_varaug.cli.pretrain import build_parser as build_pretrain_parser
from bids_varaug.cli.train import build_parser as build_train_parser

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "brainlife/README.md")]
    + [page for page in ROOT.glob("docs/**/*.md") if "_build" not in page.parts]
)
# Where the arguments of this program begin in a line that starts with another
IMAGES = re.compile(r".*\s(?:bids_varaug\S*:\S+|\S+\.sif)\s+(?=\S*/data)")


def commands(page: Path) -> list[str]:
    """Lines of the blocks that a reader would type, joined where they continue."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```(.*?)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    shell = "\n".join(block for language, block in blocks if language in ("", "sh", "bash"))
    lines = shell.replace("\\\n", " ").splitlines()
    return [line for line in lines if re.match(r"[a-z]", line)]


def arguments(command: str) -> list[str] | None:
    """Of this program; None for other programs."""
    if command.startswith(("docker run", "podman run", "apptainer run")):
        command, n = IMAGES.subn("bids_varaug ", command)
        assert n, f"no image and /data in: {command}"
    words = shlex.split(command.replace("[flags]", ""), comments=True)
    if words[0] != "bids_varaug":
        return None
    # Optional parts, and a choice of levels
    return [re.sub(r"^\{(\w+),.*\}$", r"\1", word.strip("[]")) for word in words[1:]]


ALL = [(page, command) for page in PAGES for command in commands(page)]


def test_there_are_commands():
    assert len(ALL) > 30


@pytest.mark.parametrize(
    "page, command", ALL, ids=lambda v: v.name if isinstance(v, Path) else v[:60]
)
def test_command_is_in_the_table_of_who_runs_it_and_its_flags_exist(page, command):
    page_of_commands = ROOT / "docs" / "reference" / "commands.md"
    table = page_of_commands.read_text(encoding="utf-8").split("## Who runs")[1]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    known = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    for part in re.split(r"\s*&&\s*", command):
        assert Path(part.split()[0]).name in known, f"{page.name}: {command}"
    given = arguments(command)
    if given is not None:
        build_parser().parse_args(given)
    if command.startswith("bids_varaug-train"):
        build_train_parser().parse_args(shlex.split(command)[1:])
    if command.startswith("bids_varaug-pretrain"):
        build_pretrain_parser().parse_args(shlex.split(command)[1:])
    if command.startswith("bids_varaug-convert"):
        build_convert_parser().parse_args(shlex.split(command.replace("CHECKPOINT...", "CHECKPOINT"))[1:])


@pytest.mark.parametrize(
    "page, command", ALL, ids=lambda v: v.name if isinstance(v, Path) else v[:60]
)
def test_files_of_a_command_exist(page, command):
    for path in re.findall(r"(?:examples|benchmarks|tests|brainlife)/[\w./-]*\w", command):
        assert (ROOT / path).exists(), f"{page.name}: {path}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_within_the_repository_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        path = page.parent / target
        if path.parent.name == "notebooks":  # made of a script when the site is built
            path = ROOT / "examples" / "tutorials" / f"{path.stem}.py"
        assert "://" in target or path.exists(), target
