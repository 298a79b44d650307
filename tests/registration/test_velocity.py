import numpy as np
import pytest
import torch

from bids_varaug.registration import velocity
from bids_varaug.registration.register import register_posterior
from bids_varaug.registration.transforms import grid_points, head_points, sample_labels

KNOTS = (3, 21, 23, 22)


def smooth_velocity(seed: int = 0) -> torch.Tensor:
    """Coefficients of a smooth velocity, 0 at the edge, up to about 2 voxels."""
    rng = np.random.default_rng(seed)
    at = np.meshgrid(*(np.linspace(0, np.pi, n) for n in KNOTS[1:]), indexing="ij")
    window = np.prod([np.sin(a) ** 2 for a in at], axis=0)
    phases = rng.uniform(0, 2 * np.pi, 3)
    return torch.tensor(2 * window * np.stack([np.sin(2 * at[(c + 1) % 3] + phases[c]) for c in range(3)]))


def test_constant_velocity_is_a_shift():
    shift = torch.full(KNOTS, 0.75, dtype=torch.float64)
    torch.testing.assert_close(velocity.integrate(shift), shift)


def test_linear_velocity_is_its_matrix_exponential():
    """v = a x about the centre goes to exp(a) x."""
    x = torch.arange(-10.0, 11.0, dtype=torch.float64)
    field = torch.zeros(3, 21, 5, 5, dtype=torch.float64)
    field[0] = -0.2 * x[:, None, None]  # inwards, so that nothing comes from beyond the edge
    expected = (np.exp(-0.2) - 1) * x
    found = velocity.integrate(field, steps=10)[0, :, 2, 2]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


def test_negative_velocity_is_the_inverse():
    field = smooth_velocity()
    there, back = velocity.integrate(field), velocity.integrate(-field)
    error = (there + velocity.warp(back, there)).norm(dim=0)
    assert there.norm(dim=0).max() > 1.5
    assert error.mean() < 0.01 and error.max() < 0.1  # voxels, at displacements of 4


def test_fine_spline_passes_through_the_knots():
    coefficients = smooth_velocity()
    fine = velocity.spline_velocity(coefficients, fine=True)
    assert fine.shape[1:] == tuple(2 * n - 1 for n in KNOTS[1:])
    torch.testing.assert_close(fine[:, ::2, ::2, ::2], velocity.spline_velocity(coefficients))
    # A constant stays constant but for the edge.
    constant = velocity.spline_velocity(torch.ones(KNOTS), fine=True)
    torch.testing.assert_close(constant[:, 4:-4, 4:-4, 4:-4], torch.ones_like(constant[:, 4:-4, 4:-4, 4:-4]))


def test_upsampled_displacement_counts_voxels_of_the_finer_grid():
    field = torch.full(KNOTS, 0.5)
    assert velocity.upsample(field).unique().tolist() == [1.0]


def test_jacobian_of_a_stretch_and_of_a_fold():
    x = np.arange(9.0)
    stretch, fold = np.zeros((2, 3, 9, 5, 5), np.float32)
    stretch[0] = 0.1 * x[:, None, None]
    fold[0] = -1.5 * x[:, None, None]
    np.testing.assert_allclose(velocity.jacobian_determinants(stretch), 1.1, rtol=1e-5)
    assert (velocity.jacobian_determinants(fold) < 0).all()


def test_gradient_of_the_dice_is_that_of_finite_differences():
    rng = np.random.default_rng(1)
    moving = rng.dirichlet(np.ones(4), (6, 7, 8)).astype(np.float32)
    classes = rng.integers(0, 4, 30).astype(np.uint8)
    points = rng.uniform(1, 4.9, (3, 30)).astype(np.float32)
    points += np.float32(0.5) - np.abs(points % 1 - np.float32(0.5)) < 0.05  # not at a kink
    dice, gradient = velocity.dice_gradient(moving, classes, points)
    assert np.isnan(dice[0]) and ((dice[1:] > 0) & (dice[1:] < 1)).all()
    for axis, n in [(0, 0), (1, 7), (2, 29)]:
        ends = []
        for step in (-0.02, 0.02):
            moved = points.copy()
            moved[axis, n] += step
            ends.append(1 - np.nanmean(velocity.dice_gradient(moving, classes, moved)[0]))
        assert gradient[axis, n] == pytest.approx((ends[1] - ends[0]) / 0.04, rel=0.05, abs=2e-5)


@pytest.fixture(scope="module")
def registered(head, template):
    return register_posterior(head.sparse, head.geometry, template, 60)


def test_bent_head_is_brought_onto_the_template_without_folds(registered, head, template):
    def dice(registration) -> float:
        points = head_points(registration, registration.field(template.grid), template.grid, grid_points(template.grid))
        found = sample_labels(head.sparse.labels, head.geometry.conformed_affine, points).reshape(template.labels.shape)
        both = [(found == k) & (template.labels == k) for k in range(1, 7)]
        return np.mean(
            [2 * b.sum() / ((found == k).sum() + (template.labels == k).sum()) for k, b in enumerate(both, 1)]
        )

    affine = register_posterior(head.sparse, head.geometry, template, 0)
    assert dice(affine) < 0.8 < 0.88 < dice(registered)
    assert (velocity.jacobian_determinants(registered.field(template.grid) / 2) > 0).all()


def test_same_bits_twice_and_a_start_is_taken(registered, head, template):
    again = register_posterior(head.sparse, head.geometry, template, 60)
    assert np.array_equal(again.coefficients, registered.coefficients)
    kept = register_posterior(head.sparse, head.geometry, template, 0, registered.coefficients)
    assert np.array_equal(kept.coefficients, registered.coefficients)
