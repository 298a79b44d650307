"""Label maps as training data."""

import nibabel as nib
import numpy as np
import pytest

from bids_varaug.errors import UserError
from bids_varaug.training.labels import find_label_maps, find_label_table, load_label_map, load_scheme


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


def table(folder, text):
    path = folder / "desc-mine_dseg.tsv"
    path.write_text(text.replace(" ", "\t"))
    return path


def test_label_table_lacking_a_column_is_refused(tmp_path):
    with pytest.raises(UserError, match="lacks the column"):
        load_scheme(table(tmp_path, "index title\n0 Background\n"))


def test_a_bids_table_of_ids_and_names_is_enough(tmp_path):
    scheme = load_scheme(table(tmp_path, "index name\n7 Left-A\n3 Stem\n9 Right-A\n"))
    assert scheme.ids.tolist() == [0, 3, 7, 9]
    assert scheme.mirror.tolist() == [0, 1, 3, 2]
    assert scheme.target_ids == (0, 3, 7, 9)
    assert scheme.target_names == ("background", "Stem", "Left-A", "Right-A")
    assert np.isfinite(scheme.t1_mean).all() and np.isfinite(scheme.t1_sd).all()


def test_a_structure_without_its_counterpart_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"Left-A \(no Right-A\)"):
        load_scheme(table(tmp_path, "index name\n7 Left-A\n3 Stem\n"))


@pytest.mark.parametrize(
    "rows", ["index name target\n7 A 8\n", "index name mirror\n7 A 8\n", "index name tissue\n7 A bone\n"]
)
def test_targets_mirrors_and_tissues_that_do_not_exist_are_refused(tmp_path, rows):
    with pytest.raises(UserError, match=r"targets and mirrors must be ids of the table .*, tissues one of"):
        load_scheme(table(tmp_path, rows))


def test_ids_listed_twice_are_refused(tmp_path):
    with pytest.raises(UserError, match="unique"):
        load_scheme(table(tmp_path, "index name\n7 A\n7 B\n"))


def test_the_table_of_the_label_maps_is_found(tmp_path):
    assert find_label_table(tmp_path) is None
    path = table(tmp_path, "index name\n7 A\n")
    (tmp_path / "sub-01").mkdir()
    (tmp_path / "sub-01" / "sub-01_dseg.tsv").write_bytes(path.read_bytes())
    assert load_scheme(find_label_table(tmp_path)).target_names == ("background", "A")
    table(tmp_path / "sub-01", "index name\n8 A\n")
    with pytest.raises(UserError, match="differ"):
        find_label_table(tmp_path)


def freesurfer_head():
    """Left half -x: white matter, ventricle; in the middle the corpus callosum."""
    data = np.zeros((20, 8, 8), np.int16)
    data[1:9], data[11:19] = 2, 41
    data[9:11, 2:6, 2:6] = np.array([251, 252, 253, 254])[None, :, None]
    data[9:11, 5, 2:6] = 255
    data[4, 4, 4], data[15, 4, 4] = 31, 63
    data[2, 1, 1] = data[17, 6, 6] = 77
    return data


def test_freesurfers_ids_count_as_what_they_belong_to(tmp_path, scheme):
    path = write(tmp_path / "a.nii.gz", freesurfer_head())
    targets = np.array(scheme.target_ids)[scheme.targets[load_label_map(path, scheme)]]
    assert targets[3, 4, 4] == 4 and targets[14, 4, 4] == 43  # choroid plexus; cropped by one
    assert targets[1, 1, 1] == 2 and targets[16, 6, 6] == 41  # WM hypointensities
    assert (targets[8, 2:6, 2:6] == 2).all() and (targets[9, 2:6, 2:6] == 41).all()


def test_an_id_without_its_side_to_be_told_is_refused(tmp_path, scheme):
    path = write(tmp_path / "a.nii.gz", np.full((4, 4, 4), 251, np.int16))
    with pytest.raises(UserError, match=r"label\(s\) \[251\]"):
        load_label_map(path, scheme)


def test_a_table_of_other_ids_takes_none_of_freesurfers(tmp_path):
    scheme = load_scheme(table(tmp_path, "index name\n4 A\n2 B\n"))
    path = write(tmp_path / "a.nii.gz", np.full((4, 4, 4), 31, np.int16))
    with pytest.raises(UserError, match=r"\[31\]"):
        load_label_map(path, scheme)
    scheme = load_scheme(table(tmp_path, "index name also\n4 A 31,40-42\n2 B n/a\n"))
    assert scheme.ids[load_label_map(path, scheme)].tolist() == np.full((4, 4, 4), 4).tolist()


@pytest.mark.parametrize(
    "name",
    [
        "t1w/bert/bert_desc-aseg_dseg.nii.gz",
        "t1w/bert/bert_desc-aparcDKTaseg_dseg.nii.gz",
        "bids/fs-training/derivatives/freesurfer/sub-02/anat/sub-02_desc-aseg_dseg.nii.gz",
    ],
)
def test_real_freesurfer_segmentations_are_read_and_stay_symmetric(shared_data, scheme, name):
    ids = np.array(scheme.target_ids)[scheme.targets[load_label_map(shared_data / name, scheme)]]
    left, right = (ids == 2).sum(), (ids == 41).sum()
    assert left == pytest.approx(right, rel=0.04)
    assert (ids == 3).sum() == pytest.approx((ids == 42).sum(), rel=0.06)
