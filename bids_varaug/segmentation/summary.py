"""What the members of one scan say together: consensus, maps of spread, counts for the tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bids_varaug.models.ensemble import BASELINE
from bids_varaug.segmentation.fuse import fuse_members
from bids_varaug.segmentation.streams import PosteriorReader, label_slabs
from bids_varaug.variability.regions import mean_entropy, region_counts


@dataclass(frozen=True)
class MembersSummary:
    """Arrays on the head box, and counts per member and class.

    Attributes
    ----------
    maps : entropy [bit], std, sigbits [bit] (X, Y, Z) float32; unreliable (X, Y, Z) bool
    counts : volumes (M, K) and intersections (M, M, K) int64, voxels; entropy_mean (K,) bit
    """

    maps: dict[str, np.ndarray]
    counts: dict[str, np.ndarray]


def summarise_members(
    paths: Sequence[Path], families: Sequence[str], mean_path: Path
) -> MembersSummary:
    """Fuse the perturbed members (the baseline alone where there is none), and count all members.

    Parameters
    ----------
    paths : posterior file of every member
    families : (M,) family of each
    mean_path : where the mean posterior of the consensus goes
    """
    perturbed = [p for p, family in zip(paths, families, strict=True) if family != BASELINE]
    fusion = fuse_members(perturbed or paths, mean_path)
    n_classes = PosteriorReader.open(paths[0]).n_classes
    counts = region_counts(label_slabs(paths), len(paths), n_classes)
    return MembersSummary(
        maps={
            "entropy": fusion.entropy,
            "std": fusion.std,
            "sigbits": fusion.sigbits,
            "unreliable": fusion.unreliable,
        },
        counts={
            "volumes": counts.volumes,
            "intersections": counts.intersections,
            "entropy_mean": mean_entropy(fusion.labels, fusion.entropy, n_classes),
        },
    )
