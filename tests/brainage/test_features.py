import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from bids_varaug.brainage.cohort import Cohort
from bids_varaug.brainage.features import (
    Asymmetries,
    FeatureError,
    LogVolumes,
    RelativeVolumes,
    derive_features,
    find_reference,
    is_volume,
)

NAMES = ("Left-Thalamus", "Right-Thalamus", "lh_MeanThickness", "eTIV")
VALUES = np.array([[30.0, 10.0, 2.5, 200.0], [20.0, 20.0, 3.0, 100.0]])


def test_volumes_are_divided_by_the_intracranial_volume_and_thickness_is_not():
    relative = RelativeVolumes(NAMES, "intracranial").fit_transform(VALUES)
    np.testing.assert_allclose(relative, [[0.15, 0.05, 2.5, 200], [0.2, 0.2, 3.0, 100]])


def test_brain_volume_is_the_sum_of_structures_where_no_column_tells_it():
    relative = RelativeVolumes(NAMES[:2]).fit_transform(VALUES[:, :2])
    np.testing.assert_allclose(relative.sum(axis=1), 1)


def test_named_column_is_the_reference():
    relative = RelativeVolumes(NAMES, "Right-Thalamus").fit_transform(VALUES)
    assert relative[0].tolist() == [3, 10, 2.5, 200]


def test_intracranial_volumes_are_not_divided_and_no_part_of_the_sum():
    names = ["Left-Thalamus", "ICV", "eTIV"]
    relative = RelativeVolumes(names, "ICV").fit_transform([[30.0, 100.0, 101.0]])
    assert relative.tolist() == [[0.3, 100, 101]]
    assert RelativeVolumes(names, "sum").fit_transform([[30.0, 100.0, 101.0]])[0, 0] == 1


def test_empty_brain_gives_no_volumes():
    assert np.isnan(RelativeVolumes(NAMES[:2], "sum").fit_transform([[0.0, 0.0]])).all()


def test_missing_reference_is_refused():
    with pytest.raises(FeatureError, match="no column of intracranial volume"):
        RelativeVolumes(NAMES[:3], "intracranial").fit(VALUES[:, :3])


@pytest.mark.parametrize("name", ["EstimatedTotalIntraCranialVol", "eTIV", "ICV", "ICV_Volume_mm3"])
def test_usual_names_of_the_intracranial_volume_are_found(name):
    assert find_reference(("Left-Thalamus", name), "intracranial") == 1


def test_accumbens_area_is_a_volume_and_surface_area_is_not():
    assert is_volume("Left-Accumbens-area_Volume_mm3") and is_volume("Left.Accumbens.area")
    assert not is_volume("lh_cuneus_SurfArea")


def test_asymmetries_follow_the_features():
    transformer = Asymmetries(NAMES).fit(VALUES)
    np.testing.assert_allclose(transformer.transform(VALUES)[:, -1], [0.5, 0])
    assert transformer.get_feature_names_out().tolist() == [*NAMES, "Thalamus_asymmetry"]


def test_asymmetry_of_what_is_absent_is_zero():
    assert Asymmetries(NAMES[:2]).fit_transform([[0.0, 0.0]])[0, -1] == 0


@pytest.mark.parametrize(
    ("left", "right"), [("lh_x", "rh_x"), ("lhCortexVol", "rhCortexVol"), ("Left-X", "Right-X")]
)
def test_usual_spellings_of_sides_are_paired(left, right):
    assert Asymmetries([right, left]).fit([[1.0, 3.0]]).transform([[1.0, 3.0]])[0, -1] == 0.5


def test_features_without_sides_are_refused():
    with pytest.raises(FeatureError, match="no left and right"):
        Asymmetries(["CSF", "Brain-Stem"]).fit([[1.0, 2.0]])


def test_log_leaves_negative_features_and_takes_zeros():
    train = np.array([[0.0, -1.0, 2.0, 3.0], [4.0, 1.0, 8.0, 2.0]])
    logs = LogVolumes(["CSF", "residual", "Left-Thalamus", "lh_thickness"]).fit(train)
    np.testing.assert_allclose(
        logs.transform(train), [[np.log(2), -1, np.log(2), 3], [np.log(6), 1, np.log(8), 2]]
    )
    # Smaller than anything in training, and 0 where training had none.
    np.testing.assert_allclose(logs.transform([[0.0, 0.0, 0.5, 1.0]])[0, 2], np.log(0.5))
    assert np.isfinite(logs.transform([[0.0, 0.0, 0.0, 0.0]])).all()


def test_transformers_are_scikit_learns():
    logs = LogVolumes([*NAMES, "Thalamus_asymmetry"])
    pipeline = make_pipeline(
        RelativeVolumes(NAMES, "eTIV"), Asymmetries(NAMES), logs, StandardScaler()
    )
    fitted = clone(pipeline).fit(VALUES)
    assert fitted.transform(VALUES).shape == (2, 5)
    assert fitted[:2].get_feature_names_out().tolist()[:4] == list(NAMES)


def test_derived_cohort_keeps_members_apart():
    members = np.stack([VALUES, VALUES * 2], axis=1)
    cohort = Cohort(pd.DataFrame({"age": [1.0, 2.0]}), NAMES, VALUES, members, ("a", "b"))
    derived = derive_features(cohort, Asymmetries(cohort.names))
    assert derived.names[-1] == "Thalamus_asymmetry"
    assert derived.members.shape == (2, 2, 5)
    np.testing.assert_allclose(derived.members[:, 1, -1], derived.baseline[:, -1])
