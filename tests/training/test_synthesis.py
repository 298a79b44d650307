"""Drawn images: reproducible, of the right labels, sometimes without a skull."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from bids_varaug.training.labels import TISSUES, load_scheme
from bids_varaug.training.synthesis import SynthesisSettings, SyntheticImageGenerator

SHAPE = (64, 64, 64)


def test_same_seed_same_image(scheme, subject):
    generator = SyntheticImageGenerator(scheme, SynthesisSettings())
    first, second = (generator.draw(subject, SHAPE, 1.0, 5) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[0], generator.draw(subject, SHAPE, 1.0, 6)[0])


def test_image_is_scaled_and_target_within_range(scheme, subject):
    generator = SyntheticImageGenerator(scheme, SynthesisSettings())
    for seed in range(6):
        image, target = generator.draw(subject, SHAPE, 1.0, seed)
        assert image.shape == target.shape == SHAPE
        assert image.dtype == torch.float32
        assert float(image.min()) >= 0 and float(image.max()) <= 1.5
        assert int(target.max()) < len(scheme.target_ids)


def test_windows_at_2_mm_show_twice_the_field_of_view(scheme, subject):
    generator = SyntheticImageGenerator(scheme, SynthesisSettings())
    fine, coarse = (
        np.mean([float((generator.draw(subject, SHAPE, size, s)[1] > 0).float().mean())
                 for s in range(4)])
        for size in (1.0, 2.0)
    )  # fmt: skip
    assert coarse < 0.5 * fine


def test_left_stays_left(scheme, subject):
    """With no geometric change, left structures lie at low x, flipped or not."""
    still = SynthesisSettings(0, 0, 0, 0, 0)
    generator = SyntheticImageGenerator(scheme, still)
    left = scheme.target_ids.index(2)
    right = scheme.target_ids.index(41)
    for seed in range(8):
        _, target = generator.draw(subject, (64, 72, 64), 1.0, seed)
        where = [float((target == k).nonzero()[:, 0].float().mean()) for k in (left, right)]
        assert where[0] < where[1]


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_skull_is_removed_in_the_stated_share(scheme, subject, share):
    settings = SynthesisSettings(whole_head_share=share)
    generator = SyntheticImageGenerator(scheme, settings)
    outside = []
    for seed in range(6):
        image, target = generator.draw(subject, (64, 72, 64), 1.0, seed)
        outside.append(float((image[target == 0] > 0.05).float().mean()))
    assert (np.mean(outside) > 0.3) == bool(share)


def test_ventricles_are_thinned_from_outside_and_nothing_else_is(scheme, subject):
    still = SynthesisSettings(0, 0, 0, 0, 0)
    generators = [SyntheticImageGenerator(scheme, replace(still, thin_share=share))
                  for share in (0.0, 1.0)]  # fmt: skip
    window = ((64, 72, 64), 1.0)
    ventricles = torch.tensor([scheme.target_ids.index(i) for i in (4, 43)])
    left = []
    for seed in range(8):
        thick, thin = (generator.draw(subject, *window, seed)[1] for generator in generators)
        changed = thick != thin
        assert torch.isin(thick[changed], ventricles).all()
        assert not torch.isin(thin[changed], ventricles).any()
        assert (thin[changed] > 0).all()  # white matter, which lies beside them
        left.append(float(torch.isin(thin, ventricles).sum() / torch.isin(thick, ventricles).sum()))
    assert min(left) < 0.8 < 0.9 < max(left) < 1


def test_of_freesurfers_ids_lateral_ventricles_alone_are_thinned():
    known = load_scheme()
    thinned = known.targets[known.tissue == TISSUES.index("ventricle")]
    assert {known.target_ids[k] for k in thinned} == {4, 5, 43, 44}


def test_ventricles_stay_as_they_are_on_coarse_grids(scheme, subject):
    never, always = (SynthesisSettings(thin_share=share) for share in (0.0, 1.0))
    first, second = (
        SyntheticImageGenerator(scheme, settings).draw(subject, SHAPE, 2.0, 3)[1]
        for settings in (never, always)
    )
    assert torch.equal(first, second)
