"""The group report: what it says, shows and escapes."""

import re

import numpy as np
import pandas as pd
import pytest

from bids_varaug.brainage.evaluate import evaluate_brain_age
from bids_varaug.brainage.population import numerical_variability
from bids_varaug.reports.citation import GROUP_REFERENCES, REFERENCES, cite_group
from bids_varaug.reports.group import render_group_report, write_group_report
from bids_varaug.reports.group_figures import draw_ages, draw_gains, draw_ratios
from bids_varaug.reports.group_words import headline, verdict
from tests.brainage.cohorts import simulated_cohort
from tests.reports.group_content import make_content, make_numerics, make_study


@pytest.fixture(scope="module")
def page():
    return render_group_report(make_content())


def test_page_needs_nothing_else(page):
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", page)
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
    assert levels[0] == 1 and all(b <= a + 1 for a, b in zip(levels, levels[1:], strict=False))


def test_same_content_same_bytes(tmp_path, page):
    path = write_group_report(tmp_path / "group_brainage.html", make_content())
    assert path.read_text(encoding="utf-8") == page


def test_nothing_but_predictions_is_a_page_too():
    study = make_study(gains={})
    for name in ("learning_curve", "sites", "reliability"):
        object.__setattr__(study, name, getattr(study, name).iloc[:0])
    study.predictions["sd_num"] = np.nan
    study.predictions["lower"] = study.predictions["upper"] = np.nan
    study.scores[["coverage", "interval_width"]] = np.nan
    content = make_content(study, numerics=None, compared=(), left_out={}, warnings=(), sloppy=True)
    page = render_group_report(content)
    assert 'id="gains"' not in page and 'id="numerics"' not in page
    assert "Augmentation was not tried" in page and "Nobody." in page
    assert "Made with --sloppy" in page and "too few participants for prediction" in page


def test_a_real_study_can_be_shown():
    cohort = simulated_cohort(n=24, n_members=3, n_features=3, sessions=2, n_sites=3)
    study = evaluate_brain_age(cohort, model="ridge", augmentations=("mean",), cv_folds=2,
                               curve_sizes=(10,), n_bootstrap=50, n_permutations=50)  # fmt: skip
    numerics = numerical_variability(cohort, n_boot=50)
    page = render_group_report(make_content(study, numerics=numerics, compared=()))
    assert "structure2" in page and ">nan<" not in page


@pytest.mark.parametrize(
    ("gains", "half", "expected", "sentence"),
    [
        ({"members": 0.5, "jitter": 0.0}, 0.2, "The ensemble helps", "0.50 years smaller"),
        ({"members": 0.5, "jitter": 0.45}, 0.2, "so does jitter", "mere regularisation"),
        ({"members": 0.5, "shuffled": 0.5}, 0.2, "The ensemble helps", "common shape"),
        ({"mean": 0.5, "jitter": 0.5}, 0.2, "The ensemble helps", "0.50 years smaller"),
        ({"members": 0.1}, 0.3, "No gain", "more than 0.40 years is unlikely"),
        ({"members": -0.5, "mean": -0.4}, 0.2, "harms", "'mean', makes the error 0.40"),
        ({"jitter": 0.5}, 0.2, "not tried", "nothing can be said"),
        ({}, 0.2, "not tried", "nothing can be said"),
    ],
)
def test_words_say_what_the_numbers_do(gains, half, expected, sentence):
    study = make_study(gains=gains, half=half)
    assert expected in verdict(study)
    assert sentence in " ".join(headline(study))


@pytest.mark.parametrize(
    ("p_values", "expected"),
    [
        ((0.128, 0.2, 0.3), "No gain"),
        ((0.02, 0.03, 0.03), "No gain"),  # the best of three
        ((0.01, 0.2, 0.3), "The ensemble helps"),
        ((np.nan, np.nan, np.nan), "No gain"),
    ],
)
def test_interval_and_permutation_test_must_agree_on_a_gain(p_values, expected):
    study = make_study(gains={"members": 1.1, "mean": 1.0, "analytic": 0.9}, half=0.5)
    study.gains["p_value"] = p_values
    assert expected in verdict(study)
    words = " ".join(headline(study))
    assert expected in words
    assert ("The interval alone" in words) == (expected == "No gain")


def test_interval_and_permutation_test_must_agree_on_harm():
    study = make_study(gains={"members": -0.5, "mean": -0.4}, half=0.2)
    study.gains["p_value"] = [0.01, 0.3]
    assert "No gain" in verdict(study) and "The ensemble harms" not in " ".join(headline(study))


def test_a_useless_model_is_called_so():
    study = make_study()
    study.scores.loc[study.scores["augmentation"] == "mean_predictor", "mae"] = 4.9
    assert "hardly predict age" in headline(study)[0]


def test_words_on_structures_name_the_worst():
    numerics = make_numerics()
    numerics.loc[3, "ratio"] = 7.0
    assert "Inf Lat Vent  L with 7" in headline(make_study(), numerics)[-1]


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


def test_methods_cite_what_they_name():
    citation = make_content().citation
    cited = set(re.findall(r"@(\w+)", citation.methods))
    assert {r.key for r in citation.references} == cited
    assert cited <= set(REFERENCES | GROUP_REFERENCES)
    assert set(GROUP_REFERENCES) <= cited
    assert not set(REFERENCES) & set(GROUP_REFERENCES)


def test_methods_leave_out_what_was_not_done():
    citation = cite_group({"model": "ridge", "augmentations": ["none"]}, "thickness")
    assert "augmentation" not in citation.methods and "the model ridge" in citation.methods
    assert "chatelain2026" not in {r.key for r in citation.references}
