"""Which participants' maps are averaged, and what is said of the others."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from bids_varaug.derivatives.io import write_image
from bids_varaug.derivatives.names import LOOKUP_TABLE, SPACE_OUTPUTS
from bids_varaug.errors import NoInputError
from bids_varaug.models.ensemble import Label
from bids_varaug.registration.space import SPACE, OutputSpace
from bids_varaug.workflows.group_maps import KEYS, _average

SPACE_2MM = OutputSpace(SPACE, 2)


@pytest.fixture
def output_dir(tmp_path):
    """Maps of one participant with two sessions, of which the second is damaged, and of none of another."""
    (tmp_path / LOOKUP_TABLE).write_text("index\tname\tcolor\n0\tBackground\t#000000\n17\tLeft-Hippocampus\t#dcd814\n")
    for session in ("a", "b"):
        folder = tmp_path / "sub-01" / f"ses-{session}" / "anat"
        for name, key in KEYS.items():
            path = folder / SPACE_OUTPUTS[key].name(f"sub-01_ses-{session}", space=SPACE_2MM)
            data = np.full(SPACE_2MM.grid.shape, 17 if name == "labels" else 1, np.uint8)
            write_image(data, SPACE_2MM.grid.affine, path)
            if session == "b" and name == "sigbits":
                path.write_bytes(path.read_bytes()[:500])
    return tmp_path


def cohort(*images: str) -> SimpleNamespace:
    rows = [{"participant_id": i.split("_")[0], "session_id": (i.split("_")[1:] or [None])[0], "observation": i}
            for i in images]  # fmt: skip
    return SimpleNamespace(people=pd.DataFrame(rows))


def test_images_without_maps_or_with_damaged_ones_are_left_out_with_reasons(output_dir):
    people = cohort("sub-01_ses-a", "sub-01_ses-b", "sub-02")
    maps, structures, left_out = _average(output_dir, people, SPACE_2MM)
    assert structures == [Label(0, "Background", "#000000"), Label(17, "Left-Hippocampus", "#dcd814")]
    assert set(left_out) == {"sub-01_ses-b", "sub-02"}
    assert "cannot be read" in left_out["sub-01_ses-b"]
    assert "run the participant level with --output-spaces" in left_out["sub-02"]
    assert (maps.probability(1) == 1).all() and (maps.mean("entropy") == 1).all()


@pytest.mark.parametrize("table", ["there", "of FastSurfer"])
def test_a_group_without_any_maps_is_told_so(output_dir, table):
    if table == "of FastSurfer":
        (output_dir / LOOKUP_TABLE).rename(output_dir / "seg-fastsurfer_dseg.tsv")
    with pytest.raises(NoInputError, match="no image has maps in MNI152NLin2009cAsym_res-2"):
        _average(output_dir, cohort("sub-02"), SPACE_2MM)
