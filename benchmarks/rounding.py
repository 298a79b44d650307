"""What Monte Carlo arithmetic costs on the shipped network: time and memory against plain torch.

    python benchmarks/rounding.py [--repeats 5] [--threads 2] [--side 128]
        [--accumulation fast none] [--work infer train train_in_bfloat16]

Inference: features and classification of a head box of 160 x 192 x 160 voxels, as the participant
level runs them. Training: forward pass, loss, backward pass and optimiser step on a cube of `side`
voxels, in float32, or with bfloat16 autocast as members are trained. In every round each way runs
once, plain torch first; printed are medians over rounds of the ratio within a round. Peak memory is
that of a process of its own for each way.
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import time
from contextlib import nullcontext
from datetime import date
from pathlib import Path

import numpy as np
import torch

from bids_varaug.machine import keep_freed_memory, use_threads
from bids_varaug.models.ensemble import load_ensemble
from bids_varaug.models.unet import load_member
from bids_varaug.numerics import MonteCarloArithmetic
from bids_varaug.training.optimiser import Optimiser, training_loss

INFERENCE_BOX = (160, 192, 160)


def arithmetic(way: str, seed: int):
    """Return the context of one way: plain torch, or an accumulation of the engine."""
    if way == "plain":
        return nullcontext()
    return MonteCarloArithmetic("rr", 24, seed, accumulation=way)


class Work:
    """What is timed."""

    def __init__(self, ensemble: str, side: int):
        loaded = load_ensemble(ensemble)
        baseline = next(member for member in loaded.members if member.is_baseline)
        self.network = load_member(loaded, baseline)
        rng = torch.Generator().manual_seed(0)
        self.image = torch.rand((1, 1, *INFERENCE_BOX), generator=rng)
        self.cube = torch.rand((side,) * 3, generator=rng)
        n_classes = loaded.network.n_classes
        self.target = torch.randint(0, n_classes, (side,) * 3, generator=rng, dtype=torch.uint8)
        self.optimiser = None

    def infer(self) -> None:
        """One forward pass without gradients, slab by slab as the participant level does."""
        self.network.eval()
        with torch.inference_mode():
            features = self.network.features_by_slabs(self.image)
            for part in features.by_slabs(8):
                self.network.classify(part)

    def train(self) -> None:
        """One training step in float32."""
        self._step(in_bfloat16=False)

    def train_in_bfloat16(self) -> None:
        """One training step with bfloat16 autocast."""
        self._step(in_bfloat16=True)

    def _step(self, in_bfloat16: bool) -> None:
        self.network.train().requires_grad_()
        if self.optimiser is None:
            self.optimiser = Optimiser(self.network, weight_decay=1e-4)
            self.optimiser.set_lr(1e-6)
        self.network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=in_bfloat16):
            loss = training_loss(self.network, self.cube, self.target, seed=0)
        loss.backward()
        self.optimiser.step()


def timed(action, way: str, seed: int) -> float:
    """Seconds of one run."""
    with arithmetic(way, seed):
        start = time.perf_counter()
        action()
        return time.perf_counter() - start


def _peak(name: str, way: str, ensemble: str, side: int, threads: int, queue) -> None:
    torch.set_num_threads(threads)
    work = Work(ensemble, side)
    timed(getattr(work, name), way, 1)
    # Not ru_maxrss: it starts with what the parent process had
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    queue.put(int(status["VmHWM"].split()[0]) / 2**20)


def peak_memory(name: str, way: str, ensemble: str, side: int, threads: int) -> float:
    """GiB at most, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_peak, args=(name, way, ensemble, side, threads, queue))
    process.start()
    gigabytes = queue.get()
    process.join()
    return gigabytes


def main() -> None:
    """Time, then print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ensemble", default="aseg31")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--side", type=int, default=128, help="of the training cube, voxels")
    parser.add_argument("--accumulation", nargs="+", default=["fast", "none"])
    parser.add_argument("--work", nargs="+", default=["infer", "train", "train_in_bfloat16"])
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    options = parser.parse_args()
    use_threads(options.threads)
    keep_freed_memory()
    ways = ["plain", *options.accumulation]
    work = Work(options.ensemble, options.side)
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
         if line.startswith("model name")), platform.processor(),
    )  # fmt: skip
    print(f"{date.today()}, {options.threads} threads of {model}, torch {torch.__version__}\n")
    print("| work | way | median s | ratio to plain (lowest to highest) | peak GiB |")
    print("|---|---|---|---|---|")
    for name in options.work:
        action = getattr(work, name)
        for way in ways:
            timed(action, way, 0)  # compiles, fills caches
        seconds = np.array(
            [[timed(action, way, 1 + i) for way in ways] for i in range(options.repeats)]
        )
        ratios = seconds / seconds[:, :1]
        for column, way in enumerate(ways):
            low, middle, high = np.quantile(ratios[:, column], (0, 0.5, 1))
            memory = "-"
            if not options.no_memory:
                arguments = (name, way, options.ensemble, options.side, options.threads)
                memory = f"{peak_memory(*arguments):.2f}"
            print(
                f"| {name} | {way} | {np.median(seconds[:, column]):.2f} | {middle:.2f} "
                f"({low:.2f} to {high:.2f}) | {memory} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
