"""Fits that intervals can be read off: a law under a Huber loss in proportion to the noise of the table.

A width far below the noise, such as 1e-3 against 1 %, is nearly least absolute errors: its curvature counts the few rows
that happen to lie within. Here the width is CUT times the noise that the table itself shows.

Letters of array names beside those of laws/law.py: T tables side by side at the same columns, each with its own noise.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from scaling.laws import Law
from scaling.solver import Problem, minimise

CUT = 2.0
"""Width of Huber's loss, in standard deviations of the noise. See calibrate.py for what was measured."""
GRAIN = 8.0  # widths are rounded to this many steps a factor of e, so that many tables are solved as one problem
FIRST = 4  # starts of a law that are followed: the best of all before any step
CHANCE = 1.0  # standard errors by which noise must look unequal before intervals widen for it
NO_NOISE = 1e-8  # least noise, in units of the target: data without any has intervals of no width


@dataclass(frozen=True)
class Robust:
    """A law fitted to T tables, each under a Huber loss CUT times as wide as its own noise; by `robust`."""

    law: Law
    x_KxR: np.ndarray
    """Less by_K."""
    by_K: np.ndarray
    target_TxR: np.ndarray
    bounds: tuple[np.ndarray, np.ndarray]
    free_P: np.ndarray
    theta_TxP: np.ndarray
    value_T: np.ndarray
    sigma_T: np.ndarray
    delta_T: np.ndarray

    @property
    def freedom(self) -> int:
        """Rows less free parameters."""
        return self.x_KxR.shape[1] - int(self.free_P.sum())

    def residual_TxR(self) -> np.ndarray:
        """Predicted less observed."""
        return self.law.evaluate(self.theta_TxP, self.x_KxR)[0] - self.target_TxR

    def information_T(self) -> np.ndarray:
        """2 information (V(theta_0) - V_min) has about an F distribution with 1 and `freedom` degrees of freedom.

        The robust test of Schrader and Hettmansperger 1980 (Biometrika 67:93) with the factor of Huber 1973 (Annals of
        Statistics 1:799) for few rows. Without rows beyond the width it is 1 / s^2, and the test the plain F test.
        """
        residual, delta = self.residual_TxR(), self.delta_T[:, None]
        rows = residual.shape[1]
        inside = np.maximum((np.abs(residual) <= delta).mean(1), 1 / rows)
        squares = (np.clip(residual, -delta, delta) ** 2).sum(1) / self.freedom
        few = 1 + (rows - self.freedom) / rows * (1 - inside) / inside
        return inside / np.maximum(squares, NO_NOISE**2) / few


def robust(
    law: Law,
    log_KxR: np.ndarray,
    target_TxR: np.ndarray,
    theta_TxP: np.ndarray | None = None,
    free_P: np.ndarray | None = None,
    least_delta: float = 0.0,
) -> Robust:
    """Fits T tables of the same log columns: law and noise in turns, until the width of the loss stays.

    The noise is Huber's Proposal 2 (1964, Annals of Mathematical Statistics 35:73) with n - p in place of n.
    `theta_TxP`, for the columns as they are, is one more start, and what the parameters outside of free_P are held at.
    """
    by_K = law.centre(log_KxR)
    x_KxR = log_KxR - by_K[:, None]
    typical_R = np.median(target_TxR, axis=0)
    bounds, starts_SxP = law.bounds(x_KxR, typical_R), law.starts(x_KxR, typical_R)
    tables, own_TxP = len(target_TxR), None if theta_TxP is None else law.shift(theta_TxP, by_K)
    free_P = np.ones(len(law.parameters), bool) if free_P is None else free_P
    predicted_SxR = law.evaluate(starts_SxP, x_KxR)[0]
    misfit_TxS = np.array([np.abs(predicted_SxR - target_R).mean(1) for target_R in target_TxR])
    order_TxF = np.argsort(np.where(np.isfinite(misfit_TxS), misfit_TxS, np.inf), axis=1)[:, :FIRST]
    starts_TxFxP = starts_SxP[order_TxF]
    if own_TxP is not None:
        starts_TxFxP = np.concatenate([own_TxP[:, None], np.where(free_P, starts_TxFxP, own_TxP[:, None])], axis=1)
    starts = starts_TxFxP.shape[1]
    found = Robust(
        law, x_KxR, by_K, target_TxR, bounds, free_P,
        starts_TxFxP.reshape(tables * starts, -1), np.zeros(tables), np.zeros(tables), np.full(tables, np.inf),
    )  # fmt: skip
    theta, value = solve(found, np.repeat(np.arange(tables), starts), found.theta_TxP, free_P)
    best_T = value.reshape(tables, starts).argmin(1)
    theta_TxP = theta.reshape(tables, starts, -1)[np.arange(tables), best_T]
    found = replace(found, theta_TxP=theta_TxP, value_T=value.reshape(tables, starts).min(1))
    return _with_noise(found, least_delta)


def _with_noise(found: Robust, least_delta: float) -> Robust:
    """Law and noise in turns, from a fit of the law."""
    theta_TxP, value_T = found.theta_TxP.copy(), found.value_T.copy()
    residual = found.residual_TxR()
    rows = residual.shape[1]
    sigma_T = 1.4826 * np.median(np.abs(residual), axis=1) * np.sqrt(rows / found.freedom)
    delta_T = np.full(len(sigma_T), np.inf)
    for _ in range(10):
        sigma_T = _proposal_2(residual, sigma_T, found.freedom)
        wanted_T = np.maximum(np.exp(np.round(GRAIN * np.log(CUT * sigma_T)) / GRAIN), least_delta)
        changed = np.flatnonzero(wanted_T != delta_T)
        if not len(changed):
            break
        delta_T = wanted_T
        found = replace(found, delta_T=delta_T)
        theta_TxP[changed], value_T[changed] = solve(found, changed, theta_TxP[changed], found.free_P)
        found = replace(found, theta_TxP=theta_TxP)
        residual = found.residual_TxR()
    return replace(found, value_T=value_T, sigma_T=sigma_T)


def _proposal_2(residual_TxR: np.ndarray, sigma_T: np.ndarray, freedom: int) -> np.ndarray:
    """The sigma with sum min(r^2 / sigma^2, CUT^2) = freedom E min(z^2, CUT^2), z standard normal."""
    tail = stats.norm.sf(CUT)
    usual = 1 - 2 * tail - 2 * CUT * stats.norm.pdf(CUT) + 2 * CUT**2 * tail
    for _ in range(100):
        sigma_T = np.maximum(sigma_T, NO_NOISE)
        sizes = np.minimum(np.abs(residual_TxR) / sigma_T[:, None], CUT)
        sigma_T = sigma_T * np.sqrt((sizes**2).sum(1) / (freedom * usual))
    return np.maximum(sigma_T, NO_NOISE)


def solve(found: Robust, table_S: np.ndarray, theta_SxP: np.ndarray, free: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """theta_SxP and value_S of problems on the tables table_S, each under the width of its table; free: P or SxP."""
    theta, value = theta_SxP.copy(), np.empty(len(theta_SxP))
    delta_S = found.delta_T[table_S]
    for delta in np.unique(delta_S):
        rows = np.flatnonzero(delta_S == delta)
        problem = Problem(
            found.law, found.x_KxR, found.target_TxR[table_S[rows]], float(delta), found.bounds,
            free_P=free[rows] if free.ndim == 2 else free,
        )  # fmt: skip
        theta[rows], value[rows], _ = minimise(problem, theta_SxP[rows], max_steps=300)
    return theta, value


def in_units(found: Robust, by_K: np.ndarray) -> Robust:
    """The same fits over columns x - by_K; bounds are those of the same curves."""
    move_K = by_K - found.by_K
    matrix_PxP, offset_P = affine(found.law, move_K)
    lower, upper = found.bounds
    rising, falling = np.maximum(matrix_PxP, 0), np.minimum(matrix_PxP, 0)
    return replace(
        found,
        x_KxR=found.x_KxR - move_K[:, None],
        by_K=by_K,
        bounds=(rising @ lower + falling @ upper + offset_P, rising @ upper + falling @ lower + offset_P),
        theta_TxP=found.theta_TxP @ matrix_PxP.T + offset_P,
    )


def affine(law: Law, by_K: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """law.shift(theta, by_K) = matrix_PxP @ theta + offset_P."""
    offset_P = law.shift(np.zeros(len(law.parameters)), by_K)
    return (law.shift(np.eye(len(law.parameters)), by_K) - offset_P).T, offset_P


def select(found: Robust, tables: np.ndarray) -> Robust:
    """The fits of some of the tables."""
    names = ("target_TxR", "theta_TxP", "value_T", "sigma_T", "delta_T")
    return replace(found, **{name: getattr(found, name)[tables] for name in names})


def rows_inside(found: Robust) -> np.ndarray:
    """Gauss-Newton's Hessian_TxPxP of the rows within the width, 0 for parameters that do not move."""
    jacobian = np.nan_to_num(found.law.evaluate(found.theta_TxP, found.x_KxR)[1]) * _moving(found)[:, :, None]
    inside = np.abs(found.residual_TxR()) <= found.delta_T[:, None]
    return np.einsum("tpr,tr,tqr->tpq", jacobian, inside.astype(float), jacobian, optimize=True)


def _moving(found: Robust) -> np.ndarray:
    """Parameters_TxP that are free and not at a bound."""
    lower, upper = found.bounds
    return found.free_P & (found.theta_TxP > lower + 1e-6) & (found.theta_TxP < upper - 1e-6)


def inverse(hessian_TxPxP: np.ndarray) -> np.ndarray:
    """The inverse over the parameters that move; where nothing holds them apart, large instead of infinite."""
    diagonal = np.einsum("tpp->tp", hessian_TxPxP)
    size = np.sqrt(np.where(diagonal > 0, diagonal, np.inf))
    curvature, axes = np.linalg.eigh(hessian_TxPxP / size[:, :, None] / size[:, None, :])
    scaled = np.einsum("tpq,tq,trq->tpr", axes, 1 / np.maximum(curvature, 1e-14), axes)
    return scaled / size[:, :, None] / size[:, None, :]


# ---- Curvature ----


def hessian_TxPxP(found: Robust) -> np.ndarray:
    """Second derivatives of each table's objective at its optimum, by differences of the law's own first derivatives."""
    delta = found.delta_T[:, None]
    push = np.clip(found.residual_TxR(), -delta, delta)
    bent = []
    for step in 1e-5 * np.eye(found.theta_TxP.shape[1]):
        after, before = (found.law.evaluate(found.theta_TxP + sign * step, found.x_KxR)[1] for sign in (1, -1))
        bent.append(np.einsum("tpr,tr->tp", (after - before) / 2e-5, push))
    moving = _moving(found)
    curved = np.stack(bent, axis=1) * moving[:, :, None] * moving[:, None, :]
    return rows_inside(found) + (curved + curved.swapaxes(1, 2)) / 2


def influence(found: Robust) -> tuple[np.ndarray, np.ndarray]:
    """How far a unit of score of each row moves theta_TxPxR, and the scores_TxR over sqrt(1 - leverage).

    That divisor is HC2 of MacKinnon and White 1985.
    """
    delta = found.delta_T[:, None]
    residual = found.residual_TxR()
    jacobian = np.nan_to_num(found.law.evaluate(found.theta_TxP, found.x_KxR)[1]) * _moving(found)[:, :, None]
    along = inverse(hessian_TxPxP(found)) @ jacobian
    leverage = np.clip((jacobian * along).sum(1), 0, 0.99) * (np.abs(residual) <= delta)
    return along, np.clip(residual, -delta, delta) / np.sqrt(1 - leverage)


def covariance(found: Robust, cluster_R: np.ndarray | None = None) -> np.ndarray:
    """Covariance_TxPxP of theta, for the columns as they are; 0 for parameters that do not move.

    The sandwich H^-1 (sum s s') H^-1 with the scores s of the rows (Huber 1967; White 1980), or with their sums over
    clusters, such as runs of one seed or one trunk (Liang and Zeger 1986).
    """
    along, scores = influence(found)
    matrix, _ = affine(found.law, -found.by_K)
    moves = matrix @ _summed(along * scores[:, None], cluster_R)
    return moves @ moves.swapaxes(1, 2)


def _summed(values_TxPxR: np.ndarray, cluster_R: np.ndarray | None) -> np.ndarray:
    if cluster_R is None:
        return values_TxPxR
    names, member_R = np.unique(cluster_R, return_inverse=True)
    return values_TxPxR @ np.eye(len(names))[member_R]


def excess_variance(found: Robust, cluster_R: np.ndarray | None = None) -> np.ndarray:
    """Variance of theta_TxP by the sandwich over that under equal, independent noise; at least 1.

    Where the noise is as large at every row the ratio is 1 but for chance, and 20 rows leave it much to chance: it
    counts as far as it lies beyond CHANCE of its standard errors. With clusters it counts as it is.
    """
    along, scores = influence(found)
    squares_TxR = scores**2
    mean_T = squares_TxR.mean(1)
    shares = along**2 / np.maximum((along**2).sum(2, keepdims=True), 1e-300)
    if cluster_R is not None:
        summed = (_summed(along * scores[:, None], cluster_R) ** 2).sum(2)
        return np.maximum(summed / np.maximum((along**2).sum(2) * mean_T[:, None], 1e-300), 1)
    ratio = (shares * squares_TxR[:, None]).sum(2) / np.maximum(mean_T, 1e-300)[:, None]
    uneven = squares_TxR.var(1) / np.maximum(mean_T, 1e-300) ** 2
    error = np.sqrt(uneven[:, None] * np.maximum((shares**2).sum(2) - 1 / scores.shape[1], 1e-12))
    beyond = np.maximum(1 - CHANCE**2 * error**2 / np.maximum(ratio - 1, 1e-12) ** 2, 0)
    return np.where(ratio > 1, np.maximum(ratio, 1e-12) ** beyond, 1.0)


def freedom(found: Robust, cluster_R: np.ndarray | None) -> int:
    """Of an interval's quantile: rows less parameters, or clusters less one."""
    return found.freedom if cluster_R is None else min(found.freedom, len(np.unique(cluster_R)) - 1)


def wald_ends(found: Robust, level: float, cluster_R: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """low_TxP and high_TxP of theta, for the columns as they are: the estimate and t standard errors about it."""
    variance = np.einsum("tpp->tp", covariance(found, cluster_R))
    half = np.sqrt(variance) * stats.t.ppf(0.5 + level / 2, freedom(found, cluster_R))
    half = np.where(_moving(found), half, np.inf)
    theta = found.law.shift(found.theta_TxP, -found.by_K)
    return theta - half, theta + half


def correlations(covariance_PxP: np.ndarray) -> np.ndarray:
    """Correlations_PxP; nan for parameters without variance."""
    spread = np.sqrt(np.diag(covariance_PxP))
    with np.errstate(all="ignore"):
        return covariance_PxP / spread[:, None] / spread
