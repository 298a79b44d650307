"""Sums that linear regression needs of a sample, so that no row is copied or read twice.

Least squares sees its rows only through their count, means and second moments. These add over
participants and subtract over folds, and rows that are noisy copies of a participant enter as
that participant's mean and the covariance of the copies [1]_.

References
----------
.. [1] Bishop (1995), Training with noise is equivalent to Tikhonov regularization, Neural
   Computation 7(1), 108-116.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Moments:
    """Weighted sums over rows x (F features) with targets y (T of them, for instance two scales).

    Attributes
    ----------
    weight : sum of the weights
    x, y : (F,), (T,) weighted sums
    xx, xy : (F, F), (F, T) weighted sums of products
    yy : (T,) weighted sums of squares
    """

    weight: float
    x: np.ndarray
    y: np.ndarray
    xx: np.ndarray
    xy: np.ndarray
    yy: np.ndarray

    def __add__(self, other: Moments) -> Moments:
        return Moments(*(a + b for a, b in zip(self._sums(), other._sums(), strict=True)))

    def __sub__(self, other: Moments) -> Moments:
        return Moments(*(a - b for a, b in zip(self._sums(), other._sums(), strict=True)))

    def _sums(self) -> tuple:
        return self.weight, self.x, self.y, self.xx, self.xy, self.yy


def gather_moments(
    x: np.ndarray,
    y: np.ndarray,
    weights: np.ndarray | None = None,
    scatter: np.ndarray | None = None,
) -> Moments:
    """Sum up rows, and the scatter of their noisy copies.

    Parameters
    ----------
    x : (R, F) float64
    y : (R,) or (R, T) float64
    weights : (R,), 1 each if not given
    scatter : (F, F), weighted sum over the rows of the covariance (1 / M) of each row's M copies
        around it; nothing if not given

    Returns
    -------
    Moments
        Those of the R x M copies, each with a weight of ``weights / M``, if `x` holds the mean of
        each row's copies.

    Examples
    --------
    >>> gather_moments(np.array([[1.0], [3.0]]), np.array([2.0, 4.0])).xy.tolist()
    [[14.0]]
    """
    y = y[:, None] if y.ndim == 1 else y
    weights = np.ones(len(x)) if weights is None else weights
    weighted = x * weights[:, None]
    xx = weighted.T @ x
    return Moments(
        weight=float(weights.sum()),
        x=weighted.sum(axis=0),
        y=weights @ y,
        xx=xx if scatter is None else xx + scatter,
        xy=weighted.T @ y,
        yy=weights @ np.square(y),
    )


@dataclass(frozen=True, eq=False)
class LinearProblem:
    """Least squares of standardised features, turned to the axes of their correlation matrix.

    Attributes
    ----------
    weight : sum of the weights, n
    center, scale : (F,) mean and standard deviation (1 / n) of the features; the scale of a
        constant feature is 1
    y_center, y_variance : (T,) of the targets (1 / n)
    axes : (F, F), eigenvectors in columns
    eigenvalues : (F,) of the sum of squares of standardised features (n x correlation matrix)
    projected : (F, T), sums of products of axes and centred targets
    """

    weight: float
    center: np.ndarray
    scale: np.ndarray
    y_center: np.ndarray
    y_variance: np.ndarray
    axes: np.ndarray
    eigenvalues: np.ndarray
    projected: np.ndarray

    def coefficients(self, alphas: np.ndarray, target: int = 0) -> np.ndarray:
        """Ridge coefficients of standardised features for each penalty.

        ``b = (X'WX + alpha I)^-1 X'Wy``, W the weights, as scikit-learn's Ridge defines alpha.

        Parameters
        ----------
        alphas : (A,) > 0

        Returns
        -------
        (F, A) float64
        """
        alphas = np.asarray(alphas, np.float64)
        return self.axes @ (
            self.projected[:, target, None] / (self.eigenvalues[:, None] + alphas[None, :])
        )


def linear_problem(moments: Moments) -> LinearProblem:
    """Standardise and diagonalise: every ridge penalty is then a division.

    Parameters
    ----------
    moments : of the training rows
    """
    n = moments.weight
    center = moments.x / n
    variance = np.clip(np.diag(moments.xx) / n - center**2, 0, None)
    # What rounding leaves of a constant column is not a standard deviation.
    constant = variance <= 1e-12 * np.maximum(center**2, np.finfo(float).tiny)
    scale = np.where(constant, 1.0, np.sqrt(np.where(constant, 1.0, variance)))
    y_center = moments.y / n
    gram = (moments.xx - n * np.outer(center, center)) / np.outer(scale, scale)
    gram[constant] = 0
    gram[:, constant] = 0
    cross = (moments.xy - n * np.outer(center, y_center)) / scale[:, None]
    cross[constant] = 0
    eigenvalues, axes = np.linalg.eigh((gram + gram.T) / 2)
    return LinearProblem(
        weight=n,
        center=center,
        scale=scale,
        y_center=y_center,
        y_variance=np.clip(moments.yy / n - y_center**2, 0, None),
        axes=axes,
        eigenvalues=np.clip(eigenvalues, 0, None),
        projected=axes.T @ cross,
    )


def evidence_penalty(
    problem: LinearProblem, target: int = 0, *, tolerance: float = 1e-6, iterations: int = 1000
) -> float:
    """Ridge penalty that makes the data most probable, without cross-validation.

    Iterates MacKay's updates of the precision of noise and coefficients [1]_ under the same flat
    gamma priors (1e-6) and the same stopping rule as scikit-learn's BayesianRidge on standardised
    features and targets, with n the sum of weights, so that M copies with weights of 1 / M count
    once.

    Parameters
    ----------
    target : which of the problem's targets
    tolerance : stop when the coefficients' absolute change sums to less than this
    iterations : stop after so many

    Returns
    -------
    float
        Precision of coefficients / precision of noise.

    References
    ----------
    .. [1] MacKay (1992), Bayesian interpolation, Neural Computation 4(3), 415-447; Tipping (2001),
       Sparse Bayesian learning and the relevance vector machine, JMLR 1, 211-244, appendix A.
    """
    prior = 1e-6
    n, values = problem.weight, problem.eigenvalues
    variance = problem.y_variance[target]
    if not variance > 0:
        return 1.0
    projected = problem.projected[:, target] / np.sqrt(variance)
    noise, coefficient = 1 / (1 + np.finfo(float).eps), 1.0
    previous = None
    for _ in range(iterations):
        turned = projected / (values + coefficient / noise)
        current = problem.axes @ turned
        residual = max(n - 2 * turned @ projected + turned @ (values * turned), 0.0)
        gamma = np.sum(noise * values / (coefficient + noise * values))
        coefficient = (gamma + 2 * prior) / (turned @ turned + 2 * prior)
        noise = (n - gamma + 2 * prior) / (residual + 2 * prior)
        if previous is not None and np.abs(current - previous).sum() < tolerance:
            break
        previous = current
    return float(coefficient / noise)
