"""What a run directory's report is made of."""

from __future__ import annotations

import functools
import platform
from pathlib import Path
from typing import Any

from llm_jax import files
from llm_jax.settings import BadInput
from scaling import compare, forecast, frontier, intervals, ledger, profile, report, tables
from scaling.analysis import Analysis, analyse
from scaling.compare import Comparison
from scaling.report import Content
from scaling.tables import finite

GROUPS = "family"
"""The column of a run whose values are fitted and drawn side by side."""


def write_report(folder: Path) -> tuple[Path, str]:
    """RUN/report.html with its figures; returns its path and the summary for the terminal."""
    described = ledger.describe(folder)
    rows = ledger.rows(folder)
    found, groups, problems = None, None, []
    failed = [row for row in rows if row["status"] == "failed"]
    if failed:
        problems.append(f"{len(failed)} of {len(rows)} trials failed: {failed[0]['id']}, {failed[0]['reason']}")
    if (folder / "table.csv").exists():
        table, fit = tables.read(folder), functools.partial(analyse, law=described["law"])
        try:
            if len(set(table.columns.get(GROUPS, []))) > 1:
                groups = compare.by_column(table, GROUPS, fit)
            else:
                found = fit(table)
        except BadInput as error:
            problems.append(f"no law was fitted: {error}")
    known = {
        name: files.read_json(folder / f"{name}.json") if (folder / f"{name}.json").exists() else None
        for name in ("forecast", "verify")
    }
    content = Content(
        title=described["name"],
        docstring=described["docstring"],
        trials=[finite(row) for row in rows],
        curves={row["id"]: _curve(folder, row["id"]) for row in rows},
        forecast=known["forecast"],
        verify=known["verify"] if known["verify"] and known["verify"]["measured"] is not None else None,
        entropy=described["entropy"],
        warnings=problems + (found.warnings if found else _warnings(groups) if groups else []),
        facts=_facts(folder, described, rows),
        setup=described,
        by=GROUPS if groups else "",
        groups=compare.record(groups, _bands(groups)) if groups else [],
        **(of_analysis(found, known["forecast"]) if found else {"fit": None, "isoflop": [], "bands": None}),
    )
    path = report.write(content, folder)
    lines = [found.summary() if found else groups.summary() if groups else "no law was fitted"]
    if described["entropy"] is not None:
        lines.append(f"true irreducible loss {described['entropy']:.4f}")
    if known["verify"]:
        lines.append(forecast.describe_verdict(folder, known["verify"]))
    elif known["forecast"]:
        lines.append(forecast.describe(known["forecast"]))
    return path, "\n".join(lines)


def _warnings(groups: Comparison) -> list[str]:
    return [f"{name}: {text}" for name, one in groups.groups.items() for text in one.warnings]


def _bands(groups: Comparison) -> dict[str, Any]:
    return {
        name: frontier.bands(one.fit, one.bootstrap, one.table)
        for name, one in groups.groups.items()
        if one.fit and one.bootstrap
    }


def of_analysis(found: Analysis, registered: dict[str, Any] | None = None) -> dict[str, Any]:
    """The fields of Content that show a fit: fit, isoflop, bands, profiles and samples."""
    record = finite(found.to_dict())
    fields: dict[str, Any] = {"fit": record, "isoflop": record.get("isoflop", []), "bands": None}
    if found.fit and found.bootstrap:
        reach = registered["target"]["C"] if registered else 0.0
        fields["bands"] = frontier.bands(found.fit, found.bootstrap, found.table, frontier.span(found.table, reach))
        fields["samples"] = {name: values.tolist() for name, values in found.bootstrap.parameters.items()}
    if found.fit and "profile" in found.by_method:
        drawn = profile.curves(intervals.of_fit(found.fit, found.table))
        fields["profiles"] = [
            finite(
                {
                    "parameter": name,
                    "value": found.fit.parameters[name],
                    "values": curve.values.tolist(),
                    "increase": (curve.root_f**2).tolist(),
                    "threshold": curve.limit**2,
                    "interval": list(found.by_method["profile"][name]),
                }
            )
            for name, curve in drawn.items()
        ]
    return fields


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
