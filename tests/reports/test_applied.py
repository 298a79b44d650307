"""The page of an applied model, and pages made again from what was saved."""

import re

import numpy as np
import pandas as pd
import pytest

from bids_varaug.derivatives.citation import cite
from bids_varaug.errors import NoInputError, UserError
from bids_varaug.reports.group import Page, RunInfo, applied_page, load_page
from tests.reports.group_content import make_numerics, make_page, make_study


def make_predicted(n: int = 40, known: int = 30) -> pd.DataFrame:
    predicted = make_study(n, gains={}).predictions.drop(columns="augmentation")
    predicted.loc[known:, "age"] = np.nan
    return predicted


def make_applied(known: int = 30, predicted: pd.DataFrame | None = None, **changes) -> Page:
    predicted = make_predicted(known=known) if predicted is None else predicted
    model = {"model": "ridge", "augmentation": "members", "n_participants": 300, "age_min": 18.0,
             "age_max": 85.0, "sha256": "b" * 64} | changes  # fmt: skip
    parts = {
        "methods": cite(
            "applied", versions={"bids_varaug": "0.1.0"}, model=model, features="volumes of 31 features [mm3]"
        ).methods,
        "left_out": {"sub-900": "no value of <b>CSF</b>"},
        "warnings": ["3 images are of people outside the ages of training."],
        "source": {"ensemble": "aseg31", "sha256": {"ieee": "a" * 64}},
        "versions": {"bids_varaug": "0.1.0"},
    }
    return applied_page(RunInfo(**parts), predicted, model)


@pytest.fixture(scope="module")
def page():
    return make_applied().html()


def test_page_needs_nothing_else_and_escapes(page):
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#|https://doi\.org/|https://arxiv\.org/abs/)""", page)
    assert "default-src 'none'" in page and "<b>CSF" not in page and "&lt;b&gt;CSF" in page
    for anchor in ("answer", "ages", "model", "left-out", "run", "cite"):
        assert f'id="{anchor}"' in page and f'href="#{anchor}"' in page


def test_every_participant_has_an_age_and_limits(page):
    assert all(f"sub-{i:03d}" in page for i in range(40))
    assert "b" * 64 in page and "outside the ages of training" in page and ">nan<" not in page


def test_error_is_of_known_ages_alone():
    known = make_predicted()[:30]
    error = (known["predicted"] - known["age"]).abs().mean()
    box = make_applied().html()
    assert f"30 participants of known age the mean absolute error is {error:.2f} years" in box
    unknown = make_applied(known=0).html()
    assert "not known" in unknown and "mean absolute error" not in unknown


@pytest.mark.parametrize(("inner_mae", "suspicious"), [(20.0, True), (4.0, False)])
def test_an_error_too_small_for_new_people_is_pointed_out(inner_mae, suspicious):
    assert ("was probably fitted to these people" in make_applied(inner_mae=inner_mae).html()) == suspicious


def test_people_of_two_sessions_are_averaged():
    predicted = make_predicted(n=20)
    again = predicted.assign(session_id="ses-2", predicted=predicted["predicted"] + 2)
    first = predicted.assign(session_id="ses-1")
    page = make_applied(predicted=pd.concat([first, again])).html()
    mean = first["predicted"].iloc[0] + 1
    assert f">{mean:.1f}<" in page and "brainage_ses-*" in page and "40 images" in page


@pytest.mark.parametrize("page", [make_page(), make_applied(), make_applied(known=0)])
def test_a_saved_page_is_the_same_page(tmp_path, page):
    assert load_page(page.save(tmp_path / "content.json")).html() == page.html()


def test_infinite_and_missing_numbers_are_saved_as_such(tmp_path):
    numerics = make_numerics()
    numerics.loc[0, ["ratio", "high", "n_needed"]] = np.inf
    numerics.loc[1, ["ratio", "high", "n_needed"]] = np.nan
    page = make_page(numerics=numerics)
    assert load_page(page.save(tmp_path / "content.json")).html() == page.html()
    assert ">∞<" in page.html() and ">n/a<" in page.html() and ">nan<" not in page.html()


def test_what_cannot_be_read_is_named(tmp_path):
    path = tmp_path / "content.json"
    with pytest.raises(NoInputError, match="content.json: not found"):
        load_page(path)
    path.write_text('{"format": 4, "template": "group.html"')
    with pytest.raises(UserError, match="damaged"):
        load_page(path)
    path.write_text('{"format": 4, "template": "group.html", "values": {"run": {"methods": "", "sloppy": false}}}')
    with pytest.raises(UserError, match="damaged"):
        load_page(path)
    path.write_text('{"format": 1}')
    with pytest.raises(UserError, match="format 1"):
        load_page(path)
