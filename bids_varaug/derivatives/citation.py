"""How to cite a run, and what the logs folder says of it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from bids_varaug import __version__
from bids_varaug.derivatives import names
from bids_varaug.derivatives.names import Run
from bids_varaug.derivatives.sidecars import package_versions
from bids_varaug.files import write_text
from bids_varaug.settings import Settings
from bids_varaug.variability.quality import UNRELIABLE_FROM


@dataclass(frozen=True)
class Reference:
    """One work: its BibTeX key, the entry, and the entry's fields."""

    key: str
    bibtex: str
    fields: Mapping[str, str]

    @property
    def authors(self) -> str:
        """Who a text names: "Nadeau and Bengio", "Billot et al."."""
        families = [name.partition(",")[0].strip("{}") for name in self.fields["author"].split(" and ")]
        return " and ".join(families) if len(families) < 3 else f"{families[0]} et al."

    @property
    def text(self) -> str:
        """One line of a list of references, without a link."""
        known = self.fields
        authors = known["author"].strip("{}").replace(" and ", "; ").replace("; others", "; et al.")
        venue = next(known[name] for name in ("journal", "booktitle", "institution", "howpublished") if name in known)
        number = f"({known['number']})" if "number" in known else ""
        pages = f", {known['pages'].replace('--', '-')}" if "pages" in known else ""
        where = f"{venue} {known.get('volume', '')}{number}".strip() + pages
        return f"{authors} ({known['year']}). {known['title'].strip('{}')}. {where}.".replace("?.", "?")

    @property
    def url(self) -> str:
        """Address that stays: of the DOI or of arXiv; "" where the work has neither."""
        for name, address in (("doi", "https://doi.org/"), ("eprint", "https://arxiv.org/abs/")):
            if name in self.fields:
                return address + self.fields[name]
        return ""

    @property
    def html(self) -> Markup:
        """The line with its link."""
        return Markup("{} {}").format(self.text, self.link(self.url)) if self.url else Markup("{}").format(self.text)

    def link(self, text: str) -> Markup:
        """Give a text that leads to the work."""
        return Markup('<a href="{}">{}</a>').format(self.url, text) if self.url else Markup("{}").format(text)


@dataclass(frozen=True)
class Citation:
    """A paragraph for a methods section, with ``[@key; @other]`` or ``@key`` as pandoc reads it."""

    methods: str

    @property
    def references(self) -> list[Reference]:
        """The works that the paragraph names, in order of first mention."""
        works, named = references(), dict.fromkeys(re.findall(r"@(\w+)", self.methods))
        return [works[key] for key in named if key in works]

    @property
    def html(self) -> Markup:
        """The paragraph for a page: "(Billot et al., 2023)", each with a link to the work."""

        def write(works: Sequence[Reference], is_subject: bool) -> Markup:
            if is_subject:
                return works[0].link(f"{works[0].authors} ({works[0].fields['year']})")
            return Markup("({})").format(Markup("; ").join(w.link(f"{w.authors}, {w.fields['year']}") for w in works))

        return Markup("").join(self._written(escape, write))

    @property
    def latex(self) -> str:
        """The paragraph for LaTeX with natbib."""

        def write(works: Sequence[Reference], is_subject: bool) -> str:
            return f"\\cite{'t' if is_subject else 'p'}{{{','.join(work.key for work in works)}}}"

        return "".join(self._written(_escape_latex, write))

    def _written(self, plain: Callable[[str], str], write: Callable[[list[Reference], bool], str]) -> Iterator[str]:
        """Yield what `plain` makes of the text, and `write` of citations and of whether one is part of a sentence."""
        end = 0
        for found in re.finditer(r"\[(@\w+(?:; @\w+)*)\]|@\w+", self.methods):
            if works := Citation(found[0]).references:
                yield plain(self.methods[end : found.start()])
                yield write(works, found[1] is None)
                end = found.end()
        yield plain(self.methods[end:])

    @property
    def bibtex(self) -> str:
        """Their entries, ordered by key."""
        return "\n\n".join(work.bibtex for work in sorted(self.references, key=lambda work: work.key)) + "\n"

    def write(self, folder: Path, name: str = "CITATION") -> None:
        """Write it as ``.md`` (for pandoc), ``.html``, ``.tex`` and ``.bib``."""
        for ending in ("md", "html", "tex"):
            write_text(render(f"citation.{ending}", citation=self, name=name) + "\n", folder / f"{name}.{ending}")
        write_text(self.bibtex, folder / f"{name}.bib")


_LATEX = {character: f"\\{character}" for character in "&%$#_{}"} | {
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}", "-": "{-}",
}  # fmt: skip


def _escape_latex(text: str) -> str:
    r"""Text as LaTeX prints it.

    >>> print(_escape_latex("bids_varaug: 95 %, --sloppy, x-y"))
    bids\_varaug: 95 \%, {-}{-}sloppy, x-y
    """
    return re.sub(r"[&%$#_{}~^\\]|-(?=-)|(?<=-)-", lambda found: _LATEX[found[0]], text)


@cache
def references() -> dict[str, Reference]:
    """All works of ``data/references.bib`` by key: one field per line, as BibTeX writes them."""
    content = (files("bids_varaug") / "data" / "references.bib").read_text(encoding="utf-8")
    works = {}
    for entry in content.replace("{version}", __version__).strip().split("\n\n"):
        key = entry.partition("{")[2].partition(",")[0]
        fields = re.findall(r"^  (\w+) = \{(.*)\},?$", entry.replace(r"\_", "_"), re.MULTILINE)
        works[key] = Reference(key, entry, dict(fields))
    return works


def cite(what: str, **values: Any) -> Citation:
    """How to cite a run: by ``data/templates/methods_<what>.md``, whose head lists the values that it takes."""
    # Line ends and indents of the template mean nothing.
    return Citation(" ".join(render(f"methods_{what}.md", **{"versions": package_versions(), **values}).split()))


def render(template: str, /, filters: Mapping[str, Callable[..., Any]] | None = None, **values: Any) -> str:
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
    """Write ``logs/CITATION.*``, and as TOML the settings of a run of the participant level and the checksums."""
    tables = {
        "ensemble": {"name": run.ensemble.name, "version": run.ensemble.version},
        "ensemble.sha256": {json.dumps(member.id): member.sha256 for member in run.members},
    }
    write_group_logs(run.settings, cite_participant(run), "CITATION", tables)


def write_group_logs(
    settings: Settings, citation: Citation, name: str = "CITATION_group", tables: Mapping[str, Mapping] | None = None
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
    citation.write(folder, name)


def cite_participant(run: Run) -> Citation:
    """How to cite a run of the participant level."""
    settings = run.settings
    spaces = [space.partition(":")[0] for space in settings.output_spaces]
    return cite(
        "participant", ensemble=run.ensemble, members=run.members, voxel_size=run.voxel_size, sloppy=settings.sloppy,
        space=spaces[0] if spaces else None, refine=settings.refine, unreliable_from=UNRELIABLE_FROM,
    )  # fmt: skip


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
