"""One optimizer step as a pure function, and several of them as one compiled call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Batch = Any
"""A pytree of arrays whose leading axis is rows."""
LossFn = Callable[[Any, Batch, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]
"""loss(params, batch, key) -> (sum to minimise, sums to report); the sums hold "weight", which everything is divided by."""

AdjustFn = Callable[[Any, dict[str, jax.Array]], Any]
"""adjust(params, sums) -> params: what a step changes without a gradient, after the optimizer."""


class TrainState(NamedTuple):
    """All that a step reads and writes: float32 parameters, the optimizer's state beside them, and the steps taken."""

    step: jax.Array
    params: Any
    opt_state: Any
    key: jax.Array
    """Never advances: each step folds its number in, so that a restart draws the same numbers."""


def init_state(params: Any, init_opt: Callable[[Any], Any], seed: int) -> TrainState:
    """The state before the first step; the seed is of dropout."""
    return TrainState(jnp.int32(0), params, init_opt(params), jax.random.key_data(jax.random.key(seed)))


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    grad_accumulation: int = 1,
    adjust: AdjustFn | None = None,
):
    """Returns step(state, batch, learning_rate) -> (state, metrics); pure, for jit or pmap.

    Rows of the batch are split into `grad_accumulation` microbatches whose sums are added before the one division, so that
    rows of unequal weight count the same as in one large batch.
    """
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

    def grads_of(params, batch, key):
        if grad_accumulation == 1:
            (_, sums), grads = grad_fn(params, batch, key)
            return grads, sums
        micro = jax.tree.map(lambda x: x.reshape(grad_accumulation, -1, *x.shape[1:]), batch)

        def add(total, xs):
            (_, sums), grads = grad_fn(params, xs[0], xs[1])
            return jax.tree.map(jnp.add, total, (grads, sums)), None

        first = jax.tree.map(lambda x: x[0], micro)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(grads_of_one, params, first, key))
        return jax.lax.scan(add, zeros, (micro, jax.random.split(key, grad_accumulation)))[0]

    def grads_of_one(params, batch, key):
        (_, sums), grads = grad_fn(params, batch, key)
        return grads, sums

    def step(state: TrainState, batch: Batch, learning_rate: jax.Array):
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        grads, sums = grads_of(state.params, batch, key)
        weight = sums.pop("weight")
        grads = jax.tree.map(lambda g: g / weight, grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = jax.tree.map(lambda p, u: p + learning_rate * u, state.params, updates)
        if adjust:
            params = adjust(params, sums)
        metrics = {"grad_norm": optax.tree.norm(grads), **{name: value / weight for name, value in sums.items()}}
        return TrainState(state.step + 1, params, opt_state, state.key), metrics

    return step


def make_train_call(step, steps_per_call: int, compiler_options: dict[str, Any] | None = None):
    """Returns jitted call(state, batches, learning_rates_C, n) -> (state, metrics): the first n <= C steps in one dispatch.

    n is an argument and not a shape, so that the short last call of a run needs no second compilation. The state is donated.
    Metrics are arrays whose first axis is C; entries from n on are zero.
    """

    @functools.partial(jax.jit, donate_argnums=0, compiler_options=compiler_options)
    def call(state: TrainState, batches, learning_rates_C: jax.Array, n: jax.Array):
        def one(i, carry):
            state, metrics = carry
            batch = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), batches)
            state, new = step(state, batch, learning_rates_C[i])
            return state, jax.tree.map(lambda all_C, x: all_C.at[i].set(x), metrics, new)

        first = jax.tree.map(lambda x: x[0], batches)
        shapes = jax.eval_shape(step, state, first, learning_rates_C[0])[1]
        metrics = jax.tree.map(lambda x: jnp.zeros((steps_per_call, *x.shape), x.dtype), shapes)
        return jax.lax.fori_loop(0, n, one, (state, metrics))

    return call
