"""A synthetic head, its tables, and a report made of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from bids_varaug.derivatives.names import ScanRequest
from bids_varaug.inputs.scans import Scan
from bids_varaug.reports.mosaics import to_png
from bids_varaug.reports.participant import ScanReport, render_participant_report
from bids_varaug.settings import Settings
from tests.derivatives.conftest import ENSEMBLE, MEMBERS

# L to R, S to I, P to A: none of the axes is where RAS has it; 1 x 1.5 x 2 mm.
AFFINE = np.array([[0, 0, -2.0, 30], [1.0, 0, 0, -20], [0, -1.5, 0, 25], [0, 0, 0, 1]])


@pytest.fixture(scope="session")
def head():
    """T1w, labels (2, 3, 41, 42) and a map in [0, 1] on a 32^3 grid."""
    rng = np.random.default_rng(1)
    x, y, z = np.mgrid[:32, :32, :32]
    radius = np.hypot(np.hypot(x - 15.5, y - 15.5), z - 15.5)
    labels = np.zeros((32, 32, 32), np.int32)
    labels[radius < 12] = 3
    labels[radius < 8] = 2
    labels[(z < 16) & (labels > 0)] += 39  # the third axis runs from right to left
    t1w = np.choose(np.searchsorted([8, 12], radius), [100.0, 60.0, 5.0]).astype(np.float32)
    t1w += rng.normal(0, 4, t1w.shape).astype(np.float32)
    spread = np.exp(-((radius - 10) ** 2)).astype(np.float32)
    return SimpleNamespace(t1w=t1w, labels=labels, affine=AFFINE, spread=spread)


@pytest.fixture(scope="session")
def members_table():
    """Volumes of two structures in ieee, two mca and two seed members."""
    names = {17: "Left-Hippocampus", 53: "Right-Hippocampus"}
    rows = [
        (member, member.rstrip("0123456789"), index, name, 4000.0 + 7 * number + index)
        for number, member in enumerate(["ieee", "mca01", "mca02", "seed01", "seed02"])
        for index, name in names.items()
    ]
    return pd.DataFrame(rows, columns=["member", "family", "index", "name", "volume"])


@pytest.fixture(scope="session")
def regions_table():
    """Two structures; one value is missing."""
    return pd.DataFrame(
        {
            "index": [17, 53],
            "name": ["Left-Hippocampus", "Right-Hippocampus"],
            "volume_mean": [4020.0, 90.0],
            "volume_std": [9.0, 9.0],
            "cv": [0.0022, 0.1],
            "sigbits": [8.8, np.nan],
            "dice_min": [0.95, 0.4],
            "dice_min_mca": [0.96, 0.5],
            "verdict": ["good", "unreliable"],
            "reason": [np.nan, "smallest Dice 0.40 (below 0.70)"],
            "volume_low": [1800.0, 1800.0],
            "volume_high": [7500.0, 7500.0],
        }
    )


RED, GREEN = (to_png(Image.new("RGB", (8, 8), color)) for color in ("#ff0000", "#00ff00"))


@dataclass(frozen=True)
class Content:
    """What a report is made of."""

    request: ScanRequest
    scans: tuple[ScanReport, ...]

    def html(self) -> str:
        return render_participant_report(self.request, self.scans)

    def with_scan(self, **changes) -> Content:
        """The same, but for some values of the scan."""
        return replace(self, scans=(replace(self.scans[0], **changes),))


@pytest.fixture
def make_content(regions_table, members_table, tmp_path):
    """Content of a report; any value may be replaced."""

    def make(prefix="sub-01_run-1", sloppy=False, warnings=("Look here.",), figures=None):
        settings = Settings(Path("/data"), tmp_path, "participant", tmp_path, sloppy=sloppy)
        scan = ScanReport(
            prefix=prefix,
            figures=figures or {"consensus": RED, "entropy": GREEN},
            narrow=RED,
            regions=regions_table,
            members=members_table,
            warnings=list(warnings),
            limits="Broad limits of volume for women of 63 years.",
            provenance={"T1w": f"sub-01/anat/{prefix}_T1w.nii.gz"},
        )
        relative = f"sub-01/anat/{prefix}_T1w.nii.gz"
        t1w = Scan(settings.bids_dir / relative, {"subject": "01"}, relative)
        return Content(ScanRequest(settings, ENSEMBLE, MEMBERS, t1w), (scan,))

    return make
