"""Results on disk: one folder a trial, safe under many workers on machines of one file system, and under kills at any moment.

RUN/experiment.json             what the run is: base config, data, axes
RUN/table.csv                   the finished trials, rewritten after each: what `fit` reads
RUN/trials/<fingerprint>/
    trial.json                  config, point on the axes
    attempt-1.json, ...         who trained it when, and where the time went; the last one is held by a lease (scaling/leases.py)
    result.json                 loss and counts, written once; the same bits whoever trained it, and however often killed
    timing.json                 what differs from machine to machine
    metrics.jsonl, checkpoints/ (counts.npz of an n-gram model), tensorboard/
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llm_jax import files
from llm_jax.config import Config, trunk_key
from llm_jax.data.prepare import Prepared
from llm_jax.ladder import Ladder
from llm_jax.settings import BadInput, did_you_mean, from_dict, to_dict, what
from llm_jax.training.metrics import read_metrics
from scaling import goodput, leases, tables
from scaling.experiment import DERIVED, Experiment, Trial
from scaling.leases import Lease

ENDED = ("done", "failed")
"""A trial of this status is trained no further."""
RESULT_COLUMNS = ("loss", "loss_se", "bits_per_byte")
TIMING = ("seconds", "tokens_per_second", "first_step", "hardware", "attempts", "goodput", "time")
"""Columns that differ from machine to machine."""


def create(
    folder: Path, name: str, docstring: str, experiment: Experiment, trials: Sequence[Trial], prepared: Prepared
) -> None:
    """Makes the run directory, or finds it made; trials are added to those it has.

    Raises BadInput, and writes nothing, where it belongs to another config or other data.
    """
    described = {
        "name": name,
        "docstring": docstring,
        "config": to_dict(experiment.config),
        "ladder": to_dict(experiment.ladder),
        "law": experiment.law,
        "forecast": to_dict(experiment.forecast) if experiment.forecast else None,
        "data": prepared.fingerprint,
        "tokenizer_sha256": prepared.tokenizer_sha256,
        "entropy": prepared.entropy,
    }
    check(folder, described)  # before the folder is made
    with files.locked(folder / ".lock"):
        check(folder, described)  # another process may have made it meanwhile
        files.write_json(folder / "experiment.json", described)
        for trial in trials:
            path = trial_folder(folder, trial.id) / "trial.json"
            told = {"config": to_dict(trial.config), "point": dict(trial.point)}
            # How it is run, its mesh, may be another each time.
            if not path.exists() or files.read_json(path)["config"] != told["config"]:
                files.write_json(path, told)


def check(folder: Path, described: dict[str, Any]) -> None:
    """Raises BadInput where `folder` is a run of something else, naming the first thing that differs."""
    path = folder / "experiment.json"
    if not path.exists():
        if folder.exists() and any(not found.name.startswith(".") for found in folder.iterdir()):
            raise BadInput(f"{folder} is not empty and no run directory; nearest that is free: {_free(folder)}")
        return
    known = files.read_json(path)
    # Settings that this version has and that one had not are at their defaults there; a default that has changed differs.
    known |= {
        "config": to_dict(what(from_dict(Config, known["config"]))),
        "ladder": to_dict(from_dict(Ladder, known["ladder"])),
    }
    described = {**described, "config": to_dict(what(from_dict(Config, described["config"])))}
    for key in ("config", "ladder", "data"):
        if known[key] != described[key]:
            name, old, new = _difference(known[key], described[key], key)
            raise BadInput(
                f"{folder} is the run of another config: {name} is {old} there and {new} here; nearest that is free: --run {_free(folder)}"
            )


def _difference(old: Any, new: Any, name: str) -> tuple[str, Any, Any]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *new]:
            if old.get(key) != new.get(key):
                return _difference(old.get(key), new.get(key), key if name == "config" else f"{name}.{key}")
    return name, old, new


def _free(folder: Path) -> Path:
    return next(path for i in range(2, 1000) if not (path := folder.with_name(f"{folder.name}-{i}")).exists())


def describe(folder: Path) -> dict[str, Any]:
    """What `create` wrote. Raises BadInput where `folder` is no run directory."""
    path = folder / "experiment.json"
    if not path.exists():
        runs = (
            sorted(str(found.parent) for found in folder.parent.glob("*/experiment.json"))
            if folder.parent.is_dir()
            else []
        )
        raise BadInput(
            f"{folder} is no run directory{did_you_mean(str(folder), runs) if runs else '; make one with llm-jax sweep'}"
        )
    return files.read_json(path)


def base_config(folder: Path) -> Config:
    """The config that the axes of a run vary. Raises BadInput where `folder` is no run directory."""
    return from_dict(Config, describe(folder)["config"])


def trial_folder(folder: Path, trial_id: str) -> Path:
    """Where a trial keeps its config, its result, its metrics and its checkpoints."""
    return folder / "trials" / trial_id


def trials(folder: Path) -> list[Trial]:
    """All trials of a run, by cost: cheap ones first."""
    found = []
    for path in sorted((folder / "trials").glob("*/trial.json")):
        value = files.read_json(path)
        found.append(Trial(from_dict(Config, value["config"]), value["point"]))
    return sorted(found, key=lambda trial: (trial.counts["C_flops"], trial.counts["N_params"], trial.id))


@contextlib.contextmanager
def claim(folder: Path, trial_id: str) -> Iterator[Lease | None]:
    """Holds a trial for this worker; yields None where another holds it or it has a result."""
    path = trial_folder(folder, trial_id)
    with contextlib.ExitStack() as stack:
        lease = None if (path / "result.json").exists() else stack.enter_context(leases.take(path))
        # Another may have finished it before the lease was ours.
        yield None if (path / "result.json").exists() else lease


def status(folder: Path, trial_id: str) -> str:
    """ "done", "failed", "running" (a live worker holds it), "stopped" (it was begun and nobody holds it) or "waiting"."""
    path = trial_folder(folder, trial_id)
    if (path / "result.json").exists():
        return files.read_json(path / "result.json")["status"]
    if not (before := leases.attempts(path)):
        return "waiting"
    return "running" if leases.held(before[-1]) else "stopped"


def record(folder: Path, trial: Trial, prepared: Prepared, result: Any, lanes: int = 1) -> None:
    """Writes a trial's result, once, and the table. `lanes`: how many trials its device trained side by side at most."""
    path = trial_folder(folder, trial.id)
    fixed = {"status": result.status, "reason": result.reason}
    if result.status == "done":
        fixed |= {"loss": result.loss, "loss_se": result.standard_error, "bits_per_byte": result.bits_per_byte}
    if result.n_params is not None:
        fixed["N_params"] = result.n_params
    fixed |= {"data": prepared.fingerprint, "tokenizer_sha256": prepared.tokenizer_sha256}
    fixed["epochs"] = int(trial.config.train.tokens) / prepared.tokens["train"]
    files.write_json(
        path / "timing.json",
        {
            "seconds": result.seconds,
            "tokens_per_second": result.tokens_per_second,
            "first_step": result.first_step,
            "hardware": _hardware() + (f", {lanes} trials at a time" if lanes > 1 else ""),
        },
    )
    files.write_json(path / "result.json", fixed)
    write_table(folder)


def _hardware() -> str:
    """What a trial was trained on, in words."""
    import jax

    devices = jax.local_devices()
    if devices[0].platform != "cpu":
        return f"{len(devices)} x {devices[0].device_kind} on {socket.gethostname()}"
    return f"{processor()}, on {socket.gethostname()}"


def processor() -> str:
    """Model and cores of the CPU."""
    models = [line.split(":", 1)[1].strip() for line in _cpu_info() if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores"


def _cpu_info() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []


def rows(folder: Path) -> list[dict[str, Any]]:
    """One dict a trial, cheap ones first: id, status, the point, counts under each convention, settings, and the result.

    "time" is wall seconds by phase (scaling/goodput.py). One that is running has its "progress" too, a fraction.
    """
    found = []
    for trial in trials(folder):
        path = trial_folder(folder, trial.id)
        state = status(folder, trial.id)
        result, timing = (
            files.read_json(path / name) if (path / name).exists() else {} for name in ("result.json", "timing.json")
        )
        train = trial.config.train
        row: dict[str, Any] = {"id": trial.id, "status": state, "reason": result.get("reason", "")}
        row |= {"depth": trial.point.get("depth", trial.config.model.num_layers), "budget": trial.point.get("compute")}
        row["family"] = "moe" if trial.config.model.experts.number else trial.config.model.family
        row |= trial.counts
        row["N_params"] = result.get("N_params", row["N_params"])  # of an n-gram model, known once it is counted
        row |= {
            "epochs": result.get("epochs"),
            "tokens_per_step": train.tokens_per_step,
            "num_steps": trial.config.num_steps,
        }
        row |= {"peak_lr": train.peak_lr, "warmup_steps": train.warmup_steps, "seed": train.seed}
        branches = train.schedule == "wsd" and result
        # Every schedule ends with its own run, but for the one that never does.
        decay_tokens = math.inf if train.schedule == "inverse_sqrt" else train.tokens
        row |= {"schedule": train.schedule, "decay_tokens": decay_tokens}
        row["trunk"] = trunk_key(trial.config, result["data"]) if branches else ""
        row |= {name: result.get(name, math.nan) for name in RESULT_COLUMNS}
        row |= {
            "seconds": timing.get("seconds"),
            "tokens_per_second": timing.get("tokens_per_second"),
            "first_step": timing.get("first_step", 0),
            "hardware": timing.get("hardware", ""),
        }
        attempts = leases.attempts(path)
        row |= {
            "attempts": len(attempts),
            "time": (time := goodput.of_attempts(attempts)),
            "goodput": goodput.share(time),
        }
        row |= {name: value for name, value in trial.point.items() if name not in DERIVED}
        if state == "running" and (lines := read_metrics(path)):
            row["progress"] = lines[-1]["step"] / trial.config.num_steps
        found.append(row)
    return found


def _finished(folder: Path) -> list[dict[str, Any]]:
    """The rows of trials that have ended, without what differs from machine to machine."""
    ended = [row for row in rows(folder) if row["status"] in ENDED]
    return [{name: value for name, value in row.items() if name not in TIMING} for row in ended]


def sha256(folder: Path) -> str:
    """Hash of the finished trials: of everything but what differs from machine to machine."""
    finished = sorted(_finished(folder), key=lambda row: row["id"])
    return hashlib.sha256(json.dumps(finished, sort_keys=True).encode()).hexdigest()


def write_table(folder: Path) -> None:
    """RUN/table.csv: the finished trials, a column a key of `rows` except timing."""
    files.write_atomic(folder / "table.csv", tables.csv_text(_finished(folder)))
