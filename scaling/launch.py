"""Training the trials of a run in this process; scaling/launchers starts others beside it."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from llm_jax import files, kernels
from llm_jax.config import trunk_key
from llm_jax.data.prepare import Prepared
from llm_jax.training import hosts, initial, loop, preemption, programs
from llm_jax.training.lanes import Lanes
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


def compile_ahead(order: Sequence[Trial], prepared: Prepared, lanes: int) -> dict[tuple, Future]:
    """By `programs.key`, the compilation of what trials need, under way in the order of the trials while the first are trained.

    Only where an accelerator trains: the cores are free then. And where all of it is of this process. Else nothing.
    """
    if jax.default_backend() == "cpu" or jax.process_count() > 1:
        return {}
    pool = ThreadPoolExecutor(min(AHEAD, os.cpu_count() or 1))
    configs = {programs.key(t.config): t.config for t in reversed(order) if not t.config.model.counted}
    of_each = Counter(programs.key(t.config) for t in order if lanes > 1 and fits_beside(t))
    return {
        key: pool.submit(programs.compile_ahead, configs[key], prepared, of_each[key] > 1) for key in reversed(configs)
    }


LANES = 2
"""Threads of a worker that train trials of small models side by side on one GPU. Four at a time gain no more than two."""


def lanes_here() -> int:
    """How many trials this process trains at a time: two on a GPU of its own, else one."""
    alone = jax.process_count() == jax.device_count() == 1
    return LANES if alone and jax.default_backend() == "gpu" else 1


def fits_beside(trial: Trial) -> bool:
    """Whether a trial leaves half of a GPU to another: its speed, and its memory."""
    model, data = trial.config.model, trial.config.data
    if model.counted or trial.config.train.compile != "jit":
        return False
    parts = [(model, data.context)]
    if model.media.kind != "none":
        parts.append((model.media_encoder, model.media.tokens))
    return all(kernels.small(max(m.d_model, m.num_heads * m.head_width), length) for m, length in parts)


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
    lanes: Lanes | None,
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
            lanes=lanes,
        )
    if not hosts.first():
        return
    ledger.record(folder, trial, prepared, result, LANES if lanes else 1)
    if start := files.find_json(ledger.trial_folder(folder, trial.id) / initial.FILE):
        print(
            f"{trial.id} began with {len(start['taken'])} arrays of {start['from']} and {len(start['left'])} of its own",
            file=sys.stderr,
        )


def work(folder: Path, prepared: Prepared, start: float = 0.0, lanes: int | None = None) -> None:
    """Trains trials of a run until none is left, alone or beside other workers; small ones in `lanes`, by default as many as pay here.

    Each worker begins at another share `start` of the trials, so that a shape is compiled by one of them. Runs that branch off
    a trunk wait for the longest of their group, which trains the trunk. Raises Preempted where a signal tells this process to leave.
    """
    use_compile_cache()
    lanes = lanes or lanes_here()
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
    begun = ledger.statuses(folder, [trial.id for trial in order])
    compiled = compile_ahead([t for t in order if begun[t.id] not in ledger.ENDED], prepared, lanes)
    total = sum(t.counts["C_flops"] for t in order)
    with _cancelled(compiled.values()), preemption.noticed() as signalled, progress("sweep", total, "FLOP") as update:
        share = _Share(folder, prepared, order, begun, leader, branches, compiled, lanes, Board(update), signalled)
        _side_by_side(share.lane, lanes, share.board.over)
        if hosts.first():
            ledger.write_table(folder)  # again: another worker's last result may have come after our last table


@dataclass
class _Share:
    """A worker's part in a run, which its lanes do together."""

    folder: Path
    prepared: Prepared
    order: Sequence[Trial]
    begun: Mapping[str, str]
    """Status by trial, as of the start."""
    leader: Mapping[str, str]
    """The trial that trains its trunk, by trial."""
    branches: Mapping[str, Sequence[int]]
    """Steps that others branch off at, by the trial that passes them."""
    compiled: Mapping[Any, Future]
    lanes: int
    board: Board
    signalled: Callable[[], bool]

    def __post_init__(self) -> None:
        self.meeting = Lanes() if self.lanes > 1 else None
        # Of the device: a trial that does not fit beside another takes them all.
        self.room = threading.Semaphore(self.lanes)

    def told(self) -> bool:
        """Whether to save and leave."""
        return self.signalled() or self.board.over.is_set()

    def lane(self, number: int) -> None:
        """Trains one trial after the other until none is left that this lane may take: the first lane all, others small ones."""
        state = dict(self.begun)
        while True:
            if self.told():
                raise Preempted("between trials")
            going = [t.id for t in self.order if state[t.id] not in ledger.ENDED]
            state = hosts.agreed(state | ledger.statuses(self.folder, going))
            mine = [t for t in self.order if state[t.id] not in ledger.ENDED and (number == 0 or fits_beside(t))]
            if not mine:
                return
            self.board.ended(sum(t.counts["C_flops"] for t in self.order if state[t.id] in ledger.ENDED))
            for trial in mine:
                if state.get(self.leader.get(trial.id, ""), "done") not in ledger.ENDED or state[trial.id] == "running":
                    continue
                if self.train(trial, number):
                    break
            else:
                time.sleep(files.poll_seconds(self.folder))

    def train(self, trial: Trial, number: int) -> bool:
        """Whether the trial was free; it has ended then."""
        beside = fits_beside(trial)
        with _held(self.room, 1 if beside else self.lanes), claim(self.folder, trial.id) as (ours, lease):
            if ours:
                if under_way := self.compiled.get(programs.key(trial.config)):
                    wait([under_way])  # a failure shows when the trial compiles it again
                report = functools.partial(self.board.report, number, trial)
                steps, lanes = self.branches.get(trial.id, ()), self.meeting if beside else None
                run_trial(self.folder, trial, self.prepared, steps, report, lease, self.told, lanes)
                self.board.report(number, trial, 0, 1)
            return ours


class Board:
    """The progress of all lanes."""

    def __init__(self, update: Callable[[float, str], None]):
        self._update = update
        self._lock = threading.Lock()
        self._ended = 0.0
        self._running: dict[int, float] = {}  # FLOPs by lane
        self.over = threading.Event()
        """Whether a lane has ended by an error, and the others are to save and leave."""

    def ended(self, flops: float) -> None:
        """Of all trials that have."""
        with self._lock:
            self._ended = flops

    def report(self, lane: int, trial: Trial, step: int, steps: int, loss: float | None = None) -> None:
        """What a lane has done of its trial."""
        with self._lock:
            self._running[lane] = trial.counts["C_flops"] * step / steps
            if loss is not None:
                note = f"N {trial.counts['N_params']:.3g} D {trial.counts['D_tokens']:.3g} loss {loss:.3f}"
                self._update(self._ended + sum(self._running.values()), note)


@contextlib.contextmanager
def _held(room: threading.Semaphore, places: int) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for _ in range(places):
            stack.enter_context(room)
        yield


def _side_by_side(lane: Callable[[int], None], lanes: int, over: threading.Event) -> None:
    """Runs lane 0 here and the others in threads; the first error, if any, ends all of them, and is raised."""
    errors: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            lane(number)
        except BaseException as error:  # also Ctrl-C, which is the first lane's alone
            errors.append(error)
            over.set()

    others = [threading.Thread(target=guarded, args=(number,), name=f"lane {number}") for number in range(1, lanes)]
    for other in others:
        other.start()
    guarded(0)
    for other in others:
        other.join()
    if errors:
        raise errors[0]
