"""Members that share their first training steps: files that add to the weights of a trunk.

Nothing writes these files any more; they are read for the shipped ensemble `aseg31`, whose members fork from a trunk
and are stored as 8-bit differences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bids_varaug.errors import EnsembleError

if TYPE_CHECKING:
    import torch

    from bids_varaug.models.ensemble import Ensemble, Member

STEP = ".step"
"""Ends the name of the tensor that holds the size of one integer step, for each row."""


@dataclass(frozen=True)
class Trunk:
    """The weights that the members' files add to: those at the step where the members fork."""

    file: str
    sha256: str


def files_of(ensemble: Ensemble, member: Member) -> list[tuple[str, str, str]]:
    """Return name, SHA-256 and meaning of the files whose sum a member's weights are, in order."""
    files = [] if ensemble.trunk is None else [(ensemble.trunk.file, ensemble.trunk.sha256, "weights of the trunk")]
    bases = [m for m in ensemble.members if (m.id, m.base) == (member.base, None)]
    if member.base is not None and not bases:
        raise EnsembleError(
            f"{ensemble.directory}: {member.id} adds to the weights of {member.base}, which are missing. Install the "
            "ensemble again."
        )
    return files + [(m.file, m.sha256, f"weights of {m.id}") for m in (*bases, member)]


def add_differences(weights: dict[str, torch.Tensor], coded: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Add a file's tensors to weights of the same names; integers are multiples of their steps."""
    total = {}
    for name in (name for name in coded if not name.endswith(STEP)):
        difference, steps = coded[name].float(), coded.get(name + STEP)
        if steps is not None:
            difference = difference * steps.view(-1, *[1] * (difference.ndim - 1))
        total[name] = weights[name] + difference
    return total
