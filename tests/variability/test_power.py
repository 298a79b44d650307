"""What numerical noise does to statistics: the formulas against simulated studies."""

import numpy as np
import pytest
from scipy import stats

from bids_varaug.cli.run import power_main as main
from bids_varaug.variability.power import flip_probability, noise_of_statistics, participants_needed, power_table

NPVR = 0.3


def runs_of(truth, n_runs, rng, npvr=NPVR):
    """Repeated runs of the same people: noise has `NPVR` of the spread without noise, which is 1."""
    return truth + npvr * rng.standard_normal((n_runs, *truth.shape))


@pytest.mark.parametrize("npvr", [NPVR, 2.0])
def test_noise_of_every_statistic_is_that_of_repeated_runs(npvr):
    rng, n, found = np.random.default_rng(0), 80, []
    for _ in range(60):
        truth = rng.standard_normal(n) + 0.5 * (np.arange(n) < n // 2) * np.sqrt(1 + npvr**2)
        runs = runs_of(truth, 200, rng, npvr)
        t, p = stats.ttest_ind(runs[:, : n // 2], runs[:, n // 2 :], axis=1)
        y = truth + 2 * rng.standard_normal(n)
        r = [np.corrcoef(run, y)[0, 1] for run in runs]
        table = noise_of_statistics(npvr, n, float(np.median(p)))
        r_p = stats.pearsonr(runs[0], y).pvalue
        expected = [*table.loc[["d", "t", "F"], "sd"], noise_of_statistics(npvr, n, float(r_p)).loc["r", "sd"]]
        found.append(np.std([2 * t / np.sqrt(n), t, t**2, r], axis=1, ddof=1) / expected)
    # t, d and F: the noise of the pooled SD, which the formulas leave out, adds 4 % at d = 0.5.
    np.testing.assert_allclose(np.mean(found, axis=0), 1, atol=0.07)


@pytest.mark.parametrize("p", [0.005, 0.02, 0.045, 0.06, 0.12])
def test_flips_are_as_frequent_as_among_simulated_studies(p):
    """Effects are uniform, so that a published p says nothing of which side the truth is on."""
    rng, n, n_studies = np.random.default_rng(1), 60, 60_000
    shift = rng.uniform(-1.5, 1.5, n_studies)[:, None] * (np.arange(n) < n // 2)
    truth = (rng.standard_normal((n_studies, n)) + shift).astype(np.float32)
    one, other = (
        stats.ttest_ind(run[:, : n // 2], run[:, n // 2 :], axis=1).pvalue
        for run in (runs_of(truth, 1, rng)[0].astype(np.float32) for _ in range(2))
    )
    near = np.abs(np.log(one / p)) < 0.1
    share = np.mean((other[near] < 0.05) != (p < 0.05))
    assert near.sum() > 500
    assert share == pytest.approx(float(flip_probability(NPVR, n, p)), abs=4 * 0.5 / np.sqrt(near.sum()))


def test_more_noise_flips_more_and_none_never():
    flips = flip_probability([0, 0.1, 0.5, np.nan], 100, 0.03)
    assert flips[0] == 0 and flips[1] < flips[2] < 0.5 and np.isnan(flips[3])
    assert flip_probability(0.2, 100, 0.03, rerun=False) < flip_probability(0.2, 100, 0.03)


def test_safe_p_is_what_5_percent_of_reruns_flip():
    row = power_table(["x"], [0.2], 50).iloc[0]
    assert flip_probability(0.2, 50, row["p_safe"]) == pytest.approx(0.05, abs=1e-3)
    assert row["flips_0.01"] < 0.05 < row["flips_0.04"]


@pytest.mark.parametrize(("npvr", "n", "p"), [(-1, 50, 0.01), (0.1, 2, 0.01), (0.1, 50, 0), (0.1, 50, 1.5)])
def test_impossible_studies_are_refused(npvr, n, p):
    with pytest.raises(ValueError, match="must be"):
        noise_of_statistics(npvr, n, p)


def test_command_prints_the_table_and_refuses_what_is_no_number(capsys):
    assert main(["--npvr", "0.2", "--n", "100", "--p", "0.03"]) == 0
    told = capsys.readouterr().out
    assert "d  0.440                  0.039" in told and "other side of 0.05: 21.6%" in told
    assert main(["--npvr", "x", "--n", "100", "--p", "0.03"]) == 64
    assert "invalid float value: 'x'" in capsys.readouterr().err
    assert main(["--npvr", "0.2", "--n", "100", "--p", "2"]) == 64


def test_participants_needed_keep_what_they_promise():
    """Cohen's d of one cohort under 4,000 draws of numerical noise."""
    ratio, tolerance = 0.3, 0.15
    n = int(participants_needed(ratio, tolerance))
    rng = np.random.default_rng(0)

    def errors(n):
        half = n // 2
        truth = rng.standard_normal((2, half))
        truth = (truth - truth.mean(axis=1, keepdims=True)) / truth.std(axis=1, ddof=1)[:, None]
        x = truth + ratio * rng.standard_normal((4000, 2, half))
        pooled = np.sqrt(x.var(axis=2, ddof=1).mean(axis=1))
        d = (x[:, 1].mean(axis=1) - x[:, 0].mean(axis=1)) / pooled
        return np.abs(d)

    assert np.mean(errors(n) < tolerance) == pytest.approx(0.95, abs=0.015)
    assert np.mean(errors(n // 2 // 2 * 2) < tolerance) < 0.88


def test_participants_needed_agree_with_the_paper():
    # Chatelain et al.: one standard deviation below 0.01 at their ratio of 0.183 (theirs is npv).
    ratio = 0.183 / np.sqrt(1 - 0.183**2)
    one_sd = 0.6826894921370859
    assert participants_needed(ratio, 0.01, confidence=one_sd) == pytest.approx(1340, abs=2)


def test_participants_needed_refuse_nonsense():
    assert np.isnan(participants_needed(np.nan))
    with pytest.raises(ValueError, match="out of range"):
        participants_needed(0.1, 0.0)
