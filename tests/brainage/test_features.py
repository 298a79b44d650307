from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from bids_varaug.brainage.cohort import Cohort
from bids_varaug.brainage.features import (
    LogVolumes,
    asymmetries,
    find_reference,
    is_volume,
    relative_volumes,
)
from bids_varaug.errors import UserError

NAMES = ("Left-Thalamus", "Right-Thalamus", "lh_MeanThickness", "eTIV")
VALUES = np.array([[30.0, 10.0, 2.5, 200.0], [20.0, 20.0, 3.0, 100.0]])


def cohort_of(names, values):
    values = np.array(values, float)
    return Cohort(pd.DataFrame({"age": np.arange(len(values))}), tuple(names), values)


def relative(names, values, reference="brain"):
    return relative_volumes(cohort_of(names, values), reference).baseline


def test_volumes_are_divided_by_the_intracranial_volume_and_thickness_is_not():
    found = relative(NAMES, VALUES, "intracranial")
    np.testing.assert_allclose(found, [[0.15, 0.05, 2.5, 200], [0.2, 0.2, 3.0, 100]])


def test_brain_volume_is_the_sum_of_structures_where_no_column_tells_it():
    np.testing.assert_allclose(relative(NAMES[:2], VALUES[:, :2]).sum(axis=1), 1)


def test_named_column_is_the_reference():
    assert relative(NAMES, VALUES, "Right-Thalamus")[0].tolist() == [3, 10, 2.5, 200]


def test_intracranial_volumes_are_not_divided_and_no_part_of_the_sum():
    names = ["Left-Thalamus", "ICV", "eTIV"]
    assert relative(names, [[30.0, 100.0, 101.0]], "ICV").tolist() == [[0.3, 100, 101]]
    assert relative(names, [[30.0, 100.0, 101.0]], "sum")[0, 0] == 1


def test_empty_brain_gives_no_volumes():
    assert np.isnan(relative(NAMES[:2], [[0.0, 0.0]], "sum")).all()


def test_missing_reference_and_features_without_volumes_are_refused():
    with pytest.raises(UserError, match="no column of intracranial volume"):
        relative(NAMES[:3], VALUES[:, :3], "intracranial")
    with pytest.raises(UserError, match="no volume"):
        relative(["lh_thickness"], [[1.0]])


@pytest.mark.parametrize("name", ["EstimatedTotalIntraCranialVol", "eTIV", "ICV", "ICV_Volume_mm3"])
def test_usual_names_of_the_intracranial_volume_are_found(name):
    assert find_reference(("Left-Thalamus", name), "intracranial") == 1


def test_accumbens_area_is_a_volume_and_surface_area_is_not():
    assert is_volume("Left-Accumbens-area_Volume_mm3") and is_volume("Left.Accumbens.area")
    assert not is_volume("lh_cuneus_SurfArea")


def test_asymmetries_follow_the_features():
    found = asymmetries(cohort_of(NAMES, VALUES))
    np.testing.assert_allclose(found.baseline[:, -1], [0.5, 0])
    assert found.names == (*NAMES, "Thalamus_asymmetry")


def test_asymmetry_of_what_is_absent_is_zero():
    assert asymmetries(cohort_of(NAMES[:2], [[0.0, 0.0]])).baseline[0, -1] == 0


@pytest.mark.parametrize(
    ("left", "right"), [("lh_x", "rh_x"), ("lhCortexVol", "rhCortexVol"), ("Left-X", "Right-X")]
)
def test_usual_spellings_of_sides_are_paired(left, right):
    assert asymmetries(cohort_of([right, left], [[1.0, 3.0]])).baseline[0, -1] == 0.5


def test_features_without_sides_are_refused():
    with pytest.raises(UserError, match="no left and right"):
        asymmetries(cohort_of(["CSF", "Brain-Stem"], [[1.0, 2.0]]))


def test_log_leaves_negative_features_and_takes_zeros():
    train = np.array([[0.0, -1.0, 2.0, 3.0], [4.0, 1.0, 8.0, 2.0]])
    logs = LogVolumes(["CSF", "residual", "Left-Thalamus", "lh_thickness"]).fit(train)
    np.testing.assert_allclose(
        logs.transform(train), [[np.log(2), -1, np.log(2), 3], [np.log(6), 1, np.log(8), 2]]
    )
    # Smaller than anything in training, and 0 where training had none.
    np.testing.assert_allclose(logs.transform([[0.0, 0.0, 0.5, 1.0]])[0, 2], np.log(0.5))
    assert np.isfinite(logs.transform([[0.0, 0.0, 0.0, 0.0]])).all()


def test_logarithms_are_a_transformer_of_scikit_learn():
    check_estimator(LogVolumes())
    fitted = clone(make_pipeline(LogVolumes(NAMES), StandardScaler())).fit(VALUES)
    assert fitted.transform(VALUES).shape == (2, 4)


def test_derived_cohort_keeps_members_apart():
    members = np.stack([VALUES, VALUES * 2], axis=1)
    derived = asymmetries(replace(cohort_of(NAMES, VALUES), members=members, member_ids=("a", "b")))
    assert derived.members.shape == (2, 2, 5)
    np.testing.assert_allclose(derived.members[:, 1, -1], derived.baseline[:, -1])
