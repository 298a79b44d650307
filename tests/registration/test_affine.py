import numpy as np
import pytest

from bids_varaug.registration.affine import MIN_MASS, barycentres, fit_affine, framewise_displacement
from bids_varaug.registration.register import register_posterior
from tests.registration.conftest import CENTRES, make_head

MASS = np.full(6, 1000.0)


def test_known_affine_is_found_exactly(turned):
    moved = CENTRES @ turned[:3, :3].T + turned[:3, 3]
    np.testing.assert_allclose(fit_affine(CENTRES, moved, MASS, MASS), turned, atol=1e-10)


def test_affine_of_a_turned_head_is_found(template, turned):
    found = register_posterior(make_head(turned).sparse, make_head(turned).geometry, template, 0)
    corners = np.array([[20.0, 20, 20], [-20, 20, -20], [0, 0, 0]])
    error = corners @ (found.affine - turned)[:3, :3].T + (found.affine - turned)[:3, 3]
    assert np.linalg.norm(error, axis=1).max() < 0.5  # of voxels of 2 mm, whose balls have steps
    assert not found.coefficients.any()


def test_barycentre_is_weighted_by_probability(head):
    half = head.sparse.rows * 0.5
    masses, points = barycentres(head.sparse.rows, head.sparse.labels.shape, head.geometry.conformed_affine)
    halves, same = barycentres(half, head.sparse.labels.shape, head.geometry.conformed_affine)
    np.testing.assert_allclose(halves, masses / 2)
    np.testing.assert_allclose(same, points, rtol=1e-12)
    assert masses[1] == pytest.approx(8.0 * (head.sparse.labels == 1).sum())


@pytest.mark.parametrize(
    "source, mass, reason",
    [
        (CENTRES, np.array([1000.0] * 3 + [MIN_MASS / 2] * 3), "3 of its structures"),
        (CENTRES * [1, 1, 0], MASS, "unlike those of a head"),
        (CENTRES * 5, MASS, "scales of the affine: 0.2"),
        (CENTRES * [-1, 1, 1], MASS, "unlike those of a head"),
    ],
    ids=["few", "in a plane", "too large", "mirrored"],
)
def test_what_is_no_head_is_refused(source, mass, reason):
    with pytest.raises(ValueError, match=reason):
        fit_affine(source, CENTRES, mass, MASS)


def test_framewise_displacement_counts_rotation_on_the_sphere_and_no_scale():
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(0.01), -np.sin(0.01)], [np.sin(0.01), np.cos(0.01)]]
    turn[:3, 3] = (1, -2, 0)
    scaled = np.diag([1.1, 1.1, 1.1, 1.0])
    assert framewise_displacement(turn, np.eye(4), np.zeros(3)) == pytest.approx(3.5)
    assert framewise_displacement(scaled, np.eye(4), np.zeros(3)) == pytest.approx(0.0, abs=1e-12)
    # About the centre: a rotation around a point far away moves it.
    assert framewise_displacement(turn @ turn, turn, np.array([100.0, 0, 0])) > 1.0
