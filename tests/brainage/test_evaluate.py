from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from bids_varaug.brainage import models
from bids_varaug.brainage.augment import AUGMENTATIONS
from bids_varaug.brainage.evaluate import (
    SCORE_COLUMNS,
    agreement_scores,
    bootstrap_interval,
    compare_losses,
    evaluate_brain_age,
)
from bids_varaug.errors import ExitCode, UserError
from bids_varaug.variability.longitudinal import intraclass_correlation
from tests.brainage.cohorts import simulated_cohort

QUICK = {"n_bootstrap": 200, "gain_repeats": 1}


@pytest.fixture(scope="module")
def study():
    cohort = simulated_cohort(n=80, sessions=2, n_sites=4, noise=1.0)
    return evaluate_brain_age(cohort, model="ridge", curve_sizes=(20, 40), **QUICK)


def test_every_augmentation_and_both_baselines_are_scored(study):
    assert tuple(study.scores.columns) == SCORE_COLUMNS
    assert list(study.scores["augmentation"]) == [*AUGMENTATIONS, "mean_predictor", "site_predictor", "ridge"]
    assert (study.scores["n"] == 80).all()
    mae = study.scores.set_index("augmentation")["mae"]
    assert (mae[list(AUGMENTATIONS)] < 0.8 * mae["mean_predictor"]).all()
    assert study.scores["mae"].between(study.scores["mae_low"], study.scores["mae_high"]).all()


def test_sites_too_few_to_leave_one_out_are_counted(study):
    assert (study.settings["n_sites"], study.settings["n_sites_left_out"]) == (4, 4)
    cohort = simulated_cohort(n=30, n_sites=2)
    few = evaluate_brain_age(cohort, model="ridge", augmentations=("mean",), curve_sizes=(), **QUICK)
    assert (few.settings["n_sites"], few.settings["n_sites_left_out"]) == (2, 0)


def test_each_observation_is_predicted_once_per_augmentation(study):
    counts = study.predictions.groupby("augmentation")["observation"].agg(["size", "nunique"])
    assert (counts == 160).all(axis=None)
    assert (study.predictions["lower"] < study.predictions["upper"]).all()
    assert (study.predictions["sd_num"] > 0).all()


def test_gains_are_differences_of_the_scores(study):
    mae = study.scores.set_index("augmentation")["mae"]
    assert list(study.gains["part"]) == ["averaging", "augmentation", "augmentation", "structure", "structure"]
    for row in study.gains.itertuples():
        assert row.gain == pytest.approx(mae[row.against] - mae[row.augmentation], abs=1e-6)


def test_numerical_noise_in_the_baseline_is_averaged_away():
    # The noise of one member is as large as the person-to-person variation here.
    cohort = simulated_cohort(n=80, sessions=2, noise=1.0)
    study = evaluate_brain_age(cohort, model="ridge", augmentations=("mean",), curve_sizes=(), n_bootstrap=10)
    averaging = study.gains.set_index("part").loc["averaging"]
    assert averaging["low"] > 0 and averaging["effect"] == "helps"


def test_ages_that_differ_by_site_are_predicted_from_the_site():
    cohort = simulated_cohort(n=60, n_members=0, sessions=2)
    people = cohort.people.assign(site=pd.cut(cohort.people["age"], 4, labels=list("abcd")).astype(object))
    study = evaluate_brain_age(replace(cohort, people=people), model="ridge", curve_sizes=(), **QUICK)
    mae = study.scores.set_index("augmentation")["mae"]
    assert mae["site_predictor"] < 0.4 * mae["mean_predictor"]


def test_features_are_compared_with_controls_in_the_same_folds_and_at_the_same_sites():
    cohort = simulated_cohort(n=60, n_members=0, n_sites=3)
    noise = np.random.default_rng(2).normal(0, 1, (60, 9))
    cohort = replace(cohort, controls={"volumes": noise, "untrained": cohort.baseline[:, ::-1]})
    study = evaluate_brain_age(cohort, model="svr", curve_sizes=(), **QUICK | {"gain_repeats": 2})
    scores = study.scores.set_index("augmentation")["mae"]
    assert list(scores.index) == ["none", "mean_predictor", "site_predictor", "ridge", "volumes", "untrained"]
    assert scores["ridge"] == pytest.approx(scores["untrained"])  # the same features in another order
    gains = study.gains.set_index("part")
    assert list(gains.index) == ["images", "pre-training"] and list(gains["augmentation"]) == ["ridge", "ridge"]
    assert gains.loc["images", "low"] > 0 and gains.loc["images", "effect"] == "helps"
    assert gains.loc["pre-training", "gain"] == 0 and gains.loc["pre-training", "effect"] == "unclear"
    assert (study.sites["mae_volumes"] > study.sites["mae_ridge"]).all()
    assert study.settings["gain_repeats"] == 2 and study.settings["controls"] == ["volumes", "untrained"]


def test_bias_is_corrected_and_coverage_near_what_is_promised(study):
    scores = study.scores.set_index("augmentation").loc[list(AUGMENTATIONS)]
    assert (scores["bias_slope_corrected"].abs() < 0.15).all()
    assert (scores["bias_slope"] < -0.1).all()
    assert scores["coverage"].between(0.8, 0.99).all()


def test_curve_sites_and_reliability_have_their_rows(study):
    assert sorted(set(study.learning_curve["n_participants"])) == [20, 40, 64]
    assert len(study.sites) == 4 and study.sites["n"].sum() == 80
    kinds = study.reliability.groupby("kind").size()
    assert kinds["prediction"] == len(AUGMENTATIONS) and kinds["feature"] == 6
    assert study.reliability["icc"].between(0, 1).all()


def test_same_seed_same_tables():
    cohort = simulated_cohort(n=30)
    options = {"model": "bayesian_ridge", "curve_sizes": (), **QUICK}
    first, again = (evaluate_brain_age(cohort, **options) for _ in range(2))
    pd.testing.assert_frame_equal(first.predictions, again.predictions)
    pd.testing.assert_frame_equal(first.gains, again.gains)


def test_folds_never_see_the_age_they_predict():
    # With ages dealt out by chance nothing can be predicted; leakage, most of all through the
    # second session, would show. The correlation over 60 people has a standard error of 0.13.
    cohort = simulated_cohort(n=60, sessions=2, seed=1)
    people = cohort.people.copy()
    shuffled = np.random.default_rng(7).permutation(people["age"].to_numpy()[::2])
    people["age"] = np.repeat(shuffled, 2)
    cohort = type(cohort)(people, cohort.names, cohort.baseline)
    study = evaluate_brain_age(cohort, model="auto", curve_sizes=(), **QUICK)
    score = study.scores.set_index("augmentation").loc["none"]
    assert not score["r"] > 0.35 and score["r2"] < 0.1


def test_augmentations_that_are_equal_by_construction_do_not_differ():
    cohort = simulated_cohort(n=30)
    study = evaluate_brain_age(cohort, model="ridge", augmentations=("members", "shuffled"), curve_sizes=(), **QUICK)
    same = study.gains.set_index("part").loc["structure"]
    assert (same["gain"], same["p_value"], same["effect"]) == (0.0, 1.0, "unclear")


def test_analytic_is_compared_with_its_own_kind_of_model():
    cohort = simulated_cohort(n=40)
    options = {"augmentations": ("analytic",), "curve_sizes": (), **QUICK}
    svr = evaluate_brain_age(cohort, model="svr", **options)
    linear = evaluate_brain_age(cohort, model="bayesian_ridge", **options)
    svr_gains, linear_gains = (one.gains.set_index("part").loc["augmentation"] for one in (svr, linear))
    assert svr_gains["against"] == "mean, linear model" and linear_gains["against"] == "mean"
    assert svr_gains["gain"] == pytest.approx(linear_gains["gain"])
    assert "mean, linear model" not in set(svr.scores["augmentation"])


def test_fewer_than_ten_participants_have_no_scores():
    with pytest.raises(UserError, match="9 participants") as error:
        evaluate_brain_age(simulated_cohort(n=9))
    assert error.value.exit_code == ExitCode.DATA_ERROR == 65


def test_ten_participants_are_enough():
    study = evaluate_brain_age(simulated_cohort(n=10), model="ridge", **QUICK)
    assert len(study.predictions) == 60 and study.learning_curve.empty


def test_a_cohort_too_large_for_kernels_has_one_model_in_all_splits(monkeypatch):
    fitted = []
    monkeypatch.setattr(models, "MAX_KERNEL_ROWS", 50)
    original = models._regressor
    monkeypatch.setattr(models, "_regressor", lambda model, *rest: fitted.append(model) or original(model, *rest))
    study = evaluate_brain_age(simulated_cohort(n=60), augmentations=("members",), curve_sizes=(10,), **QUICK)
    assert set(fitted) == {"bayesian_ridge"} and study.settings["model"] == "auto"


def test_progress_ends_at_its_total():
    seen = []
    evaluate_brain_age(
        simulated_cohort(n=20, n_members=0), model="ridge", curve_sizes=(10,), **QUICK,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert seen[-1][0] == seen[-1][1] == len(seen)


def test_scores_of_a_perfect_and_of_a_mean_prediction():
    table = pd.DataFrame({"participant_id": list("abc"), "age": [20.0, 40.0, 60.0]})
    table = table.assign(corrected=np.nan, lower=np.nan, upper=np.nan)
    perfect, mean = (agreement_scores(table.assign(predicted=p)) for p in (table["age"], 40.0))
    assert (perfect["mae"], perfect["r2"], perfect["bias_slope"]) == (0, 1, 0)
    assert (mean["r2"], mean["bias_slope"]) == pytest.approx((0, -1)) and np.isnan(mean["r"])


def made_up_losses(differences, n_folds=5, repeats=1):
    """Losses of `none`, and of `mean` that is better by these differences, (P,)."""
    tables = []
    for repeat in range(repeats):
        ids = pd.DataFrame({"participant_id": range(len(differences)), "of": repeat, "loss": 5.0})
        ids = ids.assign(fold=ids["participant_id"] % n_folds, n_train=len(ids) * (n_folds - 1) / n_folds)
        tables += [ids.assign(augmentation="none"), ids.assign(augmentation="mean", loss=5.0 - differences)]
    return pd.concat(tables)


def test_gains_are_found_where_they_are_and_not_where_none_is():
    rng = np.random.default_rng(0)
    null, shifted = (compare_losses(made_up_losses(rng.normal(m, 1.0, 100))).iloc[0] for m in (0.0, 0.7))
    assert null["effect"] == "unclear" and null["p_value"] > 0.05
    assert shifted["effect"] == "helps" and shifted["gain"] == pytest.approx(0.7, abs=0.3)
    assert compare_losses(made_up_losses(np.zeros(5))).iloc[0]["p_value"] == 1.0


def test_interval_of_a_gain_is_that_of_nadeau_and_bengio():
    differences = np.random.default_rng(1).normal(0, 1, 200)
    for n_folds, repeats in ((5, 1), (10, 1), (5, 4)):
        row = compare_losses(made_up_losses(differences, n_folds, repeats)).iloc[0]
        # The variance of a fold's mean, corrected for the overlap of the training folds.
        s2 = differences.var(ddof=1) / (200 / n_folds)
        wanted = 1.972 * np.sqrt(s2 * (1 / (n_folds * repeats) + 1 / (n_folds - 1)))
        assert row["high"] - row["gain"] == pytest.approx(wanted, abs=1e-4)


def test_bootstrap_has_the_width_of_the_standard_error():
    rng = np.random.default_rng(0)
    low, high = bootstrap_interval(rng.normal(0, 1, (400, 1)), rng, 1000)
    assert high[0] - low[0] == pytest.approx(2 * 1.96 / 20, rel=0.15)


def test_predictions_that_tell_nothing_have_no_reliability():
    """They are the mean age of each fold, the same for both images of a person."""
    cohort = simulated_cohort(n=40, n_members=0, sessions=2)
    blind = replace(cohort, baseline=np.random.default_rng(0).normal(0, 1, cohort.baseline.shape))
    kinds = [evaluate_brain_age(one, model="ridge", curve_sizes=()).reliability.set_index("kind")["icc"]
             for one in (cohort, blind)]  # fmt: skip
    assert kinds[0]["prediction"] > 0.5 and np.isnan(kinds[1]["prediction"]) and kinds[1]["feature"].notna().all()


def test_icc_is_that_of_shrout_and_fleiss():
    # Table 2 of the paper: 6 targets, 4 judges, ICC(3,1) = 0.71.
    table = np.array([[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]], float)
    found = intraclass_correlation(table.ravel(), np.repeat(np.arange(6), 4))
    assert found["icc"] == pytest.approx(0.715, abs=0.001)
    assert found["low"] < 0.4 and found["high"] > 0.9


def test_correction_is_withheld_from_all_where_little_is_predicted():
    """Features without age: before, corrected ages missed by more than the mean age did."""
    cohort = simulated_cohort(n=40, n_members=0, noise=0.0, seed=1)
    rng = np.random.default_rng(0)
    cohort = replace(cohort, baseline=cohort.baseline + rng.normal(0, 400, cohort.baseline.shape))
    study = evaluate_brain_age(cohort, model="ridge", curve_sizes=(), n_bootstrap=50)
    assert study.predictions["predicted"].notna().all()
    assert study.predictions["corrected"].isna().all()
    assert study.scores["mae_corrected"].isna().all()
