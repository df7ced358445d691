"""Tokens a second of the training call on one device and on meshes of all, with as many rows for each device, turn about.

    python tests/bench_mesh.py [--model.FIELD VALUE ...] [--rows 32] [--context 1024]

124 M parameters in bfloat16 by default, GPT-2's small shape; `--model.experts.number 8` also spreads experts. The first loss of every
mesh is that of one device on the same rows, to bfloat16's rounding: "same rows" checks it before anything is timed.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from llm_jax.config import Config, Data, Mesh, Model, Train
from llm_jax.settings import override
from llm_jax.training import mesh as meshes
from llm_jax.training import programs
from llm_jax.training.step import replicate

STEPS, ROUNDS = 8, 5
GPT2 = Model(
    vocab_size=50_304, num_layers=12, d_model=768, num_heads=12, mlp="gelu", norm="layernorm", dtype="bfloat16"
)


def compiled(cfg: Config) -> tuple[Any, Any, Any]:
    """The call, its state, and a function that makes its batches."""
    mesh = meshes.make(cfg)
    call, init_opt = programs.compiled_call(cfg.model, programs.program(cfg.train), 0, mesh)

    def batches() -> Any:
        shape = (STEPS, cfg.rows_per_step, cfg.data.context + 1)
        tokens = np.random.default_rng(0).integers(0, cfg.model.vocab_size, shape).astype(np.int32)
        if cfg.train.compile == "pmap":
            return {"tokens": tokens}
        return meshes.spread({"tokens": tokens}, meshes.batch_sharding(mesh))

    state = programs.first_state(cfg, mesh, init_opt)
    if cfg.train.compile == "pmap":
        return call, replicate(state, list(mesh.devices.flat)), batches
    return call, state, batches


def timed(cfg: Config) -> tuple[float, int]:
    """Tokens a second, the best of some calls, and the largest bytes a device."""
    call, state, batches = compiled(cfg)
    data, rates, seconds = batches(), np.full(STEPS, 1e-4, np.float32), []
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        state, metrics = call(state, data, rates, STEPS)
        assert np.isfinite(np.asarray(metrics["nll"])).all()
        seconds.append((time.perf_counter() - began) / STEPS)
    held = max((device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.devices())
    return int(cfg.train.tokens_per_step) / min(seconds[1:]), held


def first_loss(cfg: Config) -> float:
    """Of the first step."""
    call, state, batches = compiled(cfg)
    return float(call(state, batches(), np.zeros(STEPS, np.float32), 1)[1]["nll"][0])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=32, help="for each device, of a step")
    parser.add_argument("--context", type=int, default=1024)
    options, words = parser.parse_known_args()
    given = {name[2:]: value for name, value in zip(words[::2], words[1::2], strict=True)}
    hints = {name: int(value) if value.isdigit() else value for name, value in given.items()}
    count, unit = jax.device_count(), options.rows * options.context
    base = Config(GPT2, Data(context=options.context), Train(tokens_per_step=unit, tokens=unit, steps_per_call=STEPS))
    base = override(replace(base, train=replace(base.train, peak_lr=1e-4, warmup_steps=0)), hints)
    all_rows = override(base, {"train.tokens_per_step": unit * count})
    tries = {"data": Mesh(), "fsdp": Mesh(data=1, fsdp=-1), "tensor": Mesh(data=1, tensor=count)}
    if base.model.experts.number:
        tries["expert"] = Mesh(data=1, expert=count)
    wanted = first_loss(replace(base, mesh=Mesh(data=1)))
    for name, mesh in tries.items():
        print(
            f"same rows, {name}: loss {first_loss(replace(base, mesh=mesh)):.5f}, on one device {wanted:.5f}",
            flush=True,
        )
    alone = 0.0
    runs = {"one device": replace(base, mesh=Mesh(data=1))}
    runs |= {name: replace(all_rows, mesh=mesh) for name, mesh in tries.items()}
    if not base.model.experts.number:
        runs["data, pmap"] = override(runs["data"], {"train.compile": "pmap"})
    for name, cfg in runs.items():
        rate, held = timed(cfg)
        alone = alone or rate
        print(
            f"{name:12}{rate:12,.0f} tokens a second  x {rate / alone:.3f} of one device  {held / 2**30:.1f} GiB",
            flush=True,
        )


if __name__ == "__main__":
    main()
