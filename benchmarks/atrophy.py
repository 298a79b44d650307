"""Atrophy of known size, injected into real heads: how much is found, and what changes besides.

    pip install bidsgate
    python benchmarks/atrophy.py DATASET ... --cache DIR [--ensemble aseg31] [--members ieee mca]
        [--n-members 5] [--targets 17 4] [--factors 0.95 0.9 1.1] [--rescans 2] [--only OAS10061]
        [--minutes 8]

DATASET is as `heads.py` says; heads without reference labels in FreeSurfer's ids are passed over.
``bidsgate inject-atrophy`` shrinks or swells one structure of a head, by its reference labels,
about its centroid; what lies within 12 mm gives way. Its ``rescanphantom`` makes copies of the head
with another gain (5 %), bias field (10 %) and noise (1.5 %), in which nothing changed. All members
segment all of them. Prints one row of Markdown for each kind of image, means over heads:

injected, found
    change of the target's volume in percent, by the mean over the perturbed members and by the
    baseline; of a copy, the median over structures of the absolute change, which should be 0;
recovered
    what was found over what was injected (1 is right);
SD
    of the change over the members of each family, in percent; of a copy, its median over
    structures;
other side, others
    false change in percent: of the structure of the other side, and the median over structures but
    the target of the absolute change. Some of it is true, since tissue around the target gives way.

The volumes by every member go to ``DIR/atrophy/NAME.tsv``; what is there is not computed again.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
from heads import Head, find_heads, print_markdown, print_origin, segmenting_parser

from bids_varaug.images.conform import prepare_head
from bids_varaug.machine import keep_freed_memory
from bids_varaug.models.ensemble import BASELINE, Ensemble, Member, load_ensemble, select_members
from bids_varaug.models.unet import load_member
from bids_varaug.segmentation.predict import crop_to_brain, segment_volume

ORIGINAL = "original"
FREESURFER_IDS = ("aseg31", "aseg")


def make_images(
    head: Head, names: dict[int, str], options: argparse.Namespace, folder: Path
) -> Iterator[tuple[str, Path]]:
    """Make one altered image after another; yield what it is, and its file."""
    try:
        from bidsgate.inject_atrophy import AtrophySpec, inject
        from bidsgate.rescanphantom.core import perturb
    except ImportError as error:
        raise SystemExit(f"{error}. Run: pip install bidsgate") from None
    t1w, reference = Path(head.t1w), Path(head.reference)
    yield ORIGINAL, t1w
    out = folder / "altered_T1w.nii.gz"
    for target in options.targets:
        for factor in options.factors:
            spec = AtrophySpec(volume_factor=factor, region_label=target)
            inject(t1w, None, out, None, folder / "truth.json", spec, reference, reference)
            yield f"{names[target]} x {factor:g}", out
    if options.rescans:  # it wants a second contrast, which there is not
        for number, (copy, _) in enumerate(perturb(t1w, t1w, folder, k=options.rescans), start=1):
            yield f"rescan {number}", copy


def member_volumes(t1w: Path, ensemble: Ensemble, members: Sequence[Member]) -> pd.DataFrame:
    """Segment an image with every member: a row each, with its volumes in mm3."""
    finder = load_member(ensemble, members[0])
    image = crop_to_brain(finder, *prepare_head(t1w, ensemble.voxel_size, finder.shape.multiple))[0]
    names = [label.name for label in ensemble.labels]
    rows = []
    for member in members:
        labels = segment_volume(load_member(ensemble, member), image).labels
        volumes = np.bincount(labels.ravel(), minlength=len(names)) * ensemble.voxel_size**3
        rows.append({"member": member.id, "family": member.family}
                    | dict(zip(names[1:], volumes[1:], strict=True)))  # fmt: skip
    return pd.DataFrame(rows)


def changes(volumes: pd.DataFrame) -> pd.DataFrame:
    """Change of a head's volumes from the original image, by the same member, in percent.

    Parameters
    ----------
    volumes : image, member, family, and a column per structure

    Returns
    -------
    DataFrame indexed by image, family and member, a column per structure

    Examples
    --------
    >>> volumes = pd.DataFrame({"image": ["original", "rescan 1"], "member": "seed01",
    ...                         "family": "seed", "Left-Hippocampus": [4000.0, 3800.0]})
    >>> changes(volumes)["Left-Hippocampus"].round(3).tolist()
    [-5.0]
    """
    table = volumes.set_index(["image", "family", "member"])
    before = table.loc[ORIGINAL]
    after = table.drop(index=ORIGINAL, level="image")
    return 100 * (after / before.reindex(after.index.droplevel("image")).to_numpy() - 1)


def summarise_image(image: str, change: pd.DataFrame) -> dict[str, float]:
    """Return a row of the table; `change` as of `changes`, of one image."""
    target, _, factor = image.partition(" x ")
    by_family = change.groupby(level="family", sort=False)
    mean = change[change.index.get_level_values("family") != BASELINE].mean()
    baseline, sd = by_family.mean().loc[BASELINE], by_family.std().dropna(how="all")
    spread = {
        f"SD {family}": row[target] if factor else row.median() for family, row in sd.iterrows()
    }
    if not factor:
        found = {"found": mean.abs().median(), f"by `{BASELINE}`": baseline.abs().median()}
        return {"injected": 0.0, **found, **spread}
    injected = 100 * (float(factor) - 1)
    left, right = "Left-", "Right-"
    other = target.replace(left, right) if left in target else target.replace(right, left)
    return {
        "injected": injected, "found": mean[target], f"by `{BASELINE}`": baseline[target], **spread,
        "recovered": mean[target] / injected, "other side": mean[other],
        "others": mean.drop(target).abs().median(),
    }  # fmt: skip


def main() -> None:
    """Parse the command line, segment, and print the table."""
    parser = segmenting_parser(__doc__)
    parser.add_argument("--targets", type=int, nargs="+", default=[17, 4], help="FreeSurfer's ids")
    parser.add_argument("--factors", type=float, nargs="+", default=[0.95, 0.9, 1.1])
    parser.add_argument("--rescans", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=np.inf)
    options = parser.parse_args()
    keep_freed_memory()
    start = time.monotonic()
    ensemble = load_ensemble(options.ensemble)
    members = select_members(ensemble, [BASELINE, *options.members], options.n_members)
    names = {label.index: label.name for label in ensemble.labels}
    heads = [head for folder in options.datasets for head in find_heads(folder)
             if head.protocol in FREESURFER_IDS and options.only in head.t1w]  # fmt: skip
    found = []
    for head in heads:
        path = options.cache / "atrophy" / f"{head.name}.tsv"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = pd.read_csv(path, sep="\t") if path.exists() else pd.DataFrame({"image": []})
        if len(rows) and set(rows["member"]) != {member.id for member in members}:
            raise SystemExit(f"{path}: other members. Remove it, or use another --cache.")
        with TemporaryDirectory(dir=path.parent) as folder:
            for image, t1w in make_images(head, names, options, Path(folder)):
                if image in set(rows["image"]):
                    continue
                if time.monotonic() - start > 60 * options.minutes:
                    raise SystemExit(f"Stopped within {head.name}. Run the same command again.")
                new = member_volumes(t1w, ensemble, members)
                rows = pd.concat([rows, new.assign(image=image)])
                rows.to_csv(path, sep="\t", index=False)
        for image, change in changes(rows).groupby(level="image", sort=False):
            found.append({"image": image} | summarise_image(image, change))
    print_origin("Injected atrophy", ensemble.name, heads)
    print_markdown(pd.DataFrame(found).groupby("image", sort=False).mean(), digits=2)


if __name__ == "__main__":
    main()
