"""What a table says: the fit with its intervals, the isoFLOP minima, the warnings; and the report that is made of them."""

from __future__ import annotations

import dataclasses
import json
import math
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax import files
from llm_jax.config import BadInput
from scaling import fit as fitting
from scaling import forecast, isoflop, laws, ledger, report, tables, uncertainty
from scaling.fit import Fit
from scaling.isoflop import Parabola
from scaling.tables import Table, finite
from scaling.uncertainty import Bootstrap

MANY_EPOCHS = 4
"""Muennighoff et al. 2023: up to about four epochs repeated tokens are worth nearly as much as new ones."""
BAND_POINTS = 41


@dataclass(frozen=True)
class Analysis:
    """A table and what was found in it."""

    table: Table
    fit: Fit
    bootstrap: Bootstrap | None
    parabolas: list[Parabola]
    warnings: list[str]

    def to_dict(self) -> dict[str, Any]:
        """What `llm-jax fit --json` prints."""
        parameters = {}
        for name, value in self.fit.parameters.items():
            interval = self.bootstrap.intervals[name] if self.bootstrap else None
            parameters[name] = {
                "value": value,
                "interval": list(interval) if interval else None,
                "unbounded": name in self.fit.at_bound,
            }
        found: dict[str, Any] = {
            "law": self.fit.law.name,
            "formula": self.fit.law.formula,
            "n": self.fit.n,
            "objective": {"name": self.fit.objective, "value": self.fit.value},
            "parameters": parameters,
            "warnings": self.warnings,
        }
        if self.parabolas:
            found["isoflop"] = [_parabola(one) for one in self.parabolas]
        return found

    def to_json(self) -> str:
        """`to_dict` on one line."""
        return json.dumps(finite(self.to_dict()))

    def summary(self) -> str:
        """What `llm-jax fit` prints for people: the law, its numbers, the isoFLOP minima, then all warnings."""
        fitted = dataclasses.replace(self.fit, warnings=())  # they are among ours
        text = fitted.summary(self.bootstrap.intervals if self.bootstrap else None)
        for one in self.parabolas:
            low, high = one.n_interval
            within = f" [{low:.3g}, {high:.3g}]" if math.isfinite(low) and math.isfinite(high) and low > 0 else ""
            text += (
                f"\n  C = {one.budget:.3g}: N* = {one.n_opt:.3g}{within}, D* = {one.d_opt:.3g}, loss {one.loss_opt:.4f}"
            )
        return "\n".join([text, *(f"  warning: {warning}" for warning in self.warnings)])


def analyse(table: Table, law: str, objective: str, samples: int) -> Analysis:
    """Fits a law, resamples it, and looks for what would make the numbers misleading."""
    fitted = fitting.fit(laws.by_name(law), table, objective)
    boot = uncertainty.bootstrap(fitted, table, samples) if samples else None
    try:
        parabolas = isoflop.parabolas(table)
    except BadInput:
        parabolas = []
    warnings = [*fitted.warnings, *(one.warning for one in parabolas if one.warning)]
    if "epochs" in table.columns and table.columns["epochs"].dtype.kind == "f":
        many = table.column("epochs") > MANY_EPOCHS
        if many.any():
            most = np.nanmax(table.column("epochs"))
            warnings.append(
                f"{int(many.sum())} trials repeat their data more than {MANY_EPOCHS} times, one {most:.1f} times: "
                "their loss is that of fewer tokens (Muennighoff et al. 2023)"
            )
    return Analysis(table, fitted, boot, parabolas, warnings)


def fit_table(path: Path, law: str, objective: str, where: str, samples: int) -> Analysis:
    """`llm-jax fit`: of a run directory or a CSV. In a run directory the answer is kept as fit.json."""
    if path.is_dir():
        ledger.describe(path)
        if not (path / "table.csv").exists():
            raise BadInput(f"{path} has no finished trial; see llm-jax status {path}")
    table = tables.read(path)
    if where:
        table = table.where(where)
    found = analyse(table, law, objective, samples)
    if path.is_dir() and not where:
        files.write_json(path / "fit.json", finite(found.to_dict()))
    return found


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
            found = analyse(tables.read(folder), described["law"], "huber:1e-3", 1000)
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
    assert found.bootstrap is not None
    compute = found.table.column("C_flops")
    top = max(compute.max(), registered["target"]["C"] if registered else 0.0)
    c_C = np.geomspace(compute.min() / 1.3, top * 1.3, BAND_POINTS)
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
    saved = sum(6.0 * row["N_params"] * row["first_step"] * row["tokens_per_step"] for row in rows)
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
