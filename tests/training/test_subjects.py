"""Training subjects from files, with their T1w images."""

import nibabel as nib
import numpy as np
import pytest
import torch

from bids_varaug.errors import UserError
from bids_varaug.training.labels import load_subjects
from bids_varaug.training.synthesis import SynthesisSettings, SyntheticImageGenerator

FLIPPED = np.diag([-1.0, 1, 1, 1])


@pytest.fixture
def pair(tmp_path, scheme, subject):
    """A label map and a T1w image whose values are unlike any synthetic one, in LAS."""
    labels = scheme.ids[subject.classes.numpy()].astype(np.int16)[::-1]
    labels = np.pad(labels, 2)
    x, y, z = np.indices(labels.shape)
    image = (1000 + 10 * y + 3 * z - 5 * x).astype(np.float32)
    image[labels == 0] = 0
    nib.save(nib.Nifti1Image(labels, FLIPPED), tmp_path / "sub-01_desc-aseg_dseg.nii.gz")
    nib.save(nib.Nifti1Image(image, FLIPPED), tmp_path / "sub-01_T1w.nii.gz")
    return tmp_path


def test_image_and_labels_are_cropped_and_turned_alike(pair, scheme, subject):
    [loaded] = load_subjects([pair / "sub-01_desc-aseg_dseg.nii.gz"], scheme, "cpu", True)
    inside = subject.classes[4:-4, 4:-4, 4:-4]
    assert torch.equal(loaded.classes, inside)
    assert loaded.t1w.shape == inside.shape
    assert float(loaded.t1w[-1].mean()) > float(loaded.t1w[0].mean())  # RAS: x was turned


def test_images_are_read_only_where_they_are_wanted(pair, scheme):
    [loaded] = load_subjects([pair / "sub-01_desc-aseg_dseg.nii.gz"], scheme, "cpu")
    assert loaded.t1w is None


def test_image_on_another_grid_is_refused(pair, scheme):
    image = nib.load(pair / "sub-01_T1w.nii.gz")
    nib.save(nib.Nifti1Image(image.get_fdata()[1:], FLIPPED), pair / "sub-01_T1w.nii.gz")
    with pytest.raises(UserError, match=r"sub-01_T1w.nii.gz: not on the grid of its label map"):
        load_subjects([pair / "sub-01_desc-aseg_dseg.nii.gz"], scheme, "cpu", True)


def test_wanted_images_that_are_not_there_are_missed(pair, scheme):
    (pair / "sub-01_T1w.nii.gz").unlink()
    with pytest.raises(UserError, match="no \\*_T1w.nii.gz beside any label map"):
        load_subjects([pair / "sub-01_desc-aseg_dseg.nii.gz"], scheme, "cpu", True)


def test_labels_follow_a_real_image_through_warp_and_mirror(pair, scheme):
    """Where the image is bright and where the labels are must stay together, also mirrored."""
    [loaded] = load_subjects([pair / "sub-01_desc-aseg_dseg.nii.gz"], scheme, "cpu", True)
    bright = loaded.classes == int(np.flatnonzero(scheme.ids == 2)[0])  # left white matter
    marked = type(loaded)(loaded.classes, bright.float())
    quiet = SynthesisSettings(noise=0, bias=0, gamma=0, whole_head_share=1, low_resolution_share=0,
                              real_share=1.0)  # fmt: skip
    generator = SyntheticImageGenerator(scheme, quiet)
    sides = (scheme.target_ids.index(2), scheme.target_ids.index(41))
    seen = set()
    for seed in range(8):
        image, target = generator.draw(marked, (64, 72, 64), 1.0, seed)
        overlap = [float((image[target == k] > 0.5).float().mean()) for k in sides]
        assert max(overlap) > 0.8 and min(overlap) < 0.2
        seen.add(int(np.argmax(overlap)))
    assert seen == {0, 1}  # mirrored, what was left is right


def test_real_share_says_how_many_draws_are_real(pair, scheme):
    [loaded] = load_subjects([pair / "sub-01_desc-aseg_dseg.nii.gz"], scheme, "cpu", True)
    marked = type(loaded)(loaded.classes, torch.zeros_like(loaded.t1w))
    generator = SyntheticImageGenerator(scheme, SynthesisSettings(real_share=0.5, noise=0))
    empty = [float(generator.draw(marked, (32, 32, 32), 2.0, s)[0].max()) == 0 for s in range(24)]
    assert 4 <= sum(empty) <= 20
