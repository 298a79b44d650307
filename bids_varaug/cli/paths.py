"""Directories of a run: where it may read and write."""

from __future__ import annotations

import json
import os
from pathlib import Path

from bids_varaug.errors import NoInputError, OutputError, UsageError


def check_paths(bids_dir: Path, output_dir: Path, work_dir: Path) -> None:
    """Refuse directories that would lose or mix up data.

    The output may lie inside the input only below ``derivatives/``, as BIDS Apps customarily do.
    Nothing is created.

    Raises
    ------
    NoInputError
        If the input is no readable directory.
    UsageError
        If one directory lies in another where it must not.
    OutputError
        If the output or work directory cannot be written.
    """
    # os.path instead of Path: False, not an error, where a parent folder may not be looked into.
    if not os.path.isdir(bids_dir):
        kind = "is not a directory" if os.path.exists(bids_dir) else "does not exist"
        raise NoInputError(f"{bids_dir}: the BIDS directory {kind}.")
    # Links are followed: two names may mean one place.
    source, output, work = (
        Path(os.path.realpath(place)) for place in (bids_dir, output_dir, work_dir)
    )
    if output == source:
        raise UsageError(
            f"{output_dir}: the output directory is the input dataset itself. "
            f"Give another, for example {bids_dir / 'derivatives' / 'bids_varaug'}."
        )
    if output.is_relative_to(source) and source / "derivatives" not in output.parents:
        raise UsageError(
            f"{output_dir}: the output directory lies inside the input dataset. That is allowed "
            f"below derivatives/ only, for example {bids_dir / 'derivatives' / 'bids_varaug'}."
        )
    if work.is_relative_to(source):
        raise UsageError(
            f"{work_dir}: the work directory lies inside the input dataset. Give -w another place."
        )
    for name, place in (("input dataset", source), ("output directory", output)):
        # Whoever deletes the work directory by hand must not delete these.
        if place.is_relative_to(work):
            raise UsageError(
                f"{work_dir}: the {name} lies in the work directory. Give -w another place."
            )
    for flag, place in (("output", output_dir), ("work", work_dir)):
        _check_writable(flag, place)
    _check_not_foreign(output_dir)


def _check_writable(name: str, place: Path) -> None:
    """Refuse a directory that exists and is not writable, or cannot be created."""
    existing = place
    while not os.path.lexists(existing) and existing != existing.parent:
        existing = existing.parent
    if os.path.islink(existing) and not os.path.exists(existing):
        raise OutputError(f"{existing}: the {name} directory cannot be here: a dangling link.")
    if not os.path.isdir(existing):
        raise OutputError(f"{existing}: the {name} directory cannot be here: this is a file.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise OutputError(
            f"{place}: the {name} directory cannot be written (no permission in {existing}). "
            "Change its permissions, mount it writable, or give another."
        )


def _check_not_foreign(output_dir: Path) -> None:
    """Refuse to write into a raw dataset or the derivatives of another tool."""
    path = output_dir / "dataset_description.json"
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # absent or damaged: there is nothing worth keeping, it is written anew
    if not isinstance(description, dict):
        return
    generated = description.get("GeneratedBy")
    generated = generated if isinstance(generated, list) else []
    tools = [tool.get("Name") for tool in generated if isinstance(tool, dict)]
    if description.get("DatasetType", "raw") != "derivative":
        raise UsageError(f"{output_dir}: this is a raw BIDS dataset, not an output directory.")
    if tools and "bids_varaug" not in tools:
        raise UsageError(
            f"{output_dir}: holds the derivatives of {', '.join(map(str, tools))}. "
            "Give bids_varaug a directory of its own."
        )
