from __future__ import annotations

import tracemalloc

import numba
import numpy as np
import pytest
import scipy.stats
from safetensors.numpy import load_file, save_file

from bids_varaug.errors import UserError
from bids_varaug.segmentation.fuse import (
    MAPS,
    SparsePosterior,
    fuse_members,
    label_slabs,
    load_posterior,
    save_posterior,
    sparse_rows,
    summarise_members,
)
from bids_varaug.variability.measures import significant_bits, vote_entropy

SHAPE, K, MEMBERS = (6, 7, 8), 5, 4
TEMPERATURE = 1.5


def sparse_of(dense):
    """Keep the voxels that are not surely background."""
    flat = dense.reshape(-1, dense.shape[-1])
    stored = flat[:, 0] <= 1 - 1e-4
    return SparsePosterior(dense.argmax(-1).astype(np.uint8), sparse_rows(flat[stored], stored))


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
        save_posterior(found[-1], sparse_of(dense))
    return found


@pytest.fixture
def fusion(paths):
    return fuse_members(paths, temperature=TEMPERATURE)


def calibrated(posterior):
    """Roots of (..., K), scaled to sum to 1."""
    roots = posterior.astype(float) ** (1 / TEMPERATURE)
    return roots / roots.sum(-1, keepdims=True)


def entropy_of(posterior):
    """Of (..., K), bit."""
    return scipy.stats.entropy(calibrated(posterior), axis=-1, base=2)


@pytest.fixture
def maps(fusion):
    return fusion.maps


@pytest.fixture
def mean(members):
    return members.astype(float).mean(0).astype(np.float32)


def test_consensus_is_the_argmax_of_the_mean(fusion, mean):
    assert np.array_equal(fusion.mean.labels, mean.argmax(-1))


def test_mean_posterior_is_that_of_the_members(fusion, mean):
    dense = np.zeros((SHAPE[0], SHAPE[1] * SHAPE[2], K), np.float32)
    dense[..., 0] = 1
    dense.reshape(-1, K)[fusion.mean.stored] = fusion.mean.posterior
    np.testing.assert_allclose(dense.reshape(mean.shape), mean, atol=3e-7)


def test_entropy_is_that_of_the_votes(maps, members):
    votes = (members.argmax(-1)[..., None] == np.arange(K)).sum(0)
    expected = vote_entropy(np.moveaxis(votes, -1, 0).astype(np.uint8), MEMBERS)
    assert np.array_equal(maps["entropy"], expected)


def test_std_is_the_sample_std_of_the_consensus_label(fusion, maps, members):
    label = fusion.mean.labels[None, ..., None].astype(int)
    values = np.take_along_axis(members.astype(float), label, -1)[..., 0]
    np.testing.assert_allclose(maps["std"], values.std(0, ddof=1), atol=2e-7)


def test_sigbits_are_those_of_the_pure_function(fusion, maps, members, mean):
    label = fusion.mean.labels[..., None].astype(int)
    here = np.take_along_axis(mean, label, -1)[..., 0]
    values = np.take_along_axis(members.astype(float), label[None], -1)[..., 0]
    squares = ((values - values.mean(0)) ** 2).sum(0)
    expected = significant_bits(here, np.sqrt(squares / (MEMBERS - 1)))
    np.testing.assert_allclose(maps["sigbits"], expected, atol=1e-5)


def test_total_entropy_is_that_of_the_calibrated_mean(maps, mean):
    np.testing.assert_allclose(maps["total_entropy"], entropy_of(mean), atol=2e-3)  # rows below 1e-4 are not stored


def test_mutual_information_is_what_the_members_are_not_unsure_of_each(maps, members, mean):
    expected = entropy_of(mean) - entropy_of(members).mean(0)
    np.testing.assert_allclose(maps["mutual_information"], np.maximum(expected, 0), atol=4e-3)
    assert expected.max() > 0.5


def test_members_that_are_sure_of_two_labels_disagree_by_one_bit(tmp_path):
    paths = [tmp_path / "mca01.safetensors", tmp_path / "mca02.safetensors"]
    for path, label in zip(paths, (1, 2), strict=True):
        save_posterior(path, sparse_of(np.broadcast_to(np.eye(K, dtype=np.float32)[label], (1, 1, 2, K))))
    maps = fuse_members(paths, temperature=TEMPERATURE).maps
    for name, value in {"total_entropy": 1, "mutual_information": 1, "entropy": 1}.items():
        assert maps[name].ravel().tolist() == pytest.approx([value] * 2), name
    alike = fuse_members(paths[:1] * 2, temperature=TEMPERATURE).maps
    assert alike["mutual_information"].max() == 0


def test_soft_dice_is_that_of_consensus_and_calibrated_mean(fusion, mean):
    posterior, labels = calibrated(mean), fusion.mean.labels
    for k in range(1, K):
        inside = labels == k
        expected = 2 * posterior[inside, k].sum() / (inside.sum() + posterior[..., k].sum())
        assert fusion.soft_dice[k] == pytest.approx(expected, abs=1e-3)


def test_voxels_that_nobody_stores_are_surely_background(fusion, maps):
    assert not fusion.mean.labels[0].any()
    slab = {name: set(values[0].ravel().tolist()) for name, values in maps.items()}
    assert slab == {name: {24.0 if name == "sigbits" else 0.0} for name in MAPS}


def test_equal_members_have_no_spread_and_all_bits(paths):
    maps = fuse_members([paths[0]] * 3).maps
    assert maps["std"].max() == 0 and maps["sigbits"].min() == 24 and maps["entropy"].max() == 0
    assert maps["mutual_information"].max() < 1e-6


def test_a_family_has_the_spread_of_its_members_about_the_common_consensus(paths, members):
    assert set(fuse_members(paths, ["mca", "seed", "mca", "rr"]).maps) == {*MAPS, "entropy_mca"}
    fusion = fuse_members(paths, ["mca", "seed", "mca", "rr"], TEMPERATURE, family_maps=True)
    assert set(fusion.maps) == {*MAPS, *(f"{name}_mca" for name in MAPS)}  # one member has no spread
    label = fusion.mean.labels[None, ..., None].astype(int)
    values = np.take_along_axis(members[[0, 2]].astype(float), label, -1)[..., 0]
    np.testing.assert_allclose(fusion.maps["std_mca"], values.std(0, ddof=1), atol=2e-7)
    votes = members[[0, 2]].argmax(-1)
    split = votes[0] != votes[1]
    assert np.array_equal(fusion.maps["entropy_mca"], split.astype(np.float32))
    theirs = members[[0, 2]].astype(float)
    np.testing.assert_allclose(fusion.maps["total_entropy_mca"], entropy_of(theirs.mean(0)), atol=2e-3)
    information = entropy_of(theirs.mean(0)) - entropy_of(theirs).mean(0)
    np.testing.assert_allclose(fusion.maps["mutual_information_mca"], np.maximum(information, 0), atol=4e-3)


def test_families_together_are_not_the_sum_of_their_spreads(paths):
    alone = fuse_members(paths).maps
    together = fuse_members(paths, ["mca", "mca", "seed", "seed"]).maps
    for name in MAPS:
        assert np.array_equal(alone[name], together[name])


def test_ties_go_to_the_lower_class(tmp_path):
    dense = np.zeros((2, 1, 1, 1, 3), np.float32)
    dense[0, ..., 2] = dense[1, ..., 1] = 1
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for path, one in zip(paths, dense, strict=True):
        save_posterior(path, sparse_of(one))
    assert fuse_members(paths).mean.labels.item() == 1


def test_members_that_see_only_background_are_fused(tmp_path):
    dense = np.zeros((2, 3, 4, K), np.float32)
    dense[..., 0] = 1
    path = tmp_path / "a.safetensors"
    save_posterior(path, sparse_of(dense))
    assert fuse_members([path, path]).mean.labels.max() == 0


def test_one_member_is_its_own_consensus(paths, members):
    alone = fuse_members(paths[:1], ["ieee"], TEMPERATURE)
    assert np.array_equal(alone.mean.labels, members[0].argmax(-1))
    assert set(alone.maps) == set(MAPS)
    assert not alone.maps["std"].any() and not alone.maps["mutual_information"].any()
    np.testing.assert_allclose(alone.maps["total_entropy"], entropy_of(members[0]), atol=2e-3)


@pytest.mark.skipif(numba.config.NUMBA_NUM_THREADS < 2, reason="needs two threads")
def test_same_bits_with_one_and_two_threads(paths):
    before = numba.get_num_threads()
    fusions = []
    for threads in (1, 2):
        numba.set_num_threads(threads)
        fusions.append(fuse_members(paths))
    numba.set_num_threads(before)
    for name in MAPS:
        one, two = (fusion.maps[name].tobytes() for fusion in fusions)
        assert one == two
    assert fusions[0].mean.rows.data.tobytes() == fusions[1].mean.rows.data.tobytes()


@pytest.mark.parametrize("part", [np.s_[:, :, :-1], np.s_[:-1], np.s_[..., :-1]])
def test_members_on_different_boxes_are_refused(paths, members, tmp_path, part):
    other = tmp_path / "other.safetensors"
    save_posterior(other, sparse_of(members[0][part]))
    for files in ([*paths, other], [other, *paths]):
        with pytest.raises(UserError, match="other.safetensors"):
            fuse_members(files)


@pytest.mark.parametrize("damage", ["truncated", "text", "absent", "wrong class", "lost row", "label beyond"])
def test_damaged_file_is_named(paths, tmp_path, damage):
    if damage == "truncated":
        paths[1].write_bytes(paths[1].read_bytes()[:-10])
    elif damage == "text":
        paths[1].write_text("not a posterior")
    elif damage == "absent":
        paths[1].unlink()
    else:
        tensors = load_file(paths[1])
        part = {"wrong class": "classes", "lost row": "counts", "label beyond": "labels"}[damage]
        tensors[part].flat[tensors[part].argmax()] = 200
        save_file(tensors, paths[1], {"n_classes": str(K)})
    with pytest.raises(UserError, match="mca01.safetensors: this work file is damaged"):
        fuse_members(paths)


def test_summary_writes_the_mean_and_counts_all_members(paths, members, tmp_path):
    families = ["ieee", "mca", "mca", "seed"]
    assert set(np.load(summarise_members(paths, families, TEMPERATURE, tmp_path).maps)) == set(MAPS)
    files = summarise_members(paths, families, TEMPERATURE, tmp_path, family_maps=True)
    mean, maps, counts = load_posterior(files.mean), np.load(files.maps), np.load(files.counts)
    assert np.array_equal(mean.labels, members[1:].astype(float).mean(0).argmax(-1))
    assert counts["volumes"].shape == (MEMBERS, K)
    assert set(maps) == {*MAPS, *(f"{name}_mca" for name in MAPS)}
    expected = maps["entropy_mca"][mean.labels == 1].mean()
    assert counts["entropy_mean_mca"][1] == pytest.approx(expected)
    assert counts["uncertainty_mean"][1] == pytest.approx(maps["total_entropy"][mean.labels == 1].mean())
    assert counts["soft_dice"].shape == (K,)


def test_memory_does_not_grow_with_the_number_of_members(paths, tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "big.safetensors"
    save_posterior(path, sparse_of(rng.dirichlet([1] * 8, (20, 40, 40)).astype(np.float32)))
    fuse_members([path])  # what is allocated only once
    peaks = []
    for n_members in (4, 24):  # a third adds to the sum of two
        tracemalloc.start()
        fuse_members([path] * n_members)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.02 * peaks[0]


def test_label_slabs_are_the_members_labels(paths, members):
    slabs = np.concatenate(list(label_slabs(paths)), axis=1).reshape(members.shape[:-1])
    assert np.array_equal(slabs, members.argmax(-1))


def test_a_file_that_cannot_be_written_leaves_nothing(members, tmp_path):
    (tmp_path / "mean.safetensors").mkdir()
    with pytest.raises(OSError):
        save_posterior(tmp_path / "mean.safetensors", sparse_of(members[0]))
    assert [path.name for path in tmp_path.iterdir()] == ["mean.safetensors"]
