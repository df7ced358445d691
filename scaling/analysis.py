"""What a table says: the fit with its intervals, the isoFLOP minima, and all warnings."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax import files
from llm_jax.settings import BadInput, did_you_mean
from scaling import checks, conventions, frontier, isoflop, laws, ledger, misfit, tables, uncertainty
from scaling import fit as fitting
from scaling import intervals as interval_methods
from scaling.conventions import Counted
from scaling.fit import Fit
from scaling.intervals import Intervals, parse_ci
from scaling.isoflop import Parabola
from scaling.laws.law import STARTS
from scaling.procedures import PROCEDURES, Procedure
from scaling.tables import Table, finite
from scaling.uncertainty import Bootstrap

PRINTED = ("law", "n", "objective", "parameters", "warnings")
"""Keys of what `llm-jax fit --json` prints; "conventions" is one more where they are asked for."""

Ends = dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Analysis:
    """A table and what was found in it."""

    table: Table
    law: str
    formula: str
    source: str
    columns: tuple[str, ...]
    n: int
    objective: str
    value: float
    parameters: dict[str, float]
    by_method: dict[str, Ends]
    """95 %: {method: {parameter: (low, high)}}, infinite where the data gives no bound; the first is the one to quote."""
    unbounded: frozenset[str]
    """Parameters that the data does not bound on one side or the other."""
    warnings: list[str]
    parabolas: list[Parabola] = field(default_factory=list)
    conventions: list[Counted] = field(default_factory=list)
    fit: Fit | None = None
    """None for a procedure, which fits no one law."""
    found: list[Intervals] = field(default_factory=list)
    """What `by_method` is made of; empty for a procedure."""

    @property
    def intervals(self) -> Ends | None:
        """Those to quote."""
        return next(iter(self.by_method.values()), None)

    @property
    def bootstrap(self) -> Bootstrap | None:
        """The resamples, where there are any."""
        return next((one.bootstrap for one in self.found if one.bootstrap), None)

    def to_dict(self) -> dict[str, Any]:
        """All that was found, for the report and for RUN/fit.json."""
        parameters: dict[str, dict[str, Any]] = {}
        for name, value in self.parameters.items():
            interval = (self.intervals or {}).get(name)
            parameters[name] = {
                "value": value,
                "interval": list(interval) if interval else None,
                "unbounded": name in self.unbounded,
            }
            if len(self.by_method) > 1 and interval:
                parameters[name]["intervals"] = {method: list(ends[name]) for method, ends in self.by_method.items()}
        found: dict[str, Any] = {
            "law": self.law,
            "formula": self.formula,
            "source": self.source,
            "columns": list(self.columns),
            "n": self.n,
            "objective": {"name": self.objective, "value": self.value},
            "parameters": parameters,
            "warnings": self.warnings,
        }
        if self.fit:
            found["held"] = sorted(self.fit.held)
            optimizer = "damped Gauss-Newton steps (Levenberg-Marquardt), all starts side by side"
            found["search"] = {"optimizer": optimizer, "starts": STARTS, "agreeing": self.fit.starts_agreeing}
        if self.bootstrap:
            found["bootstrap"] = {"samples": len(self.bootstrap.theta_SxP), "by": self.bootstrap.drawn}
        if self.parabolas:
            found["isoflop"] = [_parabola(one) for one in self.parabolas]
        if self.conventions:
            found["conventions"] = [
                {
                    "count": one.name,
                    "N": one.sizes,
                    "C": one.compute,
                    "exponents": {name: list(values) for name, values in one.exponents.items()},
                }
                for one in self.conventions
            ]
        return found

    def to_json(self, with_conventions: bool = False) -> str:
        """What `llm-jax fit --json` prints: PRINTED of `to_dict`, on one line."""
        found = {"conventions": []} | self.to_dict()
        return json.dumps(finite({name: found[name] for name in (*PRINTED, *["conventions"] * with_conventions)}))

    def summary(self, with_conventions: bool = False) -> str:
        """What `llm-jax fit` prints for people: the law, its numbers, the isoFLOP minima, then all warnings."""
        lines = [f"{self.law}: {self.formula}", *self._parameter_lines()]
        told = f"  {self.n} rows, {self.objective} {self.value:.6g}"
        if self.fit:
            rms = float(np.sqrt(np.mean(self.fit.residuals**2)))
            told += f", residual rms {f'{100 * rms:.2f} %' if self.fit.law.log else f'{rms:.3g}'}"
            told += f"; {100 * self.fit.starts_agreeing:.0f} % of {STARTS} starts agree"
        lines.append(told)
        if self.found:
            lines += self._correlation_lines(self.found[0])
        lines += self._optimum_lines()
        for one in self.parabolas:
            low, high = (end if end == end else limit for end, limit in zip(one.n_interval, (0, math.inf), strict=True))
            at, n = f"{one.budget:.3g}", f"{one.n_opt:.3g} [{low:.3g}, {high:.3g}]"
            lines.append(f"  isoFLOP minimum at C = {at}: N* = {n}, D* = {one.d_opt:.3g}, loss {one.loss_opt:.4f}")
        if with_conventions and self.conventions:
            lines += ["", *(f"  {line}" for line in conventions.describe(self.conventions).splitlines())]
        return "\n".join([*lines, *(f"  warning: {warning}" for warning in self.warnings)])

    def _parameter_lines(self) -> list[str]:
        around = {one.method: f" ({one.objective})" for one in self.found if one.objective != self.objective}
        rows = [["", "", *(f"95 % by {method}{around.get(method, '')}" for method in self.by_method)]]
        for name, value in self.parameters.items():
            shown = [_ends(ends[name]) if name in ends else "" for ends in self.by_method.values()]
            held = ["held"] if self.fit and name in self.fit.held else []
            rows.append([name, f"{value:.6g}", *(held or shown)])
        width = max(map(len, rows))
        rows = [row + [""] * (width - len(row)) for row in rows]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        text = ["  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        return text if self.by_method else text[1:]

    def _optimum_lines(self) -> list[str]:
        """The best size and tokens at the table's largest compute and at ten times that."""
        if not (self.fit and self.bootstrap):
            return []
        largest = float(self.table.column("C_flops").max()) if "C_flops" in self.table.columns else 0.0
        best = frontier.bands(self.fit, self.bootstrap, self.table, (largest, 10 * largest)) if largest else None
        if best is None:
            return []
        lines = []
        for i, compute in enumerate(best["C"]):
            n, d = ([best[f"{name}_{end}"][i] for end in ("opt", "low", "high")] for name in "ND")
            shown = (f"{name}* = {v[0]:.3g} [{v[1]:.3g}, {v[2]:.3g}]" for name, v in (("N", n), ("D", d)))
            lines.append(f"  compute-optimal at C = {compute:.3g}: {', '.join(shown)}, D*/N* = {d[0] / n[0]:.3g}")
        return lines

    def _correlation_lines(self, found: Intervals) -> list[str]:
        names = list(found.intervals)
        at = [list(self.parameters).index(name) for name in names]
        width = max(5, *map(len, names))
        lines = ["  correlations  " + " ".join(name.rjust(width) for name in names)] if len(names) > 1 else []
        for place, i in enumerate(at[1:], 1):
            shown = (found.correlations_PxP[i, j] for j in at[:place])
            cells = " ".join((f"{value:.2f}" if np.isfinite(value) else "").rjust(width) for value in shown)
            lines.append(f"    {names[place]:<12}{cells}".rstrip())
        return lines


def _ends(interval: tuple[float, float]) -> str:
    low, high = interval
    if np.isinf(low) and np.isinf(high):
        return "unbounded"
    if np.isinf(low):
        return f"unbounded below, to {high:.4g}"
    return f"unbounded above, from {low:.4g}" if np.isinf(high) else f"[{low:.4g}, {high:.4g}]"


def analyse(
    table: Table,
    law: str,
    objective: str = "",
    ci: str = "all",
    hold: Mapping[str, float] | None = None,
    cluster: str = "",
) -> Analysis:
    """Fits a law, says how well the table determines it, and looks for what would make the numbers misleading.

    `objective` as in fit.fit; `ci` as in intervals.parse_ci; `hold` gives parameters their values; `cluster` names the column
    whose equal values mark rows that share their noise.
    """
    methods, samples = parse_ci(ci)
    if law in PROCEDURES:
        if hold or cluster:
            raise BadInput(f"{law} fits no one law: --{'hold' if hold else 'cluster'} has no meaning for it")
        return _procedure(table, PROCEDURES[law], objective, methods, samples)
    chosen = named(law, table.columns)
    fitted = fitting.fit(chosen, table, objective, hold)
    found = [interval_methods.intervals(fitted, table, one, cluster=cluster, samples=samples) for one in methods]
    open_ends = uncertainty.open_ends(fitted, table)
    by_method = {one.method: _opened(one.intervals, open_ends) for one in found}
    rough = found[0] if found else interval_methods.intervals(fitted, table, "hessian")
    ends = _opened(rough.intervals, open_ends)
    unbounded = (
        set(fitted.at_bound) | set(open_ends) | {name for name, end in ends.items() if found and np.isinf(end).any()}
    )
    parameters = dict(fitted.parameters)
    if fitted.sigma is not None:
        parameters["sigma"] = fitted.sigma
    # Any table has runs of like compute; those of one that names its budgets were meant to be compared.
    try:
        budget_R = table.columns.get("budget")  # empty where the trials were given tokens and not compute
        budgeted = budget_R is not None and budget_R.dtype.kind == "f" and chosen.target == "loss"
        parabolas = isoflop.parabolas(table) if budgeted else []
    except BadInput:
        parabolas = []
    counted = conventions.under_each(chosen, table, objective) if methods and not hold else []
    warnings = [
        *fitted.warnings,
        *checks.open_sides(fitted, open_ends),
        *filter(None, [misfit.warning(fitted, table, cluster)]),
        *checks.outliers(fitted, by_method.get("profile", {}), rough.objective),
        *checks.disagreement(fitted, table, ends),
        *(one.warning for one in parabolas if one.warning),
        *checks.repetition(table, chosen),
        *checks.decay(table),
        *checks.shared_noise(table, cluster),
        *conventions.warnings(counted),
    ]
    return Analysis(
        table=table,
        law=fitted.law.name,
        formula=fitted.law.formula,
        source=fitted.law.source,
        columns=fitted.law.columns,
        n=fitted.n,
        objective=fitted.objective,
        value=fitted.value,
        parameters=parameters,
        by_method=by_method,
        unbounded=frozenset(unbounded),
        warnings=warnings,
        parabolas=parabolas,
        conventions=counted,
        fit=fitted,
        found=found,
    )


def _opened(intervals: Ends, open_ends: Mapping[str, tuple[str, ...]]) -> Ends:
    """Intervals without an end where the fit's own objective has none either: a robust loss may see one where it sees none."""
    return {
        name: (
            -math.inf if "lower" in open_ends.get(name, ()) else low,
            math.inf if "upper" in open_ends.get(name, ()) else high,
        )
        for name, (low, high) in intervals.items()
    }


def named(law: str, columns: Iterable[str] = ()) -> laws.Law:
    """laws.by_name, whose answer to a wrong name knows the procedures too."""
    if law not in laws.LAWS and ":" not in law:
        raise BadInput(f'"{law}" names no scaling law{did_you_mean(law, [*laws.LAWS, *PROCEDURES])}')
    return laws.by_name(law, columns)


def listing() -> str:
    """What `llm-jax fit --list` prints: a line for every law and every procedure, then how to give one's own."""
    lines = [*(law.line for law in laws.LAWS.values()), *(one.line for one in PROCEDURES.values())]
    return "\n".join([*lines, "path/to/file.py:function  a law of your own"])


def _procedure(table: Table, procedure: Procedure, objective: str, methods: Sequence[str], samples: int) -> Analysis:
    if methods and "bootstrap" not in methods:
        raise BadInput(f"{procedure.name} has intervals by bootstrap alone, not by {methods[0]}")
    found = procedure.run(table, objective, samples if methods else 0)
    skew = filter(None, [misfit.skewed(table)]) if procedure.name == "isoflop" else ()
    allocates = bool(methods) and procedure.columns[-1] == "C_flops"
    counted = conventions.under_each(procedure.name, table) if allocates else []
    return Analysis(
        table=table,
        law=procedure.name,
        formula=procedure.formula,
        source=procedure.source,
        columns=procedure.columns,
        n=found.n,
        objective=found.objective,
        value=found.value,
        parameters=found.parameters,
        by_method={"bootstrap": found.intervals} if found.intervals else {},
        unbounded=frozenset(),
        warnings=[*found.warnings, *skew, *checks.decay(table), *conventions.warnings(counted)],
        conventions=counted,
    )


def read_table(path: Path, where: str = "") -> Table:
    """The rows of a run directory or a CSV for which `where` holds. BadInput where there are none."""
    if files.is_dir(path):
        ledger.describe(path)
        if not files.exists(path / "table.csv"):
            raise BadInput(f"{path} has no finished trial; see llm-jax status {path}")
    table = tables.read(path)
    return table.where(where) if where else table


def held(words: Sequence[str]) -> dict[str, float]:
    """{NAME: VALUE} of texts NAME=VALUE."""
    return dict(map(_held, words))


def _held(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name.strip(), float(value)
    except ValueError:
        raise BadInput(f'--hold takes NAME=VALUE, as in E=1.7; got "{text}"') from None


def _parabola(one: Parabola) -> dict[str, Any]:
    return finite(
        {
            "budget": one.budget,
            "coefficients": list(one.coefficients),
            "N_opt": one.n_opt,
            "N_opt_interval": list(one.n_interval),
            "D_opt": one.d_opt,
            "loss_opt": one.loss_opt,
            "edge": one.edge,
        }
    )
