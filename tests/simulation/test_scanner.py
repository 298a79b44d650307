"""Images look T1-weighted."""

import numpy as np
import pytest

from simulation.scanner import Scanner, draw_image, draw_scanner, smooth_field


def test_white_matter_is_brighter_than_cortex_and_cortex_than_fluid(head):
    image = draw_image(head, 2.0, np.random.default_rng(0))
    assert image.dtype == np.float32
    white, cortex, fluid = (np.median(image[np.isin(head, i)]) for i in ((2, 41), (3, 42), (4, 43)))
    assert white > 1.2 * cortex > 1.5 * fluid
    assert white == pytest.approx(Scanner().scale, rel=0.15)


def test_extracted_brain_has_an_empty_background(head):
    image = draw_image(head, 2.0, np.random.default_rng(0))
    assert not image[head == 0].any()


def test_whole_head_has_noise_in_the_air(head):
    whole = np.where(head == 24, 511, head)
    image = draw_image(whole, 2.0, np.random.default_rng(0))
    assert image[:3].std() > 5


def test_noisier_scanner_gives_noisier_images(head):
    def spread(noise):
        scanner = Scanner(noise=noise, bias=0.0)
        image = draw_image(head, 2.0, np.random.default_rng(0), scanner=scanner)
        return image[head == 2].std()

    assert spread(0.1) > 2 * spread(0.01)


def test_unknown_id_is_refused(head):
    with pytest.raises(ValueError, match="1035"):
        draw_image(np.where(head == 3, 1035, head), 2.0, np.random.default_rng(0))


def test_scanners_differ_and_are_named_by_their_seed():
    first, again, other = (draw_scanner(np.random.default_rng(s)) for s in (1, 1, 2))
    assert first == again != other


def test_fields_have_unit_variance_and_are_smooth():
    rng = np.random.default_rng(0)
    fields = np.stack([smooth_field(rng, (24, 20, 17), 6.0) for _ in range(400)])
    # 400 draws: a variance is within 4.5 standard errors of 1 at all of 8160 voxels.
    assert fields.var(0) == pytest.approx(np.ones((24, 20, 17)), abs=0.4)
    assert np.abs(np.diff(fields, axis=1)).mean() < 0.25
