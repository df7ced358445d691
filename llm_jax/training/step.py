"""One optimizer step as a pure function, and several of them as one compiled call."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llm_jax import axes
from llm_jax.training.optimizer import matrices, trained

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


class Replicas(NamedTuple):
    """Whole copies of the state, along an axis of shard_map or pmap, that train on rows of their own."""

    axis: str
    dtype: str
    """In which gradients of matrices travel."""
    freeze: tuple[str, ...] = ()
    """train.freeze: gradients that are zero stay where they are."""
    swap: bool = False
    """Of two: each sends its gradients to the other, and both add. As many bytes as a sum of both by NCCL, but by GPUs' copy engines."""

    def sum(self, grads: Any) -> Any:
        """Gradients of all replicas added up.

        Here, of all layers at once: XLA for GPUs would sum the gradient of each layer for itself, which it copies into buffers of 30 MB
        for that and out again.
        """

        def total(grad, matrix, moves):
            if not moves:
                return grad
            if not matrix:
                return jax.lax.psum(grad, self.axis)
            sent = grad.astype(self.dtype)
            if not self.swap:
                return jax.lax.psum(sent, self.axis).astype(grad.dtype)
            return sent.astype(grad.dtype) + jax.lax.ppermute(sent, self.axis, [(0, 1), (1, 0)]).astype(grad.dtype)

        return jax.tree.map(total, grads, matrices(grads), trained(grads, self.freeze))


def init_state(params: Any, init_opt: Callable[[Any], Any], seed: int) -> TrainState:
    """The state before the first step; the seed is of dropout."""
    return TrainState(jnp.int32(0), params, init_opt(params), jax.random.key_data(jax.random.key(seed)))


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    grad_accumulation: int = 1,
    adjust: AdjustFn | None = None,
    replicas: Replicas | None = None,
):
    """Returns step(state, batch, learning_rate) -> (state, metrics); pure, for jit, shard_map or pmap.

    Rows of the batch are split into `grad_accumulation` microbatches whose sums are added before the one division, so that
    rows of unequal weight count the same as in one large batch. Likewise the sums of `replicas`, whose draws of dropout are their own.
    """
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

    def grads_of(params, batch, key):
        if grad_accumulation == 1:
            (_, sums), grads = grad_fn(params, batch, key)
            return grads, sums
        micro = jax.tree.map(lambda x: x.reshape(grad_accumulation, -1, *x.shape[1:]), batch)
        micro = jax.tree.map(lambda x: axes.constrain(x, None, "rows"), micro)

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
        if replicas:
            key = jax.random.fold_in(key, jax.lax.axis_index(replicas.axis))
        grads, sums = grads_of(state.params, batch, key)
        if replicas:
            grads, sums = replicas.sum(grads), jax.lax.psum(sums, replicas.axis)
        weight = sums.pop("weight")
        grads = jax.tree.map(lambda g: g / weight, grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = jax.tree.map(lambda p, u: p + learning_rate * u, state.params, updates)
        if adjust:
            params = adjust(params, sums)
        metrics = {"grad_norm": optax.tree.norm(grads), **{name: value / weight for name, value in sums.items()}}
        return TrainState(state.step + 1, params, opt_state, state.key), metrics

    return step


def make_train_call(step, steps_per_call: int, **compilation: Any):
    """Returns jitted call(state, batches, learning_rates_C, n) -> (state, metrics): the first n <= C steps in one dispatch.

    n is an argument and not a shape, so that the short last call of a run needs no second compilation. The state is donated.
    Metrics are arrays whose first axis is C; entries from n on are zero. `compilation` is for jax.jit: shardings.
    """
    return jax.jit(_steps(step, steps_per_call), donate_argnums=0, **compilation)


def make_joined_call(step, steps_per_call: int, **compilation: Any):
    """make_train_call of several states in one program: call(states, batches, learning_rates, n), tuples all but n, -> a tuple of
    (state, metrics). Where one of them does not fill a GPU, kernels of another run beside its own."""

    def call(states, batches, learning_rates, n):
        def one(i, carries):
            return tuple(map(functools.partial(_advance, step, i), carries, batches, learning_rates))

        zeros = tuple(map(functools.partial(_no_metrics, step, steps_per_call), states, batches, learning_rates))
        return jax.lax.fori_loop(0, n, one, tuple(zip(states, zeros, strict=True)))

    return jax.jit(call, donate_argnums=0, **compilation)


REPLICAS = "replicas"
"""The axis of make_replica_call."""


def make_replica_call(step, steps_per_call: int, devices: Sequence[Any]):
    """make_train_call through jax.pmap: each array of the state has an axis of devices before it, and each device reads its share of the
    rows of `batches`."""
    call = jax.pmap(
        _steps(step, steps_per_call), REPLICAS, in_axes=(0, 1, None, None), devices=devices, donate_argnums=0
    )

    def cut(x):
        return x.reshape(x.shape[0], len(devices), -1, *x.shape[2:])

    def every(state, batches, learning_rates_C, n):
        state, metrics = call(state, jax.tree.map(cut, batches), learning_rates_C, n)
        return state, jax.tree.map(lambda x: x[0], metrics)

    return every


def replicate(state: TrainState, devices: Sequence[Any]) -> TrainState:
    """The state on each of `devices`, as make_replica_call takes it."""
    return jax.pmap(lambda state, _: state, in_axes=(None, 0), devices=devices)(state, np.arange(len(devices)))


def one_replica(state: TrainState) -> TrainState:
    """The state that all replicas have, on one device."""
    return jax.tree.map(lambda x: x[0], state)


def _steps(step, steps_per_call: int):
    """call of make_train_call, not compiled."""

    def call(state: TrainState, batches, learning_rates_C: jax.Array, n: jax.Array):
        def one(i, carry):
            return _advance(step, i, carry, batches, learning_rates_C)

        metrics = _no_metrics(step, steps_per_call, state, batches, learning_rates_C)
        return jax.lax.fori_loop(0, n, one, (state, metrics))

    return call


def _advance(step, i, carry, batches, learning_rates_C):
    """Step i of a call: (state, metrics of the call) after it."""
    state, metrics = carry
    batch = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), batches)
    state, new = step(state, batch, learning_rates_C[i])
    return state, jax.tree.map(lambda all_C, x: all_C.at[i].set(x), metrics, new)


def _no_metrics(step, steps_per_call: int, state: TrainState, batches, learning_rates_C):
    """Zeros in place of a call's metrics."""
    first = jax.tree.map(lambda x: x[0], batches)
    shapes = jax.eval_shape(step, state, first, learning_rates_C[0])[1]
    return jax.tree.map(lambda x: jnp.zeros((steps_per_call, *x.shape), x.dtype), shapes)
