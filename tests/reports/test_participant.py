"""The participant's report: complete, self-contained, escaped, reproducible."""

import base64
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from bids_varaug.reports import participant
from bids_varaug.reports.participant import figure_name, shown_settings, write_subject_report
from bids_varaug.settings import Settings

HOSTILE = "sub-01_<script>alert(1)</script>\"onload='x'&amp;"
VOID = {"meta", "img", "br", "link", "input", "hr"}


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
    assert all(uri.startswith("data:image/png;base64,") for uri in loaded)


def test_links_stay_inside_the_page(page):
    targets = {a["id"] for _, a in page.tags if "id" in a}
    assert {a["href"].removeprefix("#") for _, a in page.tags if "href" in a} <= targets


def test_no_style_or_script_names_an_address(make_content):
    text = make_content().html()
    assert not any(word in text for word in ("http:", "https:", "url(", "@import"))


def test_ids_are_unique(page):
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))


def test_figures_are_embedded_with_alternative_text(page):
    images = page.all("img")
    assert base64.b64decode(images[0]["src"].partition(",")[2]) == b"\x89PNG one"
    assert all(image["alt"] for image in images)


def hostile_content(content, where):
    """The content with `HOSTILE` in one place."""
    request, scan = content.request, content.scans[0]
    scans = {
        "prefix": {"prefix": HOSTILE},
        "warnings": {"warnings": [HOSTILE]},
        "figures": {"figures": {HOSTILE: b"png"}},
        "regions": {"regions": scan.regions.assign(name=HOSTILE)},
        "columns": {"regions": scan.regions.rename(columns={"dice_min_mca": HOSTILE})},
        "members": {"members": scan.members.assign(member=HOSTILE, name=HOSTILE)},
        "provenance": {"provenance": {HOSTILE: HOSTILE}},
    }
    if where in scans:
        return content.with_scan(**scans[where])
    changed = {
        "subject": {"scan": replace(request.scan, entities={"subject": HOSTILE})},
        "settings": {"settings": replace(request.settings, bids_dir=HOSTILE)},
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
    assert HOSTILE in "".join(page.text)
    assert len(page.all("script")) == 1
    assert not any("onload" in attrs for _, attrs in page.tags)


def test_hostile_versions_are_escaped(make_content, monkeypatch):
    monkeypatch.setattr(participant, "package_versions", lambda: {HOSTILE: HOSTILE})
    assert HOSTILE in "".join(Page(make_content().html()).text)


@pytest.fixture
def write(make_content, monkeypatch):
    """Write a report."""
    content = make_content()
    monkeypatch.setattr(participant, "scan_report", lambda request: content.scans[0])
    return lambda: write_subject_report([content.request])


def test_same_content_gives_the_same_bytes(write):
    first, second = (write().read_bytes() for _ in range(2))
    assert first == second


def test_figures_are_written_beside_the_report(write):
    path = write()
    figure = path.parent / "sub-01" / "figures" / "sub-01_run-1_desc-entropy_T1w.png"
    assert path.name == "sub-01.html" and figure.read_bytes() == b"\x89PNG two"


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


def test_cells_carry_sort_keys_and_missing_values_none(page):
    keys = [a["data-key"] for a in page.all("td") if "data-key" in a]
    assert "4020.0" in keys and "" in keys and "nan" not in keys


def test_unreliable_rows_are_marked_by_class_sign_and_reason(page):
    # In the table of structures and in that of families.
    assert [a.get("class") for a in page.all("tr")].count("unreliable") == 2
    assert "✗ unreliable" in page.text and "✓ good" in page.text
    assert "smallest Dice 0.40 (below 0.70)" in page.text


def test_verdicts_sort_by_how_bad_they_are(make_content):
    text = make_content().html()
    assert '<td data-key="0" class="text">✓ good' in text
    assert '<td data-key="3" class="text">✗ unreliable' in text


def test_whom_the_limits_are_for_is_said(page):
    assert "women of 63 years" in "".join(page.text)


def test_box_of_warnings_says_whether_a_structure_is_unreliable(make_content):
    content = make_content()
    assert 'class="warnings unreliable"' in content.html()
    regions = content.scans[0].regions.assign(verdict="caution")
    assert 'class="warnings"' in content.with_scan(regions=regions).html()


def test_sloppy_runs_have_a_banner(make_content):
    text = make_content(sloppy=True).html()
    assert 'class="banner"' in text


def test_full_runs_have_no_banner(make_content):
    assert 'class="banner"' not in make_content().html()


def test_warnings_are_listed(make_content):
    assert "Look here." in Page(make_content().html()).text


def test_absence_of_warnings_is_said(make_content):
    assert "No warnings" in make_content(warnings=()).html()


@pytest.mark.parametrize("word", ["ab" * 32, "mca02", "torch", "/data", "SHA-256 of the weights"])
def test_run_and_ensemble_are_stated(page, word):
    assert word in page.text
