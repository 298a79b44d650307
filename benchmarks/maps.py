"""Time fuse, maps and region tables against one call of scipy.stats.entropy per voxel.

    python benchmarks/maps.py --size 256 --members 9

Members are synthetic: nested shells with a random posterior, stored as real members are. The
naive way stacks the members' label maps and calls scipy.stats.entropy for each voxel through
numpy.apply_along_axis; it makes one map only, ours all maps, the mean posterior and the tables.
Both use one thread. --naive-voxels N runs the naive way on the N central voxels only, and then its
time for all voxels is an extrapolation and printed as such.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import scipy.stats

from bids_varaug.segmentation.fuse import (
    Fusion,
    SparsePosterior,
    fuse_members,
    label_slabs,
    save_posterior,
    sparse_rows,
)
from bids_varaug.variability.measures import mean_entropy, pairwise_dice, region_counts


def make_member(path: Path, size: int, n_classes: int, seed: int) -> None:
    """Write a random posterior around nested shells that fill an eighth of the cube."""
    rng = np.random.default_rng(seed)
    axis = (np.arange(size) - (size - 1) / 2) / (size / 2)
    radius = np.sqrt(axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2)
    stored = radius.ravel() < 0.62
    shell = radius.ravel()[stored] / 0.62 * n_classes
    logits = -2 * (shell[:, None] - np.arange(n_classes)[::-1]) ** 2
    logits += rng.normal(0, 0.3, logits.shape)
    rows = np.exp(logits - logits.max(1, keepdims=True))
    rows = (rows / rows.sum(1, keepdims=True)).astype(np.float32)
    sparse = SparsePosterior.from_rows(sparse_rows(rows, stored), radius.shape)
    save_posterior(path, sparse)


def run_ours(paths: list[Path]) -> tuple[Fusion, dict[str, float]]:
    """Fuse, map and count; return the fusion and seconds per part."""
    seconds = {}
    start = time.perf_counter()
    fusion = fuse_members(paths)
    seconds["fuse and maps"] = time.perf_counter() - start
    start = time.perf_counter()
    n_classes = fusion.mean.rows.shape[1]
    pairwise_dice(region_counts(label_slabs(paths), len(paths), n_classes))
    mean_entropy(fusion.mean.labels, fusion.maps["entropy"], n_classes)
    seconds["regions"] = time.perf_counter() - start
    return fusion, seconds


def run_naive(stack: np.ndarray, n_classes: int) -> tuple[np.ndarray, float]:
    """Entropy of (M, N) labels, one voxel at a time; return it and the seconds taken."""
    start = time.perf_counter()
    entropy = np.apply_along_axis(
        lambda votes: scipy.stats.entropy(np.bincount(votes, minlength=n_classes), base=2), 0, stack
    )
    return entropy, time.perf_counter() - start


def main() -> None:
    """Print the times of both ways and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=64, help="voxels along each side")
    parser.add_argument("--members", type=int, default=9)
    parser.add_argument("--classes", type=int, default=32)
    parser.add_argument("--naive-voxels", type=int, default=0, help="0 = all")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"mca{m:02}.safetensors" for m in range(options.members)]
        for seed, path in enumerate(paths):
            make_member(path, options.size, options.classes, seed)
        warm = Path(folder) / "warm.safetensors"
        make_member(warm, 8, options.classes, 0)
        start = time.perf_counter()
        run_ours([warm])
        print(f"compile or load kernels  {time.perf_counter() - start:10.2f} s")
        fusion, seconds = run_ours(paths)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        stack = np.concatenate(list(label_slabs(paths)), axis=1)
    total = stack.shape[1]
    count = min(options.naive_voxels or total, total)
    part = slice((total - count) // 2, (total - count) // 2 + count)
    entropy, naive = run_naive(stack[:, part], options.classes)
    np.testing.assert_allclose(fusion.maps["entropy"].reshape(-1)[part], entropy, atol=1e-6)
    ours = sum(seconds.values())
    print(f"{options.members} members, {options.size}^3 voxels, {options.classes} classes")
    for name, value in seconds.items():
        print(f"{name:24} {value:10.2f} s")
    print(f"{'peak memory':24} {peak:10.0f} MiB")
    print(f"{'naive, measured':24} {naive:10.2f} s on {count:,} of {total:,} voxels")
    if count < total:
        naive *= total / count
        print(f"{'naive, EXTRAPOLATED':24} {naive:10.2f} s to all voxels")
    print(f"{'ratio naive / ours':24} {naive / ours:10.1f}")


if __name__ == "__main__":
    main()
