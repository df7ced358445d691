"""What a compute budget buys by the law "chinchilla", and which further runs would say so more sharply.

Everything follows from L = E + A / N^alpha + B / D^beta and C = 6 N D. Intervals are percentiles of bootstrap refits at 95 %:
they hold the form of the law to be true, and so say nothing of how it may fail far beyond the table.

Letters of array names: S resamples, P parameters of the law, Q candidate runs, R rows of the table.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax import files
from llm_jax.settings import BadInput
from scaling import design, laws, ledger, tables, uncertainty
from scaling import fit as fitting
from scaling.fit import Fit
from scaling.hardware import Budget
from scaling.tables import Table

FAR = 10.0
"""Beyond this multiple of the largest compute in the table a prediction comes with a warning."""
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Sizes whose cost is shown, as multiples of N*."""
LOST = 0.025
"""Share of refits without an optimum beyond which an interval at 95 % has no end."""
LEVELS = 8
"""Sizes of budget of candidate runs, at equal ratios up to the whole sweep's."""
SMALLEST = 1 / 128
"""Of the sweep's budget: the cheapest candidate, or the table's cheapest run where that costs more. A law is a poor guide
below its own table, and by the law alone many tiny runs would look best."""
SIZES = 2.0 ** np.arange(-2.0, 2.01, 0.5)
"""Sizes of candidate runs at each compute, as multiples of N* there: an isoFLOP grid."""
SINGULAR = 1e12
"""Condition of the information beyond which the table does not determine the law."""

Parameters = Mapping[str, Any]
"""A, B, E, alpha and beta, all but E positive: numbers, or arrays with one a resample."""


def loss_at(p: Parameters, n_params: Any, d_tokens: Any) -> Any:
    """E + A / N^alpha + B / D^beta, nats a token; arguments broadcast."""
    return p["E"] + p["A"] * n_params ** -p["alpha"] + p["B"] * d_tokens ** -p["beta"]


def optimal_sizes(p: Parameters, compute: Any) -> tuple[Any, Any]:
    """laws.optimum for arrays: (N*, D*) of least loss under C = 6 N D."""
    balance = np.log(p["alpha"] * p["A"] / (p["beta"] * p["B"]))
    n_params = np.exp((balance + p["beta"] * np.log(compute / 6)) / (p["alpha"] + p["beta"]))
    return n_params, compute / 6 / n_params


def extra_compute(p: Parameters, n_params: Any, d_tokens: Any) -> Any:
    """Share of compute that a run spends beyond what the compute-optimal run of the same loss needs: 0.1 is 10 % more.

    Along the optimum L - E falls as C^-g with g = alpha beta / (alpha + beta) (Hoffmann et al. 2022, eq. 4 in eq. 2).
    """
    best = loss_at(p, *optimal_sizes(p, 6 * n_params * d_tokens))
    exponent = p["alpha"] * p["beta"] / (p["alpha"] + p["beta"])
    return ((loss_at(p, n_params, d_tokens) - p["E"]) / (best - p["E"])) ** (1 / exponent) - 1


def serving_sizes(p: Parameters, loss: Any, served_tokens: float) -> tuple[Any, Any]:
    """(N, D) of least 6 N D + 2 N served_tokens at a given loss (Sardana et al. 2024, arXiv:2401.00448, section 2).

    With r = alpha A N^-alpha / (beta B D^-beta), 1 where nothing is served, the slope of that sum along the curve of equal
    loss is zero where D (r - 1) = served_tokens / 3. The log of that equation is convex in v = log(r - 1) and rises by at
    least 1 a unit, so that Newton's steps from above come down to its only root.
    """
    excess, ratio, wanted = loss - p["E"], p["beta"] / p["alpha"], np.log(served_tokens / 3)

    def log_tokens(v: Any) -> Any:
        return (np.log(p["B"] / excess) + np.log1p(ratio * (1 + np.exp(v)))) / p["beta"]

    v = wanted - log_tokens(-np.inf)
    for _ in range(50):
        rise = 1 + ratio * np.exp(v) / (1 + ratio + ratio * np.exp(v)) / p["beta"]
        v = v - (v + log_tokens(v) - wanted) / rise
    odds = ratio * (1 + np.exp(v))  # of A / N^alpha against B / D^beta in the excess
    return (p["A"] * (1 + odds) / (odds * excess)) ** (1 / p["alpha"]), np.exp(log_tokens(v))


def log_slopes(p: Parameters, n_params: np.ndarray, d_tokens: np.ndarray, centre: tuple[float, float]) -> np.ndarray:
    """QxP: slopes of log loss in log A, log B, log E, alpha and beta, with N and D in units of `centre`."""
    whole = loss_at(p, n_params, d_tokens)
    by_a, by_b = p["A"] * n_params ** -p["alpha"] / whole, p["B"] * d_tokens ** -p["beta"] / whole
    # Centred, A and alpha are no longer all but collinear; what the law predicts is the same.
    by_alpha, by_beta = -by_a * np.log(n_params / centre[0]), -by_b * np.log(d_tokens / centre[1])
    return np.stack([by_a, by_b, p["E"] / whole, by_alpha, by_beta], 1)


def next_sweep(fitted: Fit, table: Table, target: float, budget: float, runs: int) -> dict[str, Any] | None:
    """The runs, `budget` FLOPs in all, that should narrow the interval of the least loss at `target` FLOPs the most.

    Candidates are isoFLOP grids around N* at LEVELS budgets. The width is that of the delta method: the law linear in its
    parameters, noise of a run as in the fit's residuals, parameters at a bound of the fit known. `width_ratio` is the width
    after a run and those before it in the list, over that of today. None where the table leaves the law open.
    """
    p = fitted.parameters
    n_R, d_R = table.column("N_params"), table.column("D_tokens")
    cheapest = min(budget, max(SMALLEST * budget, float((6 * n_R * d_R).min())))
    compute_Q = np.repeat(np.geomspace(cheapest, budget, LEVELS), len(SIZES))
    n_Q = optimal_sizes(p, compute_Q)[0] * np.tile(SIZES, LEVELS)
    d_Q = compute_Q / 6 / n_Q
    centre = float(np.exp(np.log(n_R).mean())), float(np.exp(np.log(d_R).mean()))
    free = np.array([name not in fitted.at_bound for name in ("A", "B", "E", "alpha", "beta")])
    n, d = optimal_sizes(p, target)
    known_RxP = log_slopes(p, n_R, d_R, centre)[:, free]
    candidates_QxP = log_slopes(p, n_Q, d_Q, centre)[:, free]
    wanted_P = log_slopes(p, np.array([n]), np.array([d]), centre)[0, free]
    information = known_RxP.T @ known_RxP
    if np.linalg.cond(information) > SINGULAR:
        return None
    chosen = design.choose_runs(candidates_QxP, compute_Q, information, wanted_P, budget, runs)
    today = design.spread(candidates_QxP[:0], information, wanted_P)
    noise = float(np.sqrt(np.sum(fitted.residuals**2) / max(1, fitted.n - free.sum())))
    return {
        "compute": float(compute_Q[chosen].sum()),
        "candidates": len(n_Q),
        "half_width_linear": 1.96 * noise * today * float(loss_at(p, n, d)),
        "runs": [
            {
                "N": float(n_Q[q]),
                "D": float(d_Q[q]),
                "C": float(compute_Q[q]),
                "width_ratio": design.spread(candidates_QxP[chosen[: i + 1]], information, wanted_P) / today,
            }
            for i, q in enumerate(chosen)
        ],
    }


def plan(path: Path, budget: Budget, where: str = "", **choices: Any) -> dict[str, Any]:
    """`plan_table` of a run directory or a CSV, of the rows for which `where` holds."""
    if files.is_dir(path):
        ledger.describe(path)
        if not files.exists(path / "table.csv"):
            raise BadInput(f"{path} has no finished trial; see llm-jax status {path}")
    return plan_table(tables.read(path).where(where), budget, **choices)


def plan_table(
    table: Table,
    budget: Budget,
    served_tokens: float | None = None,
    sweep_share: float = 0.1,
    sweep_runs: int = 8,
    objective: str = "huber:1e-3",
    samples: int = 1000,
) -> dict[str, Any]:
    """What `llm-jax plan --json` prints; an interval without an end is infinite.

    BadInput for what cannot be fitted, and where the fit has no compute-optimal size.
    """
    _check(served_tokens, sweep_share, sweep_runs, samples)
    fitted = fitting.fit(laws.by_name("chinchilla"), table, objective)
    if lost := sorted({"A", "B", "alpha", "beta"} & set(fitted.at_bound)):
        raise BadInput(f"no compute-optimal size: the table does not determine {' and '.join(lost)}; add runs")
    laws.optimum(fitted.parameters, budget.compute)  # refuses a law without one
    resampled = uncertainty.bootstrap(fitted, table, samples).parameters
    usable = np.all([np.asarray(resampled[name]) > 0 for name in ("A", "B", "alpha", "beta")], axis=0)
    sampled = {name: np.asarray(values)[usable] for name, values in resampled.items()}
    lost_share = float(np.mean(~usable))

    def figure(of: Callable[[Parameters], Any]) -> dict[str, Any]:
        with np.errstate(all="ignore"):  # a refit may know no scale at all
            low, high = (-math.inf, math.inf) if lost_share > LOST else _interval(of(sampled))
            return {"value": float(of(fitted.parameters)), "interval": [low, high]}

    def best(p: Parameters) -> tuple[Any, Any]:
        return optimal_sizes(p, budget.compute)

    def extra(factor: float) -> dict[str, Any]:
        return figure(lambda p: extra_compute(p, n * factor, d / factor))

    n, d = best(fitted.parameters)
    optimum = {
        "N": figure(lambda p: best(p)[0]),
        "D": figure(lambda p: best(p)[1]),
        "tokens_per_parameter": figure(lambda p: best(p)[1] / best(p)[0]),
        "loss": figure(lambda p: loss_at(p, *best(p))),
    }
    deviations = [
        {
            "factor": factor,
            "N": float(n * factor),
            "D": float(d / factor),
            "loss": float(loss_at(fitted.parameters, n * factor, d / factor)),
            "extra_compute": extra(factor),
        }
        for factor in FACTORS
    ]
    serving = None
    if served_tokens is not None:

        def served(p: Parameters) -> tuple[Any, Any]:
            return serving_sizes(p, loss_at(p, *best(p)), served_tokens)

        def cost(sizes: tuple[Any, Any]) -> Any:
            return 6 * sizes[0] * sizes[1] + 2 * sizes[0] * served_tokens

        serving = {
            "served_tokens": served_tokens,
            "N": figure(lambda p: served(p)[0]),
            "D": figure(lambda p: served(p)[1]),
            "training_compute": float(np.prod(served(fitted.parameters))) * 6,
            "total_compute": float(cost(served(fitted.parameters))),
            "total_compute_chinchilla": float(cost((n, d))),
            "saved_share": figure(lambda p: 1 - cost(served(p)) / cost(best(p))),
        }
    done = table.select(table.column("status") == "done") if "status" in table.columns else table
    sweep = next_sweep(fitted, done, budget.compute, sweep_share * budget.compute, sweep_runs)
    extrapolation = budget.compute / float((6 * done.column("N_params") * done.column("D_tokens")).max())
    half_width = (optimum["loss"]["interval"][1] - optimum["loss"]["interval"][0]) / 2
    return {
        "law": fitted.law.name,
        "n": fitted.n,
        "objective": {"name": fitted.objective, "value": fitted.value},
        "parameters": {name: figure(operator.itemgetter(name)) for name in fitted.parameters},
        "budget": dataclasses.asdict(budget),
        "extrapolation": extrapolation,
        "optimum": optimum,
        "deviations": deviations,
        "serving": serving,
        "sweep": sweep and {"half_width": half_width, **sweep},
        "warnings": [*fitted.warnings, *_warnings(extrapolation, lost_share, half_width, sweep)],
    }


def _check(served_tokens: float | None, sweep_share: float, sweep_runs: int, samples: int) -> None:
    if served_tokens is not None and not 0 < served_tokens < math.inf:
        raise BadInput(f"--served_tokens must be positive and finite, got {served_tokens:g}")
    if not 0 < sweep_share <= 1:
        raise BadInput(f"--sweep_share is a share of the budget in (0, 1], such as 0.1; got {sweep_share:g}")
    if not 1 <= sweep_runs <= 50:
        raise BadInput(f"--sweep_runs must lie in 1 to 50, got {sweep_runs}")
    if samples < 100:
        raise BadInput(f"--bootstrap must be at least 100 for intervals at 95 %, got {samples}")


def _interval(values_S: np.ndarray) -> tuple[float, float]:
    """2.5th and 97.5th percentile as values that occurred: between finite and infinite ones there is no mean."""
    low, high = (float(np.quantile(values_S, at, method="closest_observation")) for at in (0.025, 0.975))
    return low, high


def _warnings(extrapolation: float, lost_share: float, half_width: float, sweep: dict[str, Any] | None) -> list[str]:
    warnings = []
    if extrapolation > FAR:
        warnings.append(
            f"the budget is {extrapolation:.3g} times the largest run of the table; beyond {FAR:g} times no interval here holds:"
            " it takes the form of the law for true"
        )
    if lost_share:
        rest = "there is no interval" if lost_share > LOST else "they are left out of the intervals"
        warnings.append(f"{lost_share:.1%} of the bootstrap refits have no compute-optimal size: {rest}")
    if sweep is None:
        warnings.append("no next sweep: the table leaves the law open, so that nothing can be said of further runs")
    elif math.isfinite(half_width) and not 0.5 <= sweep["half_width_linear"] / half_width <= 2:
        warnings.append(
            f"half-width of the loss: {half_width:.3g} by the bootstrap, {sweep['half_width_linear']:.3g} by the linearised"
            " law: read what the next sweep promises as an order of magnitude"
        )
    return warnings


# ---- In words ----


def describe(planned: Mapping[str, Any]) -> str:
    """The plan for people, in lines of at most 80 columns."""
    budget, optimum = planned["budget"], planned["optimum"]
    lines = [f"{planned['law']} on {planned['n']} runs; 95 % intervals are of the law, not of one run", ""]
    lines.append(
        f"budget   {budget['compute']:.3g} FLOPs, {planned['extrapolation']:.3g} times the largest run of the table"
    )
    if budget["chip"]:
        price = f", at a price of {_plain(budget['price'])}" if budget["price"] is not None else ""
        lines.append(
            f"         {_plain(budget['device_hours'])} hours of {budget['chip']} at MFU {budget['mfu']:g}{price}"
        )
    lines += ["", "compute-optimal"]
    for name, label, show in (
        ("N", "parameters", count),
        ("D", "tokens", count),
        ("tokens_per_parameter", "tokens a parameter", _three),
        ("loss", "loss", "{:.4f}".format),
    ):
        lines.append(f"  {label:20}{show(optimum[name]['value']):>8}   {_between(optimum[name]['interval'], show)}")
    lines += [
        "",
        "other sizes at the same compute; extra is what they spend beyond the",
        "compute-optimal run of their loss",
    ]
    lines.append("   N / N*       N        D    tokens/N    loss   extra")
    for row in planned["deviations"]:
        extra = row["extra_compute"]
        lines.append(
            f"  {row['factor']:>6g}{count(row['N']):>9}{count(row['D']):>9}{_three(row['D'] / row['N']):>10}{row['loss']:>9.4f}"
            f"{_percent(extra['value']):>8}   {_between(extra['interval'], _percent)}"
        )
    if serving := planned["serving"]:
        ratio = serving["training_compute"] / budget["compute"]
        lines += [
            "",
            f"serving {count(serving['served_tokens'])} tokens at the same loss, least 6 N D + 2 N served",
            f"  {'parameters':20}{count(serving['N']['value']):>8}   {_between(serving['N']['interval'], count)}",
            f"  {'tokens':20}{count(serving['D']['value']):>8}   {_between(serving['D']['interval'], count)}",
            f"  {'training FLOPs':20}{serving['training_compute']:>8.3g}   {_percent(ratio - 1)} more than compute-optimal",
            f"  {'total FLOPs':20}{serving['total_compute']:>8.3g}   against {serving['total_compute_chinchilla']:.3g}",
            f"  {'saved':20}{_percent(serving['saved_share']['value']):>8}   "
            f"{_between(serving['saved_share']['interval'], _percent)}",
        ]
    if sweep := planned["sweep"]:
        linear = sweep["half_width_linear"]
        today = sweep["half_width"] if math.isfinite(sweep["half_width"]) else linear
        lines += [
            "",
            f"next sweep: {len(sweep['runs'])} runs, {sweep['compute']:.3g} FLOPs, {_percent(sweep['compute'] / budget['compute'])}"
            " of the budget; best buys first",
            "  runs        N        D     FLOPs   half-width of the optimal loss, after them",
            f"{'today':>34}   {today:.4f}   (linearised law: {linear:.4f})",
        ]
        for times, run in _repeats(sweep["runs"]):
            width = f"{today * run['width_ratio']:.4f}   {_percent(run['width_ratio'])}"
            lines.append(f"{times:>6}{count(run['N']):>9}{count(run['D']):>9}{run['C']:>10.2e}   {width}")
        lines += [
            "  expected: the bootstrap's width of today, times the linearised law's ratio;",
            "  repeated runs take seeds of their own",
        ]
    for number, warning in enumerate(planned["warnings"]):
        lines += [""] * (number == 0) + textwrap.wrap(f"warning: {warning}", 80, subsequent_indent="  ")
    return "\n".join(lines)


def _repeats(runs: list[dict[str, Any]]) -> list[tuple[int, dict[str, Any]]]:
    """(times, the last of them) of equal runs that follow each other."""
    groups = [list(group) for _, group in itertools.groupby(runs, key=lambda run: (run["N"], run["C"]))]
    return [(len(group), group[-1]) for group in groups]


def count(value: float) -> str:
    """Three digits with k, M, B (1e9) or T (1e12): 1.23 B; powers of ten beyond."""
    if not 1 <= value < 999.5e12:
        return f"{value:.3g}"
    power = min(4, math.floor(math.log10(float(f"{value:.3g}")) / 3))
    return f"{_three(value / 1000**power)} {' kMBT'[power]}".rstrip()


def _three(value: float) -> str:
    return f"{value:#.3g}".rstrip(".") if 0.1 <= value < 999.5 else f"{value:.3g}"


def _plain(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %" if abs(value) < 1 else f"{100 * value:.3g} %"


def _between(interval: list[float], show: Callable[[float], str]) -> str:
    """[low, high]; an infinite end is written as such."""
    if not any(map(math.isfinite, interval)):
        return "no interval"
    low, high = (show(end) if math.isfinite(end) else "∞" for end in interval)
    return f"[{low}, {high}]"
