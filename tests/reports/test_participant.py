"""The participant's report: complete, self-contained, escaped, reproducible."""

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from bids_varaug.derivatives.citation import references
from bids_varaug.reports import participant
from bids_varaug.reports.participant import (
    figure_name,
    shown_command,
    shown_settings,
    write_subject_report,
)
from bids_varaug.settings import Settings
from bids_varaug.variability.quality import describe_verdicts
from tests.reports.conftest import GREEN, RED

HOSTILE = "sub-01_<script>alert(1)</script>\"onload='x'&amp;"
VOID = {"meta", "img", "br", "link", "input", "hr", "source"}


class Page(HTMLParser):
    """Collects tags and text, and insists that every tag is closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture
def page(make_content):
    return Page(make_content().html())


def test_every_tag_is_closed(page):
    assert page.open == []


def test_nothing_is_loaded_from_outside(page):
    loaded = [a[k] for _, a in page.tags for k in ("src", "srcset", "data", "poster") if k in a]
    assert loaded and all(uri.startswith("data:image/webp;base64,") for uri in loaded)


def test_links_lead_into_the_page_or_to_a_cited_work(page):
    targets = {f"#{a['id']}" for _, a in page.tags if "id" in a}
    works = {work.url for work in references().values()} - {""}
    links = {a["href"] for _, a in page.tags if "href" in a}
    assert links <= targets | works and links & works


def test_no_style_or_script_names_an_address(make_content):
    parts = re.findall(r"<(style|script)>(.*?)</\1>", make_content().html(), re.S)
    assert [name for name, _ in parts] == ["style", "script"]
    assert not any(word in text for _, text in parts for word in ("http:", "https:", "url(", "@import"))


def test_ids_are_unique(page):
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))


def test_figures_are_embedded_with_alternative_text(page):
    images = page.all("img")
    shown = Image.open(io.BytesIO(base64.b64decode(images[0]["src"].partition(",")[2])))
    assert np.abs(np.asarray(shown).astype(int) - (255, 0, 0)).max() < 8  # lossy, a little
    assert len(images) == 2 and all(image["alt"] for image in images)


def test_page_of_many_scans_embeds_chief_figures_only(make_content):
    content = make_content(figures={"consensus": RED, "entropy": RED, "std": RED})
    for n, shown in ((3, 9), (4, 8)):
        page = Page(replace(content, scans=content.scans * n).html())
        assert len(page.all("img")) == shown
        assert ("sub-01/figures" in "".join(page.text)) == (n > 3)


def hostile_content(content, where):
    """The content with `HOSTILE` in one place."""
    request, scan = content.request, content.scans[0]
    scans = {
        "prefix": {"prefix": HOSTILE},
        "warnings": {"warnings": [HOSTILE]},
        "figures": {"figures": {HOSTILE: RED}},
        "regions": {"regions": scan.regions.assign(name=HOSTILE)},
        "columns": {"regions": scan.regions.rename(columns={"dice_min_mca": HOSTILE})},
        "members": {"members": scan.members.assign(member=HOSTILE, name=HOSTILE)},
        "provenance": {"provenance": {HOSTILE: HOSTILE}},
    }
    if where in scans:
        return content.with_scan(**scans[where])
    changed = {
        "subject": {"scan": replace(request.scan, entities={"subject": HOSTILE})},
        "settings": {"settings": replace(request.settings, ensemble=HOSTILE.replace("/", ""))},
        "ensemble": {"ensemble": SimpleNamespace(**{**vars(request.ensemble), "name": HOSTILE, "version": HOSTILE})},
        "family": {"members": (replace(request.members[1], id=HOSTILE, family=HOSTILE),)},
    }[where]
    return replace(content, request=replace(request, **changed))


@pytest.mark.parametrize(
    "where",
    ["prefix", "warnings", "figures", "regions", "columns", "members", "provenance",
     "subject", "settings", "ensemble", "family"],
)  # fmt: skip
def test_hostile_text_is_escaped(make_content, where):
    text = hostile_content(make_content(), where).html()
    page = Page(text)
    assert HOSTILE.partition("/")[0] in "".join(page.text)
    assert len(page.all("script")) == 1
    assert not any("onload" in attrs for _, attrs in page.tags)


def test_hostile_versions_are_escaped(make_content, monkeypatch):
    monkeypatch.setattr(participant, "package_versions", lambda: {HOSTILE: HOSTILE})
    assert HOSTILE in "".join(Page(make_content().html()).text)


@pytest.fixture
def write(make_content, monkeypatch):
    """Write a report."""
    content = make_content()
    monkeypatch.setattr(participant, "scan_report", lambda request, n_scans: content.scans[0])
    return lambda: write_subject_report([content.request])


def test_same_content_gives_the_same_bytes(write):
    first, second = (write().read_bytes() for _ in range(2))
    assert first == second


def test_figures_are_written_beside_the_report(write):
    path = write()
    figure = path.parent / "sub-01" / "figures" / "sub-01_run-1_desc-entropy_T1w.png"
    assert path.name == "sub-01.html" and figure.read_bytes() == GREEN


def test_figure_names_cannot_leave_their_folder():
    assert figure_name("../../x", "../y") == "x_desc-y_T1w.png"


def test_nothing_partial_is_left(write, tmp_path):
    write()
    assert not [p for p in tmp_path.rglob("*") if p.name.startswith(".")]


def test_headings_sort_the_tables(page, make_content):
    assert len(page.all("button")) == len(page.all("th")) > 12
    assert 'querySelectorAll("table.sortable")' in make_content().html()


def test_columns_have_tooltips(page):
    titles = [a["title"] for a in page.all("th") if "title" in a]
    assert all(titles) and "Coefficient of variation of the volume: volume_std / volume_mean" in titles
    assert "Smallest Dice coefficient over pairs of perturbed members, family mca only" in titles


def test_families_stand_side_by_side_with_their_number_of_members(make_content, members_table):
    content = make_content()
    one = members_table[members_table["member"] == "mca01"]
    more = pd.concat([members_table, *(one.assign(member=f"mca0{n}") for n in (3, 4, 5))])
    regions = content.scans[0].regions.assign(
        volume_mean_mca=[4019.0, 91.0], volume_mean_seed=[4021.0, 89.0], cv_mca=[0.002, 0.3], cv_seed=[0.004, 0.1],
        dice_min_seed=[0.97, 0.6], entropy_mean_mca=[0.1, 0.2], entropy_mean_seed=[0.3, 0.5],
    )  # fmt: skip
    text = content.with_scan(regions=regions, members=more).html()
    section = text.partition("Spread within each family")[2].partition("Volumes in each member")[0]
    summary, _, by_structure = section.partition("families side by side")
    rows = [re.findall(r"<td[^>]*>([^<]*)", row) for row in re.findall(r"<tr.*?</tr>", summary, re.S)]
    assert rows[1:3] == [
        ["mca", "5", "15.10", "30.00", "0.500", "0.150"],
        ["seed", "2", "5.20", "10.00", "0.600", "0.400"],
    ]
    headings = re.findall(r"<button[^>]*>([^<]*)", by_structure)
    assert headings == [
        "Structure", "Volume [mm³] mca", "Volume [mm³] seed", "CV [%] mca", "CV [%] seed", "Dice min mca",
        "Dice min seed", "Entropy [bit] mca", "Entropy [bit] seed",
    ]  # fmt: skip
    assert "Family seed has 2 members: below 5" in section and "Family mca" not in section


def test_tables_without_measures_of_families_have_no_such_section(make_content):
    content = make_content()
    regions = content.scans[0].regions.drop(columns="dice_min_mca")
    assert "Spread within each family" not in content.with_scan(regions=regions).html()


def test_settings_of_the_group_level_are_not_shown():
    shown = shown_settings(Settings(Path("/data"), Path("/out"), "participant", Path("/work")))
    assert "members" in shown and not {"age_column", "brainage_model", "cv_folds"} & set(shown)


def test_no_path_of_the_machine_is_shown(make_content):
    content = make_content()
    settings = replace(content.request.settings, ensemble="/home/me/own", bids_dir=Path("/home/me/data"))
    text = replace(content, request=replace(content.request, settings=settings)).html()
    assert "/home" not in text and "--ensemble own" in text


def test_command_makes_the_results_again(make_content):
    request = make_content().request
    settings = replace(
        request.settings, members=("mca", "ieee"), n_members=3, participant_labels=("01", "02"),
        skip_bids_validation=True, random_seed=7, freesurfer_dir=Path("/home/me/subjects"),
    )  # fmt: skip
    arguments = (
        "BIDS_DIR OUTPUT_DIR participant --participant-label 01 --members mca ieee --n-members 3"
    )
    assert shown_command(replace(request, settings=settings)) == f"bids_varaug {arguments}"


def test_run_id_depends_on_what_makes_the_results(make_content):
    def shown(**changed):
        content = make_content()
        request = replace(content.request, settings=replace(content.request.settings, **changed))
        return re.search(r"Run id</dt><dd>(\w{8}) ", replace(content, request=request).html())[1]

    assert shown(participant_labels=("01",), nprocs=8) == shown() == shown(random_seed=1) != shown(trust="qform")
    assert shown(perturb_inference=1) != shown(perturb_inference=1, random_seed=1)


def test_cells_carry_sort_keys_and_missing_values_none(page):
    keys = [a["data-key"] for a in page.all("td") if "data-key" in a]
    assert "4020.0" in keys and "" in keys and "nan" not in keys


def test_unreliable_rows_are_marked_by_class_sign_and_reason(page):
    # In the table of structures and in that of families.
    assert [a.get("class") for a in page.all("tr")].count("unreliable") == 2
    assert "✗ do not use" in page.text and "✓ use" in page.text
    assert "smallest Dice 0.40 (below 0.70)" in page.text


def test_verdicts_sort_by_how_bad_they_are(make_content):
    text = make_content().html()
    assert '<td data-key="0" class="text">✓ use' in text
    assert '<td data-key="3" class="text">✗ do not use' in text


def test_whom_the_limits_are_for_is_said(page):
    assert "women of 63 years" in "".join(page.text)


@pytest.mark.parametrize(
    ("verdicts", "color", "answer"),
    [(["good", "good"], "good", "2 structures to use."),
     (["good", "caution"], "caution", "1 structure to use, 1 with caution."),
     (["unknown", "unknown"], "unknown", "2 structures not judged."),
     (["caution", "unreliable"], "unreliable", "1 structure with caution, 1 not to use.")],
)  # fmt: skip
def test_answer_follows_the_verdicts(make_content, verdicts, color, answer):
    content = make_content(warnings=())
    text = content.with_scan(regions=content.scans[0].regions.assign(verdict=verdicts)).html()
    assert f'<div class="answer {color}">' in text and f'<p class="verdict">{answer}</p>' in text
    assert ("Nothing speaks against a structure." in text) == (color == "good")


def test_answer_names_structures_and_why_not_to_use_one(page):
    text = "".join(page.text).partition("Structures")[0]
    assert re.search(r"do not use\s*1\s*Hippocampus  R\s*– smallest Dice 0.40 \(below 0.70\)", text)
    assert re.search(r"✓ use\s*1\s*Hippocampus  L", text)


def test_places_to_look_at_first_are_listed(make_content):
    place = {"Structure": "Left-Hippocampus", "Index": 17, "World": [-25.0, -20.0, -12.5], "Reason": "a patch"}
    text = make_content().with_scan(look_first=[place]).html()
    link = '<a href="#scan-1-viewer" data-at="-25.0 -20.0 -12.5" data-index="17">Hippocampus  L</a>: a patch'
    assert link in text and "Look here first" in text and "Look here first" not in make_content().html()


def test_meaning_of_few_members_and_of_coarse_voxels_is_said(make_content):
    content = make_content()
    assert "with 2 members (mca, seed) up to 32 times" in content.html()
    assert "Coarse voxels" not in content.html()
    assert "voxels of 1.0 × 1.0 × 3.0 mm" in content.with_scan(coarse=(1.0, 1.0, 3.0)).html()


def test_what_is_said_of_every_structure_stands_in_the_answer_alone(make_content):
    content = make_content()
    few, cv = "perturbed members: 3 (fewer than 5)", "CV 7.0 % (above 5 %)"
    third = content.scans[0].regions.iloc[:1].assign(index=4, name="Left-Lateral-Ventricle")
    regions = pd.concat([content.scans[0].regions, third])
    regions = regions.assign(verdict="caution", reason=[few, f"{cv}; {few}", few])
    text = content.with_scan(regions=regions).html()
    assert text.count(few) == 1 and f'<span class="soft">All structures: {few}.</span>' in text
    assert re.search(r'Hippocampus  R <span class="soft">– CV 7.0 % \(above 5 %\)</span>', text)
    assert text.count(cv) == 3  # answer; text and sort key of the table


def test_more_members_are_advised_where_there_are_more(make_content):
    content = make_content()
    assert "Ensemble aseg31 has no more: judge" in content.html()
    request = replace(content.request, members=content.request.members[:2])
    assert "run more: ensemble aseg31 has 2 of mca and 1 of seed." in replace(content, request=request).html()


def test_warnings_that_the_answer_says_are_not_repeated(make_content):
    content = make_content()
    said = describe_verdicts(content.scans[0].regions)
    text = content.with_scan(warnings=[*said, "Look here."]).html()
    assert "1 warning about the image" in text and not any(sentence in text for sentence in said)


def test_columns_are_explained_in_the_page(page):
    meanings = "".join(page.text).partition("What the columns mean")[2]
    assert "Coefficient of variation of the volume: volume_std / volume_mean" in meanings


def test_sloppy_runs_have_a_banner(make_content):
    text = make_content(sloppy=True).html()
    assert 'class="banner"' in text


def test_full_runs_have_no_banner(make_content):
    assert 'class="banner"' not in make_content().html()


def test_warnings_are_listed(make_content):
    assert "Look here." in Page(make_content().html()).text


@pytest.mark.parametrize("word", ["ab" * 32, "mca02", "torch", "Run id", "SHA-256 of the weights"])
def test_run_and_ensemble_are_stated(page, word):
    assert word in page.text
