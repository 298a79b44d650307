"""Left and right, by name and by position."""

from pathlib import Path

import numpy as np
import pytest

from bids_varaug.errors import UserError
from bids_varaug.training.labels import check_laterality, load_scheme, other_side

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
    """Class 1 on the left, 2 on the right, 3 in the middle; 1 mm."""
    classes = np.zeros((40, 24, 24), np.uint8)
    classes[4:20, 4:20, 4:20] = 1
    classes[20:36, 4:20, 4:20] = 2
    classes[14:26, 8:20, 8:20] = 3
    return classes


@pytest.fixture
def scheme_of(tmp_path):
    def load(*names):
        rows = [f"{index}\t{name}" for index, name in enumerate(names, 1)]
        path = tmp_path / "dseg.tsv"
        path.write_text("\n".join(["index\tname", *rows]) + "\n")
        return load_scheme(path)

    return load


def test_structures_in_their_places_are_accepted(halves, scheme_of):
    check_laterality(halves, scheme_of("Left-A", "Right-A", "Stem"), HERE)


def test_left_on_the_right_is_refused(halves, scheme_of):
    with pytest.raises(UserError, match=r"labels.nii.gz: Left-A lies to the right of Right-A"):
        check_laterality(halves[::-1], scheme_of("Left-A", "Right-A", "Stem"), HERE)


def test_one_sided_structure_without_counterpart_is_refused(halves, scheme_of):
    with pytest.raises(UserError, match="A lies on one side of the head and has no counterpart"):
        check_laterality(halves, scheme_of("A", "B", "Stem"), HERE)


def test_one_label_for_both_sides_is_accepted(halves, scheme_of):
    check_laterality(np.minimum(halves, 1), scheme_of("A"), HERE)


def test_a_midline_structure_may_lie_a_little_to_one_side(halves, scheme_of):
    halves[halves == 3] = 2
    halves[21:27, 8:20, 8:20] = 3
    check_laterality(halves, scheme_of("Left-A", "Right-A", "Stem"), HERE)
