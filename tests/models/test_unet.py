"""The network: shapes, arrangement of voxels, reproducible initialisation."""

import torch

from bids_varaug.models.ensemble import NetworkShape
from bids_varaug.models.unet import build_network, fold, unfold

SMALL = NetworkShape(5, (4, 4, 4), 4)


def test_fold_and_unfold_are_inverse():
    image = torch.arange(4 * 6 * 8.0).reshape(1, 1, 4, 6, 8)
    assert torch.equal(unfold(fold(image)), image)


def test_fold_puts_neighbours_into_channels():
    image = torch.arange(8.0).reshape(1, 1, 2, 2, 2)
    assert fold(image).flatten().tolist() == list(range(8))


def test_logits_have_the_shape_of_the_image():
    network = build_network(SMALL)
    assert network(torch.rand(1, 1, 16, 24, 8)).shape == (1, 5, 16, 24, 8)
    assert SMALL.multiple == 8


def test_batches_are_normalised_image_by_image():
    network = build_network(SMALL).eval()
    images = torch.rand(2, 1, 8, 8, 16, generator=torch.Generator().manual_seed(0))
    alone = torch.cat([network(image[None]) for image in images])
    torch.testing.assert_close(network(images), alone, rtol=1e-3, atol=1e-4)


def test_same_seed_same_weights_without_touching_the_global_generator():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first, second, other = (build_network(SMALL, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(1), expected)
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first.body_head.weight, other.body_head.weight)


def test_sampled_rows_are_those_of_the_whole_volume():
    network = build_network(SMALL).eval()
    image = torch.rand(1, 1, 16, 8, 24, generator=torch.Generator().manual_seed(0))
    features = network.features(image)
    whole = network.classify(features)
    for a in (0, 1):
        for b in (0, 1):
            rows = network.classify_rows(features, a, b)
            expected = whole[:, :, a::2, :, b::2].movedim(1, -1)
            torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-5)


def test_features_by_slabs_are_those_of_the_whole_volume():
    network = build_network(SMALL).eval()
    image = torch.rand(1, 1, 24, 16, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        whole, slabs = network.features(image), network.features_by_slabs(image, 10)
    torch.testing.assert_close(slabs.rim, whole.rim, rtol=1e-4, atol=1e-5)
    assert torch.equal(slabs.body, whole.body)


def test_body_alone_sees_constant_cubes_and_says_the_mean_of_their_logits():
    network = build_network(SMALL).eval()
    coarse = torch.rand(1, 1, 8, 12, 4, generator=torch.Generator().manual_seed(0))
    logits, deep = network.coarse_logits(coarse)
    fine = coarse.repeat_interleave(2, 2).repeat_interleave(2, 3).repeat_interleave(2, 4)
    body, _ = network.body(fold(fine))
    cubes = unfold(network.body_head(body))
    expected = torch.nn.functional.avg_pool3d(cubes, 2).movedim(1, -1)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert [level.shape[2] for level in deep] == [4]


def test_evaluation_gives_the_same_bits_with_one_thread_and_two():
    # Widths and classes that oneDNN blocks by 16, as in the shipped network: others may take a
    # convolution whose sums are split by threads (docs/reference/outputs.md says where that was seen).
    network = build_network(NetworkShape(4, (16, 16, 16), 16)).eval()
    image = torch.rand(1, 1, 72, 88, 72, generator=torch.Generator().manual_seed(0))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with torch.inference_mode():
                results.append(network.classify(network.features_by_slabs(image)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])


def test_evaluation_normalises_as_training_does():
    network = build_network(SMALL)
    image = torch.rand(1, 1, 16, 24, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        evaluated = network.eval()(image)
    torch.testing.assert_close(evaluated, network.train()(image), rtol=1e-3, atol=1e-4)
