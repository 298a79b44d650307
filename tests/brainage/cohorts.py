"""Cohorts with a known truth, for the tests of models and scores."""

from __future__ import annotations

import numpy as np
import pandas as pd

from bids_varaug.brainage.cohort import Cohort


def simulated_cohort(
    n: int = 60,
    n_members: int = 5,
    n_features: int = 6,
    noise: float = 0.5,
    sessions: int = 1,
    n_sites: int = 0,
    seed: int = 0,
) -> Cohort:
    """Features that follow log age, with correlated numerical noise that differs by person."""
    rng = np.random.default_rng(seed)
    person = np.repeat(np.arange(n), sessions)
    age = rng.uniform(8, 85, n)[person]
    slopes = rng.normal(0, 1, n_features)
    truth = np.log(age)[:, None] * slopes + rng.normal(0, 0.4, (n, n_features))[person]
    mixing = rng.normal(0, 1, (n_features, n_features)) / np.sqrt(n_features)
    amount = noise * rng.uniform(0.3, 1.7, len(age))
    shape = (len(age), n_members + 1, n_features)
    versions = truth[:, None] + (rng.normal(0, 1, shape) @ mixing) * amount[:, None, None]
    versions = 1000 + 100 * versions
    site = [f"site{i}" for i in rng.integers(0, n_sites, n)[person]] if n_sites else None
    people = pd.DataFrame(
        {
            "participant_id": [f"sub-{i:03d}" for i in person],
            "session_id": [f"ses-{i % sessions}" if sessions > 1 else None
                           for i in range(len(person))],
            "observation": [f"sub-{p:03d}_ses-{i % sessions}" for i, p in enumerate(person)],
            "age": age,
            "sex": None,
            "site": site,
        }
    )  # fmt: skip
    return Cohort(
        people,
        tuple(f"structure{j}" for j in range(n_features)),
        versions[:, 0],
        versions[:, 1:] if n_members else None,
        tuple(f"mca{m + 1:02d}" for m in range(n_members)),
        source={"ensemble": "simulated"},
        unit="mm3",
    )
