"""Training the trials of a run in this process; scaling/launchers.py starts others beside it."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import jax

from llm_jax import files
from llm_jax.config import trunk_key
from llm_jax.data.prepare import Prepared
from llm_jax.training import hosts, initial, loop, preemption
from llm_jax.training.optimizer import cooldown_start
from llm_jax.training.preemption import Preempted
from llm_jax.training.watch import Watch
from scaling import ledger
from scaling.experiment import Trial
from scaling.leases import Lease
from scaling.progress import progress


def use_compile_cache() -> None:
    """Programs compiled once serve all later processes of this machine, from $JAX_COMPILATION_CACHE_DIR where that is set."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(files.cache_dir() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


AHEAD = 4
"""Threads that compile. XLA takes several cores for one program, and tracing it holds Python's lock."""


def compile_ahead(order: Sequence[Trial], prepared: Prepared) -> dict[tuple, Future]:
    """By `loop.programs`, the compilation of what trials need, under way in the order of the trials while the first are trained.

    Only where an accelerator trains: the cores are free then. And where all of it is of this process. Else nothing.
    """
    if jax.default_backend() == "cpu" or jax.process_count() > 1:
        return {}
    pool = ThreadPoolExecutor(min(AHEAD, os.cpu_count() or 1))
    configs = {loop.programs(t.config): t.config for t in reversed(order) if not t.config.model.counted}
    return {key: pool.submit(loop.compile_ahead, configs[key], prepared) for key in reversed(configs)}


@contextlib.contextmanager
def _cancelled(futures: Iterable[Future]) -> Iterator[None]:
    """Cancels what has not begun in the end: a process that is told to leave would compile it all before it exits."""
    try:
        yield
    finally:
        for future in futures:
            future.cancel()


def trunk_groups(trials: Sequence[Trial], prepared: Prepared) -> dict[str, list[Trial]]:
    """Trials of the schedule wsd that share a trunk, the longest first."""
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        if trial.config.train.schedule == "wsd":
            groups.setdefault(trunk_key(trial.config, prepared.fingerprint), []).append(trial)
    return {key: sorted(group, key=lambda t: -t.config.num_steps) for key, group in groups.items() if len(group) > 1}


@contextlib.contextmanager
def claim(folder: Path, trial_id: str) -> Iterator[tuple[bool, Lease | None]]:
    """ledger.claim by the first of the processes that train together, for all of them; the lease is the first one's alone."""
    with ledger.claim(folder, trial_id) if hosts.first() else contextlib.nullcontext() as lease:
        yield hosts.agreed(lease is not None), lease


def run_trial(
    folder: Path,
    trial: Trial,
    prepared: Prepared,
    branch_steps: Sequence[int],
    update: Callable,
    lease: Lease | None,
    told: Callable[[], bool],
) -> None:
    """Trains a claimed trial and records how it ended. `lease` is told where time goes; None in processes beside the one that has it."""
    beats = ledger.trial_folder(folder, trial.id) / "beats"
    watch = Watch(f"trial {trial.id}", beats=beats, process=jax.process_index(), processes=jax.process_count())
    with contextlib.closing(watch):
        if lease:
            lease.facts = watch.snapshot
        result = loop.train(
            trial.config,
            prepared,
            ledger.trial_folder(folder, trial.id),
            trunks=folder / "trunks",
            branch_steps=branch_steps,
            progress=update,
            told=told,
            watch=watch,
        )
    if not hosts.first():
        return
    ledger.record(folder, trial, prepared, result)
    if start := files.find_json(ledger.trial_folder(folder, trial.id) / initial.FILE):
        print(
            f"{trial.id} began with {len(start['taken'])} arrays of {start['from']} and {len(start['left'])} of its own",
            file=sys.stderr,
        )


def work(folder: Path, prepared: Prepared, start: float = 0.0) -> None:
    """Trains trials of a run until none is left, alone or beside other workers.

    Each worker begins at another share `start` of the trials, so that a shape is compiled by one of them. Runs that branch off
    a trunk wait for the longest of their group, which trains the trunk. Raises Preempted where a signal tells this process to leave.
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
    state = ledger.statuses(folder, [trial.id for trial in order])
    compiled = compile_ahead([t for t in order if state[t.id] not in ledger.ENDED], prepared)
    with _cancelled(compiled.values()), preemption.noticed() as told, progress("sweep", total, "FLOP") as update:
        while True:
            if told():
                raise Preempted("between trials")
            state |= ledger.statuses(folder, [key for key, one in state.items() if one not in ledger.ENDED])
            state = hosts.agreed(state)
            done = sum(t.counts["C_flops"] for t in order if state[t.id] in ledger.ENDED)
            left = [t for t in order if state[t.id] not in ledger.ENDED]
            if not left:
                if hosts.first():
                    ledger.write_table(folder)  # again: another worker's last result may have come after our last table
                return
            for trial in left:
                if state.get(leader.get(trial.id, ""), "done") not in ledger.ENDED:
                    continue
                with claim(folder, trial.id) as (mine, lease):
                    if mine:
                        cost = trial.counts["C_flops"]

                        def report(step, steps, loss, trial=trial, done=done, cost=cost):
                            shape = f"N {trial.counts['N_params']:.3g} D {trial.counts['D_tokens']:.3g}"
                            update(done + cost * step / steps, f"{shape} loss {loss:.3f}")

                        if under_way := compiled.get(loop.programs(trial.config)):
                            wait([under_way])  # a failure shows when the trial compiles it again
                        run_trial(folder, trial, prepared, branches.get(trial.id, ()), report, lease, told)
                        break
            else:
                time.sleep(files.poll_seconds(folder))
