"""What the group level works on: people, their ages, and features with every member's version."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pandas as pd


@dataclass(frozen=True, eq=False)
class Cohort:
    """Observations (one T1w image, or one row of a table) of people with features.

    Parameters
    ----------
    people : one row per observation, R in all: `participant_id` (``sub-01``); `session_id`
        (``ses-1`` or None); `observation`, the image's entities (``sub-01_ses-1_run-2``), unique;
        `age` in years, float, NaN where unknown; `sex` ("F", "M", "O" or None); `site` (str or
        None). Index 0 ... R - 1
    names : of the F features
    baseline : (R, F) float64, of the unperturbed member (`ieee`); where there is none, the mean of
        the members
    members : (R, M, F) float64, of each perturbed member, M >= 2; or None for tables of one value
    member_ids : of the M members ("mca01", ...), empty without members
    left_out : why somebody is not among the observations, by participant or observation
    source : what the features are, for reports and models: the ensemble's name, versions and
        checkpoints' digests, or the table's name
    unit : of the features ("mm3"), or ""
    """

    people: pd.DataFrame
    names: tuple[str, ...]
    baseline: np.ndarray
    members: np.ndarray | None = None
    member_ids: tuple[str, ...] = ()
    left_out: dict[str, str] = field(default_factory=dict)
    source: dict[str, object] = field(default_factory=dict)
    unit: str = ""

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

    def take(self, rows: np.ndarray) -> Cohort:
        """Return the observations at these indices (or where a mask is true)."""
        people = self.people.loc[rows].reset_index(drop=True)
        members = None if self.members is None else self.members[rows]
        return Cohort(
            people, self.names, self.baseline[rows], members, self.member_ids, self.left_out,
            self.source, self.unit,
        )  # fmt: skip
