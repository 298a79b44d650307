"""Names of folders, labels, sites and columns that are HTML, or formulas to matplotlib."""

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np

from bids_varaug.cli.run import main
from tests.faults.conftest import App

HOSTILE = "x\"'><img src=x onerror=alert(1)><script>alert(2)</script>{{ 7 * 7 }}$\\frac{^"


class Elements(HTMLParser):
    """Tags and attributes of a page, and the text of its scripts."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.attributes, self.scripts, self.runs = [], [], [], False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        # A browser does not run these: volumes and program of the viewer, packed.
        self.runs = tag == "script" and dict(attrs).get("type") not in ("application/json", "text/plain")
        if self.runs:
            self.scripts.append("")

    def handle_data(self, data):
        if self.runs:
            self.scripts[-1] += data

    def handle_endtag(self, tag):
        self.runs = False


def assert_harmless(path: Path) -> None:
    page = path.read_text()
    elements = Elements(page)
    assert not [name for name, _ in elements.attributes if name.startswith("on")]
    assert len(elements.scripts) == 1
    assert "alert" not in "".join(elements.scripts)
    sources = [value for name, value in elements.attributes if name in ("src", "href")]
    assert all(value.startswith(("data:", "https://", "#")) for value in sources)
    assert "onerror" in page, "nothing hostile was shown, so nothing was tested"
    assert "49$" not in page


def test_participant_report_shows_hostile_names_as_text(app, tmp_path):
    ensemble = tmp_path / "ensemble"
    shutil.copytree(app.ensemble, ensemble)
    manifest = json.loads((ensemble / "manifest.json").read_text())
    manifest["name"] = HOSTILE
    for label in manifest["labels"][1:]:
        label["name"] += HOSTILE
    (ensemble / "manifest.json").write_text(json.dumps(manifest))
    bids_dir = tmp_path / "<img src=x onerror=alert(1)>"
    shutil.copytree(app.bids_dir, bids_dir)
    out = tmp_path / "out"
    code, log = App(bids_dir, ensemble, app.linear).run(out)
    assert code == 0, log
    assert_harmless(out / "sub-01.html")


def test_group_report_shows_hostile_names_as_text(tmp_path):
    bids_dir = tmp_path / "<img src=x onerror=alert(1)>"
    bids_dir.mkdir()
    (bids_dir / "dataset_description.json").write_text('{"Name": "x", "BIDSVersion": "1.10.0"}')
    rng = np.random.default_rng(1)
    rows = ["\t".join(["participant_id", "member", "age", "site", "volume", HOSTILE])]
    for person, age in enumerate(np.linspace(20, 80, 24)):
        for member in ("ieee", "mca01", "mca02"):
            values = age * 10 + rng.normal(0, 90, 2)
            rows.append(f"sub-{person:02d}\t{member}\t{age:.1f}\t{HOSTILE[:35]}{person % 2}\t"
                        f"{values[0]:.2f}\t{values[1]:.2f}")  # fmt: skip
    table = tmp_path / "table.tsv"
    table.write_text("\n".join(rows) + "\n")
    arguments = [str(bids_dir), str(tmp_path / "out"), "group", "-w", str(tmp_path / "work"),
                 "--features-table", str(table), "--brainage-model", "ridge"]  # fmt: skip
    assert main(arguments) == 0
    assert_harmless(tmp_path / "out" / "group_brainage.html")
