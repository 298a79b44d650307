"""What the methods paragraph says, and that each citation has its reference."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest

from bids_varaug.derivatives import citation as citations
from bids_varaug.derivatives.citation import Citation, references


def cite(ensemble, members, versions=None, *, sloppy=False, space=None, refine=25):
    run = {"ensemble": ensemble, "members": members, "sloppy": sloppy}
    run["voxel_size"] = 2.0 if sloppy else 1.0
    run |= {"space": space, "refine": refine, "unreliable_from": 0.37}
    return citations.cite("participant", versions=versions or {}, **run)


def cite_full_group():
    """A group level with everything that it can do."""
    augmentations = ["none", "mean", "members", "analytic", "jitter", "shuffled"]
    return citations.cite(
        "group", settings={"model": "auto", "augmentations": augmentations},
        features="volumes of 31 structures [mm3]", has_numerics=True, has_reliability=True,
        compared_with=["FreeSurfer"],
    )  # fmt: skip


def test_every_cited_key_is_listed(ensemble, members):
    citation = cite(ensemble, members)
    assert {r.key for r in citation.references} == set(re.findall(r"@(\w+)", citation.methods))


def test_a_full_ensemble_and_a_full_group_cite_every_reference(ensemble, members):
    participant = {r.key for r in cite(ensemble, members).references}
    registered = {r.key for r in cite(ensemble, members, space="MNI152NLin2009cAsym").references}
    group = {r.key for r in cite_full_group().references}
    quality = citations.cite("quality", has_members=True, has_changes=True).references
    kinds = ["affine", "displacement", "labels", "scalar"]
    compared = {r.key for r in citations.cite("comparison", n=10, kinds=kinds).references}
    assert registered | group | {r.key for r in quality} | compared == set(references())
    assert len(participant) == 19
    assert registered - participant == {"arsigny2006", "ciric2022", "fonov2011", "hoffmann2024", "power2012"}


def test_registration_without_a_deformation_cites_none(ensemble, members):
    text = cite(ensemble, members, space="MNI152NLin2009cAsym", refine=0).methods
    assert "barycentres" in text and "velocity" not in text
    assert "MNI152" not in cite(ensemble, members).methods


def test_members_are_counted_by_family(ensemble, members):
    text = cite(ensemble, members).methods
    assert "2 trained under Monte Carlo arithmetic at 24 bits" in text
    assert "averaged over these 3 members" in text


def test_random_rounding_at_inference_is_told_with_its_source(ensemble, members):
    rounded = [SimpleNamespace(family="rr", precision=24)] * 10
    citation = cite(ensemble, [members[0], *rounded])
    assert (
        "10 made by running the unperturbed network under random rounding at 24 bits of precision "
        "[@gonzalezpepe2023; @parker1997]. The consensus" in citation.methods
    )
    assert "2308.01939" in citation.bibtex


def test_families_are_listed_with_commas(ensemble, members):
    text = cite(ensemble, [*members, SimpleNamespace(family="rr", precision=24)]).methods
    assert "], 1 trained from another random seed and 1 made by running" in text


def test_baseline_alone_claims_no_spread(ensemble, members):
    text = cite(ensemble, members[:1]).methods
    assert "disagree" not in text and "votes" not in text and "not known" in text
    assert "entropy of the posterior" in text


def test_one_perturbed_member_claims_no_spread(ensemble, members):
    text = cite(ensemble, members[:2]).methods
    assert "disagree" not in text and "votes" not in text


def test_uncertainty_mask_and_expected_dice_are_told(ensemble, members):
    text = cite(ensemble, members).methods
    assert "entropy of the members' mean posterior (bit), and what" in text
    assert "mutual information of label and member (bit) [@depeweg2018" in text
    assert "temperature of 0.9 [@guo2017]" in text and "probability of 37 % or more" in text
    assert "labels and posterior, without a calibration." in text
    calibrated = SimpleNamespace(**vars(ensemble) | {"quality": SimpleNamespace(heads=["a", "b"]), "temperature": 1.0})
    text = cite(calibrated, members).methods
    assert "structure and the agreement of the members as calibrated on 2 heads" in text and "temperature" not in text
    assert "of the structure as calibrated" in cite(calibrated, members[:3]).methods


def test_sloppy_runs_say_so(ensemble, members):
    text = cite(ensemble, members, sloppy=True).methods
    assert "--sloppy" in text and "1 mm" not in text


def test_versions_are_named(ensemble, members):
    assert "PyTorch 2.9" in cite(ensemble, members, {"torch": "2.9"}).methods


def test_training_of_members_is_what_the_manifest_says(ensemble, members):
    words = "trained apart, from the first of its 8000 steps"
    trained = SimpleNamespace(**vars(ensemble) | {"training": {"steps": 8000}})
    assert words in cite(trained, members).methods
    rounded = [replace(members[0], family="rr", id="rr01")] * 2
    assert words not in cite(trained, [members[0], *rounded]).methods


def test_bibtex_is_read_by_another_program_with_what_its_styles_need():
    database = pytest.importorskip("pybtex.database", reason="pybtex is not installed")
    works = references()
    read = database.parse_string("\n\n".join(work.bibtex for work in works.values()), "bibtex")
    assert list(read.entries) == list(works)
    needed = {
        "article": {"journal"}, "inproceedings": {"booktitle"}, "techreport": {"institution"}, "misc": {"howpublished"},
    }  # fmt: skip
    for key, entry in read.entries.items():
        assert needed[entry.type] | {"title", "year"} <= set(entry.fields), key
        assert entry.persons["author"], key
        assert re.fullmatch(r"\d{4}", entry.fields["year"]), key
        assert not re.search(r"\d", entry.fields.get("journal", "")), f"{key}: volume and pages have fields"


def test_report_of_an_institution_names_it():
    assert "institution = {University of California" in references()["parker1997"].bibtex
    assert references()["parker1997"].text.endswith("University of California, Los Angeles (CSD-970002).")


def test_works_link_to_doi_or_arxiv():
    known = references()
    assert known["billot2023"].url == "https://doi.org/10.1016/j.media.2023.102789"
    assert known["gonzalezpepe2025"].url == "https://arxiv.org/abs/2509.05238"
    assert known["parker1997"].url == "" and "href" not in known["parker1997"].html


class Links(HTMLParser):
    """Text and links of a page."""

    def __init__(self, page: str):
        super().__init__()
        self.text, self.links = "", []
        self.feed(str(page))

    def handle_starttag(self, tag, attributes):
        self.links += [value for name, value in attributes if name == "href"]

    def handle_data(self, data):
        self.text += data


def test_page_has_authors_and_links_in_place_of_keys():
    page = Links(Citation("Of 1 < 2 [@billot2023; @parker1997]; as @nadeau2003 and a@home say.").html)
    text = "Of 1 < 2 (Billot et al., 2023; Parker, 1997); as Nadeau and Bengio (2003) and a@home say."
    assert page.text == text
    assert page.links == [references()[key].url for key in ("billot2023", "nadeau2003")]


def test_latex_cites_by_natbib_and_escapes_the_rest():
    methods = "bids_varaug at 95 % with --sloppy [@billot2023; @parker1997] as @nadeau2003"
    expected = r"bids\_varaug at 95 \% with {-}{-}sloppy \citep{billot2023,parker1997} as \citet{nadeau2003}"
    assert Citation(methods).latex == expected


def test_files_hold_paragraph_references_and_bibtex(ensemble, members, tmp_path):
    citation = cite(ensemble, members)
    citation.write(tmp_path, "CITATION_x")
    md, html, tex, bib = ((tmp_path / f"CITATION_x.{end}").read_text("utf-8") for end in ("md", "html", "tex", "bib"))
    assert re.findall(r"^#+ .*", md, re.M) == ["# How to cite", "## Methods", "## References", "## BibTeX"]
    assert citation.methods in md and "<https://doi.org/" in md
    assert {work.url for work in citation.references} - {""} == set(Links(html).links)
    assert citation.latex in tex and r"\bibliography{CITATION_x}" in tex
    assert set(re.findall(r"^@\w+\{(\w+),", bib, re.M)) == {work.key for work in citation.references}


def test_works_behind_the_method_are_among_the_references():
    entries = " ".join(work.bibtex for work in references().values())
    assert all(n in entries for n in ("2509.05238", "2308.01939", "2605.25991", "2507.13458"))


def test_methods_of_the_group_level_cite_what_they_name():
    citation = cite_full_group()
    cited = set(re.findall(r"@(\w+)", citation.methods))
    assert {r.key for r in citation.references} == cited <= set(references())


def test_methods_leave_out_what_was_not_done():
    citation = citations.cite(
        "group", settings={"model": "ridge", "augmentations": ["none"]}, features="thickness",
        has_numerics=False, has_reliability=False, compared_with=[],
    )  # fmt: skip
    assert "augmentation" not in citation.methods and "the model ridge" in citation.methods
    assert "chatelain2026" not in {r.key for r in citation.references}
