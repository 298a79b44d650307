"""Which label map belongs to which image."""

import pytest

from bids_varaug.errors import UserError
from bids_varaug.training.monitor import find_labelled_images

NAMES = {0: "Background", 2: "Left-Cerebral-White-Matter", 17: "Left-Hippocampus"}


@pytest.fixture
def folder(tmp_path):
    for name in ("a_desc-norm_T1w.nii.gz", "a_desc-aparcDKTaseg_dseg.nii.gz",
                 "a_desc-aseg_dseg.nii.gz", "b_T1w.nii.gz", "b_desc-aal_dseg.nii.gz"):  # fmt: skip
        (tmp_path / name).touch()
    (tmp_path / "b_desc-aal_dseg.tsv").write_text("index\tname\n2\tPrecentral_R\n17\tRolandic\n")
    return tmp_path


def test_the_aseg_is_taken_and_another_atlas_passed_over(folder):
    (image,) = find_labelled_images(folder, NAMES)
    assert image.t1w.name == "a_desc-norm_T1w.nii.gz"
    assert image.labels.name == "a_desc-aseg_dseg.nii.gz"


def test_a_table_of_the_same_names_is_accepted(folder):
    (folder / "b_desc-aal_dseg.tsv").write_text("index\tname\n17\tLeft-Hippocampus\n")
    assert len(find_labelled_images(folder, NAMES)) == 2


def test_a_folder_without_pairs_is_an_error(tmp_path):
    (tmp_path / "c_T1w.nii.gz").touch()
    with pytest.raises(UserError, match="beside it"):
        find_labelled_images(tmp_path, NAMES)
