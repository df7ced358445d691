"""Intervals of a fit's parameters by three methods, side by side.

profile is the default: the one whose coverage holds in simulation (calibrate.py). Profile and Hessian are those of the
law under the loss of robust.py, whatever narrow width the fit itself has; the bootstrap's are percentiles of refits
under the objective of the fit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llm_jax.settings import BadInput, did_you_mean
from scaling import uncertainty
from scaling.fit import Fit, prepare
from scaling.profile import profile_ends
from scaling.robust import Robust, correlations, covariance, robust, wald_ends
from scaling.tables import Table
from scaling.uncertainty import Bootstrap

METHODS = ("profile", "hessian", "bootstrap")
RESAMPLES = 1000


def parse_ci(text: str) -> tuple[tuple[str, ...], int]:
    """The methods of `--ci`, the one whose intervals are quoted first, and the resamples of the bootstrap.

    "all" names all METHODS, "none" none, "bootstrap:200" the bootstrap with 200 resamples. BadInput for others.
    """
    method, colon, size = text.partition(":")
    valid = ("all", "none", *METHODS)
    if method not in valid:
        raise BadInput(f'"{text}" names no way to intervals{did_you_mean(method, valid)}')
    if colon and not (method == "bootstrap" and size.isascii() and size.isdigit() and int(size) > 1):
        raise BadInput(
            f'"{text}" names no way to intervals; valid: {", ".join(valid)}, bootstrap:N with N of at least 2'
        )
    methods = {"all": METHODS, "none": ()}.get(method, (method,))
    return methods, int(size or RESAMPLES)


@dataclass(frozen=True)
class Intervals:
    """Intervals of the parameters of one fit: natural values, for the columns as they are."""

    method: str
    level: float
    intervals: dict[str, tuple[float, float]]
    """{parameter: (low, high)}; -inf or inf where the data gives no bound on that side. Held parameters are absent."""
    estimates: dict[str, float]
    """What the intervals are around: the law under `objective`, not under that of the fit."""
    objective: str
    """Such as huber:0.0111."""
    correlations_PxP: np.ndarray
    """Of theta, logs of scales and exponents as they are, in the order of law.parameters; nan for what does not move."""
    bootstrap: Bootstrap | None = None
    """The resamples, where they are the method."""

    @property
    def unbounded(self) -> dict[str, str]:
        """{parameter: "below", "above" or "both"}: sides on which the data gives no bound."""
        named = {(True, False): "below", (False, True): "above", (True, True): "both"}
        ends = {name: (bool(low == -np.inf), bool(high == np.inf)) for name, (low, high) in self.intervals.items()}
        return {name: named[end] for name, end in ends.items() if any(end)}


def intervals(
    result: Fit,
    table: Table,
    method: str = "profile",
    level: float = 0.95,
    cluster: str = "",
    samples: int = RESAMPLES,
    seed: int = 0,
) -> Intervals:
    """Intervals of a fit's free parameters by one of METHODS.

    `cluster` names a column, such as seed or trunk, whose equal values mark rows that share their noise. `samples` and
    `seed` are of the bootstrap. BadInput for an unknown method or column, a level outside of (0, 1), and clusters too few
    to say anything.
    """
    if method not in METHODS:
        raise BadInput(f'"{method}" names no way to intervals{did_you_mean(method, METHODS)}')
    if not 0 < level < 1:
        raise BadInput(f"level must lie in (0, 1), got {level}")
    cluster_R = _clusters(result, table, cluster) if cluster else None
    if method == "bootstrap":
        return _bootstrap(result, table, level, cluster_R, samples, seed)
    found = of_fit(result, table)
    low_P, high_P = np.full((2, len(found.free_P)), np.nan)
    if method == "profile":
        free = np.flatnonzero(found.free_P)
        low_P[free], high_P[free] = (ends[0] for ends in profile_ends(found, free.tolist(), level, cluster_R))
    else:
        low_P, high_P = (np.where(found.free_P, ends[0], np.nan) for ends in wald_ends(found, level, cluster_R))
    theta_P = result.law.shift(found.theta_TxP[0], -found.by_K)
    delta = found.delta_T[0]
    return Intervals(
        method=method,
        level=level,
        intervals=_natural(result, theta_P, low_P, high_P),
        estimates=dict(zip(result.law.parameters, result.law.natural(theta_P).tolist(), strict=True)),
        objective=f"huber:{delta:.3g}" if np.isfinite(delta) else "lsq",
        correlations_PxP=correlations(covariance(found, cluster_R)[0]),
    )


def of_fit(result: Fit, table: Table) -> Robust:
    """The table of a fit under the loss of robust.py, or under least squares if the fit is one; what it held is held."""
    table, log_KxR, target, _ = prepare(result.law, table)
    least = result.delta if np.isinf(result.delta) else 0.0
    return robust(result.law, log_KxR, target[None], result.theta[None], result.free, least)


def _clusters(result: Fit, table: Table, cluster: str) -> np.ndarray:
    cluster_R = prepare(result.law, table)[0].column(cluster)
    count, free = len(np.unique(cluster_R)), int(result.free.sum())
    if count <= free:
        raise BadInput(f'column "{cluster}" has {count} values; intervals by cluster need more than {free}')
    return cluster_R


def _natural(result: Fit, theta_P: np.ndarray, low_P: np.ndarray, high_P: np.ndarray) -> dict[str, tuple[float, float]]:
    """Ends of theta as natural values, which are functions of one theta each."""

    def ends(end_P: np.ndarray) -> list[float]:
        with np.errstate(over="ignore"):
            natural_P = result.law.natural(np.where(np.isfinite(end_P), end_P, theta_P))
        return np.where(np.isfinite(end_P), natural_P, end_P).tolist()

    pairs = zip(result.law.parameters, ends(low_P), ends(high_P), result.free, strict=True)
    return {name: (low, high) for name, low, high, free in pairs if free}


def _bootstrap(
    result: Fit, table: Table, level: float, cluster_R: np.ndarray | None, samples: int, seed: int
) -> Intervals:
    """Percentiles of refits under the fit's own objective; infinite where they lie at a bound of the search."""
    law = result.law
    table, log_KxR, target, _ = prepare(law, table)
    by_K = law.centre(log_KxR)
    x_KxR = log_KxR - by_K[:, None]
    lower, upper = law.bounds(x_KxR, target)
    resampled = uncertainty.bootstrap(result, table, samples, seed, cluster_R)
    theta_SxP = resampled.theta_SxP
    tails = [(1 - level) / 2, (1 + level) / 2]
    low_P, high_P = np.quantile(theta_SxP, tails, axis=0)
    # The bounds are of theta for centred columns.
    at_low_P, at_high_P = np.quantile(law.shift(theta_SxP, by_K), tails, axis=0)
    low_P = np.where(at_low_P <= lower + 1e-6, -np.inf, low_P)
    high_P = np.where(at_high_P >= upper - 1e-6, np.inf, high_P)
    return Intervals(
        method="bootstrap",
        level=level,
        intervals=_natural(result, result.theta, low_P, high_P),
        estimates=dict(result.parameters),
        objective=result.objective,
        correlations_PxP=correlations(np.cov(theta_SxP.T)),
        bootstrap=resampled,
    )
