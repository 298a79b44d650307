from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import scipy.stats
from significantdigits import Error, Method, significant_digits

from bids_varaug.variability.measures import (
    RegionCounts,
    general_bits,
    mean_entropy,
    members_table,
    pairwise_dice,
    region_counts,
    region_table,
    significant_bits_lower,
)


@dataclass(frozen=True)
class Label:
    index: int
    name: str


LABELS = (Label(0, "Background"), Label(17, "Left-Hippocampus"), Label(53, "Right-Hippocampus"),
          Label(18, "Left-Amygdala"))  # fmt: skip
FAMILIES = ("ieee", "mca", "mca", "seed", "seed")
MEMBERS = ("ieee", "mca01", "mca02", "seed01", "seed02")
K = len(LABELS)


@pytest.fixture
def labels():
    """(M, 6, 100): class 3 is nowhere, class 2 only in one member."""
    rng = np.random.default_rng(0)
    common = rng.integers(0, 2, (6, 100))
    result = np.stack([np.where(rng.random(common.shape) < 0.1, 1 - common, common)
                       for _ in MEMBERS]).astype(np.uint8)  # fmt: skip
    result[1, 0, :5] = 2
    return result


@pytest.fixture
def counts(labels):
    return region_counts(np.moveaxis(labels, 1, 0), len(MEMBERS), K)


@pytest.fixture
def table(counts):
    entropy = np.array([0.0, 0.5, np.nan, np.nan])
    means = {"all": entropy, "mca": entropy / 2, "seed": entropy / 4}
    return region_table(counts, FAMILIES, LABELS, 8.0, means)


def naive_dice(a, b, k):
    a, b = a == k, b == k
    total = a.sum() + b.sum()
    return 2 * (a & b).sum() / total if total else np.nan


def test_volumes_are_counted_over_all_slabs(counts, labels):
    expected = [[(one == k).sum() for k in range(K)] for one in labels]
    assert np.array_equal(counts.volumes, expected)


def test_counts_do_not_depend_on_the_slabs(counts, labels):
    assert np.array_equal(region_counts([labels], len(MEMBERS), K).intersections, counts.intersections)


def test_dice_is_that_of_the_label_maps(counts, labels):
    expected = [[[naive_dice(a, b, k) for k in range(K)] for b in labels] for a in labels]
    np.testing.assert_allclose(pairwise_dice(counts), expected)


def test_structure_of_one_member_only_has_dice_zero(table):
    assert table.loc[table["index"] == 53, "dice_min_mca"].item() == 0


def test_structure_of_no_member_has_no_dice(table):
    assert table.loc[table["index"] == 18, ["dice_min", "dice_mean"]].isna().all(axis=None)


def test_pairs_that_both_lack_a_structure_are_ignored(table):
    assert np.isnan(table.loc[table["index"] == 53, "dice_mean_seed"].item())


def test_dice_over_all_leaves_the_baseline_out(table, counts):
    dice = pairwise_dice(counts)[..., 1]
    pairs = [dice[a, b] for a in range(1, 5) for b in range(a + 1, 5)]
    row = table.iloc[0]
    assert (row["dice_min"], row["dice_mean"]) == pytest.approx((min(pairs), np.mean(pairs)))


def test_dice_of_a_family_is_over_its_own_pairs(table, counts):
    assert table.iloc[0]["dice_min_seed"] == pairwise_dice(counts)[3, 4, 1]


MEASURES = ("volume_mean", "volume_std", "cv", "sigbits", "sigbits_lower", "dice_min", "dice_mean",
            "entropy_mean")  # fmt: skip


def test_columns_are_those_of_the_contract(table):
    within = [f"{name}_{family}" for family in ("mca", "seed") for name in MEASURES]
    assert list(table) == ["index", "name", *MEASURES, *within]


def test_measures_within_a_family_are_those_of_its_members_alone(table, counts):
    alone = RegionCounts(counts.volumes[3:], counts.intersections[3:, 3:])
    entropy = np.array([0.0, 0.125, np.nan, np.nan])
    expected = region_table(alone, ("seed", "seed"), LABELS, 8.0, dict.fromkeys(("all", "seed"), entropy))
    for name in MEASURES:
        assert table[f"{name}_seed"].equals(expected[name].rename(f"{name}_seed"))
        assert expected[name].equals(expected[f"{name}_seed"].rename(name))


def test_a_family_of_one_member_has_columns_without_values(counts):
    families = ("ieee", "mca", "mca", "mca", "seed")
    means = dict.fromkeys(("all", "mca"), np.zeros(K))
    table = region_table(counts, families, LABELS, 1.0, means)
    assert table[[f"{name}_seed" for name in MEASURES]].isna().all(axis=None)
    assert table["volume_mean_mca"].notna().all()


def test_background_is_not_a_row(table):
    assert table["index"].tolist() == [17, 53, 18]


def test_volumes_are_mm3_of_the_perturbed_members(table, counts):
    volumes = 8.0 * counts.volumes[1:, 1]
    row = table.iloc[0]
    assert (row["volume_mean"], row["volume_std"], row["cv"]) == pytest.approx(
        (volumes.mean(), volumes.std(ddof=1), volumes.std(ddof=1) / volumes.mean())
    )


def test_lower_bound_of_sigbits_is_the_packages(table, counts):
    volumes = counts.volumes[1:, 1].astype(float)[:, None]
    expected = significant_digits(volumes, reference=volumes.mean(0), axis=0)
    assert table.iloc[0]["sigbits_lower"] == pytest.approx(max(expected.item(), 0))


def test_sigbits_have_one_definition_in_tables_and_maps(table):
    row = table.iloc[0]
    assert row["sigbits"] == pytest.approx(-np.log2(row["volume_std"] / row["volume_mean"]))


def test_lower_bound_of_sigbits_follows_sohier():
    """CNH: -log2(sd / mean) less the margin; the package's sd divides by M."""
    volumes = np.array([1000.0, 1010, 990, 1005, 995, 1020, 1002, 985])
    count = len(volumes)
    margin = np.log2((count - 1) / scipy.stats.chi2.ppf(0.025, count - 1)) / 2
    margin += np.log2(scipy.stats.norm.ppf(0.975))
    expected = -np.log2(volumes.std(ddof=0) / volumes.mean()) - margin
    assert significant_bits_lower(volumes[:, None]) == pytest.approx(expected)


def test_volume_that_vanishes_in_some_members_has_no_bits():
    assert significant_bits_lower(np.array([[0.0], [0.0], [5.0]])).tolist() == [0]


def test_structure_of_no_member_has_no_sigbits(table):
    assert table.loc[table["index"] == 18, ["sigbits", "sigbits_lower"]].isna().all(axis=None)


def test_equal_volumes_have_all_bits():
    assert significant_bits_lower(np.full((4, 1), 1000)).tolist() == [24]


def test_one_member_has_a_volume_and_no_spread(labels):
    counts = region_counts([labels[:1]], 1, K)
    table = region_table(counts, ["ieee"], LABELS, 1.0, {"all": np.zeros(K)})
    assert list(table) == ["index", "name", *MEASURES]
    assert table[list(MEASURES[1:])].isna().all(axis=None)
    assert table["volume_mean"].tolist() == counts.volumes[0, 1:].tolist()


def test_members_table_has_every_member_and_structure(counts):
    table = members_table(counts, MEMBERS, FAMILIES, LABELS, 8.0)
    assert list(table) == ["member", "family", "index", "name", "volume"]
    assert len(table) == len(MEMBERS) * (K - 1)
    found = table[(table["member"] == "mca01") & (table["index"] == 53)]["volume"].item()
    assert found == 40.0


def test_mean_entropy_is_over_the_consensus_structure():
    labels = np.array([0, 1, 1, 1], np.uint8)
    entropy = np.array([5, 0, 1, 2], np.float32)
    assert mean_entropy(labels, entropy, 2).tolist() == [5, 1]


def test_label_beyond_the_classes_is_refused():
    with pytest.raises(ValueError, match="label 7"):
        region_counts([np.full((2, 3), 7, np.uint8)], 2, 3)


def test_slab_with_another_number_of_members_is_refused():
    with pytest.raises(ValueError, match="3 members"):
        region_counts([np.zeros((3, 4), np.uint8)], 2, 3)


def test_general_bits_are_those_of_the_package():
    values = np.random.default_rng(0).normal(1, 0.01, (5, 200)) * np.array([1, -3] * 100)
    published = significant_digits(
        values, reference=values.mean(axis=0), axis=0, error=Error.Relative, method=Method.General
    )
    np.testing.assert_array_equal(general_bits(values), published)
