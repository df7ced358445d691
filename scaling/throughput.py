"""How fast a model trains: tokens a second of the compiled training call, model FLOPs utilisation, memory, time to compile.

The call is that of the training loop, several optimizer steps with their metrics, on random tokens that are on the device before the
clock starts. Model FLOPs are those that the model needs, whatever a program recomputes: 6 N a token, N the active parameters, and
attention with the full square of positions, 12 L D S (Chowdhery et al. 2022, appendix B). A GPU is divided by the peak of its data
sheet; a CPU has none, and is divided by what NumPy's product of two matrices reaches there.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np

from llm_jax import parts
from llm_jax.config import Config
from llm_jax.settings import BadInput
from scaling.hardware import PEAK_FLOPS

ROUNDS, WARM_UP = 10, 2
"""Calls that are timed, and that are not; the median counts."""
MATRIX = 1024
"""Side of NumPy's matrices."""


def bench_train(cfg: Config) -> dict[str, Any]:
    """`llm-jax bench train`: the training step of a resolved config, as it would run in a trial of train.steps_per_call."""
    if cfg.model.counted:
        raise BadInput(f"model.family={cfg.model.family} is counted, not trained: there is no step to time")
    if cfg.model.media.kind != "none":
        raise BadInput("bench train has random tokens and no media; give model.media.kind=none")
    if cfg.train.compile != "jit":
        raise BadInput(f"bench train times train.compile=jit, not {cfg.train.compile}")
    import jax

    call, state, batches, rates, compile_seconds, size, devices = _compiled(cfg)
    seconds = []
    for _ in range(WARM_UP + ROUNDS):
        began = time.perf_counter()
        state, metrics = call(state, batches, rates, np.int32(len(rates)))
        loss = float(metrics["nll"][-1])  # waits for the whole call
        seconds.append((time.perf_counter() - began) / len(rates))
    step = statistics.median(seconds[WARM_UP:])
    tokens, flops = cfg.rows_per_step * cfg.data.context, model_flops(cfg)
    peak, whose = _peak(jax.devices()[0].device_kind)
    return {
        "device": jax.devices()[0].device_kind,
        "devices": devices,
        "jax": jax.__version__,
        "dtype": cfg.model.dtype,
        "n_params": parts.num_params(cfg.model),
        "n_active": parts.num_params_active(cfg.model, cfg.data.context, cfg.data.prefix),
        "rows": cfg.rows_per_step,
        "context": cfg.data.context,
        "steps_per_call": len(rates),
        "rounds": ROUNDS,
        "seconds_per_step": step,
        "fastest": min(seconds[WARM_UP:]),
        "slowest": max(seconds[WARM_UP:]),
        "tokens_per_second": tokens / step,
        "flops_per_token": flops,
        "flops_convention": "6 N active + 12 L D S, attention in full",
        "peak_flops": peak,
        "peak_of": whose,
        "mfu": tokens * flops / step / peak / devices,
        "memory_bytes": size,
        "compile_seconds": compile_seconds,
        "loss": loss,
    }


def model_flops(cfg: Config) -> int:
    """Of a token, forwards and backwards: 6 N active and attention's two products over the full square."""
    context, prefix = cfg.data.context, cfg.data.prefix
    attention = 3 * parts.flops(parts.parts(cfg.model, context, prefix), "attention")
    return 6 * parts.num_params_active(cfg.model, context, prefix) + attention


def _compiled(cfg: Config):
    """The compiled call with its arguments, seconds to compile it, the bytes a device that it needs, and the devices."""
    from llm_jax.data.pipeline import segments
    from llm_jax.training import loop
    from llm_jax.training import mesh as meshes

    mesh = meshes.make(cfg)
    call, init_opt = loop.compiled_call(cfg.model, loop.program(cfg.train), cfg.data.prefix, mesh)
    state = loop.first_state(cfg, mesh, init_opt)
    shape = (cfg.train.steps_per_call, cfg.rows_per_step, cfg.data.context + 1)
    tokens = np.random.default_rng(0).integers(0, cfg.model.vocab_size, shape).astype(np.int32)
    batches = {"tokens": tokens} | ({"segments": segments(tokens, 0)} if cfg.data.document_mask else {})
    batches = meshes.spread(batches, meshes.batch_sharding(mesh))
    rates = np.full(cfg.train.steps_per_call, cfg.train.peak_lr, np.float32)
    began = time.perf_counter()
    compiled = call.lower(state, batches, rates, np.int32(len(rates))).compile()
    seconds = time.perf_counter() - began
    needs = compiled.memory_analysis()
    size = needs.temp_size_in_bytes + needs.argument_size_in_bytes + needs.output_size_in_bytes
    return compiled, state, batches, rates, seconds, size - needs.alias_size_in_bytes, mesh.size


def _peak(device_kind: str) -> tuple[float, str]:
    """FLOP/s to divide by, and whose they are."""
    words = device_kind.lower().replace("-", " ").split()
    for chip in sorted(PEAK_FLOPS, key=len, reverse=True):
        if all(word in words for word in chip.split("-")):
            return PEAK_FLOPS[chip], f"{chip}, dense bf16 by its data sheet"
    return _numpy_flops(), f"NumPy, {MATRIX} x {MATRIX} float32"


def _numpy_flops() -> float:
    """FLOP/s of the product of two float32 matrices, all cores."""
    a, b = np.random.default_rng(0).standard_normal((2, MATRIX, MATRIX)).astype(np.float32)
    seconds = []
    for _ in range(WARM_UP + ROUNDS):
        began = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - began)
    return 2 * MATRIX**3 / statistics.median(seconds[WARM_UP:])


def describe(found: dict[str, Any]) -> str:
    """The table for people."""
    lines = [
        f"{found['devices']} x {found['device']}, jax {found['jax']}, {found['dtype']};"
        f" N {found['n_params']:,}, active {found['n_active']:,}; {found['rows']} rows of {found['context']:,} tokens a step",
        "",
        f"tokens a second  {found['tokens_per_second']:,.0f}",
        f"step             {1e3 * found['seconds_per_step']:.3f} ms, median of {found['rounds']} calls of {found['steps_per_call']} steps"
        f" ({1e3 * found['fastest']:.3f} to {1e3 * found['slowest']:.3f})",
        f"utilisation      {100 * found['mfu']:.1f} % of {found['peak_flops'] / 1e12:,.3g} TFLOP/s ({found['peak_of']});"
        f" {found['flops_per_token']:,} FLOPs a token: {found['flops_convention']}",
        f"memory           {found['memory_bytes'] / 2**30:.2f} GiB a device, by the compiled program",
        f"compilation      {found['compile_seconds']:.1f} s",
    ]
    return "\n".join(lines)
