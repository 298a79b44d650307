"""Ageing goes the way it is known to go."""

import numpy as np
import pytest

from simulation.charts import CHARTS, expected_ratio

CHART = {chart.ids[0]: chart for chart in CHARTS}


@pytest.mark.parametrize(("structure", "sign"), [(4, 1), (14, 1), (3, -1), (12, -1)])
def test_volumes_change_one_way_over_adult_life(structure, sign):
    ages = np.arange(20, 91, 5)
    ratios = [expected_ratio(CHART[structure], age, 25.0) for age in ages]
    assert (sign * np.diff(ratios) > 0).all()


def test_hippocampus_is_stable_before_fifty_and_lost_later():
    early = expected_ratio(CHART[17], 45.0, 25.0)
    late = expected_ratio(CHART[17], 80.0, 60.0)
    assert early == pytest.approx(1.0, abs=0.03)
    assert late < 0.87


def test_ratio_is_the_integral_of_the_rate():
    # 20 to 40 years, rates 0.8 and 1.3: mean 1.05 % per year.
    assert expected_ratio(CHART[4], 40.0, 20.0) == pytest.approx(np.exp(20 * 0.0105))


def test_there_and_back_is_one():
    for chart in CHARTS:
        product = expected_ratio(chart, 70.0, 30.0) * expected_ratio(chart, 30.0, 70.0)
        assert product == pytest.approx(1.0)


def test_every_structure_of_the_ensemble_has_a_chart():
    from bids_varaug.training.labels import load_scheme

    ids = [i for chart in CHARTS for i in chart.ids]
    assert sorted(ids) == list(load_scheme().target_ids[1:])
