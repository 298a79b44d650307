"""Directories of a run: where it may read and write."""

from __future__ import annotations

import json
import os
from pathlib import Path

from bids_varaug.errors import NoInputError, OutputError, UsageError


def check_paths(bids_dir: Path, output_dir: Path, work_dir: Path) -> None:
    """Refuse directories that would lose or mix up data.

    The output may lie inside the input only below ``derivatives/``, as BIDS Apps customarily do. Nothing is created.

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
    # Links are followed: two names may mean one folder.
    source, output, work = (Path(os.path.realpath(path)) for path in (bids_dir, output_dir, work_dir))
    example = f"for example {bids_dir / 'derivatives' / 'bids_varaug'}"
    if output == source:
        raise UsageError(f"{output_dir}: the output directory is the input dataset itself. Choose another, {example}.")
    if output.is_relative_to(source) and source / "derivatives" not in output.parents:
        raise UsageError(
            f"{output_dir}: the output directory is inside the input dataset. This is allowed only below derivatives/, "
            f"{example}."
        )
    if work.is_relative_to(source):
        raise UsageError(f"{work_dir}: the work directory is inside the input dataset. Choose another -w.")
    for name, path in (("input dataset", source), ("output directory", output)):
        # Whoever deletes the work directory by hand must not delete these.
        if path.is_relative_to(work):
            raise UsageError(f"{work_dir}: the {name} is inside the work directory. Choose another -w.")
    for name, path in (("output", output_dir), ("work", work_dir)):
        _check_writable(name, path)
    _check_not_foreign(output_dir)


def _check_writable(name: str, path: Path) -> None:
    """Refuse a directory that exists and is not writable, or cannot be created."""
    existing = path
    while not os.path.lexists(existing) and existing != existing.parent:
        existing = existing.parent
    if not os.path.isdir(existing):
        dangling = os.path.islink(existing) and not os.path.exists(existing)
        what = "a dangling link" if dangling else "a file"
        raise OutputError(f"{existing}: the {name} directory cannot be here: this is {what}.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise OutputError(
            f"{path}: the {name} directory cannot be written (no permission in {existing}). Change its permissions, "
            "mount it writable, or choose another."
        )


def _check_not_foreign(output_dir: Path) -> None:
    """Refuse to write into a raw dataset or the derivatives of another tool."""
    path = output_dir / "dataset_description.json"
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # absent or damaged: there is nothing worth keeping, it will be replaced
    if not isinstance(description, dict):
        return
    generated = description.get("GeneratedBy")
    generated = generated if isinstance(generated, list) else []
    tools = [tool.get("Name") for tool in generated if isinstance(tool, dict)]
    if description.get("DatasetType", "raw") != "derivative":
        raise UsageError(f"{output_dir}: this is a raw BIDS dataset, not an output directory.")
    if tools and "bids_varaug" not in tools:
        raise UsageError(
            f"{output_dir}: contains the derivatives of {', '.join(map(str, tools))}. Choose another output directory."
        )
