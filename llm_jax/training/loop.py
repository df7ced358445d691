"""The training loop: compiled calls of several steps, with metrics, checkpoints and evaluations between them."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from llm_jax import files
from llm_jax.config import Config, trunk_key
from llm_jax.data import pipeline
from llm_jax.data.prepare import Prepared
from llm_jax.models import ngram
from llm_jax.settings import BadInput
from llm_jax.training import hosts, initial, pretrain, programs
from llm_jax.training import mesh as meshes
from llm_jax.training.checkpoint import Checkpoints
from llm_jax.training.lanes import Lanes
from llm_jax.training.metrics import Metrics
from llm_jax.training.optimizer import cooldown_start, learning_rates
from llm_jax.training.preemption import Preempted
from llm_jax.training.step import init_state, one_replica, replicate
from llm_jax.training.watch import Watch

Progress = Callable[[int, int, float], None]
"""progress(step, num_steps, training loss)."""


COUNTS = "counts.npz"
"""In the folder of an n-gram model's run, in place of checkpoints."""


@dataclass(frozen=True)
class Result:
    """How a run ended. `loss`, `standard_error` (nats a token) and `bits_per_byte` are of the held-out set after the last step."""

    status: str
    """"done", or "failed" with `reason`."""
    loss: float = math.nan
    standard_error: float = math.nan
    bits_per_byte: float = math.nan
    reason: str = ""
    first_step: int = 0
    """Where this run took over from a trunk: steps before it were paid for by another run."""
    seconds: float = 0.0
    """Of training in this process, compilation included."""
    tokens_per_second: float = 0.0
    """After the first call, which compiles; 0 where there was no other."""
    n_params: int | None = None
    """N of a model whose size the data decides; None for all others, whose config does."""


def train(
    cfg: Config,
    prepared: Prepared,
    folder: Path,
    *,
    trunks: Path | None = None,
    branch_steps: Sequence[int] = (),
    progress: Progress = lambda step, total, loss: None,
    devices: Sequence[Any] | None = None,
    told: Callable[[], bool] = lambda: False,
    watch: Watch | None = None,
    lanes: Lanes | None = None,
) -> Result:
    """Runs `cfg` (resolved) to its end in `folder`, from its last checkpoint where there is one, and evaluates. On `devices`, or all.

    On one mesh the bits of the result do not depend on where it was stopped and started. With the schedule wsd, `trunks` is a folder shared
    by runs that differ in their horizon: this run starts from the latest step saved there by another that is still its own
    past, and leaves its state there at `branch_steps` for others. A loss that is not finite ends the run as "failed".

    `told` is asked once a call: whether to save and raise Preempted (see preemption.noticed). `watch` is told where time goes.
    Other threads of this process may train with the same `lanes`, on the same device.
    """
    num_steps, per_call = cfg.num_steps, cfg.train.steps_per_call
    read = functools.partial(
        pipeline.train_iterator, prepared, cfg.data.context, cfg.rows_per_step, cfg.data.shuffle_seed
    )
    if cfg.model.counted:
        return _count(cfg, prepared, read(), _evaluation(cfg, prepared), folder, progress)
    mesh = meshes.make(cfg, devices)
    if cfg.train.compile == "pmap" and jax.process_count() > 1:
        raise BadInput("train.compile=pmap is of one process; several train with train.compile=jit")
    evaluate = _evaluation(cfg, prepared, mesh)
    shape = (cfg.model, programs.program(cfg.train), cfg.data.prefix, mesh)
    call, init_opt = programs.compiled_call(*shape)
    state = programs.first_state(cfg, mesh, init_opt)
    tokenizer = prepared.tokenizer()
    with contextlib.ExitStack() as stack:  # whatever ends the run, a save under way is finished first
        watch = watch or stack.enter_context(contextlib.closing(Watch(folder.name)))
        checkpoints = stack.enter_context(contextlib.closing(Checkpoints(folder / "checkpoints")))
        trunk = None
        if trunks and cfg.train.schedule == "wsd":
            key = trunk_key(cfg, prepared.fingerprint)
            trunk = stack.enter_context(contextlib.closing(Checkpoints(trunks / key, keep=None)))
        first_step = 0
        if saved := checkpoints.steps():
            state = checkpoints.restore(saved[-1], state)
            first_step = (files.find_json(folder / "start.json") or {}).get("first_step", 0)
        elif trunk and (past := [step for step in trunk.steps() if step <= cooldown_start(cfg.train, num_steps)]):
            first_step = past[-1]
            state = trunk.restore(first_step, state)
            if hosts.first():
                files.write_json(folder / "start.json", {"first_step": first_step})
        elif cfg.train.init_from:
            source, said = initial.plan(cfg, prepared.tokenizer_sha256)
            params = initial.take(
                state.params, jax.device_get(load_params(source.config, source.folder)), said["taken"]
            )
            params = programs.placed(params, cfg.model, mesh)
            state = programs.placed(init_state(params, init_opt, cfg.train.seed), cfg.model, mesh)
            if hosts.first():
                files.write_json(folder / initial.FILE, {"from": str(source.folder), **said})

        step = int(state.step)
        iterator = read(meshes.rows_here(mesh, cfg.rows_per_step), step)
        whole = one_replica if cfg.train.compile == "pmap" else lambda state: state
        if cfg.train.compile == "pmap":
            state = replicate(state, list(mesh.devices.flat))
        if lanes:
            pair = programs.joined_call(*shape, 2)
            call = stack.enter_context(lanes.join(programs.key(cfg), call, pair))
        metrics = stack.enter_context(contextlib.closing(Metrics(folder, step, hosts.first())))
        branch_steps = [s for s in branch_steps if trunk and s not in trunk.steps()]
        stops = sorted({num_steps, *branch_steps} - {0})
        pending: tuple[int, int, Any] | None = None
        bad_step = None
        clock: tuple[int, float] | None = None  # (step, time) after the first call, which compiles
        started = time.perf_counter()
        watch.begin(step)
        while step < num_steps and bad_step is None:
            n = min(per_call - step % per_call, next(s for s in stops if s > step) - step)
            watch.enter("data")
            rows_C = _stack([next(iterator) for _ in range(n)], per_call)
            rates_C = np.zeros(per_call, np.float32)
            rates_C[:n] = learning_rates(cfg.train, num_steps, np.arange(step, step + n))
            batches = pretrain.make_batch(rows_C["tokens"], tokenizer, cfg.data, rows_C.get("media"))
            batches = meshes.joined(batches, mesh, cfg.rows_per_step)
            watch.dispatch(n, hidden=pending is not None and not pending[2]["nll"].is_ready())
            state, new = call(state, batches, rates_C, n)
            # The call runs while the metrics of the one before are written and the next rows are read.
            if pending:
                bad_step = metrics.write(cfg, *pending)
                metrics.write_seconds(pending[0] + pending[1], watch.finish())
                clock = clock or (pending[0] + pending[1], time.perf_counter())
                progress(pending[0] + pending[1], num_steps, metrics.last_loss)
            pending, step = (step, n, new | {"learning_rate": rates_C}), step + n
            leaves = told() and step < num_steps
            boundary = step % cfg.train.checkpoint_every < n or step == num_steps or step in branch_steps or leaves
            evaluates = cfg.train.eval_every and step % cfg.train.eval_every < n and step < num_steps
            if bad_step is None and (boundary or evaluates):
                bad_step, pending = metrics.write(cfg, *pending), None
                metrics.write_seconds(step, watch.finish())
                progress(step, num_steps, metrics.last_loss)
                if bad_step is None and evaluates:
                    watch.enter("evaluation")
                    metrics.write_evaluation(step, cfg, evaluate(params=whole(state).params))
                if bad_step is None and boundary:
                    watch.enter("checkpoint")
                    metrics.flush()  # a restart from the checkpoint finds the lines of all steps before it
                    if trunk and step in branch_steps:  # first: a kill between the two must not lose the branch
                        trunk.save(step, whole(state))
                    checkpoints.save(step, whole(state))
                    if leaves:
                        raise Preempted(f"at step {step} of {num_steps}")
        ended = time.perf_counter()
        watch.enter("evaluation")
        evaluation = evaluate(params=whole(state).params) if bad_step is None else None
        if evaluation:
            metrics.write_evaluation(step, cfg, evaluation)
        watch.enter("checkpoint")  # the last one is waited for
    timing: dict[str, Any] = {"first_step": first_step, "seconds": ended - started}
    if clock and step > clock[0]:
        timing["tokens_per_second"] = (step - clock[0]) * int(cfg.train.tokens_per_step) / (ended - clock[1])
    if evaluation is None or not math.isfinite(evaluation.loss):
        reason = f"loss is {metrics.last_loss} at step {bad_step if bad_step is not None else step} of {num_steps}"
        return Result("failed", reason=reason, **timing)
    return Result("done", evaluation.loss, evaluation.standard_error, evaluation.bits_per_byte, **timing)


def _stack(batches: Sequence[dict[str, np.ndarray]], length: int) -> dict[str, np.ndarray]:
    """Batches of several steps as one, with zeros behind them up to `length`."""
    stacked = {name: np.zeros((length, *x.shape), x.dtype) for name, x in batches[0].items()}
    for i, batch in enumerate(batches):
        for name, x in batch.items():
            stacked[name][i] = x
    return stacked


def _evaluation(cfg: Config, prepared: Prepared, mesh: Mesh | None = None) -> Callable[..., pretrain.Evaluation]:
    """evaluate(params=...) on the fixed held-out set."""
    return functools.partial(
        pretrain.evaluate,
        cfg.model,
        held_out=pipeline.eval_set(prepared, cfg.data.context, cfg.data.eval_tokens),
        tokenizer=prepared.tokenizer(),
        data=cfg.data,
        mesh=mesh,
    )


def _count(cfg: Config, prepared: Prepared, iterator, evaluate, folder: Path, progress: Progress) -> Result:
    """The run of an n-gram model: it counts the rows that another family would take its steps on, and keeps folder/counts.npz.

    Killed, it starts again: a pass over the rows is seconds.
    """
    started = time.perf_counter()
    tokens_RxT = np.concatenate([next(iterator)["tokens"] for _ in range(cfg.num_steps)])
    params = ngram.count(cfg.model, tokens_RxT, prepared.tokenizer().bos if cfg.data.document_mask else None)
    if hosts.first():
        ngram.save(params, folder / COUNTS)
    seconds = time.perf_counter() - started
    evaluation = evaluate(params=params)
    with contextlib.closing(Metrics(folder, 0, hosts.first())) as metrics:
        metrics.write_evaluation(cfg.num_steps, cfg, evaluation)
    progress(cfg.num_steps, cfg.num_steps, evaluation.loss)
    return Result(
        "done",
        evaluation.loss,
        evaluation.standard_error,
        evaluation.bits_per_byte,
        seconds=seconds,
        tokens_per_second=int(cfg.train.tokens) / seconds,
        n_params=ngram.num_counts(params),
    )


def load_params(cfg: Config, folder: Path) -> Any:
    """Parameters of the last checkpoint of a run."""
    if cfg.model.counted:
        return ngram.load(folder / COUNTS)
    here = SingleDeviceSharding(jax.local_devices()[0])  # whatever mesh has written them
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), programs.abstract_state(cfg.model, cfg.train)
    )
    checkpoints = Checkpoints(folder / "checkpoints")
    steps = checkpoints.steps()
    if not steps:
        raise FileNotFoundError(f"{folder} holds no checkpoint")
    return checkpoints.restore(steps[-1], abstract).params
