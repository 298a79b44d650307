"""Features made of features: relative volumes, asymmetries, logarithms.

Relative volumes and asymmetries learn nothing from the data and are made before folds are; `LogVolumes` does, and is
fitted with each model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from sklearn.base import BaseEstimator, OneToOneFeatureMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from bids_varaug.brainage.cohort import Cohort
from bids_varaug.errors import UserError
from bids_varaug.inputs.tables import plain_name, some

INTRACRANIAL = ("estimatedtotalintracranialvol", "etiv", "icv", "tiv", "intracranialvol")
BRAIN = ("brainsegvol", "brainsegvolnotvent", "brainvol", "totalbrainvolume")
_NO_VOLUME = re.compile(r"thick|(?<!accumbens.)area|curv|fold|std|holes|euler|avg_en|ratio|-to-|asymmetry", re.I)
_SIDES = (
    ("Left-", "Right-"), ("ctx-lh-", "ctx-rh-"), ("lh_", "rh_"), ("lh.", "rh."), ("lh", "rh"), ("left_", "right_"),
)  # fmt: skip


def relative_volumes(cohort: Cohort, reference: str = "brain") -> Cohort:
    """Volumes divided by intracranial or brain volume, so that head size does not count.

    Thickness, areas and other measures that are not volumes (by their names), the reference itself and intracranial
    volumes stay as they are. A reference of 0 gives NaN.

    The reference "intracranial" or "brain" is the column of that name in its usual spellings (eTIV, ICV; BrainSegVol);
    "brain" without such a column, and "sum", the sum of all volumes; otherwise the name of a column. A UserError says
    that there is none, or no volume.
    """
    at = find_reference(cohort.names, reference)
    volumes = np.array(
        [is_volume(name) and f != at and _plain(name) not in INTRACRANIAL for f, name in enumerate(cohort.names)]
    )
    if not volumes.any():
        raise UserError(f"no volume among the features {some(cohort.names)}.")

    def divide(x: np.ndarray) -> np.ndarray:
        total = x[..., volumes].sum(axis=-1) if at is None else x[..., at]
        return np.where(volumes, x / np.where(total > 0, total, np.nan)[..., None], x)

    return _derive(cohort, cohort.names, divide)


def asymmetries(cohort: Cohort) -> Cohort:
    """Append left-right asymmetries ``(L - R) / (L + R)`` of all pairs (Left-/Right-, lh_/rh_, ...) to the features.

    0 where a structure is absent on both sides. Half of the asymmetry index of some papers, which divides by the mean
    of both sides. A UserError says that there is no pair.
    """
    pairs = find_pairs(cohort.names)
    if not pairs:
        raise UserError(f"no left and right among the features {some(cohort.names)}.")
    left, right = [left for _, left, _ in pairs], [right for _, _, right in pairs]

    def append(x: np.ndarray) -> np.ndarray:
        both = x[..., left] + x[..., right]
        return np.concatenate([x, (x[..., left] - x[..., right]) / np.where(both != 0, both, 1)], axis=-1)

    return _derive(cohort, (*cohort.names, *(f"{name}_asymmetry" for name, _, _ in pairs)), append)


def _derive(cohort: Cohort, names: tuple[str, ...], function: Callable[[np.ndarray], np.ndarray]) -> Cohort:
    members = None if cohort.members is None else function(cohort.members)
    return replace(cohort, names=names, baseline=function(cohort.baseline), members=members, unit="")


class LogVolumes(OneToOneFeatureMixin, TransformerMixin, BaseEstimator):
    """Natural logarithm of volumes.

    Volumes are closer to log-normal than to normal, and their effects multiply. Where one is 0 for somebody in
    training, half of its smallest positive value is added first, to everybody. What is not a volume by its name (see
    `is_volume`; without `names`, all are), has negative values, or is 0 for all stays as it is; a negative value of a
    volume that was never so in training counts as 0.

    Examples
    --------
    >>> LogVolumes(["CSF", "lh_thickness"]).fit_transform([[1.0, 3.0], [np.e, 2.0]]).tolist()
    [[0.0, 3.0], [1.0, 2.0]]
    """

    def __init__(self, names: Sequence[str] | None = None) -> None:
        self.names = names

    def fit(self, X: np.ndarray, y: object = None) -> LogVolumes:
        """Find what can be logged in (n, F) features."""
        X = validate_data(self, X, dtype=np.float64)
        smallest = np.where(X > 0, X, np.inf).min(axis=0)
        volumes = True if self.names is None else np.array([is_volume(name) for name in self.names])
        self.logged_ = volumes & (X.min(axis=0) >= 0) & np.isfinite(smallest)
        self.offset_ = np.where(self.logged_ & (X.min(axis=0) == 0), smallest / 2, 0.0)
        # A value that was always positive may still be 0 for a new person.
        self.lowest_ = np.where(self.logged_, smallest / 2, 1.0)
        return self

    def transform(self, X: np.ndarray) -> np.ndarray:
        """Take logarithms; (n, F) float64."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        shifted = np.maximum(X, 0) + self.offset_
        return np.where(self.logged_, np.log(np.where(shifted > 0, shifted, self.lowest_)), X)


def is_volume(name: str) -> bool:
    """Whether a feature is a volume, as far as its name tells.

    Examples
    --------
    >>> is_volume("Left-Accumbens-area"), is_volume("lh_cuneus_area"), is_volume("lh_MeanThickness")
    (True, False, False)
    """
    return _NO_VOLUME.search(name) is None


def find_reference(names: Sequence[str], reference: str) -> int | None:
    """Column to divide by; None for the sum of all volumes; a UserError says that there is none."""
    if reference in names:
        return list(names).index(reference)
    plain = [_plain(name) for name in names]
    for spelling in {"intracranial": INTRACRANIAL, "brain": BRAIN}.get(reference, ()):
        if spelling in plain:
            return plain.index(spelling)
    if reference in ("sum", "brain"):
        return None
    raise UserError(
        f"no column of {reference} volume among the features {some(names)}. Name one, or divide by 'brain' or 'sum'."
    )


def find_pairs(names: Sequence[str]) -> list[tuple[str, int, int]]:
    """Name without side, and columns of left and right.

    Examples
    --------
    >>> find_pairs(["Left-Thalamus", "CSF", "Right-Thalamus"])
    [('Thalamus', 0, 2)]
    """
    at = {name: column for column, name in enumerate(names)}
    pairs = []
    for name, left in at.items():
        sides = [side for side in _SIDES if name.startswith(side[0])]
        bare = [(name.removeprefix(prefix), at.get(other + name.removeprefix(prefix))) for prefix, other in sides]
        pairs += [(stem, left, right) for stem, right in bare if right is not None][:1]
    return pairs


def _plain(name: str) -> str:
    return re.sub(r"(volume)?mm3$", "", plain_name(name))
