"""Features made of features: relative volumes, asymmetries, logarithms.

The transformers are scikit-learn's kind, for arrays (n, F) whose columns have the `names` given at
construction. `RelativeVolumes` and `Asymmetries` learn nothing from the data and may be applied
before folds are made (`derive_features`); `LogVolumes` does, and is fitted with each model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from sklearn.base import BaseEstimator, OneToOneFeatureMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from bids_varaug.brainage.cohort import Cohort
from bids_varaug.errors import UserError
from bids_varaug.inputs.tables import plain_name, some

INTRACRANIAL = ("estimatedtotalintracranialvol", "etiv", "icv", "tiv", "intracranialvol")
BRAIN = ("brainsegvol", "brainsegvolnotvent", "brainvol", "totalbrainvolume")
_NO_VOLUME = re.compile(
    r"thick|(?<!accumbens.)area|curv|fold|std|holes|euler|avg_en|ratio|-to-|asymmetry",
    re.IGNORECASE,
)
_SIDES = (("Left-", "Right-"), ("lh_", "rh_"), ("lh.", "rh."), ("lh", "rh"), ("left_", "right_"))


class FeatureError(UserError):
    """The features do not allow what was asked for."""


class RelativeVolumes(TransformerMixin, BaseEstimator):
    """Volumes divided by intracranial or brain volume, so that head size does not count.

    Parameters
    ----------
    names : sequence of str
        Of the F features.
    reference : str
        "intracranial" or "brain": the column of that name in its usual spellings (eTIV, ICV;
        BrainSegVol). "brain" without such a column, and "sum": the sum of all volumes, which
        should then be structures that do not overlap. Otherwise the name of a column.

    Notes
    -----
    Thickness, areas and other measures that are no volumes (told by their names), the reference
    itself and intracranial volumes stay as they are. A reference of 0 gives NaN.

    Examples
    --------
    >>> by_brain = RelativeVolumes(["Left-Thalamus", "Right-Thalamus"], "sum")
    >>> by_brain.fit_transform([[30.0, 10.0]]).tolist()
    [[0.75, 0.25]]
    """

    def __init__(self, names: Sequence[str], reference: str = "brain") -> None:
        self.names = names
        self.reference = reference

    def fit(self, X, y=None) -> RelativeVolumes:
        """Find the columns.

        Raises
        ------
        FeatureError
            If there is no reference column, or no volume.
        """
        X = _check(self, X, reset=True)
        self.reference_ = find_reference(self.names, self.reference)
        self.volumes_ = np.array(
            [
                is_volume(name) and at != self.reference_ and _plain(name) not in INTRACRANIAL
                for at, name in enumerate(self.names)
            ]
        )
        if not self.volumes_.any():
            raise FeatureError(f"no volume among the features {some(list(self.names))}.")
        return self

    def transform(self, X) -> np.ndarray:
        """Divide; (n, F) float64."""
        check_is_fitted(self)
        X = _check(self, X).copy()
        volumes = X[:, self.volumes_]
        total = volumes.sum(axis=1) if self.reference_ is None else X[:, self.reference_]
        X[:, self.volumes_] = volumes / np.where(total > 0, total, np.nan)[:, None]
        return X

    def get_feature_names_out(self, input_features=None) -> np.ndarray:
        """Names of the features, unchanged."""
        return np.array(self.names, dtype=object)


class Asymmetries(TransformerMixin, BaseEstimator):
    """Left-right asymmetries ``(L - R) / (L + R)`` of all pairs, after the features themselves.

    Parameters
    ----------
    names : sequence of str
        Of the F features; pairs are told by Left-/Right-, lh_/rh_, lh/rh or left_/right_.

    Notes
    -----
    0 where a structure is absent on both sides. Half of the asymmetry index of some papers, which
    divides by the mean of both sides.

    Examples
    --------
    >>> asymmetries = Asymmetries(["Left-Thalamus", "Right-Thalamus"])
    >>> asymmetries.fit_transform([[30.0, 10.0]]).tolist()
    [[30.0, 10.0, 0.5]]
    >>> asymmetries.get_feature_names_out().tolist()[-1]
    'Thalamus_asymmetry'
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names

    def fit(self, X, y=None) -> Asymmetries:
        """Find the pairs.

        Raises
        ------
        FeatureError
            If there is none.
        """
        _check(self, X, reset=True)
        self.pairs_ = find_pairs(self.names)
        if not self.pairs_:
            raise FeatureError(f"no left and right among the features {some(list(self.names))}.")
        return self

    def transform(self, X) -> np.ndarray:
        """Append; (n, F + pairs) float64."""
        check_is_fitted(self)
        X = _check(self, X)
        left = X[:, [left for _, left, _ in self.pairs_]]
        right = X[:, [right for _, _, right in self.pairs_]]
        both = left + right
        return np.hstack([X, (left - right) / np.where(both != 0, both, 1)])

    def get_feature_names_out(self, input_features=None) -> np.ndarray:
        """Names of the features, then of the asymmetries."""
        check_is_fitted(self)
        added = [f"{name}_asymmetry" for name, _, _ in self.pairs_]
        return np.array([*self.names, *added], dtype=object)


class LogVolumes(OneToOneFeatureMixin, TransformerMixin, BaseEstimator):
    """Natural logarithm of volumes.

    Volumes are closer to log-normal than to normal, and their effects multiply. Where one is 0 for
    somebody in training, half of its smallest positive value is added first, to everybody. What
    is no volume by its name (see `is_volume`), has negative values, or is 0 for all stays as it is;
    a negative value of a volume that was never so in training counts as 0.

    Parameters
    ----------
    names : sequence of str
        Of the F features.

    Attributes
    ----------
    logged_ : (F,) bool
    offset_ : (F,) float64, what is added
    lowest_ : (F,) float64, what takes the place of a 0 of a feature without offset

    Examples
    --------
    >>> LogVolumes(["CSF", "lh_thickness"]).fit_transform([[1.0, 3.0], [np.e, 2.0]]).tolist()
    [[0.0, 3.0], [1.0, 2.0]]
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names

    def fit(self, X, y=None) -> LogVolumes:
        """Find what can be logged."""
        X = _check(self, X, reset=True)
        smallest = np.where(X > 0, X, np.inf).min(axis=0)
        volumes = np.array([is_volume(name) for name in self.names])
        self.logged_ = volumes & (X.min(axis=0) >= 0) & np.isfinite(smallest)
        # A value that was always positive may still be 0 for a new person.
        needed = self.logged_ & (X.min(axis=0) == 0)
        self.offset_ = np.where(needed, smallest / 2, 0.0)
        self.lowest_ = np.where(self.logged_, smallest / 2, 1.0)
        return self

    def transform(self, X) -> np.ndarray:
        """Take logarithms; (n, F) float64."""
        check_is_fitted(self)
        X = _check(self, X).copy()
        shifted = np.maximum(X, 0) + self.offset_
        positive = np.where(shifted > 0, shifted, self.lowest_)
        X[:, self.logged_] = np.log(positive[:, self.logged_])
        return X


def derive_features(cohort: Cohort, transformer: TransformerMixin) -> Cohort:
    """Apply a transformer that learns nothing from the data to a whole cohort.

    Parameters
    ----------
    cohort : Cohort
    transformer : RelativeVolumes or Asymmetries
        Made with the cohort's names.

    Returns
    -------
    Cohort
        With new features for baseline and members; no unit.
    """
    baseline = transformer.fit_transform(cohort.baseline)
    names = tuple(str(name) for name in transformer.get_feature_names_out())
    members = None
    if cohort.members is not None:
        n, m, f = cohort.members.shape
        members = transformer.transform(cohort.members.reshape(-1, f)).reshape(n, m, -1)
    return replace(cohort, names=names, baseline=baseline, members=members, unit="")


def is_volume(name: str) -> bool:
    """Whether a feature is a volume, as far as its name tells.

    Examples
    --------
    >>> is_volume("Left-Accumbens-area"), is_volume("lh_cuneus_area"), is_volume("lh_MeanThickness")
    (True, False, False)
    """
    return _NO_VOLUME.search(name) is None


def find_reference(names: Sequence[str], reference: str) -> int | None:
    """Column to divide by; None for the sum of all volumes.

    Raises
    ------
    FeatureError
        If there is no such column.
    """
    if reference in names:
        return list(names).index(reference)
    if reference == "sum":
        return None
    plain = [_plain(name) for name in names]
    spellings = {"intracranial": INTRACRANIAL, "brain": BRAIN}.get(reference, ())
    for spelling in spellings:
        if spelling in plain:
            return plain.index(spelling)
    if reference == "brain":
        return None
    raise FeatureError(
        f"no column of {reference} volume among the features {some(list(names))}. Name one, or "
        "divide by 'brain' or 'sum'."
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
        for prefix, other in _SIDES:
            right = at.get(other + name.removeprefix(prefix)) if name.startswith(prefix) else None
            if right is not None:
                pairs.append((name.removeprefix(prefix), left, right))
                break
    return pairs


def _plain(name: str) -> str:
    return re.sub(r"(volume)?mm3$", "", plain_name(name))


def _check(transformer, X, reset: bool = False) -> np.ndarray:
    X = validate_data(transformer, X, dtype=np.float64, reset=reset)
    if X.shape[1] != len(transformer.names):
        raise ValueError(f"{X.shape[1]} columns, but {len(transformer.names)} names")
    return X
