"""The Brainlife App, run on a local config.json."""

import base64
import importlib.util
import io
import json
import os
import shutil
import subprocess

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from tests.workflows.conftest import describe, write_t1w


@pytest.fixture(scope="module")
def app(root):
    """``brainlife/run.py``, which is no part of the package."""
    spec = importlib.util.spec_from_file_location("brainlife_run", root / "brainlife" / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def task(app, root, small_ensemble, tmp_path_factory):
    """Folder of a finished task: the sample configuration with another image and ensemble."""
    folder = tmp_path_factory.mktemp("task")
    image = write_t1w(describe(folder / "given"), "sub-x")
    config = json.loads((root / "brainlife" / "config-sample.json").read_text())
    config |= {"t1": "given/t1.nii.gz", "ensemble": str(small_ensemble), "members": "ieee seed"}
    config["_inputs"][0]["meta"] = {"subject": "P_01", "session": "2020-01-31"}
    shutil.move(image, folder / config["t1"])
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert app.main() == 0
    return folder


def test_parcellation_is_the_consensus_and_each_label_has_a_name(task):
    image = nib.load(task / "parc" / "parc.nii.gz")
    anat = "derivatives/sub-P01/ses-20200131/anat/sub-P01_ses-20200131"
    consensus = nib.load(task / f"{anat}_seg-varaug_desc-consensus_dseg.nii.gz")
    np.testing.assert_array_equal(image.dataobj, consensus.dataobj)
    labels = json.loads((task / "parc" / "label.json").read_text())
    assert {entry["voxel_value"] for entry in labels} >= set(np.unique(image.dataobj)) - {0}
    white = next(entry for entry in labels if entry["label"] == "2")
    assert white["name"] == "Left-Cerebral-White-Matter"
    assert (white["r"], white["g"], white["b"]) == (0xF5, 0xF5, 0xF5)


def test_product_has_pictures_and_stays_small(task):
    path = task / "product.json"
    assert path.stat().st_size < 300_000
    shown = json.loads(path.read_text())["brainlife"]
    pictures = [entry for entry in shown if entry["type"] == "image/png"]
    assert [entry["name"] for entry in pictures] == ["Consensus", "Vote entropy, bit", "Volumes"]
    for entry in pictures:
        with Image.open(io.BytesIO(base64.b64decode(entry["base64"]))) as image:
            assert image.format == "PNG"
            assert image.width == 600


def test_product_has_the_table_of_regions(task):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    content = json.loads((task / "product.json").read_text(), parse_constant=refuse)
    assert content["regions"]["Brain-Stem"]["volume_mean"] >= 0


def test_missing_image_is_named(app, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text('{"t1": "nowhere.nii.gz"}')
    assert app.main() == 1
    assert "nowhere.nii.gz" in capsys.readouterr().err
    assert not (tmp_path / "product.json").exists()


def test_main_hands_over_to_the_python_that_is_named(root, tmp_path):
    done = subprocess.run(
        [root / "brainlife" / "main"], cwd=tmp_path, capture_output=True, text=True, check=True,
        env=os.environ | {"BIDS_VARAUG_PYTHON": "echo"},
    )  # fmt: skip
    assert done.stdout.strip() == str(root / "brainlife" / "run.py")
