"""When a reader is warned, and when not."""

import numpy as np
import pandas as pd
import pytest

from bids_varaug.reports.plausibility import (
    LIMITS,
    check_asymmetry,
    check_contrast,
    check_field_of_view,
    check_volumes,
    check_voxel_size,
    find_warnings,
    judge_volume,
)

NAMES = {17: "Left-Hippocampus", 53: "Right-Hippocampus"}


@pytest.mark.parametrize(
    ("volume", "verdict"), [(4000, ""), (1799, "low"), (7501, "high"), (np.nan, ""), (0, "low")]
)
def test_verdict_on_a_hippocampus(volume, verdict):
    assert judge_volume(17, volume) == verdict


def test_unknown_structures_are_not_judged():
    assert judge_volume(1234, 0.0) == ""


def test_every_shipped_structure_has_limits(aseg31):
    assert set(aseg31["index"]) - {0} == set(LIMITS)


@pytest.fixture
def aseg31():
    from importlib.resources import files

    with (files("bids_varaug.data") / "aseg31.tsv").open() as stream:
        return pd.read_csv(stream, sep="\t")


def test_small_volume_is_told_with_its_limits():
    (warning,) = check_volumes({17: 300.0}, NAMES)
    assert "Left-Hippocampus is implausibly small" in warning and "1,800" in warning


def test_absent_structure_is_told_as_such():
    assert check_volumes({17: 0.0}, NAMES) == ["Left-Hippocampus was not found at all."]


@pytest.mark.parametrize(("right", "count"), [(4000, 0), (3000, 0), (2000, 1), (0, 0)])
def test_asymmetry(right, count):
    assert len(check_asymmetry({17: 4000.0, 53: float(right)}, NAMES)) == count


@pytest.mark.parametrize(
    ("zooms", "count"),
    [((1, 1, 1), 0), ((0.4999999, 0.5, 3.0), 0), ((1, 1, 4), 1), ((0.3, 1, 1), 1)],
)
def test_voxel_size(zooms, count):
    assert len(check_voxel_size(zooms)) == count


def test_brain_inside_the_image_is_fine(head):
    assert check_field_of_view(head.labels) == []


def test_brain_cut_by_the_edge_is_told(head):
    assert "edge" in check_field_of_view(head.labels[:, :16])[0]


def test_t1w_contrast_is_fine(head):
    assert check_contrast(head.t1w, head.labels) == []


def test_inverted_contrast_is_told(head):
    assert "darker" in check_contrast(200 - head.t1w, head.labels)[0]


def test_noise_without_contrast_is_told(head):
    noise = np.random.default_rng(0).normal(100, 40, head.t1w.shape)
    noise[head.labels > 0] += np.where(np.isin(head.labels, (2, 41)), 5, 0)[head.labels > 0]
    assert "hardly differ" in check_contrast(noise, head.labels)[0]


def test_labels_without_tissue_are_told(head):
    assert "Too little" in check_contrast(head.t1w, head.labels * 0)[0]


def test_image_is_judged_only_where_given(regions_table, head):
    inverted = 200 - head.t1w
    without = find_warnings(regions_table, (1, 1, 1))
    assert len(find_warnings(regions_table, (1, 1, 1), inverted, head.labels)) == len(without) + 1


def test_bert_raises_no_warning(shared_data, aseg31):
    import nibabel as nib

    stem = str(shared_data / "t1w" / "bert" / "bert_desc-")
    t1w = np.asarray(nib.load(stem + "norm_T1w.nii.gz").dataobj)
    labels = np.asarray(nib.load(stem + "aseg_dseg.nii.gz").dataobj).astype(np.int32)
    counts = np.bincount(labels.ravel(), minlength=100)
    regions = aseg31[aseg31["index"] > 0].assign(
        volume_mean=lambda t: counts[t["index"]].astype(float)
    )
    assert find_warnings(regions, (1, 1, 1), t1w, labels) == []
