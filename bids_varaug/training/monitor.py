"""Real images watched during training: synthetic loss alone says little about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd

from bids_varaug.errors import UserError
from bids_varaug.images.conform import prepare_head, resample_posterior
from bids_varaug.models.unet import UNet
from bids_varaug.segmentation.locate import crop_to_brain
from bids_varaug.segmentation.posterior import SparsePosterior
from bids_varaug.segmentation.predict import segment_volume


@dataclass(frozen=True)
class LabelledImage:
    """A T1w image and its label map on the same grid."""

    t1w: Path
    labels: Path


def find_labelled_images(directory: Path, names: Mapping[int, str]) -> list[LabelledImage]:
    """Pair ``<name>_T1w.nii.gz`` with a ``<name>*_dseg.nii.gz`` beside it (``desc-aseg`` first).

    Parameters
    ----------
    names : label id -> name; maps whose own table (``*_dseg.tsv``) calls every id something else
        belong to another atlas and are passed over, those without a table are believed

    Raises
    ------
    UserError
        If no T1w image of the folder has a label map.
    """
    found = []
    for t1w in sorted(directory.rglob("*_T1w.nii*")):
        stem = t1w.name.split("_T1w")[0].split("_desc-")[0]
        maps = [path for path in t1w.parent.glob(f"{stem}*_dseg.nii*") if _same_atlas(path, names)]
        if maps:
            first = min(maps, key=lambda path: ("desc-aseg" not in path.name, path.name))
            found.append(LabelledImage(t1w, first))
    if not found:
        raise UserError(f"{directory}: no *_T1w.nii.gz with a *_dseg.nii.gz beside it.")
    return found


def _same_atlas(path: Path, names: Mapping[int, str]) -> bool:
    table = path.with_name(path.name.split(".nii")[0] + ".tsv")
    if not table.exists():
        return True
    rows = pd.read_csv(table, sep="\t")
    return any(names.get(i) == name for i, name in zip(rows["index"], rows["name"], strict=True))


class PreparedHead:
    """A T1w image, cropped as the app does it.

    Parameters
    ----------
    network : finds the brain
    voxel_size : of the network grid, mm

    Attributes
    ----------
    head : (X, Y, Z) float32, part with the brain, network grid
    geometry : of that part
    """

    def __init__(self, t1w: Path, network: UNet, voxel_size: float):
        head, geometry = prepare_head(t1w, voxel_size, network.shape.multiple)
        self.head, self.geometry = crop_to_brain(network, head, geometry)

    def native_labels(self, sparse: SparsePosterior) -> np.ndarray:
        """Return class indices uint8 on the image's own grid."""
        return resample_posterior(sparse.offsets, sparse.voxels, sparse.posterior, self.geometry)


class PreparedImage(PreparedHead):
    """A prepared head and its label map on the image's own grid.

    Parameters
    ----------
    network, voxel_size : as of `PreparedHead`
    class_ids : label id of each class, background first
    """

    def __init__(
        self, image: LabelledImage, network: UNet, voxel_size: float, class_ids: Sequence[int]
    ):
        super().__init__(image.t1w, network, voxel_size)
        self.truth = np.asarray(nib.load(image.labels).dataobj).astype(np.int64)
        self.class_ids = np.asarray(class_ids)

    def dice(self, sparse: SparsePosterior) -> np.ndarray:
        """Dice (K - 1,) float64 of classes 1..K-1, as of `dice_with_truth`."""
        found = self.class_ids[self.native_labels(sparse)]
        return dice_with_truth(found, self.truth, self.class_ids[1:])


def dice_with_truth(found: np.ndarray, truth: np.ndarray, ids: Sequence[int]) -> np.ndarray:
    """Dice of each label; NaN where the truth lacks it.

    Parameters
    ----------
    found : (X, Y, Z) int, label ids
    truth : (X, Y, Z) int, label ids; voxels below 0 do not count
    ids : (K,) labels to compare

    Returns
    -------
    (K,) float64

    Examples
    --------
    >>> dice_with_truth(np.array([[[4, 4, 4, 2]]]), np.array([[[4, 4, 0, -1]]]), [4, 2])
    array([0.8, nan])
    """
    scores = []
    for i in ids:
        ours, theirs = (found == i) & (truth >= 0), truth == i
        total = ours.sum() + theirs.sum()
        scores.append(2 * (ours & theirs).sum() / total if theirs.any() else np.nan)
    return np.array(scores)


def real_image_dice(
    network: UNet, image: LabelledImage, class_ids: Sequence[int], voxel_size: float
) -> np.ndarray:
    """Dice of each structure against the image's label map; NaN where the map lacks it.

    Returns
    -------
    (K - 1,) float64, classes 1..K-1
    """
    prepared = PreparedImage(image, network, voxel_size, class_ids)
    return prepared.dice(segment_volume(network, prepared.head))
