"""Verbs that train, and look at what was trained."""

from __future__ import annotations

import json as jsonlib
import shutil
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_jax import files
from llm_jax.config import Mesh
from llm_jax.settings import BadInput, fingerprint
from llm_jax.training import hosts
from scaling.options import (
    StatusOptions,
    SweepOptions,
    TrainOptions,
    VerifyOptions,
)
from scaling.parsing import chosen_experiment
from scaling.progress import prepared_data

if TYPE_CHECKING:
    from llm_jax.data.prepare import Prepared
    from scaling.experiment import Experiment


def train(options: TrainOptions) -> None:
    """Trains one model in a run directory of one trial."""
    from scaling import ledger
    from scaling.experiment import Experiment

    base, _ = chosen_experiment(options)
    hosts.connect(options.coordinator, options.num_processes, options.process_id)
    alone = Experiment(base.model, base.data, base.train, base.mesh, base.ladder)
    name = f"{options.experiment.stem if options.experiment else 'default'}-train"
    folder = options.run or Path("runs") / f"{name}-{fingerprint(alone.config)}"
    asked, prepared = _create(folder, name, alone, "")
    from scaling import launch  # loads JAX: only now that nothing was refused

    launch.work(folder, prepared)
    if not hosts.first():
        return
    _print_trials([row for row in ledger.rows(folder) if row["id"] in asked], options.json)
    if not options.json:
        row = ledger.rows(folder)[0]
        print(
            f"loss {row['loss']:.4f} ± {row['loss_se']:.4f} nats per token, {row['bits_per_byte']:.4f} bits per byte; {folder}"
        )


def sweep(options: SweepOptions) -> None:
    """Trains every trial of an experiment that has no result yet, by workers here or on a cluster."""
    from scaling import experiment as experiments
    from scaling import launchers, ledger
    from scaling.launchers import local

    experiment, docstring = chosen_experiment(options)
    folder = options.run or Path("runs") / options.experiment.stem
    if options.workers is not None and options.workers < 1:
        raise BadInput(f"--workers must be at least 1, got {options.workers}")
    resources = launchers.Resources(
        options.gpus, options.tpus, options.cpus, options.hours, options.hosts, options.topology
    )
    if options.dry_run:
        rows = [{"id": one.id, **one.point, **one.counts} for one in experiments.trials(experiment)]
        _print_trials(rows, options.json)
        return
    launchers.ready(options.launcher, resources)
    workers = options.workers
    if options.launcher == "local":
        together = options.coordinator is not None or experiment.mesh != Mesh()
        workers = workers or (1 if together else local.default_workers(*local.devices(), resources))
        if workers == 1:  # of this host; else each has devices of its own, and no other process
            hosts.connect(options.coordinator, options.num_processes, options.process_id)
        elif options.coordinator is not None:
            raise BadInput("--workers share one host; processes that train together are one worker: give --workers 1")
    asked, prepared = _create(folder, options.experiment.stem, experiment, docstring)
    if options.launcher == "slurm":
        from scaling.launchers import on_slurm

        jobs = on_slurm.submit(folder, options.workers, resources, options.sbatch)
        names = [job.job_id for job in jobs]
        said = f"{len(jobs)} workers in the queue, from job {names[0]}; llm-jax status {folder} --watch follows them"
        print(jsonlib.dumps({"run": str(folder), "jobs": names}) if options.json else said)
        return
    if options.launcher == "ray":
        from scaling.launchers import on_ray

        on_ray.run(folder, options.workers, resources)
    else:
        local.run(folder, prepared, workers, resources)
        if workers == 1 and not hosts.first():
            return
    _print_trials([row for row in ledger.rows(folder) if row["id"] in asked], options.json)


def _create(folder: Path, name: str, experiment: Experiment, docstring: str) -> tuple[set[str], Prepared]:
    """The run directory, made or found; the ids of its trials that the experiment asks for, and its data."""
    from llm_jax.training import initial
    from scaling import experiment as experiments
    from scaling import ledger

    trials = experiments.trials(experiment)
    for trial in trials:
        if trial.config.train.init_from:
            initial.plan(trial.config)
    if experiment.mesh != Mesh():  # which fits whatever there is
        from llm_jax.training import mesh

        for trial in trials:
            mesh.check(trial.config)
    prepared = prepared_data(experiment.config)
    ledger.create(folder, name, docstring, experiment, trials, prepared)
    return {trial.id for trial in trials}, prepared


def _print_trials(rows: Sequence[Mapping[str, Any]], json: bool) -> None:
    from scaling import tables

    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    print(jsonlib.dumps({"trials": tables.finite(rows)}) if json else tables.terminal_text(rows, width))


def work(folder: Path, index: int, workers: int) -> None:
    """A worker beside others; `sweep --workers` starts these."""
    from scaling import launchers
    from scaling.launchers import local

    local.share_cpus(index, workers)
    launchers.work(folder, index, workers)


def status(options: StatusOptions) -> None:
    """Prints the trials of a run; with --watch again until all have ended."""
    from scaling import goodput, ledger

    ledger.describe(options.run)
    while True:
        rows = ledger.rows(options.run)
        if options.watch and sys.stdout.isatty():
            print("\033[2J\033[H", end="")
        _print_trials(rows, options.json)
        if not options.json:
            count = Counter(row["status"] for row in rows)
            print(", ".join(f"{number} {state}" for state, number in count.items()))
            if time_went := goodput.describe(goodput.total(row["time"] for row in rows)):
                print(time_went)
        if not options.watch or all(row["status"] in ledger.ENDED for row in rows):
            return
        time.sleep(2 * files.poll_seconds(options.run))


def verify(options: VerifyOptions) -> None:
    """Trains the run that was forecast and prints how the forecast did."""
    from scaling import forecast as forecasting
    from scaling import ledger

    ledger.describe(options.run)
    verdict = forecasting.verify(options.run, prepared_data)
    print(jsonlib.dumps(verdict) if options.json else forecasting.describe_verdict(options.run, verdict))
