"""FastSurferVINN against FastSurfer's own numbers (random weights), and what must hold without them."""

import csv
import hashlib

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bids_varaug.models.ensemble import PLANES, VinnShape
from bids_varaug.models.fastsurfer import Vinn, build_planes, n_classes_of, resize
from bids_varaug.models.fastsurfer_labels import IDS, LEFT_TO_RIGHT, NETWORK_IDS, SAGITTAL_CHANNELS, SAGITTAL_IDS

# Where two classes are nearer to each other than this, another build of torch may prefer the other one.
CLOSE = 1e-4


def texture(seed, height, width, channels=7):
    """Inputs that the reference data describe by a formula, (height, width, channels) uint8."""
    rs = np.random.RandomState(seed)
    a = rs.randint(0, 256, size=(height, width, channels + 6), dtype=np.int64)
    b = rs.randint(-24, 25, size=(height, width, channels), dtype=np.int64)
    s = sum(a[:, :, k : k + channels] for k in range(7))
    for axis in (0, 1):
        s = sum(np.roll(s, d, axis) for d in range(-3, 4))
    s = (s - s.min()) * 255 // (s.max() - s.min())
    return np.clip(s + b, 0, 255).astype(np.uint8)


def as_input(image):
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1).astype(np.float32) / np.float32(255)))[None]


@pytest.fixture(scope="module")
def reference(golden):
    """Networks of the three planes with the weights of the reference data."""
    planes = build_planes(VinnShape())
    for plane, network in planes.items():
        network.load_state_dict(load_file(golden / f"weights_{plane}.safetensors"))
        network.eval().requires_grad_(False)
    return planes


def check(logits, positions, wanted, argmax):
    """Logits (K, H, W) agree at the positions, and everywhere in the class unless two are close."""
    np.testing.assert_allclose(logits[:, positions[:, 0], positions[:, 1]].T, wanted, rtol=0, atol=1e-5)
    top = np.sort(logits, axis=0)
    clear = top[-1] - top[-2] > CLOSE
    np.testing.assert_array_equal(logits.argmax(0)[clear], argmax[clear])
    assert clear.mean() > 0.999


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("size", [256, 320, 366])
def test_logits_are_those_of_fastsurfer(golden, reference, plane, size):
    with np.load(golden / f"logits_{plane}.npz") as arrays:
        of = {name.partition("_")[2]: arrays[name] for name in arrays if name.startswith(f"{size}_")}
    image = texture(int(of["seed"]), size, size)
    assert hashlib.sha256(image.tobytes()).hexdigest() == str(of["input_sha256"])
    logits = reference[plane](as_input(image), torch.from_numpy(of["scale"])[None])[0].numpy()
    check(logits, of["positions"], of["logits"], of["argmax"])


def test_logits_of_a_batch_with_several_voxel_sizes_are_those_of_fastsurfer(golden, reference):
    with np.load(golden / "logits_mixed_coronal.npz") as arrays:
        images = [texture(int(seed), 320, 320) for seed in arrays["seeds"]]
        assert [hashlib.sha256(image.tobytes()).hexdigest() for image in images] == arrays["input_sha256"].tolist()
        batch, scale = torch.cat([as_input(image) for image in images]), torch.from_numpy(arrays["scale"])
        given = scale.clone()
        logits = reference["coronal"](batch, scale).numpy()
        for one, positions, wanted, argmax in zip(
            logits, arrays["positions"], arrays["logits"], arrays["argmax"], strict=True
        ):
            check(one, positions, wanted, argmax)
    torch.testing.assert_close(scale, given)


def test_labels_of_a_head_are_those_of_fastsurfer(golden, reference):
    """Not the logits: on empty background equal values are pooled, and which one is taken depends on the build."""
    with np.load(golden / "logits_head_coronal.npz") as arrays:
        logits = reference["coronal"](as_input(arrays["input"]), torch.from_numpy(arrays["scale"])[None])[0].numpy()
        assert (logits.argmax(0) == arrays["argmax"]).mean() > 0.999
        at = arrays["positions"]
        assert np.median(np.abs(logits[:, at[:, 0], at[:, 1]].T - arrays["logits"])) < 1e-4


def test_every_block_gives_what_it_gives_in_fastsurfer(golden, reference):
    network, seen = reference["coronal"], {}
    handles = [
        block.register_forward_hook(lambda _m, _i, out, name=name: seen.update({name: out[0]}))
        for name, block in network.named_children()
    ]
    with np.load(golden / "logits_coronal.npz") as arrays:
        image, scale = texture(int(arrays["366_seed"]), 366, 366), torch.from_numpy(arrays["366_scale"])[None]
    network(as_input(image), scale)
    for handle in handles:
        handle.remove()
    with np.load(golden / "stages_coronal.npz") as arrays:
        compared = 0
        for name in {key.partition(":")[0] for key in arrays}:
            block = name.removesuffix("_skip")
            if block not in seen or (name == block and block.startswith("encode")):
                continue
            found, at = seen[block].numpy(), arrays[f"{name}:positions"]
            np.testing.assert_allclose(found[:, at[:, 0], at[:, 1]].T, arrays[f"{name}:values"], rtol=0, atol=1e-5)
            compared += 1
    assert compared == 12  # blocks, the classifier among them


def test_classes_are_those_of_fastsurfer(golden):
    with (golden / "labels.tsv").open() as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    assert [int(row["id"]) for row in rows] == list(NETWORK_IDS)
    assert [int(row["sagittal_index"]) for row in rows] == list(SAGITTAL_CHANNELS)
    with (golden / "labels_sagittal.tsv").open() as stream:
        assert [int(row["id"]) for row in csv.DictReader(stream, delimiter="\t")] == list(SAGITTAL_IDS)
    with (golden / "labels_lateralisation.tsv").open() as stream:
        pairs = {int(row["left"]): int(row["right"]) for row in csv.DictReader(stream, delimiter="\t")}
    assert pairs == LEFT_TO_RIGHT


def test_a_segmentation_has_95_structures():
    assert (len(IDS), len(NETWORK_IDS), len(SAGITTAL_IDS)) == (96, 79, 51)
    assert sorted(IDS) == list(IDS)


@pytest.mark.parametrize(("plane", "n_parameters"), [("coronal", 1_854_632), ("sagittal", 1_852_616)])
def test_networks_have_fastsurfers_size(plane, n_parameters):
    network = Vinn(VinnShape(), n_classes_of(plane))
    assert len(network.state_dict()) == 331
    assert sum(parameter.numel() for parameter in network.parameters()) == n_parameters


@pytest.mark.parametrize(("side", "voxel_size"), [(366, 0.7), (320, 0.8), (285, 0.9), (256, 1), (64, 1), (100, 0.8)])
def test_zooming_in_and_out_gives_the_size_back(side, voxel_size):
    scale = np.float32(1) / np.float32(voxel_size)
    inner, factors = resize(torch.rand(1, 2, side, side), (256, 256), (scale, scale))
    assert inner.shape == (1, 2, 256, 256)
    outer, _ = resize(inner, (side, side), tuple(np.float32(1) / f for f in factors))
    assert outer.shape == (1, 2, side, side)


def test_what_1mm_gives_comes_back_unchanged():
    image = torch.rand(1, 2, 48, 40)
    one = (np.float32(1), np.float32(1))
    inner, _ = resize(image, (64, 64), one)
    torch.testing.assert_close(inner[:, :, :48, :40], image)
    assert not inner[:, :, 48:].any()
    torch.testing.assert_close(resize(inner, (48, 40), one)[0], image)
