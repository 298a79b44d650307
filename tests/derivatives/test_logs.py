"""What the logs folder holds."""

import importlib.metadata
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from bids_varaug.derivatives.citation import write_logs
from bids_varaug.derivatives.names import Run
from bids_varaug.settings import Settings

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ENSEMBLE = SimpleNamespace(name="aseg31", version="1", voxel_size=1.0, training={}, temperature=1.0, quality=None)
MEMBERS = [
    SimpleNamespace(id="ieee", family="ieee", precision=None, sha256="a" * 64),
    SimpleNamespace(id="mca.01", family="mca", precision=24, sha256="b" * 64),
]


@pytest.fixture
def settings(tmp_path):
    return Settings(
        bids_dir=Path("/data"), output_dir=tmp_path, level="participant", work_dir=Path("/work")
    )


def written(settings):
    """Settings as they stand in the folder of logs."""
    write_logs(Run(settings, ENSEMBLE, MEMBERS))
    (path,) = (settings.output_dir / "logs").glob("settings-*.toml")
    return tomllib.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ['a"b', "a\\b", "a\nb", "a\x7fb", "µ ü"])
def test_settings_are_toml_whatever_the_folders_are_called(settings, name):
    settings = replace(settings, bids_dir=Path("/data") / name, bids_filters={"t1w": {name: [1]}})
    values = written(settings)
    assert values["settings"]["bids_dir"] == f"/data/{name}"
    assert values["settings"]["bids_filters"] == {"t1w": {name: [1]}}


def test_checksums_stand_under_the_members_ids(settings):
    values = written(settings)
    assert values["ensemble"]["sha256"] == {"ieee": "a" * 64, "mca.01": "b" * 64}


def test_citation_names_the_versions_that_ran(settings, tmp_path):
    write_logs(Run(settings, ENSEMBLE, MEMBERS))
    text = (tmp_path / "logs" / "CITATION.md").read_text(encoding="utf-8")
    assert f"Nipype {importlib.metadata.version('nipype')} " in text


def test_equal_requests_share_one_file(settings, tmp_path):
    write_logs(Run(settings, ENSEMBLE, MEMBERS))
    write_logs(Run(settings, ENSEMBLE, MEMBERS))
    write_logs(Run(replace(settings, sloppy=True), ENSEMBLE, MEMBERS))
    assert len(list((tmp_path / "logs").glob("settings-*.toml"))) == 2
