import csv

import nibabel as nib
import numpy as np
import pytest

from bids_varaug.segmentation.partial_volume import corrected_volumes, left_voxels, mix_at_borders


@pytest.fixture(scope="module")
def bert(shared_data):
    """Labels of a head, of which FastSurfer does not count three (30, 62, 85), and the image."""
    return [np.asanyarray(nib.load(shared_data / "t1w" / "bert" / f"bert_desc-{name}.nii.gz").dataobj)
            for name in ("aparcDKTaseg_dseg", "norm_T1w")]  # fmt: skip


@pytest.fixture(scope="module")
def statistics(golden):
    with (golden / "segstats.tsv").open() as stream:
        return list(csv.DictReader(stream, delimiter="\t"))


def test_voxels_are_split_as_in_fastsurfer(golden, bert, statistics):
    with np.load(golden / "segstats_maps.npz") as arrays:
        wanted = dict(arrays)
    around = tuple(slice(low - 8, high + 8) for low, high in wanted["box"])
    found = mix_at_borders(*(data[around] for data in bert), [int(row["id"]) for row in statistics])
    inside = (slice(8, -8),) * 3
    np.testing.assert_array_equal(found.neighbour[inside], wanted["neighbour"])
    np.testing.assert_allclose(found.share[inside], wanted["mixing"], atol=1e-6)
    np.testing.assert_allclose(1 - found.share[inside], wanted["neighbour_mixing"], atol=1e-6)


def test_volumes_are_those_of_fastsurfer(bert, statistics):
    """To the six decimals that are there."""
    volumes = corrected_volumes(*bert, [int(row["id"]) for row in statistics])
    np.testing.assert_allclose(volumes, [float(row["volume_mm3"]) for row in statistics], rtol=0, atol=1e-6)


def slabs():
    """Labels 1 and 2, which meet at x = 10; the last slab of 1 is as bright as a mixture of 3 to 1."""
    labels = np.ones((20, 20, 20), np.int16)
    labels[10:] = 2
    image = np.where(labels == 1, 100, 20).astype(np.uint8)
    image[9] = 80
    return labels, image


def test_a_voxel_at_a_border_is_shared_by_intensity():
    labels, image = slabs()
    found = mix_at_borders(labels, image, [1, 2])
    own, other = (7 * 100 + 80) / 8, 20  # in the window of a voxel at x = 9: x from 2 to 9, and from 10 to 16
    np.testing.assert_allclose(found.share[9], (80 - other) / (own - other), atol=1e-9)
    assert (found.neighbour[9] == 2).all() and (found.share[:9] == 1).all() and (found.share[10:] == 1).all()
    ones, twos = corrected_volumes(labels, image, [1, 2])
    assert twos == pytest.approx(400 * (10 + 1 - found.share[9, 0, 0]))
    assert ones + twos == pytest.approx(labels.size)


def test_the_label_with_most_voxels_around_is_the_neighbour():
    labels, image = slabs()
    labels[10:, :9] = 3
    found = mix_at_borders(labels, image, [1, 2, 3]).neighbour[9]
    assert (found[:9] == 3).all() and (found[9:] == 2).all()


def test_labels_that_are_not_counted_have_no_border_with_background():
    """As in FastSurfer: background beside them is not split, even where a structure is near."""
    labels, image = np.zeros((20, 20, 20), np.int16), np.full((20, 20, 20), 20, np.uint8)
    labels[10:], image[10:] = 85, 100
    labels[10:, 10:] = 28
    image[9] = 60
    assert (mix_at_borders(labels, image, [28]).share[9, :10] == 1).all()
    assert (mix_at_borders(labels, image, [28, 85]).share[9, :10] < 1).all()
    assert (mix_at_borders(labels, image, [28]).share[9, 10:] < 1).all()


def test_sharp_borders_leave_the_counts():
    labels = np.zeros((40, 12, 12), np.int16)
    labels[3:9, 3:9, 3:9] = 17
    volumes = corrected_volumes(labels, np.where(labels == 17, 90, 10).astype(np.uint8), [17, 53])
    assert volumes.tolist() == [216, 0]
    assert corrected_volumes(labels * 0, labels.astype(np.uint8), [17]).tolist() == [0]


def test_a_side_is_that_of_a_fifth_of_the_voxels_around():
    labels = np.full((9, 9, 9), 41, np.int16)
    labels[4, 4, 4] = 77
    labels[1, 1:8, 1:8] = 2  # a seventh of 7 x 7 x 7 voxels
    assert left_voxels(labels, 77, [2]) == 0
    labels[2, 1:8, 1:8] = 2
    assert left_voxels(labels, 77, [2]) == 1
    assert left_voxels(labels, 63, [2]) == 0
