"""Networks that turn a whole image into a few numbers, and weights of other software to start them from.

SFCN, the fully convolutional network of Peng et al. (2021), Medical Image Analysis 68, 101871, is ours; the others are
MONAI's, which is needed for them alone.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from bids_varaug.errors import EnsembleError, UsageError
from bids_varaug.files import write_text
from bids_varaug.models.ensemble import MANIFEST, Ensemble, Member, NetworkShape, sha256_of
from bids_varaug.models.unet import UNet, load_member, write_tensors

SHAPE = (80, 96, 80)
"""Voxels of `VOXEL_SIZE` mm, RAS: what an encoder sees."""
VOXEL_SIZE = 2.0
LEAST_MATCHED = 0.8
_SFCN = (32, 64, 128, 256, 256, 64)


class Sfcn(nn.Module):
    """SFCN up to its classifier: images (B, 1, X, Y, Z) -> features (B, 64).

    Names of parameters are those of the checkpoints that were trained on UK Biobank.
    """

    def __init__(self) -> None:
        super().__init__()
        self.feature_extractor = nn.Sequential()
        for n, (n_in, n_out) in enumerate(zip((1, *_SFCN), _SFCN, strict=False)):
            last = n == len(_SFCN) - 1
            layers = [nn.Conv3d(n_in, n_out, 1 if last else 3, padding=0 if last else 1), nn.BatchNorm3d(n_out)]
            layers += [nn.ReLU()] if last else [nn.MaxPool3d(2, 2), nn.ReLU()]
            self.feature_extractor.add_module(f"conv_{n}", nn.Sequential(*layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the mean of the last layer over space."""
        x = self.feature_extractor[:4](x)
        # Of so few voxels, gradients in bfloat16 differ from run to run on a CPU.
        with torch.autocast(x.device.type, enabled=False):
            return self.feature_extractor[4:](x.float()).mean(dim=(2, 3, 4))


class SegmenterEncoder(nn.Module):
    """The contracting half of the segmentation network's body: images (B, 1, X, Y, Z) -> means of its levels, (B, 384).

    The body works at 2 mm, which is the grid of the images here.
    """

    def __init__(self) -> None:
        super().__init__()
        self.encoder = UNet(NetworkShape(2)).encoder

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the mean of each channel of each level over space."""
        x, means = x.expand(-1, 8, -1, -1, -1), []
        for level, block in enumerate(self.encoder):
            x = block(F.max_pool3d(x, 2) if level else x)
            means.append(x.mean(dim=(2, 3, 4)))
        return torch.cat(means, dim=1)


class Pooled(nn.Module):
    """A network of MONAI without its classifier: what `features_of` makes of an image, (B, F)."""

    def __init__(self, network: nn.Module, features_of: Callable[[nn.Module, torch.Tensor], torch.Tensor]):
        super().__init__()
        self.network = network
        self.features_of = features_of

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 1, X, Y, Z) -> (B, F)."""
        return self.features_of(self.network, x)


@dataclass(frozen=True)
class Architecture:
    """How an encoder is built, and how many features it gives."""

    n_features: int
    build: Callable[[], nn.Module]


def _resnet18() -> nn.Module:
    # As torchvision's r3d_18, whose weights learnt from video then fit.
    network = _monai("resnet18")(
        spatial_dims=3, n_input_channels=1, conv1_t_size=(3, 7, 7), conv1_t_stride=(1, 2, 2), shortcut_type="B",
        bias_downsample=False, feed_forward=False,
    )  # fmt: skip
    return Pooled(network, lambda net, x: net(x))


def _densenet121() -> nn.Module:
    network = _monai("DenseNet121")(spatial_dims=3, in_channels=1, out_channels=1)
    return Pooled(cast(nn.Module, network.features), lambda net, x: F.relu(net(x)).mean(dim=(2, 3, 4)))


def _vit(hidden: int, layers: int, heads: int) -> nn.Module:
    network = _monai("ViT")(
        in_channels=1, img_size=SHAPE, patch_size=16, hidden_size=hidden, mlp_dim=4 * hidden, num_layers=layers,
        num_heads=heads, qkv_bias=True,
    )  # fmt: skip
    return Pooled(network, lambda net, x: net(x)[0].mean(dim=1))


def _monai(name: str) -> Callable[..., nn.Module]:
    try:
        from monai.networks import nets
    except ImportError as error:
        raise UsageError(
            "--architecture: all but sfcn come from MONAI, which is not installed. "
            "Install it: pip install 'bids_varaug[pretrain]'"
        ) from error
    return getattr(nets, name)


SEGMENTER = "segmenter"
ARCHITECTURES = {
    "sfcn": Architecture(_SFCN[-1], Sfcn),
    "resnet18": Architecture(512, _resnet18),
    "densenet121": Architecture(1024, _densenet121),
    "vit-small": Architecture(192, lambda: _vit(192, 6, 3)),
    "vit-base": Architecture(768, lambda: _vit(768, 12, 12)),
    SEGMENTER: Architecture(sum(NetworkShape(2).channels), SegmenterEncoder),
}


class Encoder(nn.Module):
    """An architecture with a linear layer on top, if any, which predicts what it is pre-trained on.

    Networks that were trained apart put the same property of an image into different features. `alignment`, weight
    (F, F) and bias (F,), is the linear map that brings a member's features closest to those of the baseline; None where
    nobody fitted it.
    """

    alignment: tuple[torch.Tensor, torch.Tensor] | None = None

    def __init__(self, architecture: str, n_outputs: int):
        super().__init__()
        chosen = ARCHITECTURES[architecture]
        self.body = chosen.build()
        self.head = nn.Linear(chosen.n_features, n_outputs) if n_outputs else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 1, X, Y, Z) float32 -> (B, n_outputs)."""
        return self.head(self.body(x))

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 1, X, Y, Z) float32 -> (B, F), of all members of an `EncoderEnsemble` in the same coordinates."""
        found = self.body(x)
        return found if self.alignment is None else F.linear(found, *self.alignment)


@dataclass(frozen=True)
class EncoderEnsemble:
    """Encoders of one architecture, trained alike but for perturbation or seed, in a folder with a manifest."""

    name: str
    directory: Path
    architecture: str
    objective: str  # what they were pre-trained on
    outputs: tuple[str, ...]  # of the head
    members: tuple[Member, ...]
    training: Mapping[str, Any]

    @property
    def n_features(self) -> int:
        """Number of features of an image."""
        return ARCHITECTURES[self.architecture].n_features

    @property
    def is_aligned(self) -> bool:
        """Whether the features of all members are in the same coordinates."""
        compared = self.training.get("comparison", {}).get("members", {})
        return len(self.members) == 1 or ("alignment" in self.digests and all(m.id in compared for m in self.members))

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of what decides the features: the weights by member, and the file of `save_alignment`."""
        aligned = self.training.get("comparison", {}).get("alignment_sha256")
        return {m.id: m.sha256 for m in self.members} | ({"alignment": aligned} if aligned else {})


KIND = "encoder"
ALIGNMENT = "alignment.safetensors"


def load_encoders(directory: Path) -> EncoderEnsemble:
    """Read the manifest of a folder of encoders; an `EnsembleError` names the file."""
    path = directory / MANIFEST
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.pop("kind", None) != KIND or values["architecture"] not in ARCHITECTURES:
            raise EnsembleError(f"{path}: no encoder. Make one with bids_varaug-pretrain.")
        members = tuple(Member(**member) for member in values.pop("members"))
        return EncoderEnsemble(directory=directory, members=members, **values | {"outputs": tuple(values["outputs"])})
    except FileNotFoundError as error:
        raise EnsembleError(f"{directory}: no folder of an encoder ({MANIFEST} is missing).") from error
    except (KeyError, TypeError, ValueError) as error:
        raise EnsembleError(f"{path}: damaged manifest ({error}).") from error


def write_encoders(ensemble: EncoderEnsemble) -> None:
    """Write the manifest."""
    values = {"kind": KIND} | asdict(ensemble)
    del values["directory"]
    write_text(json.dumps(values, indent=1) + "\n", ensemble.directory / MANIFEST)


def save_encoder(encoder: Encoder, path: Path) -> str:
    """Write weights in float16 and return the file's SHA-256."""
    tensors = {name: t.half() if t.is_floating_point() else t for name, t in encoder.state_dict().items()}
    write_tensors(path, tensors)
    return sha256_of(path)


def save_alignment(maps: Mapping[str, tuple[torch.Tensor, torch.Tensor]], directory: Path) -> str:
    """Write the alignments of members by id, and return the file's SHA-256."""
    tensors = {f"{name}/{part}": t.float() for name, pair in maps.items() for part, t in zip(_PARTS, pair, strict=True)}
    write_tensors(directory / ALIGNMENT, tensors)
    return sha256_of(directory / ALIGNMENT)


_PARTS = ("weight", "bias")


def load_encoder(ensemble: EncoderEnsemble, member: Member, device: str = "cpu") -> Encoder:
    """Build a member in float32, in evaluation mode; an `EnsembleError` if its weights cannot be used."""
    path, aligned = ensemble.directory / member.file, ensemble.directory / ALIGNMENT
    wanted = {path: member.sha256}
    if "alignment" in ensemble.digests:
        wanted[aligned] = ensemble.digests["alignment"]
    for file, digest in wanted.items():
        if file.parent != ensemble.directory or not file.is_file() or sha256_of(file) != digest:
            raise EnsembleError(f"{file}: missing, or not as the manifest says. Copy the folder again.")
    encoder = build_encoder(ensemble.architecture, len(ensemble.outputs))
    try:
        encoder.load_state_dict(load_file(path))  # which turns float16 into float32
    except (SafetensorError, RuntimeError) as error:
        raise EnsembleError(f"{path}: weights do not fit the manifest's architecture: {error}") from None
    if aligned in wanted:
        maps = load_file(aligned, device)
        if f"{member.id}/weight" in maps:
            encoder.alignment = maps[f"{member.id}/weight"], maps[f"{member.id}/bias"]
    return encoder.to(device).eval().requires_grad_(False)


def build_encoder(architecture: str, n_outputs: int, seed: int = 0) -> Encoder:
    """Return an untrained encoder; the same seed gives the same weights. `UsageError` where MONAI is missing."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Encoder(architecture, n_outputs)


def copy_segmenter(ensemble: Ensemble, member: Member) -> Encoder:
    """Return the encoder of a member of a segmentation ensemble; its head has no outputs."""
    if ensemble.network != NetworkShape(len(ensemble.labels)):
        raise EnsembleError(f"{ensemble.directory}: networks of another size than those of the shipped ensemble.")
    encoder = build_encoder(SEGMENTER, 0)
    encoder.body.encoder.load_state_dict(load_member(ensemble, member).encoder.state_dict())  # type: ignore[union-attr]
    return encoder


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a file of weights by name, nothing in it executed; an `EnsembleError` names the file."""
    try:
        if path.suffix == ".safetensors":
            content: object = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise EnsembleError(f"{path}: no such file.") from error
    except (ValueError, RuntimeError, pickle.UnpicklingError, EOFError, KeyError, OSError, SafetensorError) as error:
        reason = str(error).partition("\n")[0]
        raise EnsembleError(
            f"{path}: cannot be read as weights ({reason}). A file that holds more than tensors and numbers is not "
            "read, as it could execute code: save its state dictionary alone."
        ) from error
    for key in ("state_dict", "model_state", "model", "module"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    state = content if isinstance(content, dict) else {}
    tensors = {str(name): value for name, value in state.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise EnsembleError(f"{path}: holds no weights.")
    return {re.sub(r"^(module\.)+", "", name): value.float() for name, value in tensors.items()}


def start_from(encoder: Encoder, path: Path) -> dict[str, int]:
    """Load weights of other software into the body, by the names that it uses; the head stays as it is.

    Known are UK Biobank's SFCN, MONAI's and MedicalNet's ResNet, torchvision's r3d_18 (video), vision transformers of
    timm and VideoMAE, and encoders of `bids_varaug-pretrain`. Three input channels (colours) are added up; patches of
    flat images are repeated in depth, and so are the places of their patches.

    Returns
    -------
    matched, wanted : tensors of the body that were found in the file, and all

    Raises
    ------
    EnsembleError
        If fewer than 80 % of the body's tensors are there in their shape; the encoder is as before.
    """
    own = {name: tensor for name, tensor in encoder.body.state_dict().items() if "num_batches" not in name}
    given = read_weights(path)
    found: dict[str, torch.Tensor] = {}
    for name, value in given.items():
        name = _our_name(name)
        for candidate in (name, f"network.{name}"):
            if candidate in own and (fitted := _fit(value, own[candidate])) is not None:
                found[candidate] = fitted
    counts = {"matched": len(found), "wanted": len(own)}
    if len(found) < LEAST_MATCHED * len(own):
        missing = next(name for name in own if name not in found)
        raise EnsembleError(
            f"{path}: weights of another architecture: {len(found)} of the {len(own)} tensors are there in their shape "
            f"(not {missing}, for example), at least {LEAST_MATCHED:.0%} are needed. Choose another --architecture."
        )
    encoder.body.load_state_dict(found, strict=False)
    return counts


_RENAMED: Mapping[str, str] = {
    r"^body\.": "", r"^(encoder|backbone)\.": "",
    # torchvision's video ResNet
    r"^stem\.0\.": "conv1.", r"^stem\.1\.": "bn1.", r"^(layer\d\.\d\.)conv(\d)\.0\.": r"\1conv\2.",
    r"^(layer\d\.\d\.)conv(\d)\.1\.": r"\1bn\2.",
    # Vision transformers
    r"^patch_embed\.proj\.": "patch_embedding.patch_embeddings.", r"^pos_embed$": "patch_embedding.position_embeddings",
    r"^(blocks\.\d+\.attn\.)proj\.": r"\1out_proj.", r"^(blocks\.\d+\.)mlp\.fc(\d)\.": r"\1mlp.linear\2.",
}  # fmt: skip


def _our_name(name: str) -> str:
    for pattern, replacement in _RENAMED.items():
        name = re.sub(pattern, replacement, name)
    return name


def _fit(value: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor | None:
    """Bring a tensor to the shape wanted, where that is known to be right; else None."""
    if value.shape == wanted.shape:
        return value
    if value.ndim == 3 and wanted.ndim == 3 and value.shape[2] == wanted.shape[2]:
        return _fit_places(value, wanted.shape[1])
    if value.ndim == 4 and wanted.ndim == 5:  # a flat patch
        value = value[:, :, None]
    if value.ndim == 5 and wanted.ndim == 5 and value.shape[1] == 3 and wanted.shape[1] == 1:
        value = value.sum(dim=1, keepdim=True)
    if value.ndim == 5 and value.shape != wanted.shape and value.shape[:2] == wanted.shape[:2]:
        repeats = wanted.shape[2] // value.shape[2]
        if value.shape[2] * repeats == wanted.shape[2]:
            value = value.repeat(1, 1, repeats, 1, 1) / repeats
    return value if value.shape == wanted.shape else None


def _fit_places(value: torch.Tensor, n_wanted: int) -> torch.Tensor | None:
    """Interpolate position embeddings (1, N, H) of square images to the patches of `SHAPE`, the same at each depth."""
    depth, height, width = (side // 16 for side in SHAPE)
    side = int((value.shape[1]) ** 0.5)
    if side * side != value.shape[1]:  # with a class token
        value, side = value[:, 1:], int((value.shape[1] - 1) ** 0.5)
    if side * side != value.shape[1] or depth * height * width != n_wanted:
        return None
    plane = value.transpose(1, 2).reshape(1, -1, side, side)
    plane = F.interpolate(plane, (height, width), mode="bicubic", align_corners=False)
    return plane.flatten(2).transpose(1, 2).repeat(1, depth, 1)
