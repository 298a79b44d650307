from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from bids_varaug.images.intensity import (
    MAX_SPIKE_SHARE,
    normalise_intensity,
    spike_share,
    standardise,
)

SHAPE = (60, 64, 56)
TIGHT = (slice(14, 46), slice(15, 50), slice(12, 44))  # inside the head


def whole_head(noise=3.0):
    """Whole numbers from 0 to some 200: a head with tissue inside, and the noise of air."""
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in SHAPE], indexing="ij"))
    inside = (grid**2).sum(0) < 0.8
    tissue = 110 + 300 * gaussian_filter(rng.normal(size=SHAPE), 2)
    return np.rint(np.where(inside, tissue.clip(20, 200), np.abs(rng.normal(0, noise, SHAPE))))


def brain():
    """The same with an empty background."""
    head = whole_head()
    return np.where(gaussian_filter(head, 1) > 40, head, 0)


IMAGES = {"head": whole_head(), "clean head": whole_head(0), "tight": whole_head()[TIGHT],
          "brain": brain()}  # fmt: skip
FITS = {np.uint8: (1, 0), np.int8: (1, -128), np.uint16: (300, 0), np.int16: (100, -9000),
        np.uint32: (20_000_000, 5), np.int32: (-1, 0), np.float32: (1e-9, 0),
        np.float64: (1e-300, 0)}  # fmt: skip


@pytest.mark.parametrize("name", IMAGES)
@settings(max_examples=40, deadline=None)
@given(
    scale=st.floats(-12, 12).map(lambda power: 10.0**power),
    offset=st.floats(-50, 50),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_scale_and_offset_change_no_bit(name, scale, offset, dtype):
    image = IMAGES[name]
    moved = ((image + np.rint(offset)) * scale).astype(dtype)
    assert np.array_equal(standardise(moved), standardise(image))


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("dtype", FITS, ids=lambda t: t.__name__)
def test_every_type_of_number_gives_the_same_bits(name, dtype):
    scale, offset = FITS[dtype]
    image = (IMAGES[name] * abs(scale) + offset).astype(dtype)
    assert np.array_equal(standardise(image), standardise(IMAGES[name]))


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("value", [-1000, 0, 75, 400, 30_000], ids=lambda v: f"padded with {v}")
@pytest.mark.parametrize("width", [((6, 6),) * 3, ((0, 0), (0, 9), (0, 0))], ids=["all", "one"])
def test_padding_of_any_value_is_air(name, value, width):
    image = IMAGES[name] + 50
    padded = standardise(np.pad(image, width, constant_values=value).astype(np.int32))
    back = padded[tuple(slice(a, n - b) for (a, b), n in zip(width, padded.shape, strict=True))]
    assert np.mean(np.abs(back - standardise(image)) > 0.01) < 1e-3
    if width[0][0]:
        assert (padded[:6] == 0).all()


@pytest.mark.parametrize("value", [-1024, 0, 400], ids=lambda v: f"wedge of {v}")
def test_small_wedge_of_padding_is_air(value):
    image = whole_head(5) + 100
    wedge = np.indices(SHAPE).sum(0) < 24
    cornered = standardise(np.where(wedge, value, image))
    assert (cornered[wedge] == 0).all()
    np.testing.assert_allclose(cornered[~wedge], standardise(image)[~wedge], atol=0.01)


def test_values_that_are_no_whole_numbers_follow_scale_and_offset_closely():
    image = gaussian_filter(whole_head(), 0.7)
    expected = standardise(image)
    assert np.array_equal(standardise(image * 2.0**-30), expected)
    np.testing.assert_allclose(standardise(image * 3.7 + 1000), expected, atol=1e-5)


def test_standardised_brain_keeps_its_dark_tissue():
    image = brain()
    inside = image > 0
    scores = np.where(inside, (image - image[inside].mean()) / image[inside].std(), 0)
    result = standardise(scores.astype(np.float32))
    assert (result[~inside] == 0).all()
    np.testing.assert_allclose(result, standardise(image), atol=1e-5)


def test_negative_slope_turns_the_contrast():
    image = whole_head()
    assert np.array_equal(standardise(-image, negative=True), standardise(image))


def test_few_values_are_enough():
    assert set(np.unique(standardise(np.indices((9, 9, 9)).sum(0) % 2))) == {0.0, 1.0}


def test_wrapped_and_noisy_images_have_spikes_and_others_do_not():
    image = gaussian_filter(whole_head(), 0.8)
    noise = np.random.default_rng(0).uniform(0, 200, SHAPE)
    for ordinary in (image, whole_head()):
        assert spike_share(standardise(ordinary)) < MAX_SPIKE_SHARE / 5
    grainy = whole_head() + np.random.default_rng(1).normal(0, 8, SHAPE)
    wrapped = (grainy * 400).astype(np.int64).astype(np.int16)
    assert spike_share(standardise(wrapped)) > 2 * MAX_SPIKE_SHARE
    assert spike_share(standardise(np.where(image < 15, noise, image))) > 2 * MAX_SPIKE_SHARE


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_network_intensities_do_not_depend_on_the_unit(scale):
    image = torch.from_numpy(whole_head().astype(np.float32))
    torch.testing.assert_close(normalise_intensity(image * scale), normalise_intensity(image))
