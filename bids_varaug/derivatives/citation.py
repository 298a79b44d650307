"""How to cite a run: a paragraph of methods from a template, and the works that it names."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import jinja2


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


def cite(what: str, versions: Mapping[str, str], **values: Any) -> Citation:
    """How to cite a run.

    By the template ``data/templates/methods_<what>.md`` ("participant", "group", or "applied": a model fitted to other
    people), whose head lists the values that it takes, and versions as of `sidecars.package_versions`.
    """
    # Line ends and indents of the template mean nothing.
    return Citation(" ".join(render(f"methods_{what}.md", versions=versions, **values).split()))


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
