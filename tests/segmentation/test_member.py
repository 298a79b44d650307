"""One member on one head: plain, and under random rounding."""

from itertools import combinations

import numpy as np
import pytest

from bids_varaug.images.conform import Box, Geometry
from bids_varaug.models.ensemble import (
    Ensemble,
    Label,
    Member,
    NetworkShape,
    round_inference,
    write_manifest,
)
from bids_varaug.models.unet import build_network, save_weights
from bids_varaug.segmentation.fuse import load_posterior
from bids_varaug.segmentation.predict import segment_with_member

SHAPE = NetworkShape(4, (16, 16, 16), 16)


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ensemble")
    checksum = save_weights(build_network(SHAPE, 3), folder / "ieee.safetensors")
    members = (Member("ieee", "ieee", 0, None, "ieee.safetensors", checksum),)
    labels = tuple(Label(index, str(index), "#000000") for index in range(4))
    made = Ensemble("one", "1", folder, 1.0, labels, SHAPE, members, {})
    write_manifest(made)
    return made


@pytest.fixture(scope="module")
def head():
    image = np.random.default_rng(0).normal(0, 5, (32, 40, 48)).astype(np.float32)
    image[8:24, 8:32, 8:40] += 100
    return image


@pytest.fixture
def segment(ensemble, head, tmp_path):
    """What a member writes: stored voxels (V,) bool and their posterior (N, K) float32."""

    def run(member: Member) -> tuple[np.ndarray, np.ndarray]:
        path = tmp_path / "posterior.safetensors"
        box, affine = Box((0, 0, 0), head.shape), np.eye(4)
        geometry = Geometry(1.0, box, head.shape, affine, head.shape, affine, 0.0, ())
        segment_with_member(head, geometry, str(ensemble.directory), member, path, "cpu", 1)
        sparse = load_posterior(path)
        return sparse.stored, sparse.posterior

    return run


def equal(one, other) -> bool:
    """Whether two members wrote the same bits."""
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_rounding_changes_a_few_last_bits(ensemble, segment):
    stored, plain = segment(ensemble.members[0])
    stored_rounded, rounded = segment(round_inference(ensemble, 1, 0)[0])
    assert np.array_equal(stored, stored_rounded)
    assert 0 < np.abs(plain - rounded).max() < 1e-3


def test_same_seed_gives_the_same_bits(ensemble, segment):
    member = round_inference(ensemble, 1, 0)[0]
    assert equal(segment(member), segment(member))


def test_each_seed_gives_other_bits(ensemble, segment):
    members = (*round_inference(ensemble, 2, 0), *round_inference(ensemble, 1, 1))
    results = [segment(member) for member in members]
    assert not any(equal(one, other) for one, other in combinations(results, 2))


def test_rounding_ends_with_its_member(ensemble, segment):
    before = segment(ensemble.members[0])
    segment(round_inference(ensemble, 1, 0)[0])
    assert equal(segment(ensemble.members[0]), before)


def test_image_is_not_touched(ensemble, segment, head):
    before = head.copy()
    segment(round_inference(ensemble, 1, 0)[0])
    assert np.array_equal(head, before)
