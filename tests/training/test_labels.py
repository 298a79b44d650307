"""Label maps as training data."""

import nibabel as nib
import numpy as np
import pytest

from bids_varaug.errors import UserError
from bids_varaug.training.labels import find_label_maps, load_label_map, load_scheme


def write(path, data, affine=None):
    nib.save(nib.Nifti1Image(data, np.eye(4) if affine is None else affine), path)
    return path


def test_scheme_pairs_left_with_right_and_lesions_with_white_matter(scheme):
    position = {int(i): n for n, i in enumerate(scheme.ids)}
    assert scheme.ids[scheme.mirror[position[17]]] == 53
    assert scheme.ids[scheme.mirror[position[16]]] == 16
    assert scheme.target_ids[scheme.targets[position[25]]] == 2
    assert len(scheme.target_ids) == 32
    assert np.array_equal(scheme.mirror[scheme.mirror], np.arange(len(scheme.ids)))


def test_label_map_is_read_in_ras_and_cropped(tmp_path, scheme):
    data = np.zeros((10, 10, 10), np.int16)
    data[2, 3, 4] = 17
    data[6, 3, 4] = 53
    head = load_label_map(write(tmp_path / "a.nii.gz", data, np.diag([-1, 1, 1, 1])), scheme)
    assert head.shape == (5, 1, 1)
    assert [int(scheme.ids[head[0, 0, 0]]), int(scheme.ids[head[4, 0, 0]])] == [53, 17]


@pytest.mark.parametrize(
    ("data", "affine", "message"),
    [
        (np.full((4, 4, 4), 999, np.int16), np.eye(4), r"label\(s\) \[999\] are not in the label"),
        (np.full((4, 4, 4), 2.5, np.float32), np.eye(4), "fractional values"),
        (np.zeros((4, 4, 4), np.int16), np.eye(4), "the label map is empty"),
        (np.full((4, 4, 4), 2, np.int16), np.diag([2, 2, 2, 1.0]), "needs label maps at 1 mm"),
    ],
)
def test_unusable_label_maps_are_refused_by_name(tmp_path, scheme, data, affine, message):
    path = write(tmp_path / "bad.nii.gz", data, affine)
    with pytest.raises(UserError, match=message) as caught:
        load_label_map(path, scheme)
    assert "bad.nii.gz" in str(caught.value)


def test_bids_derivatives_come_before_plain_files(tmp_path):
    write(tmp_path / "x.nii.gz", np.zeros((2, 2, 2), np.int16))
    assert [p.name for p in find_label_maps(tmp_path)] == ["x.nii.gz"]
    (tmp_path / "sub-01").mkdir()
    write(tmp_path / "sub-01" / "sub-01_dseg.nii.gz", np.zeros((2, 2, 2), np.int16))
    assert [p.name for p in find_label_maps(tmp_path)] == ["sub-01_dseg.nii.gz"]


def test_empty_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="no label map"):
        find_label_maps(tmp_path)


def test_label_table_lacking_a_column_is_refused(tmp_path):
    (tmp_path / "t.tsv").write_text("index\tname\n0\tBackground\n")
    with pytest.raises(UserError, match="lacks the column"):
        load_scheme(tmp_path / "t.tsv")
