"""A scan that needs no file behind it."""

from pathlib import Path

import pytest

from bids_varaug.inputs.scans import Scan


@pytest.fixture
def scan() -> Scan:
    name = "sub-01_ses-a_acq-x_run-02_T1w.nii.gz"
    return Scan(
        path=Path("/data") / "sub-01" / "ses-a" / "anat" / name,
        entities={"subject": "01", "session": "a", "acquisition": "x", "run": "02"},
        relative=f"sub-01/ses-a/anat/{name}",
    )
