"""Which structures a reader may trust, and why not."""

import json
import re
from importlib.resources import files

import numpy as np
import pandas as pd
import pytest

from bids_varaug.variability.quality import (
    LIMITS,
    VERDICTS,
    describe_limits,
    describe_verdicts,
    judge_regions,
    look_first,
    volume_limits,
)

MANY = {"mca": 10, "seed": 10}


def region(index=17, name="Left-Hippocampus", **values):
    """A table of one good structure, but for the values."""
    row = {"index": index, "name": name, "volume_mean": 4000.0, "volume_std": 40.0, "cv": 0.01,
           "cv_seed": 0.012, "expected_dice": 0.9}  # fmt: skip
    return pd.DataFrame([row | values])


def judge(members=MANY, voxel=1.0, age=None, sex=None, **values):
    """Verdict and reason of the one structure."""
    judged = judge_regions(region(**values), members, voxel, age, sex).iloc[0]
    return judged["verdict"], judged["reason"]


def test_nothing_is_said_against_a_good_structure():
    assert judge() == ("good", None)


def test_small_ventricle_of_large_spread_is_unreliable():
    verdict, reason = judge(index=44, name="Right-Inf-Lat-Vent", volume_mean=143.0, cv=0.389)
    assert verdict == "unreliable"
    assert reason == "CV 38.9 % (above 10 %); 143 voxels (fewer than 300)"


@pytest.mark.parametrize(
    ("values", "verdict", "reason"),
    [
        ({"cv": 0.049}, "good", None),
        ({"cv": 0.051}, "caution", "CV 5.1 % (above 5 %)"),
        ({"cv": 0.11}, "unreliable", "CV 11.0 % (above 10 %)"),
        ({"cv_seed": 0.11}, "unreliable", "CV 11.0 % (above 10 %)"),
        ({"expected_dice": 0.74}, "caution", "expected Dice 0.74 (below 0.75)"),
        ({"expected_dice": 0.59}, "unreliable", "expected Dice 0.59 (below 0.60)"),
        ({"expected_dice": 0.59, "cv": 0.3}, "unreliable", "CV 30.0 % (above 10 %); expected Dice 0.59 (below 0.60)"),
        ({"volume_mean": 0.0, "cv": np.nan, "expected_dice": np.nan}, "unreliable", "not found"),
        ({"volume_mean": np.nan}, "unreliable", "not found"),
    ],
)
def test_spread_overlap_and_presence(values, verdict, reason):
    assert judge(**values) == (verdict, reason)


@pytest.mark.parametrize(("voxel", "verdict"), [(1.0, "good"), (13.3, "good"), (13.4, "caution"), (41.0, "unreliable")])
def test_partial_volume_of_large_voxels(voxel, verdict):
    assert judge(voxel=voxel)[0] == verdict


def test_few_voxels_are_unreliable_whatever_members_say():
    verdict, reason = judge(voxel=64.0, cv=0.0, cv_seed=0.0, expected_dice=1.0)
    assert (verdict, reason) == ("unreliable", "62 voxels (fewer than 100)")


@pytest.mark.parametrize(
    ("members", "verdict", "reason"),
    [
        ({"seed": 5}, "good", None),
        ({"seed": 4}, "caution", "perturbed members: 4 (fewer than 5)"),
        ({"mca": 4, "seed": 10}, "caution", "4 of mca (fewer than 5 of a family)"),
        ({"mca": 1, "seed": 1}, "unknown", "spread unknown with 2 members"),
        ({"ieee": 1}, "unknown", "spread unknown with one member"),
    ],
)
def test_few_members_are_a_warning_of_their_own(members, verdict, reason):
    found = judge(members)
    assert found[0] == verdict and (reason is None or reason in found[1])


def test_without_spread_nothing_is_good():
    nothing = dict.fromkeys(("cv", "cv_seed"), np.nan)
    assert judge({"ieee": 1}, **nothing)[0] == "unknown"
    # One member knows how unsure it is.
    assert judge({"ieee": 1}, **nothing, expected_dice=0.3)[0] == "unreliable"


@pytest.mark.parametrize(
    ("volume", "age", "sex", "verdict"),
    [
        (2000.0, None, None, "good"),
        (2000.0, 25.0, None, "caution"),
        (2000.0, 82.0, "F", "good"),
        (1900.0, 82.0, "M", "caution"),
        (6500.0, 79.0, None, "caution"),
        (6500.0, 25.0, "M", "good"),
        (2000.0, 12.0, None, "good"),
        (2000.0, np.nan, None, "good"),
        (1000.0, None, None, "unreliable"),
        (1000.0, 90.0, "F", "unreliable"),
        (9000.0, 12.0, None, "unreliable"),
    ],
)
def test_volume_is_judged_by_age_and_sex(volume, age, sex, verdict):
    found, reason = judge(volume_mean=volume, age=age, sex=sex)
    assert found == verdict
    assert verdict == "good" or "implausibly" in reason


def test_limits_stand_in_the_table():
    judged = judge_regions(region(), MANY, 1.0, 80.0, "M").iloc[0]
    assert (judged["volume_low"], judged["volume_high"]) == pytest.approx((1980, 6200))


def test_structures_without_limits_are_judged_by_the_rest():
    assert judge(index=999, name="X") == ("good", None)
    assert judge(index=999, name="X", cv=0.2)[0] == "unreliable"


@pytest.mark.parametrize(("right", "count"), [(4000, 0), (3000, 0), (2000, 2), (0, 1)])
def test_sides_that_differ_call_for_caution_on_both(right, count):
    both = pd.concat([region(), region(index=53, name="Right-Hippocampus", volume_mean=right)])
    judged = judge_regions(both, MANY, 1.0)
    assert (judged["verdict"] != "good").sum() == count


def test_a_table_without_families_or_rows_is_judged():
    plain = region().drop(columns=["cv_seed"])
    assert judge_regions(plain, {"seed": 9}, 1.0)["verdict"].tolist() == ["good"]
    assert judge_regions(plain.iloc[:0], {"seed": 9}, 1.0).empty


def test_every_shipped_structure_has_limits_within_those_of_all_adults():
    table = pd.read_csv(str(files("bids_varaug.data") / "aseg31.tsv"), sep="\t")
    assert set(table["index"]) - {0} == set(LIMITS.index)
    low, high = volume_limits(LIMITS.index)
    for age in (18, 35, 60, 99):
        for sex in ("F", "M", None):
            at_age = volume_limits(LIMITS.index, age, sex)
            assert (at_age[0] > 0.999 * low).all() and (at_age[1] < 1.001 * high).all()


@pytest.mark.parametrize(
    ("age", "sex", "words"),
    [(None, None, "unknown"), (np.nan, "F", "unknown"), (12.25, "F", "none for 12.2 years"),
     (63.0, "F", "women of 63 years"), (63.0, "O", "adults of 63 years")],
)  # fmt: skip
def test_whom_the_limits_are_for_is_said(age, sex, words):
    assert words in describe_limits(age, sex)


def test_the_worst_structures_are_named_first():
    rows = [region(name=f"S{n}", index=900 + n, cv=0.11 + n / 100) for n in range(5)]
    judged = judge_regions(pd.concat([*rows, region(), region(cv=0.06)]), MANY, 1.0)
    unreliable, caution = describe_verdicts(judged, n_named=2)
    assert unreliable == (
        "5 of 7 structures unreliable: S4, CV 15.0 % (above 10 %); S3, CV 14.0 % (above 10 %) and 3 more."
    )
    assert caution.startswith("1 of 7 structures with caution: Left-Hippocampus")
    assert describe_verdicts(judge_regions(region(), MANY, 1.0)) == []


def test_without_spread_the_structures_of_least_expected_dice_are_named_first():
    dice = {"S0": 0.5, "S1": 0.49, "S2": 0.48}
    rows = [region(name=name, index=900, cv=np.nan, cv_seed=np.nan, expected_dice=d) for name, d in dice.items()]
    told, *_ = describe_verdicts(judge_regions(pd.concat(rows), {"ieee": 1}, 1.0), n_named=1)
    assert told == "3 of 3 structures unreliable: S2, expected Dice 0.48 (below 0.60) and 2 more."


def test_a_reason_that_all_share_is_told_once():
    rows = [region(name=f"S{n}", index=900 + n) for n in range(5)]
    (told,) = describe_verdicts(judge_regions(pd.concat(rows), {"mca": 1, "seed": 1}, 1.0))
    assert told == "5 of 5 structures not judged: spread unknown with 2 members."


def test_a_reason_that_all_share_does_not_hide_those_of_single_structures():
    """An ensemble of three members says of every structure that these are few."""
    cvs = {"S0": 0.01, "S1": 0.07, "S2": 0.02, "S3": 0.2}
    rows = [region(name=name, index=900, cv=cv) for name, cv in cvs.items()]
    judged = judge_regions(pd.concat(rows), {"mca": 1, "seed": 2}, 1.0)
    assert describe_verdicts(judged) == [
        "1 of 4 structures unreliable: S3, CV 20.0 % (above 10 %).",
        "3 of 4 structures with caution: perturbed members: 3 (fewer than 5); S1, CV 7.0 % (above 5 %).",
    ]
    assert (judged["verdict"] != "good").all() and judged["reason"].str.contains("fewer than 5").all()


@pytest.fixture
def doubtful():
    """Two structures of 2 mm voxels, beside each other; errors crowd at three places."""
    labels, wrong = np.zeros((50, 20, 20), np.int16), np.zeros((50, 20, 20), np.float32)
    labels[5:25, 2:18, 2:18], labels[25:45, 2:18, 2:18] = 17, 53
    for x, y, z, share in ((8, 10, 10, 0.9), (22, 5, 5, 0.8), (27, 5, 5, 1.0), (40, 12, 9, 0.3)):
        wrong[x - 1 : x + 2, y - 1 : y + 2, z - 1 : z + 2] = share
    wrong[30, 15, 15] = 1.0  # alone
    return labels, wrong, np.array([[-2.0, 0, 0, 90], [0, 2, 0, -20], [0, 0, 2, 5], [0, 0, 0, 1]])


def judged(**verdicts):
    """Verdict and reason of each side; a third structure was not found."""
    absent = (90, "Absent", "unreliable", "not found")
    rows = [(17, "Left", *verdicts["Left"]), (53, "Right", *verdicts["Right"]), absent]
    return pd.DataFrame(rows, columns=["index", "name", "verdict", "reason"])


def test_places_are_those_of_most_expected_errors_in_the_worst_structures(doubtful):
    labels, wrong, affine = doubtful
    good, caution = ("good", None), ("caution", "CV 7.0 % (above 5 %); 50 voxels (fewer than 300)")
    places = look_first(judged(Left=good, Right=good), labels, wrong, affine)
    assert [(place["Structure"], place["Voxel"]) for place in places] == [("Right", [27, 5, 5]), ("Left", [8, 10, 10])]
    assert places[0]["World"] == [90 - 2 * 27, -20 + 2 * 5, 5 + 2 * 5] and places[0]["Index"] == 53
    assert re.fullmatch(r"around here \d+ % of the labels are expected to be wrong", places[0]["Reason"])
    places = look_first(judged(Left=caution, Right=good), labels, wrong, affine)
    assert places[0]["Structure"] == "Left" and places[0]["Reason"].startswith("CV 7.0 % (above 5 %); around here")
    assert json.loads(json.dumps(places)) == places


def test_places_do_not_lie_next_to_each_other(doubtful):
    labels, wrong, affine = doubtful
    wrong[8, 10, 10] = wrong[7:10, 9:12, 9:12] = 0
    good = ("good", None)
    # What is left on the left lies 10 mm from the place on the right.
    (place,) = look_first(judged(Left=good, Right=good), labels, wrong, affine)
    assert place["Structure"] == "Right"


def test_without_labels_there_is_no_place_to_look_at(doubtful):
    labels, wrong, affine = doubtful
    assert look_first(judged(Left=("good", None), Right=("good", None)), labels * 0, wrong, affine) == []


def test_verdicts_run_from_best_to_worst():
    assert list(VERDICTS) == ["good", "caution", "unknown", "unreliable"]


def test_healthy_adults_rarely_get_a_warning(shared_data):
    """9 of 1,043 FreeSurfer segmentations, by age and sex (benchmarks/plausible_volumes.py)."""
    table = pd.read_csv(shared_data / "brain_age" / "fcon1000_freesurfer.tsv", sep="\t")
    table = table[table["age"] >= 18].iloc[::4]
    names = {4: "Left-Lateral-Ventricle", 17: "Left-Hippocampus", 53: "Right-Hippocampus",
             43: "Right-Lateral-Ventricle", 18: "Left-Amygdala"}  # fmt: skip
    regions = pd.DataFrame({"index": names.keys(), "name": names.values()})
    told = 0
    for _, person in table.iterrows():
        volumes = regions.assign(volume_mean=person[list(names.values())].to_numpy(float))
        judged = judge_regions(volumes, MANY, 1e-3, person["age"], person["sex"])
        told += (judged["verdict"] != "good").any()
    assert told <= 0.01 * len(table)
