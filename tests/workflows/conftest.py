"""A small ensemble and a small dataset, for runs of the whole app that take seconds."""

import json
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from bids_varaug.cli.run import main
from bids_varaug.models.ensemble import Ensemble, Label, Member, NetworkShape, write_manifest
from bids_varaug.models.unet import build_network, save_weights

# Widths of 16: with fewer, torch takes another convolution, whose bits depend on threads.
SHAPE = NetworkShape(4, (16, 16, 16), 16)
IDS = ("ieee", "mca01", "mca02", "seed01", "seed02")
LABELS = (
    Label(0, "Background", "#000000"),
    Label(2, "Left-Cerebral-White-Matter", "#f5f5f5"),
    Label(41, "Right-Cerebral-White-Matter", "#f5f5f5"),
    Label(16, "Brain-Stem", "#779fb0"),
)


@pytest.fixture(scope="session")
def small_ensemble(tmp_path_factory) -> Path:
    """Five untrained networks at 2 mm that are alike but for 3 % noise on their weights."""
    folder = tmp_path_factory.mktemp("ensemble")
    members = []
    for number, name in enumerate(IDS):
        network = build_network(SHAPE, seed=1)
        rng = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.mul_(1 + 0.03 * torch.randn(parameter.shape, generator=rng))
        checksum = save_weights(network, folder / f"{name}.safetensors")
        family = name.rstrip("0123456789")
        precision = 24 if family == "mca" else None
        members.append(Member(name, family, number, precision, f"{name}.safetensors", checksum))
    write_manifest(Ensemble("small", "1", folder, 2.0, LABELS, SHAPE, tuple(members), {}))
    return folder


def head(seed: int = 0, shape=(48, 56, 48)) -> np.ndarray:
    """An ellipsoid in noise: bright shell, dark gap, grey and white inside."""
    grid = np.meshgrid(*(np.linspace(-1.15, 1.15, n) for n in shape), indexing="ij")
    radius = np.sqrt(sum(g**2 for g in grid))
    image = np.select(
        [radius < 0.5, radius < 0.75, radius < 0.85, radius < 1.0], [900, 600, 100, 800], 0
    )
    return image + np.random.default_rng(seed).normal(0, 15, shape)


def write_t1w(bids_dir: Path, prefix: str, data=None, affine=None, extension=".nii.gz") -> Path:
    """Write ``<prefix>_T1w`` where BIDS wants it."""
    parts = prefix.split("_")
    folder = bids_dir.joinpath(*parts[: 2 if len(parts) > 1 and "ses-" in prefix else 1], "anat")
    folder.mkdir(parents=True, exist_ok=True)
    data = head() if data is None else data
    affine = np.diag([3.0, 3, 3, 1]) if affine is None else affine
    path = folder / f"{prefix}_T1w{extension}"
    nib.save(nib.Nifti1Image(np.asarray(data, np.float32), affine), path)
    return path


def describe(bids_dir: Path) -> Path:
    """Write what makes a folder a BIDS dataset."""
    bids_dir.mkdir(parents=True, exist_ok=True)
    description = {"Name": "Small heads", "BIDSVersion": "1.10.0", "DatasetType": "raw"}
    (bids_dir / "dataset_description.json").write_text(json.dumps(description))
    (bids_dir / "README").write_text("Ellipsoids in noise, made for tests of bids_varaug.\n")
    return bids_dir


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """Two participants: one with two sessions (plain and compressed), one with a flipped grid."""
    bids_dir = describe(tmp_path_factory.mktemp("dataset") / "bids")
    write_t1w(bids_dir, "sub-01_ses-a", head(1))
    write_t1w(bids_dir, "sub-01_ses-b", head(2), extension=".nii")
    write_t1w(bids_dir, "sub-02_acq-las_run-1", head(3), np.diag([-3.0, 3, 3, 1]))
    return bids_dir


@pytest.fixture(scope="module")
def pair(tmp_path_factory, small_ensemble) -> "Run":
    """The app on a dataset of two participants with an image each."""
    bids_dir = describe(tmp_path_factory.mktemp("pair") / "bids")
    write_t1w(bids_dir, "sub-01", head(1))
    write_t1w(bids_dir, "sub-02", head(2))
    return Run(bids_dir, small_ensemble)


@dataclass(frozen=True)
class Run:
    """Runs the app in this process on one dataset."""

    bids_dir: Path
    ensemble: Path

    def arguments(self, out: Path, *options: str) -> list[str]:
        """Command line without the program's name."""
        return [str(self.bids_dir), str(out), "participant", "--ensemble", str(self.ensemble),
                "-w", str(out.with_name(out.name + "-work")), "--skip-bids-validation",
                "--omp-nthreads", "1", *options]  # fmt: skip

    def __call__(self, out: Path, *options: str) -> int:
        """Run and return the exit code."""
        return main(self.arguments(out, *options))


@pytest.fixture(scope="module")
def app(dataset, small_ensemble) -> Run:
    return Run(dataset, small_ensemble)


@pytest.fixture(scope="session")
def linear(tmp_path_factory) -> tuple[str, str]:
    """Options that run nipype in this process: no workers to start."""
    path = tmp_path_factory.mktemp("plugin") / "linear.yml"
    path.write_text("plugin: Linear\n")
    return "--use-plugin", str(path)
