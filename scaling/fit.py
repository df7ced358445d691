"""Fits of scaling laws to tables of runs, and isoFLOP parabolas (approaches 3 and 2 of Hoffmann et al. 2022)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats

from llm_jax.config import BadInput
from scaling.laws import Law
from scaling.tables import Table

CHUNK = 400_000  # cells of a Jacobian solved at once: what stays in cache
RIDGE = 1e-2  # of the damping's metric, relative: of 1e-4 to 1e-1 what converged most often within 150 steps

COLLINEAR = 1e-8  # least eigenvalue of the correlations of the slopes; 1e-4 to 1e-2 on tables that determine a law
EXACT = 1e-22  # an objective of this size is none: data without noise is fitted to rounding


# ---- The solver: many small robust problems side by side ----


def objective_delta(objective: str) -> float:
    """The width of the Huber loss that an objective names: "huber:1e-3" gives 1e-3, "lsq" infinity."""
    if objective == "lsq":
        return np.inf
    kind, _, width = objective.partition(":")
    try:
        delta = float(width)
    except ValueError:
        delta = np.nan
    if kind != "huber" or not 0 < delta < np.inf:
        raise BadInput(f'"{objective}" names no objective; valid: huber:DELTA, for instance huber:1e-3, and lsq')
    return delta


def huber(residual: np.ndarray, delta: float) -> np.ndarray:
    """r^2 / 2 up to delta, delta (|r| - delta / 2) beyond (Huber 1964)."""
    size = np.abs(residual)
    if np.isinf(delta):
        return 0.5 * residual**2
    return np.where(size <= delta, 0.5 * residual**2, delta * (size - 0.5 * delta))


@dataclass(frozen=True)
class Problem:
    """Minimise sum_r weight_r Huber_delta(log L(theta) - log_loss_r), for one table and many weights side by side."""

    law: Law
    x_KxR: np.ndarray
    """Logs of the law's columns, centred."""
    log_loss: np.ndarray
    """R, or SxR."""
    delta: float
    bounds: tuple[np.ndarray, np.ndarray]
    """Lower and upper, P each."""
    weights_SxR: np.ndarray | None = None
    free_P: np.ndarray | None = None
    """Parameters that move; the others stay where they start. None: all."""
    precision_P: np.ndarray | None = None
    """Of a normal prior around zero: adds sum_p precision_p theta_p^2 / 2. None: none."""


def minimise(
    problem: Problem, theta_SxP: np.ndarray, max_steps: int = 150, tolerance: float = 1e-10
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Solves S problems at once, each from its own start: theta_SxP, value_S and converged_S.

    Levenberg-Marquardt on Gauss-Newton's Hessian of the rows inside delta: outside of it the loss is linear, and close
    to a minimum the step is then Newton's, so that a width as small as 1e-3 costs some tens of steps where reweighted
    least squares creeps for hundreds. A problem stops when its step promises less than `tolerance` times its value.
    """
    size = max(1, CHUNK // (problem.x_KxR.shape[1] * theta_SxP.shape[1]))
    if len(theta_SxP) > size:
        parts = []
        for at in range(0, len(theta_SxP), size):
            rows = slice(at, at + size)
            log_loss, weights = problem.log_loss, problem.weights_SxR
            part = dataclasses.replace(
                problem,
                log_loss=log_loss[rows] if log_loss.ndim == 2 else log_loss,
                weights_SxR=None if weights is None else weights[rows],
            )
            parts.append(minimise(part, theta_SxP[rows], max_steps, tolerance))
        theta, value, converged = (np.concatenate(part) for part in zip(*parts, strict=True))
        return theta, value, converged

    delta, (lower, upper) = problem.delta, problem.bounds
    shape = len(theta_SxP), problem.x_KxR.shape[1]
    target = np.broadcast_to(problem.log_loss, shape)
    weight = np.broadcast_to(1.0 if problem.weights_SxR is None else problem.weights_SxR, shape)
    precision = np.zeros(theta_SxP.shape[1]) if problem.precision_P is None else problem.precision_P
    still = np.zeros(theta_SxP.shape[1], bool) if problem.free_P is None else ~problem.free_P

    def evaluate(theta):
        log_pred, jacobian = problem.law.evaluate(theta, problem.x_KxR)
        residual = log_pred - target
        jacobian = np.nan_to_num(jacobian)
        value = (weight * huber(residual, delta)).sum(1) + 0.5 * (precision * theta**2).sum(1)
        return residual, jacobian, np.where(np.isfinite(value), value, np.inf)

    theta = np.clip(theta_SxP, lower, upper)
    answer, answer_value = theta.copy(), np.full(len(theta), np.inf)
    converged = np.zeros(len(theta), bool)
    diagonal = np.arange(theta.shape[1])
    active, damping = np.arange(len(theta)), np.full(len(theta), 0.1)
    with np.errstate(all="ignore"):
        residual, jacobian, value = evaluate(theta)
        for _ in range(max_steps):
            gradient = np.einsum("spr,sr->sp", jacobian, weight * np.clip(residual, -delta, delta))
            gradient += precision * theta
            held = still | ((theta <= lower) & (gradient > 0)) | ((theta >= upper) & (gradient < 0))
            gradient[held] = 0
            moving = np.where(held[:, :, None], 0, jacobian)
            # The reweighted Hessian lies above the true one (it is that of reweighted least squares, whose every step
            # goes down); damping along it keeps A and alpha, or E and the rest, moving together.
            reweighted = weight * np.minimum(1, delta / np.maximum(np.abs(residual), 1e-300))
            hessian = np.matmul(moving * (weight * (np.abs(residual) <= delta))[:, None], moving.swapaxes(1, 2))
            metric = np.matmul(moving * reweighted[:, None], moving.swapaxes(1, 2))
            hessian[:, diagonal, diagonal] += precision
            metric[:, diagonal, diagonal] += precision
            scale = np.sqrt(metric[:, diagonal, diagonal])
            scale = np.where(scale > 0, scale, 1.0)
            metric /= scale[:, :, None] * scale[:, None, :]
            metric[:, diagonal, diagonal] += RIDGE
            whiten = np.linalg.inv(np.linalg.cholesky(metric)) / scale[:, None, :]
            curvature, axes = np.linalg.eigh(whiten @ hessian @ whiten.swapaxes(1, 2))
            axes = np.matmul(whiten.swapaxes(1, 2), axes)
            slope = np.einsum("spq,sp->sq", axes, gradient)
            move = -np.einsum("spq,sq->sp", axes, slope / (np.maximum(curvature, 0) + damping[:, None]))
            # theta is made of logs and exponents: a longer step than 1 leaves what the linearisation knows, and can
            # switch a term off for good.
            move = np.where(held, 0, move)
            move /= np.maximum(1, np.abs(move).max(1, keepdims=True))
            trial = np.clip(theta + move, lower, upper)
            step = trial - theta
            promised = -(step * gradient).sum(1) - 0.5 * np.einsum("sp,spq,sq->s", step, hessian, step)
            new_residual, new_jacobian, new_value = evaluate(trial)
            better = new_value <= value
            ratio = (value - new_value) / np.maximum(promised, 1e-300)
            damping *= np.where(better, np.where(ratio > 0.75, 0.1, np.where(ratio < 0.25, 3.0, 1.0)), 3.0)
            damping = np.maximum(damping, 1e-12)

            finished = np.abs(promised) <= tolerance * value + EXACT
            theta = np.where(better[:, None], trial, theta)
            residual = np.where(better[:, None], new_residual, residual)
            jacobian = np.where(better[:, None, None], new_jacobian, jacobian)
            value = np.where(better, new_value, value)
            # A promise that damping alone made small is no convergence.
            converged[active] = finished & (damping < 1e3)
            answer[active], answer_value[active] = theta, value
            stay = ~finished & (damping < 1e15)
            if not stay.all():
                active, damping, theta, value = active[stay], damping[stay], theta[stay], value[stay]
                residual, jacobian, weight, target = residual[stay], jacobian[stay], weight[stay], target[stay]
            if not len(active):
                break
    return answer, answer_value, converged


# ---- Fits ----


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
    """n; log of the prediction minus log of the observed loss."""
    starts_agreeing: float
    """Share of the starts that reached this optimum, to 1e-6 of its value."""
    warnings: tuple[str, ...] = ()

    def predict(self, *columns: np.ndarray | float) -> np.ndarray:
        """Loss in nats a token at the given N_params, D_tokens, ... (law.columns), which broadcast."""
        values = np.broadcast_arrays(*(np.asarray(column, float) for column in columns))
        x_KxR = np.log(np.stack([value.ravel() for value in values]))
        log_loss_1xR, _ = self.law.evaluate(self.theta[None], x_KxR)
        return np.exp(log_loss_1xR[0]).reshape(values[0].shape)

    def to_json(self) -> str:
        """One JSON object: the law, its numbers, how well it fits, and what to beware of."""
        record = {
            "law": self.law.name,
            "formula": self.law.formula,
            "source": self.law.source,
            "n": self.n,
            "objective": self.objective,
            "value": self.value,
            "parameters": self.parameters,
            "theta": self.theta.tolist(),
            "residual_rms": float(np.sqrt(np.mean(self.residuals**2))),
            "starts_agreeing": self.starts_agreeing,
            "warnings": list(self.warnings),
        }
        return json.dumps(record, indent=2)

    def summary(self, intervals: Mapping[str, tuple[float, float]] | None = None) -> str:
        """A few lines of text; `intervals` is {parameter: (low, high)}, as in uncertainty.bootstrap."""
        lines = [f"{self.law.name}: {self.law.formula}"]
        for name, value in self.parameters.items():
            given = intervals.get(name) if intervals else None
            lines.append(f"  {name:<6} {value:<10.6g}" + (f"  95% [{given[0]:.4g}, {given[1]:.4g}]" if given else ""))
        rms = 100 * np.sqrt(np.mean(self.residuals**2))
        lines.append(f"  {self.n} rows, {self.objective} {self.value:.6g}, residual rms {rms:.2f} %")
        lines.append(f"  {100 * self.starts_agreeing:.0f} % of the starts agree")
        return "\n".join(line.rstrip() for line in lines + [f"  warning: {warning}" for warning in self.warnings])


def prepare(law: Law, table: Table) -> tuple[Table, np.ndarray, np.ndarray, list[str]]:
    """The finished rows of a table, their log columns_KxR and log loss_R, and warnings; BadInput for unusable ones."""
    warnings = []
    if "status" in table.columns:
        done = table.column("status") == "done"
        if not done.all():
            warnings.append(f"{int((~done).sum())} of {len(table)} rows are left out: their status is not done")
        table = table.select(done)
    for name in (*law.columns, "loss"):
        values = table.column(name)
        if values.dtype.kind != "f":
            raise BadInput(f'column "{name}" must hold numbers, not text such as "{values[0]}"')
        bad = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
        if len(bad):
            row = int(table.columns["row"][bad[0]]) if "row" in table.columns else int(bad[0]) + 1
            raise BadInput(f"row {row}: {name} is {values[bad[0]]}; a fit needs positive, finite numbers")
    if len(table) < len(law.parameters) + 1:
        raise BadInput(
            f"{law.name} has {len(law.parameters)} parameters and needs one row more; the table has {len(table)}"
        )
    log_KxR = np.log(np.stack([table.column(name) for name in law.columns]))
    for name, log_R in zip(law.columns, log_KxR, strict=True):
        if np.ptp(log_R) < 1e-9:
            raise BadInput(
                f"every row has the same {name} = {np.exp(log_R[0]):.6g}; {law.name} needs two values or more"
            )
    return table, log_KxR, np.log(table.column("loss")), warnings


def fit(law: Law, table: Table, objective: str = "huber:1e-3") -> Fit:
    """Fits a law by minimising a sum over rows of Huber_delta(log prediction - log loss), Hoffmann et al. 2022, eq. 3.

    `objective` is "huber:DELTA" or "lsq". Every start of the law is solved to convergence and the best is polished.
    BadInput for unusable rows, for fewer than parameters + 1 of them, and for a column without variation.
    """
    delta = objective_delta(objective)
    table, log_KxR, log_loss, warnings = prepare(law, table)
    centre_K = log_KxR.mean(1)
    x_KxR = log_KxR - centre_K[:, None]
    starts, bounds = law.starts(x_KxR, log_loss), law.bounds(x_KxR, log_loss)
    problem = Problem(law, x_KxR, log_loss, delta, bounds)
    theta, value, _ = minimise(problem, starts)
    best = np.argsort(value)[:1]
    polished, polished_value, converged = minimise(problem, theta[best], max_steps=3000, tolerance=1e-15)
    agreeing = float(np.mean(value <= polished_value[0] * (1 + 1e-6) + 1e4 * EXACT))

    log_pred_1xR, jacobian_1xPxR = law.evaluate(polished, x_KxR)
    warnings += law_warnings(law, polished[0], bounds, jacobian_1xPxR[0])
    if not converged[0]:
        warnings.append("the solver stopped before it reached a minimum: do not use these numbers")
    if np.abs(polished[0] - np.clip(starts[best[0]], *bounds)).max() < 1e-9:
        warnings.append("the solver did not move from its starting point: do not use these numbers")
    if agreeing < 0.5:
        warnings.append(f"only {100 * agreeing:.0f} % of the starts reached the best minimum: a better one may exist")
    theta_P = law.shift(polished[0], -centre_K)
    return Fit(
        law=law,
        n=len(table),
        objective=objective,
        value=float(polished_value[0]),
        parameters=dict(zip(law.parameters, map(float, law.natural(theta_P)), strict=True)),
        theta=theta_P,
        residuals=log_pred_1xR[0] - log_loss,
        starts_agreeing=agreeing,
        warnings=tuple(warnings),
    )


def law_warnings(law: Law, theta_P: np.ndarray, bounds: tuple[np.ndarray, np.ndarray], jacobian_PxR) -> list[str]:
    """What the data leaves open: parameters at a bound of the search, and those that only act together."""
    warnings = []
    inside = []
    for name, value, low, high in zip(law.parameters, theta_P, *bounds, strict=True):
        side = "lower" if value <= low + 1e-6 else "upper" if value >= high - 1e-6 else ""
        inside.append(not side)
        if side == "lower" and name == "E":
            warnings.append("E is at its lower bound: this data does not bound the irreducible loss from below")
        elif side:
            warnings.append(f"{name} is at its {side} bound: this data does not determine it")
    slopes_PxR = jacobian_PxR[inside] / np.maximum(np.linalg.norm(jacobian_PxR[inside], axis=1, keepdims=True), 1e-300)
    curvature, axes = np.linalg.eigh(slopes_PxR @ slopes_PxR.T)
    if curvature[0] < COLLINEAR:
        named = np.array(law.parameters)[inside][np.abs(axes[:, 0]) > 0.2]
        warnings.append(f"{' and '.join(named)} only act together: this data does not tell them apart")
    return warnings


# ---- IsoFLOP parabolas ----


@dataclass(frozen=True)
class Parabola:
    """The loss of one compute budget as a parabola in log N (Hoffmann et al. 2022, approach 2), with 95 % intervals.

    Intervals are (nan, nan) where no row is left over to judge the noise by, and reach 0 or infinity where the noise
    allows a curve without a minimum. `warning` is empty where the minimum lies inside of the grid.
    """

    budget: float
    """FLOPs; the column `budget`, or the geometric mean of C_flops."""
    n: int
    n_opt: float
    d_opt: float
    loss_opt: float
    n_interval: tuple[float, float]
    d_interval: tuple[float, float]
    loss_interval: tuple[float, float]
    coefficients: tuple[float, float, float]
    """Of (ln N)^2, ln N and 1."""
    log_n_error: float
    """Standard error of log n_opt by the delta method."""
    warning: str = ""


@dataclass(frozen=True)
class PowerLaw:
    """N* = coefficient C^exponent over interior minima, low and high of the exponent at 95 %; D* ~ C^(1 - exponent)."""

    coefficient: float
    exponent: float
    low: float
    high: float
    n: int


def budgets(table: Table) -> np.ndarray:
    """The compute budget of each row: the column `budget`, else C_flops with runs within 5 % put together."""
    if "budget" in table.columns and table.columns["budget"].dtype.kind == "f":
        return table.columns["budget"]
    compute = table.column("C_flops")
    order = np.argsort(compute)
    group, first = np.zeros(len(compute), int), -np.inf
    for i, row in enumerate(order):
        if compute[row] > first * 1.05 or i == 0:
            first = compute[row]
            group[order[i:]] += 1
    return np.exp([np.log(compute[group == g]).mean() for g in group])


def isoflop(table: Table) -> list[Parabola]:
    """One parabola for each budget that has at least three sizes, in order of budget; BadInput where no budget has.

    The noise is the residual of all parabolas together, relative to the loss, so that three sizes a budget still give
    intervals once some budget has more.
    """
    if "status" in table.columns:
        table = table.select(table.column("status") == "done")
    budget_R, log_n_R, loss_R = budgets(table), np.log(table.column("N_params")), table.column("loss")
    log_nd_R = log_n_R + np.log(table.column("D_tokens"))
    curves, squares, spare = [], 0.0, 0
    for budget in np.unique(budget_R):
        rows = budget_R == budget
        if len(np.unique(log_n_R[rows])) < 3:
            continue
        centre = log_n_R[rows].mean()
        design = np.vander(log_n_R[rows] - centre, 3, increasing=True) / loss_R[rows][:, None]
        coefficients = np.linalg.lstsq(design, np.ones(rows.sum()), rcond=None)[0]
        squares += float(np.sum((design @ coefficients - 1) ** 2))
        spare += int(rows.sum()) - 3
        curves.append((budget, rows, centre, coefficients, np.linalg.inv(design.T @ design)))
    if not curves:
        raise BadInput("no budget has three sizes: an isoFLOP parabola needs three values of N_params at one compute")
    noise = squares / spare if spare else np.nan
    quantile = stats.t.ppf(0.975, spare) if spare else np.nan
    return [
        _parabola(
            float(budget), log_n_R[rows] - centre, loss_R[rows], centre, log_nd_R[rows].mean(), c, noise * cov, quantile
        )
        for budget, rows, centre, c, cov in curves
    ]


def _parabola(budget, u, loss, centre, log_nd, coefficients, covariance, quantile) -> Parabola:
    """One curve loss = c0 + c1 u + c2 u^2 with u = log N - centre, read off at its minimum."""
    c0, c1, c2 = coefficients
    at = -c1 / (2 * c2) if c2 > 0 else u[np.argmin(loss)]
    side = ""
    if c2 <= 0 or not u.min() < at < u.max() or loss.argmin() in (u.argmin(), u.argmax()):
        lowest = u[np.argmin(loss)] if c2 <= 0 else at
        side = "smaller" if lowest < (u.min() + u.max()) / 2 else "larger"
    gradient = np.array([0, -1, -2 * at]) / (2 * c2)
    point = np.array([1, at, at**2])
    half = quantile * np.sqrt(point @ covariance @ point)
    u_low, u_high = _fieller(c1, c2, covariance, quantile) if c2 > 0 else (-np.inf, np.inf)
    with np.errstate(over="ignore"):  # an interval may be unbounded
        n_low, n_high = np.exp(centre + u_low), np.exp(centre + u_high)
        d_low, d_high = np.exp(log_nd - centre - u_high), np.exp(log_nd - centre - u_low)
    loss_opt = float(point @ coefficients)
    return Parabola(
        budget=budget,
        n=len(u),
        n_opt=float(np.exp(centre + at)),
        d_opt=float(np.exp(log_nd - centre - at)),
        loss_opt=loss_opt,
        n_interval=(float(n_low), float(n_high)),
        d_interval=(float(d_low), float(d_high)),
        loss_interval=(float(loss_opt - half), float(loss_opt + half)),
        coefficients=(float(c2), float(c1 - 2 * c2 * centre), float(c0 - c1 * centre + c2 * centre**2)),
        log_n_error=float(np.sqrt(gradient @ covariance @ gradient)),
        warning=f"budget {budget:.3g}: the minimum lies at or outside the grid's edge: add {side} shapes"
        if side
        else "",
    )


def _fieller(c1: float, c2: float, covariance: np.ndarray, quantile: float) -> tuple[float, float]:
    """All u at which the noise allows the slope c1 + 2 c2 u to be zero (Fieller 1954); possibly all there are."""
    if not np.isfinite(quantile):
        return np.nan, np.nan
    t2 = quantile**2
    square = 4 * (c2**2 - t2 * covariance[2, 2])
    linear = 4 * (c1 * c2 - t2 * covariance[1, 2])
    constant = c1**2 - t2 * covariance[1, 1]
    if square <= 0:
        return -np.inf, np.inf
    root = np.sqrt(max(0.0, linear**2 - 4 * square * constant))
    return (-linear - root) / (2 * square), (-linear + root) / (2 * square)


def frontier(parabolas: list[Parabola]) -> PowerLaw:
    """The power law through the interior minima; BadInput with fewer than two, an interval with three or more.

    Minima weigh by their standard errors; the interval widens where they scatter by more than those say.
    """
    inside = [p for p in parabolas if not p.warning]
    if len(inside) < 2:
        raise BadInput(f"a power law N* ~ C^a needs two budgets with a minimum inside the grid, not {len(inside)}")
    x = np.log([p.budget for p in inside])
    y = np.log([p.n_opt for p in inside])
    errors = np.array([p.log_n_error for p in inside])
    errors = errors if np.all(np.isfinite(errors) & (errors > 0)) else np.ones(len(inside))
    design = np.stack([np.ones_like(x), x - x.mean()], 1) / errors[:, None]
    solution = np.linalg.lstsq(design, y / errors, rcond=None)[0]
    low = high = np.nan
    if len(inside) >= 3:
        spare = len(inside) - 2
        scatter = float(np.sum((design @ solution - y / errors) ** 2)) / spare
        known = bool(np.any(errors != 1))
        error = np.sqrt(np.linalg.inv(design.T @ design)[1, 1] * (max(1.0, scatter) if known else scatter))
        # Known errors carry the noise themselves; without them it is judged by the scatter of very few minima.
        reach = stats.norm.ppf(0.975) if known else stats.t.ppf(0.975, spare)
        low, high = float(solution[1] - reach * error), float(solution[1] + reach * error)
    exponent = float(solution[1])
    return PowerLaw(float(np.exp(solution[0] - exponent * x.mean())), exponent, low, high, len(inside))
