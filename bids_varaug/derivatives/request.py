"""What the writing of one scan is asked for; light, so that a graph is wired without the tools."""

from __future__ import annotations

from dataclasses import dataclass

from bids_varaug.inputs.scans import Scan
from bids_varaug.models.ensemble import Ensemble, Member
from bids_varaug.settings import Settings


@dataclass(frozen=True)
class ScanRequest:
    """Whose derivatives to write, and from which members (in the order of the counts)."""

    settings: Settings
    scan: Scan
    ensemble: Ensemble
    members: tuple[Member, ...]

    @property
    def perturbed(self) -> tuple[Member, ...]:
        """Members of consensus and spread; the baseline alone where there is no other."""
        return tuple(m for m in self.members if not m.is_baseline) or self.members

    @property
    def has_spread(self) -> bool:
        """Whether there are two perturbed members to disagree."""
        return len(self.perturbed) > 1
