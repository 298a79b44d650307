"""The members' covariance against numpy's, and against the spread that other tables give."""

from dataclasses import replace

import numpy as np
import pytest

from bids_varaug.brainage.outputs import covariance_sidecar
from bids_varaug.brainage.variability import numerical_covariance, numerical_variability
from tests.brainage.cohorts import simulated_cohort


@pytest.fixture(scope="module")
def cohort():
    made = simulated_cohort(n=12, n_members=5, n_features=3)
    ids = ("mca01", "mca02", "mca03", "seed01", "seed02")
    families = {"mca": list(ids[:3]), "seed": list(ids[3:])}
    return replace(made, member_ids=ids, source={"families": families})


@pytest.fixture(scope="module")
def table(cohort):
    return numerical_covariance(cohort).set_index(["family", "name", "other"])


def test_each_family_has_its_own_covariance(cohort, table):
    for family, members in (("all", slice(5)), ("mca", slice(3)), ("seed", slice(3, 5))):
        expected = np.mean([np.cov(one[members].T) for one in cohort.members], axis=0)
        got = table.loc[family]["covariance"]
        assert got["structure0", "structure2"] == pytest.approx(expected[0, 2])
        assert got["structure1", "structure1"] == pytest.approx(expected[1, 1])
    assert table["n_members"].groupby("family").first().to_dict() == {"all": 5, "mca": 3, "seed": 2}


def test_relative_covariance_and_correlation_have_no_unit(cohort, table):
    in_litres = replace(cohort, members=cohort.members * 1e-6)
    other = numerical_covariance(in_litres).set_index(["family", "name", "other"])
    for column in ("relative_covariance", "correlation"):
        np.testing.assert_allclose(other[column], table[column])
    np.testing.assert_allclose(other["covariance"], table["covariance"] * 1e-12)


def test_variance_is_that_of_the_table_of_numerics(cohort, table):
    sd_num = numerical_variability(cohort).set_index("name")["sd_num"]
    variance = table.loc["all"]["covariance"]["structure1", "structure1"]
    assert sd_num["structure1"] == pytest.approx(np.sqrt(variance))


def test_a_single_member_is_no_family(cohort):
    alone = replace(cohort, source={"families": {"mca": ["mca01"], "seed": ["seed01", "seed02"]}})
    assert set(numerical_covariance(alone)["family"]) == {"all", "seed"}


def test_every_column_is_described_and_volumes_have_a_unit(cohort, table):
    sidecar = covariance_sidecar(cohort)
    assert list(sidecar) == [*table.index.names, *table.columns]
    assert sidecar["covariance"]["Units"] == "mm^6"
    assert "Units" not in covariance_sidecar(replace(cohort, unit=""))["covariance"]
