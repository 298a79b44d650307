from pathlib import Path

import pytest

from bids_varaug.derivatives import names

OUT = Path("/out")


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("consensus_dseg", "seg-varaug_desc-consensus_dseg.nii.gz"),
        ("ieee_dseg", "seg-varaug_desc-ieee_dseg.nii.gz"),
        ("mean_probseg", "seg-varaug_desc-mean_probseg.nii.gz"),
        ("brain_mask", "desc-brain_mask.nii.gz"),
        ("unreliable_mask", "label-unreliable_mask.nii.gz"),
        ("total_entropy", "seg-varaug_stat-totalentropy_statmap.nii.gz"),
        ("mutual_information", "seg-varaug_stat-mutualinformation_statmap.nii.gz"),
        ("entropy", "seg-varaug_stat-entropy_statmap.nii.gz"),
        ("sigbits", "seg-varaug_stat-sigbits_statmap.nii.gz"),
        ("std", "seg-varaug_stat-std_statmap.nii.gz"),
        ("regions_tsv", "seg-varaug_desc-consensus_dseg.tsv"),
        ("members_tsv", "seg-varaug_desc-members_morph.tsv"),
    ],
)
def test_name_carries_the_entities_of_the_t1w(request_, key, expected):
    path = request_.path(key)
    assert path == OUT / "sub-01/ses-a/anat" / f"sub-01_ses-a_acq-x_run-02_{expected}"


def test_every_output_is_in_the_table_of_expected_names():
    assert len(names.OUTPUTS) == 19


def test_member_output_is_named_for_the_member(request_):
    path = request_.path("member_dseg", "mca01")
    assert path.name == "sub-01_ses-a_acq-x_run-02_seg-varaug_desc-mca01_dseg.nii.gz"


def test_member_output_without_a_member_is_refused(request_):
    with pytest.raises(ValueError, match="member_dseg"):
        request_.path("member_dseg")


def test_no_two_outputs_share_a_name(request_):
    paths = [request_.path(key, "x9" if output.per_member else None) for key, output in names.OUTPUTS.items()]
    assert len(set(paths)) == len(paths)


def test_image_and_table_of_one_name_share_the_sidecar(request_):
    assert request_.sidecar("consensus_dseg") == request_.sidecar("regions_tsv")


def test_bidsignore_lists_figures_without_slash():
    by_image = ["phenotype/changes.*", "phenotype/volumes.*"]
    images = ["*_features.*", "*_morph.*", "*_statmap.*", "*_xfm.*"]
    assert names.BIDSIGNORE.split() == ["*.html", "figures", "group_maps", "models", *by_image, *images]


def test_report_lies_where_browsers_find_it():
    assert names.report(OUT, "01") == OUT / "sub-01.html"
