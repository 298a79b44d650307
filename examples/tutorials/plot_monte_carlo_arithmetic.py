"""
Monte Carlo arithmetic for your own network
===========================================

A float32 keeps 24 bits of each result and loses the rest. Do these losses matter for the output of
your network? Monte Carlo arithmetic answers by experiment: it rounds each operation at random,
repeats the computation, and looks at the spread. This tutorial trains a small network that tells
grey from white matter, and asks three questions:

1. How many digits of the network's output can be trusted?
2. Would a shorter number format change the segmentation?
3. How far does rounding *during training* move the network, beside the random seed?

:class:`~bids_varaug.numerics.MonteCarloArithmetic` needs no special build of torch.
"""

# %%
# Data and network
# ----------------
# The images are axial slices of the MNI152 template that nilearn carries. The labels are 0 for
# everything else, 1 for grey matter and 2 for white matter.

import matplotlib.pyplot as plt
import numpy as np
import torch
from nilearn.datasets import (
    load_mni152_gm_template,
    load_mni152_template,
    load_mni152_wm_template,
)
from torch import nn

from bids_varaug.numerics import MonteCarloArithmetic

torch.manual_seed(0)
grey, white, t1w = (
    load(resolution=2).get_fdata(dtype=np.float32)[:, :, 25:57:8].transpose(2, 0, 1)
    for load in (load_mni152_gm_template, load_mni152_wm_template, load_mni152_template)
)
images = torch.from_numpy(t1w / t1w.max())[:, None]  # (slices, 1, X, Y)
other = np.clip(1 - grey - white, 0, 1)
labels = torch.from_numpy(np.argmax([other, grey, white], axis=0))  # (slices, X, Y)


def new_network(seed: int) -> nn.Module:
    """Three convolutions, three classes."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 3, kernel_size=1),
    )


def train(network: nn.Module, steps: int = 25) -> nn.Module:
    """Plain torch; nothing in it knows about Monte Carlo arithmetic."""
    optimiser = torch.optim.AdamW(network.parameters(), lr=3e-2)
    for step in range(steps):
        batch = slice(step % 2, None, 2)
        loss = nn.functional.cross_entropy(network(images[batch]), labels[batch])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return network


def segment_slices(network: nn.Module) -> np.ndarray:
    """Labels of all slices."""
    with torch.no_grad():
        return network(images).argmax(1).numpy()


baseline = train(new_network(seed=0))
agreement = (segment_slices(baseline) == labels.numpy()).mean()
print(f"Voxels with the right label: {agreement:.1%}")

# %%
# How many digits can be trusted?
# -------------------------------
# Run the trained network several times under random rounding, ``mode="rr"``, at the precision of
# float32, 24 bits. Whatever differs between the runs is rounding error. The significant bits
# ``-log2(sd / |mean|)`` say how many leading bits all runs share.


def perturbed_logits(network: nn.Module, precision: int, runs: int = 5) -> np.ndarray:
    """Logits of repeated runs: (runs, slices, classes, X, Y)."""
    results = []
    for seed in range(runs):
        rounding = MonteCarloArithmetic(mode="rr", precision=precision, seed=seed)
        with torch.no_grad(), rounding:
            results.append(network(images).numpy())
    return np.stack(results)


def significant_bits(runs: np.ndarray, at_most: float = 24.0) -> np.ndarray:
    """``-log2(sd / |mean|)`` over the first axis, between 0 and `at_most`."""
    sd, mean = runs.std(axis=0, ddof=1), np.abs(runs.mean(axis=0))
    with np.errstate(divide="ignore"):
        return np.clip(-np.log2(sd / np.maximum(mean, 1e-30)), 0, at_most)


float32_runs = perturbed_logits(baseline, precision=24)
bits = significant_bits(float32_runs)
print(f"Significant bits of the logits: median {np.median(bits):.1f} of 24")

# %%
# The network itself consumes a few bits: each logit is the end of a few hundred additions. Where
# bits are few, a logit is close to zero, so that its error is large beside it. There the network
# hesitates between two classes.

middle = len(images) // 2
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 4), layout="constrained")
left.imshow(np.rot90(images[middle, 0]), cmap="gray")
left.set_title("T1w")
shown = right.imshow(np.rot90(bits[middle].min(axis=0)), cmap="magma", vmin=8, vmax=24)
right.set_title("Significant bits, worst class")
figure.colorbar(shown, ax=right, label="bit")
for axis in (left, right):
    axis.set_axis_off()

# %%
# Would a shorter format do?
# --------------------------
# A virtual precision of 11 bits behaves like half precision, 8 bits like bfloat16. Count the voxels
# whose label changes between any two runs.

for name, precision in (("float32", 24), ("float16-like", 11), ("bfloat16-like", 8)):
    runs = perturbed_logits(baseline, precision)
    votes = runs.argmax(axis=2)
    unstable = (votes != votes[0]).any(axis=0).mean()
    print(f"{name:>13}, {precision:2} bits: {unstable:.3%} of the voxels change their label")

# %%
# Rounding during training
# ------------------------
# The context covers the backward pass and the optimiser too. Train two networks from the same
# start on the same data, each under other random rounding, at 8 bits so that a short training
# shows it. Compare them with two networks that start from another seed.

mca = []
for seed in (1, 2):
    network = new_network(seed=0)
    with MonteCarloArithmetic(mode="rr", precision=8, seed=seed):
        train(network)
    mca.append(segment_slices(network))
seeds = [segment_slices(train(new_network(seed=seed))) for seed in (1, 2)]
reference = segment_slices(baseline)
for name, members in (("rounding", mca), ("seed", seeds)):
    changed = np.mean([(member != reference).mean() for member in members])
    print(f"Other {name}: {changed:.2%} of the voxels differ from the baseline")

# %%
# Which number is larger depends on the network, the learning rate and the length of the training.
# For the shipped ensemble see :doc:`/explanation/numerics`.
#
# To use it in your own code, wrap the lines you want to perturb::
#
#     with MonteCarloArithmetic(mode="rr", precision=24, seed=3):
#         loss = criterion(network(image), labels)
#         loss.backward()
#         optimizer.step()
#
# The same seed, device and number of threads give the same bits. Modes, precisions and what is left
# unperturbed are described at :class:`~bids_varaug.numerics.MonteCarloArithmetic`.
