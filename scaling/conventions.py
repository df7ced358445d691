"""The exponents of a fit under every convention of counting that a table has columns for (scaling/cost.py).

Kaplan et al. 2020 counted without embeddings and found N* ~ C^0.73 where Hoffmann et al. 2022, with them, found C^0.50; much
of the difference is the count (Pearce and Song 2024, arXiv:2406.12907).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from llm_jax.settings import BadInput
from scaling import isoflop, laws
from scaling.fit import Fit, fit
from scaling.frontier import flops_per_token
from scaling.intervals import intervals
from scaling.laws import Law
from scaling.procedures import PROCEDURES
from scaling.tables import Table
from scaling.uncertainty import bootstrap

SIZES = {
    "N_params": "all parameters",
    "N_non_embedding": "without embeddings and head",
    "N_active": "active parameters",
}
COMPUTE = {
    "C_flops": "6ND",
    "C_6N_matrices": "6ND without embeddings",
    "C_with_attention": "that and attention",
    "C_full": "every product",
    "C_hoffmann": "Hoffmann's Appendix F",
}
BUDGETS, GRID, RESAMPLES = 7, 121, 100

Interval = tuple[float, float, float]
"""Value, low and high, 95 %."""


@dataclass(frozen=True)
class Counted:
    """The exponents under one convention."""

    sizes: str
    """The column that stands for N_params; "" where the law reads none."""
    compute: str
    """The column that stands for C_flops; "" likewise."""
    exponents: dict[str, Interval]
    """By parameter; "a" is that of N* ~ C^a."""

    @property
    def name(self) -> str:
        """In words."""
        return ", ".join(filter(None, (SIZES.get(self.sizes), COMPUTE.get(self.compute))))


def under_each(law: Law | str, table: Table, objective: str = "") -> list[Counted]:
    """Fits a law, or runs the procedure of that name, under each convention; [] where the table has one alone."""
    if "status" in table.columns:
        table = table.select(table.column("status") == "done")
    columns = PROCEDURES[law].columns if isinstance(law, str) else law.columns
    allocates = isinstance(law, str) or law.columns == ("N_params", "D_tokens")
    sizes = _different(table, SIZES) if "N_params" in columns else [""]
    compute = _different(table, COMPUTE) if "C_flops" in columns or allocates else [""]
    if len(sizes) * len(compute) < 2:
        return []
    found = []
    if isinstance(law, str):
        for n, c in itertools.product(sizes, compute):
            try:
                found.append(Counted(n, c, {"a": _frontier(law, table, n, c)}))
            except BadInput:  # no minimum inside under this count
                continue
        return found
    for n in sizes:
        counted = Table({**table.columns, "N_params": table.column(n)}) if n else table
        if allocates:
            result = fit(law, counted, objective)
            own = _exponents(result, counted)
            theta_SxP = np.concatenate([result.theta[None], bootstrap(result, counted, RESAMPLES).theta_SxP])
            for c in compute:
                extra = _allocation(law, theta_SxP, counted, c)
                found.append(Counted(n, c, own | ({"a": extra} if extra else {})))
            continue
        for c in compute:
            swapped = Table({**counted.columns, "C_flops": table.column(c)}) if c else counted
            found.append(Counted(n, c, _exponents(fit(law, swapped, objective), swapped)))
    return found


def _different(table: Table, names: Iterable[str]) -> list[str]:
    """Those that are columns of positive numbers, without the ones that are equal to another before them."""
    found: list[str] = []
    for name in names:
        column = table.columns.get(name)
        if column is None or column.dtype.kind != "f" or not (column > 0).all():
            continue
        if not any((column == table.column(other)).all() for other in found):
            found.append(name)
    return found


def _exponents(result: Fit, table: Table) -> dict[str, Interval]:
    ends = intervals(result, table).intervals
    return {
        name: (result.parameters[name], *ends[name])
        for name in result.law.parameters
        if name in ends and name.startswith(laws.GREEK)
    }


def _allocation(law: Law, theta_SxP: np.ndarray, table: Table, compute: str) -> Interval | None:
    """The exponent of N* ~ C^a over the compute of the table, C counted by a column: of the first theta, with the percentiles
    of the others; None where the law has no best size inside of what was tried."""
    log_n_R, per_token = np.log(table.column("N_params")), flops_per_token(table, compute)
    log_c_R = np.log(table.column(compute))
    log_c_C = np.linspace(log_c_R.min(), log_c_R.max(), BUDGETS)
    log_n_G = np.linspace(log_n_R.min() - 1, log_n_R.max() + 1, GRID)
    log_d_CxG = log_c_C[:, None] - np.polyval(per_token, log_n_G)
    x_KxR = np.stack([np.tile(log_n_G, BUDGETS), log_d_CxG.ravel()])
    loss_SxCxG = law.evaluate(theta_SxP, x_KxR)[0].reshape(-1, BUDGETS, GRID)
    at_SxC = loss_SxCxG.argmin(2).clip(1, GRID - 2)
    below, here, above = (np.take_along_axis(loss_SxCxG, at_SxC[..., None] + i, 2)[..., 0] for i in (-1, 0, 1))
    with np.errstate(all="ignore"):
        offset_SxC = np.clip(0.5 * (below - above) / (below - 2 * here + above), -0.5, 0.5)
    inside_SxC = (loss_SxCxG.argmin(2) == at_SxC) & np.isfinite(offset_SxC)
    log_n_SxC = log_n_G[at_SxC] + np.where(inside_SxC, offset_SxC, 0) * (log_n_G[1] - log_n_G[0])
    slopes = np.array(
        [_slope(log_c_C[inside], log_n[inside]) for inside, log_n in zip(inside_SxC, log_n_SxC, strict=True)]
    )
    if not np.isfinite(slopes[0]) or np.isfinite(slopes).mean() < 0.5:
        return None
    low, high = np.nanquantile(slopes[1:], [0.025, 0.975])
    return float(slopes[0]), float(low), float(high)


def _slope(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.polyfit(x, y, 1)[0]) if len(x) > 2 else np.nan


def _frontier(name: str, table: Table, sizes: str, compute: str) -> Interval:
    """The exponent of a procedure. Runs of one budget by one count are not of one budget by another: their losses are moved
    along D to where they would be, by the slope of Chinchilla's law through the whole table."""
    columns = {**table.columns, "N_params": table.column(sizes), "C_flops": table.column(compute)}
    if compute != "C_flops" and name != "envelope":
        budget_R = isoflop.budgets(table)
        log_c_R = np.log(columns["C_flops"])
        middle_R = np.array([log_c_R[budget_R == budget].mean() for budget in budget_R])
        tokens_R = columns["D_tokens"] * np.exp(middle_R - log_c_R)
        law = fit(laws.CHINCHILLA, Table(columns))
        moved_R = law.predict(columns["N_params"], tokens_R) / law.predict(columns["N_params"], columns["D_tokens"])
        columns |= {"D_tokens": tokens_R, "loss": columns["loss"] * moved_R, "C_flops": np.exp(middle_R)}
        columns["budget"] = columns["C_flops"]
    if name == "isoflop":
        power = isoflop.frontier(isoflop.parabolas(Table(columns)))
        return power.exponent, power.low, power.high
    found = PROCEDURES[name].run(Table(columns), "", RESAMPLES)
    low, high = (found.intervals or {}).get("a", (np.nan, np.nan))
    return found.parameters["a"], low, high


def warnings(found: Sequence[Counted]) -> list[str]:
    """Where two counts give exponents neither of which lies in the other's interval: the farthest pair of each exponent."""
    told = []
    for name in dict.fromkeys(key for one in found for key in one.exponents):
        having = [one for one in found if name in one.exponents]
        apart = [
            (abs(one.exponents[name][0] - other.exponents[name][0]), one, other)
            for one, other in itertools.combinations(having, 2)
            if _outside(one.exponents[name][0], other.exponents[name])
            and _outside(other.exponents[name][0], one.exponents[name])
        ]
        if apart:
            _, one, other = max(apart, key=lambda pair: pair[0])
            shown = "N* ~ C^a" if name == "a" else name
            told.append(
                f"the count decides: {shown} has {_text(one.exponents[name])} ({one.name}) and "
                f"{_text(other.exponents[name])} ({other.name}); say which is meant"
            )
    return told


def _outside(value: float, interval: Interval) -> bool:
    return not interval[1] <= value <= interval[2] and not np.isnan(interval[1:]).any()


def _text(exponent: Interval) -> str:
    value, low, high = exponent
    return f"{value:.3f}" + ("" if np.isnan(low) else f" [{low:.3f}, {high:.3f}]")


def describe(found: Sequence[Counted]) -> str:
    """A line a convention, a column an exponent."""
    names = list(dict.fromkeys(key for one in found for key in one.exponents))
    lines = [["counted by", *("N* ~ C^a" if name == "a" else name for name in names)]]
    lines += [[one.name, *(_text(one.exponents[n]) if n in one.exponents else "" for n in names)] for one in found]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)
