from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel.affines import voxel_sizes

from bids_varaug.errors import ScanError
from bids_varaug.images.load import choose_affine, is_oblique, voxel_volume

SCANNER, ALIGNED, MNI = 1, 2, 4
MIRRORED = np.diag([-1.0, 1, 1, 1])


def scaled(*sizes):
    return np.diag([*(sizes * 3 if len(sizes) == 1 else sizes), 1.0])


def turned(degrees, axis=0):
    angle = np.deg2rad(degrees)
    affine = np.eye(4)
    i, j = [k for k in range(3) if k != axis]
    affine[[i, j], [i, j]] = np.cos(angle)
    affine[i, j], affine[j, i] = -np.sin(angle), np.sin(angle)
    return affine


def header(sform=None, qform=None, pixdim=None, unit=2):
    """A header with forms given as (affine, code)."""
    made = nib.Nifti1Header()
    made.set_data_shape((100, 100, 100))
    if qform is not None:
        made.set_qform(*qform)
    elif sform is not None:
        made["pixdim"][1:4] = voxel_sizes(sform[0])
    if sform is not None:
        made.set_sform(*sform)
    if pixdim is not None:
        made["pixdim"][1:4] = pixdim
    made["xyzt_units"] = unit
    return made


def chosen(*args, trust=None, **kwargs):
    return choose_affine("x_T1w.nii", header(*args, **kwargs), trust)


@pytest.mark.parametrize("codes", [(SCANNER, SCANNER), (ALIGNED, SCANNER), (SCANNER, ALIGNED)])
def test_of_two_sizes_in_scanner_space_those_of_pixdim_count(codes):
    affine, (warning,) = chosen((scaled(1.0), codes[0]), (scaled(0.8), codes[1]))
    np.testing.assert_allclose(affine, scaled(0.8), atol=1e-6)
    assert "1 x 1 x 1 mm" in warning and "0.8 x 0.8 x 0.8 mm" in warning and "--trust" in warning


def test_a_templates_form_gives_way_to_the_scanners():
    template = turned(12) @ scaled(1.15, 1.2, 1.1)
    affine, (warning,) = chosen((template, MNI), (np.eye(4), SCANNER))
    np.testing.assert_allclose(affine, np.eye(4), atol=1e-6)
    assert "qform was used" in warning
    affine, (warning,) = chosen((np.eye(4), SCANNER), (template, MNI))
    np.testing.assert_allclose(affine, np.eye(4), atol=1e-6)
    assert "sform was used" in warning


def test_a_lone_template_form_takes_the_sizes_of_pixdim():
    affine, warnings = chosen((turned(12) @ scaled(1.15, 1.2, 1.1), MNI), pixdim=(1, 0.9, 1))
    np.testing.assert_allclose(voxel_sizes(affine), (1, 0.9, 1), atol=1e-6)
    assert voxel_volume(affine) == pytest.approx(0.9)
    assert "pixdim" in warnings[0] and "MNI152" in warnings[1]
    assert voxel_volume(chosen((scaled(1.2), MNI), pixdim=(1, 1, 1))[0]) == pytest.approx(1)


def test_pixdim_that_nobody_filled_in_does_not_count():
    affine, (warning,) = chosen((scaled(0.8), ALIGNED), pixdim=(1, 1, 1))
    np.testing.assert_allclose(affine, scaled(0.8), atol=1e-6)
    assert "sform was used" in warning


@pytest.mark.parametrize("codes", [(SCANNER, SCANNER), (MNI, SCANNER)])
def test_mirror_images_are_refused_unless_one_is_trusted(codes):
    forms = (np.eye(4), codes[0]), (MIRRORED, codes[1])
    with pytest.raises(ScanError, match=r"x_T1w.nii: .*mirror.*--trust"):
        chosen(*forms)
    assert np.linalg.det(chosen(*forms, trust="sform")[0]) > 0
    assert np.linalg.det(chosen(*forms, trust="qform")[0]) < 0


def test_trust_goes_before_every_rule():
    forms = (scaled(1.0), MNI), (scaled(0.8), SCANNER)
    np.testing.assert_allclose(chosen(*forms, trust="sform")[0], scaled(1.0), atol=1e-6)
    np.testing.assert_allclose(chosen((scaled(1.0), 0), (scaled(0.8), 0), trust="qform")[0],
                               scaled(0.8), atol=1e-6)  # fmt: skip


@pytest.mark.parametrize("trust", ["sform", "qform"])
def test_trust_does_not_touch_a_header_with_one_form(trust):
    for forms in ({"sform": (MIRRORED, 1)}, {"qform": (MIRRORED, 1)}):
        affine, warnings = chosen(**forms, trust=trust)
        np.testing.assert_allclose(affine, MIRRORED, atol=1e-6)
        assert warnings == ()


def test_pixdim_that_is_no_number_leaves_the_sform_alone():
    np.testing.assert_allclose(chosen((scaled(0.8), 1), pixdim=(np.nan, 1, 1))[0], scaled(0.8),
                               atol=1e-6)  # fmt: skip


def test_turned_forms_are_told_with_their_angle():
    _, (warning,) = chosen((turned(17), SCANNER), (np.eye(4), SCANNER))
    assert "17 degrees" in warning
    assert chosen((turned(2), SCANNER), (np.eye(4), SCANNER))[1] == ()


def test_damaged_form_gives_way_to_the_other():
    made = header((np.eye(4), SCANNER), (scaled(1.0), SCANNER))
    made["srow_x"] = np.nan
    affine, (warning,) = choose_affine("x", made)
    np.testing.assert_allclose(affine, np.eye(4), atol=1e-6)
    assert "damaged" in warning


@pytest.mark.parametrize(("unit", "mm", "word"), [(1, 1e3, "metre"), (3, 1e-3, "micron")])
def test_other_units_are_converted_and_told(unit, mm, word):
    affine, (warning,) = chosen((scaled(1 / mm), SCANNER), (scaled(1 / mm), SCANNER), unit=unit)
    np.testing.assert_allclose(affine, np.eye(4), atol=1e-6)
    assert word in warning


def test_no_unit_means_mm():
    np.testing.assert_allclose(chosen((scaled(0.9), SCANNER), unit=0)[0], scaled(0.9), atol=1e-6)


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.tuples(*[st.floats(0.4, 4)] * 3),
    degrees=st.floats(-180, 180),
    axis=st.integers(0, 2),
    mirrored=st.booleans(),
    codes=st.sampled_from([(1, 1), (2, 1), (1, 0), (0, 1), (2, 2), (1, 2)]),
)
def test_header_that_agrees_with_itself_is_taken_without_a_word(
    sizes, degrees, axis, mirrored, codes
):
    affine = turned(degrees, axis) @ scaled(*sizes) @ (MIRRORED if mirrored else np.eye(4))
    found, warnings = chosen((affine, codes[0]), (affine, codes[1]))
    np.testing.assert_allclose(found, affine, atol=5e-3)  # a quaternion in float32 is no better
    assert warnings == ()


@settings(max_examples=60, deadline=None)
@given(true=st.floats(0.5, 2), false=st.floats(1.02, 2.5), codes=st.sampled_from([(1, 1), (4, 1)]))
def test_volume_never_follows_the_wrong_form(true, false, codes):
    affine, warnings = chosen((scaled(true * false), codes[0]), (scaled(true), codes[1]))
    assert voxel_volume(affine) == pytest.approx(true**3, rel=1e-3)
    assert warnings


def test_sheared_voxel_is_smaller_than_its_edges_say():
    sheared = np.eye(4)
    sheared[1, 2], sheared[2, 2] = np.sin(np.deg2rad(20)), np.cos(np.deg2rad(20))
    assert voxel_volume(sheared) == pytest.approx(np.cos(np.deg2rad(20)))
    assert is_oblique(sheared)


@pytest.mark.parametrize(("degrees", "oblique"), [(0, False), (4, False), (6, True), (90, False)])
def test_oblique_begins_beyond_a_few_degrees(degrees, oblique):
    assert is_oblique(turned(degrees)) is oblique
