from __future__ import annotations

import numba
import numpy as np
import pytest

from bids_varaug.images.conform import Box, resample_map, resample_posterior
from tests.images.conftest import grids

K = 4
BOX = Box(start=(2, -1, 3), shape=(8, 6, 7))
CONFORMED = (12, 10, 11)


@pytest.fixture
def sparse():
    """A random posterior on the box, about half of its voxels stored."""
    rng = np.random.default_rng(0)
    stored = rng.random(np.prod(BOX.shape)) < 0.5
    return stored, rng.dirichlet([0.3] * K, stored.sum()).astype(np.float32)


@pytest.fixture
def dense(sparse):
    """The same on the whole conformed grid, (X, Y, Z, K)."""
    stored, posterior = sparse
    full = np.zeros((*CONFORMED, K), np.float32)
    full[..., 0] = 1
    for voxel, row in zip(np.argwhere(stored.reshape(BOX.shape)) + BOX.start, posterior, strict=True):
        if (voxel >= 0).all() and (voxel < CONFORMED).all():
            full[tuple(voxel)] = row
    return full


def resample(sparse, affine, shape, **options):
    """Labels and posterior on that grid."""
    geometry = grids(np.eye(4), CONFORMED, affine, shape, BOX)
    out = np.zeros((*shape, K), np.uint8)
    return resample_posterior(*sparse, geometry, out, **options), out


def dense_to_native(values, affine, shape):
    return resample_map(values, grids(np.eye(4), CONFORMED, affine, shape))


def test_same_grid_gives_the_quantised_rows(sparse, dense):
    _, posterior = resample(sparse, np.eye(4), CONFORMED)
    assert np.array_equal(posterior, np.floor(dense * np.float32(255) + np.float32(0.5)))


def test_same_grid_gives_the_most_probable_class(sparse, dense):
    assert np.array_equal(resample(sparse, np.eye(4), CONFORMED)[0], dense.argmax(-1))


def test_flipped_and_permuted_grid_is_a_copy(sparse, dense):
    affine = np.array([[0, 0, -1.0, 11], [1, 0, 0, 0], [0, -1, 0, 10], [0, 0, 0, 1]])
    labels, _ = resample(sparse, affine, (10, 11, 12))
    expected = dense.transpose(1, 2, 0, 3)[:, ::-1, ::-1]
    assert np.array_equal(labels, expected.argmax(-1))


@pytest.mark.parametrize("size", [0.5, 0.7, 1.5, 3.0])
def test_other_voxel_sizes_give_the_mix_of_the_dense_posterior(sparse, dense, size):
    shape = tuple(int(n / size) for n in CONFORMED)
    affine = np.diag([size, size, size, 1])
    _, posterior = resample(sparse, affine, shape)
    for k in range(K):
        expected = dense_to_native(dense[..., k], affine, shape)
        np.testing.assert_allclose(posterior[..., k] / 255, expected, atol=0.5 / 255 + 1e-6)


def test_labels_alone_are_the_same_labels(sparse):
    affine, shape = np.diag([0.8, 0.8, 0.8, 1]), (15, 12, 13)
    alone = resample_posterior(*sparse, grids(np.eye(4), CONFORMED, affine, shape, BOX))
    assert np.array_equal(alone, resample(sparse, affine, shape)[0])


@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_temperature_changes_probabilities_after_resampling_and_no_label(
    sparse, dense, temperature
):
    affine, shape = np.diag([0.7, 1.5, 1, 1]), (17, 6, 11)
    mixed = [dense_to_native(dense[..., k], affine, shape) for k in range(K)]
    power = np.stack(mixed, axis=-1).astype(np.float64) ** (1 / temperature)
    labels, posterior = resample(sparse, affine, shape, temperature=temperature)
    expected = power / power.sum(-1, keepdims=True)
    np.testing.assert_allclose(posterior / 255, expected, atol=0.5 / 255 + 1e-5)
    assert np.array_equal(labels, resample(sparse, affine, shape)[0])


def test_posterior_can_be_written_into_a_file(sparse, tmp_path):
    out = np.memmap(tmp_path / "posterior", np.uint8, "w+", shape=(*CONFORMED, K))
    geometry = grids(np.eye(4), CONFORMED, np.eye(4), CONFORMED, BOX)
    resample_posterior(*sparse, geometry, out=out)
    assert np.array_equal(out, resample(sparse, np.eye(4), CONFORMED)[1])
    with pytest.raises(ValueError, match="out must be uint8"):
        resample_posterior(*sparse, geometry, out=out[:-1])


def test_sizes_that_do_not_fit_are_refused(sparse):
    stored, posterior = sparse
    with pytest.raises(ValueError, match="cannot assign"):
        resample((stored, posterior[1:]), np.eye(4), CONFORMED)
    with pytest.raises(ValueError, match="cannot reshape"):
        resample((stored[:-1], posterior[: stored[:-1].sum()]), np.eye(4), CONFORMED)


@pytest.mark.skipif(numba.config.NUMBA_NUM_THREADS < 2, reason="needs two threads")
def test_same_bits_with_one_and_two_threads(sparse):
    before = numba.get_num_threads()
    results = []
    for threads in (1, 2):
        numba.set_num_threads(threads)
        results.append(resample(sparse, np.diag([0.7, 0.7, 0.7, 1]), (17, 14, 15)))
    numba.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        assert np.array_equal(one, two)
