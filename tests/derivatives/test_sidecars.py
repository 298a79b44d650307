import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from bids_varaug import __version__
from bids_varaug.derivatives import names, sidecars
from bids_varaug.derivatives.names import Run
from bids_varaug.models.ensemble import Label, load_ensemble
from bids_varaug.settings import Settings
from tests.derivatives.conftest import request_of

MEMBERS = [
    SimpleNamespace(id="ieee", family="ieee", seed=1, precision=None, sha256="a" * 64),
    SimpleNamespace(id="mca01", family="mca", seed=1, precision=24, sha256="b" * 64),
]


@pytest.fixture
def bids_dir(tmp_path):
    folder = tmp_path / "ds"
    folder.mkdir()
    description = {"Name": "Heads", "BIDSVersion": "1.8.0", "License": "CC0"}
    (folder / "dataset_description.json").write_text(json.dumps(description))
    return folder


@pytest.mark.parametrize("key", [k for k, o in names.OUTPUTS.items() if o.extension != ".tsv"])
def test_images_say_which_t1w_they_lie_on(request_, key):
    content = sidecars.sidecar(request_, key)
    uri = "bids:raw:sub-01/ses-a/anat/sub-01_ses-a_acq-x_run-02_T1w.nii.gz"
    assert content["SpatialReference"] == uri
    assert content["Sources"] == [uri]


@pytest.mark.parametrize("key", ["entropy", "sigbits", "std"])
def test_maps_state_unit_and_skull(request_, key):
    content = sidecars.sidecar(request_, key, skull_stripped=True)
    assert content["Units"] == names.OUTPUTS[key].units
    assert content["SkullStripped"] is True


def test_probseg_names_its_volumes(request_):
    assert sidecars.sidecar(request_, "mean_probseg")["LabelMap"] == ["Background", "Left-Hippocampus"]


@pytest.mark.parametrize(
    ("key", "member", "expected"),
    [
        ("consensus_dseg", None, ["mca01", "mca02", "seed01"]),
        ("members_tsv", None, ["ieee", "mca01", "mca02", "seed01"]),
        ("ieee_dseg", None, ["ieee"]),
        ("member_dseg", "mca02", ["mca02"]),
    ],
)
def test_members_behind_an_output_are_listed(request_, key, member, expected):
    assert sidecars.sidecar(request_, key, member)["Members"] == expected


def test_consensus_sidecar_explains_the_columns_of_its_table(request_):
    content = sidecars.sidecar(request_, "consensus_dseg")
    assert content["volume_mean"]["Units"] == "mm^3"


def test_sloppy_results_say_so(scan):
    assert "--sloppy" in sidecars.sidecar(request_of(scan, sloppy=True), "entropy")["Warning"]


def test_thresholds_are_added(request_):
    assert sidecars.sidecar(request_, "unreliable_mask", extra={"Threshold": 0.5})["Threshold"] == 0.5


def test_description_names_tool_source_and_licence(bids_dir, tmp_path):
    content = sidecars.dataset_description(bids_dir, tmp_path / "out")
    assert content["GeneratedBy"] == [
        {"Name": "bids_varaug", "Version": __version__}
    ]
    assert content["DatasetLinks"] == {"raw": "../ds"}
    assert content["License"] == "CC0"
    assert content["Name"].endswith("Heads")


def test_description_survives_an_input_without_one(tmp_path):
    content = sidecars.dataset_description(tmp_path / "none", tmp_path / "out")
    assert content["Name"].endswith("none")


@pytest.mark.parametrize("doi", ["10.18112/x", "doi:10.18112/x", "https://doi.org/10.18112/x"])
def test_source_doi_becomes_an_address(bids_dir, tmp_path, doi):
    (bids_dir / "dataset_description.json").write_text(json.dumps({"DatasetDOI": doi}))
    content = sidecars.dataset_description(bids_dir, tmp_path / "out")
    assert content["SourceDatasets"] == [{"URL": "https://doi.org/10.18112/x", "DOI": "10.18112/x"}]


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        ({"BIDS_VARAUG_DOCKER_TAG": "a:1"}, {"Type": "docker", "Tag": "a:1"}),
        ({"APPTAINER_CONTAINER": "/x/a.sif"}, {"Type": "apptainer", "Tag": "a.sif"}),
    ],
)
def test_container_is_recorded(bids_dir, tmp_path, monkeypatch, environ, expected):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    content = sidecars.dataset_description(bids_dir, tmp_path / "out")
    assert content["GeneratedBy"][0].get("Container") == expected


def test_source_code_is_that_of_the_installation(bids_dir, tmp_path, monkeypatch):
    metadata = tmp_path / "site" / "bids_varaug-0.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    urls = "Project-URL: Homepage, https://example.org\nProject-URL: Repository, https://example.org/code\n"
    metadata.write_text(f"Metadata-Version: 2.1\nName: bids_varaug\nVersion: 0\n{urls}")
    monkeypatch.syspath_prepend(metadata.parents[1])
    content = sidecars.dataset_description(bids_dir, tmp_path / "out")
    assert content["GeneratedBy"][0]["CodeURL"] == "https://example.org/code"


def test_output_inside_the_dataset_is_linked_by_relative_path():
    assert sidecars.raw_link(Path("/d/ds"), Path("/d/ds/derivatives/bids_varaug")) == "../.."


def test_link_of_a_folder_with_a_space_is_a_uri():
    assert sidecars.raw_link(Path("/d/my data"), Path("/d/out")) == "../my%20data"


def test_separate_places_are_linked_by_file_address():
    assert sidecars.raw_link(Path("/data"), Path("/out")) == "file:///data"


def test_each_member_has_a_row_with_its_checksum():
    table = sidecars.descriptions_table(MEMBERS).set_index("desc_id")
    assert table.loc["desc-mca01", "sha256"] == "b" * 64
    assert table.loc["desc-mca01", "precision"] == "24"


def test_rounded_members_have_a_row_with_seed_and_baseline_checksum():
    member = SimpleNamespace(id="rr01", family="rr", seed=701, precision=24, sha256="a" * 64)
    row = sidecars.descriptions_table([*MEMBERS, member]).set_index("desc_id").loc["desc-rr01"]
    assert (row["family"], row["seed"], row["precision"]) == ("rr", "701", "24")
    assert row["sha256"] == MEMBERS[0].sha256 and "random rounding" in row["description"]


def test_each_fixed_desc_has_a_row():
    ids = set(sidecars.descriptions_table(MEMBERS)["desc_id"])
    used = re.findall(r"desc-\w+(?=_)", " ".join(output.pattern for output in names.OUTPUTS.values()))
    assert len(used) > 4 and set(used) <= ids


def test_lookup_table_has_the_columns_of_bids(bids_dir, tmp_path):
    labels = [Label(0, "background", "#000000"), Label(17, "Left-Hippocampus", "#dcd814"), Label(99, "Own", "#010203")]
    settings = Settings(bids_dir, tmp_path, "participant", tmp_path)
    sidecars.write_dataset_files(Run(settings, SimpleNamespace(labels=labels, is_fastsurfer=False), MEMBERS))
    lines = [
        "index\tname\tabbreviation\tcolor\tmapping", "0\tbackground\tBG\t#000000\t0",
        "17\tLeft-Hippocampus\tL-HIP\t#dcd814\t9", "99\tOwn\tn/a\t#010203\tn/a", "",
    ]  # fmt: skip
    assert (tmp_path / names.LOOKUP_TABLE).read_text().split("\n") == lines


def test_every_structure_of_the_shipped_ensemble_has_abbreviation_and_tissue():
    table = sidecars.labels_table(load_ensemble("aseg31").labels)
    assert len(table) == 32 and table.notna().all(axis=None)
    assert table["abbreviation"].is_unique and set(table["mapping"]) == {0, 2, 3, 8, 9, 10, 11}
