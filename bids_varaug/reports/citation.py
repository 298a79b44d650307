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
    n_grids: int = 1,
) -> Citation:
    """Paragraph for a methods section, with ``[@key]`` as pandoc reads it, and what it cites.

    Parameters
    ----------
    ensemble : for name, version and voxel size
    members : those that were used
    versions : package name to version; of bids_varaug, nipype, pybids, nibabel, torch
    sloppy : whether the run was made with ``--sloppy``; the grid's voxel size is then left out
    n_grids : on how many grids the baseline segmented
    """
    methods = _methods(ensemble, members, versions or {}, sloppy, n_grids)
    mentioned = sorted(
        (methods.index(f"@{key}"), key) for key in REFERENCES if f"@{key}" in methods
    )
    return Citation(methods, tuple(REFERENCES[key] for _, key in mentioned))


def _methods(
    ensemble: Ensemble,
    members: Sequence[Member],
    versions: Mapping[str, str],
    sloppy: bool,
    n_grids: int,
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
    if n_grids > 1:
        parts.append(
            f"One network segmented the image on {n_grids} grids, one voxel apart, and its "
            "posteriors were averaged; those of the others were moved by the difference that this "
            "made."
        )
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


GROUP_REFERENCES: dict[str, Reference] = {
    r.key: r
    for r in (
        Reference(
            "franke2010",
            "article",
            "Franke, Katja; Ziegler, Gabriel; Klöppel, Stefan; Gaser, Christian",
            "Estimating the age of healthy subjects from T1-weighted MRI scans using kernel "
            "methods: exploring the influence of various parameters",
            "NeuroImage 50(3), 883-892",
            2010,
            "doi:10.1016/j.neuroimage.2010.01.005",
        ),
        Reference(
            "bishop1995",
            "article",
            "Bishop, Chris M.",
            "Training with Noise is Equivalent to Tikhonov Regularization",
            "Neural Computation 7(1), 108-116",
            1995,
            "doi:10.1162/neco.1995.7.1.108",
        ),
        Reference(
            "barber2021",
            "article",
            "Barber, Rina Foygel; Candès, Emmanuel J.; Ramdas, Aaditya; Tibshirani, Ryan J.",
            "Predictive inference with the jackknife+",
            "The Annals of Statistics 49(1), 486-507",
            2021,
            "doi:10.1214/20-AOS1965",
        ),
        Reference(
            "delange2020",
            "article",
            "de Lange, Ann-Marie G.; Cole, James H.",
            "Commentary: Correction procedures in brain-age prediction",
            "NeuroImage: Clinical 26, 102229",
            2020,
            "doi:10.1016/j.nicl.2020.102229",
        ),
        Reference(
            "chatelain2026",
            "article",
            "Chatelain, Yohan; Sokołowski, Andrzej; Sharp, Madeleine; Poline, Jean-Baptiste; "
            "Glatard, Tristan",
            "The practical impact of numerical variability on structural MRI measures of "
            "Parkinson's disease",
            "Scientific Reports",
            2026,
            "doi:10.1038/s41598-026-64679-2",
        ),
        Reference(
            "shrout1979",
            "article",
            "Shrout, Patrick E.; Fleiss, Joseph L.",
            "Intraclass correlations: uses in assessing rater reliability",
            "Psychological Bulletin 86(2), 420-428",
            1979,
            "doi:10.1037/0033-2909.86.2.420",
        ),
        Reference(
            "wilcoxon1945",
            "article",
            "Wilcoxon, Frank",
            "Individual comparisons by ranking methods",
            "Biometrics Bulletin 1(6), 80-83",
            1945,
            "doi:10.2307/3001968",
        ),
        Reference(
            "pedregosa2011",
            "article",
            "Pedregosa, Fabian; Varoquaux, Gaël; Gramfort, Alexandre; Michel, Vincent; "
            "Thirion, Bertrand; Grisel, Olivier; others",
            "Scikit-learn: Machine Learning in Python",
            "Journal of Machine Learning Research 12, 2825-2830",
            2011,
            "",
        ),
    )
}
"""Works that only the group level cites."""

_AUGMENTATION_TEXTS = {
    "mean": "the mean of the members in place of the baseline (mean)",
    "members": "one training row per member, each participant of equal weight (members)",
    "analytic": "the limit of many members, a ridge penalty with the sum of their covariances "
    "(analytic) [@bishop1995]",
    "jitter": "Gaussian noise of the same total variance, independent over features (jitter, a "
    "control)",
    "shuffled": "the members' deviations of another participant (shuffled, a control)",
}


def cite_group(
    settings: Mapping[str, object],
    features: str,
    versions: Mapping[str, str] | None = None,
    *,
    has_numerics: bool = False,
    has_reliability: bool = False,
    compared_with: Sequence[str] = (),
) -> Citation:
    """Paragraph of methods for the group level, and what it cites.

    Parameters
    ----------
    settings : of a `brainage.study.Study`
    features : what the features are, e.g. "volumes of 31 structures [mm3]"
    versions : package name to version; of bids_varaug and scikit-learn
    has_numerics : whether numerical and anatomical variability are reported
    has_reliability : whether intraclass correlations are
    compared_with : names of other pipelines
    """
    versions = versions or {}
    model, seed = settings.get("model", "auto"), settings.get("seed", 0)
    chosen = "a model chosen in inner folds" if model == "auto" else f"the model {model}"
    repeats = settings.get("repeats", 1)
    times = "" if repeats == 1 else f", repeated {repeats} times"
    parts = [
        f"Age was predicted [@franke2010] from {features} with "
        f"bids_varaug{_version(versions, 'bids_varaug')} and scikit-learn"
        f"{_version(versions, 'scikit-learn')} [@pedregosa2011] by {chosen}, on age or its "
        f"logarithm. Scores are of {settings.get('cv_folds', 5)}-fold cross-validation{times} "
        f"(seed {seed}), all images of a participant in one fold; scaling, model choice, "
        "hyperparameters and the correction of age bias [@delange2020] were fitted within the "
        "training folds. Errors are given uncorrected unless stated otherwise.",
        f"Prediction intervals (nominal coverage {100 * settings.get('coverage', 0.9):.0f} %) are "
        "cross-conformal, CV+ [@barber2021], their coverage was measured.",
    ]
    kinds = [
        text
        for name, text in _AUGMENTATION_TEXTS.items()
        if name in settings.get("augmentations", ())
    ]
    if kinds:
        parts.append(
            f"Numerical variability served as data augmentation [@gonzalezpepe2025]: "
            f"{_listed(kinds)}. Each was compared with the unperturbed baseline on the same "
            "folds by paired differences of absolute errors, with 95 % bootstrap intervals and "
            "two-sided sign-flip permutation tests over participants, not corrected for the number "
            "of augmentations."
        )
    if has_numerics:
        parts.append(
            "Numerical variability is the standard deviation over members, pooled over "
            "images; its ratio to the standard deviation between participants follows "
            "[@chatelain2026], with the numerical part taken off the latter and studentised "
            "bootstrap intervals over participants."
        )
    if compared_with:
        parts.append(
            f"It was compared with that of {_listed(list(compared_with))} by Wilcoxon's "
            "signed-rank test [@wilcoxon1945] on log ratios over structures."
        )
    if has_reliability:
        parts.append("Reliability is ICC(3,1) [@shrout1979] over images of the same person.")
    methods = " ".join(parts)
    works = REFERENCES | GROUP_REFERENCES
    mentioned = sorted((methods.index(f"@{key}"), key) for key in works if f"@{key}" in methods)
    return Citation(methods, tuple(works[key] for _, key in mentioned))
