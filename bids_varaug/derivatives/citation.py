"""How to cite a run, and what the logs folder says of it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import jinja2

from bids_varaug.derivatives import names
from bids_varaug.derivatives.names import Run
from bids_varaug.derivatives.sidecars import package_versions
from bids_varaug.files import write_text
from bids_varaug.settings import Settings


@dataclass(frozen=True)
class Reference:
    """One work: its BibTeX key, the entry, and one line for a list of references."""

    key: str
    bibtex: str
    text: str


@dataclass(frozen=True)
class Citation:
    """A paragraph for a methods section, with ``[@key]`` as pandoc reads it."""

    methods: str

    @property
    def references(self) -> list[Reference]:
        """The works that the paragraph names, in order of first mention."""
        works, named = references(), dict.fromkeys(re.findall(r"@(\w+)", self.methods))
        return [works[key] for key in named if key in works]

    @property
    def bibtex(self) -> str:
        """Their entries, ordered by key."""
        return "\n\n".join(work.bibtex for work in sorted(self.references, key=lambda work: work.key)) + "\n"

    def markdown(self) -> str:
        """Content of CITATION.md: paragraph, references, BibTeX."""
        return render("citation.md", citation=self) + "\n"


@cache
def references() -> dict[str, Reference]:
    """All works of ``data/references.bib`` by key: one field per line, as BibTeX writes them."""
    content = (files("bids_varaug") / "data" / "references.bib").read_text(encoding="utf-8")
    works = {}
    for entry in content.strip().split("\n\n"):
        key = entry.partition("{")[2].partition(",")[0]
        fields = dict(re.findall(r"^  (\w+) = \{(.*)\},?$", entry, re.MULTILINE))
        authors = fields["author"].replace(" and ", "; ").replace("; others", "; et al.")
        venue = next(fields[name] for name in ("journal", "booktitle", "institution", "howpublished") if name in fields)
        text = f"{authors} ({fields['year']}). {fields['title'].strip('{}')}. {venue}."
        for scheme, name in (("doi", "doi"), ("arXiv", "eprint")):
            text += f" {scheme}:{fields[name]}." if name in fields else ""
        works[key] = Reference(key, entry, text)
    return works


def cite(what: str, **values: Any) -> Citation:
    """How to cite a run: by ``data/templates/methods_<what>.md``, whose head lists the values that it takes."""
    # Line ends and indents of the template mean nothing.
    return Citation(" ".join(render(f"methods_{what}.md", **{"versions": package_versions(), **values}).split()))


def render(template: str, /, filters: Mapping[str, Callable[..., str]] | None = None, **values: Any) -> str:
    """Fill a template of ``data/templates``: values in HTML are escaped, none may be missing."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("bids_varaug", "data/templates"),
        autoescape=jinja2.select_autoescape(["html"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"listed": _listed, "percent": percent, **(filters or {})}
    return environment.get_template(template).render(**values)


def percent(share: float) -> str:
    """Write 0.9 as "90 %"."""
    return f"{100 * share:.0f} %"


def _listed(items: Sequence[str]) -> str:
    *first, last = items
    return f"{', '.join(first)} and {last}" if first else last


def write_logs(run: Run) -> None:
    """Write ``logs/CITATION.md``, and as TOML the settings of a run of the participant level and the checksums."""
    tables = {
        "ensemble": {"name": run.ensemble.name, "version": run.ensemble.version},
        "ensemble.sha256": {json.dumps(member.id): member.sha256 for member in run.members},
    }
    write_group_logs(run.settings, cite_participant(run), "CITATION.md", tables)


def write_group_logs(
    settings: Settings, citation: Citation, name: str = "CITATION_group.md", tables: Mapping[str, Mapping] | None = None
) -> None:
    """Write how to cite, and as TOML the settings of a run and further tables."""
    # The settings have a table of their own: "ensemble" is one of them too, as it was asked for.
    lines = []
    for title, values in {"settings": vars(settings), **(tables or {})}.items():
        known = {key: value for key, value in values.items() if value is not None}  # TOML lacks None
        lines += [f"[{title}]", *(f"{key} = {toml_value(value)}" for key, value in known.items()), ""]
    text = "\n".join(lines)
    # Several runs may share one output directory; equal requests share one file.
    folder, digest = names.logs(settings.output_dir), hashlib.sha256(text.encode()).hexdigest()[:8]
    write_text(text, folder / f"settings-{digest}.toml")
    write_text(citation.markdown(), folder / name)


def cite_participant(run: Run) -> Citation:
    """How to cite a run of the participant level."""
    return cite("participant", ensemble=run.ensemble, members=run.members, sloppy=run.settings.sloppy)


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
