"""A scan that needs no file behind it, and an ensemble without weights."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from bids_varaug.inputs.scans import Scan

ENSEMBLE = SimpleNamespace(name="aseg31", version="1.0", voxel_size=1.0, training={})
MEMBERS = tuple(
    SimpleNamespace(
        id=name,
        family=name.rstrip("0123456789"),
        seed=0,
        precision=24 if "mca" in name else None,
        sha256="ab" * 32,
    )
    for name in ("ieee", "mca01", "mca02", "seed01")
)


@pytest.fixture
def scan() -> Scan:
    name = "sub-01_ses-a_acq-x_run-02_T1w.nii.gz"
    return Scan(
        path=Path("/data") / "sub-01" / "ses-a" / "anat" / name,
        entities={"subject": "01", "session": "a", "acquisition": "x", "run": "02"},
        relative=f"sub-01/ses-a/anat/{name}",
    )


@pytest.fixture
def ensemble():
    return ENSEMBLE


@pytest.fixture
def members():
    return MEMBERS
