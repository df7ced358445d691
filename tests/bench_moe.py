"""Tokens a second of training a mixture of experts against a dense model with as many active parameters.

    python tests/bench_moe.py

Full steps (forward, backward, AdamW) in bfloat16 of GPT-2's small shape with 50,304 tokens, context 1,024: dense with an MLP of 3,072,
and 8 experts of 1,536 of which a token passes 2. Rounds alternate, after a warm-up of each; the figure is the median over rounds.
Then the products of one layer's experts alone, forwards and backwards, by each way to do them, beside one dense product of as many FLOPs.
On a CPU the shapes are tiny, and the figures say nothing but that it runs.
"""

import functools
import statistics
import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import parts
from llm_jax.config import Experts, Model, Train
from llm_jax.models import families, moe
from llm_jax.training import pretrain
from llm_jax.training.optimizer import adamw
from llm_jax.training.step import init_state, make_train_call, make_train_step

SMALL = jax.default_backend() == "cpu"
ROWS, CONTEXT, STEPS, ROUNDS = (2, 64, 2, 2) if SMALL else (32, 1024, 8, 3)
DENSE = Model(
    vocab_size=256 if SMALL else 50_304,
    num_layers=2 if SMALL else 12,
    d_model=64 if SMALL else 768,
    num_heads=1 if SMALL else 12,
    dtype="bfloat16",
)
WAYS = {
    "dense": DENSE,
    "dropless": replace(DENSE, experts=Experts(8, 2, granularity=2)),
    "capacity 1.25": replace(DENSE, experts=Experts(8, 2, granularity=2, capacity_factor=1.25)),
}


def training(model: Model, tokens: np.ndarray):
    """round() -> seconds a step, and the largest load of an expert in its last step, of which 1 is even."""
    cfg = Train()
    step = make_train_step(pretrain.loss_fn(model, Train()), adamw(cfg), 1, pretrain.adjust_fn(model))
    call = make_train_call(step, STEPS)
    state = init_state(families.init(model, jax.random.key(0)), adamw(cfg).init, 0)
    rates = np.full(STEPS, 3e-4, np.float32)

    def round_() -> tuple[float, float]:
        nonlocal state
        start = time.perf_counter()
        state, metrics = call(state, {"tokens": tokens}, rates, STEPS)
        float(metrics["nll"][-1])
        seconds = (time.perf_counter() - start) / STEPS
        load = np.asarray(metrics.get("expert_load", np.ones((1, 1, 1))))[-1]
        return seconds, float((load.max(-1) / load.mean(-1)).mean())

    return round_


def milliseconds(function, *arguments) -> float:
    compiled = jax.jit(function)
    jax.block_until_ready(compiled(*arguments))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(5):
            out = compiled(*arguments)
        jax.block_until_ready(out)
        times.append((time.perf_counter() - start) / 5)
    return 1e3 * statistics.median(times)


def products_of_a_layer(step_ms: float) -> None:
    """Forwards and backwards through the two products of one layer's experts, even load."""
    model = WAYS["dropless"]
    tokens, width, hidden, number = ROWS * CONTEXT, model.d_model, model.expert_width, model.experts.number
    choices = tokens * model.experts.per_token
    rng = jax.random.split(jax.random.key(0), 3)
    kernels = {
        "up": jax.random.normal(rng[0], (number, width, hidden), jnp.float32).astype(model.dtype),
        "down": jax.random.normal(rng[1], (number, hidden, width), jnp.float32).astype(model.dtype),
    }
    expert_MxJ = jax.random.randint(rng[2], (tokens, 2), 0, number, jnp.int32)
    x_MxD = jnp.ones((tokens, width), model.dtype)
    flops = 3 * 2 * 2 * choices * width * hidden

    def report(name, ms):
        print(
            f"  {name:34} {ms:7.2f} ms, {flops / ms / 1e9:6.1f} TFLOP/s of what is needed, {model.num_layers * ms / step_ms:6.1%} of a step"
        )

    def through(kernels, x_PxQxD, expert_P):
        return moe._experts(model, kernels, x_PxQxD, expert_P).astype(jnp.float32).sum()

    def dense(kernels, x_AxD):
        return jnp.square(jax.nn.relu(x_AxD @ kernels["up"][0])) @ kernels["down"][0]

    both = functools.partial(jax.grad, argnums=(0, 1))
    report(
        "dense",
        milliseconds(
            both(lambda k, x: dense(k, x).astype(jnp.float32).sum()), kernels, jnp.ones((choices, width), model.dtype)
        ),
    )
    for factor in (1.0, 1.25):
        x_ExQxD = jnp.ones((number, int(factor * choices / number), width), model.dtype)
        report(f"capacity {factor}", milliseconds(both(lambda k, x: through(k, x, None)), kernels, x_ExQxD))
    default, product = moe.BLOCKS_PER_EXPERT, moe.grouped_product
    for blocks in (2, 4, 8, 16):
        moe.BLOCKS_PER_EXPERT = blocks
        where = moe.layout(expert_MxJ, number)
        x_PxQxD = moe.dispatch(x_MxD, where).reshape(len(where.expert_P), -1, width)
        name = f"dropless, {blocks} blocks of {x_PxQxD.shape[1]:,}"
        report(name, milliseconds(both(lambda k, x, p=where.expert_P: through(k, x, p)), kernels, x_PxQxD))
    moe.BLOCKS_PER_EXPERT, moe.grouped_product = default, moe.ragged_product
    report("ragged_dot on these rows", milliseconds(both(lambda k, x: through(k, x, where.expert_P)), kernels, x_PxQxD))
    moe.grouped_product = product

    def whole(params, x_MxD, model):
        y_MxD, routing = moe.mixture(model, params, x_MxD, train=True)
        return y_MxD.astype(jnp.float32).sum() + routing["balance"]

    params = kernels | {"router": jax.random.normal(rng[2], (width, number), jnp.float32)}
    noise_MxD = jax.random.normal(rng[0], (tokens, width), jnp.float32).astype(model.dtype)
    for name in ("dropless", "capacity 1.25"):
        function = both(functools.partial(whole, model=WAYS[name]))
        report(f"{name}, the whole layer", milliseconds(function, params, noise_MxD))


def main() -> None:
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {ROWS} x {CONTEXT} tokens,"
        f" bfloat16, median of {ROUNDS} rounds of {STEPS} steps"
    )
    tokens = np.random.default_rng(0).integers(0, DENSE.vocab_size, (STEPS, ROWS, CONTEXT + 1)).astype(np.int32)
    speed, seconds = {}, {}
    for name, model in WAYS.items():
        round_ = training(model, tokens)
        start = time.perf_counter()
        round_()
        compiled = time.perf_counter() - start
        rounds = [round_() for _ in range(ROUNDS)]
        seconds[name] = statistics.median(time for time, _ in rounds)
        speed[name] = ROWS * CONTEXT / seconds[name]
        print(
            f"{name:14} N active {parts.num_params_active(model):11,} total {parts.num_params(model):11,}: {speed[name]:10,.0f} tokens/s,"
            f" x {speed[name] / speed['dense']:.3f} of dense; {1e3 * seconds[name]:.1f} ms a step, compiled in {compiled:.0f} s,"
            f" largest load {rounds[-1][1]:.2f}",
            flush=True,
        )
        del round_
    print("products of one layer's experts, forwards and backwards; shares of the dropless step:")
    products_of_a_layer(1e3 * seconds["dropless"])


if __name__ == "__main__":
    main()
