"""What the methods paragraph says, and that each citation has its reference."""

import re
from types import SimpleNamespace

from bids_varaug.derivatives import citation as citations
from bids_varaug.derivatives.citation import references


def cite(ensemble, members, versions=None, *, sloppy=False):
    run = {"ensemble": ensemble, "members": members, "sloppy": sloppy}
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
    group = {r.key for r in cite_full_group().references}
    quality = citations.cite("quality", has_members=True, has_changes=True).references
    assert participant | group | {r.key for r in quality} == set(references())
    assert len(participant) == 13


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
    assert "2308.01939" in citation.markdown()


def test_families_are_listed_with_commas(ensemble, members):
    text = cite(ensemble, [*members, SimpleNamespace(family="rr", precision=24)]).methods
    assert "], 1 trained from another random seed and 1 made by running" in text


def test_baseline_alone_claims_no_spread(ensemble, members):
    text = cite(ensemble, members[:1]).methods
    assert "entropy" not in text and "not known" in text


def test_one_perturbed_member_claims_no_spread(ensemble, members):
    assert "entropy" not in cite(ensemble, members[:2]).methods


def test_sloppy_runs_say_so(ensemble, members):
    text = cite(ensemble, members, sloppy=True).methods
    assert "--sloppy" in text and "1 mm" not in text


def test_versions_are_named(ensemble, members):
    assert "PyTorch 2.9" in cite(ensemble, members, {"torch": "2.9"}).methods


def test_bibtex_braces_balance(ensemble, members):
    citation = cite(ensemble, members)
    text = citation.bibtex
    assert text.count("{") == text.count("}") and text.count("@") == len(citation.references)


def test_report_of_an_institution_names_it_in_bibtex():
    assert "institution = {Technical report CSD-970002" in references()["parker1997"].bibtex


def test_markdown_holds_paragraph_references_and_bibtex(ensemble, members):
    text = cite(ensemble, members).markdown()
    assert re.findall(r"^#+ .*", text, re.M) == [
        "# How to cite",
        "## Methods",
        "## References",
        "## BibTeX",
    ]


def test_works_behind_the_method_are_among_the_references():
    lines = " ".join(r.text for r in references().values())
    assert all(n in lines for n in ("2509.05238", "2308.01939", "2605.25991", "2507.13458"))


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
