"""What a command line may say: values of flags, settings files, and the directories of a run."""

# ruff: noqa: PTH100, PTH110, PTH111, PTH112, PTH113
# os.path where it gives False, and pathlib an error, because a parent folder may not be looked into.

from __future__ import annotations

import difflib
import json
import os
import re
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from bids_varaug.errors import NoInputError, OutputError, UsageError

_GIB_PER_UNIT = {"K": 2.0**-20, "M": 2.0**-10, "G": 1.0, "T": 2.0**10}


def matching(pattern: str, problem: str) -> Callable[[str], str]:
    """Return what refuses texts that do not match a pattern, and leaves others as they are."""

    def read(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ArgumentTypeError(f"{text!r} {problem}")
        return text

    return read


_LABEL = "is not a BIDS label of letters and digits. Give labels, not paths, separated by spaces"
participant_label = matching("(sub-)?[0-9a-zA-Z+]+", _LABEL)
session_label = matching("(ses-)?[0-9a-zA-Z+]+", _LABEL)
member_names = matching(
    "[0-9a-zA-Z,]*[0-9a-zA-Z][0-9a-zA-Z,]*", "is not a family (all, mca, seed, ieee) or a member such as mca01"
)
device = matching(r"auto|cpu|cuda(:\d+)?", "is none of auto, cpu, cuda, cuda:0, ...")


def split_members(texts: Iterable[str]) -> tuple[str, ...]:
    """Names of members, each once; ``["mca,seed01,", "mca"]`` are mca and seed01."""
    return tuple(dict.fromkeys(name for text in texts for name in text.split(",") if name))


def whole_number(low: int, high: int = 2**32 - 1) -> Callable[[str], int]:
    """Return what reads a whole number from `low` to `high`."""

    def read(text: str) -> int:
        if not re.fullmatch(r"\d+", text) or not low <= int(text) <= high:
            raise ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")
        return int(text)

    return read


positive_int = whole_number(1)
seed = whole_number(0)
rounded_members = whole_number(0, 99)
folds = whole_number(2)


def memory_gb(text: str) -> float:
    """Memory in GiB (what nipype calls GB), 1 GiB = 1024 MiB as Slurm counts."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if not match or float(match[1]) <= 0:
        raise ArgumentTypeError(f"{text!r} is not an amount of memory such as 8G or 8000M")
    return float(match[1]) * _GIB_PER_UNIT[match[2].upper() or "G"]


def absolute_path(text: str) -> Path:
    """Absolute path without ``.`` and ``..``."""
    if not text:
        raise ArgumentTypeError("an empty path")
    return Path(os.path.abspath(os.path.expanduser(text)))


def named_path(text: str) -> tuple[str, Path]:
    """``NAME=PATH`` of an existing file or folder; the name becomes part of file names."""
    name, equals, path = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z0-9]+", name):
        raise ArgumentTypeError(f"{text!r}: use NAME=DIR with a name of letters and digits, e.g. freesurfer=/data/fs")
    found = absolute_path(path)
    if not os.path.exists(found):
        raise ArgumentTypeError(f"{found}: no such file or folder")
    return name, found


def existing_file(text: str) -> Path:
    """Absolute path of an existing file."""
    path = absolute_path(text)
    if not os.path.isfile(path):
        raise ArgumentTypeError(f"{path}: no such file")
    return path


def ensemble(text: str) -> str:
    """Name of a shipped ensemble, or the absolute path of an ensemble's folder."""
    return str(absolute_path(text)) if os.sep in text else text


def read_file(flag: str, path: Path, form: str, parse: Callable[[str], Any]) -> Any:
    """Content of the settings file of a flag.

    Raises
    ------
    UsageError
        If it cannot be read or parsed.
    """
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"{flag} {path}: cannot read it as {form}: {error}.") from error


def read_bids_filters(path: Path) -> dict[str, dict]:
    """Filters of a ``--bids-filter-file`` as nipreps write them, values unchanged; raises as `read_file`.

    Queries other than ``t1w`` are kept and have no effect: one file serves several tools.
    """
    flag = "--bids-filter-file"
    filters = read_file(flag, path, "JSON", json.loads)
    if not isinstance(filters, dict) or not all(isinstance(v, dict) for v in filters.values()):
        raise UsageError(f'{flag} {path}: expected a form like {{"t1w": {{"session": "01"}}}}.')
    for name in filters:
        if name != "t1w" and difflib.get_close_matches(name.lower(), ["t1w"], cutoff=0.75):
            raise UsageError(f"{flag} {path}: unknown query {name!r}. The query for T1w images is 't1w'.")
    return filters


def read_plugin(path: Path) -> Mapping[str, Any]:
    """Nipype plugin settings of a ``--use-plugin`` YAML file; raises as `read_file`."""
    plugin = read_file("--use-plugin", path, "YAML", yaml.safe_load)
    if not isinstance(plugin, dict) or not isinstance(plugin.get("plugin"), str):
        raise UsageError(f"--use-plugin {path}: expected 'plugin: NAME' and 'plugin_args: {{...}}'.")
    if not isinstance(plugin.setdefault("plugin_args", {}), dict):
        raise UsageError(f"--use-plugin {path}: plugin_args must be a mapping.")
    return plugin


def check_paths(bids_dir: Path, output_dir: Path, work_dir: Path) -> None:
    """Refuse directories that would lose or mix up data; nothing is created.

    The output may lie inside the input only below ``derivatives/``, as BIDS Apps customarily do.

    Raises
    ------
    NoInputError
        If the input is no readable directory.
    UsageError
        If one directory lies in another where it must not, or the output belongs to another tool.
    OutputError
        If the output or work directory cannot be written.
    """
    if not os.path.isdir(bids_dir):
        kind = "is not a directory" if os.path.exists(bids_dir) else "does not exist"
        raise NoInputError(f"{bids_dir}: the BIDS directory {kind}.")
    # Links are followed: two names may mean one folder.
    source, output, work = (Path(os.path.realpath(path)) for path in (bids_dir, output_dir, work_dir))
    if output.is_relative_to(source) and source / "derivatives" not in output.parents:
        raise UsageError(
            f"{output_dir}: the output directory must lie outside of the input dataset or below its derivatives/, for "
            f"example {bids_dir / 'derivatives' / 'bids_varaug'}."
        )
    # Whoever deletes the work directory by hand must not delete the others.
    if work.is_relative_to(source) or source.is_relative_to(work) or output.is_relative_to(work):
        raise UsageError(
            f"{work_dir}: the work directory must not be inside the input dataset, nor contain it or the output "
            "directory. Choose another -w."
        )
    for name, path in (("output", output_dir), ("work", work_dir)):
        _check_writable(name, path)
    _check_not_foreign(output_dir)


def _check_writable(name: str, path: Path) -> None:
    """Refuse a directory that exists and is not writable, or cannot be created."""
    existing = path
    while not os.path.lexists(existing) and existing != existing.parent:
        existing = existing.parent
    if not os.path.isdir(existing):
        what = "a file" if os.path.exists(existing) else "a dangling link"
        raise OutputError(f"{existing}: the {name} directory cannot be here: this is {what}.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise OutputError(
            f"{path}: the {name} directory cannot be written (no permission in {existing}). Change its permissions, "
            "mount it writable, or choose another."
        )


def _check_not_foreign(output_dir: Path) -> None:
    """Refuse to write into a raw dataset or the derivatives of another tool."""
    try:
        description = json.loads((output_dir / "dataset_description.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # absent or damaged: there is nothing worth keeping, it will be replaced
    if not isinstance(description, dict):
        return
    if description.get("DatasetType", "raw") != "derivative":
        raise UsageError(f"{output_dir}: this is a raw BIDS dataset, not an output directory.")
    generated = description.get("GeneratedBy")
    tools = [tool.get("Name") for tool in generated if isinstance(tool, dict)] if isinstance(generated, list) else []
    if tools and "bids_varaug" not in tools:
        raise UsageError(
            f"{output_dir}: contains the derivatives of {', '.join(map(str, tools))}. Choose another output directory."
        )
