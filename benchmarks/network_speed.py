"""What a member's features cost in other forms of the network, as ratios to the shipped one.

    python benchmarks/network_speed.py [--shape 160 224 160] [--repeats 3] [--threads 2]

Times all of the network but its last layer, with random weights (time does not depend on them), on
one window: the best of the repeats, the forms in turn. Prints a TSV with the columns form, seconds,
ratio.

shipped        float32, 16 channels at full resolution, body of 32-64-96-96-96 channels
rim 8, rim 24  that many channels at full resolution
no rim         one channel there: what is left is the price of the body
narrow         body of 24-48-72-72-72 channels
bfloat16       the shipped form under autocast, on a processor that has instructions for it
encoder        the encoder's convolutions alone
two at once    the same of two members as one network of grouped convolutions, per member; its ratio
               is to ``encoder``
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import nn

from bids_varaug.machine import keep_freed_memory
from bids_varaug.models.ensemble import NetworkShape, load_ensemble
from bids_varaug.models.unet import UNet, build_network, fold
from bids_varaug.training.train import has_bfloat16

REFERENCE = {"two at once": "encoder"}


def under_bfloat16(network: UNet, image: torch.Tensor) -> None:
    """Compute the features under autocast."""
    with torch.autocast("cpu", torch.bfloat16):
        network.features(image)


def encoder_of(network: UNet, image: torch.Tensor, members: int) -> Callable[[], None]:
    """Return what runs the encoder's convolutions of so many members, one group for each."""
    parts = []
    x, y, z = fold(image).shape[2:]
    for level, block in enumerate(network.encoder):
        for one in (part for part in block.modules() if isinstance(part, nn.Conv3d)):
            n_in, n_out = members * one.in_channels, members * one.out_channels
            wide = nn.Conv3d(n_in, n_out, 3, padding=1, groups=members, bias=False)
            features = torch.rand(1, n_in, x >> level, y >> level, z >> level)
            last = torch.channels_last_3d
            parts.append((wide.to(memory_format=last), features.contiguous(memory_format=last)))

    def run() -> None:
        for convolution, features in parts:
            convolution(features)

    return run


def main() -> None:
    """Parse the command line, time every form, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=int, nargs=3, default=[160, 224, 160])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    image = torch.rand(1, 1, *options.shape)
    shipped = load_ensemble("aseg31").network
    shapes = {
        "shipped": shipped,
        "rim 8": NetworkShape(shipped.n_classes, rim_channels=8),
        "rim 24": NetworkShape(shipped.n_classes, rim_channels=24),
        "no rim": NetworkShape(shipped.n_classes, rim_channels=1),
        "narrow": NetworkShape(shipped.n_classes, channels=(24, 48, 72, 72, 72)),
    }
    networks = {form: build_network(shape).eval() for form, shape in shapes.items()}
    runs = {form: partial(network.features, image) for form, network in networks.items()}
    if has_bfloat16(image.device):
        runs["bfloat16"] = partial(under_bfloat16, networks["shipped"], image)
    runs["encoder"] = encoder_of(networks["shipped"], image, 1)
    runs["two at once"] = encoder_of(networks["shipped"], image, 2)
    best = dict.fromkeys(runs, np.inf)
    with torch.inference_mode():
        for _ in range(options.repeats):
            for form, run in runs.items():
                started = time.perf_counter()
                run()
                best[form] = min(best[form], time.perf_counter() - started)
    best["two at once"] /= 2
    print("form\tseconds\tratio")
    for form, seconds in best.items():
        print(f"{form}\t{seconds:.2f}\t{seconds / best[REFERENCE.get(form, 'shipped')]:.2f}")


if __name__ == "__main__":
    main()
