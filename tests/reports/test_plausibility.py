"""When a reader is warned, and when not."""

import numpy as np
import pytest

from bids_varaug.variability.quality import find_warnings


def about(t1w, labels) -> str:
    """Warnings about an image of 1 mm."""
    return " ".join(find_warnings((1, 1, 1), t1w, labels))


@pytest.mark.parametrize(
    ("zooms", "fine"),
    [((1, 1, 1), True), ((0.4999999, 0.5, 3.0), True), ((1, 1, 4), False), ((0.3, 1, 1), False)],
)
def test_voxel_size(head, zooms, fine):
    assert any("Voxels of" in text for text in find_warnings(zooms, head.t1w, head.labels)) != fine


def test_brain_inside_the_image_is_fine(head):
    assert not about(head.t1w, head.labels)


def test_brain_cut_by_the_edge_is_told(head):
    assert "edge" in about(head.t1w[:, :16], head.labels[:, :16])


def test_t1w_contrast_is_fine(head):
    assert not about(head.t1w, head.labels)


def test_inverted_contrast_is_told(head):
    assert "darker" in about(200 - head.t1w, head.labels)


def test_noise_without_contrast_is_told(head):
    noise = np.random.default_rng(0).normal(100, 40, head.t1w.shape)
    noise[head.labels > 0] += np.where(np.isin(head.labels, (2, 41)), 5, 0)[head.labels > 0]
    assert "hardly differ" in about(noise, head.labels)


def test_saturated_brain_is_told(head):
    assert not about(head.t1w, head.labels)
    assert "saturated" in about(head.t1w.clip(None, 95), head.labels)


def test_labels_without_tissue_are_told(head):
    assert "Too little" in about(head.t1w, head.labels * 0)


def test_all_that_speaks_against_an_image_is_told(head):
    assert find_warnings((1, 1, 1), head.t1w, head.labels) == []
    assert len(find_warnings((1, 1, 4), 200 - head.t1w, head.labels)) == 2


def test_bert_raises_no_warning(shared_data):
    import nibabel as nib

    stem = str(shared_data / "t1w" / "bert" / "bert_desc-")
    t1w = np.asarray(nib.load(stem + "norm_T1w.nii.gz").dataobj)
    labels = np.asarray(nib.load(stem + "aseg_dseg.nii.gz").dataobj).astype(np.int32)
    assert find_warnings((1, 1, 1), t1w, labels) == []
