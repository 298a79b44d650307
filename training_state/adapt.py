"""Finish the trunk of the next `aseg31`: ventricles thinned, any contrast in a third of the images.

    python training_state/adapt.py LABEL_MAPS_DIR WORK_DIR

`trunk_adapt.safetensors` holds the weights (float16) after the first `DONE` of `STEPS` steps from
the shipped trunk. This goes on from them, or from its own checkpoint in WORK_DIR, and leaves
WORK_DIR/trunk.safetensors. This folder goes when the ensemble is trained.
"""

import sys
from dataclasses import replace
from pathlib import Path

from bids_varaug.models.ensemble import load_ensemble
from bids_varaug.models.memory import keep_freed_memory
from bids_varaug.models.unet import build_network
from bids_varaug.models.weights import load_weights, save_weights
from bids_varaug.training.heads import load_heads
from bids_varaug.training.labels import find_label_maps, load_scheme
from bids_varaug.training.recipe import MIXED, Recipe, Stage
from bids_varaug.training.synthesis import Randomiser
from bids_varaug.training.train import learning_rate, train

DONE, STEPS = 1550, 2400
HOLD_OUT = 3
SEED = 4000
ADAPT = Stage("adapt", STEPS, MIXED, 2e-3, 1.5e-4, bf16=True)


def main() -> None:
    """Train the steps that are left."""
    maps, work = Path(sys.argv[1]), Path(sys.argv[2])
    keep_freed_memory()
    scheme = load_scheme()
    heads = load_heads(find_label_maps(maps)[:-HOLD_OUT], scheme, "cpu")
    recipe = Recipe(load_ensemble("aseg31").network)
    rest = replace(ADAPT, steps=STEPS - DONE, lr=learning_rate(recipe, ADAPT, DONE, DONE + 40))
    network = build_network(recipe.network)
    network.load_state_dict(load_weights(Path(__file__).with_name("trunk_adapt.safetensors")))
    work.mkdir(parents=True, exist_ok=True)
    train(
        network, heads, Randomiser(scheme, recipe.synthesis), recipe, (rest,), SEED + DONE,
        work / "checkpoint.safetensors", on_step=lambda report: print(report, flush=True),
    )  # fmt: skip
    save_weights(network, work / "trunk.safetensors")


if __name__ == "__main__":
    main()
