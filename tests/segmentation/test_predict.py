"""One network on one head."""

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_dilation

from bids_varaug.images.intensity import normalise_intensity
from bids_varaug.models.ensemble import NetworkShape
from bids_varaug.models.unet import build_network
from bids_varaug.segmentation.fuse import load_posterior, save_posterior
from bids_varaug.segmentation.predict import largest_component, segment_volume

SHAPE = NetworkShape(4, (16, 16, 16), 16)


@pytest.fixture(scope="module")
def image():
    rng = np.random.default_rng(0)
    image = rng.normal(0, 5, (32, 40, 48)).astype(np.float32)
    image[8:24, 8:32, 8:40] += 100
    return image


@pytest.fixture(scope="module")
def network():
    return build_network(SHAPE, 3).eval().requires_grad_(False)


def dense(sparse, shape):
    """(X, Y, Z, K) posterior; background where nothing is stored."""
    full = np.zeros((*shape, sparse.rows.shape[1]), np.float32)
    full[..., 0] = 1
    full.reshape(-1, sparse.rows.shape[1])[sparse.stored] = sparse.posterior
    return full


def test_posterior_is_that_of_the_network_where_it_is_stored(network, image):
    sparse = segment_volume(network, image)
    with torch.inference_mode():
        logits = network(normalise_intensity(torch.from_numpy(image))[None, None])[0]
    expected = logits.softmax(0).movedim(0, -1).numpy()
    full = dense(sparse, image.shape)
    stored = full[..., 0] < 1
    assert stored.any()
    np.testing.assert_allclose(full[stored], expected[stored], atol=1e-5)
    np.testing.assert_allclose(sparse.posterior.sum(1), 1, atol=1e-5)


def test_labels_are_the_most_probable_class_of_what_is_stored(network, image):
    """Of specks beside the brain, too: the consensus must know of what its members left out."""
    sparse = segment_volume(network, image)
    with torch.inference_mode():
        everything = network(normalise_intensity(torch.from_numpy(image))[None, None])[0].argmax(0)
    brain = sparse.labels > 0
    specks = (everything.numpy() > 0) & ~brain
    assert (specks & binary_dilation(brain, iterations=2)).any()
    assert np.array_equal(dense(sparse, image.shape).argmax(-1), sparse.labels)


def test_brightness_and_unit_do_not_matter(network, image):
    a, b = (segment_volume(network, image * factor) for factor in (1.0, 8.0))
    assert np.array_equal(a.labels, b.labels)


def test_what_is_not_connected_with_the_brain_is_left_out():
    mask = np.zeros((8, 8, 8), bool)
    mask[1:5, 1:5, 1:5] = True
    mask[6:, 6:, 6:] = True
    kept = largest_component(mask)
    assert kept.sum() == 64 and not kept[7, 7, 7]


def test_empty_mask_stays_empty():
    assert not largest_component(np.zeros((3, 3, 3), bool)).any()


def test_wrong_sides_are_refused(network):
    with pytest.raises(ValueError, match="multiples of 8"):
        segment_volume(network, np.zeros((32, 32, 33), np.float32))


def test_file_keeps_everything(network, image, tmp_path):
    sparse = segment_volume(network, image)
    save_posterior(tmp_path / "m.safetensors", sparse)
    again = load_posterior(tmp_path / "m.safetensors")
    assert np.array_equal(again.labels, sparse.labels)
    for name in ("indptr", "indices", "data"):
        assert np.array_equal(getattr(sparse.rows, name), getattr(again.rows, name))
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]
