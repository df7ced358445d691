"""Fits of scaling laws to tables of runs (approach 3 of Hoffmann et al. 2022)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from llm_jax.settings import BadInput, did_you_mean
from scaling import laws
from scaling.laws import Law
from scaling.solver import EXACT, Objective, Problem, minimise, parse_objective
from scaling.tables import Table

COLLINEAR = 1e-8  # least eigenvalue of the correlations of the slopes; 1e-4 to 1e-2 on tables that determine a law

GRADES = (30.0, 5.0, 1.0)
"""Widths of Huber's loss on the way to its own. Chinchilla's law then has all of 64 starts in one minimum on five published
tables, and Muennighoff's on 296 rows, where 48 of 64 were straight away: a width of 1e-3 has minima that differ in the
fifth digit. Where the law does not fit, some stay apart: 57 to 58 of 64 for Kaplan's on Hoffmann's 245 rows."""

HOPS = 96
"""On the 182 rows of Muennighoff et al. 2023 with the values that they hold, Huber's loss has minima of 0.0158074,
where all graded starts end, and 0.0158047; of 96 points one in four leads to the lower."""


@dataclass(frozen=True)
class Fit:
    """A law fitted to a table. `predict` takes one array for each of law.columns: predict(n_params, d_tokens)."""

    law: Law
    n: int
    objective: str
    value: float
    """Of the objective at its minimum: a sum over rows; "lsq" is the sum of r^2 / 2."""
    parameters: dict[str, float]
    theta: np.ndarray
    """P; the law's unconstrained form, for the columns as they are."""
    residuals: np.ndarray
    """n; log of the prediction minus log of the observed target, or of the values where not law.log."""
    starts_agreeing: float
    """Share of the starts that reached this optimum, to 1e-6 of its value."""
    at_bound: Mapping[str, str] = field(default_factory=dict)
    """{parameter: "lower" or "upper"} of those that the search left at a bound: the data does not determine them."""
    warnings: tuple[str, ...] = ()
    sigma: float | None = None
    """Width of the noise, where the objective has it as a parameter."""
    held: frozenset[str] = frozenset()
    """Parameters that were given, not fitted."""

    @property
    def free(self) -> np.ndarray:
        """P: the parameters that were fitted."""
        return np.array([name not in self.held for name in self.law.parameters])

    @property
    def delta(self) -> float:
        """The width of Huber's loss that the fit ended with: infinity for least squares, 0 for absolute errors."""
        objective = parse_objective(self.objective)
        return objective.delta * (self.sigma if self.sigma and 0 < objective.delta < np.inf else 1.0)

    def predict(self, *columns: np.ndarray | float) -> np.ndarray:
        """The target, a loss in nats a token, at the given N_params, D_tokens, ... (law.columns), which broadcast."""
        values = np.broadcast_arrays(*(np.asarray(column, float) for column in columns))
        x_KxR = np.log(np.stack([value.ravel() for value in values]))
        value_1xR, _ = self.law.evaluate(self.theta[None], x_KxR)
        return (np.exp(value_1xR[0]) if self.law.log else value_1xR[0]).reshape(values[0].shape)


def prepare(law: Law, table: Table) -> tuple[Table, np.ndarray, np.ndarray, list[str]]:
    """The finished rows of a table, their log columns_KxR and target_R (a log where law.log), and warnings.

    BadInput for unusable rows: every number must be positive and finite, but a column that the law cannot rescale, such
    as a sparsity, may be zero.
    """
    warnings = []
    if "status" in table.columns:
        done = table.column("status") == "done"
        if not done.all():
            warnings.append(f"{int((~done).sum())} of {len(table)} rows are left out: their status is not done")
        table = table.select(done)
    counted = law.centre(np.ones((len(law.columns), 1)))
    for name, zero in (*zip(law.columns, counted == 0, strict=True), (law.target, not law.log)):
        values = table.column(name)
        if values.dtype.kind != "f":
            raise BadInput(f'column "{name}" must hold numbers, not text such as "{values[0]}"')
        bad = np.flatnonzero(~(np.isfinite(values) & ((values > 0) | (zero & (values == 0)))))
        if len(bad):
            row = int(table.columns["row"][bad[0]]) if "row" in table.columns else int(bad[0]) + 1
            raise BadInput(f"row {row}: {name} is {values[bad[0]]}; a fit needs positive, finite numbers")
    if len(table) < len(law.parameters) + 1:
        raise BadInput(
            f"{law.name} has {len(law.parameters)} parameters and needs one row more; the table has {len(table)}"
        )
    with np.errstate(divide="ignore"):
        log_KxR = np.log(np.stack([table.column(name) for name in law.columns]))
    for name, log_R in zip(law.columns, log_KxR, strict=True):
        if (log_R == log_R[0]).all() or (np.ptp(log_R[np.isfinite(log_R)]) < 1e-9 and np.isfinite(log_R).all()):
            raise BadInput(
                f"every row has the same {name} = {np.exp(log_R[0]):.6g}; {law.name} needs two values or more"
            )
    target = table.column(law.target)
    return table, log_KxR, np.log(target) if law.log else target, warnings


def fit(law: Law, table: Table, objective: str = "", hold: Mapping[str, float] | None = None) -> Fit:
    """Fits a law by minimising an objective over the rows, such as Hoffmann et al. 2022, eq. 3; see solver.Objective.

    `objective` is "huber:DELTA", "l1" or "lsq"; without one, that of the law's paper. Every start of the law is solved
    to convergence and the best is polished. `hold` gives parameters their values, as where a law extends one that was
    fitted before. BadInput for unusable rows, for fewer than parameters + 1 of them, and for a column without variation.
    """
    goal = parse_objective(objective or law.objective)
    law = law if goal.log is None else law.between(log=goal.log)
    table, log_KxR, target, warnings = prepare(law, table)
    by_K = law.centre(log_KxR)
    x_KxR = log_KxR - by_K[:, None]
    starts, bounds = law.starts(x_KxR, target), law.bounds(x_KxR, target)
    free_P = np.ones(len(law.parameters), bool)
    if hold:
        starts, free_P = _held(law, starts, by_K, hold)
    own_width = goal.scaled and 0 < goal.delta < np.inf
    problem = Problem(law, x_KxR, target, np.inf if own_width else goal.delta, bounds, free_P=free_P)
    theta, value = _from_starts(problem, starts)
    best = np.argsort(value)[:1]
    polished, polished_value, converged = minimise(problem, theta[best], max_steps=3000, tolerance=1e-15)
    agreeing = float(np.mean(value <= polished_value[0] * (1 + 1e-6) + 1e4 * EXACT))
    if np.isfinite(problem.delta):
        near = _around(problem, polished, polished_value)
        polished, polished_value, converged = minimise(problem, near, max_steps=3000, tolerance=1e-15)
    if own_width:
        polished, converged = _with_own_width(problem, goal, polished)
    log_pred_1xR, jacobian_1xPxR = law.evaluate(polished, x_KxR)
    residuals = log_pred_1xR[0] - target
    sigma = goal.sigma(residuals) if goal.scaled else None
    at_bound = bounds_reached(law, polished[0], bounds)
    at_bound = {name: side for name, side in at_bound.items() if name not in (hold or {})}
    warnings += law_warnings(law, at_bound, jacobian_1xPxR[0], free_P)
    if not converged[0]:
        warnings.append("the solver stopped before it reached a minimum: do not use these numbers")
    if np.abs(polished[0] - np.clip(starts[best[0]], *bounds)).max() < 1e-9:
        warnings.append("the solver did not move from its starting point: do not use these numbers")
    if agreeing < 0.5:
        warnings.append(f"only {100 * agreeing:.0f} % of the starts reached the best minimum: a better one may exist")
    theta_P = law.shift(polished[0], -by_K)
    return Fit(
        law=law,
        n=len(table),
        objective=goal.name,
        value=goal.value(residuals, sigma or 1.0),
        parameters=dict(zip(law.parameters, map(float, law.natural(theta_P)), strict=True)),
        theta=theta_P,
        residuals=residuals,
        starts_agreeing=agreeing,
        at_bound=at_bound,
        warnings=tuple(warnings),
        sigma=sigma,
        held=frozenset(hold or ()),
    )


def _held(law: Law, starts: np.ndarray, by_K: np.ndarray, hold: Mapping[str, float]) -> tuple[np.ndarray, np.ndarray]:
    """Starts with the held values in place, for centred columns, and the parameters that are free.

    BadInput for a name that is none, and where what is held means something only beside what is not: A of A / N^alpha
    alone is a number in units that alpha sets.
    """
    for name in hold:
        if name not in law.parameters:
            raise BadInput(f'{law.name} has no parameter "{name}"{did_you_mean(name, law.parameters)}')
    free_P = np.array([name not in hold for name in law.parameters])
    at = [law.parameters.index(name) for name in hold]
    theta_SxP = law.shift(starts, -by_K)
    with np.errstate(invalid="ignore", divide="ignore"):
        theta_SxP[:, at] = law.stored(dict(hold))
    if not np.isfinite(theta_SxP[:, at]).all():
        raise BadInput(f"{law.name} cannot hold {', '.join(f'{name} = {value:g}' for name, value in hold.items())}")
    centred_SxP = law.shift(theta_SxP, by_K)
    if np.ptp(centred_SxP[:, at], axis=0).max() > 1e-9:
        moving = [name for k, name in zip(at, hold, strict=True) if np.ptp(centred_SxP[:, k]) > 1e-9]
        raise BadInput(f"{moving[0]} cannot be held alone: hold the exponent that it belongs to as well")
    return np.where(free_P, starts, centred_SxP), free_P


def _from_starts(problem: Problem, theta_SxP: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every start to its minimum, through Huber losses of greater widths, whose minima are fewer."""
    early_P = np.array([name not in problem.law.late for name in problem.law.parameters])
    free_P = early_P if problem.free_P is None else early_P & problem.free_P
    widths = GRADES if 0 < problem.delta < np.inf else (1.0,)
    if not early_P.all() and free_P.any():
        first = dataclasses.replace(problem, delta=widths[0] * problem.delta, free_P=free_P)
        theta_SxP, _, _ = minimise(first, theta_SxP, max_steps=30)
    for width in widths:
        graded = dataclasses.replace(problem, delta=width * problem.delta)
        theta_SxP, value, _ = minimise(graded, theta_SxP, max_steps=400)
    return theta_SxP, value


def _around(problem: Problem, theta_1xP: np.ndarray, value: np.ndarray) -> np.ndarray:
    """The lowest minimum among those that a narrow Huber loss, which has many shallow ones, leaves around the best.

    From HOPS points drawn around it as far as the data allows; again from there, as long as that finds a lower one.
    """
    free_P = np.ones(theta_1xP.shape[1], bool) if problem.free_P is None else problem.free_P
    low_P, high_P = problem.bounds
    for turn in range(3):
        log_pred, jacobian = problem.law.evaluate(theta_1xP, problem.x_KxR)
        slopes_PxR = np.where(free_P[:, None], np.nan_to_num(jacobian[0]), 0)
        sigma = 1.4826 * np.median(np.abs(log_pred[0] - problem.target))
        variance, axes = np.linalg.eigh(slopes_PxR @ slopes_PxR.T)
        reach = sigma / np.sqrt(np.maximum(variance, 1e-12 * variance[-1] + 1e-300))
        drawn = np.random.default_rng(turn).standard_normal((HOPS, len(free_P)))
        moves = np.clip((drawn * np.minimum(reach, 3)) @ axes.T, -3, 3) * free_P
        theta, values, _ = minimise(problem, np.clip(theta_1xP + moves, low_P, high_P), max_steps=100)
        best = np.argmin(values)
        if not values[best] < value[0] * (1 - 1e-7):
            break
        theta_1xP, value = theta[best][None], values[best][None]
    return theta_1xP


def _with_own_width(problem: Problem, goal: Objective, theta_1xP: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Law and noise in turns: each step lowers the same likelihood."""
    before = np.inf
    for _ in range(100):
        residual = problem.law.evaluate(theta_1xP, problem.x_KxR)[0][0] - problem.target
        sigma = goal.sigma(residual)
        if not sigma > 1e-12 or abs(sigma / before - 1) < 1e-12:
            break
        before = sigma
        problem = dataclasses.replace(problem, delta=goal.delta * sigma)
        theta_1xP, _, converged = minimise(problem, theta_1xP, max_steps=3000, tolerance=1e-15)
    return theta_1xP, converged


def bounds_reached(law: Law, theta_P: np.ndarray, bounds: tuple[np.ndarray, np.ndarray]) -> dict[str, str]:
    """The parameters at a bound of the search, with "lower" or "upper"."""
    found = {}
    for name, value, low, high in zip(law.parameters, theta_P, *bounds, strict=True):
        if side := "lower" if value <= low + 1e-6 else "upper" if value >= high - 1e-6 else "":
            found[name] = side
    return found


def law_warnings(law: Law, at_bound: Mapping[str, str], jacobian_PxR: np.ndarray, free_P: np.ndarray) -> list[str]:
    """What the data leaves open: parameters at a bound of the search, and those that only act together."""
    warnings = [
        "E is at its lower bound: this data does not bound the irreducible loss from below"
        if (name, side) == ("E", "lower")
        else f"{name} is at its {side} bound: this data does not determine it"
        for name, side in at_bound.items()
    ]
    inside = [name not in at_bound and free for name, free in zip(law.parameters, free_P, strict=True)]
    if not any(inside):
        return warnings
    slopes_PxR = jacobian_PxR[inside] / np.maximum(np.linalg.norm(jacobian_PxR[inside], axis=1, keepdims=True), 1e-300)
    curvature, axes = np.linalg.eigh(slopes_PxR @ slopes_PxR.T)
    if curvature[0] < COLLINEAR:
        named = np.array(law.parameters)[inside][np.abs(axes[:, 0]) > 0.2]
        warnings.append(f"{' and '.join(named)} only act together: this data does not tell them apart")
    return warnings


def optimum(result: Fit, compute: float) -> tuple[float, float]:
    """(N*, D*) of least loss under C = 6 N D by a fitted law of N_params and D_tokens; `compute` in FLOPs.

    BadInput where the law reads other columns, or has no optimum inside.
    """
    if result.law.name == "chinchilla":
        return laws.optimum(result.parameters, compute)
    if result.law.columns != ("N_params", "D_tokens"):
        read = ", ".join(result.law.columns)
        raise BadInput(f"{result.law.name} reads {read}; a compute-optimal size needs a law of N_params and D_tokens")
    found = laws.best_split(result.predict, compute, 1.0, compute / 6)
    if found is None:
        raise BadInput(f"{result.law.name} has no compute-optimal size at C = {compute:.3g}")
    return found
