"""The page of an applied model, and pages made again from what was saved."""

import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from bids_varaug.errors import NoInputError, UserError
from bids_varaug.reports.group import render_group_report
from bids_varaug.reports.group_applied import AppliedContent, cite_applied, render_applied_report
from bids_varaug.reports.group_saved import load_content, save_content
from tests.reports.group_content import make_content, make_study


def make_applied(n: int = 40, known: int = 30, **changes) -> AppliedContent:
    predicted = make_study(n, gains={}).predictions.drop(columns="augmentation")
    predicted.loc[known:, "age"] = np.nan
    model = {"model": "ridge", "augmentation": "members", "n_participants": 300, "age_min": 18.0,
             "age_max": 85.0, "sha256": "b" * 64}  # fmt: skip
    parts = {
        "model": model,
        "citation": cite_applied(model, "volumes of 31 features [mm3]", {"bids_varaug": "0.1.0"}),
        "left_out": {"sub-900": "no value of <b>CSF</b>"},
        "warnings": ["3 images are of people outside the ages of training."],
        "source": {"ensemble": "aseg31", "sha256": {"ieee": "a" * 64}},
        "versions": {"bids_varaug": "0.1.0"},
    }
    return AppliedContent(predicted, **(parts | changes))


@pytest.fixture(scope="module")
def page():
    return render_applied_report(make_applied())


def test_page_needs_nothing_else_and_escapes(page):
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", page)
    assert "default-src 'none'" in page and "<b>CSF" not in page and "&lt;b&gt;CSF" in page
    for anchor in ("answer", "ages", "model", "left-out", "run", "cite"):
        assert f'id="{anchor}"' in page and f'href="#{anchor}"' in page


def test_every_participant_has_an_age_and_limits(page):
    assert all(f"sub-{i:03d}" in page for i in range(40))
    assert "b" * 64 in page and "outside the ages of training" in page and ">nan<" not in page


def test_error_is_of_known_ages_alone():
    content = make_applied()
    known = content.predicted[:30]
    error = (known["predicted"] - known["age"]).abs().mean()
    page = render_applied_report(content)
    assert f"30 participants of known age the model is off by {error:.2f} years" in page
    unknown = render_applied_report(make_applied(known=0))
    assert "not known" in unknown and "mean absolute error" not in unknown


@pytest.mark.parametrize(("inner_mae", "suspicious"), [(20.0, True), (4.0, False)])
def test_an_error_too_small_for_new_people_is_pointed_out(inner_mae, suspicious):
    content = make_applied()
    page = render_applied_report(replace(content, model={**content.model, "inner_mae": inner_mae}))
    assert ("probably people that it was fitted to" in page) == suspicious


def test_people_of_two_sessions_are_averaged():
    content = make_applied(n=20)
    again = content.predicted.assign(
        session_id="ses-2", predicted=content.predicted["predicted"] + 2
    )
    first = content.predicted.assign(session_id="ses-1")
    page = render_applied_report(replace(content, predicted=pd.concat([first, again])))
    mean = first["predicted"].iloc[0] + 1
    assert f">{mean:.1f}<" in page and "brainage_ses-*" in page and "40 images" in page


@pytest.mark.parametrize("content", [make_content(), make_applied()], ids=["scored", "applied"])
def test_a_saved_page_is_the_same_page(tmp_path, content):
    render = render_applied_report if isinstance(content, AppliedContent) else render_group_report
    read = load_content(save_content(tmp_path / "content.json", content))
    assert render(read) == render(content)


def test_infinite_and_missing_numbers_are_saved_as_such(tmp_path):
    content = make_content()
    content.numerics.loc[0, ["ratio", "high"]] = np.inf
    content.numerics.loc[1, ["ratio", "high"]] = np.nan
    read = load_content(save_content(tmp_path / "content.json", content))
    pd.testing.assert_frame_equal(read.numerics, content.numerics, check_dtype=False)


def test_what_cannot_be_read_is_named(tmp_path):
    path = tmp_path / "content.json"
    with pytest.raises(NoInputError, match="content.json: is not there"):
        load_content(path)
    path.write_text('{"format": 1, "kind": "scored"')
    with pytest.raises(UserError, match="damaged"):
        load_content(path)
    path.write_text('{"format": 2}')
    with pytest.raises(UserError, match="format 2"):
        load_content(path)
