"""Expected Dice: its closed form, and the fit that calibrates it."""

import numpy as np
import pytest
from scipy.special import expit, logit

from bids_varaug.models.ensemble import DiceModel, Quality
from bids_varaug.variability.expected_dice import COVERAGE, describe_calibration, expected_dice, fit_dice_model

TRUE = DiceModel(-0.8, 0.7, 0.3, 0.05, 0.0, 0.0)


def structures(n, seed=0, noise=0.2, model=TRUE):
    """Soft Dice, pairwise Dice, voxels and true Dice of n structures."""
    rng = np.random.default_rng(seed)
    soft, pair = rng.uniform(0.4, 0.97, (2, n))
    voxels = np.exp(rng.uniform(4, 12, n))
    value = model.intercept + model.soft_dice * logit(soft) + model.log_voxels * np.log(voxels)
    value += model.pair_dice * logit(pair)
    return soft, pair, voxels, expit(value + noise * rng.standard_normal(n))


def test_fit_finds_the_coefficients_and_its_interval_the_noise():
    soft, pair, voxels, dice = structures(2000)
    model = fit_dice_model(soft, pair, voxels, dice, np.arange(2000) % 3)
    for name in ("intercept", "soft_dice", "pair_dice", "log_voxels"):
        assert getattr(model, name) == pytest.approx(getattr(TRUE, name), abs=0.06), name
    assert (model.low, model.high) == pytest.approx((-0.329, 0.329), abs=0.03)  # 1.645 x 0.2


def test_interval_holds_as_many_structures_as_it_says():
    fitted = fit_dice_model(*structures(600), np.arange(600) % 3)
    soft, pair, voxels, dice = structures(2000, seed=1)
    found = expected_dice(Quality(fitted, fitted, COVERAGE, ()), soft, pair, voxels)
    inside = (found["expected_dice_low"] < dice) & (dice < found["expected_dice_high"])
    assert inside.mean() == pytest.approx(COVERAGE, abs=0.03)
    assert ((found > 0) & (found < 1)).all(axis=None)


def test_interval_of_a_single_group_is_that_of_its_structures():
    soft, pair, voxels, dice = structures(400)
    model = fit_dice_model(soft, pair, voxels, dice, np.zeros(400))
    assert (model.low, model.high) == pytest.approx((-0.329, 0.329), abs=0.06)


def test_a_structure_that_failed_does_not_bend_the_others():
    soft, pair, voxels, dice = structures(300, noise=0.05)
    clean = fit_dice_model(soft, pair, voxels, dice, np.arange(300) % 3)
    dice[::30] = 0.0
    bent = fit_dice_model(soft, pair, voxels, dice, np.arange(300) % 3)
    assert bent.intercept == pytest.approx(clean.intercept, abs=0.15)


def test_one_member_has_a_model_of_its_own_without_pairs():
    soft, _, voxels, dice = structures(500, model=DiceModel(-0.5, 0.9, 0.0, 0.0, 0.0, 0.0))
    alone = fit_dice_model(soft, None, voxels, dice, np.arange(500) % 2)
    assert alone.pair_dice == 0 and alone.soft_dice == pytest.approx(0.9, abs=0.05)
    several = DiceModel(5.0, 1.0, 0.0, 0.0, 0.0, 0.0)
    found = expected_dice(Quality(several, alone, 0.9, ()), soft, np.full(500, np.nan), voxels)
    assert np.abs(found["expected_dice"] - dice).mean() < 0.05


def test_without_calibration_it_is_the_soft_dice_and_says_so():
    found = expected_dice(None, np.array([0.8, 0.7]), np.array([0.9, np.nan]), np.array([400.0, 0.0]))
    assert found["expected_dice"].tolist() == pytest.approx([0.8, np.nan], nan_ok=True)
    assert found[["expected_dice_low", "expected_dice_high"]].isna().all(axis=None)
    assert "Nobody calibrated" in describe_calibration(None)
    assert "2 heads" in describe_calibration(Quality(TRUE, TRUE, 0.9, ("a", "b")))


def test_structure_that_was_not_found_has_no_expected_dice():
    soft, pair, voxels = np.array([[0.8, np.nan], [0.9, np.nan], [9.0, 0.0]])
    found = expected_dice(Quality(TRUE, TRUE, 0.9, ()), soft, pair, voxels)
    assert found.notna().all(axis=1).tolist() == [True, False]
