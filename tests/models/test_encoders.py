"""Encoders of whole images: weights of other software fit, or are refused."""

import pickle
import re

import pytest
import torch

from bids_varaug.errors import EnsembleError
from bids_varaug.models.encoders import ARCHITECTURES, SHAPE, build_encoder, read_weights, start_from


def test_same_seed_same_weights():
    one, same, other = (build_encoder("sfcn", 3, seed).head.weight for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_features_of_a_batch_are_those_of_its_images(architecture):
    if architecture not in ("sfcn", "segmenter"):
        pytest.importorskip("monai")
    if architecture == "vit-base":
        pytest.skip("as vit-small, 25 times as large")
    encoder = build_encoder(architecture, 2).eval()
    images = torch.rand(2, 1, *SHAPE, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        together = encoder.features(images)
        assert torch.allclose(together[1:], encoder.features(images[1:]), atol=1e-4)
    assert together.shape == (2, ARCHITECTURES[architecture].n_features)


def save_renamed(encoder, path, *renames, wrap=lambda state: state):
    """Write a body's weights, changed, by the names that other software uses; return them by ours."""
    state = {}
    generator = torch.Generator().manual_seed(7)
    for name, value in encoder.body.state_dict().items():
        if value.is_floating_point():
            value = torch.rand(value.shape, generator=generator)
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        state[name] = value
    torch.save(wrap(state), path)
    return state


def test_sfcn_of_uk_biobank_fits(tmp_path):
    """A DataParallel state dictionary with a classifier for 40 ages."""
    encoder, path = build_encoder("sfcn", 3), tmp_path / "run_best_mae.p"
    head = encoder.head.weight.clone()
    more = {"module.classifier.conv_6.weight": torch.zeros(40, 64, 1, 1, 1)}
    given = save_renamed(encoder, path, ("^", "module."), wrap=lambda state: state | more)
    counts = start_from(encoder, path)
    assert counts["matched"] == counts["wanted"] == 36
    for name, value in encoder.body.state_dict().items():
        if "num_batches" not in name:
            assert torch.equal(value, given[f"module.{name}"])
    assert torch.equal(encoder.head.weight, head)


def test_video_weights_fit_a_resnet(tmp_path):
    """By the names of torchvision's r3d_18, whose first layer sees colours."""
    pytest.importorskip("monai")
    encoder, path = build_encoder("resnet18", 3), tmp_path / "r3d_18.pth"
    names = [(r"^network\.", ""), (r"^conv1\.", "stem.0."), (r"^bn1\.", "stem.1.")]
    names += [(rf"^(layer\d\.\d\.){layer}(\d)\.", rf"\1conv\2.{n}.") for n, layer in enumerate(("conv", "bn"))]

    def in_colour(state):
        return state | {"stem.0.weight": state["stem.0.weight"].repeat(1, 3, 1, 1, 1) / 3}

    given = save_renamed(encoder, path, *names, wrap=in_colour)
    counts = start_from(encoder, path)
    assert counts["matched"] == counts["wanted"]
    body = encoder.body.network
    assert torch.allclose(body.conv1.weight, given["stem.0.weight"])
    assert torch.equal(body.layer2[1].bn2.running_var, given["layer2.1.conv2.1.running_var"])


def test_weights_of_flat_images_fit_a_vision_transformer(tmp_path):
    """By the names of timm's ViT-B/16 at 224 pixels, in the width of the small one."""
    pytest.importorskip("monai")
    encoder, path = build_encoder("vit-small", 3), tmp_path / "vit.pth"
    names = [(r"^network\.", ""), (r"^patch_embedding\.patch_embeddings", "patch_embed.proj"),
             (r"\.out_proj\.", ".proj."), (r"mlp\.linear(\d)", r"mlp.fc\1"),
             (r"^patch_embedding\.position_embeddings", "pos_embed")]  # fmt: skip

    def flat(state):
        kernel = torch.rand(192, 3, 16, 16)
        places = torch.rand(1, 197, 192)
        kept = {name: value for name, value in state.items() if "cross_attn" not in name}
        return kept | {"patch_embed.proj.weight": kernel, "pos_embed": places, "cls_token": torch.zeros(1, 1, 192)}

    save_renamed(encoder, path, *names, wrap=flat)
    counts = start_from(encoder, path)
    assert counts["wanted"] - counts["matched"] == 12  # normalisations of cross attention, which is not used
    kernel = encoder.body.network.patch_embedding.patch_embeddings.weight
    written = torch.load(path, weights_only=True)["patch_embed.proj.weight"]
    # An image that is the same in depth and in all colours gives what the flat one gave.
    assert torch.allclose(kernel.sum(dim=(1, 2)), written.sum(dim=1), atol=1e-4)


def test_weights_of_another_architecture_are_refused(tmp_path):
    encoder, path = build_encoder("sfcn", 3), tmp_path / "other.pth"
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    state = encoder.body.state_dict()
    torch.save({name: state[name] for name in list(state)[:20]}, path)
    with pytest.raises(EnsembleError, match=r"other\.pth: weights of another architecture: \d+ of the 36 tensors"):
        start_from(encoder, path)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


class Touch:
    """A pickle of it makes a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_files_with_code_are_refused_unexecuted(tmp_path):
    path = tmp_path / "code.pth"
    torch.save({"weight": torch.zeros(1), "more": Touch(str(tmp_path / "executed"))}, path)
    with pytest.raises(EnsembleError, match=r"code\.pth: cannot be read as weights"):
        read_weights(path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", pickle.dumps([1, 2])])
def test_damaged_files_are_refused(tmp_path, content):
    path = tmp_path / "damaged.pth"
    path.write_bytes(content)
    with pytest.raises(EnsembleError, match="damaged.pth"):
        read_weights(path)
    with pytest.raises(EnsembleError, match=r"absent\.pth: no such file"):
        read_weights(tmp_path / "absent.pth")
