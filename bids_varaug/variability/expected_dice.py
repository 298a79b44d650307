"""Expected Dice of each structure with the labels that an expert would draw, from what a segmentation says of itself.

Where a posterior p is right, the expected overlap of a structure S of its consensus with the truth is nearly its soft
Dice ``2 sum_{v in S} p_v / (|S| + sum_v p_v)``, of the calibrated mean posterior. Posteriors are not quite right: a few
coefficients (`models.ensemble.DiceModel`) correct it by how far members agree and how small the structure is::

    logit(Dice) = intercept + a logit(soft Dice) + b logit(mean pairwise Dice) + c log(voxels)

They are fitted on heads drawn from label maps that training left out (``benchmarks/expected_dice.py``).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
from scipy.optimize import least_squares
from scipy.special import expit, logit

from bids_varaug.models.ensemble import DiceModel, Quality

COVERAGE = 0.9
CALIBRATED_FAMILIES = {"mca", "seed"}
"""Agreement says something only of members as those of the calibration: those of `rr`, say, hardly differ."""
_LEAST, _MOST = 0.01, 0.995  # Dice whose logits are told apart
_CLOSED_FORM = DiceModel(0.0, 1.0, 0.0, 0.0, 0.0, 0.0)


def expected_dice(
    quality: Quality | None, soft_dice: np.ndarray, pair_dice: np.ndarray, voxels: np.ndarray
) -> pd.DataFrame:
    """Return expected_dice, expected_dice_low and expected_dice_high of R structures.

    Without a calibration the first is the soft Dice as it is, and there is no interval (NaN). NaN for a structure that
    was not found.

    Parameters
    ----------
    quality : of the ensemble, if it is calibrated
    soft_dice : (R,) of consensus and calibrated mean posterior
    pair_dice : (R,) mean over pairs of perturbed members; all NaN where there is one, or other families than
        `CALIBRATED_FAMILIES`
    voxels : (R,) of the coarser grid, the image's or the network's

    >>> expected_dice(None, np.array([0.8]), np.array([np.nan]), np.array([500.0])).iloc[0].tolist()
    [0.8, nan, nan]
    """
    soft_dice = np.where(np.asarray(voxels) > 0, soft_dice, np.nan)
    if quality is None:
        nothing = np.full(len(soft_dice), np.nan)
        return _table(soft_dice, nothing, nothing)
    model = quality.alone if np.isnan(pair_dice).all() else quality.several
    value = _linear(model, soft_dice, pair_dice, voxels)
    return _table(expit(value), expit(value + model.low), expit(value + model.high))


def describe_calibration(quality: Quality | None) -> str:
    """Say in a sidecar what the expected Dice is."""
    if quality is None:
        return (
            "Soft Dice of consensus and mean posterior. Nobody calibrated it for this ensemble: it is mostly too high, "
            "and has no interval"
        )
    return (
        f"From soft Dice, size and agreement of the members, as calibrated on {len(quality.heads)} heads drawn from "
        f"label maps that training left out. There {100 * quality.coverage:.0f} % of the structures lay between "
        "expected_dice_low and expected_dice_high. Labels drawn by another protocol agree less"
    )


def _table(value: np.ndarray, low: np.ndarray, high: np.ndarray) -> pd.DataFrame:
    return pd.DataFrame({"expected_dice": value, "expected_dice_low": low, "expected_dice_high": high})


def _logit(dice: np.ndarray) -> np.ndarray:
    return logit(np.clip(dice, _LEAST, _MOST))


def _linear(model: DiceModel, soft_dice: np.ndarray, pair_dice: np.ndarray, voxels: np.ndarray) -> np.ndarray:
    value = model.intercept + model.soft_dice * _logit(soft_dice) + model.log_voxels * np.log(np.maximum(voxels, 1))
    return value + model.pair_dice * _logit(pair_dice) if model.pair_dice else value


def fit_dice_model(
    soft_dice: np.ndarray, pair_dice: np.ndarray | None, voxels: np.ndarray, dice: np.ndarray, groups: np.ndarray
) -> DiceModel:
    """Fit the coefficients to structures whose Dice is known, and the interval to those of groups left out.

    Least absolute error of the Dice, smoothed (so that a structure that failed does not bend all others). The interval
    holds `COVERAGE` of the structures of each of the `groups` (say, all heads of one label map) when that is left out.

    Parameters
    ----------
    soft_dice, pair_dice, voxels : (R,) as for `expected_dice`; no pairs (None) of one member
    dice : (R,) with the true labels
    groups : (R,) of any type; of a single one, the interval is that of the structures fitted
    """
    table = pd.DataFrame({"soft_dice": soft_dice, "pair_dice": pair_dice, "voxels": voxels, "dice": dice}, dtype=float)
    model = _fit(table, pair_dice is not None)
    residuals = []
    for group in np.unique(groups):
        left_out = table[groups == group]
        others = table[groups != group]
        without = _fit(others, pair_dice is not None) if len(others) else model
        predicted = _linear(without, left_out["soft_dice"], left_out["pair_dice"], left_out["voxels"])
        residuals.append(_logit(left_out["dice"]) - predicted)
    low, high = np.quantile(np.concatenate(residuals), [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return replace(model, low=round(float(low), 4), high=round(float(high), 4))


def _fit(table: pd.DataFrame, has_pairs: bool) -> DiceModel:
    def model_of(x: np.ndarray) -> DiceModel:
        intercept, soft, size, *pair = map(float, x)
        return DiceModel(intercept, soft, pair[0] if pair else 0.0, size, 0.0, 0.0)

    def errors(x: np.ndarray) -> np.ndarray:
        value = _linear(model_of(x), table["soft_dice"], table["pair_dice"], table["voxels"])
        return expit(value) - table["dice"]

    found = least_squares(errors, [0.0, 1.0, 0.0] + [0.0] * has_pairs, loss="soft_l1", f_scale=0.02)
    return model_of(found.x.round(4))
