"""What the logs folder holds: the settings of each run, and how to cite."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from bids_varaug.atomic import write_text
from bids_varaug.derivatives import names
from bids_varaug.derivatives.citation import Citation, cite
from bids_varaug.derivatives.sidecars import package_versions
from bids_varaug.models.ensemble import Ensemble, Member
from bids_varaug.settings import Settings


def write_logs(settings: Settings, ensemble: Ensemble, members: Sequence[Member]) -> None:
    """Write ``logs/CITATION.md``, and as TOML the settings of a run of the participant level and the checksums."""
    tables = {
        "ensemble": {"name": ensemble.name, "version": ensemble.version},
        "ensemble.sha256": {json.dumps(member.id): member.sha256 for member in members},
    }
    _write(settings, tables, cite_participant(settings, ensemble, members), "CITATION.md")


def write_group_logs(settings: Settings, citation: Citation, name: str = "CITATION_group.md") -> None:
    """Write how to cite, and the settings of a run of the group level."""
    _write(settings, {}, citation, name)


def _write(settings: Settings, tables: Mapping[str, Mapping[str, str]], citation: Citation, name: str) -> None:
    # The settings have a table of their own: "ensemble" is one of them too, as it was asked for.
    text = "\n".join(_toml_table(*item) for item in {"settings": vars(settings), **tables}.items())
    # Several runs may share one output directory; equal requests share one file.
    folder, digest = names.logs(settings.output_dir), hashlib.sha256(text.encode()).hexdigest()[:8]
    write_text(text, folder / f"settings-{digest}.toml")
    write_text(citation.markdown(), folder / name)


def cite_participant(settings: Settings, ensemble: Ensemble, members: Sequence[Member]) -> Citation:
    """How to cite a run of the participant level."""
    run = {"ensemble": ensemble, "members": members, "sloppy": settings.sloppy, "n_grids": settings.grids}
    return cite("participant", package_versions(), **run)


def _toml_table(name: str, values: Mapping[str, Any]) -> str:
    # TOML lacks None.
    lines = [f"{key} = {toml_value(value)}" for key, value in values.items() if value is not None]
    return "\n".join([f"[{name}]", *lines]) + "\n"


def toml_value(value: Any) -> str:
    """Write a string, path, number, boolean, list or mapping as TOML.

    >>> toml_value(("a", 1, {"b": True}))
    '["a", 1, {"b" = true}]'
    """
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(str(k))} = {toml_value(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    if isinstance(value, int | float):
        return str(value).lower()  # True, too
    # JSON strings are TOML strings, but for DEL, which TOML wants escaped too.
    return json.dumps(str(value)).replace("\x7f", "\\u007f")
