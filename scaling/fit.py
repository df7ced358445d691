"""Fits of scaling laws to tables of runs (approach 3 of Hoffmann et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from llm_jax.config import BadInput
from scaling.laws import Law
from scaling.solver import EXACT, Problem, minimise, objective_delta
from scaling.tables import Table

COLLINEAR = 1e-8  # least eigenvalue of the correlations of the slopes; 1e-4 to 1e-2 on tables that determine a law


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
    at_bound: Mapping[str, str] = field(default_factory=dict)
    """{parameter: "lower" or "upper"} of those that the search left at a bound: the data does not determine them."""
    warnings: tuple[str, ...] = ()

    def predict(self, *columns: np.ndarray | float) -> np.ndarray:
        """Loss in nats a token at the given N_params, D_tokens, ... (law.columns), which broadcast."""
        values = np.broadcast_arrays(*(np.asarray(column, float) for column in columns))
        x_KxR = np.log(np.stack([value.ravel() for value in values]))
        log_loss_1xR, _ = self.law.evaluate(self.theta[None], x_KxR)
        return np.exp(log_loss_1xR[0]).reshape(values[0].shape)

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
    at_bound = bounds_reached(law, polished[0], bounds)
    warnings += law_warnings(law, at_bound, jacobian_1xPxR[0])
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
        at_bound=at_bound,
        warnings=tuple(warnings),
    )


def bounds_reached(law: Law, theta_P: np.ndarray, bounds: tuple[np.ndarray, np.ndarray]) -> dict[str, str]:
    """The parameters at a bound of the search, with "lower" or "upper"."""
    found = {}
    for name, value, low, high in zip(law.parameters, theta_P, *bounds, strict=True):
        if side := "lower" if value <= low + 1e-6 else "upper" if value >= high - 1e-6 else "":
            found[name] = side
    return found


def law_warnings(law: Law, at_bound: Mapping[str, str], jacobian_PxR: np.ndarray) -> list[str]:
    """What the data leaves open: parameters at a bound of the search, and those that only act together."""
    warnings = [
        "E is at its lower bound: this data does not bound the irreducible loss from below"
        if (name, side) == ("E", "lower")
        else f"{name} is at its {side} bound: this data does not determine it"
        for name, side in at_bound.items()
    ]
    inside = [name not in at_bound for name in law.parameters]
    slopes_PxR = jacobian_PxR[inside] / np.maximum(np.linalg.norm(jacobian_PxR[inside], axis=1, keepdims=True), 1e-300)
    curvature, axes = np.linalg.eigh(slopes_PxR @ slopes_PxR.T)
    if curvature[0] < COLLINEAR:
        named = np.array(law.parameters)[inside][np.abs(axes[:, 0]) > 0.2]
        warnings.append(f"{' and '.join(named)} only act together: this data does not tell them apart")
    return warnings
