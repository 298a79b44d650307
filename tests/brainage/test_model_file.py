"""A model as a file: the same predictions, no foreign code, and refusals that say why."""

import json
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import skops.io
from sklearn.linear_model import Ridge

from bids_varaug.brainage import model_file
from bids_varaug.brainage.model_file import apply_model, load_model, model_card, save_model
from bids_varaug.brainage.models import VALUES, fit_brain_age
from bids_varaug.errors import NoInputError, UserError
from tests.brainage.cohorts import simulated_cohort
from tests.reports.group_content import make_study

SOURCE = {
    "kind": "bids_varaug",
    "ensemble": "aseg31",
    "ensemble_version": "0.1.0",
    "bids_varaug": "0.1.0",
    "sloppy": False,
    "sha256": {"ieee": "a", "mca01": "b"},
}


class Foreign(Ridge):
    """Not among what a model may hold."""


@pytest.fixture(scope="module")
def cohort():
    return replace(simulated_cohort(n=24, n_members=3, n_features=4), source=dict(SOURCE))


@pytest.fixture(scope="module")
def model(cohort):
    return fit_brain_age(cohort, "ridge", "analytic")


@pytest.mark.parametrize(
    ("name", "augmentation"),
    [("ridge", "none"), ("bayesian_ridge", "members"), ("svr", "mean"), ("gpr", "none"),
     ("auto", "jitter")],
)  # fmt: skip
def test_every_kind_of_model_predicts_the_same_after_reading(cohort, tmp_path, name, augmentation):
    model = fit_brain_age(cohort, name, augmentation)
    read = load_model(save_model(tmp_path / "models" / "brainage.skops", model, "# card\n"))
    assert read.predict(cohort).equals(model.predict(cohort))
    assert (read.names, dict(read.source), read.unit) == (model.names, SOURCE, "mm3")
    assert (tmp_path / "models" / "brainage.md").read_text() == "# card\n"


@pytest.mark.parametrize("name", ["ridge", "svr"])
def test_a_model_of_logarithms_takes_them_after_reading(cohort, tmp_path, name):
    model = fit_brain_age(cohort, name, "members", log_volumes=True)
    read = load_model(save_model(tmp_path / "brainage.skops", model, ""))
    assert read.predict(cohort).equals(model.predict(cohort))
    plain = fit_brain_age(cohort, name).predict(cohort)
    assert not np.allclose(read.predict(cohort)["predicted"], plain["predicted"])


def test_equal_models_are_equal_files(cohort, tmp_path):
    files = [save_model(tmp_path / f"{i}.skops", fit_brain_age(cohort, "auto", "members"), "") for i in (1, 2)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_no_pickle_inside(model, tmp_path):
    path = save_model(tmp_path / "m.skops", model, "")
    names = zipfile.ZipFile(path).namelist()
    assert "schema.json" in names and not any("pickle" in n or "pkl" in n for n in names)


def test_foreign_types_are_named_and_not_loaded(model, tmp_path):
    path = save_model(tmp_path / "m.skops", replace(model, estimator=Foreign()), "")
    with pytest.raises(UserError, match="test_model_file.Foreign, which no brain-age model"):
        load_model(path)


def test_what_is_no_model_is_refused(tmp_path):
    path = tmp_path / "m.skops"
    with pytest.raises(NoInputError, match="m.skops"):
        load_model(path)
    path.write_bytes(b"PK\x03\x04 half a file")
    with pytest.raises(UserError, match="damaged"):
        load_model(path)
    skops.io.dump(Ridge(), path)
    with pytest.raises(UserError, match="no brain-age model"):
        load_model(path)


def test_truncated_file_is_damaged(model, tmp_path):
    path = save_model(tmp_path / "m.skops", model, "")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match="damaged"):
        load_model(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"format": 99}, "of format 99"), ({"scikit-learn": "0.1.2"}, "scikit-learn 0.1.2")],
)
def test_other_formats_and_versions_are_refused(model, tmp_path, monkeypatch, change, message):
    path = tmp_path / "m.skops"
    if "format" in change:
        monkeypatch.setattr(model_file, "FORMAT", change["format"])
        save_model(path, model, "")
        monkeypatch.undo()
    else:
        save_model(path, model, "")
        content = skops.io.load(path, trusted=list(model_file.TRUSTED))
        content["versions"] |= change
        skops.io.dump(content, path)
    with pytest.raises(UserError, match=message):
        load_model(path)


def test_a_failed_write_leaves_the_old_model(model, tmp_path, monkeypatch):
    path = save_model(tmp_path / "m.skops", model, "old")
    before = path.read_bytes()
    monkeypatch.setattr(skops.io, "dumps", lambda content: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_model(path, model, "new")
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.md", "m.skops"]


def test_applied_to_other_people(cohort, model):
    table = apply_model(model, cohort.take(np.arange(5)))
    assert list(table.columns) == ["participant_id", "session_id", "observation", "age", *VALUES]
    assert np.allclose(table["predicted"], model.predict(cohort)["predicted"][:5], rtol=1e-12)
    assert (table["lower"] < table["upper"]).all() and (table["sd_num"] > 0).all()
    assert table.attrs["notes"] == []


def test_order_and_further_features_do_not_matter(cohort, model):
    other = replace(
        cohort,
        names=("new", *cohort.names[::-1]),
        baseline=np.column_stack([np.ones(len(cohort)), cohort.baseline[:, ::-1]]),
        members=np.concatenate([np.ones((len(cohort), 3, 1)), cohort.members[..., ::-1]], axis=2),
    )
    table = apply_model(model, other)
    assert np.allclose(table["predicted"], model.predict(cohort)["predicted"])
    assert table.attrs["notes"] == ["1 features that the model does not know are ignored: new."]


def test_missing_features_are_listed(cohort, model):
    other = replace(cohort, names=("structure0", "a", "b", "structure3"))
    with pytest.raises(UserError, match="needs 2 of its 4 features.*structure1, structure2"):
        apply_model(model, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ensemble": "mine"}, r"ensemble \(aseg31 in training, mine here\)"),
        ({"ensemble_version": "0.2.0"}, "version of the ensemble.*0.2.0 here"),
        ({"sloppy": True}, "--sloppy"),
        ({"kind": "table"}, "kind of features"),
        ({"sha256": {"ieee": "a", "mca01": "x"}}, "weights of mca01"),
    ],
)
def test_features_made_otherwise_are_refused(cohort, model, change, message):
    with pytest.raises(UserError, match=message):
        apply_model(model, replace(cohort, source=SOURCE | change))


def test_unknown_origin_is_no_difference_but_other_versions_are_told(cohort, model):
    unknown = replace(cohort, source=SOURCE | {"ensemble": None, "bids_varaug": "0.2.0"})
    notes = apply_model(model, unknown).attrs["notes"]
    assert notes == ["The model was fitted to features of bids_varaug 0.1.0; these are of 0.2.0."]


def test_other_unit_and_missing_values_are_refused(cohort, model):
    with pytest.raises(UserError, match="unit"):
        apply_model(model, replace(cohort, unit="ml"))
    holed = cohort.baseline.copy()
    holed[3, 1] = np.nan
    with pytest.raises(UserError, match="structure1: missing or infinite in sub-003"):
        apply_model(model, replace(cohort, baseline=holed))


def test_ages_outside_training_are_told(cohort, model):
    people = cohort.people.assign(age=[150.0, *cohort.age[1:]])
    notes = apply_model(model, replace(cohort, people=people)).attrs["notes"]
    assert len(notes) == 1 and "1 image is of a person outside" in notes[0] and "extrapolated" in notes[0]


def test_card_tells_data_scores_and_limits(cohort, model):
    card = model_card(model, cohort, make_study(), "fcon")
    assert card.startswith("# Model card: fcon\n")
    for text in ("24 participants", "structure0, structure1", "ensemble aseg31", "| members | 120",
                 "## Intended use", "## Limits", "Not a medical device", "analytic"):  # fmt: skip
        assert text in card
    assert "nan" not in card
    assert "Not evaluated." in model_card(model, cohort)


def test_the_schema_names_only_trusted_types(model, tmp_path):
    path = save_model(tmp_path / "m.skops", model, "")
    assert set(skops.io.get_untrusted_types(file=path)) <= set(model_file.TRUSTED)
    assert json.loads(zipfile.ZipFile(path).read("schema.json"))
