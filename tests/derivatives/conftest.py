"""A scan that needs no file behind it, and an ensemble without weights."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from bids_varaug.derivatives.names import ScanRequest
from bids_varaug.inputs.scans import Scan
from bids_varaug.models.ensemble import Label, Member
from bids_varaug.settings import Settings

LABELS = (Label(0, "Background", "#000000"), Label(17, "Left-Hippocampus", "#dcd814"))
MEMBERS = tuple(
    Member(name, name.rstrip("0123456789"), 0, 24 if "mca" in name else None, "", "ab" * 32)
    for name in ("ieee", "mca01", "mca02", "seed01")
)
ENSEMBLE = SimpleNamespace(
    name="aseg31", version="1.0", voxel_size=1.0, training={}, labels=LABELS, is_fastsurfer=False, members=MEMBERS,
    quality=None, temperature=0.9,
)  # fmt: skip


@pytest.fixture
def scan() -> Scan:
    name = "sub-01_ses-a_acq-x_run-02_T1w.nii.gz"
    return Scan(
        path=Path("/data") / "sub-01" / "ses-a" / "anat" / name,
        entities={"subject": "01", "session": "a", "acquisition": "x", "run": "02"},
        relative=f"sub-01/ses-a/anat/{name}",
    )


@pytest.fixture
def request_(scan) -> ScanRequest:
    return request_of(scan)


def request_of(scan: Scan, **settings) -> ScanRequest:
    """Who asks for the derivatives of a scan."""
    settings = Settings(Path("/data"), Path("/out"), "participant", Path("/work"), **settings)
    return ScanRequest(settings, ENSEMBLE, MEMBERS, scan)


@pytest.fixture
def ensemble():
    return ENSEMBLE


@pytest.fixture
def members():
    return MEMBERS
