r"""Atrophy of known size, put into real heads: how much of it is found, and what holds the rest back.

    pip install bidsgate
    python benchmarks/atrophy.py DATASET ... --cache DIR [--ensemble aseg31|weights] [--members ieee mca seed]
        [--n-members 1] [--targets 17+51 53+12] [--factors 0.95 0.9 0.8] [--only sub-01] [--minutes 8]

DATASET is as `heads.py` says; heads without reference labels in FreeSurfer's ids are passed over. An image is altered
by the deformation of ``bidsgate inject-atrophy``: each target, by its reference label, is scaled by the factor (of its
volume) about its centroid, and what lies within 12 mm gives way. Targets of one image, joined by ``+``, must lie
further apart. All members segment all images; labels go to ``DIR/atrophy``, and what is there is not segmented again.

A volume is compared with that of the same member in the unaltered head. Where a member puts more or less into a
structure than the reference does, the deformation changes that by another share. So beside the change that was found
stand two that were made: of the reference label, and of the member's own label, deformed as the image was.
Prints, with means over heads and members:

recovery
    change found over change made of the member's own label, by structure and factor.
where it is lost
    exchange of volume of the targets with each neighbour, made and found.
controls, of the first member
    ``zoom``: the whole head is scaled, so that nothing changes in proportion; ``moved``: by half a voxel along each
    axis, which blurs as the deformation does; ``cubic``: the first targets with cubic instead of linear interpolation.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import nibabel as nib
import numpy as np
import pandas as pd
from heads import Head, as_classes, find_heads, load_members, print_markdown, print_origin, segmenting_parser
from scipy import ndimage

from bids_varaug.images.conform import prepare_head, resample_map
from bids_varaug.machine import keep_freed_memory
from bids_varaug.models.ensemble import BASELINE, Ensemble, Member, select_members
from bids_varaug.models.unet import load_member
from bids_varaug.segmentation.predict import crop_to_brain, largest_component, segment_volume

ORIGINAL = "original"
FREESURFER_IDS = ("aseg31", "aseg")
FALLOFF = 12.0  # mm
MARGIN = 16  # voxels around a target that may move
Field = tuple[tuple[slice, ...], np.ndarray]  # box, and in it (3, X, Y, Z): output(x) = input(x + u(x)) [voxels]


def contract(target: np.ndarray, zooms: Sequence[float], factor: float) -> Field:
    """The deformation that scales a structure (X, Y, Z) bool about its centroid."""
    try:
        from bidsgate.inject_atrophy import displacement
    except ImportError as error:
        raise SystemExit(f"{error}. Run: pip install bidsgate") from None
    target = largest_component(target)  # of the reference there may be specks elsewhere
    [found] = ndimage.find_objects(target.astype(np.uint8))
    box = tuple(slice(max(s.start - MARGIN, 0), s.stop + MARGIN) for s in found)
    part = target[box]
    return box, displacement(part.shape, tuple(zooms), part, factor, FALLOFF)


def deform(image: np.ndarray, fields: Sequence[Field], order: int = 1) -> np.ndarray:
    """Return the image with all deformations, which must hardly overlap."""
    moved = np.zeros(image.shape, bool)
    out = image.copy()
    for box, field in fields:
        here = np.any(field != 0, axis=0)
        if (moved[box] & here).sum() > 100:  # at their rims nothing moves
            raise SystemExit("Targets of one image must lie more than 24 mm apart.")
        moved[box] |= here
        out[box] = ndimage.map_coordinates(image[box], np.indices(here.shape) + field, order=order, mode="nearest")
    return out


def exchange_made(labels: np.ndarray, field: Field, n: int) -> np.ndarray:
    """Voxels (n, n) that a deformation turns from one class into another; masks are interpolated linearly."""
    box, u = field
    part, grid = labels[box], np.indices(u.shape[1:])
    counts = np.zeros((n, n))
    for k in np.unique(part):
        after = ndimage.map_coordinates((part == k).astype(np.float32), grid + u, order=1, mode="nearest")
        counts[:, k] = np.bincount(part.ravel(), after.ravel(), minlength=n)
    return counts


def exchange(before: np.ndarray, after: np.ndarray, n: int) -> np.ndarray:
    """Voxels (n, n) of each class before and after.

    >>> exchange(np.array([0, 1, 1]), np.array([0, 0, 1]), 2).tolist()
    [[1, 0], [1, 1]]
    """
    return np.bincount(before.ravel().astype(int) * n + after.ravel(), minlength=n * n).reshape(n, n)


def relative_change(counts: np.ndarray, k: int, volume: float) -> float:
    """Change of class k in percent of its volume before, of an exchange.

    >>> relative_change(np.array([[1, 0], [1, 1]]), 1, 2)
    -50.0
    """
    return 100 * float(counts[:, k].sum() - counts[k].sum()) / volume


def altered_images(head: Head, ids: dict[int, int], options: argparse.Namespace) -> Iterator[tuple[str, Callable]]:
    """Name of each image of a head, and how to make it: (X, Y, Z), the fields and targets of it."""
    image = nib.load(head.t1w)
    zooms = image.header.get_zooms()[:3]
    data, reference = image.get_fdata(dtype=np.float32), head.read_reference()

    def shrink(targets: str, factor: float, order: int = 1) -> tuple[np.ndarray, dict[int, Field]]:
        fields = {ids[int(one)]: contract(reference == int(one), zooms, factor) for one in targets.split("+")}
        return deform(data, list(fields.values()), order), fields

    def zoom(factor: float) -> tuple[np.ndarray, dict[int, Field]]:
        centre = (np.array(data.shape) - 1) / 2
        ratio = factor ** (-1 / 3)
        return ndimage.affine_transform(data, np.full(3, ratio), centre * (1 - ratio), order=1), {}

    yield ORIGINAL, lambda: (data, {})
    for targets in options.targets:
        for factor in options.factors:
            yield f"{targets} x {factor:g}", lambda t=targets, f=factor: shrink(t, f)
    if options.controls:
        yield "zoom x 0.9", lambda: zoom(0.9)
        yield "moved", lambda: (ndimage.shift(data, (0.5, 0.5, 0.5), order=1), {})
        yield f"cubic {options.targets[0]} x 0.9", lambda: shrink(options.targets[0], 0.9, 3)


def segment_image(image: np.ndarray, like: str, ensemble: Ensemble, members: Sequence[Member]) -> Iterator[np.ndarray]:
    """Classes (X, Y, Z) uint8 by each member, on the image's own grid."""
    finder = load_member(ensemble, ensemble.members[0])
    with TemporaryDirectory() as folder:
        path = Path(folder) / Path(like).name
        nib.save(nib.Nifti1Image(image, nib.load(like).affine), path)
        part, geometry = crop_to_brain(finder, *prepare_head(path, ensemble.voxel_size, finder.shape.multiple))
    for member in members:
        yield resample_map(segment_volume(load_member(ensemble, member), part).labels, geometry, order=0)


def is_control(image: str) -> bool:
    """Whether an image is one of the controls, which the first member alone segments."""
    return image.startswith(("zoom", "moved", "cubic"))


def analyse(
    head: Head, names: Sequence[str], ids: dict[int, int], options: argparse.Namespace, labels: Callable
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Changes of each structure, and exchange of the targets with their neighbours; a row per image and member."""
    n, rows, flows = len(names), [], []
    reference = np.maximum(as_classes(head.read_reference(), str(head.protocol), sorted(ids)), 0)
    for image, make in altered_images(head, ids, options):
        if image == ORIGINAL:
            continue
        fields = make()[1]
        told = {k: exchange_made(reference, field, n) for k, field in fields.items()}
        for member, after in labels(image):
            before = dict(labels(ORIGINAL))[member]
            volumes, found = np.bincount(before.ravel(), minlength=n), exchange(before, after, n)
            made = {k: exchange_made(before, field, n) for k, field in fields.items()}
            for k in fields or range(1, n):
                if not volumes[k]:
                    continue
                row = {"head": head.name, "image": image, "member": member, "structure": names[k], "volume": volumes[k],
                       "found": relative_change(found, k, volumes[k])}  # fmt: skip
                if fields:
                    size = (reference == k).sum()
                    row |= {"made": relative_change(made[k], k, volumes[k]), "reference": size,
                            "made in reference": relative_change(told[k], k, size)}  # fmt: skip
                    net = {side: counts[:, k] - counts[k] for side, counts in (("made", made[k]), ("found", found))}
                    flows += [{"image": image, "structure": names[k], "neighbour": names[j], "made": net["made"][j],
                               "found": net["found"][j]} for j in range(n) if j != k]  # fmt: skip
                rows.append(row)
    return pd.DataFrame(rows), pd.DataFrame(flows)


def print_results(changes: pd.DataFrame, flows: pd.DataFrame) -> None:
    """Print the tables of recovery, neighbours and controls."""
    control = changes["image"].map(is_control)
    table = changes[~control].assign(factor=changes["image"].str.extract(r"x ([\d.]+)$")[0])
    table["recovery"] = table["found"] / table["made"]
    table["size"] = table["volume"] / table["reference"]
    by = table.groupby(["factor", "structure"])
    columns = ["made in reference", "made", "found", "recovery", "size"]
    print_markdown(by[columns].mean().assign(SD=by["recovery"].std(), n=by.size()))
    exchanged = flows[~flows["image"].map(is_control)].groupby(["structure", "neighbour"])[["made", "found"]].sum()
    exchanged["share"] = exchanged["made"] / exchanged.groupby("structure")["made"].transform("sum")
    exchanged = exchanged[exchanged["share"].abs() > 0.03].assign(recovery=exchanged["found"] / exchanged["made"])
    print_markdown(exchanged[["share", "recovery"]].sort_values(["structure", "share"], ascending=[True, False]))
    if control.any():
        print_markdown(changes[control].groupby(["image", "structure"])[["made", "found"]].mean(), digits=1)


def main() -> None:
    """Parse the command line, segment, and print the tables."""
    parser = segmenting_parser(__doc__)
    parser.add_argument("--targets", nargs="+", default=["17+51", "53+12"], help="FreeSurfer's ids")
    parser.add_argument("--factors", type=float, nargs="+", default=[0.95, 0.9, 0.8])
    parser.add_argument("--no-controls", dest="controls", action="store_false")
    parser.add_argument("--minutes", type=float, default=np.inf)
    options = parser.parse_args()
    keep_freed_memory()
    start = time.monotonic()
    ensemble = load_members(options.ensemble)
    members = select_members(ensemble, [BASELINE, *options.members], options.n_members)
    ids = {label.index: k for k, label in enumerate(ensemble.labels)}
    names = [label.name for label in ensemble.labels]
    heads = [head for folder in options.datasets for head in find_heads(folder)
             if head.protocol in FREESURFER_IDS and options.only in head.t1w]  # fmt: skip
    results = []
    for head in heads:
        folder = options.cache / "atrophy" / ensemble.name / head.name
        folder.mkdir(parents=True, exist_ok=True)
        for image, make in altered_images(head, ids, options):
            asked = members[:1] if is_control(image) else members
            missing = [member for member in asked if not (folder / f"{image} {member.id}.npz").exists()]
            if not missing:
                continue
            if time.monotonic() - start > 60 * options.minutes:
                raise SystemExit(f"Stopped within {head.name}. Run the same command again.")
            for member, found in zip(missing, segment_image(make()[0], head.t1w, ensemble, missing), strict=True):
                np.savez_compressed(folder / f"{image} {member.id}.npz", labels=found)
            print(f"{head.name}: {image}, {time.monotonic() - start:.0f} s", flush=True)

        def labels(image: str, folder: Path = folder) -> Iterator[tuple[str, np.ndarray]]:
            for path in sorted(folder.glob(f"{image} *.npz")):
                yield path.stem.removeprefix(f"{image} "), np.load(path)["labels"]

        results.append(analyse(head, names, ids, options, labels))
    print_origin("Injected atrophy", ensemble.name, heads)
    print_results(*(pd.concat(tables, ignore_index=True) for tables in zip(*results, strict=True)))


if __name__ == "__main__":
    main()
