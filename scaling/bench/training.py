"""How fast a model trains: tokens a second of the compiled training call, model FLOPs utilisation, memory, time to compile.

The call is that of the training loop, several optimizer steps with their metrics, on random tokens that are on the device before the
clock starts. Model FLOPs are those that the model needs, whatever a program recomputes: 6 N a token, N the active parameters, and
attention with the full square of positions, 12 L D S (Chowdhery et al. 2022, appendix B). A GPU is divided by the peak of its data
sheet; a CPU has none, and is divided by what NumPy's product of two matrices reaches there, which is timed turn about with the calls:
a machine that others use is then slow for both.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from llm_jax import parts
from llm_jax.config import Config, Mesh
from llm_jax.settings import BadInput
from scaling import ledger
from scaling.hardware import PEAK_FLOPS

ROUNDS, WARM_UP = 10, 2
"""Calls that are timed, and that are not; the median counts."""
WARM_SECONDS = 10
"""For which a GPU or TPU also warms up: at the limit of its power a hot GPU takes 1 to 2 % longer a step."""
MATRIX = 1024
"""Side of NumPy's matrices."""

Dispatch = Callable[[], dict[str, Any]]
"""dispatch() -> the metrics of one more call, which need not have ended."""
Round = Callable[[], tuple[float, dict[str, Any]]]
"""round_() -> (seconds a step of one call, the metrics of its steps, on the device)."""


def bench_train(cfg: Config, lanes: int = 1, alone: bool = False) -> dict[str, Any]:
    """`llm-jax bench train`: the training step of a resolved config, as it would run in a trial of train.steps_per_call: on one device, or
    on the mesh that the config asks for; or in so many `lanes` that train trials of this shape side by side, in step with each other.

    What is in it: see `record`; with `alone` first each device of the mesh for itself, on as many rows as it has of the mesh's, under
    "alone". BadInput for a model that has no step, or one that random tokens are not enough for.
    """
    check(cfg)
    if lanes < 1:
        raise BadInput(f"--lanes must be positive, got {lanes}")
    if lanes > 1 and asks_for_several(cfg):
        raise BadInput("lanes share one device: leave mesh and train.compile at their defaults, or --lanes at 1")
    if alone and not asks_for_several(cfg):
        raise BadInput("--alone is beside several devices; ask for them, for instance by --mesh.data -1")
    return _beside_one(cfg) if alone else _taken(cfg, lanes)


def _beside_one(cfg: Config) -> dict[str, Any]:
    """The record of a mesh, and under "alone" how each of its devices did before."""
    from llm_jax.training import mesh as meshes

    mesh = meshes.make(cfg)
    rows = cfg.rows_per_step // math.prod(mesh.shape[axis] for axis in meshes.rows_of(mesh))
    train = replace(cfg.train, compile="jit", tokens_per_step=rows * cfg.data.context)
    one = replace(cfg, train=train, mesh=Mesh(data=1))
    found = {f"{device.platform}:{device.id}": _taken(one, devices=[device]) for device in mesh.devices.flat}
    every = _taken(cfg)
    speed = every["tokens_per_second"]
    alone = [
        {"device": name, "speedup": speed / each["tokens_per_second"]}
        | {key: each[key] for key in ("rows", "seconds_per_step", "tokens_per_second")}
        for name, each in found.items()
    ]
    return every | {"alone": alone}


def _taken(cfg: Config, lanes: int = 1, devices: Sequence[Any] | None = None) -> dict[str, Any]:
    """The record of a config after warm-up and rounds; what it held on devices is gone then."""
    import jax

    facts, dispatch = start(cfg, lanes, devices)
    cpu = jax.default_backend() == "cpu"  # whose next call would run beside NumPy's product
    round_ = waited(dispatch) if cpu else queued(dispatch)
    for _ in range(WARM_UP):
        round_()
    began = time.perf_counter()
    while not cpu and time.perf_counter() - began < WARM_SECONDS:
        round_()
    rounds = [timed(round_) for _ in range(ROUNDS)]
    return record(cfg, facts | {"queued": not cpu}, rounds, lanes)


def check(cfg: Config) -> None:
    """Refuses what has no step to time."""
    if cfg.model.counted:
        raise BadInput(f"model.family={cfg.model.family} is counted, not trained: there is no step to time")
    if cfg.model.media.kind != "none":
        raise BadInput("the benches have random tokens and no media; give model.media.kind=none")


def asks_for_several(cfg: Config) -> bool:
    """Whether the config says how to use several devices; else one is timed, whatever others there are."""
    return cfg.train.compile != "jit" or cfg.mesh != Mesh()


def start(cfg: Config, lanes: int = 1, devices: Sequence[Any] | None = None) -> tuple[dict[str, Any], Dispatch]:
    """What is known of a compiled training call before it is timed, and the call; on `devices` in place of those that the config asks
    for."""
    import jax

    count, call, state, batches, rates, compile_seconds, size = _compiled(cfg, lanes, devices)
    steps = np.int32(cfg.train.steps_per_call)

    def dispatch() -> dict[str, Any]:
        nonlocal state
        ended = call(state, batches, rates, steps)
        if lanes > 1:
            state, metrics = tuple(one for one, _ in ended), ended[0][1]
        else:
            state, metrics = ended
        return metrics

    facts = {
        "device": device_name(),
        "devices": count,
        "platform": jax.default_backend(),
        "framework": f"jax {jax.__version__}",
        "n_params": parts.num_params(cfg.model),
        "memory_bytes": size,
        "compile_seconds": compile_seconds,
    }
    return facts, dispatch


def waited(dispatch: Dispatch) -> Round:
    """Rounds of a call each, from its dispatch to its end."""

    def round_() -> tuple[float, dict[str, Any]]:
        began = time.perf_counter()
        metrics = dispatch()
        steps = len(np.asarray(metrics["nll"]))  # waits for the whole call
        return (time.perf_counter() - began) / steps, metrics

    return round_


def queued(dispatch: Dispatch) -> Round:
    """Rounds from the end of a call to that of the next, which was dispatched before: devices do not wait for the host, as in the training
    loop. The first round has both."""
    flying, ended = dispatch(), time.perf_counter()

    def round_() -> tuple[float, dict[str, Any]]:
        nonlocal flying, ended
        metrics, flying = flying, dispatch()
        steps = len(np.asarray(metrics["nll"]))
        began, ended = ended, time.perf_counter()
        return (ended - began) / steps, metrics

    return round_


def timed(round_: Round) -> dict[str, Any]:
    """One round as plain numbers: seconds a step, loss of the last one, and on a GPU the most bytes that the allocator has held in this
    process; on a CPU seconds of NumPy's product after it, and for both the CPU time (of all threads) that they took."""
    import jax

    began = time.process_time()
    seconds, metrics = round_()
    cpu_seconds = (time.process_time() - began) / len(metrics["nll"])
    found = {"seconds": seconds, "loss": float(np.asarray(metrics["nll"])[-1])}
    if jax.default_backend() != "cpu":
        held = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
        return found | {"allocated_bytes": max((one for one in held if one), default=None)}
    numpy_seconds, numpy_cpu_seconds = _product_seconds()
    return found | {
        "cpu_seconds": cpu_seconds,
        "numpy_seconds": numpy_seconds,
        "numpy_cpu_seconds": numpy_cpu_seconds,
    }


def record(cfg: Config, facts: dict[str, Any], rounds: Sequence[dict[str, Any]], lanes: int = 1) -> dict[str, Any]:
    """`llm-jax bench train --json`: medians over rounds of `timed`.

    seconds_per_step, of all lanes; tokens_per_second, all lanes together; mfu by flops_convention, over peak_flops (FLOP/s) that are those
    of peak_of, of all devices; memory_bytes, what the compiled program needs of a device by its own analysis, None with pmap;
    allocated_bytes, the most that the allocator held, None on a CPU; compile_seconds; queued, whether rounds are those of `queued`, behind
    WARM_SECONDS of others.
    On a CPU also cpu_seconds_per_step of the round that took least, and cpu_mfu, FLOPs a second of CPU time over those of NumPy's product,
    each at its best round: what others on the machine take from either does not count. None on a GPU.
    """
    step = statistics.median(one["seconds"] for one in rounds)
    tokens, flops = lanes * cfg.rows_per_step * cfg.data.context, model_flops(cfg)
    peak, whose = peak_flops(facts["device"], [one["numpy_seconds"] for one in rounds if "numpy_seconds" in one])
    devices = facts["devices"]
    if facts["platform"] != "cpu":  # whose simulated devices share its cores
        peak *= devices
    cpu = min((one["cpu_seconds"] for one in rounds if "cpu_seconds" in one), default=None)
    numpy_cpu = min((one["numpy_cpu_seconds"] for one in rounds if "numpy_cpu_seconds" in one), default=None)
    return {
        "device": facts["device"],
        "devices": devices,
        "framework": facts["framework"],
        "dtype": cfg.model.dtype,
        "n_params": facts["n_params"],
        "n_active": parts.num_params_active(cfg.model, cfg.data.context, cfg.data.prefix),
        "lanes": lanes,
        "rows": cfg.rows_per_step,
        "context": cfg.data.context,
        "steps_per_call": cfg.train.steps_per_call,
        "rounds": len(rounds),
        "queued": facts.get("queued", False),
        "seconds_per_step": step,
        "fastest": min(one["seconds"] for one in rounds),
        "slowest": max(one["seconds"] for one in rounds),
        "tokens_per_second": tokens / step,
        "flops_per_token": flops,
        "flops_convention": "6 N active + 12 L D S, attention in full",
        "peak_flops": peak,
        "peak_of": whose,
        "mfu": tokens * flops / step / peak,
        "cpu_seconds_per_step": cpu,
        "cpu_mfu": tokens * flops / cpu / (2 * MATRIX**3 / numpy_cpu) if cpu and numpy_cpu else None,
        "memory_bytes": facts["memory_bytes"],
        "allocated_bytes": rounds[-1].get("allocated_bytes"),
        "compile_seconds": facts["compile_seconds"],
        "loss": rounds[-1]["loss"],
    }


def device_name() -> str:
    """The kind of the first device; of a CPU, which JAX calls "cpu" whatever it is, its model and cores."""
    import jax

    return ledger.processor() if jax.default_backend() == "cpu" else jax.devices()[0].device_kind


def model_flops(cfg: Config) -> int:
    """Of a token, forwards and backwards: 6 N active and attention's two products over the full square."""
    context, prefix = cfg.data.context, cfg.data.prefix
    attention = 3 * parts.flops(parts.parts(cfg.model, context, prefix), "attention")
    return 6 * parts.num_params_active(cfg.model, context, prefix) + attention


def _compiled(cfg: Config, lanes: int, devices: Sequence[Any] | None):
    """The number of devices, the compiled call with its arguments, of each lane where there are several, seconds to compile it, and the
    bytes that it needs."""
    import jax

    from llm_jax.data.pipeline import segments
    from llm_jax.training import mesh as meshes
    from llm_jax.training import programs
    from llm_jax.training.step import replicate

    mesh = meshes.make(cfg, devices or (None if asks_for_several(cfg) else jax.devices()[:1]))
    key = (cfg.model, programs.program(cfg.train), cfg.data.prefix, mesh)
    call, init_opt = programs.compiled_call(*key)
    pmapped = cfg.train.compile == "pmap"
    shape = (cfg.train.steps_per_call, cfg.rows_per_step, cfg.data.context + 1)
    rates = np.full(cfg.train.steps_per_call, cfg.train.peak_lr, np.float32)

    def arguments(seed: int) -> tuple[Any, ...]:
        one = replace(cfg, train=replace(cfg.train, seed=seed))
        tokens = np.random.default_rng(seed).integers(0, cfg.model.vocab_size, shape).astype(np.int32)
        batches = {"tokens": tokens} | ({"segments": segments(tokens, 0)} if cfg.data.document_mask else {})
        state = programs.first_state(one, mesh, init_opt)
        if pmapped:
            return replicate(state, list(mesh.devices.flat)), batches, rates
        return state, meshes.spread(batches, meshes.batch_sharding(mesh)), rates

    every, steps = arguments(0), np.int32(len(rates))
    if lanes > 1:
        call = programs.joined_call(*key, lanes)
        every = tuple(zip(*map(arguments, range(lanes)), strict=True))
    began = time.perf_counter()
    if pmapped:
        state, metrics = call(*every, np.int32(0))  # no steps: pmap compiles what it is called with
        metrics["nll"].block_until_ready()
        return mesh.size, call, state, *every[1:], time.perf_counter() - began, None
    compiled = call.lower(*every, steps).compile()
    return mesh.size, compiled, *every, time.perf_counter() - began, needed_bytes(compiled)


def needed_bytes(compiled: Any) -> int:
    """What a compiled program holds while it runs, by its own analysis."""
    needs = compiled.memory_analysis()
    size = needs.temp_size_in_bytes + needs.argument_size_in_bytes + needs.output_size_in_bytes
    return size - needs.alias_size_in_bytes


def peak_flops(device: str, product_seconds: Sequence[float]) -> tuple[float, str]:
    """FLOP/s to divide by, and whose they are. NaN for a chip whose data sheet is not in scaling/hardware.py."""
    if product_seconds:
        return 2 * MATRIX**3 / statistics.median(product_seconds), f"NumPy, {MATRIX} x {MATRIX} float32"
    words = device.lower().replace("-", " ").split()
    for chip in sorted(PEAK_FLOPS, key=len, reverse=True):
        if all(word in words for word in chip.split("-")):
            return PEAK_FLOPS[chip], f"{chip}, dense bf16 by its data sheet"
    return math.nan, "a chip whose peak is not known here"


@functools.cache
def _matrices() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((2, MATRIX, MATRIX)).astype(np.float32)


def _product_seconds() -> tuple[float, float]:
    """Of NumPy's product of two float32 matrices: by the clock, and of the CPU; the second of two, as the first wakes its threads."""
    a, b = _matrices()
    a @ b
    began, cpu_began = time.perf_counter(), time.process_time()
    a @ b
    return time.perf_counter() - began, time.process_time() - cpu_began


def describe(found: dict[str, Any]) -> str:
    """The table for people."""
    allocated = found["allocated_bytes"]
    said = [f"{found['memory_bytes'] / 2**30:.2f} GiB, by the compiled program"] if found["memory_bytes"] else []
    said += [f"{allocated / 2**30:.2f} GiB held by the allocator at most"] if allocated else []
    several = f"{found['devices']} x " if found["devices"] > 1 else ""
    lines = [
        f"{several}{found['device']}, {found['framework']}, {found['dtype']}; N {found['n_params']:,}, active {found['n_active']:,}; "
        f"{found['rows']} rows of {found['context']:,} tokens a step"
        + (f", {found['lanes']} trials at a time" if found["lanes"] > 1 else ""),
        "",
        f"tokens a second  {found['tokens_per_second']:,.0f}",
        f"step             {1e3 * found['seconds_per_step']:.3f} ms, median of {found['rounds']} calls of {found['steps_per_call']} steps,"
        f" each {f'queued behind the one before, after {WARM_SECONDS} s of others' if found['queued'] else 'waited for'}"
        f" ({1e3 * found['fastest']:.3f} to {1e3 * found['slowest']:.3f})",
        f"utilisation      {100 * found['mfu']:.1f} % of {found['peak_flops'] / 1e12:,.3g} TFLOP/s ({found['peak_of']});"
        f" {found['flops_per_token']:,} FLOPs a token: {found['flops_convention']}",
        f"memory           {'; '.join(said)}{', of each device' if several else ''}",
        f"compilation      {found['compile_seconds']:.1f} s",
    ]
    if alone := found.get("alone"):
        least, most = (chosen(alone, key=lambda one: one["tokens_per_second"]) for chosen in (min, max))
        lines.insert(
            3,
            f"                 x {least['speedup']:.3f} of {least['device']} alone, the slowest ({least['tokens_per_second']:,.0f},"
            f" {least['rows']} rows), x {most['speedup']:.3f} of {most['device']}, the fastest ({most['tokens_per_second']:,.0f})",
        )
    return "\n".join(lines)
