"""What a table says: the fit with its intervals, the isoFLOP minima, the warnings; and the report that is made of them."""

from __future__ import annotations

import dataclasses
import json
import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax import files
from llm_jax.config import BadInput, did_you_mean
from scaling import fit as fitting
from scaling import forecast, isoflop, laws, ledger, report, tables, uncertainty
from scaling.fit import Fit
from scaling.isoflop import Parabola
from scaling.procedures import PROCEDURES, Procedure
from scaling.tables import Table, finite
from scaling.uncertainty import Bootstrap

MANY_EPOCHS = 4
"""Muennighoff et al. 2023: up to about four epochs repeated tokens are worth nearly as much as new ones."""
BAND_POINTS = 41


PRINTED = ("law", "n", "objective", "parameters", "warnings")
"""Keys of what `llm-jax fit --json` prints."""


@dataclass(frozen=True)
class Analysis:
    """A table and what was found in it."""

    table: Table
    law: str
    formula: str
    n: int
    objective: str
    value: float
    parameters: dict[str, float]
    intervals: dict[str, tuple[float, float]] | None
    """95 %, by parameter."""
    unbounded: frozenset[str]
    """Parameters that the data does not bound on one side or the other."""
    warnings: list[str]
    parabolas: list[Parabola]
    fit: Fit | None
    """None for a procedure, which fits no one law."""
    bootstrap: Bootstrap | None

    def to_dict(self) -> dict[str, Any]:
        """All that was found, for the report and for RUN/fit.json."""
        parameters = {}
        for name, value in self.parameters.items():
            interval = self.intervals.get(name) if self.intervals else None
            parameters[name] = {
                "value": value,
                "interval": list(interval) if interval else None,
                "unbounded": name in self.unbounded,
            }
        found: dict[str, Any] = {
            "law": self.law,
            "formula": self.formula,
            "n": self.n,
            "objective": {"name": self.objective, "value": self.value},
            "parameters": parameters,
            "warnings": self.warnings,
        }
        if self.parabolas:
            found["isoflop"] = [_parabola(one) for one in self.parabolas]
        return found

    def to_json(self) -> str:
        """What `llm-jax fit --json` prints: PRINTED of `to_dict`, on one line."""
        found = self.to_dict()
        return json.dumps(finite({name: found[name] for name in PRINTED}))

    def summary(self) -> str:
        """What `llm-jax fit` prints for people: the law, its numbers, the isoFLOP minima, then all warnings."""
        if self.fit:
            text = dataclasses.replace(self.fit, warnings=()).summary(self.intervals)  # they are among ours
        else:
            lines = [f"{self.law}: {self.formula}"]
            for name, value in self.parameters.items():
                given = self.intervals.get(name) if self.intervals else None
                lines.append(
                    f"  {name:<6} {value:<10.6g}" + (f"  95% [{given[0]:.4g}, {given[1]:.4g}]" if given else "")
                )
            text = "\n".join(line.rstrip() for line in [*lines, f"  {self.n} rows, {self.objective} {self.value:.6g}"])
        for one in self.parabolas:
            low, high = (end if end == end else limit for end, limit in zip(one.n_interval, (0, math.inf), strict=True))
            text += f"\n  C = {one.budget:.3g}: N* = {one.n_opt:.3g} [{low:.3g}, {high:.3g}], D* = {one.d_opt:.3g}, loss {one.loss_opt:.4f}"
        return "\n".join([text, *(f"  warning: {warning}" for warning in self.warnings)])


def analyse(
    table: Table, law: str, objective: str = "", ci: str = "bootstrap", hold: Mapping[str, float] | None = None
) -> Analysis:
    """Fits a law, resamples it, and looks for what would make the numbers misleading.

    `objective` as in fit.fit; `ci` is "none", "bootstrap" or "bootstrap:N"; `hold` gives parameters their values.
    """
    _, samples = uncertainty.parse_intervals(ci)
    if law in PROCEDURES:
        if hold:
            raise BadInput(f"{law} has nothing to hold: it fits no one law")
        return _procedure(table, PROCEDURES[law], objective, samples)
    chosen = named(law, table.columns)
    fitted = fitting.fit(chosen, table, objective, hold)
    boot = uncertainty.bootstrap(fitted, table, samples) if samples else None
    ends = uncertainty.open_ends(fitted, table)
    parameters = dict(fitted.parameters)
    if fitted.sigma is not None:
        parameters["sigma"] = fitted.sigma
    # Any table has runs of like compute; those of one that names its budgets were meant to be compared.
    try:
        parabolas = isoflop.parabolas(table) if chosen.target == "loss" and "budget" in table.columns else []
    except BadInput:
        parabolas = []
    warnings = list(fitted.warnings)
    for name, sides in ends.items():
        for side in sides:
            if fitted.at_bound.get(name) != side:
                where = "above" if side == "upper" else "below"
                warnings.append(f"{name} is not bounded {where} by this data")
    intervals = {name: one for name, one in boot.intervals.items() if name not in fitted.held} if boot else None
    warnings += uncertainty.disagreement(fitted, table, intervals)
    warnings += [one.warning for one in parabolas if one.warning]
    warnings += _repetition(table, chosen)
    return Analysis(
        table=table,
        law=fitted.law.name,
        formula=fitted.law.formula,
        n=fitted.n,
        objective=fitted.objective,
        value=fitted.value,
        parameters=parameters,
        intervals=intervals,
        unbounded=frozenset(fitted.at_bound) | frozenset(ends),
        warnings=warnings,
        parabolas=parabolas,
        fit=fitted,
        bootstrap=boot,
    )


def named(law: str, columns: Iterable[str] = ()) -> laws.Law:
    """laws.by_name, whose answer to a wrong name knows the procedures too."""
    if law not in laws.LAWS and ":" not in law:
        raise BadInput(f'"{law}" names no scaling law{did_you_mean(law, [*laws.LAWS, *PROCEDURES])}')
    return laws.by_name(law, columns)


def listing() -> str:
    """What `llm-jax fit --list` prints: a line for every law and every procedure, then how to give one's own."""
    lines = [*(law.line for law in laws.LAWS.values()), *(one.line for one in PROCEDURES.values())]
    return "\n".join([*lines, "path/to/file.py:function  a law of your own"])


def _procedure(table: Table, procedure: Procedure, objective: str, samples: int) -> Analysis:
    found = procedure.run(table, objective, samples)
    return Analysis(
        table=table,
        law=procedure.name,
        formula=procedure.formula,
        n=found.n,
        objective=found.objective,
        value=found.value,
        parameters=found.parameters,
        intervals=found.intervals,
        unbounded=frozenset(),
        warnings=found.warnings,
        parabolas=[],
        fit=None,
        bootstrap=None,
    )


def _repetition(table: Table, law: laws.Law) -> list[str]:
    """A warning where tokens repeat, unless the law knows of it."""
    columns = table.columns
    if "D_unique" in law.columns or "epochs" not in columns or columns["epochs"].dtype.kind != "f":
        return []
    many = columns["epochs"] > MANY_EPOCHS
    if not many.any():
        return []
    return [
        f"{int(many.sum())} trials repeat their data more than {MANY_EPOCHS} times, one "
        f"{np.nanmax(columns['epochs']):.1f} times: their loss is that of fewer tokens (Muennighoff et al. 2023)"
    ]


def fit_table(
    path: Path, law: str, objective: str = "", where: str = "", ci: str = "bootstrap", hold: Sequence[str] = ()
) -> Analysis:
    """`llm-jax fit`: of a run directory or a CSV. In a run directory the answer is kept as fit.json.

    `hold` are texts NAME=VALUE.
    """
    if path.is_dir():
        ledger.describe(path)
        if not (path / "table.csv").exists():
            raise BadInput(f"{path} has no finished trial; see llm-jax status {path}")
    table = tables.read(path)
    if where:
        table = table.where(where)
    found = analyse(table, law, objective, ci, dict(map(_held, hold)))
    if path.is_dir() and not where:
        files.write_json(path / "fit.json", finite(found.to_dict()))
    return found


def _held(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name.strip(), float(value)
    except ValueError:
        raise BadInput(f'--hold takes NAME=VALUE, as in E=1.7; got "{text}"') from None


def write_report(folder: Path) -> tuple[Path, str]:
    """RUN/report.html with its figures; returns its path and the summary for the terminal."""
    described = ledger.describe(folder)
    rows = ledger.rows(folder)
    found, problems = None, []
    failed = [row for row in rows if row["status"] == "failed"]
    if failed:
        problems.append(f"{len(failed)} of {len(rows)} trials failed: {failed[0]['id']}, {failed[0]['reason']}")
    if (folder / "table.csv").exists():
        try:
            found = analyse(tables.read(folder), described["law"])
        except BadInput as error:
            problems.append(f"no law was fitted: {error}")
    known = {
        name: files.read_json(folder / f"{name}.json") if (folder / f"{name}.json").exists() else None
        for name in ("forecast", "verify")
    }
    content = report.Content(
        title=described["name"],
        docstring=described["docstring"],
        trials=[finite(row) for row in rows],
        curves={row["id"]: _curve(folder, row["id"]) for row in rows},
        fit=finite(found.to_dict()) if found else None,
        isoflop=[_parabola(one) for one in found.parabolas] if found else [],
        bands=_bands(found, known["forecast"]) if found and found.bootstrap else None,
        forecast=known["forecast"],
        verify=known["verify"] if known["verify"] and known["verify"]["measured"] is not None else None,
        entropy=described["entropy"],
        warnings=problems + (found.warnings if found else []),
        facts=_facts(folder, described, rows),
    )
    path = report.write(content, folder)
    lines = [found.summary() if found else "no law was fitted"]
    if described["entropy"] is not None:
        lines.append(f"true irreducible loss {described['entropy']:.4f}")
    if known["verify"]:
        lines.append(forecast.describe_verdict(folder, known["verify"]))
    elif known["forecast"]:
        lines.append(forecast.describe(known["forecast"]))
    return path, "\n".join(lines)


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


def _bands(found: Analysis, registered: dict[str, Any] | None) -> dict[str, Any] | None:
    """N*, D* and the loss along the compute-optimal frontier, with the 95 % band of the bootstrap; None where the fit has no optimum.

    Resamples whose own fit has none are left out.
    """
    if found.fit is None or found.bootstrap is None or found.fit.law.columns != ("N_params", "D_tokens"):
        return None
    compute = found.table.column("C_flops")
    top = max(compute.max(), registered["target"]["C"] if registered else 0.0)
    c_C = np.geomspace(compute.min() / 1.3, top * 1.3, BAND_POINTS)
    if found.fit.law.name != "chinchilla":
        return _bands_by_search(found.fit, found.bootstrap, found.table.column("N_params"), c_C)
    samples = found.bootstrap.parameters
    usable = np.all([samples[name] > 0 for name in ("A", "B", "alpha", "beta")], axis=0)
    try:
        n_C, d_C = np.asarray([laws.optimum(found.fit.parameters, float(c)) for c in c_C]).T
    except BadInput:
        return None
    if not usable.any():
        return None
    rows = [{name: values[i] for name, values in samples.items()} for i in np.flatnonzero(usable)]
    n_SxC, d_SxC = np.moveaxis(np.asarray([[laws.optimum(row, float(c)) for c in c_C] for row in rows]), -1, 0)
    part = {name: values[usable][:, None] for name, values in samples.items()}
    loss_SxC = part["E"] + part["A"] / n_SxC ** part["alpha"] + part["B"] / d_SxC ** part["beta"]
    bands = {
        "C": c_C.tolist(),
        "loss": found.fit.predict(n_C, d_C).tolist(),
        "N_opt": n_C.tolist(),
        "D_opt": d_C.tolist(),
    }
    for name, values_SxC in (("N", n_SxC), ("D", d_SxC), ("loss", loss_SxC)):
        low_C, high_C = np.quantile(values_SxC, [0.025, 0.975], axis=0)
        bands |= {f"{name}_low": low_C.tolist(), f"{name}_high": high_C.tolist()}
    return bands


def _bands_by_search(
    fitted: Fit, boot: Bootstrap, n_R: np.ndarray, c_C: np.ndarray, sizes: int = 121, samples: int = 100
) -> dict[str, Any] | None:
    """The same for a law without a formula for its optimum, by search over a grid of sizes; None where it lies at an end."""
    log_n_G = np.linspace(np.log(n_R.min()) - 4, np.log(n_R.max()) + 4, sizes)
    x_KxR = np.stack([np.tile(log_n_G, len(c_C)), (np.log(c_C / 6)[:, None] - log_n_G).ravel()])
    theta_SxP = np.concatenate([fitted.theta[None], boot.theta_SxP[:samples]])
    value = np.concatenate([fitted.law.evaluate(one[None], x_KxR)[0] for one in theta_SxP])
    loss_SxCxG = (np.exp(value) if fitted.law.log else value).reshape(len(theta_SxP), len(c_C), sizes)
    at_SxC = loss_SxCxG.argmin(2)
    inside_S = np.isfinite(loss_SxCxG).all((1, 2)) & ((at_SxC > 0) & (at_SxC < sizes - 1)).all(1)
    if not inside_S[0] or inside_S.sum() < 2:
        return None
    below, here, above = (
        np.take_along_axis(loss_SxCxG, (at_SxC + step)[..., None].clip(0, sizes - 1), 2)[..., 0] for step in (-1, 0, 1)
    )
    offset_SxC = 0.5 * (below - above) / np.maximum(below - 2 * here + above, 1e-300)
    n_SxC = np.exp(log_n_G[at_SxC] + np.clip(offset_SxC, -0.5, 0.5) * (log_n_G[1] - log_n_G[0]))
    bands: dict[str, Any] = {"C": c_C.tolist(), "loss": here[0].tolist()}
    bands |= {"N_opt": n_SxC[0].tolist(), "D_opt": (c_C / 6 / n_SxC[0]).tolist()}
    for name, values_SxC in (("N", n_SxC), ("D", c_C / 6 / n_SxC), ("loss", here)):
        low_C, high_C = np.quantile(values_SxC[inside_S], [0.025, 0.975], axis=0)
        bands |= {f"{name}_low": low_C.tolist(), f"{name}_high": high_C.tolist()}
    return bands


def _curve(folder: Path, trial_id: str) -> dict[str, list[float]]:
    from llm_jax.training.metrics import read_metrics

    lines = read_metrics(ledger.trial_folder(folder, trial_id))
    training = [line for line in lines if "loss" in line]
    evaluated = [line for line in lines if "eval_loss" in line]
    return {
        "tokens": [line["tokens"] for line in training],
        "loss": [line["loss"] for line in training],
        "eval_tokens": [line["tokens"] for line in evaluated],
        "eval_loss": [line["eval_loss"] for line in evaluated],
    }


def _facts(folder: Path, described: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, str]:
    from importlib.metadata import version

    done = [row for row in rows if row["status"] == "done"]
    spent = sum(row["C_flops"] for row in done)
    saved = sum(6.0 * row["N_active"] * row["first_step"] * row["tokens_per_step"] for row in rows)
    hardware = sorted({row["hardware"] for row in rows if row["hardware"]})
    facts = {
        "data": f"{described['config']['data']['source']}, fingerprint {described['data']}",
        "tokenizer": f"{described['config']['data']['tokenizer']}, sha256 {described['tokenizer_sha256'][:12]}",
        "compute of the sweep": f"{spent:.3g} FLOPs (6 N D)",
        "time of training": f"{sum(row['seconds'] or 0 for row in rows):.0f} s over all trials",
        "versions": ", ".join(f"{name} {version(name)}" for name in ("jax", "flax", "optax"))
        + f", Python {platform.python_version()}",
    }
    if saved:
        facts["compute saved by shared trunks"] = (
            f"{saved:.3g} FLOPs, {100 * saved / spent:.0f} % of what the sweep would have cost"
        )
    if hardware:
        facts["hardware"] = "; ".join(hardware)
    facts["ledger"] = f"sha256 {ledger.sha256(folder)[:12]}"
    return facts
