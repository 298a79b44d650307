"""Members that share their first training steps: files that add to the weights of a trunk.

Nothing writes these files any more; they are read for the shipped ensemble `aseg31`, whose members
fork from a trunk and are stored as 8-bit differences.
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


def base_files(ensemble: Ensemble, member: Member) -> list[tuple[str, str, str]]:
    """Return name, SHA-256 and meaning of the files that a member's weights add to, in order.

    Raises
    ------
    EnsembleError
        If the ensemble lacks the member that it adds to.
    """
    trunk, files = ensemble.trunk, []
    if trunk is not None:
        files.append((trunk.file, trunk.sha256, "weights of the trunk"))
    if member.base is not None:
        base = next((m for m in ensemble.members if (m.id, m.base) == (member.base, None)), None)
        if base is None:
            raise EnsembleError(
                f"{ensemble.directory}: {member.id} adds to the weights of {member.base}, which "
                "are missing. Install the ensemble again."
            )
        files.append((base.file, base.sha256, f"weights of {base.id}"))
    return files


def add_differences(weights: dict[str, torch.Tensor], coded: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Add a file's tensors to weights of the same names; integers are multiples of their steps."""
    total = {}
    for name, difference in coded.items():
        if name.endswith(STEP):
            continue
        steps = coded.get(name + STEP)
        difference = difference.float()
        if steps is not None:
            difference = difference * steps.view(-1, *[1] * (difference.ndim - 1))
        total[name] = weights[name] + difference
    return total
