"""Label maps to simulate from."""

import nibabel as nib
import numpy as np
import pytest

from bids_varaug.errors import UserError
from simulation.template import read_template

AFFINE = np.diag([2.0, 2, 2, 1])


def write(path, data, affine=AFFINE):
    nib.save(nib.Nifti1Image(data, affine), path)
    return path


def volumes(labels, spacing):
    return {int(i): np.count_nonzero(labels == i) * spacing**3 for i in np.unique(labels) if i}


def test_template_is_cropped_with_room_around(head, head_file):
    template = read_template(head_file, 2.0)
    assert volumes(template.labels, 2.0) == volumes(head, 2.0)
    inside = np.argwhere(template.labels)
    assert inside.min(0).min() * 2.0 >= 14
    world = template.affine[:3, :3] @ inside[0] + template.affine[:3, 3]
    assert np.allclose(world, 2.0 * np.argwhere(head)[0])


def test_other_orientation_and_voxel_size_give_the_same_head(head, head_file, tmp_path):
    flipped = nib.as_closest_canonical(nib.load(head_file)).as_reoriented(
        nib.orientations.axcodes2ornt("LIA")
    )
    nib.save(flipped, tmp_path / "lia.nii.gz")
    expected = read_template(head_file, 2.0)
    turned = read_template(tmp_path / "lia.nii.gz", 2.0)
    assert np.array_equal(turned.labels, expected.labels)
    coarse = volumes(read_template(head_file, 4.0).labels, 4.0)
    fine = volumes(head, 2.0)
    for structure in (2, 3, 24, 41, 42):
        assert coarse[structure] == pytest.approx(fine[structure], rel=0.05)


def test_map_without_fluid_gets_some(head, tmp_path):
    path = write(tmp_path / "brain.nii.gz", np.where(head == 24, 0, head).astype(np.int16))
    labels = read_template(path, 2.0).labels
    brain = np.isin(labels, (2, 3, 4, 17, 41, 42, 43, 53))
    assert np.count_nonzero(brain) == np.count_nonzero(np.isin(head, (2, 3, 4, 17, 41, 42, 43, 53)))
    assert 0.02 < np.count_nonzero(labels == 24) / np.count_nonzero(brain) < 0.3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: np.where(h == 3, 1035, h), r"\[1035\] are not known"),
        (lambda h: np.where(h == 53, 2, h), r"lacks Right-Hippocampus \(53\)"),
        (lambda h: np.where(np.isin(h, (4, 43)), 2, h), "lacks Left-Lateral-Ventricle"),
        (lambda h: h + np.float32(0.25), "fractional values"),
        (lambda h: np.where(h == 3, np.nan, h.astype(np.float32)), "fractional values"),
        (lambda h: np.zeros_like(h), "lacks Left-Cerebral-White-Matter"),
        (lambda h: h[..., None], "4D image"),
    ],
)  # fmt: skip
def test_unusable_maps_are_refused_by_name(head, tmp_path, change, message):
    changed = change(head)
    dtype = np.float32 if changed.dtype.kind == "f" else np.int16
    path = write(tmp_path / "bad.nii.gz", changed.astype(dtype))
    with pytest.raises(UserError, match=message) as caught:
        read_template(path, 2.0)
    assert "bad.nii.gz" in str(caught.value)


def test_swapped_sides_are_refused(head, tmp_path):
    path = write(tmp_path / "swapped.nii.gz", head[::-1])
    with pytest.raises(UserError, match="to the right of right ones"):
        read_template(path, 2.0)


def test_what_is_no_image_is_refused(tmp_path):
    path = tmp_path / "labels.nii.gz"
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read as a label map"):
        read_template(path)
    with pytest.raises(UserError, match="absent.nii"):
        read_template(tmp_path / "absent.nii")
