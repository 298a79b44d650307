"""Changes between sessions: paired by member, against what chance can do."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from bids_varaug.variability.longitudinal import paired_changes, rescan_noise, summarise_changes


def images(*names):
    ids = [[name.split("_")[0], name.split("_")[1], name] for name in names]
    return pd.DataFrame(ids, columns=["participant_id", "session_id", "observation"])


def test_change_is_taken_within_each_member():
    people = images("sub-1_ses-a", "sub-1_ses-b")
    volumes = np.array([[[100.0], [110.0], [120.0]], [[90.0], [99.0], [109.2]]])  # -10, -10, -9 %
    row = paired_changes(people, ["x"], volumes, {"sub-1": ["ses-a", "ses-b"]}).iloc[0]
    assert row["change"] == pytest.approx(-29 / 3) and row["sd_num"] == pytest.approx(1 / 3**0.5)
    assert row["detectable_num"] == pytest.approx(stats.t.ppf(0.975, 2) / 3**0.5)
    assert np.isnan(row["detectable_rescan"]) and row["mark"] == "beyond"


def test_noise_of_a_scan_is_that_of_runs_alone():
    people = images("sub-1_ses-a_run-1", "sub-1_ses-a_run-2", "sub-2_ses-a_acq-x", "sub-2_ses-a_acq-y")
    sd, freedom = rescan_noise(people, np.array([[99.0, 0], [101.0, 0], [50.0, 1], [150.0, 1]]))
    assert freedom == 1 and sd.tolist() == pytest.approx([2**0.5, 0])


def test_unchanged_people_are_beyond_in_5_percent_and_a_loss_is_found():
    """False alarms of 1,200 changes: 5 % +- 2.5 (four standard errors)."""
    rng, n = np.random.default_rng(0), 300
    names = [f"sub-{p}_ses-{s}_run-{r}" for p in range(n) for s in "ab" for r in (1, 2)]
    scans = np.exp(rng.normal(0, 0.01, (len(names), 1, 4)) + rng.normal(0, 0.001, (len(names), 5, 4)))
    level = np.exp(rng.normal(0, 0.02, (1, 5, 4)))
    sessions = {f"sub-{p}": ["ses-a", "ses-b"] for p in range(n)}
    changes = paired_changes(images(*names), list("wxyz"), 1000 * level * scans, sessions)
    assert (changes["mark"] == "beyond").mean() == pytest.approx(0.05, abs=0.025)
    assert changes["detectable_rescan"].median() == pytest.approx(1.96, rel=0.1)  # 1 % scans, two in each session
    later = np.array([name.split("_")[1] == "ses-b" for name in names])
    lost = paired_changes(
        images(*names), list("wxyz"), 1000 * level * scans * (1 - 0.05 * later)[:, None, None], sessions
    )
    assert (lost["mark"] == "beyond").mean() > 0.98
    summary = summarise_changes(lost).set_index("name")
    assert list(summary.index) == list("wxyz") and summary.loc["w", "change"] == pytest.approx(-5, abs=0.2)


def test_absent_structures_and_single_networks_have_no_verdict():
    people = images("sub-1_ses-a", "sub-1_ses-b")
    volumes = np.array([[[0.0, 10.0]], [[5.0, 11.0]]])
    changes = paired_changes(people, ["x", "y"], volumes, {"sub-1": ["ses-a", "ses-b"]})
    assert changes["mark"].isna().all() and changes["change"].tolist()[1] == pytest.approx(10)
    assert np.isnan(changes["change"][0])
    assert paired_changes(people, ["x", "y"], volumes, {}).empty
