"""Values of command line flags: text to checked Python values."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from bids_varaug.errors import UsageError

_GIB_PER_UNIT = {"K": 2.0**-20, "M": 2.0**-10, "G": 1.0, "T": 2.0**10}


def participant_label(text: str) -> str:
    """Participant label without ``sub-``.

    Examples
    --------
    >>> participant_label("sub-01")
    '01'
    """
    return _label(text, "sub")


def session_label(text: str) -> str:
    """Session label without ``ses-``."""
    return _label(text, "ses")


def _label(text: str, entity: str) -> str:
    bare = text.removeprefix(f"{entity}-")
    if not re.fullmatch("[0-9a-zA-Z+]+", bare):
        raise UsageError(
            f"{text!r} is not a BIDS label: only letters and digits may follow '{entity}-'. "
            "Give labels, not paths, separated by spaces."
        )
    return bare


def member_names(text: str) -> str:
    """Families or ids of members; commas separate several.

    Examples
    --------
    >>> member_names("mca,seed01,")
    'mca,seed01'
    """
    names = [name for name in text.split(",") if name]
    if not names or not all(re.fullmatch(r"[0-9a-zA-Z]+", name) for name in names):
        raise argparse.ArgumentTypeError(f"{text!r} is not a family (all, mca, seed, ieee) or a member such as mca01")
    return ",".join(names)


def whole_number(low: int, high: int = 2**32 - 1) -> Callable[[str], int]:
    """Return what reads a whole number from `low` to `high`.

    Examples
    --------
    >>> whole_number(1)("3")
    3
    """

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = low - 1
        if not low <= number <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")
        return number

    return read


positive_int = whole_number(1)
seed = whole_number(0)
rounded_members = whole_number(0, 99)
folds = whole_number(2)


def memory_gb(text: str) -> float:
    """Memory in GiB (what nipype calls GB), 1 GiB = 1024 MiB as Slurm counts.

    Examples
    --------
    >>> memory_gb("8G"), memory_gb("512M"), memory_gb("8")
    (8.0, 0.5, 8.0)
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if not match or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not an amount of memory such as 8G or 8000M")
    return float(match[1]) * _GIB_PER_UNIT[match[2].upper() or "G"]


def device(text: str) -> str:
    """Name of a computing device; whether it exists is seen when it is used."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is none of auto, cpu, cuda, cuda:0, ...")
    return text


def absolute_path(text: str) -> Path:
    """Absolute path without ``.`` and ``..``."""
    if not text:
        raise argparse.ArgumentTypeError("an empty path")
    return Path(os.path.abspath(os.path.expanduser(text)))


def named_path(text: str) -> tuple[str, Path]:
    """``NAME=PATH`` of an existing file or folder; the name becomes part of file names."""
    name, equals, path = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z0-9]+", name):
        raise argparse.ArgumentTypeError(
            f"{text!r}: use NAME=DIR with a name of letters and digits, e.g. freesurfer=/data/fs"
        )
    found = absolute_path(path)
    if not found.exists():
        raise argparse.ArgumentTypeError(f"{found}: no such file or folder")
    return name, found


def existing_file(text: str) -> Path:
    """Absolute path of an existing file."""
    path = absolute_path(text)
    if not os.path.isfile(path):  # Path.is_file raises where a parent folder may not be entered
        raise argparse.ArgumentTypeError(f"{path}: no such file")
    return path


def ensemble(text: str) -> str:
    """Name of a shipped ensemble, or the absolute path of an ensemble's folder."""
    return str(absolute_path(text)) if os.sep in text else text


def read_bids_filters(path: Path) -> dict[str, dict]:
    """Filters of a ``--bids-filter-file`` as nipreps write them, values unchanged.

    Raises
    ------
    UsageError
        If it is not JSON, or not a mapping of queries to mappings.

    Notes
    -----
    Queries other than ``t1w`` are kept and have no effect: one file serves several tools.
    """
    flag = f"--bids-filter-file {path}"
    try:
        filters = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UsageError(f"{flag}: not valid JSON, line {error.lineno}, column {error.colno}: {error.msg}.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{flag}: cannot read it: {error}.") from error
    if not isinstance(filters, dict) or not all(isinstance(v, dict) for v in filters.values()):
        raise UsageError(f'{flag}: expected a form like {{"t1w": {{"session": "01"}}}}.')
    for name in filters:
        if name != "t1w" and difflib.get_close_matches(name.lower(), ["t1w"], cutoff=0.75):
            raise UsageError(f"{flag}: unknown query {name!r}. The query for T1w images is 't1w'.")
    return filters


def read_plugin(path: Path) -> Mapping:
    """Nipype plugin settings of a ``--use-plugin`` YAML file.

    Raises
    ------
    UsageError
        If it is not YAML, or holds no ``plugin`` name.
    """
    import yaml

    try:
        plugin = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"--use-plugin {path}: cannot read it as YAML: {error}") from error
    if not isinstance(plugin, dict) or not isinstance(plugin.get("plugin"), str):
        raise UsageError(f"--use-plugin {path}: expected 'plugin: NAME' and 'plugin_args: {{...}}'.")
    if not isinstance(plugin.setdefault("plugin_args", {}), dict):
        raise UsageError(f"--use-plugin {path}: plugin_args must be a mapping.")
    return plugin
