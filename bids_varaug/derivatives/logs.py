"""What the logs folder holds: the settings of each run, and how to cite."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields

from bids_varaug.atomic import write_text
from bids_varaug.derivatives import names
from bids_varaug.derivatives.citation import Citation, cite
from bids_varaug.derivatives.sidecars import package_versions
from bids_varaug.models.ensemble import Ensemble, Member
from bids_varaug.settings import Settings


def write_logs(settings: Settings, ensemble: Ensemble, members: Sequence[Member]) -> None:
    """Write ``logs/CITATION.md`` and the settings as TOML, under a name made of their content.

    Several runs may share one output directory; equal requests share one file.
    """
    folder = names.logs(settings.output_dir)
    text = settings_toml(settings, ensemble, members)
    write_text(text, folder / _settings_name(text))
    write_text(cite_participant(settings, ensemble, members).markdown(), folder / "CITATION.md")


def cite_participant(settings: Settings, ensemble: Ensemble, members: Sequence[Member]) -> Citation:
    """How to cite a run of the participant level."""
    run = {"ensemble": ensemble, "members": members, "sloppy": settings.sloppy, "n_grids": settings.grids}
    return cite("participant", package_versions(), **run)


def write_group_logs(settings: Settings, citation: Citation) -> None:
    """Write the settings of a run of the group level, and how to cite it."""
    folder = names.logs(settings.output_dir)
    text = "\n".join(_settings_lines(settings)) + "\n"
    write_text(text, folder / _settings_name(text))
    write_text(citation.markdown(), folder / "CITATION_group.md")


def _settings_name(text: str) -> str:
    return f"settings-{hashlib.sha256(text.encode()).hexdigest()[:8]}.toml"


def settings_toml(settings: Settings, ensemble: Ensemble, members: Sequence[Member]) -> str:
    """Return the settings, and the members' ensemble and checksums, as TOML.

    The settings have a table of their own: ``ensemble`` is one of them too, as it was asked for.
    """
    lines = _settings_lines(settings)
    lines += ["", "[ensemble]", f"name = {toml_value(ensemble.name)}"]
    lines += [f"version = {toml_value(ensemble.version)}", "", "[ensemble.sha256]"]
    lines += [f"{json.dumps(member.id)} = {toml_value(member.sha256)}" for member in members]
    return "\n".join(lines) + "\n"


def _settings_lines(settings: Settings) -> list[str]:
    lines = ["[settings]"]
    for field in fields(settings):
        value = getattr(settings, field.name)
        if value is not None:  # TOML has no null
            lines.append(f"{field.name} = {toml_value(value)}")
    return lines


def toml_value(value) -> str:
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
