"""What the group level works on: people, their ages, and features with every member's version."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

from bids_varaug.errors import UserError
from bids_varaug.inputs.tables import some
from bids_varaug.models.ensemble import BASELINE

MIN_SITES = 3
MAX_MISSING = 0.1  # share of observations
PEOPLE_COLUMNS = ("participant_id", "session_id", "observation", "age", "sex", "site")


class CohortError(UserError):
    """What was gathered makes no cohort."""


@dataclass(frozen=True, eq=False)
class Cohort:
    """R observations (one T1w image, or one row of a table) of people with F features.

    `people` has one row per observation, index 0 ... R - 1: `participant_id` (``sub-01``); `session_id` (``ses-1`` or
    None); `observation`, the image's entities (``sub-01_ses-1_run-2``), unique; `age` in years, float, NaN where
    unknown; `sex` ("F", "M", "O" or None); `site` (str or None).
    """

    people: pd.DataFrame
    names: tuple[str, ...]
    baseline: np.ndarray  # (R, F) float64, of the unperturbed member; where there is none, the mean of the members
    members: np.ndarray | None = None  # (R, M, F) float64, of each perturbed member, M >= 2; None: one value each
    member_ids: tuple[str, ...] = ()  # of the M members ("mca01", ...)
    left_out: dict[str, str] = field(default_factory=dict)  # why, by participant or observation
    source: dict[str, Any] = field(default_factory=dict)  # names, versions and digests of the ensemble, or a table
    unit: str = ""  # "mm3" or nothing
    controls: dict[str, np.ndarray] = field(default_factory=dict)  # (R, F') float64, other features to compare with

    def __len__(self) -> int:
        return len(self.baseline)

    @property
    def age(self) -> np.ndarray:
        """Age in years, (R,) float64."""
        return self.people["age"].to_numpy(np.float64)

    @property
    def groups(self) -> np.ndarray:
        """Participant of each observation, (R,) int64: what folds must not split."""
        return pd.factorize(self.people["participant_id"])[0].astype(np.int64)

    @property
    def weights(self) -> np.ndarray:
        """Weights of the observations, 1 in all per participant, (R,) float64."""
        return participant_weights(self.groups)

    @property
    def sites(self) -> np.ndarray | None:
        """Site of each participant, by observation; None where a site is unknown, or with fewer than 3 sites."""
        first = self.people.drop_duplicates("participant_id").set_index("participant_id")["site"]
        sites = self.people["participant_id"].map(first).to_numpy(object)
        return None if pd.isna(sites).any() or "" in sites or len(set(sites)) < MIN_SITES else sites

    def missing(self) -> np.ndarray:
        """Whether an observation lacks a feature, in the baseline or any member, (R, F) bool."""
        bad = ~np.isfinite(self.baseline)
        return bad if self.members is None else bad | ~np.isfinite(self.members).all(axis=1)

    def take(self, rows: np.ndarray) -> Cohort:
        """Return the observations at these indices (or where a mask is true)."""
        people = self.people.loc[rows].reset_index(drop=True)
        members = None if self.members is None else self.members[rows]
        controls = {name: values[rows] for name, values in self.controls.items()}
        return replace(self, people=people, baseline=self.baseline[rows], members=members, controls=controls)

    def control(self, name: str) -> Cohort:
        """Return the cohort with the features of a control in place of its own; they have no members."""
        x = self.controls[name]
        names = tuple(f"{name}{n}" for n in range(x.shape[1]))
        return replace(self, names=names, baseline=x, members=None, member_ids=(), controls={})

    def with_features(self, names: Sequence[str]) -> Cohort:
        """Return these features in this order; a CohortError names those that are missing."""
        if tuple(names) == tuple(self.names):
            return self
        check_features(self.names, names)
        order = [self.names.index(name) for name in names]
        members = None if self.members is None else self.members[:, :, order]
        return replace(self, names=tuple(names), baseline=self.baseline[:, order], members=members)


def participant_weights(groups: np.ndarray | pd.Series) -> np.ndarray:
    """Weight of each row so that the rows of one participant add up to 1, (R,) float64."""
    _, index, counts = np.unique(groups, return_inverse=True, return_counts=True)
    return 1.0 / counts[index]


def grouped_folds(groups: np.ndarray, n_folds: int, seed: int, strata: np.ndarray | None = None) -> np.ndarray:
    """Held-out fold of each row, (R,) int64 from 0, at most `n_folds`, of nearly equal size; no group is split.

    Each fold has `strata` (R,) in equal shares, as far as possible.

    Examples
    --------
    >>> folds = grouped_folds(np.array([0, 0, 1, 2]), 2, seed=0)
    >>> bool(folds[0] == folds[1]), sorted(set(folds.tolist()))
    (True, [0, 1])
    """
    kind = GroupKFold if strata is None else StratifiedGroupKFold
    splitter = kind(min(n_folds, len(np.unique(groups))), shuffle=True, random_state=seed)
    fold = np.zeros(len(groups), np.int64)
    for k, (_, held_out) in enumerate(splitter.split(np.zeros(len(groups)), strata, groups)):
        fold[held_out] = k
    return fold


@dataclass
class Gathered:
    """What was found, before anything that is incomplete is left out: (R, M, F) values, NaN where missing.

    `present`, (R, M) bool, is whether there is that member of the observation; `age_reasons` why an age is missing, by
    observation, where more is known than that. Tables of one value have one member, the baseline.
    """

    people: pd.DataFrame
    values: np.ndarray
    present: np.ndarray
    member_ids: tuple[str, ...]
    names: tuple[str, ...]
    left_out: dict[str, str]
    age_reasons: Mapping[str, str]

    def leave_out(self, rows: np.ndarray, reasons: Iterable[str]) -> None:
        """Leave out the observations where a mask is true, for these reasons."""
        self.left_out.update(zip(self.people["observation"][rows], reasons, strict=True))
        self.people = self.people.loc[~rows].reset_index(drop=True)
        self.values, self.present = self.values[~rows], self.present[~rows]

    def drop_features(self, reasons: Mapping[int, str]) -> dict[str, str]:
        """Drop features by their place; return the reasons by name."""
        dropped = {self.names[f]: reason for f, reason in reasons.items()}
        self.values = np.delete(self.values, list(reasons), axis=2) if reasons else self.values
        self.names = tuple(name for name in self.names if name not in dropped)
        return dropped


def check_features(names: Sequence[str], needed: Sequence[str]) -> None:
    """Refuse features that lack some of those of a model; they are named."""
    missing = [name for name in needed if name not in names]
    if missing:
        raise CohortError(
            f"The model needs {len(missing)} of its {len(needed)} features that are missing: {some(missing)}. Use "
            "features of the same kind as in training, or fit a model to these."
        )


def assemble(
    found: Gathered, source: Mapping[str, Any], unit: str, *, features: Sequence[str] | None = None,
    require_age: bool = True,
) -> Cohort:  # fmt: skip
    """Leave out what is incomplete, say why, and separate baseline and members.

    Observations are left out, in this order: those without an age; those that lack members which most others have (the
    most frequent set of members is what all must have, further members are not used); those with a missing value.
    Before the last, features that are missing in more than `MAX_MISSING` of the observations are dropped, since they
    would cost more observations than a feature is worth; after it, those that are the same for everybody. Values are
    never imputed: an imputed one would have no numerical variability.

    `found` is consumed. To `source` are added "baseline" (the member, or "mean of the members"), "members" (perturbed),
    "unused_members" and "dropped_features" (reasons by name). `features` are those to take, constant or not (of a
    fitted model); default: all. With `require_age`, observations without age are left out. A CohortError says that one
    of `features` is missing, or that no observation or no feature is left.
    """
    if features is not None:
        check_features(found.names, features)
        found.values = found.values[:, :, [found.names.index(name) for name in features]]
        found.names = tuple(features)
    if require_age:
        ageless = found.people["age"].isna().to_numpy()
        who = found.people["observation"][ageless]
        found.leave_out(ageless, [found.age_reasons.get(name, "no age") for name in who])
    unused = _keep_common_members(found) if len(found.values) else []
    dropped: dict[str, str] = {}
    gaps = ~np.isfinite(found.values).all(axis=1)
    if features is None and len(gaps):
        counts = gaps.sum(axis=0)
        sparse = np.flatnonzero(counts > MAX_MISSING * len(gaps)).tolist()
        dropped = found.drop_features({f: f"missing in {counts[f]} of {len(gaps)} observations" for f in sparse})
        gaps = np.delete(gaps, sparse, axis=1)
    lacking = [some([found.names[f] for f in np.flatnonzero(row)]) for row in gaps[gaps.any(axis=1)]]
    found.leave_out(gaps.any(axis=1), [f"no value of {names}" for names in lacking])
    if not len(found.values):
        listed = some([f"{who}: {why}" for who, why in found.left_out.items()], "; ")
        raise CohortError(" ".join([f"nobody is left to analyse. Left out: {listed}.", *source.get("notes", ())]))
    if features is None and len(found.values) > 1:
        low, high = found.values.min(axis=(0, 1)), found.values.max(axis=(0, 1))
        dropped |= found.drop_features({f: f"always {low[f]:g}" for f in np.flatnonzero(low == high).tolist()})
    if not found.names:
        reasons = {**source.get("ignored_columns", {}), **dropped}
        listed = some([f"{name}: {why}." for name, why in reasons.items()], " ")
        raise CohortError(f"no feature is left: missing, the same for everybody, or not of the brain. {listed}".strip())
    perturbed = [m for m, name in enumerate(found.member_ids) if name != BASELINE]
    has_baseline = len(perturbed) < len(found.member_ids)
    baseline = found.values[:, found.member_ids.index(BASELINE)].copy() if has_baseline else found.values.mean(axis=1)
    ids = tuple(found.member_ids[m] for m in perturbed) if len(perturbed) > 1 else ()
    members = np.ascontiguousarray(found.values[:, perturbed]) if ids else None
    added = {
        "baseline": BASELINE if has_baseline else "mean of the members",
        "members": list(ids),
        "unused_members": unused,
        "dropped_features": dropped,
    }
    people = found.people[list(PEOPLE_COLUMNS)]
    return Cohort(people, found.names, baseline, members, ids, found.left_out, {**source, **added}, unit)


def _keep_common_members(found: Gathered) -> list[str]:
    """Keep the most frequent set of members, of equally frequent ones the largest; return the others' ids."""
    sets, first, counts = np.unique(found.present, axis=0, return_index=True, return_counts=True)
    common = sets[max(range(len(sets)), key=lambda i: (counts[i], sets[i].sum(), -first[i]))]
    ids = np.array(found.member_ids, dtype=object)
    lacking = np.asarray(~found.present[:, common].all(axis=1))
    lacks = [some(list(ids[common & ~row])) for row in found.present[lacking]]
    found.leave_out(lacking, [f"lacks members that most others have: {names}" for names in lacks])
    unused = list(ids[found.present.any(axis=0) & ~common])
    found.values, found.present = found.values[:, common], found.present[:, common]
    found.member_ids = tuple(ids[common])
    return unused
