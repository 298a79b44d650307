import numpy as np
import pytest

from bids_varaug.registration.group_maps import GroupMaps

IDS = (0, 17, 3)
SHAPE = (2, 1, 1)


def image(labels, entropy=(0.0, 0.0), sigbits=(24.0, 24.0), unreliable=(0, 0)):
    shaped = [np.array(values).reshape(SHAPE) for values in (labels, entropy, sigbits, unreliable)]
    return shaped[0], dict(zip(("entropy", "sigbits", "unreliable"), shaped[1:], strict=True))


@pytest.fixture
def maps() -> GroupMaps:
    """Two participants, of whom the second has two images."""
    found = GroupMaps(SHAPE, IDS)
    found.add(*image((17, 3), entropy=(1.0, 0.0), unreliable=(1, 0)))
    found.add(*image((17, 17), entropy=(0.5, 0.0)), weight=0.5)
    found.add(*image((0, 3), entropy=(0.0, 2.0)), weight=0.5)
    return found


def test_each_participant_counts_once(maps):
    assert maps.weight == 2.0
    np.testing.assert_allclose(maps.mean("entropy").ravel(), [(1.0 + 0.25) / 2, 0.5])
    np.testing.assert_allclose(maps.mean("unreliable").ravel(), [0.5, 0.0])


def test_probabilities_are_shares_and_sum_to_one(maps):
    np.testing.assert_allclose(maps.probability(1).ravel(), [0.75, 0.25])
    np.testing.assert_allclose(sum(maps.probability(k) for k in range(3)), 1.0)
    assert maps.most_probable().ravel().tolist() == [1, 2]


def test_structures_are_ranked_by_entropy(maps):
    table = maps.region_table(["Background", "Left-Hippocampus", "Left-Cerebral-Cortex"])
    assert table["name"].tolist() == ["Left-Hippocampus", "Left-Cerebral-Cortex"]
    np.testing.assert_allclose(table["entropy"], [0.625, 0.5])
    np.testing.assert_allclose(table["overlap"], [0.75, 0.75])


def test_other_grids_and_unknown_labels_are_refused(maps):
    with pytest.raises(ValueError, match="entropy of"):
        labels, others = image((0, 0))
        maps.add(labels, others | {"entropy": np.zeros((3, 1, 1))})
    with pytest.raises(ValueError, match="lacks: \\[99\\]"):
        maps.add(*image((99, 0)))
    assert maps.weight == 2.0
