"""How fast a mixture of experts trains beside the dense model with as many active parameters: the price of routing, as a ratio.

Both are the compiled call of the training loop on the same random tokens, in one process, and take turns; medians are over rounds. The
dense twin has one MLP as wide as what a token passes of the experts, so that it lacks the routers alone.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from llm_jax.config import Config, Data, Experts, Model, Train
from llm_jax.settings import BadInput
from scaling.bench import training

EXPERTS = Experts(8, 2, granularity=2)
"""Where the config has none: 8 of half the MLP's width, 2 a token."""
GPT2_SMALL = Config(
    Model(vocab_size=50_304, num_layers=12, d_model=768, num_heads=12, dtype="bfloat16"),
    Data(tokenizer="bpe", context=1024),
    Train(tokens_per_step=32 * 1024, steps_per_call=8),
)
"""What is timed on a GPU where nothing is said: states and activations of both programs fit in 80 GB."""

TINY = Config(Model(num_layers=2, d_model=64), train=Train(tokens_per_step=8 * 128, steps_per_call=8))
"""The same on a CPU."""


def default() -> Config:
    """The config where the command line gives none."""
    import jax

    return TINY if jax.default_backend() == "cpu" else GPT2_SMALL


def dense_twin(model: Model) -> Model:
    """The model without experts whose MLP is as wide as the experts that a token passes, shared ones included."""
    experts = model.experts
    return replace(model, experts=Experts(), d_ff=model.expert_width * (experts.per_token + experts.shared))


def with_experts(cfg: Config) -> Config:
    """The config with EXPERTS where it has none."""
    return cfg if cfg.model.experts.number else replace(cfg, model=replace(cfg.model, experts=EXPERTS))


def bench_moe(cfg: Config) -> dict[str, Any]:
    """`llm-jax bench moe` of a resolved config with experts.

    Under "mixture" and "dense" what training.record has of each; "ratio", the mixture's tokens a second over the dense model's, and
    "cpu_ratio", the same by CPU time (None on a GPU); "busiest", the load of the busiest expert after the timed steps, over the mean,
    averaged over layers: 1 is even.
    """
    training.check(cfg)
    if not cfg.model.experts.number:
        raise BadInput("bench moe times a mixture; give model.experts.number, for instance 8")
    configs = {"mixture": cfg, "dense": replace(cfg, model=dense_twin(cfg.model))}
    started = {name: training.start(one) for name, one in configs.items()}
    turns = {name: training.waited(dispatch) for name, (_, dispatch) in started.items()}
    for _ in range(training.WARM_UP):
        for round_ in turns.values():
            round_()
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in turns}
    for _ in range(training.ROUNDS):
        for name, round_ in turns.items():
            rounds[name].append(training.timed(round_))
    found = {name: training.record(configs[name], facts, rounds[name]) for name, (facts, _) in started.items()}
    load_LxE = np.asarray(turns["mixture"]()[1]["expert_load"][-1])
    cpu = {name: one["cpu_seconds_per_step"] for name, one in found.items()}
    return found | {
        "device": found["dense"]["device"],
        "ratio": found["mixture"]["tokens_per_second"] / found["dense"]["tokens_per_second"],
        "cpu_ratio": cpu["dense"] / cpu["mixture"] if cpu["mixture"] else None,
        "busiest": float((load_LxE.max(-1) / load_LxE.mean(-1)).mean()),
    }


def describe(found: dict[str, Any]) -> str:
    """The table for people."""
    dense, mixture = found["dense"], found["mixture"]
    lines = [
        f"{dense['device']}, {dense['framework']}, {dense['dtype']}; {dense['rows']} rows of {dense['context']:,} tokens a step, "
        f"median of {dense['rounds']} calls of {dense['steps_per_call']} steps, turn about",
        "",
        f"{'':8} {'N active':>13} {'N':>13} {'tokens a second':>15} {'ms a step':>10} {'MFU':>7} {'GiB':>6} {'compiled in':>11}",
    ]
    for name, one in (("dense", dense), ("mixture", mixture)):
        lines.append(
            f"{name:8} {one['n_active']:>13,} {one['n_params']:>13,} {one['tokens_per_second']:>15,.0f} "
            f"{1e3 * one['seconds_per_step']:>10.3f} {100 * one['mfu']:>5.1f} % {one['memory_bytes'] / 2**30:>6.2f} "
            f"{one['compile_seconds']:>9.1f} s"
        )
    return "\n".join(
        [
            *lines,
            "",
            f"the mixture trains at {found['ratio']:.3f} of the dense model's speed; its busiest expert has {found['busiest']:.2f} of the"
            " mean load",
            f"MFU: {dense['flops_convention']}, over {dense['peak_flops'] / 1e12:,.3g} TFLOP/s ({dense['peak_of']})",
        ]
    )
