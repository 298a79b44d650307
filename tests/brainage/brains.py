"""Small heads with derivatives written by hand, and encoders with random weights."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from bids_varaug.derivatives.io import ENDING
from bids_varaug.models.encoders import EncoderEnsemble, build_encoder, save_alignment, save_encoder, write_encoders
from bids_varaug.models.ensemble import Member

SHAPE = (48, 56, 48)
MEMBERS = ("ieee", "mca01", "mca02")


def write_encoder(folder: Path, ids=MEMBERS, seed: int = 1, n_outputs: int = 2) -> Path:
    """Networks that are alike but for 1 % noise on their weights."""
    folder.mkdir(parents=True)
    members = []
    for number, name in enumerate(ids):
        encoder, rng = build_encoder("sfcn", n_outputs, seed), torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in encoder.parameters():
                parameter.mul_(1 + 0.01 * torch.randn(parameter.shape, generator=rng))
        sha = save_encoder(encoder, folder / f"{name}.safetensors")
        members.append(Member(name, name.rstrip("0123456789"), number, None, f"{name}.safetensors", sha))
    maps = {name: (torch.eye(64), torch.zeros(64)) for name in ids[1:]}  # they are alike as they are
    compared = {"alignment_sha256": save_alignment(maps, folder), "members": {name: {} for name in ids}}
    training = {"comparison": compared}
    write_encoders(EncoderEnsemble("small", folder, "sfcn", "volumes", ("a", "b"), tuple(members), training))
    return folder


def head(age: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A brain with a dark middle that grows with age, in a bright shell; and the mask of the brain."""
    grid = np.meshgrid(*(np.linspace(-1.15, 1.15, n) for n in SHAPE), indexing="ij")
    radius = np.sqrt(sum(g**2 for g in grid))
    image = np.select([radius < 0.1 + age / 200, radius < 0.75, radius < 0.85, radius < 1.0], [200, 700, 100, 900], 0)
    return image + np.random.default_rng(seed).normal(0, 15, SHAPE), radius < 0.75


def write_person(bids: Path, out: Path, person: int, age: float, ensembles=("ieee", "mca01", "mca02")) -> str:
    """Write a T1w image, its brain mask and its table of volumes, 3 mm; return the participant."""
    who = f"sub-{person:02d}"
    image, mask = head(age, person)
    affine = np.diag([3.0, 3, 3, 1])
    for root in (bids, out):
        (root / who / "anat").mkdir(parents=True)
    nib.save(nib.Nifti1Image(image.astype(np.float32), affine), bids / who / f"anat/{who}_T1w.nii.gz")
    nib.save(nib.Nifti1Image(mask.astype(np.uint8), affine), out / who / f"anat/{who}_desc-brain_mask.nii.gz")
    rng = np.random.default_rng(100 + person)
    rows = ["member\tfamily\tindex\tname\tvolume"]
    for member in ensembles:
        volumes = rng.normal([4000, 4000, 9000], [300, 300, 500])
        family = member.rstrip("0123456789")
        rows += [f"{member}\t{family}\t{i}\t{name}\t{v:.1f}" for i, (name, v) in enumerate(
            zip(("Left-Hippocampus", "Right-Hippocampus", "Brain-Stem"), volumes, strict=True), 1)]  # fmt: skip
    table = out / who / f"anat/{who}{ENDING}"
    table.write_text("\n".join(rows) + "\n")
    sources = {"Sources": [f"bids:raw:{who}/anat/{who}_T1w.nii.gz"], "Settings": {"trust": None}}
    table.with_suffix(".json").write_text(json.dumps(sources))
    return who


def write_dataset(root: Path, n: int) -> tuple[Path, Path]:
    """Write n people of 20 to 80 years, and what the participant level left."""
    bids, out = root / "bids", root / "out"
    out.mkdir()
    ages = np.linspace(20, 80, n)
    people = [write_person(bids, out, number, age) for number, age in enumerate(ages, 1)]
    rows = [f"{who}\t{age:.1f}\t{'old' if age > 50 else 'young'}\n" for who, age in zip(people, ages, strict=True)]
    (bids / "participants.tsv").write_text("participant_id\tage\tgroup\n" + "".join(rows))
    (bids / "dataset_description.json").write_text(json.dumps({"Name": "x", "BIDSVersion": "1.10.0"}))
    made = [{"Name": "bids_varaug", "Version": "0.1.0"}]
    description = {"Name": "x", "BIDSVersion": "1.10.0", "DatasetType": "derivative", "GeneratedBy": made}
    (out / "dataset_description.json").write_text(json.dumps(description))
    rows = [f"desc-{m}\tx\t{m.rstrip('0123456789')}\t0\tn/a\tsha-{m}\n" for m in MEMBERS]
    (out / "descriptions.tsv").write_text("desc_id\tdescription\tfamily\tseed\tprecision\tsha256\n" + "".join(rows))
    return bids, out
