from __future__ import annotations

import tracemalloc

import numba
import numpy as np
import pytest
from safetensors.numpy import load_file

from bids_varaug.errors import UserError
from bids_varaug.segmentation.fuse import fuse_members
from bids_varaug.segmentation.posterior import SparsePosterior, load_posterior, save_posterior
from bids_varaug.segmentation.streams import (
    PosteriorReader,
    PosteriorWriter,
    label_slabs,
)
from bids_varaug.variability.maps import (
    sample_std,
    significant_bits,
    unreliable,
    vote_entropy,
)

SHAPE, K, MEMBERS = (6, 7, 8), 5, 4


def sparse_of(dense):
    """Keep the voxels that are not surely background."""
    flat = dense.reshape(dense.shape[0], -1, dense.shape[-1])
    stored = flat[..., 0] <= 1 - 1e-4
    return SparsePosterior(
        labels=dense.argmax(-1).astype(np.uint8),
        offsets=np.concatenate([[0], np.cumsum(stored.sum(1))]),
        voxels=np.nonzero(stored)[1].astype(np.int32),
        posterior=np.ascontiguousarray(flat[stored]),
    )


def random_posterior(seed):
    rng = np.random.default_rng(seed)
    dense = rng.dirichlet([0.4] * K, SHAPE).astype(np.float32)
    # Two slabs are empty, one is full, of the others each member stores different voxels.
    away = rng.random(SHAPE) < 0.4
    away[0], away[3], away[-1] = True, False, True
    dense[away] = np.eye(K, dtype=np.float32)[0]
    return dense


@pytest.fixture
def members():
    """Dense posteriors, (M, X, Y, Z, K) float32."""
    return np.stack([random_posterior(seed) for seed in range(MEMBERS)])


@pytest.fixture
def paths(members, tmp_path):
    found = []
    for number, dense in enumerate(members):
        found.append(tmp_path / f"mca{number:02}.safetensors")
        save_posterior(found[-1], sparse_of(dense), {"member": f"mca{number:02}"})
    return found


@pytest.fixture
def fusion(paths, tmp_path):
    return fuse_members(paths, tmp_path / "mean.safetensors")


@pytest.fixture
def mean(members):
    return members.astype(float).mean(0).astype(np.float32)


def test_consensus_is_the_argmax_of_the_mean(fusion, mean):
    assert np.array_equal(fusion.labels, mean.argmax(-1))


def test_mean_posterior_is_written(fusion, mean, tmp_path):
    written = load_posterior(tmp_path / "mean.safetensors")
    dense = np.zeros((SHAPE[0], SHAPE[1] * SHAPE[2], K), np.float32)
    dense[..., 0] = 1
    slab = np.repeat(np.arange(SHAPE[0]), np.diff(written.offsets))
    dense[slab, written.voxels] = written.posterior
    np.testing.assert_allclose(dense.reshape(mean.shape), mean, atol=1e-7)


def test_written_labels_are_the_consensus(fusion, tmp_path):
    assert np.array_equal(load_file(tmp_path / "mean.safetensors")["labels"], fusion.labels)


def test_entropy_is_that_of_the_votes(fusion, members):
    votes = (members.argmax(-1)[..., None] == np.arange(K)).sum(0)
    expected = vote_entropy(np.moveaxis(votes, -1, 0).astype(np.uint8), MEMBERS)
    assert np.array_equal(fusion.entropy, expected)


def test_std_is_the_sample_std_of_the_consensus_label(fusion, members):
    label = fusion.labels[None, ..., None].astype(int)
    values = np.take_along_axis(members.astype(float), label, -1)[..., 0]
    np.testing.assert_allclose(fusion.std, values.std(0, ddof=1), atol=1e-7)


def test_sigbits_are_those_of_the_pure_function(fusion, members, mean):
    label = fusion.labels[..., None].astype(int)
    here = np.take_along_axis(mean, label, -1)[..., 0]
    values = np.take_along_axis(members.astype(float), label[None], -1)[..., 0]
    squares = ((values - values.mean(0)) ** 2).sum(0)
    expected = significant_bits(here, sample_std(squares, MEMBERS))
    np.testing.assert_allclose(fusion.sigbits, expected, atol=1e-5)


def test_share_counts_the_votes_for_the_consensus(fusion, members):
    assert np.array_equal(fusion.share, (members.argmax(-1) == fusion.labels).mean(0))


def test_unreliable_voxels_follow_the_share(fusion):
    assert np.array_equal(fusion.unreliable, unreliable(fusion.share))


def test_voxels_that_nobody_stores_are_surely_background(fusion):
    slab = (fusion.labels[0], fusion.entropy[0], fusion.std[0], fusion.sigbits[0], fusion.share[0])
    assert [set(values.ravel().tolist()) for values in slab] == [{0}, {0.0}, {0.0}, {24.0}, {1.0}]


def test_equal_members_have_no_spread_and_all_bits(paths, tmp_path):
    fusion = fuse_members([paths[0]] * 3, tmp_path / "mean.safetensors")
    assert fusion.std.max() == 0 and fusion.sigbits.min() == 24 and fusion.entropy.max() == 0


def test_ties_go_to_the_lower_class(tmp_path):
    dense = np.zeros((2, 1, 1, 1, 3), np.float32)
    dense[0, ..., 2] = dense[1, ..., 1] = 1
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for path, one in zip(paths, dense, strict=True):
        save_posterior(path, sparse_of(one), {})
    assert fuse_members(paths, tmp_path / "mean.safetensors").labels.item() == 1


def test_members_that_see_only_background_are_fused(tmp_path):
    dense = np.zeros((2, 3, 4, K), np.float32)
    dense[..., 0] = 1
    path = tmp_path / "a.safetensors"
    save_posterior(path, sparse_of(dense), {})
    assert fuse_members([path, path], tmp_path / "mean.safetensors").labels.max() == 0


def test_one_member_is_its_own_consensus(paths, members, tmp_path):
    fusion = fuse_members(paths[:1], tmp_path / "mean.safetensors")
    assert np.array_equal(fusion.labels, members[0].argmax(-1))


@pytest.mark.skipif(numba.config.NUMBA_NUM_THREADS < 2, reason="needs two threads")
def test_same_bits_with_one_and_two_threads(paths, tmp_path):
    before = numba.get_num_threads()
    files, fusions = [], []
    for threads in (1, 2):
        numba.set_num_threads(threads)
        fusions.append(fuse_members(paths, tmp_path / "mean.safetensors"))
        files.append((tmp_path / "mean.safetensors").read_bytes())
    numba.set_num_threads(before)
    assert files[0] == files[1]
    for name in ("labels", "entropy", "std", "sigbits", "share", "unreliable"):
        assert getattr(fusions[0], name).tobytes() == getattr(fusions[1], name).tobytes()


def test_members_on_different_boxes_are_refused(paths, members, tmp_path):
    other = tmp_path / "other.safetensors"
    save_posterior(other, sparse_of(members[0][:, :, :-1]), {})
    with pytest.raises(UserError, match="other.safetensors"):
        fuse_members([*paths, other], tmp_path / "mean.safetensors")


@pytest.mark.parametrize("damage", ["truncated", "text", "absent"])
def test_damaged_file_is_named(paths, tmp_path, damage):
    if damage == "truncated":
        paths[1].write_bytes(paths[1].read_bytes()[:-10])
    elif damage == "text":
        paths[1].write_text("not a posterior")
    else:
        paths[1].unlink()
    with pytest.raises(UserError, match="mca01.safetensors: this work file is damaged"):
        fuse_members(paths, tmp_path / "mean.safetensors")


def test_metadata_is_kept(paths, tmp_path):
    fuse_members(paths, tmp_path / "mean.safetensors", {"sha256": "abc"})
    reader = PosteriorReader.open(tmp_path / "mean.safetensors")
    assert reader.metadata == {"members": "4", "sha256": "abc"}


def test_memory_does_not_grow_with_the_number_of_members(paths, tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "big.safetensors"
    save_posterior(path, sparse_of(rng.dirichlet([1] * 8, (20, 40, 40)).astype(np.float32)), {})
    fuse_members([path], tmp_path / "mean.safetensors")  # what is allocated only once
    peaks = []
    for n_members in (2, 16):
        tracemalloc.start()
        fuse_members([path] * n_members, tmp_path / "mean.safetensors")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]


def test_label_slabs_are_the_members_labels(paths, members):
    slabs = np.stack(list(label_slabs(paths)), axis=1).reshape(members.shape[:-1])
    assert np.array_equal(slabs, members.argmax(-1))


def test_unfinished_file_leaves_nothing(tmp_path):
    writer = PosteriorWriter(tmp_path / "mean.safetensors", (2, 1, 1), 2, {})
    writer.write(np.zeros(1, np.int32), np.full((1, 2), 0.5, np.float32))
    with pytest.raises(ValueError, match="1 slabs"):
        writer.finish(np.zeros((2, 1, 1), np.uint8))
    assert list(tmp_path.iterdir()) == []
