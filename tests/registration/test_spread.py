import numpy as np
import pytest

from bids_varaug.registration.register import register_posterior
from bids_varaug.registration.spread import (
    describe,
    displacement_sd,
    displacements_in_brain,
    summarise_spread,
)
from bids_varaug.registration.transforms import Registration


def shifted(registration: Registration, x: float) -> Registration:
    affine = registration.affine.copy()
    affine[0, 3] += x
    return Registration(affine, registration.coefficients)


@pytest.fixture(scope="module")
def still(head, template) -> Registration:
    return register_posterior(head.sparse, head.geometry, template, 0)


def test_equal_members_have_no_spread_and_all_bits(still, template):
    found = displacements_in_brain([still] * 3, still, template)
    summary = summarise_spread([still] * 3, found, template)
    assert (summary.sd_max, summary.affine_fd_max) == (0.0, pytest.approx(0.0, abs=1e-9))
    assert summary.sigbits_sd == 24.0
    assert np.abs(found).max() < 1e-3  # nothing but the affine of the reference


def test_shift_of_the_affine_is_the_spread_in_mm(still, template):
    """Members at -1, 0 and 1 mm of the head along x: an SD of 1 mm there, more or less in the template's mm."""
    members = [shifted(still, x) for x in (-1.0, 0.0, 1.0)]
    found = displacements_in_brain(members, still, template)
    sd = displacement_sd(found)
    expected = np.linalg.norm(np.linalg.inv(still.affine)[:3, 0])
    np.testing.assert_allclose(sd, expected, rtol=1e-4)
    summary = summarise_spread(members, found, template)
    assert summary.affine_fd_max == pytest.approx(1.0, rel=1e-6)
    assert summary.n_members == 3


def test_figures_have_names_for_the_sidecar(still, template):
    from bids_varaug.registration.spread import Quality

    found = describe(Quality(0.0, 0.001, 0.012345678), None)
    assert found == {"ShareOfFolds": 0.0, "InverseErrorMean": 0.001, "InverseErrorMax": 0.0123457}
