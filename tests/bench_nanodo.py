"""Tokens a second of training against google-deepmind/nanodo's model, same shape, data, optimizer and process.

    git clone https://github.com/google-deepmind/nanodo
    python tests/bench_nanodo.py nanodo

Both train the architecture that nanodo has: learned positions, LayerNorm without bias, GELU, tied embeddings, AdamW after
clipping, float32. nanodo's step is its own: one jitted, donated step a dispatch, the metrics of a step fetched after the next is
dispatched. Ours is the training call of this package, 32 steps a dispatch. Rounds alternate, after a warm-up of each; the figure is
the median over rounds of tokens of the batch divided by wall time.
"""

import functools
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llm_jax.config import Model, Train
from llm_jax.models import families
from llm_jax.parts import num_params
from llm_jax.training import pretrain
from llm_jax.training.optimizer import adamw
from llm_jax.training.step import init_state, make_train_call, make_train_step

CONTEXT, STEPS, ROUNDS = 128, 32, 7
SHAPES = [(2, 32, 2, 8), (3, 64, 2, 8), (4, 128, 4, 8), (6, 256, 4, 8)]
"""Layers, width, heads, rows."""


def ours(layers: int, width: int, heads: int, tokens: np.ndarray):
    same = {"mlp": "gelu", "norm": "layernorm", "positions": "learned", "max_context": CONTEXT, "qk_norm": False}
    model = Model(num_layers=layers, d_model=width, num_heads=heads, **same)
    cfg = Train()
    call = make_train_call(make_train_step(pretrain.loss_fn(model, Train()), adamw(cfg)), STEPS)
    state = init_state(families.init(model, jax.random.key(0)), adamw(cfg).init, 0)
    rates = np.full(STEPS, 1e-3, np.float32)

    def round_() -> float:
        nonlocal state
        state, metrics = call(state, {"tokens": tokens}, rates, STEPS)
        return float(metrics["nll"][-1])

    return round_, num_params(model)


def nanodo(layers: int, width: int, heads: int, tokens: np.ndarray):
    from nanodo.model import DoConfig, TransformerDo

    module = TransformerDo(DoConfig(D=width, H=heads, L=CONTEXT, N=layers, V=256, F=4 * width, fsdp_enabled=False))
    params = module.init(jax.random.key(0), jnp.zeros((1, CONTEXT), jnp.int32))["params"]
    cfg = Train()
    chain = optax.chain(
        optax.clip_by_global_norm(cfg.clip_norm), optax.adamw(1e-3, cfg.beta1, cfg.beta2, weight_decay=cfg.weight_decay)
    )

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, rows):
        def loss(params):
            logits = module.apply({"params": params}, rows[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:]).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = chain.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    state = (params, chain.init(params))

    def round_() -> float:
        nonlocal state
        pending = None
        for rows in tokens:
            params, opt_state, value = step(*state, rows)
            state = (params, opt_state)
            if pending is not None:
                jax.device_get(pending)
            pending = value
        return float(pending)

    return round_, sum(x.size for x in jax.tree.leaves(params))


def main(path: str) -> None:
    sys.path.insert(0, path)
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}, context {CONTEXT}, float32, median of {ROUNDS} rounds of {STEPS} steps"
    )
    for layers, width, heads, rows in SHAPES:
        tokens = np.random.default_rng(0).integers(0, 256, (STEPS, rows, CONTEXT + 1)).astype(np.int32)
        runs = {name: make(layers, width, heads, tokens) for name, make in (("nanodo", nanodo), ("llm_jax", ours))}
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(ROUNDS + 1):
            for name, (round_, _) in runs.items():
                start = time.perf_counter()
                round_()
                seconds[name].append(time.perf_counter() - start)
        speed = {name: STEPS * rows * CONTEXT / statistics.median(times[1:]) for name, times in seconds.items()}
        sizes = "/".join(f"{size:,}" for size in {size for _, size in runs.values()})
        shape = f"L {layers} D {width:3} rows {rows} N {sizes:>9}"
        ratio = speed["llm_jax"] / speed["nanodo"]
        print(f"{shape}: nanodo {speed['nanodo']:9,.0f}, llm_jax {speed['llm_jax']:9,.0f} tokens/s, x {ratio:.2f}")


if __name__ == "__main__":
    main(sys.argv[1])
