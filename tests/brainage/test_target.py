"""Numbers and categories other than age, with a known truth."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV, PredefinedSplit
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from bids_varaug.brainage import target
from bids_varaug.brainage.cohort import grouped_folds
from bids_varaug.brainage.model_file import load_model, save_model
from bids_varaug.brainage.target import (
    choose_penalty,
    encode_covariates,
    evaluate_target,
    fit_target,
    prepare_target,
    target_measures,
    target_table,
)
from bids_varaug.errors import UserError
from tests.brainage.cohorts import simulated_cohort

QUICK = {"n_bootstrap": 20, "n_permutations": 19, "gain_repeats": 1}


def no_covariates(cohort):
    return pd.DataFrame(index=range(len(cohort)))


def severity(cohort):
    """A number that the first two features tell, with noise of its own."""
    z = (cohort.baseline - cohort.baseline.mean(axis=0)) / cohort.baseline.std(axis=0)
    return pd.Series(z[:, 0] - z[:, 1] + np.random.default_rng(5).normal(0, 0.5, len(cohort)))


def thirds(cohort):
    return pd.cut(severity(cohort), [-np.inf, -0.7, 0.7, np.inf], labels=["low", "mid", "top"]).astype(str)


@pytest.fixture(scope="module")
def cohort():
    return simulated_cohort(n=90, n_members=4, n_sites=3, noise=0.3)


@pytest.fixture(scope="module")
def classes(cohort):
    variables = pd.DataFrame({"IQ": np.random.default_rng(8).normal(100, 15, len(cohort))})
    data = prepare_target(cohort, "stage", thirds(cohort), encode_covariates(cohort, ["iq"], variables), 5)
    return data, evaluate_target(data, augmentations=("members",), **QUICK)


def score(evaluation, name, measure, held_out="participants"):
    scores = evaluation.scores.set_index(["held_out", "augmentation", "measure"])
    return scores.loc[(held_out, name, measure)]


def test_categories_are_told_apart_beyond_covariates_and_at_new_sites(classes):
    data, evaluation = classes
    assert data.classes == ("low", "mid", "top")
    auc = score(evaluation, "none", "auc")
    assert auc["value"] > 0.85 > score(evaluation, "covariates", "auc")["value"]
    assert auc["low"] < auc["value"] < auc["high"]
    assert score(evaluation, "members", "auc", "sites")["value"] > 0.75
    assert score(evaluation, "mean_predictor", "balanced_accuracy")["value"] == pytest.approx(1 / 3)
    assert evaluation.p_value == pytest.approx(1 / 20)
    gains = evaluation.gains.set_index("part")
    assert gains.loc["features", "effect"] == "helps" and gains.loc["features", "against"] == "covariates"
    assert evaluation.best in ("none", "mean", "members")


def test_probabilities_add_up_and_are_calibrated(classes):
    _, evaluation = classes
    shares = evaluation.predictions[["p_low", "p_mid", "p_top"]].dropna()
    np.testing.assert_allclose(shares.sum(axis=1), 1)
    assert score(evaluation, "none", "calibration_error")["value"] < 0.15


def test_table_of_participants_has_one_row_of_each(classes):
    data, evaluation = classes
    table = target_table(evaluation.predictions.query("augmentation == 'none'"), data.classes)
    assert table["participant_id"].is_unique and len(table) == 90
    assert list(table) == ["participant_id", "predicted", "p_low", "p_mid", "p_top", "observed"]
    assert (table["predicted"] == table["observed"]).mean() > 0.6


def test_numbers_are_predicted_with_every_augmentation_but_the_closed_form(cohort):
    data = prepare_target(cohort, "severity", severity(cohort), no_covariates(cohort), 3)
    evaluation = evaluate_target(data, cv_folds=3, **QUICK)
    assert data.classes == () and "analytic" not in set(evaluation.scores["augmentation"])
    assert score(evaluation, "members", "r2")["value"] > 0.5 > score(evaluation, "site_predictor", "r2")["value"]
    assert {"averaging", "augmentation", "structure"} == set(evaluation.gains["part"])
    assert evaluation.p_value == pytest.approx(1 / 20)


def test_features_are_compared_with_controls(cohort):
    noise = np.random.default_rng(2).normal(0, 1, (len(cohort), 9))
    controls = {"volumes": noise, "untrained": cohort.baseline}
    data = prepare_target(replace(cohort, controls=controls), "stage", thirds(cohort), no_covariates(cohort), 5)
    evaluation = evaluate_target(data, augmentations=("none",), **QUICK)
    gains = evaluation.gains.set_index("part")
    assert gains.loc["images", "against"] == "volumes" and gains.loc["images", "effect"] == "helps"
    assert gains.loc["pre-training", "gain"] == 0  # the same features
    assert score(evaluation, "volumes", "auc")["value"] < 0.65 < score(evaluation, "none", "auc", "sites")["value"]


def test_chance_is_an_answer(cohort):
    dealt = pd.Series(np.random.default_rng(3).permutation(["a", "b"] * 45))
    data = prepare_target(cohort, "dealt", dealt, no_covariates(cohort), 5)
    evaluation = evaluate_target(data, augmentations=("none",), n_bootstrap=50, n_permutations=49)
    auc = score(evaluation, "none", "auc")
    assert auc["low"] < 0.5 < auc["high"] and evaluation.p_value > 0.05


def test_the_unit_of_volumes_does_not_matter(cohort):
    data = prepare_target(cohort, "stage", thirds(cohort), no_covariates(cohort), 5)
    litres = replace(cohort, baseline=cohort.baseline * 1e-6, members=cohort.members * 1e-6, unit="l")
    other = replace(data, cohort=litres)
    first, second = (fit_target(one, "members", 0).predict(one) for one in (data, other))
    np.testing.assert_allclose(first["p_low"], second["p_low"], atol=1e-4)


def test_penalties_weaker_than_of_any_use_are_not_tried(cohort, monkeypatch):
    scores = iter([0.1, 0.3, 0.2, 0.2, 0.9, 0.9, 0.9])
    monkeypatch.setattr(target, "cross_val_score", lambda *_, **__: np.array([next(scores)]))
    data = prepare_target(cohort, "stage", thirds(cohort), no_covariates(cohort), 5)
    assert choose_penalty(data, "none", 0) == {"model__C": target.PENALTIES[1]}
    assert next(scores) == 0.9  # the fifth


def test_the_penalty_is_the_best_of_all(cohort):
    data = prepare_target(cohort, "severity", severity(cohort), no_covariates(cohort), 5)
    found = choose_penalty(data, "none", 0)["model__alpha"]
    folds = grouped_folds(cohort.groups, 5, 0)
    model = make_pipeline(StandardScaler(), Ridge())
    search = GridSearchCV(model, {"ridge__alpha": 1 / target.PENALTIES}, scoring="neg_mean_absolute_error",
                          cv=PredefinedSplit(folds)).fit(cohort.baseline, data.y)  # fmt: skip
    assert found == search.best_params_["ridge__alpha"]


def test_a_saved_model_predicts_the_same(cohort, classes, tmp_path):
    data, _ = classes
    model = fit_target(data, "members", 0)
    read = load_model(save_model(tmp_path / "m.skops", model, "card"))
    pd.testing.assert_frame_equal(read.predict(data), model.predict(data))
    assert (read.classes, read.covariates) == (("low", "mid", "top"), ("iq",))


def test_images_of_a_person_are_in_one_fold_and_one_row():
    cohort = simulated_cohort(n=40, n_members=0, sessions=2, noise=0.2)
    first = severity(cohort)[::2].gt(0)
    data = prepare_target(cohort, "high", first.repeat(2), no_covariates(cohort), 5)
    evaluation = evaluate_target(data, **QUICK)
    assert data.classes == ("False", "True")
    assert score(evaluation, "none", "auc")["n"] == 40
    assert evaluation.gains.empty  # no members, no covariates


def test_who_lacks_target_or_covariate_is_left_out_with_a_reason(cohort):
    values, covariates = thirds(cohort).astype(object), encode_covariates(cohort, ["age"], None)
    values[3], covariates.loc[5, "age"] = None, np.nan
    data = prepare_target(cohort, "stage", values, covariates, 5)
    assert len(data.y) == 88
    assert data.cohort.left_out == {"sub-003_ses-0": "no stage", "sub-005_ses-0": "a covariate is missing"}


def test_features_that_are_the_target_are_left_out(cohort):
    data = prepare_target(cohort, "copy", pd.Series(cohort.baseline[:, 2]), no_covariates(cohort), 5)
    assert "structure2" not in data.cohort.names and "structure2" in data.cohort.source["told_target"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda n: [7.0] * n, "7.0 for all"),
        (lambda n: ["x", "y"] * 10 + [None] * (n - 20), "known of 20 of 90"),
        (lambda n: [f"c{i % 40}" for i in range(n)], "40 categories"),
        (lambda n: ["x"] * (n - 3) + ["rare"] * 3, r"folds: rare \(3\)"),
    ],
)
def test_targets_that_cannot_be_learnt_are_explained(cohort, make, message):
    values = pd.Series(make(len(cohort)), dtype=object).infer_objects()
    with pytest.raises(UserError, match=f"--target stage: .*{message}"):
        prepare_target(cohort, "stage", values, no_covariates(cohort), 5)


def test_covariates_are_encoded_and_must_not_tell_the_target(cohort):
    people = cohort.people.assign(sex=["F", "M"] * 45)
    people.loc[0, "sex"] = None
    variables = pd.DataFrame({"IQ": np.arange(90.0), "Hand": ["l", "r", "r"] * 30})
    encoded = encode_covariates(replace(cohort, people=people), ["sex", "iq", "hand"], variables)
    assert list(encoded) == ["iq", "sex_F", "sex_M", "hand_l", "hand_r"]
    assert encoded.loc[0].isna().all() and encoded.loc[1].tolist() == [1, 0, 1, 0, 1]
    with pytest.raises(UserError, match="no such column"):
        encode_covariates(cohort, ["height"], variables)
    with pytest.raises(UserError, match="tells the target"):
        prepare_target(cohort, "age", pd.Series(cohort.age), encode_covariates(cohort, ["age"], None), 5)


def test_measures_of_a_perfect_and_of_a_blind_prediction():
    observed = np.repeat([0, 1], 20)
    frame = pd.DataFrame({"observed": observed, "p_a": 1.0 - observed, "p_b": 1.0 * observed})
    frame = frame.assign(b_a=frame["p_a"], b_b=frame["p_b"])
    perfect = target_measures(frame, ["a", "b"])
    assert (perfect["auc"], perfect["balanced_accuracy"], perfect["brier"], perfect["recall b"]) == (1, 1, 0, 1)
    blind = target_measures(frame.assign(p_a=0.5, p_b=0.5, b_a=0.5, b_b=0.5), ["a", "b"])
    assert (blind["auc"], blind["balanced_accuracy"], blind["brier"]) == (0.5, 0.5, 0.5)
