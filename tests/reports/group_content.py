"""A made-up study of plausible size, and a report's content made of it."""

from __future__ import annotations

import re
from html import unescape

import numpy as np
import pandas as pd

from bids_varaug.brainage.evaluate import BASELINES, CONTRASTS, Evaluation, judge_gains
from bids_varaug.derivatives.citation import cite
from bids_varaug.reports.group import ComparedPipeline, Page, RunInfo, evaluation_page

GAINS = {"mean": 0.05, "members": 0.31, "analytic": 0.28, "jitter": 0.02, "shuffled": 0.27}
STRUCTURES = [
    f"{side}-{name}"
    for side in ("Left", "Right")
    for name in (
        "Cerebral-White-Matter", "Cerebral-Cortex", "Lateral-Ventricle", "Inf-Lat-Vent",
        "Thalamus", "Caudate", "Putamen", "Pallidum", "Hippocampus", "Amygdala",
        "Accumbens-area",
    )
] + ["Brain-Stem", "3rd-Ventricle"]  # fmt: skip


def make_study(n: int = 120, gains: dict[str, float] | None = None, half: float = 0.2) -> Evaluation:
    """Predictions with an error of about 5 years; each gain is known to plus or minus `half`."""
    gains = GAINS if gains is None else gains
    rng = np.random.default_rng(7)
    age = rng.uniform(18, 85, n).round(1)
    error, tables = rng.normal(0, 6, n), []
    augmentations = ["none", *gains]
    for name in augmentations:
        predicted = 50 + 0.85 * (age - 50) + error * (1 - gains.get(name, 0.0) / 5)
        tables.append(
            pd.DataFrame(
                {
                    "participant_id": [f"sub-{i:03d}" for i in range(n)],
                    "session_id": None,
                    "observation": [f"sub-{i:03d}" for i in range(n)],
                    "age": age,
                    "augmentation": name,
                    "predicted": predicted,
                    "corrected": (predicted - 7.5) / 0.85,
                    "lower": predicted - 10,
                    "upper": predicted + 11,
                    "sd_num": rng.uniform(0.3, 2.5, n),
                }
            )
        )
    scores = []
    for name in [*augmentations, *BASELINES]:
        mae = {"mean_predictor": 16.4, "site_predictor": 9.1, "ridge": 5.6}.get(name, 5.0 - gains.get(name, 0.0))
        here = name in augmentations
        scores.append(
            {"augmentation": name, "n": n, "mae": mae, "mae_low": mae - 0.4, "mae_high": mae + 0.4,
             "rmse": 1.25 * mae, "r2": 0.9, "r": 0.95, "bias_slope": -0.15,
             "mae_corrected": 1.1 * mae if here else np.nan,
             "bias_slope_corrected": 0.01 if here else np.nan,
             "coverage": 0.91 if here else np.nan, "interval_width": 21.0 if here else np.nan}
        )  # fmt: skip
    curve = [
        {"n_participants": size, "augmentation": name, "mae": mae, "low": mae - 0.5,
         "high": mae + 0.5}
        for size in (20, 50, 96)
        for name in augmentations
        for mae in [5.0 + 40 / size - gains.get(name, 0.0)]
    ]  # fmt: skip
    sites = pd.DataFrame(
        {"site": ["Leipzig", "Oulu", "<b>NYU</b>"], "n": [50, 40, 30],
         **{f"mae_{name}": [5.1, 6.2, 7.9] for name in augmentations}}
    )  # fmt: skip
    reliability = pd.DataFrame(
        {"kind": ["prediction", "feature"], "name": ["none", "Left-Hippocampus"],
         "icc": [0.93, 0.97], "low": [0.9, 0.95], "high": [0.95, 0.98],
         "n_participants": [40, 40], "n_observations": [2, 2]}
    )  # fmt: skip
    return Evaluation(
        predictions=pd.concat(tables, ignore_index=True),
        scores=pd.DataFrame(scores),
        gains=make_gains(gains, half),
        learning_curve=pd.DataFrame(curve),
        sites=sites,
        reliability=reliability,
        chosen={a: {"model": "svr", "log_age": True, "hyperparameters": {"C": 1.0}}
                for a in augmentations},
        settings={"model": "auto", "augmentations": augmentations, "cv_folds": 5,
                  "seed": 0, "coverage": 0.9, "n_participants": n, "n_observations": n},
    )  # fmt: skip


def make_gains(gains: dict[str, float], half: float, p_value: float = 0.004) -> pd.DataFrame:
    """Contrasts of augmentations whose gains over none are given."""
    gains = {"none": 0.0, **gains}
    rows = [
        {"part": part, "augmentation": name, "against": against, "gain": gains[name] - gains[against]}
        for (name, against), part in CONTRASTS.items()
        if name in gains and against in gains
    ]
    table = pd.DataFrame(rows, columns=["part", "augmentation", "against", "gain"]).astype({"gain": float})
    return judge_gains(table.assign(low=table["gain"] - half, high=table["gain"] + half, p_value=p_value))


def make_numerics(factor: float = 1.0, seed: int = 1) -> pd.DataFrame:
    """A table as `numerical_variability` gives it."""
    rng = np.random.default_rng(seed)
    ratio = factor * np.exp(rng.normal(-2, 0.7, len(STRUCTURES)))
    mean = np.exp(rng.normal(8, 1, len(STRUCTURES)))
    return pd.DataFrame(
        {"name": STRUCTURES, "mean": mean, "sd_num": 0.1 * mean * ratio, "sd_anat": 0.1 * mean,
         "ratio": ratio, "low": ratio / 1.2, "high": ratio * 1.25, "npv": ratio,
         "cv": 0.1 * ratio, "dice_min": 1 - 0.3 * ratio, "n_needed": np.ceil(1537 * ratio**2),
         "n_participants": 120, "n_members": 20}
    )  # fmt: skip


def make_page(study: Evaluation | None = None, *, numerics="made up", compared="made up", **run) -> Page:
    """A page with everything that it can show."""
    from bids_varaug.brainage.variability import compare_pipelines

    study = study or make_study()
    ours, other = make_numerics(), make_numerics(1.6, seed=2)
    citation = cite(
        "group", versions={"bids_varaug": "0.1.0", "scikit-learn": "1.9.1"}, settings=study.settings,
        features=f"volumes of {len(STRUCTURES)} structures [mm3]",
        has_numerics=True, has_reliability=True, compared_with=["FreeSurfer"],
    )  # fmt: skip
    parts = {
        "methods": citation.methods,
        "left_out": {"sub-900": "no age", "sub-901": "<script>alert(1)</script>"},
        "warnings": ["3 participants have several images; they stay in one fold."],
        "source": {"kind": "bids_varaug", "ensemble": "aseg31", "sha256": {"ieee": "a" * 64}},
        "settings": {"cv_folds": 5, "sloppy": False},
        "versions": {"bids_varaug": "0.1.0", "scikit-learn": "1.9.1"},
        "title": "A <made-up> dataset",
    }
    if isinstance(numerics, str):
        numerics = ours
    if isinstance(compared, str):
        compared = [ComparedPipeline("FreeSurfer", other, compare_pipelines(ours, other))]
    return evaluation_page(RunInfo(**(parts | run)), study, numerics, compared)


def answer(page: Page) -> tuple[str, list[str]]:
    """Verdict and sentences in the box at the top."""
    box = page.html().partition('<div class="answer">')[2].partition("</div>")[0]
    texts = [" ".join(unescape(text).split()) for text in re.findall(r"<(?:p|li)\b[^>]*>(.*?)</", box, re.S)]
    return texts[0], texts[1:]
