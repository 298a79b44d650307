"""The shipped baseline finds the brain of a head, wherever it lies in the image."""

import nibabel as nib
import numpy as np
import pytest
from nilearn.datasets import MNI152_FILE_PATH

from bids_varaug.images.conform import Box, extract
from bids_varaug.models.ensemble import load_ensemble
from bids_varaug.models.unet import build_network, load_member
from bids_varaug.segmentation.predict import MARGIN_MM, localise_brain, segment_volume


@pytest.fixture(scope="module")
def network():
    ensemble = load_ensemble("aseg31")
    return load_member(ensemble, ensemble.baseline)


@pytest.fixture(scope="module")
def head():
    """The MNI152 brain at 1 mm, (224, 256, 224), with room on all sides; where it lies."""
    brain = nib.as_closest_canonical(nib.load(MNI152_FILE_PATH)).get_fdata(dtype=np.float32)
    start = (10, 14, 25)
    head = np.zeros((224, 256, 224), np.float32)
    head[tuple(slice(a, a + n) for a, n in zip(start, brain.shape, strict=True))] = brain
    used = np.argwhere(head > 0)
    return head, used.min(0), used.max(0) + 1


def test_the_box_holds_the_brain_and_little_else(network, head):
    image, low, high = head
    box = localise_brain(network, image, 1.0)
    assert (np.array(box.start) <= low - MARGIN_MM / 2).all()
    assert (np.array(box.stop) >= high + MARGIN_MM / 2).all()
    # Rounded up to multiples of 32, and what half the resolution finds may be 4 mm too large.
    assert (np.array(box.shape) <= high - low + 2 * MARGIN_MM + 4 + 32).all()
    assert (np.array(box.start) >= 0).all() and (np.array(box.stop) <= image.shape).all()


def test_the_box_goes_with_the_brain(network, head):
    image = head[0]
    box = localise_brain(network, image, 1.0)
    moved = localise_brain(network, np.roll(image, (32, -8, 16), (0, 1, 2)), 1.0)
    shift = np.array(moved.start) - box.start
    np.testing.assert_allclose(shift, (32, -8, 16), atol=2)
    assert moved.shape == box.shape


def test_labels_in_the_box_are_those_of_a_brain(network, head):
    image = head[0]
    box = localise_brain(network, image, 1.0)
    labels = segment_volume(network, extract(image, box)).labels
    assert 1200e3 < (labels > 0).sum() < 2100e3  # mm3: the template is larger than most brains


def test_where_no_brain_is_found_the_whole_head_stays(network):
    noise = np.random.default_rng(0).uniform(0, 1, (64, 64, 96)).astype(np.float32)
    assert localise_brain(network, noise, 1.0) == Box((0, 0, 0), (64, 64, 96))
    untrained = build_network(network.shape, 1).eval()
    assert localise_brain(untrained, noise, 1.0) == Box((0, 0, 0), (64, 64, 96))
