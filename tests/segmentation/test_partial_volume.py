import csv

import nibabel as nib
import numpy as np
import pytest

from bids_varaug.segmentation.partial_volume import corrected_volumes, mix_at_borders


@pytest.fixture(scope="module")
def bert(shared_data):
    return [np.asanyarray(nib.load(shared_data / "t1w" / "bert" / f"bert_desc-{name}.nii.gz").dataobj)
            for name in ("aparcDKTaseg_dseg", "norm_T1w")]  # fmt: skip


def test_voxels_are_split_as_in_fastsurfer(golden, bert):
    with np.load(golden / "segstats_maps.npz") as arrays:
        wanted = dict(arrays)
    around = tuple(slice(low - 8, high + 8) for low, high in wanted["box"])
    found = mix_at_borders(*(data[around] for data in bert))
    inside = (slice(8, -8),) * 3
    np.testing.assert_array_equal(found.neighbour[inside], wanted["neighbour"])
    np.testing.assert_allclose(found.share[inside], wanted["mixing"], atol=1e-6)
    np.testing.assert_allclose(1 - found.share[inside], wanted["neighbour_mixing"], atol=1e-6)


def test_volumes_are_those_of_fastsurfer(golden, bert):
    volumes = corrected_volumes(*bert, 1.0)
    with (golden / "segstats.tsv").open() as stream:
        for row in csv.DictReader(stream, delimiter="\t"):
            assert volumes.get(int(row["id"]), 0) == pytest.approx(float(row["volume_mm3"]), rel=1e-6), row["name"]


def test_a_border_in_the_middle_of_voxels_gives_half_of_them():
    labels = np.ones((20, 8, 8), np.int16)
    labels[10:] = 2
    image = np.where(labels == 1, 100.0, 20.0)
    image[9] = 60  # half of each
    volumes = corrected_volumes(labels, image, 2.0)
    share = mix_at_borders(labels, image).share[9]
    assert ((share > 0.45) & (share < 0.55)).all()
    assert sum(volumes.values()) == pytest.approx(2.0 * labels.size)
    assert volumes[1] == pytest.approx(2.0 * 64 * 9.5, rel=0.01)


def test_sharp_borders_leave_the_counts():
    labels = np.zeros((12, 12, 12), np.int16)
    labels[3:9, 3:9, 3:9] = 17
    assert corrected_volumes(labels, np.where(labels == 17, 90.0, 10.0), 1.0) == {17: 216.0}
