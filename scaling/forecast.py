"""Forecasts that are registered before the run trains, and their verification.

RUN/forecast.json   written by `register`: target, prediction with its interval, config, git commit, hash of the ledger used
RUN/target/         the run that was forecast, a ledger of one trial
RUN/verify.json     written by `verify`: the measured loss, its relative error, and whether it fell inside
"""

from __future__ import annotations

import math
import subprocess
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax import files
from llm_jax.config import Config
from llm_jax.ladder import Ladder
from llm_jax.settings import BadInput, from_dict, to_dict
from scaling import extrapolation, isoflop, laws, ledger, tables
from scaling import fit as fitting
from scaling.experiment import Experiment, Trial, trial

MARGIN = 1.25
"""Rungs beyond the largest of the sweep that a target may lie on, as a factor of depth."""


def register(folder: Path, compute: float | None, depth: float | None, level: float) -> dict[str, Any]:
    """Writes forecast.json, or returns the one there if it says the same target for the same ledger.

    Raises BadInput while trials are unfinished, where no target is named, and where another forecast is registered: a forecast
    that may be changed afterwards is none.
    """
    described = ledger.describe(folder)
    open_trials = [row["id"] for row in ledger.rows(folder) if row["status"] not in ledger.ENDED]
    if open_trials:
        raise BadInput(
            f"{folder}: {len(open_trials)} trials have not ended, {open_trials[0]} first; run the same llm-jax sweep again"
        )
    target = described["forecast"] or {}
    compute = compute or target.get("compute")
    depth = depth or target.get("depth")
    if compute is None:
        raise BadInput("no target: the experiment names none; give --compute FLOPS")
    table = tables.read(folder)
    chosen = choose_target(folder, described, table, float(compute), depth)
    path, state = folder / "forecast.json", ledger.sha256(folder)
    if path.exists():
        known = files.read_json(path)
        if known["config_fingerprint"] == chosen.id and known["ledger_sha256"] == state:
            return known
        raise BadInput(
            f"{path} was registered at {known['registered_at']} for C = {known['target']['C']:.3g}, and a forecast does not change; "
            f"nearest that is free: another --run for the sweep"
        )
    n, d = chosen.counts["N_params"], chosen.counts["D_tokens"]
    prediction = extrapolation.prediction_interval(laws.by_name(described["law"], table.columns), table, n, d, level)
    registered = {
        "registered_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "target": {"N": n, "D": d, "C": chosen.counts["C_flops"]},
        "prediction": {
            "loss": prediction.loss,
            "interval": [prediction.low, prediction.high],
            "level": level,
            "law_loss": prediction.law_loss,
            "parts": prediction.parts,
            "forms": prediction.forms,
            "extrapolation": prediction.extrapolation,
        },
        "config_fingerprint": chosen.id,
        "git": git_commit(),
        "ledger_sha256": state,
        "config": to_dict(chosen.config),
        "point": dict(chosen.point),
    }
    files.write_json(path, registered)
    return registered


def choose_target(
    folder: Path, described: Mapping[str, Any], table: tables.Table, compute: float, depth: float | None
) -> Trial:
    """The trial at `compute` on the rung `depth`, or on the one nearest N* there: by the power law through the isoFLOP minima where
    two of them lie inside the grid, else by the law. `described` is what ledger.describe says of the folder."""
    base, rungs = from_dict(Config, described["config"]), from_dict(Ladder, described["ladder"])
    if depth is not None:
        return trial(base, rungs, {"depth": depth, "compute": compute})
    known = [one.point["depth"] for one in ledger.trials(folder) if "depth" in one.point]
    if not known:
        raise BadInput("the trials lie on no ladder; give --depth for the run to forecast")
    try:
        line = isoflop.frontier(isoflop.parabolas(table))
        best = line.coefficient * compute**line.exponent
    except BadInput:
        law = laws.by_name(described["law"], table.columns)
        best = fitting.optimum(fitting.fit(law, table), compute)[0]
    rungs_known = np.unique(np.asarray(known, float))
    gap = float(np.diff(rungs_known).min()) if len(rungs_known) > 1 else 1.0
    depths = np.arange(rungs_known[0], MARGIN * rungs_known[-1] + 1, gap).tolist()
    candidates = [trial(base, rungs, {"depth": one, "compute": compute}) for one in depths]
    return min(candidates, key=lambda one: abs(math.log(one.counts["N_params"] / best)))


def verify(folder: Path, prepare: Callable[[Config], Any]) -> dict[str, Any]:
    """Trains the registered run and writes verify.json: measured loss, (measured - predicted) / predicted, and inside or not.

    Raises BadInput where nothing is registered. A run that fails is scored as a miss, with the reason.
    """
    path = folder / "forecast.json"
    if not path.exists():
        raise BadInput(f"{folder} holds no forecast; register one with llm-jax forecast {folder}")
    registered = files.read_json(path)
    described = ledger.describe(folder)
    config = from_dict(Config, registered["config"])
    target = Trial(config, registered["point"])
    if target.id != registered["config_fingerprint"]:
        raise BadInput(f"{path}: its config is not the one that was registered, {registered['config_fingerprint']}")
    prepared = prepare(config)
    if prepared.fingerprint != described["data"]:
        raise BadInput(
            f"{folder}: the data is not that of the sweep: {described['data']} then, {prepared.fingerprint} now"
        )
    alone = Experiment(config.model, config.data, config.train, config.mesh)
    ledger.create(folder / "target", described["name"], described["docstring"], alone, [target], prepared)
    from scaling import launch

    launch.work(folder / "target", prepared)
    row = ledger.rows(folder / "target")[0]
    if row["status"] == "failed":
        verdict = {"measured": None, "error_relative": None, "inside": False, "reason": row["reason"]}
    else:
        predicted, (low, high) = registered["prediction"]["loss"], registered["prediction"]["interval"]
        verdict = {
            "measured": row["loss"],
            "error_relative": (row["loss"] - predicted) / predicted,
            "inside": low <= row["loss"] <= high,
            "standard_error": row["loss_se"],
            "bits_per_byte": row["bits_per_byte"],
            "law_error_relative": (row["loss"] - registered["prediction"]["law_loss"])
            / registered["prediction"]["law_loss"],
        }
    files.write_json(folder / "verify.json", verdict)
    return verdict


def git_commit() -> str | None:
    """The commit of the working folder, marked where the tree differs from it; None outside of a repository."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def describe(registered: dict[str, Any]) -> str:
    """A few lines for people."""
    target, prediction = registered["target"], registered["prediction"]
    low, high = prediction["interval"]
    return (
        f"registered {registered['registered_at']}: N = {target['N']:,.0f}, D = {target['D']:,.0f}, C = {target['C']:.3g} FLOPs, "
        f"{prediction['extrapolation']:.1f} times the largest of the sweep\n"
        f"forecast   {prediction['loss']:.4f} nats per token, {100 * prediction['level']:.0f} % interval [{low:.4f}, {high:.4f}]"
    )


def describe_verdict(folder: Path, verdict: dict[str, Any]) -> str:
    """The forecast, and what came of it."""
    text = describe(files.read_json(folder / "forecast.json"))
    if verdict["measured"] is None:
        return f"{text}\nmeasured   nothing: {verdict['reason']}"
    word = "inside" if verdict["inside"] else "OUTSIDE"
    return (
        f"{text}\nmeasured   {verdict['measured']:.4f} ± {verdict['standard_error']:.4f}: {word} the interval, "
        f"{100 * verdict['error_relative']:+.2f} % from the forecast"
    )
