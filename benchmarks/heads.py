"""Real heads: their reference labels and ages, and what `segment_heads.py` keeps of each.

A dataset is a folder of ``*_T1w.nii.gz``, BIDS or not, with label maps ``*_desc-*_dseg.nii.gz`` on
the T1w's grid beside them or under ``derivatives/``. The ``desc`` tells the protocol:

``aseg31``
    manual labels that were mapped to the ensemble's ids;
``aseg``
    FreeSurfer's. Choroid plexus counts as lateral ventricle, as in the training labels; corpus
    callosum and hypointensities, which have no side, are not judged;
``dlmuse``
    ids of MUSE (Doshi et al. 2016, doi:10.1016/j.neuroimage.2015.11.073), by name: see `MUSE`.

Label maps of other protocols are passed over. Voxels that are not judged count for nothing:
neither for overlap, nor for a volume, nor as an error.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import cached_property
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import torch

from bids_varaug.models.ensemble import Ensemble, Member, load_ensemble, sha256_of
from bids_varaug.variability.measures import pairwise_dice, region_counts

NOT_JUDGED = -1
OLD = 40
"""Years. No recipe may be chosen by scores of people older than this."""
FREESURFER = {31: 4, 63: 43} | dict.fromkeys((77, 80, *range(251, 256)), NOT_JUDGED)
_MUSE_PAIRS = {  # right, left
    (23, 30): (58, 26), (31, 32): (54, 18), (36, 37): (50, 11), (38, 39): (47, 8),
    (40, 41): (46, 7), (47, 48): (53, 17), (49, 50): (44, 5), (51, 52): (43, 4),
    (55, 56): (52, 13), (57, 58): (51, 12), (59, 60): (49, 10), (61, 62): (60, 28),
}  # fmt: skip
MUSE = dict.fromkeys(range(1, 208), 0) | {
    4: 14, 11: 15, 35: 16,
    **{muse: ours for pair in _MUSE_PAIRS.items() for muse, ours in zip(*pair, strict=True)},
    **{muse: 2 if muse % 2 == 0 else 41 for muse in range(81, 89)},  # white matter of four lobes
    **{muse: 3 if muse % 2 else 42 for muse in range(100, 208)},  # gyri
    # Vermis and corpus callosum have no side. FreeSurfer divides the fornix, the internal capsule
    # and the basal forebrain between several labels.
    **dict.fromkeys((71, 72, 73, 75, 76, *range(89, 96)), NOT_JUDGED),
}  # fmt: skip
MAPS = ("total_entropy", "mutual_information", "entropy")
"""Of `segmentation.fuse`, which are kept of each group of passes; of one pass alone the first."""
PROTOCOLS = {"aseg31": {}, "aseg": FREESURFER, "dlmuse": MUSE}


@dataclass(frozen=True)
class Head:
    """A T1w image, whose it is, and who says what it shows.

    Attributes
    ----------
    dataset, participant : name of the folder; this, and the first entity of the file's name
    age : years, None if not given
    reference : label map on the same grid, of `protocol`; both None if there is none
    """

    t1w: str
    dataset: str
    participant: str
    age: float | None
    reference: str | None
    protocol: str | None

    @property
    def name(self) -> str:
        """The file's name up to the suffix."""
        return Path(self.t1w).name.split("_T1w")[0]

    def read_reference(self) -> np.ndarray:
        """Return label ids (X, Y, Z) int32 as the file has them."""
        return np.asarray(nib.load(self.reference).dataobj).astype(np.int32)


def find_heads(folder: Path) -> list[Head]:
    """Find the T1w images of a dataset, with ages and reference labels where there are any."""
    folder, ages = folder.absolute(), {}
    if (folder / "participants.tsv").exists():
        people = pd.read_csv(folder / "participants.tsv", sep="\t", dtype={"participant_id": str})
        ages = people.set_index("participant_id")["age"].astype(float).dropna().to_dict()
    found = []
    for t1w in sorted(folder.rglob("*_T1w.nii.gz")):
        place = t1w.relative_to(folder)
        if place.parts[0] in ("derivatives", "sourcedata"):
            continue
        stem = t1w.name.split("_T1w")[0].split("_desc-")[0]
        label = stem.split("_")[0]
        maps = [*t1w.parent.glob(f"{stem}*_dseg.nii.gz"),
                *folder.glob(f"derivatives/*/{place.parent}/{stem}*_dseg.nii.gz")]  # fmt: skip
        known = [(p, path) for p in PROTOCOLS for path in maps if f"_desc-{p}_dseg" in path.name]
        protocol, reference = known[0] if known else (None, None)
        found.append(
            Head(str(t1w), folder.name, f"{folder.name}/{label}", ages.get(label),
                 None if reference is None else str(reference), protocol)
        )  # fmt: skip
    return found


def as_classes(ids: np.ndarray, protocol: str, class_ids: Sequence[int]) -> np.ndarray:
    """Return a protocol's label ids as classes of the network.

    Parameters
    ----------
    ids : (...) int, as the label map has them
    protocol : one of `PROTOCOLS`
    class_ids : (K,) label id of each class, background first

    Returns
    -------
    (...) int16; background where no class corresponds, `NOT_JUDGED` where nobody can say

    Examples
    --------
    >>> as_classes(np.array([0, 47, 71, 46]), "dlmuse", [0, 17, 53]).tolist()
    [0, 2, -1, 0]
    """
    table = {int(i): k for k, i in enumerate(class_ids)} | {NOT_JUDGED: NOT_JUDGED}
    translate = PROTOCOLS[protocol]
    values, inverse = np.unique(ids, return_inverse=True)
    classes = [table.get(translate.get(int(v), int(v)), 0) for v in values]
    return np.array(classes, np.int16)[inverse].reshape(np.shape(ids))


class SegmentedHead:
    """A head as `segment_heads.py` left it; arrays are read when they are first needed.

    Attributes
    ----------
    head : Head
    passes : DataFrame, a row per segmentation: id, family, sha256; trained ones first
    groups : families of two passes or more, and "all": trained members, the baseline aside
    names : (K - 1,) of the structures; class_ids : (K,) label ids, background first
    voxel_volume, network_voxel_volume : mm3, of the T1w's grid, and of the network's
    counts : `RegionCounts` of the members that are not of a moved or noisy image, network's grid
    """

    def __init__(self, path: Path):
        self._arrays = np.load(path)
        meta = json.loads(str(self._arrays["meta"]))
        self.head = Head(**meta["head"])
        self.passes = pd.DataFrame(meta["passes"])
        self.groups, self.names, self.class_ids = meta["groups"], meta["names"], meta["class_ids"]
        self.voxel_volume, self.ensemble = meta["voxel_volume"], meta["ensemble"]
        self.network_voxel_volume = meta["network_voxel_volume"]

    @cached_property
    def labels(self) -> np.ndarray:
        """Classes (M, V) uint8 of all passes, in the voxels that any of them knows of."""
        return self._arrays["labels"]

    @cached_property
    def truth(self) -> np.ndarray:
        """Classes (V,) int16 of the reference in these voxels, which hold all of it."""
        return as_classes(self._arrays["reference"], self.head.protocol, self.class_ids)

    @property
    def intersections(self) -> np.ndarray:
        """Voxels (M, M, K) int64 of the network's grid on which two members agree."""
        return self._arrays["intersections"]

    def map(self, group: str, measure: str) -> np.ndarray:
        """Return ``consensus`` (class), its ``error_probability``, or one of `MAPS`, calibrated: (V,).

        `group` is one of `groups`, or "ieee".
        """
        return self._arrays[f"{group}_{measure}"]

    def soft_dice(self, group: str) -> np.ndarray:
        """Return that of each class, (K,), see `variability.expected_dice`."""
        return self._arrays[f"{group}_soft_dice"]

    def of_family(self, group: str) -> np.ndarray:
        """Return which passes belong to a group: (M,) bool."""
        if group == "all":
            return self.passes["trained"].to_numpy() & (self.passes["family"] != "ieee").to_numpy()
        return (self.passes["family"] == group).to_numpy()

    def variation(self, group: str) -> pd.Series:
        """Coefficient of variation of each structure's volume over the passes of a group."""
        n = len(self.class_ids)
        members = self.labels[self.of_family(group)]
        volumes = np.array([np.bincount(labels, minlength=n)[1:] for labels in members])
        mean = volumes.mean(axis=0)
        return pd.Series(volumes.std(axis=0, ddof=1) / np.where(mean > 0, mean, np.nan), self.names)

    @property
    def people(self) -> str:
        """Those that the head is judged with: of one dataset, and on one side of `OLD`."""
        if self.head.age is None:
            return self.head.dataset
        return f"{self.head.dataset}, {'over' if self.head.age > OLD else 'up to'} {OLD}"


def read_cache(folder: Path) -> list[SegmentedHead]:
    """Read the heads of a cache folder, in the order of their names.

    Raises
    ------
    SystemExit
        If there is none, some were segmented by other members than the rest, or the members are too few to differ.
    """
    heads = [SegmentedHead(path) for path in sorted(folder.glob("*/*.npz"))]
    if not heads:
        raise SystemExit(f"{folder}: no segmented head. Run benchmarks/segment_heads.py.")
    if "all" not in heads[0].groups:
        raise SystemExit(f"{folder}: spread needs two members or more beside the baseline.")
    members = [head.passes[head.passes["trained"]].to_dict("records") for head in heads]
    others = [head.head.name for head, m in zip(heads, members, strict=True) if m != members[0]]
    if others:
        raise SystemExit(f"{folder}: {', '.join(others)} segmented by other members than "
                         f"{heads[0].head.name}. Segment all heads with the same.")  # fmt: skip
    return heads


def structure_scores(head: SegmentedHead, labels: np.ndarray) -> pd.DataFrame:
    """Compare classes (V,) with the reference: a row for each structure that the reference has.

    Returns
    -------
    DataFrame
        structure, dice, volume, reference [mm3, of judged voxels]
    """
    judged = head.truth >= 0
    both = np.stack([head.truth[judged], labels[judged]]).astype(np.uint8)
    counts = region_counts([both], 2, len(head.class_ids))
    true, found = counts.volumes[:, 1:] * head.voxel_volume
    table = pd.DataFrame({"structure": head.names, "dice": pairwise_dice(counts)[0, 1, 1:],
                          "volume": found, "reference": true})  # fmt: skip
    return table[true > 0]


def print_markdown(table: pd.DataFrame, digits: int = 3) -> None:
    """Print a table, its index first; missing values are empty."""
    header, *rows = table.to_csv(sep="|", float_format=f"%.{digits}f").splitlines()
    print(header, "|".join(["---"] * (table.shape[1] + 1)), *rows, "", sep="\n")


def print_origin(title: str, ensemble: str, heads: Sequence[Head]) -> None:
    """Print a title, and when, where and of which ensemble and heads the numbers are."""
    info = Path("/proc/cpuinfo")  # of Linux, which says more than `platform` does
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.machine()
    people = {head.participant for head in heads}
    print(f"# {title}\n\n{date.today()}, {processor}, torch {torch.__version__}. "
          f"Ensemble `{ensemble}`; {len(heads)} heads of {len(people)} people.\n")  # fmt: skip


def load_members(name: str) -> Ensemble:
    """Load an ensemble, or the members in a folder of weights without a manifest, of the shipped network."""
    files = sorted(Path(name).glob("*.safetensors"))
    if not files or (Path(name) / "manifest.json").exists():
        return load_ensemble(name)
    members = tuple(
        Member(file.stem, file.stem.rstrip("0123456789"), 0, None, file.name, sha256_of(file)) for file in files
    )
    folder = Path(name).absolute()
    return replace(load_ensemble("aseg31"), name=folder.name, directory=folder, members=members)


def segmenting_parser(doc: str) -> argparse.ArgumentParser:
    """Return the parser of a script that segments heads, with the flags of all such scripts."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("datasets", type=Path, nargs="+")
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--ensemble", default="aseg31")
    parser.add_argument("--members", nargs="+", default=["all"])
    parser.add_argument("--n-members", type=int, help="of each family")
    parser.add_argument("--only", default="", help="heads whose path has this")
    return parser
