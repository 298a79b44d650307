"""Maps of a group in the template's space: where segmentations cannot be trusted, and where people differ.

Images pass by one at a time; memory does not grow with their number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

MAPS = ("entropy", "sigbits", "unreliable")
"""Of one image, beside its labels: vote entropy [bit], significant bits [bit], mask of unreliable voxels."""


class GroupMaps:
    """Sums over images on one grid, each with a weight: one over the number of images of its participant.

    So each participant counts once. `label_ids` are those of the K classes, background first.
    """

    def __init__(self, shape: tuple[int, ...], label_ids: Sequence[int]):
        self.label_ids = np.array(label_ids)
        self.weight = 0.0
        self._sums = {name: np.zeros(shape, np.float32) for name in MAPS}
        self._labels = np.zeros((len(label_ids), int(np.prod(shape))), np.float32)
        self._labelled = np.zeros(shape, np.float32)  # participants with a structure in a voxel: who has bits there

    def add(self, labels: np.ndarray, maps: Mapping[str, np.ndarray], weight: float = 1.0) -> None:
        """Add an image: labels (X, Y, Z) of ids, and `MAPS` (X, Y, Z); ValueError if a shape or an id is another."""
        for name, array in (("labels", labels), *maps.items()):
            if array.shape != self._sums[MAPS[0]].shape:
                raise ValueError(f"{name} of {array.shape} voxels, not {self._sums[MAPS[0]].shape}")
        order = np.argsort(self.label_ids)
        found = np.searchsorted(self.label_ids, labels.ravel(), sorter=order)
        classes = order[np.minimum(found, len(order) - 1)]
        if (self.label_ids[classes] != labels.ravel()).any():
            raise ValueError(f"labels that the ensemble lacks: {np.setdiff1d(labels, self.label_ids).tolist()}")
        self._labels[classes, np.arange(labels.size)] += np.float32(weight)
        labelled = np.float32(weight) * (labels != 0)
        for name, sums in self._sums.items():
            sums += (labelled if name == "sigbits" else np.float32(weight)) * maps[name]
        self._labelled += labelled
        self.weight += weight

    def mean(self, name: str) -> np.ndarray:
        """Mean (X, Y, Z) float32 of one of `MAPS` over people; sigbits over those with a structure there (or NaN)."""
        if name != "sigbits":
            return self._sums[name] / np.float32(self.weight)
        return self._sums[name] / np.where(self._labelled > 0, self._labelled, np.float32(np.nan))

    def probability(self, k: int) -> np.ndarray:
        """Share (X, Y, Z) float32 of the participants that have class k in a voxel."""
        return (self._labels[k] / np.float32(self.weight)).reshape(self._sums[MAPS[0]].shape)

    def most_probable(self) -> np.ndarray:
        """Most frequent class (X, Y, Z) int64 over participants, ties to the lower class."""
        return self._labels.argmax(axis=0).reshape(self._sums[MAPS[0]].shape)

    def region_table(self, names: Sequence[str]) -> pd.DataFrame:
        """Row per structure with voxels where it is the most probable, those with the most entropy first.

        name, entropy and sigbits [bit], unreliable (share of the participants), overlap (share of the participants that
        have the structure there), each the mean over these voxels; voxels. `names` are those of the K classes.
        """
        classes = self.most_probable().ravel()
        counts = np.bincount(classes, minlength=len(names))
        rows = {"index": self.label_ids, "name": list(names), "voxels": counts}
        overlap = self._labels[classes, np.arange(classes.size)] / self.weight
        values = {name: self.mean(name).ravel() for name in MAPS} | {"overlap": overlap}
        for name, array in values.items():
            rows[name] = np.bincount(classes, weights=array, minlength=len(names)) / np.maximum(counts, 1)
        table = pd.DataFrame(rows)[1:]
        return table[table["voxels"] > 0].sort_values("entropy", ascending=False, kind="stable", ignore_index=True)
