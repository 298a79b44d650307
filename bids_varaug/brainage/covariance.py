"""How the members' errors of two structures go together: their covariance, by family."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from bids_varaug.brainage.augment import summed_covariances
from bids_varaug.brainage.cohort import Cohort

COVARIANCE_TABLE = "models/brainage_covariance.tsv"
ALL = "all"


def numerical_covariance(cohort: Cohort) -> pd.DataFrame:
    """Covariance of the features over members, pooled over observations, for each family.

    With x the value of member m (of M of a family) in observation i (of R), and y that of another
    feature::

        covariance          = 1/R sum_i sum_m (x_im - x_i)(y_im - y_i) / (M - 1)
        relative_covariance = the same of x_im / x_i and y_im / y_i

    The square root of a feature's covariance with itself is the ``sd_num`` of
    `population.numerical_variability`, for the members of all families together.

    Parameters
    ----------
    cohort : with members, none missing
        Families are those of ``source["families"]`` with two members or more.

    Returns
    -------
    one row per family and pair of features, each pair once, a feature with itself among them
        family ("all", then "mca", ...), name, other, covariance (square of the feature's unit, or
        product of both units), relative_covariance (1; NaN where one is absent in somebody),
        correlation (of the covariance; NaN where one does not vary), n_members, n_observations

    Raises
    ------
    ValueError
        If the cohort has no members.
    """
    if cohort.members is None:
        raise ValueError("numerical covariance needs members; this cohort has one value per row")
    families = {ALL: list(cohort.member_ids)} | dict(cohort.source.get("families", {}))
    tables = [_table(cohort, name, ids) for name, ids in families.items() if len(ids) > 1]
    return pd.concat(tables, ignore_index=True)


def _table(cohort: Cohort, family: str, ids: list[str]) -> pd.DataFrame:
    members = cohort.members[:, [cohort.member_ids.index(member) for member in ids]]
    mean = members.mean(axis=1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        relative = _pooled(members / mean)
        covariance = _pooled(members)
        sd = np.sqrt(np.diag(covariance))
        correlation = covariance / np.outer(sd, sd)
    first, second = np.triu_indices(len(cohort.names))
    names = np.array(cohort.names, dtype=object)
    return pd.DataFrame(
        {
            "family": family,
            "name": names[first],
            "other": names[second],
            "covariance": covariance[first, second],
            "relative_covariance": relative[first, second],
            "correlation": correlation[first, second],
            "n_members": len(ids),
            "n_observations": len(members),
        }
    )


def _pooled(members: np.ndarray) -> np.ndarray:
    n, m = members.shape[:2]
    return summed_covariances(members, np.full(n, m / (m - 1) / n))


def covariance_sidecar(cohort: Cohort) -> dict[str, Any]:
    """Describe the columns of `numerical_covariance`."""
    covariance = {
        "Description": "Covariance over the members of the family, within an image (N - 1), mean "
        "over images"
    }
    if cohort.unit == "mm3":
        covariance["Units"] = "mm^6"
    else:
        covariance["Description"] += ", in the product of the units of both features"
    return {
        "family": {
            "Description": "Members over which it is taken: all perturbed ones, or one family, "
            "see descriptions.tsv"
        },
        "name": {"Description": "Feature, not divided by brain or head"},
        "other": {"Description": "Feature it goes together with; the same one: its variance"},
        "covariance": covariance,
        "relative_covariance": {
            "Description": "As covariance, each value divided by its mean over the members of the "
            "family in that image",
            "Units": "1",
        },
        "correlation": {"Description": "covariance over both standard deviations", "Units": "1"},
        "n_members": {"Description": "Members of the family"},
        "n_observations": {"Description": "Images"},
    }
