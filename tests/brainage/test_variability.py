"""Numerical against anatomical variability, on cohorts whose truth is known."""

import numpy as np
import pandas as pd
import pytest

from bids_varaug.brainage.cohort import Cohort
from bids_varaug.brainage.variability import compare_pipelines, numerical_variability
from bids_varaug.derivatives.io import summarise_regions
from bids_varaug.errors import UserError


def make_cohort(people=40, members=8, features=3, ratio=0.2, images=1, seed=0, heavy=False):
    rng = np.random.default_rng(seed)
    x = 100 * ratio * rng.standard_normal((people * images, members, features))
    x += np.repeat(1000 + 100 * rng.standard_normal((people, 1, features)), images, axis=0)
    table = pd.DataFrame(
        {
            "participant_id": [f"sub-{i // images:03d}" for i in range(people * images)],
            "observation": [f"image{i}" for i in range(people * images)],
            "age": 30.0,
        }
    ).assign(session_id=None, sex=None, site=None)
    names = tuple(f"structure{f}" for f in range(features))
    ids = tuple(f"mca{m:02d}" for m in range(members))
    return Cohort(table, names, x.mean(axis=1), x, ids)


def test_formulas_are_those_of_the_docstring():
    cohort = make_cohort(people=12, members=5, features=1, ratio=0.5)
    row = numerical_variability(cohort).iloc[0]
    x = cohort.members[:, :, 0]
    numerical = x.var(axis=1, ddof=1)
    assert row["sd_num"] == pytest.approx(np.sqrt(numerical.mean()))
    between = x.mean(axis=1).var(ddof=1) - numerical.mean() / 5
    assert row["sd_anat"] == pytest.approx(np.sqrt(between))
    assert row["ratio"] == pytest.approx(row["sd_num"] / row["sd_anat"])
    # As in Chatelain's notebooks: variance over people of each run, averaged over the runs.
    assert row["npv"] == pytest.approx(np.sqrt(numerical.mean() / x.var(axis=0, ddof=1).mean()))
    assert (row["n_participants"], row["n_members"]) == (12, 5)


@pytest.mark.parametrize("ratio", [0.2, 1.0])
def test_truth_is_recovered_without_bias_from_the_number_of_members(ratio):
    few = numerical_variability(make_cohort(400, 2, 20, ratio))
    many = numerical_variability(make_cohort(400, 10, 20, ratio))
    assert few["ratio"].median() == pytest.approx(ratio, rel=0.05)
    assert many["ratio"].median() == pytest.approx(ratio, rel=0.05)
    expected = ratio / np.sqrt(1 + ratio**2)
    assert many["npv"].median() == pytest.approx(expected, rel=0.05)


def test_limits_hold_the_truth_about_as_often_as_they_say():
    # 300 features of the same truth; nominal 95 %, 3 standard errors are 4 %.
    table = numerical_variability(make_cohort(30, 6, 300, 0.3))
    held = ((table["low"] <= 0.3) & (table["high"] >= 0.3)).mean()
    assert 0.90 <= held <= 0.985
    assert (table["low"] < table["ratio"]).all() and (table["ratio"] < table["high"]).all()


def test_images_of_a_person_are_no_further_people():
    once = make_cohort(30, 6, 2, 0.3)
    twice = Cohort(
        pd.concat([once.people, once.people.assign(observation=once.people["observation"] + "b")],
                  ignore_index=True),
        once.names, np.tile(once.baseline, (2, 1)), np.tile(once.members, (2, 1, 1)),
        once.member_ids,
    )  # fmt: skip
    a, b = (numerical_variability(c) for c in (once, twice))
    assert b["n_participants"].tolist() == [30, 30]
    assert np.allclose(a["sd_num"], b["sd_num"])
    # The second image is a copy here, so the limits must not be narrower than those of one.
    width = [(t["high"] - t["low"]) / t["ratio"] for t in (a, b)]
    assert np.allclose(width[0], width[1], rtol=0.3)


def test_missing_members_leave_the_others_in():
    cohort = make_cohort(20, 6, 2, 0.3)
    members = cohort.members.copy()
    members[0, 4:] = np.nan
    members[1, 1:, 0] = np.nan  # one value, no spread: not counted for this feature
    holed = Cohort(cohort.people, cohort.names, cohort.baseline, members, cohort.member_ids)
    table = numerical_variability(holed)
    assert table["n_participants"].tolist() == [19, 20]
    variances = np.nanvar(members[:, :, 1], axis=1, ddof=1)
    assert table["sd_num"][1] == pytest.approx(np.sqrt(variances.mean()))


def test_degenerate_features():
    cohort = make_cohort(10, 4, 3, 0.3)
    members = cohort.members.copy()
    members[:, :, 0] = 7.0  # constant
    members[:, :, 1] = members[:, :1, 1]  # no numerical spread
    members[:, :, 2] = np.array([1.0, 2, 3, 4])  # nothing but numerical spread
    table = numerical_variability(
        Cohort(cohort.people, cohort.names, cohort.baseline, members, cohort.member_ids)
    )
    assert np.isnan(table["ratio"][0])
    assert table["ratio"][1] == 0 and table["n_needed"][1] == 4
    assert table["ratio"][2] == np.inf and np.isfinite(table["n_needed"][2])


def test_without_members_there_is_nothing_to_tell():
    cohort = make_cohort()
    alone = Cohort(cohort.people, cohort.names, cohort.baseline)
    with pytest.raises(ValueError, match="needs members"):
        numerical_variability(alone)


def test_published_ratios_follow_the_same_definition(shared_data):
    path = shared_data / "paper_tables/freesurfer_npv/npv_hc_baseline_subcortical_volume.csv"
    table = pd.read_csv(path).dropna(subset=["npv"])
    assert np.allclose(table["npv"], table["num"] / table["anat"])
    # A cohort drawn from their hippocampus gives their ratio back.
    row = table.set_index("region").loc["Left-Hippocampus"]
    rng = np.random.default_rng(1)
    population = np.sqrt(row["anat"] ** 2 - row["num"] ** 2)
    cohort = make_cohort(2000, 10, 1)
    values = 4000 + population * rng.standard_normal((2000, 1, 1))
    values = values + row["num"] * rng.standard_normal((2000, 10, 1))
    cohort = Cohort(cohort.people, cohort.names, values.mean(axis=1), values, cohort.member_ids)
    ours = numerical_variability(cohort).iloc[0]
    assert ours["npv"] == pytest.approx(row["npv"], rel=0.05)


def write_dice(folder, name, rows):
    path = folder / name.split("_")[0] / "anat" / f"{name}_seg-varaug_desc-consensus_dseg.tsv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("index\tname\tdice_min\n" + rows)
    return path


def test_minimum_dice_is_a_mean_over_people(tmp_path):
    write_dice(tmp_path, "sub-01_run-1", "17\tHip\t0.8\n18\tAmy\tn/a\n")
    write_dice(tmp_path, "sub-01_run-2", "17\tHip\t0.6\n")
    write_dice(tmp_path, "sub-02", "17\tHip\t0.9\n18\tAmy\tn/a\n")
    assert summarise_regions(tmp_path) == {"dice_min": {"Hip": pytest.approx(0.8)}, "unreliable": {}}
    only = summarise_regions(tmp_path, {"sub-02": "sub-02"})
    assert only == {"dice_min": {"Hip": pytest.approx(0.9)}, "unreliable": {}}
    assert summarise_regions(tmp_path / "nothing") == {"dice_min": {}, "unreliable": {}}


def test_unreliable_structures_are_a_share_of_the_images(tmp_path):
    for name, verdict in (("sub-01_run-1", "unreliable"), ("sub-01_run-2", "good"),
                          ("sub-02", "caution"), ("sub-03", "unreliable")):  # fmt: skip
        path = write_dice(tmp_path, name, "")
        path.write_text(f"name\tdice_min\tverdict\nHip\t0.9\tgood\nAmy\t0.9\t{verdict}\n")
    assert summarise_regions(tmp_path)["unreliable"] == {"Hip": 0.0, "Amy": 0.5}


def test_damaged_dice_table_is_named(tmp_path):
    path = write_dice(tmp_path, "sub-01", "17\tHip\t0.8\n")
    path.write_text("index\tname\n17\tHip\n")
    with pytest.raises(UserError, match="sub-01_seg-varaug.*dice_min"):
        summarise_regions(tmp_path)


def numerics(ratio):
    ratio = np.asarray(ratio, float)
    names = [f"structure{i}" for i in range(len(ratio))]
    return pd.DataFrame({"name": names, "ratio": ratio, "cv": ratio / 10, "dice_min": np.nan})


def test_pipelines_that_differ_by_a_factor():
    rng = np.random.default_rng(0)
    other = np.exp(rng.normal(-2, 1, 30))
    table = compare_pipelines(numerics(0.5 * other * np.exp(rng.normal(0, 0.1, 30))),
                              numerics(other)).set_index("measure")  # fmt: skip
    row = table.loc["ratio"]
    assert row["n"] == 30 and row["p_value"] < 1e-6
    assert row["low"] < row["ratio"] < row["high"]
    assert row["ratio"] == pytest.approx(0.5, rel=0.1)
    assert "1 - dice_min" not in table.index  # not known


def test_left_and_right_of_a_structure_count_once():
    ours = numerics([0.1, 0.4, 0.2, 0.2, 0.3])
    ours["name"] = ["Left-Caudate", "Right-Caudate", "ctx-lh-cuneus", "ctx-rh-cuneus", "Brain-Stem"]
    row = compare_pipelines(ours, ours.assign(ratio=1.0)).iloc[0]
    assert row["n"] == 3
    assert row["median_ours"] == pytest.approx(0.2)  # of 0.2 (the mean of logarithms), 0.2, 0.3
    with pytest.raises(UserError, match="share 1 structures"):
        compare_pipelines(ours[:2], ours[:2])


def test_equal_pipelines_do_not_differ():
    rng = np.random.default_rng(3)
    base = np.exp(rng.normal(-2, 1, 30))
    noise = np.exp(rng.normal(0, 0.2, 30))
    row = compare_pipelines(numerics(base * noise), numerics(base)).iloc[0]
    assert row["low"] < 1 < row["high"] and row["p_value"] > 0.05
    same = compare_pipelines(numerics(base), numerics(base)).iloc[0]
    assert (same["ratio"], same["p_value"]) == (1.0, 1.0)


def test_few_structures_give_no_limits_and_none_are_refused():
    row = compare_pipelines(numerics([0.1, 0.2, 0.3]), numerics([0.2, 0.3, 0.4])).iloc[0]
    assert np.isnan(row["low"]) and np.isfinite(row["ratio"])
    with pytest.raises(UserError, match="share 0 structures"):
        compare_pipelines(numerics([0.1]), numerics([0.1]).assign(name="other"))
