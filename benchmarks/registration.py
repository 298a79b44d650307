"""Our registration to the template beside ANTs SyN: overlap of held-out labels, time, folds, inverse error, spread.

    ANTS_RANDOM_SEED=1 python benchmarks/registration.py DATASET ... --posteriors DIR --cache DIR --ensemble DIR
        --template-t1w FILE [--refine 25] [--methods affine ours syn] [--minutes 8]

DATASET is as `heads.py` says, DIR of the posteriors what ``segment_heads.py --keep`` left. Of every head with reference
labels, these labels (never used by the registration) are brought to the template's 2 mm grid by

``affine``
    our affine, of the consensus of the perturbed members;
``ours``
    affine and deformation (``--refine`` iterations);
``syn``
    ANTs (antspyx, `pip install antspyx`) affine and SyN of the brain-extracted T1w at 2 mm, to the template's.

Prints Dice over the structures of the labels, mean over pairs of people of one protocol and against the template's
label map, and for ours folds, error of the inverse, and the spread of the members. The template's labels come from
other people. What is in the cache is not made again; with ``--minutes`` it stops after that time, and the same command
goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

os.environ.setdefault("ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS", "1")

import nibabel as nib
import numpy as np
import pandas as pd
from heads import Head, as_classes, find_heads, load_members, print_markdown

from bids_varaug.images.conform import Geometry, prepare_head
from bids_varaug.machine import use_threads
from bids_varaug.models.ensemble import BASELINE, Ensemble
from bids_varaug.models.unet import load_member
from bids_varaug.registration.register import register_posterior
from bids_varaug.registration.spread import check_quality, displacements_in_brain, summarise_spread
from bids_varaug.registration.template import Template, load_template
from bids_varaug.registration.transforms import Registration, grid_points, head_points, sample_labels
from bids_varaug.segmentation.fuse import fuse_members, load_posterior
from bids_varaug.segmentation.predict import crop_to_brain

METHODS = ("affine", "ours", "syn")


def find_posteriors(folder: Path) -> dict[str, Path]:
    """Files of a head's perturbed members; of one member segmented by several weights, the last."""
    files = {path.name.partition("-")[0]: path for path in sorted(folder.glob("*.safetensors"))}
    return {name: path for name, path in files.items() if name != BASELINE and not name.startswith("shift")}


def geometry_of(head: Head, ensemble: Ensemble, path: Path) -> Geometry:
    """Grids of a head as `segment_heads.py` had them."""
    if not path.exists():
        finder = load_member(ensemble, ensemble.members[0])
        whole, geometry = prepare_head(Path(head.t1w), ensemble.voxel_size, finder.shape.multiple)
        crop_to_brain(finder, whole, geometry)[1].save(path)
    return Geometry.load(path)


def register_ours(
    files: dict[str, Path], geometry: Geometry, template: Template, n_iterations: int, folder: Path
) -> dict[str, float]:
    """Register the consensus and every member; return figures."""
    mean = fuse_members(list(files.values())).mean
    start = time.process_time()
    consensus = register_posterior(mean, geometry, template, n_iterations)
    seconds = time.process_time() - start
    forward, inverse = (consensus.field(template.grid, way) for way in (False, True))
    consensus.save(folder / f"ours-{n_iterations}.npz")
    found = {"cpu_s": seconds, **asdict(check_quality(consensus, template, forward, inverse))}
    if len(files) > 1 and n_iterations:
        members = [register_posterior(load_posterior(f), geometry, template, n_iterations) for f in files.values()]
        displacements = displacements_in_brain(members, consensus, template)
        found |= asdict(summarise_spread(members, displacements, template))
    return found | {"peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def register_syn(
    head: Head, brain: np.ndarray, classes: np.ndarray, geometry: Geometry, template: Template, template_t1w: Path
) -> tuple[np.ndarray, float]:
    """Classes on the template's grid by ANTs, and the CPU seconds of its registration."""
    import ants

    def as_ants(data: np.ndarray, affine: np.ndarray) -> Any:
        return ants.from_nibabel_nifti(nib.Nifti1Image(data.astype(np.float32), affine))

    native = geometry.native_affine
    t1w = np.asarray(nib.load(head.t1w).dataobj, np.float32).reshape(geometry.native_shape)
    reference = as_ants(np.zeros(template.grid.shape), template.grid.affine)
    image = nib.load(template_t1w)
    smooth = ants.smooth_image(as_ants(np.asarray(image.dataobj), image.affine), 0.8, True)
    fixed = ants.resample_image_to_target(smooth, reference, "linear")
    moving = ants.crop_image(as_ants(t1w * brain, native), as_ants(brain, native), 1)
    if min(moving.spacing) < 1.9:
        moving = ants.resample_image(moving, (2, 2, 2), use_voxels=False, interp_type=0)
    start = time.process_time()
    found = ants.registration(fixed, moving, "SyN", random_seed=1)
    seconds = time.process_time() - start
    moved = ants.apply_transforms(reference, as_ants(classes, native), found["fwdtransforms"], "genericLabel")
    return np.rint(moved.numpy()).astype(np.uint8), seconds


def dice_of(one: np.ndarray, other: np.ndarray, n_classes: int) -> np.ndarray:
    """Dice of each structure (K - 1,), NaN where neither has it."""
    sizes = np.bincount(one.ravel(), minlength=n_classes) + np.bincount(other.ravel(), minlength=n_classes)
    same = np.bincount(one[one == other], minlength=n_classes)
    with np.errstate(invalid="ignore"):
        return (2 * same / np.where(sizes > 0, sizes, np.nan))[1:]


def run(options: argparse.Namespace) -> dict[str, tuple[Head, dict[str, np.ndarray], dict]]:
    """Register every head in every way; classes on the template's grid and figures by head."""
    start = time.monotonic()
    ensemble = load_members(options.ensemble)
    class_ids = [int(label.index) for label in ensemble.labels]
    template, results = load_template(class_ids), {}
    for head in (h for folder in options.datasets for h in find_heads(folder) if h.reference):
        files = find_posteriors(options.posteriors / head.dataset / head.name)
        if not files:
            continue
        folder = options.cache / head.dataset / head.name
        folder.mkdir(parents=True, exist_ok=True)
        found, figures = {}, {}
        geometry = geometry_of(head, ensemble, folder / "geometry.json")
        classes = np.maximum(as_classes(head.read_reference(), head.protocol, class_ids), 0).astype(np.uint8)
        for method in options.methods:
            n = options.refine if method == "ours" else 0
            kept = folder / (f"{method}-{n}.npz" if method == "ours" else f"{method}.npz")
            kept = kept.with_name(f"labels-{kept.name}")
            if not kept.exists():
                if time.monotonic() - start > 60 * options.minutes:
                    raise SystemExit(f"Stopped before {head.name}, {method}: run the same command again.")
                if method == "syn":
                    consensus = fuse_members(list(files.values())).mean.to_native(geometry)
                    warped, seconds = register_syn(
                        head, consensus > 0, classes, geometry, template, options.template_t1w
                    )
                    numbers = {"cpu_s": seconds}
                else:
                    numbers = register_ours(files, geometry, template, n, folder)
                    registration = Registration.load(folder / f"ours-{n}.npz")
                    points = head_points(
                        registration, registration.field(template.grid), template.grid, grid_points(template.grid)
                    )
                    warped = sample_labels(classes, geometry.native_affine, points).reshape(template.grid.shape)
                np.savez_compressed(kept, labels=warped, figures=json.dumps(numbers))
                print(f"{head.name}, {method}: {numbers}", flush=True)
            with np.load(kept) as arrays:
                found[method], figures[method] = arrays["labels"], json.loads(str(arrays["figures"]))
        results[head.name] = head, found, figures
    return results


def overlap_table(results: dict, template: Template, methods: Sequence[str], n_classes: int) -> pd.DataFrame:
    """Mean Dice by protocol: over pairs of people, and against the template's labels."""
    rows = []
    for protocol in dict.fromkeys(head.protocol for head, _, _ in results.values()):
        heads = {name: found for name, (head, found, _) in results.items() if head.protocol == protocol}
        for method in methods:
            pairs = [dice_of(a[method], b[method], n_classes) for a, b in combinations(heads.values(), 2)]
            against = [dice_of(found[method], template.labels, n_classes) for found in heads.values()]
            rows.append({
                "labels": protocol, "heads": len(heads), "method": method, "pairs": len(pairs),
                "Dice between people": np.nanmean(pairs) if pairs else np.nan,
                "Dice with the template": np.nanmean(against),
            })  # fmt: skip
    return pd.DataFrame(rows).set_index("labels")


def main() -> None:
    """Parse the command line, register, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("datasets", type=Path, nargs="+")
    for name in ("--posteriors", "--cache", "--template-t1w"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--ensemble", required=True, help="whose baseline located the brain")
    parser.add_argument("--refine", type=int, default=25)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--minutes", type=float, default=np.inf)
    options = parser.parse_args()
    use_threads(1)
    results = run(options)
    n_classes = len(load_members(options.ensemble).labels)
    template = load_template([int(label.index) for label in load_members(options.ensemble).labels])
    print_markdown(overlap_table(results, template, options.methods, n_classes))
    for method in options.methods:
        figures = pd.DataFrame({name: numbers[method] for name, (_, _, numbers) in results.items()}).T
        figures.loc["mean"] = figures.mean()
        print(f"{method}:\n")
        print_markdown(figures.rename_axis("head"), digits=4)


if __name__ == "__main__":
    main()
