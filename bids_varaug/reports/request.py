"""What a participant's report is asked for; light, so that a graph is wired without the tools."""

from __future__ import annotations

from dataclasses import dataclass

from bids_varaug.inputs.scans import Scan
from bids_varaug.models.ensemble import Ensemble, Member
from bids_varaug.settings import Settings


@dataclass(frozen=True)
class ReportRequest:
    """Whose report to draw: all scans of one participant."""

    settings: Settings
    ensemble: Ensemble
    members: tuple[Member, ...]
    scans: tuple[Scan, ...]
