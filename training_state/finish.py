"""Finish the trunk of the next `aseg31`, from which its members fork.

    python training_state/finish.py LABEL_MAPS_DIR ENSEMBLE_DIR
    bids_varaug-train LABEL_MAPS_DIR ENSEMBLE_DIR --hold-out 3 --jobs 2 --omp-nthreads 1

`trunk_finish.safetensors` holds the weights (float16) after the first `DONE` steps of the trunk's
last stage. This goes on from them, or from its own checkpoint in ENSEMBLE_DIR/rest, and leaves the
checkpoint of a finished trunk where the trainer looks for it. This folder goes when the ensemble is
trained.
"""

import sys
from dataclasses import replace
from pathlib import Path

from bids_varaug.models.ensemble import load_ensemble
from bids_varaug.models.memory import keep_freed_memory
from bids_varaug.models.unet import build_network
from bids_varaug.models.weights import load_weights
from bids_varaug.training.checkpoint import save_checkpoint
from bids_varaug.training.heads import load_heads
from bids_varaug.training.labels import find_label_maps, load_scheme
from bids_varaug.training.optimiser import Optimiser
from bids_varaug.training.recipe import FINISH, Recipe
from bids_varaug.training.synthesis import Randomiser
from bids_varaug.training.train import learning_rate, train

DONE = 1000
HOLD_OUT = 3
SEED = 5000


def main() -> None:
    """Train the steps that are left."""
    maps, ensemble_dir = map(Path, sys.argv[1:3])
    keep_freed_memory()
    scheme = load_scheme()
    heads = load_heads(find_label_maps(maps)[:-HOLD_OUT], scheme, "cpu")
    recipe = Recipe(load_ensemble("aseg31").network)
    # After the steps in which the optimiser warms up, the learning rate is that of the whole stage.
    rest = replace(
        FINISH,
        steps=FINISH.steps - DONE,
        lr=learning_rate(recipe, FINISH, DONE, DONE + recipe.warmup),
    )
    network = build_network(recipe.network)
    network.load_state_dict(load_weights(Path(__file__).with_name("trunk_finish.safetensors")))
    checkpoints = ensemble_dir / "checkpoints"
    (ensemble_dir / "rest").mkdir(parents=True, exist_ok=True)
    checkpoints.mkdir(exist_ok=True)
    train(
        network, heads, Randomiser(scheme, recipe.synthesis), recipe, (rest,), SEED + DONE,
        ensemble_dir / "rest" / "checkpoint.safetensors",
        on_step=lambda report: print(report, flush=True),
    )  # fmt: skip
    save_checkpoint(
        checkpoints / "trunk.safetensors", network, Optimiser(network, recipe.weight_decay),
        recipe.trunk_steps, f"{recipe.fingerprint(recipe.trunk)}-{recipe.trunk_seed}",
    )  # fmt: skip


if __name__ == "__main__":
    main()
