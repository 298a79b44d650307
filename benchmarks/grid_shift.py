"""Does a member move with the baseline when the grid does?

    python benchmarks/grid_shift.py T1W.nii.gz ... [--ensemble aseg31] [--members seed01 seed09]
        [--grids 4]

Each member segments each image on one grid, on several grids of its own (mean posterior), and on
one grid moved by what several grids change in the baseline, as the program does (`--grids`).
Prints how many voxels several grids of its own label otherwise than one grid, and how many of all
they still label otherwise than the member that was moved.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from members import Members

from bids_varaug.machine import keep_freed_memory
from bids_varaug.models.ensemble import Ensemble, Member, load_ensemble, select_members
from bids_varaug.models.weights import load_member
from bids_varaug.segmentation.shifts import GRIDS
from bids_varaug.training.monitor import PreparedHead


def labels_three_ways(
    ensemble: Ensemble, head: np.ndarray, member: Member, n_grids: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels on one grid, on several of its own, and moved with the baseline, (X, Y, Z) each."""
    with tempfile.TemporaryDirectory() as folder:
        one, own, moved = (
            Members(ensemble, head, n, Path(folder), finder).segment(member).labels
            for n, finder in ((1, None), (n_grids, member), (n_grids, None))
        )
    return one, own, moved


def main() -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("heads", nargs="+", type=Path)
    parser.add_argument("--ensemble", default="aseg31")
    parser.add_argument("--members", nargs="+", default=["seed01", "seed09"])
    parser.add_argument("--grids", type=int, choices=tuple(GRIDS)[1:], default=4)
    options = parser.parse_args()
    keep_freed_memory()
    ensemble = load_ensemble(options.ensemble)
    print("image\tmember\tbrain\tchanged_by_own_grids\tstill_different_when_moved")
    for t1w in options.heads:
        finder = load_member(ensemble, ensemble.baseline or ensemble.members[0])
        head = PreparedHead(t1w, finder, ensemble.voxel_size).head
        for member in select_members(ensemble, options.members):
            one, own, moved = labels_three_ways(ensemble, head, member, options.grids)
            counts = (np.count_nonzero(x) for x in (own, one != own, moved != own))
            print(t1w.name, member.id, *counts, sep="\t", flush=True)


if __name__ == "__main__":
    main()
