"""How well a table determines the parameters of a law: resamples, and open ends.

The loss of one run beyond the table is another question: see extrapolation.py.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from scaling.fit import GRADES, Fit, prepare
from scaling.isoflop import budgets
from scaling.solver import Problem, Solver, minimise
from scaling.tables import Table


@dataclass(frozen=True)
class Bootstrap:
    """Resampled parameters of a fit."""

    parameters: dict[str, np.ndarray]
    """Natural values, one a resample."""
    intervals: dict[str, tuple[float, float]]
    """95 %: the 2.5th and 97.5th percentile of each."""
    theta_SxP: np.ndarray
    """The same in the law's unconstrained form, for the columns as they are."""
    drawn: str = ""
    """What was drawn with replacement, in words."""


BLOCK = 500  # resamples drawn at once: what stays in cache


def resample(groups_R: np.ndarray, samples: int, parameters: int, rng: np.random.Generator) -> np.ndarray:
    """Weights_SxR of rows drawn with replacement: within each group where all have at least four rows, else over all.

    Measured on isoFLOP tables of 15 and 20 rows under 5 parameters (noise 0.5 %, 60 tables a case): 90 % intervals of a
    prediction at 4 times the compute covered 0.82-0.93 with rows drawn within budgets, 0.85-0.97 over all rows,
    0.83-0.92 with residuals, 0.75-0.95 with exponential weights, which are too smooth for so few rows. Drawing within
    budgets gave the width closest to the true spread; groups of one row would have no spread at all. Resamples with
    fewer distinct rows than parameters say nothing and are drawn again.
    """
    rows = len(groups_R)
    members_of = [np.flatnonzero(groups_R == group) for group in np.unique(groups_R)]
    if min(map(len, members_of)) < 4:
        members_of = [np.arange(rows)]
    weights = np.zeros((samples, rows))
    again = np.arange(samples)
    for _ in range(20):
        weights[again] = 0
        for members in members_of:
            for some in np.array_split(again, 1 + len(again) // BLOCK):
                drawn = members[rng.integers(0, len(members), (len(some), len(members)))]
                cells = np.arange(len(some))[:, None] * rows + drawn
                weights[some] += np.bincount(cells.ravel(), minlength=len(some) * rows).reshape(-1, rows)
        again = again[(weights[again] > 0).sum(1) < parameters]
        if not len(again):
            break
    return weights


def whole_clusters(cluster_R: np.ndarray, samples: int, parameters: int, rng: np.random.Generator) -> np.ndarray:
    """Weights_SxR of whole clusters drawn with replacement (Cameron, Gelbach and Miller 2008).

    As in `resample`, draws with fewer distinct rows than parameters are drawn again, 20 times at most.
    """
    names, member_R = np.unique(cluster_R, return_inverse=True)
    weights = np.zeros((samples, len(cluster_R)))
    again = np.arange(samples)
    for _ in range(20):
        drawn = rng.integers(0, len(names), (len(again), len(names)))
        counts = (drawn[:, :, None] == np.arange(len(names))).sum(1)
        weights[again] = counts[:, member_R]
        again = again[(weights[again] > 0).sum(1) < parameters]
        if not len(again):
            break
    return weights


def refit(
    problem: Problem, theta_P: np.ndarray, weights_SxR: np.ndarray, max_steps: int = 400, by: Solver | None = None
) -> np.ndarray:
    """Theta_SxP of fits under each row of weights, from the optimum; also from a middling E if the optimum has none.

    `by` is the solver; default: the one that `fastest` names.
    """
    starts = [theta_P]
    names, lowest = problem.law.parameters, problem.target.min()
    moves = problem.free_P is None or dict(zip(names, problem.free_P, strict=True)).get("E")
    if "E" in names and moves and theta_P[names.index("E")] < lowest - 3:
        # Close to its bound E has no slope left to come back along, though many resamples would have it higher.
        starts.append(np.where(np.array(names) == "E", lowest - 0.7, theta_P))
    problem = dataclasses.replace(problem, weights_SxR=np.tile(weights_SxR, (len(starts), 1)))
    solve = by or fastest(len(weights_SxR))
    theta, value, _ = solve(problem, np.repeat(starts, len(weights_SxR), axis=0), max_steps, 1e-8)
    best = value.reshape(len(starts), -1).argmin(0)
    return theta.reshape(len(starts), len(weights_SxR), -1)[best, np.arange(len(weights_SxR))]


ACCELERATED_FROM = 50_000
"""Refits at once from which a GPU is looked for: loading JAX and compiling take longer than fewer of them do here."""


def fastest(samples: int) -> Solver:
    """Who solves so many problems: NumPy, or JAX where they are many and there is a GPU."""
    if samples < ACCELERATED_FROM:
        return minimise
    from scaling import accelerated  # loads JAX

    return accelerated.minimise if accelerated.available() else minimise


def bootstrap(
    result: Fit, table: Table, samples: int = 1000, seed: int = 0, cluster_R: np.ndarray | None = None
) -> Bootstrap:
    """Refits the law to `samples` resamples of the rows, all side by side, under the objective of the fit.

    `cluster_R` marks by equal values the rows that share their noise: whole clusters are then drawn.
    """
    law, rng = result.law, np.random.default_rng(seed)
    table, log_KxR, target, _ = prepare(law, table)
    centre_K = law.centre(log_KxR)
    x_KxR = log_KxR - centre_K[:, None]
    if cluster_R is None:
        weights, drawn = resample(groups(table), samples, len(law.parameters), rng), "rows"
    else:
        weights, drawn = whole_clusters(cluster_R, samples, int(result.free.sum()), rng), "whole clusters of rows"
    bounds = law.bounds(x_KxR, target)
    problem = Problem(law, x_KxR, target, result.delta, bounds, free_P=result.free)
    theta_SxP = law.shift(refit(problem, law.shift(result.theta, centre_K), weights), -centre_K)
    natural_SxP = law.natural(theta_SxP)
    low_P, high_P = np.quantile(natural_SxP, [0.025, 0.975], axis=0)
    return Bootstrap(
        parameters=dict(zip(law.parameters, natural_SxP.T, strict=True)),
        intervals={name: (float(a), float(b)) for name, a, b in zip(law.parameters, low_P, high_P, strict=True)},
        theta_SxP=theta_SxP,
        drawn=drawn,
    )


def groups(table: Table) -> np.ndarray:
    """R; the budget of each row, to resample within and to cut at; a table of rows without any compute is one group."""
    columns = table.columns
    if not {"budget", "C_flops"} & set(columns):
        if not {"N_params", "D_tokens"} <= set(columns):
            return np.zeros(len(table))
        table = Table({"C_flops": 6 * columns["N_params"] * columns["D_tokens"]})
    return budgets(table)


# ---- What the data leaves open ----

LIKELY = 3.841  # the 95 % point of chi-squared with one degree of freedom


def _likelihood_ratio(result: Fit, value: np.ndarray, value_0: float) -> np.ndarray:
    """-2 log of the likelihood of a fit of this value, its noise as wide as it needs, over that of the best.

    n log(V / V_0) for the normal rows within the width of Huber's loss, twice that for Laplace's beyond; less for the
    parameters that the rows had to pay for.
    """
    beyond = np.abs(result.residuals) > result.delta
    rows = result.n + int(beyond.sum())
    spent = 1 - result.free.sum() / result.n
    with np.errstate(divide="ignore", invalid="ignore"):
        return spent * rows * np.log(np.maximum(value, value_0) / value_0)


def open_ends(result: Fit, table: Table) -> dict[str, tuple[str, ...]]:
    """{parameter: ("lower",), ("upper",) or both} where the profile likelihood has no end: at the bound of the search,
    the others refitted, the data is as likely as a 95 % interval allows."""
    law = result.law
    table, log_KxR, target, _ = prepare(law, table)
    by_K = law.centre(log_KxR)
    x_KxR = log_KxR - by_K[:, None]
    lower_P, upper_P = law.bounds(x_KxR, target)
    best_P = law.shift(result.theta, by_K)
    problem = Problem(law, x_KxR, target, result.delta, (lower_P, upper_P), free_P=result.free)
    value_0 = minimise(problem, best_P[None], max_steps=1)[1][0]
    free = np.flatnonzero(result.free)
    if value_0 <= 1e-18 or not len(free):
        return {}
    at = np.concatenate([free, free])
    ends = np.concatenate([lower_P[free], upper_P[free]])
    rows = np.arange(len(at))
    moving_SxP = np.tile(result.free, (len(at), 1))
    moving_SxP[rows, at] = False
    problem = dataclasses.replace(problem, free_P=moving_SxP)
    theta_SxP = np.tile(best_P, (len(at), 1))
    for share in (0.02, 0.1, 0.3, 0.6, 1.0):  # step by step, so that the others can follow
        theta_SxP[rows, at] = best_P[at] + share * (ends - best_P[at])
        for width in GRADES if 0 < problem.delta < np.inf else (1.0,):
            graded = dataclasses.replace(problem, delta=width * problem.delta)
            theta_SxP, value, _ = minimise(graded, theta_SxP, max_steps=200, tolerance=1e-6)
    likely = _likelihood_ratio(result, value, value_0) < LIKELY
    sides: dict[str, tuple[str, ...]] = {}
    for side, parts in (("lower", slice(0, len(free))), ("upper", slice(len(free), None))):
        for p in at[parts][likely[parts]]:
            sides[law.parameters[p]] = (*sides.get(law.parameters[p], ()), side)
    return sides
