"""How to cite a run: a paragraph of methods from a template, and the works that it names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any

import jinja2

from bids_varaug.models.ensemble import BASELINE, Ensemble, Member

VENUES = ("journal", "booktitle", "institution", "howpublished")
"""BibTeX's names of the place of publication."""


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
        entries = {work.key: work.bibtex for work in self.references}
        return "\n\n".join(entries[key] for key in sorted(entries)) + "\n"

    def markdown(self) -> str:
        """Content of CITATION.md: paragraph, references, BibTeX."""
        return _templates().get_template("citation.md").render(citation=self) + "\n"


@lru_cache(maxsize=1)
def references() -> dict[str, Reference]:
    """All works of ``data/references.bib`` by key: one field per line, as BibTeX writes them."""
    content = (files("bids_varaug") / "data" / "references.bib").read_text(encoding="utf-8")
    works = {}
    for entry in content.strip().split("\n\n"):
        key = entry.partition("{")[2].partition(",")[0]
        fields = dict(re.findall(r"^  (\w+) = \{(.*)\},?$", entry, re.MULTILINE))
        authors = fields["author"].replace(" and ", "; ").replace("; others", "; et al.")
        venue = next(fields[name] for name in VENUES if name in fields)
        text = f"{authors} ({fields['year']}). {fields['title'].strip('{}')}. {venue}."
        for scheme, name in (("doi", "doi"), ("arXiv", "eprint")):
            text += f" {scheme}:{fields[name]}." if name in fields else ""
        works[key] = Reference(key, entry, text)
    return works


def cite_participant(
    ensemble: Ensemble,
    members: Sequence[Member],
    versions: Mapping[str, str] | None = None,
    *,
    sloppy: bool = False,
    n_grids: int = 1,
) -> Citation:
    """How to cite a run of the participant level.

    Parameters
    ----------
    ensemble : for name, version and voxel size
    members : those that were used
    versions : package name to version; of bids_varaug, nipype, pybids, nibabel, torch
    sloppy : whether the run was made with ``--sloppy``; the grid's voxel size is then left out
    n_grids : on how many grids the baseline segmented
    """
    families: dict[str, list[Member]] = {}
    for member in members:
        families.setdefault(member.family, []).append(member)
    baseline = families.pop(BASELINE, None)
    described = [
        {
            "name": name,
            "n_members": len(group),
            "precisions": sorted({m.precision for m in group if m.precision is not None}),
        }
        for name, group in families.items()
    ]
    return _cite(
        "methods_participant.md",
        ensemble=ensemble,
        families=described,
        has_baseline=baseline is not None,
        versions=versions or {},
        sloppy=sloppy,
        n_grids=n_grids,
    )


def cite_group(
    settings: Mapping[str, object],
    features: str,
    versions: Mapping[str, str] | None = None,
    *,
    has_numerics: bool = False,
    has_reliability: bool = False,
    compared_with: Sequence[str] = (),
) -> Citation:
    """How to cite a run of the group level.

    Parameters
    ----------
    settings : of a `brainage.study.Study`
    features : what the features are, e.g. "volumes of 31 structures [mm3]"
    versions : package name to version; of bids_varaug and scikit-learn
    has_numerics : whether numerical and anatomical variability are reported
    has_reliability : whether intraclass correlations are
    compared_with : names of other pipelines
    """
    return _cite(
        "methods_group.md",
        settings=settings,
        features=features,
        versions=versions or {},
        has_numerics=has_numerics,
        has_reliability=has_reliability,
        compared_with=compared_with,
    )


def cite_applied(model: Mapping[str, Any], features: str, versions: Mapping[str, str]) -> Citation:
    """How to cite predictions of a model fitted to other people.

    Parameters
    ----------
    model : "model", "augmentation", "n_participants", "age_min" and "age_max" of its training
    features : e.g. "volumes of 31 features [mm3]"
    versions : package name to version; of bids_varaug and scikit-learn
    """
    return _cite("methods_applied.md", model=model, features=features, versions=versions)


def _cite(template: str, **values: Any) -> Citation:
    """Fill a template of ``data/templates``; its line ends and indents mean nothing."""
    return Citation(" ".join(_templates().get_template(template).render(**values).split()))


@lru_cache(maxsize=1)
def _templates() -> jinja2.Environment:
    """Templates of plain text: nothing is escaped, no value may be missing."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("bids_varaug", "data/templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"listed": _listed, "percent": lambda share: f"{100 * share:.0f} %"}
    return environment


def _listed(items: Sequence[str]) -> str:
    *first, last = items
    return f"{', '.join(first)} and {last}" if first else last
