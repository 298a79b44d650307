"""What bfloat16 at inference costs in accuracy and saves in time.

    python benchmarks/half_precision.py IMAGES_DIR [--ensemble aseg31] [--threads 2]

For each ``*_T1w.nii.gz`` with a ``*_dseg.nii.gz`` beside it, the baseline in float32 and with the
convolutions of its features in bfloat16 (statistics of the normalisation, last layer and softmax in
float32): mean Dice of both, the share of the brain that they label differently, and the seconds of
each, without loading and finding the brain.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from bids_varaug.images.conform import prepare_head
from bids_varaug.machine import keep_freed_memory
from bids_varaug.models.ensemble import load_ensemble
from bids_varaug.models.unet import Features, UNet, load_member
from bids_varaug.segmentation.predict import crop_to_brain, segment_volume
from bids_varaug.training.monitor import dice_with_truth, find_labelled_images


def use_bfloat16(network: UNet) -> None:
    """Let the network compute its features under autocast."""
    in_float32 = network.features_by_slabs

    def features_by_slabs(image: torch.Tensor) -> Features:
        with torch.autocast("cpu", torch.bfloat16):
            body, rim, _ = in_float32(image)
        return Features(body.float(), rim.float())

    network.features_by_slabs = features_by_slabs


def main() -> None:
    """Parse the command line, segment twice, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path)
    parser.add_argument("--ensemble", default="aseg31")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    ensemble = load_ensemble(options.ensemble)
    plain, half = (load_member(ensemble, ensemble.baseline) for _ in range(2))
    use_bfloat16(half)
    print("image\tdice\tdice_bfloat16\tdifferent\tseconds\tseconds_bfloat16")
    ids = np.array([label.index for label in ensemble.labels])
    for image in find_labelled_images(
        options.images, dict(zip(ids, (x.name for x in ensemble.labels), strict=True))
    ):
        head = prepare_head(image.t1w, ensemble.voxel_size, plain.shape.multiple)
        cropped, geometry = crop_to_brain(plain, *head)
        truth = np.asarray(nib.load(image.labels).dataobj).astype(np.int64)
        found, seconds = [], []
        for network in (plain, half):
            started = time.perf_counter()
            found.append(segment_volume(network, cropped))
            seconds.append(time.perf_counter() - started)
        brain = np.logical_and(*(sparse.labels > 0 for sparse in found))
        different = (found[0].labels != found[1].labels)[brain].mean()
        ours = [ids[sparse.to_native(geometry)] for sparse in found]
        dice = [np.nanmean(dice_with_truth(labels, truth, ids[1:])) for labels in ours]
        print(f"{image.t1w.name}\t{dice[0]:.4f}\t{dice[1]:.4f}\t{different:.2%}\t"
              f"{seconds[0]:.2f}\t{seconds[1]:.2f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
