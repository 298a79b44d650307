"""How to cite: a paragraph of methods, references and BibTeX, made from what the run really did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the package imports torch
    from bids_varaug.models.ensemble import Ensemble, Member

BASELINE = "ieee"
VENUE_FIELDS = {
    "article": "journal",
    "inproceedings": "booktitle",
    "techreport": "institution",
    "misc": "howpublished",
}
"""BibTeX's name of the place of publication, by kind of work."""


@dataclass(frozen=True)
class Reference:
    """One work: BibTeX key and kind, and its fields in order of appearance."""

    key: str
    kind: str
    authors: str
    title: str
    venue: str
    year: int
    link: str  # "doi:..." or "arXiv:..."

    def text(self) -> str:
        """One line for a list of references."""
        link = f" {self.link}." if self.link else ""
        authors = self.authors.replace("; others", "; et al.")
        return f"{authors} ({self.year}). {self.title}. {self.venue}.{link}"

    def bibtex(self) -> str:
        """One BibTeX entry."""
        fields = {"author": self.authors.replace("; ", " and "), "title": f"{{{self.title}}}"}
        fields[VENUE_FIELDS[self.kind]] = self.venue
        fields["year"] = str(self.year)
        scheme, _, value = self.link.partition(":")
        if scheme == "doi":
            fields["doi"] = value
        elif scheme == "arXiv":
            fields |= {"eprint": value, "archiveprefix": "arXiv"}
        body = ",\n".join(f"  {name} = {{{value}}}" for name, value in fields.items())
        return f"@{self.kind}{{{self.key},\n{body}\n}}"


REFERENCES: dict[str, Reference] = {
    r.key: r
    for r in (
        Reference(
            "gonzalezpepe2025",
            "misc",
            "Gonzalez-Pepe, Inés; Sivakolunthu, Vinuyan; Chatelain, Yohan; Glatard, Tristan",
            "Uncertain but Useful: Leveraging CNN Variability into Data Augmentation",
            "arXiv preprint",
            2025,
            "arXiv:2509.05238",
        ),
        Reference(
            "gonzalezpepe2023",
            "inproceedings",
            "Gonzalez Pepe, Inés; Sivakolunthu, Vinuyan; Park, Hae Lang; Chatelain, Yohan; "
            "Glatard, Tristan",
            "Numerical Uncertainty of Convolutional Neural Networks Inference for Structural Brain "
            "MRI Analysis",
            "Uncertainty for Safe Utilization of Machine Learning in Medical Imaging (UNSURE "
            "2023), LNCS 14291, 64-73 (arXiv:2308.01939)",
            2023,
            "doi:10.1007/978-3-031-44336-7_7",
        ),
        Reference(
            "gonzalezpepe2026",
            "article",
            "Gonzalez-Pepe, Inés; Akhaddar, Hiba; Glatard, Tristan; Chatelain, Yohan",
            "Fuzzy PyTorch: Rapid Numerical Variability Evaluation for Deep Learning Models",
            "Transactions on Machine Learning Research",
            2026,
            "arXiv:2605.25991",
        ),
        Reference(
            "parker1997",
            "techreport",
            "Parker, Douglas Stott",
            "Monte Carlo Arithmetic: exploiting randomness in floating-point arithmetic",
            "Technical report CSD-970002, University of California, Los Angeles",
            1997,
            "",
        ),
        Reference(
            "hoffmann2025",
            "article",
            "Hoffmann, Malte",
            "Domain-randomized deep learning for neuroimage analysis",
            "IEEE Signal Processing Magazine 42(4), 78-90 (arXiv:2507.13458)",
            2025,
            "doi:10.1109/MSP.2025.3590806",
        ),
        Reference(
            "billot2023",
            "article",
            "Billot, Benjamin; Greve, Douglas N.; Puonti, Oula; Thielscher, Axel; "
            "Van Leemput, Koen; Fischl, Bruce; Dalca, Adrian V.; Iglesias, Juan Eugenio",
            "SynthSeg: Segmentation of brain MRI scans of any contrast and resolution without "
            "retraining",
            "Medical Image Analysis 86, 102789",
            2023,
            "doi:10.1016/j.media.2023.102789",
        ),
        Reference(
            "fischl2002",
            "article",
            "Fischl, Bruce; Salat, David H.; Busa, Evelina; Albert, Marilyn; Dieterich, Megan; "
            "Haselgrove, Christian; others",
            "Whole brain segmentation: automated labeling of neuroanatomical structures in the "
            "human brain",
            "Neuron 33(3), 341-355",
            2002,
            "doi:10.1016/S0896-6273(02)00569-X",
        ),
        Reference(
            "sohier2021",
            "article",
            "Sohier, Devan; De Oliveira Castro, Pablo; Févotte, François; Lathuilière, Bruno; "
            "Petit, Eric; Jamond, Olivier",
            "Confidence Intervals for Stochastic Arithmetic",
            "ACM Transactions on Mathematical Software 47(2), 1-33",
            2021,
            "doi:10.1145/3432184",
        ),
        Reference(
            "gorgolewski2011",
            "article",
            "Gorgolewski, Krzysztof; Burns, Christopher D.; Madison, Cindee; Clark, Dav; "
            "Halchenko, Yaroslav O.; Waskom, Michael L.; Ghosh, Satrajit S.",
            "Nipype: a flexible, lightweight and extensible neuroimaging data processing framework "
            "in Python",
            "Frontiers in Neuroinformatics 5, 13",
            2011,
            "doi:10.3389/fninf.2011.00013",
        ),
        Reference(
            "brett_nibabel",
            "misc",
            "Brett, Matthew; Markiewicz, Christopher J.; Hanke, Michael; others",
            "nipy/nibabel",
            "Zenodo",
            2024,
            "doi:10.5281/zenodo.591597",
        ),
        Reference(
            "yarkoni2019",
            "article",
            "Yarkoni, Tal; Markiewicz, Christopher J.; de la Vega, Alejandro; "
            "Gorgolewski, Krzysztof J.; Salo, Taylor; Halchenko, Yaroslav O.; others",
            "PyBIDS: Python tools for BIDS datasets",
            "Journal of Open Source Software 4(40), 1294",
            2019,
            "doi:10.21105/joss.01294",
        ),
        Reference(
            "gorgolewski2016",
            "article",
            "Gorgolewski, Krzysztof J.; Auer, Tibor; Calhoun, Vince D.; Craddock, R. Cameron; "
            "Das, Samir; Duff, Eugene P.; others",
            "The brain imaging data structure, a format for organizing and describing outputs of "
            "neuroimaging experiments",
            "Scientific Data 3, 160044",
            2016,
            "doi:10.1038/sdata.2016.44",
        ),
        Reference(
            "paszke2019",
            "inproceedings",
            "Paszke, Adam; Gross, Sam; Massa, Francisco; Lerer, Adam; Bradbury, James; "
            "Chanan, Gregory; others",
            "PyTorch: An Imperative Style, High-Performance Deep Learning Library",
            "Advances in Neural Information Processing Systems 32",
            2019,
            "",
        ),
    )
}


@dataclass(frozen=True)
class Citation:
    """The paragraph of methods, and the works it names in order of first mention."""

    methods: str
    references: tuple[Reference, ...]

    def bibtex(self) -> str:
        """All entries, alphabetically as a reference manager would keep them."""
        return "\n\n".join(r.bibtex() for r in sorted(self.references, key=lambda r: r.key)) + "\n"

    def markdown(self) -> str:
        """Content of CITATION.md: paragraph, references, BibTeX."""
        references = "\n".join(f"- `{r.key}`: {r.text()}" for r in self.references)
        return (
            f"# How to cite\n\n## Methods\n\n{self.methods}\n\n## References\n\n{references}\n\n"
            f"## BibTeX\n\n```bibtex\n{self.bibtex()}```\n"
        )


def cite(
    ensemble: Ensemble,
    members: Sequence[Member],
    versions: Mapping[str, str] | None = None,
    *,
    sloppy: bool = False,
) -> Citation:
    """Paragraph for a methods section, with ``[@key]`` as pandoc reads it, and what it cites.

    Parameters
    ----------
    ensemble : for name, version and voxel size
    members : those that were used
    versions : package name to version; of bids_varaug, nipype, pybids, nibabel, torch
    sloppy : whether the run was made with ``--sloppy``; the grid's voxel size is then left out
    """
    methods = _methods(ensemble, members, versions or {}, sloppy)
    mentioned = sorted(
        (methods.index(f"@{key}"), key) for key in REFERENCES if f"@{key}" in methods
    )
    return Citation(methods, tuple(REFERENCES[key] for _, key in mentioned))


def _methods(
    ensemble: Ensemble, members: Sequence[Member], versions: Mapping[str, str], sloppy: bool
) -> str:
    grid = " to a coarse grid" if sloppy else f" to {ensemble.voxel_size:g} mm isotropic voxels"
    parts = [
        "T1-weighted images, organised in BIDS [@gorgolewski2016], were segmented with "
        f"bids_varaug{_version(versions, 'bids_varaug')} and its ensemble {ensemble.name} "
        f"(version {ensemble.version}). Each image was resampled{grid} and segmented into "
        "structures of the FreeSurfer atlas [@fischl2002] by 3D convolutional networks of one "
        "architecture, trained on synthetic images drawn from label maps (domain randomisation) "
        "[@billot2023; @hoffmann2025].",
        _describe_members(members),
    ]
    if sloppy:
        parts.append(
            "The run was made with --sloppy (coarse grid, few members), which is meant for tests "
            "only."
        )
    tools = [
        f"Nipype{_version(versions, 'nipype')} [@gorgolewski2011]",
        f"PyBIDS{_version(versions, 'pybids')} [@yarkoni2019]",
        f"NiBabel{_version(versions, 'nibabel')} [@brett_nibabel]",
        f"PyTorch{_version(versions, 'torch')} [@paszke2019]",
    ]
    parts.append(f"The workflow uses {_listed(tools)}.")
    return " ".join(parts)


def _listed(items: Sequence[str]) -> str:
    *first, last = items
    return f"{', '.join(first)} and {last}" if first else last


def _version(versions: Mapping[str, str], package: str) -> str:
    return f" {versions[package]}" if package in versions else ""


def _describe_members(members: Sequence[Member]) -> str:
    """What was perturbed, what the consensus is of; nothing about spread where there is none."""
    perturbed = [m for m in members if m.family != BASELINE]
    if not perturbed:
        return "A single, unperturbed network was used; its spread is therefore not known."
    kinds = {
        "mca": "trained under Monte Carlo arithmetic",
        "seed": "trained from another random seed",
        "rr": "made by running the unperturbed network under random rounding",
    }
    sources = {
        "mca": " [@parker1997; @gonzalezpepe2026]",
        "rr": " [@gonzalezpepe2023; @parker1997]",
    }
    counts = []
    for family in dict.fromkeys(m.family for m in perturbed):
        group = [m for m in perturbed if m.family == family]
        bits = sorted({m.precision for m in group if m.precision is not None})
        at = f" at {', '.join(str(b) for b in bits)} bits of precision" if bits else ""
        kind = kinds.get(family, f"of family {family}")
        counts.append(f"{len(group)} {kind}{at}{sources.get(family, '')}")
    total = len(perturbed)
    text = (
        f"The members differ by floating-point perturbation or random seed only "
        f"[@gonzalezpepe2025]: {_listed(counts)}. "
    )
    if total == 1:
        return text + "The labels are those of this one member; its spread is not known."
    text += (
        f"The consensus is the label of highest posterior averaged over these {total} members. "
        "Their disagreement is reported as the Shannon entropy of their votes (bit), the "
        "significant bits [@parker1997; @gonzalezpepe2023] and the standard deviation of the "
        "consensus label's posterior, the variability and significant bits [@sohier2021] of "
        "volumes, and the Dice coefficient between pairs of members."
    )
    if len(members) > total:
        text += " An unperturbed network serves as baseline and is not part of the consensus."
    return text
