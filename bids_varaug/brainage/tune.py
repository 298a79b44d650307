"""What is decided inside the training fold: model, scale of age, hyperparameters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from sklearn.svm import SVR

from bids_varaug.brainage.estimators import (
    KERNEL_MODELS,
    LINEAR_MODELS,
    MODELS,
    Choice,
    from_scale,
    to_scale,
)
from bids_varaug.brainage.moments import evidence_penalty, gather_moments, linear_problem
from bids_varaug.errors import UserError

ALPHAS = np.logspace(-1, 6, 22)
SVR_C = (1.0, 4.0)
EPSILON = 0.1
# Inverse squared widths of kernels, in units of 1 / F: features are standardised, so that the
# squared distance of two people is about 2 F.
WIDTHS = (0.1, 0.3, 0.6)
PROCESS_WIDTHS = (0.1, 0.3)
LINEAR_PARTS = (0.0, 0.3)
NOISES = np.logspace(-3, 1, 17)
MAX_KERNEL_ROWS = 5000
SCALES = (False, True)
LINEAR = "linear"
ROBUST_AVERAGE = ("bayesian_ridge", "svr", "gpr")
AVERAGES = (ROBUST_AVERAGE, ("svr", "gpr"))


def tune(
    model: str,
    x: np.ndarray,
    age: np.ndarray,
    weights: np.ndarray,
    folds: np.ndarray,
    scatter: np.ndarray | None = None,
    sites: np.ndarray | None = None,
) -> Choice:
    """Choose model, scale of age and hyperparameters by the error in held-out folds.

    ``ridge``: penalty by the folds. ``bayesian_ridge``: none to choose, the evidence sets the
    penalty. ``svr``: C and kernel width by the folds. ``gpr``: kernel and noise by marginal
    likelihood. ``auto``: the best of these and of the averages, with equal weights, of svr and gpr
    and of bayesian_ridge, svr and gpr. Age or log age for each, by the folds. The error is the
    mean absolute error in years.

    Where whole sites are held out, ``auto`` takes the average of the three unless something
    else beats it by more than the standard error of their difference over sites. Few sites
    cannot tell such candidates apart, and kernel models, which fall back to the mean where
    there were no training people, and linear ones, which extrapolate, fail in different places.

    Parameters
    ----------
    model : one of `MODELS`, or ``linear``: the better of ridge and bayesian_ridge
    x : (R, F) float64
    age : (R,) years
    weights : (R,), see `folds.participant_weights`
    folds : (R,) held-out fold of each row, see `folds.choosing_folds`
    scatter : (K, F, F), per fold the weighted sum of the covariances of its rows' noisy copies;
        only linear models can take it into account, so with it ``auto`` chooses among these
    sites : (R,) site of each row if the folds hold out sites

    Raises
    ------
    UserError
        If a kernel model is asked for with more than 5,000 rows.
    ValueError
        If the model is unknown, or a kernel model is asked for with a scatter.
    """
    names = _candidates(model, len(x), scatter is not None)
    options = []
    if any(name in LINEAR_MODELS for name in names):
        options += _linear_options(names, x, age, weights, folds, scatter)
    if any(name in KERNEL_MODELS for name in names):
        options += _kernel_options(names, x, age, weights, folds)
    scored = [
        (_score(choice, held_out, age, weights), choice, held_out) for choice, held_out in options
    ]
    if "average" in names:
        scored += _averages(scored, age, weights)
    scored = [entry for entry in scored if entry[1].model in names]
    best = min(scored, key=lambda entry: entry[0])
    if "average" in names and sites is not None:
        best = _robust_if_as_good(best, scored, age, weights, sites)
    return replace(best[1], inner_mae=float(best[0]))


def closed_form_model(model: str) -> str:
    """Return the model that ``analytic`` fits where this one is asked for.

    Examples
    --------
    >>> [closed_form_model(model) for model in ("ridge", "svr", "auto")]
    ['ridge', 'bayesian_ridge', 'linear']
    """
    if model == "auto":
        return LINEAR
    return "bayesian_ridge" if model in KERNEL_MODELS else model


def _candidates(model: str, n_rows: int, scatter: bool) -> list[str]:
    if model == LINEAR:
        return list(LINEAR_MODELS)
    if model not in MODELS:
        raise ValueError(f"no such model: {model}; there are {', '.join(MODELS)}")
    if model in KERNEL_MODELS:
        if scatter:
            raise ValueError(f"{model} has no closed form of augmentation")
        if n_rows > MAX_KERNEL_ROWS:
            raise UserError(
                f"{model} with {n_rows} observations: its cost grows with their square, and more "
                f"than {MAX_KERNEL_ROWS} are refused. Use --brainage-model ridge, bayesian_ridge "
                "or auto."
            )
    if model != "auto":
        return [model]
    if scatter or n_rows > MAX_KERNEL_ROWS:
        return list(LINEAR_MODELS)
    return [*LINEAR_MODELS, *KERNEL_MODELS, "average"]


def _score(choice: Choice, held_out: np.ndarray, age: np.ndarray, weights: np.ndarray) -> float:
    error = np.abs(from_scale(held_out, choice.log_age) - age)
    return float(np.average(error, weights=weights))


def _averages(scored: list, age: np.ndarray, weights: np.ndarray) -> Iterator[tuple]:
    """Score the means of the best of each model, on either scale."""
    for log_age in SCALES:
        best = {}
        for entry in sorted(scored, key=lambda entry: -entry[0]):
            if entry[1].log_age == log_age:
                best[entry[1].model] = entry
        for names in AVERAGES:
            parts = {name: dict(best[name][1].hyperparameters) for name in names}
            held_out = np.mean([best[name][2] for name in names], axis=0)
            choice = Choice("average", log_age, parts)
            yield _score(choice, held_out, age, weights), choice, held_out


def _robust_if_as_good(best, scored, age, weights, sites) -> tuple:
    """Return the robust average unless `best` beats it by more than a standard error over sites."""
    robust = min(
        (entry for entry in scored if tuple(entry[1].hyperparameters) == ROBUST_AVERAGE),
        key=lambda entry: entry[0],
    )
    errors = [
        np.abs(from_scale(held_out, choice.log_age) - age) for _, choice, held_out in (robust, best)
    ]
    excess = weights * (errors[0] - errors[1] - (robust[0] - best[0]))
    by_site = np.bincount(np.unique(sites, return_inverse=True)[1], excess)
    standard_error = np.sqrt(np.square(by_site).sum()) / weights.sum()
    return robust if robust[0] - best[0] <= standard_error else best


def _linear_options(names, x, age, weights, folds, scatter) -> list[tuple[Choice, np.ndarray]]:
    """Held-out predictions of every linear candidate, on its own scale of age, (R,) each."""
    x = x - x.mean(axis=0)
    targets = np.stack([to_scale(age, log_age) for log_age in SCALES], axis=1)
    parts = [
        gather_moments(x[rows], targets[rows], weights[rows], None if scatter is None else extra)
        for rows, extra in (
            (folds == k, None if scatter is None else scatter[k]) for k in range(folds.max() + 1)
        )
    ]
    total = sum(parts[1:], parts[0])
    ridge = np.zeros((len(SCALES), len(ALPHAS), len(x)))
    evidence = np.zeros((len(SCALES), len(x)))
    for k, part in enumerate(parts):
        problem = linear_problem(total - part)
        rows = folds == k
        z = (x[rows] - problem.center) / problem.scale
        for t in range(len(SCALES)):
            ridge[t][:, rows] = (z @ problem.coefficients(ALPHAS, t) + problem.y_center[t]).T
            alpha = evidence_penalty(problem, t)
            evidence[t, rows] = z @ problem.coefficients([alpha], t)[:, 0] + problem.y_center[t]
    options = []
    for t, log_age in enumerate(SCALES):
        options.append((Choice("bayesian_ridge", log_age), evidence[t]))
        if "ridge" in names:
            options += [
                (Choice("ridge", log_age, {"alpha": float(alpha)}), held_out)
                for alpha, held_out in zip(ALPHAS, ridge[t], strict=True)
            ]
    return options


def _kernel_options(names, x, age, weights, folds) -> list[tuple[Choice, np.ndarray]]:
    """Held-out predictions of every kernel candidate, on its own scale of age, (R,) each."""
    with_svr = "svr" in names or "average" in names
    with_gpr = "gpr" in names or "average" in names
    svr = {}
    gpr = np.zeros((len(SCALES), len(x)))
    for k in range(folds.max() + 1):
        train, test = folds != k, folds == k
        kernels = _Kernels(x[train], x[test], weights[train])
        for t, log_age in enumerate(SCALES):
            target = to_scale(age[train], log_age)
            center, scale = target.mean(), target.std()
            z = (target - center) / (scale if scale > 0 else 1.0)
            if with_svr:
                for width, c, held_out in _svr_predictions(kernels, z, weights[train]):
                    row = svr.setdefault((log_age, width, c), np.zeros(len(x)))
                    row[test] = held_out * scale + center
            if with_gpr:
                gpr[t, test] = kernels.best_process(z)[1] * scale + center
    n_features = x.shape[1]
    options = [
        (
            Choice(
                "svr", log_age, {"C": c, "gamma": width / n_features, "epsilon": EPSILON}
            ),
            held_out,
        )
        for (log_age, width, c), held_out in svr.items()
    ]  # fmt: skip
    if with_gpr:
        everyone = _Kernels(x, x[:1], weights)
        for t, log_age in enumerate(SCALES):
            target = to_scale(age, log_age)
            z = (target - target.mean()) / (target.std() or 1.0)
            options.append((Choice("gpr", log_age, everyone.best_process(z)[0]), gpr[t]))
    return options


def _svr_predictions(kernels: _Kernels, z: np.ndarray, weights: np.ndarray) -> Iterator[tuple]:
    for width in WIDTHS:
        near, far = kernels.squared_exponential(width)
        for c in SVR_C:
            machine = SVR(kernel="precomputed", C=c, epsilon=EPSILON, cache_size=500)
            yield width, c, machine.fit(near, z, sample_weight=weights).predict(far)


class _Kernels:
    """Kernel matrices between training rows, and from test to training rows, made once."""

    def __init__(self, train: np.ndarray, test: np.ndarray, weights: np.ndarray):
        center = np.average(train, axis=0, weights=weights)
        scale = np.sqrt(np.average((train - center) ** 2, axis=0, weights=weights))
        scale[scale <= 1e-12 * np.maximum(np.abs(center), 1e-300)] = 1.0
        train, test = (train - center) / scale, (test - center) / scale
        self._n_features = train.shape[1]
        self._weights = weights
        self._near, self._far = train @ train.T, test @ train.T
        squares = np.diag(self._near)
        self._near_distance = np.clip(squares[:, None] + squares - 2 * self._near, 0, None)
        self._far_distance = np.clip(
            np.square(test).sum(axis=1)[:, None] + squares - 2 * self._far, 0, None
        )
        self._processes = None

    def squared_exponential(self, width: float) -> tuple[np.ndarray, np.ndarray]:
        gamma = width / self._n_features
        return np.exp(-gamma * self._near_distance), np.exp(-gamma * self._far_distance)

    def best_process(self, z: np.ndarray) -> tuple[dict[str, float], np.ndarray]:
        """Return hyperparameters of the most probable Gaussian process, and its predictions.

        Marginal likelihood (Rasmussen & Williams 2006, eq. 5.8) with the signal's variance at its
        maximum, over a grid of width, linear part and noise: one eigendecomposition serves all
        noises and both scales of age.
        """
        if self._processes is None:
            self._processes = [
                self._process(width, linear) for width in PROCESS_WIDTHS for linear in LINEAR_PARTS
            ]
        # Noise of variance noise / weight is unit noise after multiplication by sqrt(weight).
        root = np.sqrt(self._weights)
        best = None
        for width, linear, values, axes, far in self._processes:
            turned = axes.T @ (root * z)
            spread = values[:, None] + NOISES
            signal = np.mean(turned[:, None] ** 2 / spread, axis=0)
            likelihood = -0.5 * (len(z) * np.log(signal) + np.log(spread).sum(axis=0))
            n = int(np.argmax(likelihood))
            if best is None or likelihood[n] > best[0]:
                dual = root * (axes @ (turned / spread[:, n]))
                best = (likelihood[n], width, linear, signal[n], NOISES[n], far @ dual)
        _, width, linear, signal, noise, prediction = best
        hyperparameters = {
            "signal": float(signal),
            "linear": float(linear / self._n_features),
            "length_scale": float(np.sqrt(self._n_features / (2 * width))),
            "noise": float(signal * noise),
        }
        return hyperparameters, prediction

    def _process(self, width: float, linear: float) -> tuple:
        near, far = self.squared_exponential(width)
        near = near + linear / self._n_features * self._near
        far = far + linear / self._n_features * self._far
        root = np.sqrt(self._weights)
        values, axes = np.linalg.eigh(near * root[:, None] * root)
        return width, linear, np.clip(values, 0, None), axes, far
