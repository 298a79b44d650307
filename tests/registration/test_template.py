import os
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest

from bids_varaug.errors import NoInputError, UsageError
from bids_varaug.models.ensemble import load_ensemble
from bids_varaug.registration.space import GRIDS, SPACE, OutputSpace
from bids_varaug.registration.template import find_template_t1w, load_template

NAME = f"tpl-{SPACE}_res-01_desc-brain_T1w.nii.gz"


@pytest.fixture
def label_ids() -> list[int]:
    return [label.index for label in load_ensemble("aseg31").labels]


def test_every_structure_of_the_shipped_ensemble_is_in_the_template(label_ids):
    template = load_template(label_ids)
    assert np.unique(template.labels).tolist() == list(range(32))
    assert template.labels.shape == GRIDS[2].shape


def test_left_is_left_and_sizes_are_those_of_a_brain(label_ids):
    template = load_template(label_ids)
    world = {
        k: (np.argwhere(template.labels == k).mean(axis=0) * 2 + template.grid.affine[:3, 3]) for k in range(1, 32)
    }
    for k, index in enumerate(label_ids):
        name = next(label.name for label in load_ensemble("aseg31").labels if label.index == index)
        if name.startswith("Left"):
            assert world[k][0] < -1, name
        elif name.startswith("Right"):
            assert world[k][0] > 1, name
        elif k:
            assert abs(world[k][0]) < 3, name
    assert 1.0e6 < 8 * (template.labels > 0).sum() < 2.0e6  # mm3
    assert 2500 < 8 * (template.labels == label_ids.index(17)).sum() < 6000


def test_an_ensemble_of_other_structures_is_refused():
    with pytest.raises(UsageError, match="fewer than four of the template's 31"):
        load_template([0, 2, 41, 16, 1001, 1002])


def test_spaces_are_parsed_and_named():
    plain, coarse = OutputSpace.parse(SPACE), OutputSpace.parse(f"{SPACE}:res-2")
    assert (plain.entity, plain.grid.shape) == ("", (193, 229, 193))
    assert (coarse.entity, coarse.grid.shape) == ("_res-2", (97, 115, 97))


def test_grids_are_those_of_templateflow():
    """As the description of the template says, which the client brings along."""
    import json
    import zipfile
    from importlib.resources import files

    with zipfile.ZipFile(str(files("templateflow") / "conf" / "templateflow-skel.zip")) as skeleton:
        described = json.loads(skeleton.read(f"tpl-{SPACE}/template_description.json"))["res"]
    for resolution, grid in GRIDS.items():
        theirs = described[f"{resolution:02}"]
        assert (list(grid.shape), grid.affine[:3, 3].tolist()) == (theirs["shape"], theirs["origin"])
        assert np.diag(grid.affine)[:3].tolist() == theirs["zooms"]


def run_in_home(home, *, allow=False) -> str:
    """Ask for the template in a process of its own: the client reads TEMPLATEFLOW_HOME when it is imported."""
    code = f"from bids_varaug.registration.template import find_template_t1w as f; print(f({allow}))"
    environment = os.environ | {"TEMPLATEFLOW_HOME": str(home)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    return done.stdout.strip() or done.stderr.strip().splitlines()[-1]


def test_template_of_a_minimal_home_is_found(tmp_path):
    folder = tmp_path / f"tpl-{SPACE}"
    folder.mkdir()
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), np.uint8), np.eye(4)), folder / NAME)
    assert run_in_home(tmp_path) == str(folder / NAME)


def test_absent_template_is_an_error_that_says_how_to_fetch_it_and_leaves_nothing(tmp_path, monkeypatch):
    home = tmp_path / "nothing"
    monkeypatch.setenv("TEMPLATEFLOW_HOME", str(home))
    with pytest.raises(NoInputError, match=r"api.get\('MNI152NLin2009cAsym'.*--allow-downloads"):
        find_template_t1w(allow_downloads=False)
    assert not home.exists()


def test_unfetched_template_is_an_error(tmp_path):
    """A home that the client made has an empty file for each image."""
    folder = tmp_path / f"tpl-{SPACE}"
    folder.mkdir()
    (folder / NAME).touch()
    assert "the T1w image of MNI152NLin2009cAsym is not there" in run_in_home(tmp_path)
