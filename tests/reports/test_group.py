"""The group report: what it says, shows and escapes."""

import itertools
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from bids_varaug.brainage.evaluate import best_augmentation, evaluate_brain_age
from bids_varaug.brainage.variability import numerical_variability
from bids_varaug.reports.plots import draw_ages, draw_gains, draw_ratios
from tests.brainage.cohorts import simulated_cohort
from tests.reports.group_content import answer, make_gains, make_numerics, make_page, make_study


@pytest.fixture(scope="module")
def page():
    return make_page().html()


def test_page_needs_nothing_else(page):
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#|https://doi\.org/|https://arxiv\.org/abs/)""", page)
    assert "default-src 'none'" in page and "@import" not in page
    assert page.count("data:image/svg+xml;base64,") == 4


def test_values_are_escaped(page):
    assert "<script>alert" not in page and "&lt;script&gt;alert(1)" in page
    assert "<b>NYU" not in page and "&lt;b&gt;NYU" in page
    assert "A &lt;made-up&gt; dataset" in page


def test_sections_and_reasons_are_there(page):
    for anchor in ("answer", "ages", "gains", "curve", "sites", "reliability", "numerics",
                   "compared", "left-out", "run", "cite"):  # fmt: skip
        assert f'id="{anchor}"' in page and f'href="#{anchor}"' in page
    assert "no age" in page and "3 participants have several images" in page


def test_headings_are_in_order(page):
    levels = [int(level) for level in re.findall(r"<h(\d)", page)]
    assert levels[0] == 1 and all(b <= a + 1 for a, b in itertools.pairwise(levels))


def test_same_content_same_bytes(page):
    assert make_page().html() == page


def test_nothing_but_predictions_is_a_page_too():
    study = make_study(gains={})
    for name in ("learning_curve", "sites", "reliability"):
        object.__setattr__(study, name, getattr(study, name).iloc[:0])
    study.predictions["sd_num"] = np.nan
    study.predictions["lower"] = study.predictions["upper"] = np.nan
    study.scores[["coverage", "interval_width"]] = np.nan
    page = make_page(study, numerics=None, compared=(), left_out={}, warnings=(), sloppy=True).html()
    assert 'id="gains"' not in page and 'id="numerics"' not in page
    assert "Augmentation was not tried" in page and "Nobody." in page
    assert "Made with --sloppy" in page and "too few participants for prediction" in page


def test_a_real_study_can_be_shown():
    cohort = simulated_cohort(n=24, n_members=3, n_features=3, sessions=2, n_sites=3)
    study = evaluate_brain_age(cohort, model="ridge", augmentations=("mean",), cv_folds=2,
                               curve_sizes=(10,), n_bootstrap=50)  # fmt: skip
    numerics = numerical_variability(cohort)
    page = make_page(study, numerics=numerics, compared=()).html()
    assert "structure2" in page and ">nan<" not in page


@pytest.mark.parametrize(
    ("gains", "expected", "sentence"),
    [
        ({"mean": 0.1, "members": 0.6, "jitter": 0.1}, "Augmentation helps", "+0.50 years (95 % CI +0.30 to +0.70"),
        ({"mean": 0.1, "members": 0.6, "jitter": 0.5}, "may be mere regularisation", "no difference can be shown"),
        ({"mean": 0.5, "members": 0.5, "jitter": 0.5}, "Averaging the members helps", "Averaging: with the mean"),
        ({"mean": 0.1, "members": 0.1}, "No gain", "no difference can be shown"),
        ({"mean": 0.0, "members": -0.5}, "Augmentation harms", "it harms"),
        ({"jitter": 0.5}, "not tried", "cannot say"),
        ({}, "not tried", "cannot say"),
    ],
)
def test_words_say_what_the_numbers_do(gains, expected, sentence):
    verdict, sentences = answer(make_page(make_study(gains=gains)))
    assert expected in verdict
    assert sentence in " ".join(sentences)


@pytest.mark.parametrize(
    ("p_value", "expected"),
    [(0.128, "No gain"), (0.03, "No gain"), (0.01, "Augmentation helps"), (np.nan, "No gain")],
)
def test_interval_and_corrected_p_must_agree_on_a_gain(p_value, expected):
    study = make_study(gains={"mean": 0.0, "members": 1.1})
    study = replace(study, gains=make_gains({"mean": 0.0, "members": 1.1}, 0.5, p_value))
    verdict, sentences = answer(make_page(study))
    assert expected in verdict
    assert best_augmentation(study) == ("none" if expected == "No gain" else "members")
    assert ("The interval alone" in " ".join(sentences)) == (expected == "No gain")


def test_a_useless_model_is_called_so():
    study = make_study()
    study.scores.loc[study.scores["augmentation"] == "mean_predictor", "mae"] = 4.9
    assert "hardly predict age" in answer(make_page(study))[1][0]


def test_negative_scores_have_a_true_minus():
    study = make_study()
    study.scores["r2"] = -0.22
    assert "R² is −0.22" in answer(make_page(study))[1][0]


def test_words_on_structures_name_the_worst():
    numerics = make_numerics()
    numerics.loc[3, "ratio"] = 7.0
    assert "Inf Lat Vent L with 7" in answer(make_page(numerics=numerics))[1][-1]


def test_large_samples_are_drawn_as_an_image():
    study = make_study(n=2000)
    svg = draw_ages(study.predictions.query("augmentation == 'none'"))
    assert "<image" in svg and len(svg) < 600_000


@pytest.mark.parametrize(
    "svg",
    [
        draw_gains(make_study().gains),
        draw_ratios(make_numerics().assign(high=np.inf)),
        draw_ratios(pd.DataFrame({"name": ["x$y"], "ratio": [0.0], "low": [np.nan],
                                  "high": [np.nan]})),
    ],
)  # fmt: skip
def test_figures_are_plain_svg(svg):
    assert svg.startswith("<svg") and "DOCTYPE" not in svg and "dc:date" not in svg
