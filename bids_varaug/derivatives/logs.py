"""What the logs folder holds: the settings of each run, and how to cite."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from bids_varaug.atomic import write_text
from bids_varaug.derivatives import names
from bids_varaug.derivatives.citation import Citation, cite
from bids_varaug.derivatives.sidecars import package_versions
from bids_varaug.models.ensemble import Ensemble, Member
from bids_varaug.settings import Settings


def write_logs(settings: Settings, ensemble: Ensemble, members: Sequence[Member]) -> None:
    """Write ``logs/CITATION.md`` and the settings of a run of the participant level."""
    _write(settings, settings_toml(settings, ensemble, members), cite_participant(settings, ensemble, members))


def write_group_logs(settings: Settings, citation: Citation) -> None:
    """Write ``logs/CITATION_group.md`` and the settings of a run of the group level."""
    _write(settings, _toml_table("settings", _given(settings)), citation, "_group")


def _write(settings: Settings, text: str, citation: Citation, ending: str = "") -> None:
    # Several runs may share one output directory; equal requests share one file.
    folder, digest = names.logs(settings.output_dir), hashlib.sha256(text.encode()).hexdigest()[:8]
    write_text(text, folder / f"settings-{digest}.toml")
    write_text(citation.markdown(), folder / f"CITATION{ending}.md")


def cite_participant(settings: Settings, ensemble: Ensemble, members: Sequence[Member]) -> Citation:
    """How to cite a run of the participant level."""
    run = {"ensemble": ensemble, "members": members, "sloppy": settings.sloppy, "n_grids": settings.grids}
    return cite("participant", package_versions(), **run)


def settings_toml(settings: Settings, ensemble: Ensemble, members: Sequence[Member]) -> str:
    """Return the settings, and the members' ensemble and checksums, as TOML.

    The settings have a table of their own: ``ensemble`` is one of them too, as it was asked for.
    """
    tables = {
        "settings": _given(settings),
        "ensemble": {"name": ensemble.name, "version": ensemble.version},
        "ensemble.sha256": {json.dumps(member.id): member.sha256 for member in members},
    }
    return "\n".join(_toml_table(name, values) for name, values in tables.items())


def _given(settings: Settings) -> dict[str, Any]:
    """Settings that are not None, which TOML lacks."""
    return {f.name: value for f in fields(settings) if (value := getattr(settings, f.name)) is not None}


def _toml_table(name: str, values: Mapping[str, Any]) -> str:
    return "\n".join([f"[{name}]", *(f"{key} = {toml_value(value)}" for key, value in values.items())]) + "\n"


def toml_value(value: Any) -> str:
    """Write a string, path, number, boolean, list or mapping as TOML.

    Examples
    --------
    >>> toml_value(("a", 1, {"b": True}))
    '["a", 1, {"b" = true}]'
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Mapping):
        inner = ", ".join(f"{json.dumps(str(k))} = {toml_value(v)}" for k, v in value.items())
        return f"{{{inner}}}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{', '.join(toml_value(item) for item in value)}]"
    # JSON strings are TOML strings, but for DEL, which TOML wants escaped too.
    return json.dumps(str(value)).replace("\x7f", "\\u007f")
