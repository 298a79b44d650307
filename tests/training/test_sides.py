"""Left and right, by name and by place."""

from pathlib import Path

import numpy as np
import pytest

from bids_varaug.errors import UserError
from bids_varaug.training.sides import check_sides, other_side

HERE = Path("labels.nii.gz")


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("Left-Hippocampus", "Right-Hippocampus"),
        ("ctx-rh-insula", "ctx-lh-insula"),
        ("hippocampus_L", "hippocampus_R"),
        ("R_Amygdala", "L_Amygdala"),
        ("thalamus left", "thalamus right"),
        ("Brain-Stem", None),
        ("CSF", None),
        ("Vermis", None),
        ("lateral ventricle", None),
    ],
)
def test_counterparts_by_name(name, other):
    assert other_side(name) == other
    assert other is None or other_side(other) == name


@pytest.fixture
def halves():
    """Class 1 on the left, 2 on the right, 3 in the middle."""
    classes = np.zeros((20, 12, 12), np.uint8)
    classes[2:10, 2:10, 2:10] = 1
    classes[10:18, 2:10, 2:10] = 2
    classes[7:13, 4:10, 4:10] = 3
    return classes


NAMES = ("background", "Left-A", "Right-A", "Stem")


def test_structures_in_their_places_are_accepted(halves):
    check_sides(halves, np.array([0, 2, 1, 3], np.uint8), NAMES, HERE)


def test_left_on_the_right_is_refused(halves):
    with pytest.raises(UserError, match=r"labels.nii.gz: Left-A lies to the right of Right-A"):
        check_sides(halves[::-1], np.array([0, 2, 1, 3], np.uint8), NAMES, HERE)


def test_one_sided_structure_without_counterpart_is_refused(halves):
    names = ("background", "A", "B", "Stem")
    with pytest.raises(UserError, match="A lies on one side of the head and has no counterpart"):
        check_sides(halves, np.arange(4, dtype=np.uint8), names, HERE)


def test_one_label_for_both_sides_is_accepted(halves):
    check_sides(np.minimum(halves, 1), np.arange(2, dtype=np.uint8), ("background", "A"), HERE)
