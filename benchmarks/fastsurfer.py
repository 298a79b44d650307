"""Time and memory of FastSurfer's networks (random weights) on one head, beside a plain loop over slices.

    python benchmarks/fastsurfer.py IMAGE [--slices 3]

A pass of all slices takes a quarter of an hour on a core. A few slices in the middle of the head are timed, in turn in
a plain loop (every slice, a whole accumulator), as the package does it, and under random rounding, in processor
seconds. Memory is the peak of the process that holds the sum of a whole head, runs slices of each plane, and extracts
a posterior from the sum; for that, each voxel of the head is given one sure class and four less likely ones.
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path

import numpy as np
import torch

from bids_varaug.images.conform import Box
from bids_varaug.images.fastsurfer import prepare_volume
from bids_varaug.models.ensemble import VinnShape
from bids_varaug.models.fastsurfer import build_planes, give_both_sides
from bids_varaug.models.fastsurfer_labels import NETWORK_IDS
from bids_varaug.numerics import MonteCarloArithmetic
from bids_varaug.segmentation.slices import AXES, WEIGHTS, add_view, posterior_of_views, thick_slice


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def plain_loop(network, volume, voxel_size, numbers) -> float:
    """Processor seconds of a loop over coronal slices that adds to an accumulator of whole slices."""
    total = torch.zeros((*volume.shape[:2], len(numbers), len(NETWORK_IDS)), dtype=torch.float16)
    start = time.process_time()
    with torch.no_grad():
        for n, number in enumerate(numbers):
            scale = torch.full((1, 2), 1 / voxel_size)
            logits = network(torch.from_numpy(thick_slice(volume, "coronal", number))[None].contiguous(), scale)
            total[:, :, n] += WEIGHTS["coronal"] * logits[0].permute(1, 2, 0)
    return time.process_time() - start


def ours(network, volume, voxel_size, box, numbers, arithmetic=None) -> float:
    thin = Box((*box.start[:2], numbers[0]), (*box.shape[:2], len(numbers)))
    total = torch.zeros((*thin.shape, len(NETWORK_IDS)), dtype=torch.float16)
    start = time.process_time()
    add_view(total, network, "coronal", volume, voxel_size, thin, arithmetic)
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("image", type=Path)
    parser.add_argument("--slices", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    volume, geometry = prepare_volume(given.image)
    box, voxel_size, side = geometry.box, geometry.voxel_size, volume.shape[0]
    planes = build_planes(VinnShape())
    give_both_sides(planes["sagittal"])
    for network in planes.values():
        network.eval().requires_grad_(False)
    computed = sum(
        sum(thick_slice(volume, p, k).any() for k in range(box.start[AXES[p][2]], box.stop[AXES[p][2]])) + 1
        for p in planes
    )
    print(f"grid {side}^3 of {voxel_size:g} mm, box {box.shape}: {computed} of {3 * side} slices are computed")
    middle = (box.start[2] + box.stop[2]) // 2
    numbers = range(middle, middle + given.slices)
    network = planes["coronal"]
    rounding = MonteCarloArithmetic(mode="rr", precision=24, seed=1)
    ours(network, volume, voxel_size, box, numbers[:1], rounding)  # compiles
    seconds: dict[str, list[float]] = {"plain loop": [], "package": [], "rr": []}
    for number in numbers:
        one = range(number, number + 1)
        seconds["plain loop"].append(plain_loop(network, volume, voxel_size, one))
        seconds["package"].append(ours(network, volume, voxel_size, box, one))
        seconds["rr"].append(ours(network, volume, voxel_size, box, one, rounding))
    medians = {name: float(np.median(values)) for name, values in seconds.items()}
    for name, value in medians.items():
        print(f"{name}: {value:.2f} s a slice, {value / medians['plain loop']:.2f} of the plain loop")
    share = computed / (3 * side)
    print(f"a pass: {share * medians['package'] / medians['plain loop']:.2f} of a plain loop over all slices")
    print(f"before the sum: {peak_gb():.2f} GB")
    total = torch.zeros((*box.shape, len(NETWORK_IDS)), dtype=torch.float16)
    window = tuple(slice(a, b) for a, b in zip(box.start, box.stop, strict=True))
    rng = np.random.default_rng(0)
    for slab, inside in zip(total, volume[window] > 40, strict=True):
        slab[..., 0] = 10
        at = torch.from_numpy(np.argwhere(inside))
        for value in (14, 16, 18, 20):
            slab[at[:, 0], at[:, 1], torch.from_numpy(rng.integers(0, len(NETWORK_IDS), len(at)))] = value
        cubes = (np.argwhere(inside) // 16).sum(axis=1) % len(NETWORK_IDS)  # parts of the size of structures
        slab[at[:, 0], at[:, 1], torch.from_numpy(cubes)] = 25
    for plane, network in planes.items():
        across = AXES[plane][2]
        thin = tuple(1 if axis == across else n for axis, n in enumerate(box.shape))
        add_view(torch.zeros((*thin, len(NETWORK_IDS)), dtype=torch.float16), network, plane, volume, voxel_size,
                 Box(box.start, thin))  # fmt: skip
    print(f"with the sum of a head and slices of each plane: {peak_gb():.2f} GB")
    start = time.process_time()
    sparse = posterior_of_views(total, box, volume.shape)
    took = time.process_time() - start
    print(f"posterior, {sparse.rows.nnz / 1e6:.0f} million values, {took:.0f} s: {peak_gb():.2f} GB")


if __name__ == "__main__":
    main()
