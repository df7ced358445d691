"""Training the trials of a run: this process, and others beside it where more workers are asked for."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from llm_jax import files
from llm_jax.config import trunk_key
from llm_jax.data.prepare import Prepared
from llm_jax.training import hosts, initial, loop
from llm_jax.training.optimizer import cooldown_start
from scaling import ledger
from scaling.experiment import Trial
from scaling.progress import progress

POLL_SECONDS = 1.0


def use_compile_cache() -> None:
    """Programs compiled once serve all later processes of this machine, from $JAX_COMPILATION_CACHE_DIR where that is set."""
    import jax

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(files.cache_dir() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


AHEAD = 4
"""Threads that compile. XLA takes several cores for one program, and tracing it holds Python's lock."""


def compile_ahead(order: Sequence[Trial], prepared: Prepared) -> dict[tuple, Future]:
    """By `loop.programs`, the compilation of what trials need, under way in the order of the trials while the first are trained.

    Only where an accelerator trains: the cores are free then. And where all of it is of this process. Else nothing.
    """
    import jax

    if jax.default_backend() == "cpu" or jax.process_count() > 1:
        return {}
    pool = ThreadPoolExecutor(min(AHEAD, os.cpu_count() or 1))
    configs = {loop.programs(t.config): t.config for t in reversed(order) if not t.config.model.counted}
    return {key: pool.submit(loop.compile_ahead, configs[key], prepared) for key in reversed(configs)}


def trunk_groups(trials: Sequence[Trial], prepared: Prepared) -> dict[str, list[Trial]]:
    """Trials of the schedule wsd that share a trunk, the longest first."""
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        if trial.config.train.schedule == "wsd":
            groups.setdefault(trunk_key(trial.config, prepared.fingerprint), []).append(trial)
    return {key: sorted(group, key=lambda t: -t.config.num_steps) for key, group in groups.items() if len(group) > 1}


@contextlib.contextmanager
def claim(folder: Path, trial_id: str) -> Iterator[bool]:
    """ledger.claim by the first of the processes that train together, for all of them."""
    with ledger.claim(folder, trial_id) if hosts.first() else contextlib.nullcontext(False) as mine:
        yield hosts.agreed(mine)


def run_trial(folder: Path, trial: Trial, prepared: Prepared, branch_steps: Sequence[int], update: Callable) -> None:
    """Trains a claimed trial and records how it ended."""
    result = loop.train(
        trial.config,
        prepared,
        ledger.trial_folder(folder, trial.id),
        trunks=folder / "trunks",
        branch_steps=branch_steps,
        progress=update,
    )
    if not hosts.first():
        return
    ledger.record(folder, trial, prepared, result)
    if (said := ledger.trial_folder(folder, trial.id) / initial.FILE).exists():
        start = files.read_json(said)
        print(
            f"{trial.id} began with {len(start['taken'])} arrays of {start['from']} and {len(start['left'])} of its own",
            file=sys.stderr,
        )


def work(folder: Path, prepared: Prepared, start: float = 0.0) -> None:
    """Trains trials of a run until none is left, alone or beside other workers.

    Each worker begins at another share `start` of the trials, so that a shape is compiled by one of them. Runs that branch off
    a trunk wait for the longest of their group, which trains the trunk.
    """
    use_compile_cache()
    trials = ledger.trials(folder)
    leader: dict[str, str] = {}
    branches: dict[str, list[int]] = {}
    for group in trunk_groups(trials, prepared).values():
        branches[group[0].id] = [cooldown_start(t.config.train, t.config.num_steps) for t in group[1:]]
        leader |= {trial.id: group[0].id for trial in group[1:]}
    # A shape at a time, so that each is compiled once; trunks before their branches.
    order = sorted(trials, key=lambda t: (t.id in leader, t.counts["N_params"], t.counts["D_tokens"], t.id))
    first = int(start * len(order))
    order = order[first:] + order[:first]
    total = sum(t.counts["C_flops"] for t in order)
    compiled = compile_ahead([t for t in order if ledger.status(folder, t.id) not in ledger.ENDED], prepared)
    with progress("sweep", total, "FLOP") as update:
        while True:
            state = hosts.agreed({trial.id: ledger.status(folder, trial.id) for trial in order})
            done = sum(t.counts["C_flops"] for t in order if state[t.id] in ledger.ENDED)
            left = [t for t in order if state[t.id] not in ledger.ENDED]
            if not left:
                if hosts.first():
                    ledger.write_table(folder)  # again: another worker's last result may have come after our last table
                return
            for trial in left:
                if state.get(leader.get(trial.id, ""), "done") not in ledger.ENDED:
                    continue
                with claim(folder, trial.id) as mine:
                    if mine:
                        cost = trial.counts["C_flops"]

                        def report(step, steps, loss, trial=trial, done=done, cost=cost):
                            shape = f"N {trial.counts['N_params']:.3g} D {trial.counts['D_tokens']:.3g}"
                            update(done + cost * step / steps, f"{shape} loss {loss:.3f}")

                        if under_way := compiled.get(loop.programs(trial.config)):
                            wait([under_way])  # a failure shows when the trial compiles it again
                        run_trial(folder, trial, prepared, branches.get(trial.id, ()), report)
                        break
            else:
                time.sleep(POLL_SECONDS)


def share_cpus(index: int, workers: int) -> None:
    """Keeps this process to its share of the processors, before JAX starts its threads.

    Small models train no faster on two cores than on one, so that workers that keep out of each other's way are twice as fast.
    """
    cpus = sorted(os.sched_getaffinity(0))
    if 1 < workers <= len(cpus):
        os.sched_setaffinity(0, cpus[index::workers])


def spawn_workers(folder: Path, workers: int) -> list[subprocess.Popen]:
    """All workers but this process, which is the first; each ends with the run and writes to RUN/worker-K.log."""
    processes = []
    for index in range(1, workers):
        with open(folder / f"worker-{index}.log", "w") as log:
            command = [sys.executable, "-m", "scaling.cli", "work", str(folder), str(index), str(workers)]
            processes.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT))
    share_cpus(0, workers)
    return processes
