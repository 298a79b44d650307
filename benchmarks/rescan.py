"""One person scanned twice: the difference between scans beside the members' spread and the raters' own difference.

    python benchmarks/rescan.py BIDS_DIR --participant OAS10111 --cache DIR [--ensemble aseg31|weights]
        [--members ieee mca seed] [--n-members 5]

Members segment both scans of a participant with two sessions; labels go to ``DIR/rescan``, and what is there is not
segmented again. BIDS_DIR is as `heads.py` says. Prints, by structure, in percent of the mean of both scans:

scans
    difference of the means over the perturbed members.
SD, paired SD
    standard deviation over members, of one scan and of the difference of the scans.
z
    scans over the standard error by the members, ``paired SD / sqrt(M)``: were the numerical spread all there is, it
    would lie within 2.
manual
    difference of the reference labels, drawn afresh on each scan.
"""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from atrophy import segment_image
from heads import as_classes, find_heads, load_members, print_markdown, print_origin, segmenting_parser

from bids_varaug.machine import keep_freed_memory
from bids_varaug.models.ensemble import BASELINE, Ensemble, Member, select_members


def member_volumes(t1w: str, ensemble: Ensemble, members: list[Member], folder: Path) -> np.ndarray:
    """Volumes (M, K) of each class by each member, voxels of the image."""
    name = Path(t1w).name.removesuffix(".nii.gz")
    paths = [folder / f"{name} {member.id}.npz" for member in members]
    missing = [member for member, path in zip(members, paths, strict=True) if not path.exists()]
    if missing:
        image = nib.load(t1w).get_fdata(dtype=np.float32)
        for member, labels in zip(missing, segment_image(image, t1w, ensemble, missing), strict=True):
            np.savez_compressed(folder / f"{name} {member.id}.npz", labels=labels)
    return np.stack([np.bincount(np.load(path)["labels"].ravel(), minlength=len(ensemble.labels)) for path in paths])


def compare_scans(first: np.ndarray, second: np.ndarray) -> pd.DataFrame:
    """Differences and spread of (M, F) volumes of two scans, in percent; see above.

    >>> compare_scans(np.array([[99.0], [101.0]]), np.array([[109.0], [111.0]])).round(1).to_dict("list")
    {'scans': [9.5], 'SD': [1.3], 'paired SD': [0.0], 'z': [inf]}
    """
    mean = (first.mean(axis=0) + second.mean(axis=0)) / 2
    difference = 100 * (second - first) / mean
    paired = difference.std(axis=0, ddof=1)
    spread = np.sqrt((first.var(axis=0, ddof=1) + second.var(axis=0, ddof=1)) / 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        z = difference.mean(axis=0) / (paired / np.sqrt(len(first)))
    return pd.DataFrame({"scans": difference.mean(axis=0), "SD": 100 * spread / mean, "paired SD": paired, "z": z})


def main() -> None:
    """Segment both scans, and print the table."""
    parser = segmenting_parser(__doc__)
    parser.add_argument("--participant", default="OAS10111")
    options = parser.parse_args()
    keep_freed_memory()
    ensemble = load_members(options.ensemble)
    chosen = select_members(ensemble, [BASELINE, *options.members], options.n_members)
    members = [member for member in chosen if not member.is_baseline]
    heads = [head for head in find_heads(options.datasets[0]) if f"sub-{options.participant}" in head.t1w]
    if len(heads) != 2 or not heads[0].reference:
        raise SystemExit(f"{options.datasets[0]}: {len(heads)} scans of {options.participant}, not two with labels.")
    folder = options.cache / "rescan" / ensemble.name
    folder.mkdir(parents=True, exist_ok=True)
    ids = [label.index for label in ensemble.labels]
    volumes, manual = [], []
    for head in heads:
        every = member_volumes(head.t1w, ensemble, [*members, *chosen[:1]], folder)
        volumes.append(every[:, 1:].astype(float))
        classes = np.maximum(as_classes(head.read_reference(), str(head.protocol), ids), 0)
        manual.append(np.bincount(classes.ravel(), minlength=len(ids))[1:].astype(float))
    table = compare_scans(*(one[:-1] for one in volumes))
    table["baseline"], table["manual"] = (
        200 * (second - first) / (first + second)
        for first, second in ((volumes[0][-1], volumes[1][-1]), (manual[0], manual[1]))
    )
    table.index = pd.Index([label.name for label in ensemble.labels[1:]], name="structure")
    print_origin(f"{options.participant} scanned twice, {len(members)} perturbed members", ensemble.name, heads)
    print_markdown(table, digits=1)
    print("Median of absolute values:", table.abs().median().round(2).to_dict())


if __name__ == "__main__":
    main()
