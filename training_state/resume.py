"""Make the checkpoint of the finished trunk from which the members of the next `aseg31` fork.

    python training_state/resume.py ENSEMBLE_DIR
    bids_varaug-train LABEL_MAPS_DIR ENSEMBLE_DIR --hold-out 3

`trunk_step6850.safetensors` holds the trunk's weights (float16) after its last step, 6850. This
folder goes when the ensemble is trained.
"""

import sys
from pathlib import Path

from bids_varaug.models.ensemble import load_ensemble
from bids_varaug.models.unet import build_network
from bids_varaug.models.weights import load_weights
from bids_varaug.training.checkpoint import save_checkpoint
from bids_varaug.training.optimiser import Optimiser
from bids_varaug.training.recipe import Recipe

STEP = 6850


def main() -> None:
    """Write ENSEMBLE_DIR/checkpoints/trunk.safetensors."""
    recipe = Recipe(load_ensemble("aseg31").network)
    network = build_network(recipe.network)
    network.load_state_dict(load_weights(Path(__file__).with_name(f"trunk_step{STEP}.safetensors")))
    path = Path(sys.argv[1]) / "checkpoints" / "trunk.safetensors"
    fingerprint = f"{recipe.fingerprint(recipe.trunk)}-{recipe.trunk_seed}"
    save_checkpoint(path, network, Optimiser(network, recipe.weight_decay), STEP, fingerprint)


if __name__ == "__main__":
    main()
