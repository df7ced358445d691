"""Trials an hour of a sweep, beside those of starting one process a trial.

Both sides run the same trials by the same code, from the prepared data on and with no program compiled before: a process each pays
for starting Python and JAX, for compiling its shape and for an idle accelerator meanwhile; the sweep compiles each shape once, the next
ones while the present one trains.
"""

from __future__ import annotations

import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm_jax.settings import BadInput
from scaling import experiment as experiments
from scaling import ledger
from scaling.bench import training
from scaling.launchers import local


def bench_sweep(path: Path, alone: int | None = None) -> dict[str, Any]:
    """`llm-jax bench sweep`: the trials of the experiment at `path` in one sweep, then `alone` of them, evenly spaced, in a process each;
    None: all. Seconds are of whole processes; `ratio` is of trials an hour, by the mean of those that ran alone. `mfu` is of the whole
    sweep, C = 6 N D over what all devices here could do meanwhile; None for devices whose peak is not known, a CPU for one."""
    from llm_jax.data import prepare

    experiment, _ = experiments.load(path)
    trials = experiments.trials(experiment)
    number = len(trials) if alone is None else alone
    if not 1 <= number <= len(trials):
        raise BadInput(f"--alone must lie in [1, {len(trials)}], the trials of {path}, got {alone}")
    prepare.prepare(experiment.config)
    chosen = [trials[i * len(trials) // number] for i in range(number)]
    with tempfile.TemporaryDirectory() as temporary:
        whole, together = _timed(path, Path(temporary) / "sweep", ())
        apart = []
        for trial in chosen:
            axes = [word for name, value in trial.point.items() for word in ("--axis", name, str(value))]
            seconds, rows = _timed(path, Path(temporary) / trial.id, axes)
            apart.append((seconds, rows[trial.id]["loss"] / together[trial.id]["loss"] - 1))
    mean = statistics.mean(seconds for seconds, _ in apart)
    hardware, total = next(iter(together.values()))["hardware"], sum(t.counts["C_flops"] for t in trials)
    peak, whose = training.peak_flops(hardware, ())
    peak *= max(1, len(local.devices()[1]))
    return {
        "hardware": hardware,
        "trials": len(trials),
        "N_params": [min(t.counts["N_params"] for t in trials), max(t.counts["N_params"] for t in trials)],
        "shapes": len({t.config.model for t in trials}),
        "C_flops": total,
        "training_seconds": sum(row["seconds"] for row in together.values()),
        "sweep_seconds": whole,
        "sweep_per_hour": 3600 * len(trials) / whole,
        "tokens_per_second": sum(t.counts["D_tokens"] for t in trials) / whole,
        "peak_flops": None if math.isnan(peak) else peak,
        "peak_of": whose,
        "mfu": None if math.isnan(peak) else total / whole / peak,
        "alone": number,
        "alone_seconds": mean,
        "alone_per_hour": 3600 / mean,
        "ratio": len(trials) * mean / whole,
        "loss_difference": max(abs(difference) for _, difference in apart),
    }


def _timed(path: Path, folder: Path, axes: Sequence[str]) -> tuple[float, dict[str, dict[str, Any]]]:
    """Seconds of `llm-jax sweep` into `folder`, nothing compiled before, and the rows of its ledger by trial."""
    command = [sys.executable, "-m", "scaling.cli", "sweep", str(path), "--run", str(folder), *axes]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(folder.with_suffix(".compiled"))}
    began, said = time.perf_counter(), "no trial ended well"
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:  # its progress is ours
            print(f"{folder.name}: {line.rstrip()}", file=sys.stderr, flush=True)
            said = line.strip() or said
    seconds = time.perf_counter() - began
    rows = {row["id"]: row for row in ledger.rows(folder)} if process.returncode == 0 else {}
    if not rows or any(row["status"] != "done" for row in rows.values()):
        raise BadInput(f"{' '.join(command[3:])}: {said}")
    return seconds, rows


def describe(found: dict[str, Any]) -> str:
    """The table for people."""
    low, high = found["N_params"]
    what = f"{found['trials']} trials of {found['shapes']} shapes, N {low:,} to {high:,}, {found['C_flops']:.3g} FLOPs"
    used = f"the whole sweep: {found['tokens_per_second']:,.0f} tokens a second"
    if found["mfu"]:
        used += (
            f", 6 N D at {100 * found['mfu']:.1f} % of {found['peak_flops'] / 1e12:,.3g} TFLOP/s ({found['peak_of']})"
        )
    return "\n".join(
        [
            f"{found['hardware']}: {what}",
            "",
            "                          seconds  trials an hour",
            f"one sweep               {found['sweep_seconds']:9,.1f}  {found['sweep_per_hour']:14,.0f}",
            f"a process each, a trial {found['alone_seconds']:9,.1f}  {found['alone_per_hour']:14,.0f}   mean of {found['alone']}",
            "",
            used,
            f"x {found['ratio']:.2f}; the sweep's training loops took {found['training_seconds']:,.1f} s, added up over trials;"
            f" losses differ by {100 * found['loss_difference']:.2g} % at most",
        ]
    )
