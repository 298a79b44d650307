"""Segment real heads once with every member, and keep what validation needs.

    python benchmarks/segment_heads.py DATASET ... --cache DIR [--ensemble aseg31]
        [--members ieee mca seed] [--n-members 5] [--rr 5] [--shifts 5] [--noise 5]
        [--only sub-OAS10111] [--minutes 8] [--keep DIR]

Each DATASET is as `heads.py` says. Beside the members, which must hold the baseline, its cheap
rivals segment every head:

``--rr N``
    the baseline under random rounding, N times;
``--shifts N``
    the baseline on the image moved by up to half a voxel along each axis, N times; its posterior
    is moved back. Cubic splines for the image, linear interpolation for the posterior;
``--noise N``
    the baseline on the image with Gaussian noise added inside the head, N times, of SD
    `NOISE` of the 99th percentile.

For each head the folder gets ``DATASET/NAME.npz``, labels and maps on the T1w's grid (see
`heads.SegmentedHead`). A head that is there is not segmented again, unless other passes are wanted.
``--keep DIR`` keeps the posterior of each pass there, on the network's grid, 60 MB each; with more
members only the new ones segment. With ``--minutes`` it stops after that time; to resume, run the
same command again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from heads import MAPS, Head, SegmentedHead, find_heads, segmenting_parser
from scipy.ndimage import shift as shift_image

from bids_varaug.images.conform import POSTERIOR_SCALE, prepare_head, resample_map
from bids_varaug.images.load import voxel_volume
from bids_varaug.machine import keep_freed_memory
from bids_varaug.models.ensemble import (
    BASELINE,
    Ensemble,
    Member,
    load_ensemble,
    round_inference,
    select_members,
)
from bids_varaug.models.unet import load_member
from bids_varaug.segmentation.fuse import (
    BACKGROUND_CUT,
    SparsePosterior,
    fuse_members,
    label_slabs,
    load_posterior,
    save_posterior,
    sparse_rows,
)
from bids_varaug.segmentation.predict import arithmetic_of, crop_to_brain, segment_volume
from bids_varaug.variability.measures import region_counts

NOISE = 0.03  # between quiet and noisy scanners, see `examples/simulation`
SHIFT, NOISY = "shift", "noise"


@dataclass(frozen=True)
class Pass:
    """One way to segment a head: a member, and what the image goes through before.

    `shift` is in voxels of the network's grid, `noise_seed` None where no noise is added.
    """

    id: str
    family: str
    member: Member
    shift: tuple[float, ...] = (0.0, 0.0, 0.0)
    noise_seed: int | None = None

    @property
    def is_trained(self) -> bool:
        """Whether it is a member of the ensemble, not the baseline's rival."""
        return self.id == self.member.id and not self.member.is_rounded

    def run(self, ensemble: Ensemble, image: np.ndarray) -> SparsePosterior:
        """Return the posterior on the image's own grid; image (X, Y, Z) float32."""
        if self.noise_seed is not None:
            noise = np.random.default_rng(self.noise_seed).standard_normal(image.shape, np.float32)
            inside = image > 0
            noise *= NOISE * np.percentile(image[inside], 99) * inside
            image = np.maximum(image + noise, 0)
        if any(self.shift):
            image = shift_image(image, [-s for s in self.shift], order=3, mode="nearest")
        with arithmetic_of(self.member):
            sparse = segment_volume(load_member(ensemble, self.member), image)
        return move_posterior(sparse, self.shift) if any(self.shift) else sparse


def plan_passes(ensemble: Ensemble, options: argparse.Namespace) -> list[Pass]:
    """Return what to run on each head: the members, the baseline first, then its rivals."""
    members = list(select_members(ensemble, options.members, options.n_members))
    if not members or not members[0].is_baseline:
        raise SystemExit(f"--members {' '.join(options.members)}: {BASELINE} must be among them.")
    members += round_inference(ensemble, options.rr, random_seed=0)
    passes = [Pass(member.id, member.family, member) for member in members]
    for n in range(1, options.shifts + 1):
        shift = tuple(np.random.default_rng(n).uniform(-0.5, 0.5, 3).tolist())
        passes.append(Pass(f"{SHIFT}{n:02}", SHIFT, members[0], shift=shift))
    noisy = [Pass(f"{NOISY}{n:02}", NOISY, members[0], noise_seed=n) for n in range(1, options.noise + 1)]
    return passes + noisy


def move_posterior(sparse: SparsePosterior, shift: Sequence[float]) -> SparsePosterior:
    """Bring the posterior of an image that was moved back to the grid of the image as it was.

    Linear interpolation; what would come from beyond one side comes from the other, so that the
    borders must be background.

    Parameters
    ----------
    sparse : its voxel v lies at v + `shift` of the image as it was
    shift : voxels, -1 to 1 along each axis
    """
    shape, n_classes = sparse.labels.shape, sparse.rows.shape[1]
    before, posterior = sparse.stored, sparse.posterior
    for k in range(n_classes):
        dense = np.full(shape, k == 0, np.float32)
        dense.reshape(-1)[before] = posterior[:, k]
        for axis, s in enumerate(shift):
            step = int(np.sign(s))
            dense += np.float32(abs(s)) * (np.roll(dense, step, axis) - dense)
        if k == 0:
            stored = dense <= 1 - BACKGROUND_CUT
            rows = np.empty((np.count_nonzero(stored), n_classes), np.float32)
        rows[:, k] = dense[stored]
    labels = np.zeros(shape, np.uint8)
    labels[stored] = rows.argmax(axis=1)
    return SparsePosterior(labels, sparse_rows(rows, stored.ravel()))


def segment_head(
    head: Head, ensemble: Ensemble, passes: Sequence[Pass], path: Path, keep: Path | None = None
) -> None:
    """Run all passes on a head, measure how they differ, and write `path`.

    Posteriors stay in `keep`, if given; those that are there are not made again.
    """
    finder = load_member(ensemble, passes[0].member)
    whole, geometry = prepare_head(Path(head.t1w), ensemble.voxel_size, finder.shape.multiple)
    image, g = crop_to_brain(finder, whole, geometry)

    labels, found, soft_dice = [], {}, {}
    groups = group_passes(passes)
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent) as scratch:
        folder = keep / head.dataset / head.name if keep else Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        files = {one["id"]: folder / f"{one['id']}-{one['weights'][-12:]}.safetensors"
                 for one in describe(passes)}  # fmt: skip
        for p in passes:
            if files[p.id].exists():
                sparse = load_posterior(files[p.id])
            else:
                sparse = p.run(ensemble, image)
                save_posterior(files[p.id], sparse)
            labels.append(sparse.to_native(g))
        for group, ids in {BASELINE: [BASELINE], **groups}.items():
            fusion = fuse_members([files[i] for i in ids], temperature=ensemble.temperature)
            dense = np.zeros((*g.native_shape, len(ensemble.labels)), np.uint8)
            found[f"{group}_consensus"] = fusion.mean.to_native(g, dense, ensemble.temperature)
            found[f"{group}_error_probability"] = 1 - np.float32(POSTERIOR_SCALE) * dense.max(axis=-1)
            for name in MAPS if len(ids) > 1 else MAPS[:1]:
                found[f"{group}_{name}"] = resample_map(fusion.maps[name], g)
            soft_dice[f"{group}_soft_dice"] = fusion.soft_dice
        same_image = [files[p.id] for p in passes if p.family not in (SHIFT, NOISY)]
        counts = region_counts(label_slabs(same_image), len(same_image), len(ensemble.labels))
    reference = head.read_reference() if head.reference else np.zeros(labels[0].shape, np.int32)
    if reference.shape != labels[0].shape:
        raise SystemExit(f"{head.reference}: {reference.shape} voxels, not {labels[0].shape}.")
    known = np.any(labels, axis=0) | (reference != 0)
    known |= np.any([values > 0 for values in found.values()], axis=0)
    arrays = {"reference": reference[known], "labels": np.stack([x[known] for x in labels]),
              "intersections": counts.intersections, **soft_dice}  # fmt: skip
    for name, values in found.items():
        dtype = np.uint8 if name.endswith("_consensus") else np.float16
        arrays[name] = values[known].astype(dtype)
    meta = {
        "head": asdict(head), "ensemble": ensemble.name, "groups": list(groups),
        "passes": describe(passes),
        "names": [label.name for label in ensemble.labels[1:]],
        "class_ids": [label.index for label in ensemble.labels],
        "voxel_volume": float(voxel_volume(g.native_affine)),
        "network_voxel_volume": float(voxel_volume(g.conformed_affine)),
    }  # fmt: skip
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.savez_compressed(file, meta=json.dumps(meta), **arrays)
    partial.replace(path)


def group_passes(passes: Sequence[Pass]) -> dict[str, list[str]]:
    """Return the passes of each family of two or more, and of all trained members but `ieee`."""
    groups = {}
    for p in passes:
        if p.family != BASELINE:
            groups.setdefault(p.family, []).append(p.id)
            if p.is_trained:
                groups.setdefault("all", []).append(p.id)
    return {group: ids for group, ids in groups.items() if len(ids) > 1}


def describe(passes: Sequence[Pass]) -> list[dict]:
    """Return what tells passes apart, as kept in a head's file."""
    return [{"id": p.id, "family": p.family, "trained": p.is_trained,
             "weights": p.member.sha256} for p in passes]  # fmt: skip


def is_done(path: Path, wanted: list[dict]) -> bool:
    """Whether a head's file holds the passes that are wanted."""
    return path.exists() and SegmentedHead(path).passes.to_dict("records") == wanted


def main() -> None:
    """Parse the command line and segment."""
    parser = segmenting_parser(__doc__)
    for rival in ("rr", "shifts", "noise"):
        parser.add_argument(f"--{rival}", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=np.inf)
    parser.add_argument("--keep", type=Path, help="where posteriors stay")
    options = parser.parse_args()
    keep_freed_memory()
    start = time.monotonic()
    ensemble = load_ensemble(options.ensemble)
    passes = plan_passes(ensemble, options)
    wanted = describe(passes)
    heads = [head for folder in options.datasets for head in find_heads(folder)
             if options.only in head.t1w]  # fmt: skip
    paths = {options.cache / head.dataset / f"{head.name}.npz": head for head in heads}
    todo = [path for path in paths if not is_done(path, wanted)]
    print(f"{len(heads)} heads, {len(todo)} to do, {len(passes)} passes each")
    for number, path in enumerate(todo, start=1):
        before = time.monotonic()
        segment_head(paths[path], ensemble, passes, path, options.keep)
        now = time.monotonic()
        print(f"{number}/{len(todo)} {paths[path].name}: {now - before:.0f} s", flush=True)
        if now - start > 60 * options.minutes:
            print(f"{len(todo) - number} heads left. Run the same command again.")
            break


if __name__ == "__main__":
    main()
