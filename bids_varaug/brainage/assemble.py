"""From values with gaps to a cohort: who and what is complete enough, and a reason for the rest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from bids_varaug.brainage.cohort import Cohort
from bids_varaug.errors import UserError
from bids_varaug.inputs.tables import some

BASELINE = "ieee"
MAX_MISSING = 0.1  # share of observations
PEOPLE_COLUMNS = ("participant_id", "session_id", "observation", "age", "sex", "site")


class CohortError(UserError):
    """What was gathered makes no cohort."""


@dataclass
class Gathered:
    """What was found, before anything that is incomplete is left out.

    Parameters
    ----------
    people : one row per observation, the columns of `Cohort.people`
    values : (R, M, F) float64, NaN where missing
    present : (R, M) bool, whether there is that member of the observation
    member_ids : of the M members; one, the baseline, for tables of one value
    names : of the F features
    left_out : reasons so far
    age_reasons : why an age is missing, by observation, where more is known than that
    """

    people: pd.DataFrame
    values: np.ndarray
    present: np.ndarray
    member_ids: tuple[str, ...]
    names: tuple[str, ...]
    left_out: dict[str, str]
    age_reasons: Mapping[str, str] = field(default_factory=dict)

    def take(self, rows: np.ndarray) -> None:
        """Keep the observations where a mask is true."""
        if rows.all():
            return
        self.people = self.people.loc[rows].reset_index(drop=True)
        self.values, self.present = self.values[rows], self.present[rows]

    def leave_out(self, rows: np.ndarray, reasons: Sequence[str]) -> None:
        """Drop the observations where a mask is true, for these reasons."""
        names = self.people["observation"][rows]
        self.left_out.update(zip(names, reasons, strict=True))
        self.take(~rows)

    def keep_features(self, kept: np.ndarray) -> None:
        """Keep the features where a mask is true."""
        if not kept.all():
            self.names = tuple(name for name, keep in zip(self.names, kept, strict=True) if keep)
            self.values = self.values[:, :, kept]


def nobody_left(left_out: Mapping[str, str], notes: Iterable[str]) -> CohortError:
    """Error that says why each was left out, and what was noted before."""
    reasons = [f"{who}: {why}" for who, why in left_out.items()]
    return CohortError(
        " ".join([f"nobody is left to study. Left out: {some(reasons, '; ')}.", *notes])
    )


def assemble(
    found: Gathered,
    source: Mapping[str, object],
    unit: str,
    *,
    features: Sequence[str] | None = None,
    require_age: bool = True,
) -> Cohort:
    """Leave out what is incomplete, say why, and split baseline and members.

    Of the observations, in this order: those without an age; those that lack members which most
    others have (the most frequent set of members is what all must have, further members are not
    used); those with a missing value. Before the last, features that are missing in more than
    `MAX_MISSING` of the observations are dropped, since they would cost more observations than a
    feature is worth; after it, those that are the same for everybody. Values are never imputed: an
    imputed one would have no numerical variability.

    Parameters
    ----------
    found : consumed
    source, unit : of the cohort; to `source` are added "baseline" (the member, or "mean of the
        members"), "members" (perturbed), "unused_members" and "dropped_features" (reasons by name)
    features : names of the features to take, constant or not (those of a fitted model); all others
        are ignored. Default: all
    require_age : whether observations without age are left out

    Raises
    ------
    CohortError
        If one of `features` is missing; if no observation or no feature is left.
    """
    if features is not None:
        _choose(found, features)
    if require_age:
        _leave_out_ageless(found)
    unused = _common_members(found)
    dropped = {} if features is not None else _drop_sparse(found)
    _leave_out_missing(found)
    if not len(found.values):
        raise nobody_left(found.left_out, source.get("notes", ()))
    if features is None and len(found.values) > 1 and found.names:
        dropped |= _drop_constant(found)
    if not found.names:
        reasons = {**source.get("ignored_columns", {}), **dropped}
        raise CohortError(
            "no feature is left: all are missing, the same for everybody, or no measures of the "
            f"brain ({some([f'{name}: {why}' for name, why in reasons.items()], '; ')})."
        )
    baseline, members, ids = _split(found)
    added = {
        "baseline": BASELINE if BASELINE in found.member_ids else "mean of the members",
        "members": list(ids),
        "unused_members": unused,
        "dropped_features": dropped,
    }
    return Cohort(
        found.people[list(PEOPLE_COLUMNS)], found.names, baseline, members, ids, found.left_out,
        {**source, **added}, unit,
    )  # fmt: skip


def common_members(present: np.ndarray) -> np.ndarray:
    """Most frequent set of members; of equally frequent ones the largest, then the first.

    Parameters
    ----------
    present : (R, M) bool

    Returns
    -------
    (M,) bool

    Examples
    --------
    >>> common_members(np.array([[1, 1, 0], [1, 0, 0], [1, 1, 0]], bool)).tolist()
    [True, True, False]
    """
    sets, first, counts = np.unique(present, axis=0, return_index=True, return_counts=True)
    best = max(range(len(sets)), key=lambda i: (counts[i], sets[i].sum(), -first[i]))
    return sets[best]


def _choose(found: Gathered, features: Sequence[str]) -> None:
    at = {name: index for index, name in enumerate(found.names)}
    missing = [name for name in features if name not in at]
    if missing:
        raise CohortError(
            f"{len(missing)} of the {len(features)} features that the model needs are missing: "
            f"{', '.join(missing)}. Give a table, or derivatives, that have them."
        )
    found.values = found.values[:, :, [at[name] for name in features]]
    found.names = tuple(features)


def _leave_out_ageless(found: Gathered) -> None:
    ageless = found.people["age"].isna().to_numpy()
    names = found.people["observation"][ageless]
    found.leave_out(ageless, [found.age_reasons.get(name, "no age") for name in names])


def _common_members(found: Gathered) -> list[str]:
    """Keep the members of the most frequent set; return those that only some have."""
    if not len(found.values):
        return []
    common = common_members(found.present)
    lacking = ~found.present[:, common].all(axis=1)
    ids = np.array(found.member_ids, dtype=object)
    reasons = [
        f"lacks members that most others have: {some(list(ids[common & ~row]))}"
        for row in found.present[lacking]
    ]
    found.leave_out(lacking, reasons)
    unused = found.present.any(axis=0) & ~common
    if not common.all():
        found.values, found.present = found.values[:, common], found.present[:, common]
        found.member_ids = tuple(ids[common])
    return list(ids[unused])


def _drop_sparse(found: Gathered) -> dict[str, str]:
    if not len(found.values):
        return {}
    gaps = np.stack([~np.isfinite(part).all(axis=0) for part in found.values])
    counts = gaps.sum(axis=0)
    sparse = counts > MAX_MISSING * len(gaps)
    dropped = {
        found.names[f]: f"missing in {counts[f]} of {len(gaps)} observations"
        for f in np.flatnonzero(sparse)
    }
    found.keep_features(~sparse)
    return dropped


def _leave_out_missing(found: Gathered) -> None:
    rows = np.array([not np.isfinite(part).all() for part in found.values], dtype=bool)
    reasons = []
    for part in found.values[rows]:
        columns = np.flatnonzero(~np.isfinite(part).all(axis=0))
        reasons.append(f"no value of {some([found.names[f] for f in columns])}")
    found.leave_out(rows, reasons)


def _drop_constant(found: Gathered) -> dict[str, str]:
    flat = found.values.reshape(-1, found.values.shape[2])
    low = flat.min(axis=0)
    constant = low == flat.max(axis=0)
    dropped = {found.names[f]: f"always {low[f]:g}" for f in np.flatnonzero(constant)}
    found.keep_features(~constant)
    return dropped


def _split(found: Gathered) -> tuple[np.ndarray, np.ndarray | None, tuple[str, ...]]:
    """Baseline (R, F), perturbed members (R, M, F) or None if fewer than two, and their ids."""
    ids = found.member_ids
    perturbed = [m for m, name in enumerate(ids) if name != BASELINE]
    baseline = found.values[:, ids.index(BASELINE)].copy() if BASELINE in ids else None
    if baseline is None:
        baseline = found.values.mean(axis=1)
    if len(perturbed) < 2:
        return baseline, None, ()
    members = found.values if len(perturbed) == len(ids) else found.values[:, perturbed]
    return baseline, np.ascontiguousarray(members), tuple(ids[m] for m in perturbed)
