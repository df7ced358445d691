"""IsoFLOP parabolas and the power law through their minima (approach 2 of Hoffmann et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import interpolate, stats

from llm_jax.settings import BadInput
from scaling.tables import Table


@dataclass(frozen=True)
class Parabola:
    """The loss of one compute budget as a parabola in log N (Hoffmann et al. 2022, approach 2), with 95 % intervals.

    Intervals are (nan, nan) where no row is left over to judge the noise by, and reach 0 or infinity where the noise
    allows a curve without a minimum.
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
    edge: Literal["low", "high"] | None = None
    """Of the sizes tried, where the minimum lies at it or beyond; None where the grid brackets the minimum."""

    @property
    def warning(self) -> str:
        """What to do about a minimum at the grid's edge; empty where it lies inside."""
        if not self.edge:
            return ""
        side = "smaller" if self.edge == "low" else "larger"
        return f"budget {self.budget:.3g}: the minimum lies at or outside the grid's edge: add {side} shapes"


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


def parabolas(table: Table) -> list[Parabola]:
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


def _parabola(
    budget: float,
    u_R: np.ndarray,
    loss_R: np.ndarray,
    centre: float,
    log_nd: float,
    coefficients: np.ndarray,
    covariance: np.ndarray,
    quantile: float,
) -> Parabola:
    """One curve loss = c0 + c1 u + c2 u^2 with u = log N - centre, read off at its minimum."""
    c0, c1, c2 = coefficients
    at = -c1 / (2 * c2) if c2 > 0 else u_R[loss_R.argmin()]
    edge: Literal["low", "high"] | None = None
    if c2 <= 0 or not u_R.min() < at < u_R.max() or loss_R.argmin() in (u_R.argmin(), u_R.argmax()):
        edge = "low" if at < (u_R.min() + u_R.max()) / 2 else "high"
    gradient = np.array([0, -1, -2 * at]) / (2 * c2)
    point = np.array([1, at, at**2])
    half = quantile * np.sqrt(point @ covariance @ point)
    u_low, u_high = _fieller(c1, c2, covariance, quantile) if c2 > 0 else (-np.inf, np.inf)
    with np.errstate(over="ignore"):  # an interval may be unbounded
        n_low, n_high = np.exp(centre + u_low), np.exp(centre + u_high)
        d_low, d_high = np.exp(log_nd - centre - u_high), np.exp(log_nd - centre - u_low)
        n_opt, d_opt = np.exp(centre + at), np.exp(log_nd - centre - at)
    loss_opt = float(point @ coefficients)
    return Parabola(
        budget=budget,
        n=len(u_R),
        n_opt=float(n_opt),
        d_opt=float(d_opt),
        loss_opt=loss_opt,
        n_interval=(float(n_low), float(n_high)),
        d_interval=(float(d_low), float(d_high)),
        loss_interval=(float(loss_opt - half), float(loss_opt + half)),
        coefficients=(float(c2), float(c1 - 2 * c2 * centre), float(c0 - c1 * centre + c2 * centre**2)),
        log_n_error=float(np.sqrt(gradient @ covariance @ gradient)),
        edge=edge,
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


def akima(table: Table) -> list[Parabola]:
    """Minima of Akima's interpolation of the loss in log N, one for each budget with five sizes or more (Porian et al. 2024,
    arXiv:2406.19146, section 2): no shape is assumed, so that a skewed curve does not pull its minimum. No intervals.
    """
    if "status" in table.columns:
        table = table.select(table.column("status") == "done")
    budget_R, log_n_R, loss_R = budgets(table), np.log(table.column("N_params")), table.column("loss")
    log_nd_R = log_n_R + np.log(table.column("D_tokens"))
    found = []
    for budget in np.unique(budget_R):
        rows = budget_R == budget
        sizes = np.unique(log_n_R[rows])
        if len(sizes) < 5:
            continue
        losses = np.array([loss_R[rows & (log_n_R == size)].mean() for size in sizes])
        curve = interpolate.Akima1DInterpolator(sizes, losses)
        turns = curve.derivative().roots(extrapolate=False)
        candidates = np.concatenate([sizes, turns[np.isfinite(turns)]])
        at = candidates[np.argmin(curve(candidates))]
        edge: Literal["low", "high"] | None = "low" if at == sizes[0] else "high" if at == sizes[-1] else None
        unknown = (np.nan, np.nan)
        found.append(
            Parabola(
                budget=float(budget),
                n=int(rows.sum()),
                n_opt=float(np.exp(at)),
                d_opt=float(np.exp(log_nd_R[rows].mean() - at)),
                loss_opt=float(curve(at)),
                n_interval=unknown,
                d_interval=unknown,
                loss_interval=unknown,
                coefficients=(np.nan, np.nan, np.nan),
                log_n_error=np.nan,
                edge=edge,
            )
        )
    if not found:
        raise BadInput("no budget has five sizes: Akima's interpolation needs five values of N_params at one compute")
    return found


ENVELOPE_POINTS = 1500
"""Values of compute at which the envelope is read (Hoffmann et al. 2022, section 3.1)."""


def envelope(table: Table) -> tuple[np.ndarray, np.ndarray]:
    """(C, N) of the lowest loss for a compute over the training curves of all sizes (Hoffmann et al. 2022, approach 1).

    Rows are points of training curves, or runs of several lengths for each N_params; between them log loss is linear in
    log C. BadInput with fewer than three sizes of two points, or where fewer than three sizes are ever the best.
    """
    log_c_R, loss_R, n_R = np.log(table.column("C_flops")), np.log(table.column("loss")), table.column("N_params")
    curves = {}
    for size in np.unique(n_R):
        rows = np.flatnonzero(n_R == size)
        rows = rows[np.argsort(log_c_R[rows])]
        at, first = np.unique(log_c_R[rows], return_index=True)
        if len(at) > 1:
            curves[size] = at, loss_R[rows][first]
    if len(curves) < 3:
        raise BadInput(f"an envelope needs three sizes with two points of compute each, the table has {len(curves)}")
    log_c = np.linspace(log_c_R.min(), log_c_R.max(), ENVELOPE_POINTS)
    losses = np.array([np.interp(log_c, *curve, left=np.inf, right=np.inf) for curve in curves.values()])
    best = np.array(list(curves))[losses.argmin(0)]
    there = np.isfinite(losses).sum(0) > 1  # one curve alone has no rival
    if len(np.unique(best[there])) < 3:
        raise BadInput("fewer than three sizes are ever the best for their compute: the curves do not overlap enough")
    return np.exp(log_c[there]), best[there]


def interior(curves: Sequence[Parabola]) -> tuple[list[Parabola], np.ndarray]:
    """The minima inside the grid and their standard errors of log N*, ones where not all are known; BadInput below two."""
    inside = [curve for curve in curves if not curve.edge]
    if len(inside) < 2:
        raise BadInput(f"a power law N* ~ C^a needs two budgets with a minimum inside the grid, not {len(inside)}")
    errors = np.array([curve.log_n_error for curve in inside])
    return inside, errors if np.all(np.isfinite(errors) & (errors > 0)) else np.ones(len(inside))


def frontier(curves: Sequence[Parabola]) -> PowerLaw:
    """The power law through the interior minima; BadInput with fewer than two, an interval with three or more.

    Minima weigh by their standard errors; the interval widens where they scatter by more than those say.
    """
    inside, errors = interior(curves)
    x = np.log([curve.budget for curve in inside])
    y = np.log([curve.n_opt for curve in inside])
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
