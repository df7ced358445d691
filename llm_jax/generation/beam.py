"""Beam search with a length penalty (Wu et al. 2016, section 7), batched and compiled: one loop for all rows and hypotheses."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llm_jax.config import Model
from llm_jax.models import families

IMPOSSIBLE = -1e30


class _Beam(NamedTuple):
    step: jax.Array
    cache: Any
    """Of B x W rows."""
    logits_BxWxV: jax.Array
    ids_BxWxC: jax.Array
    log_p_BxW: jax.Array
    length_BxW: jax.Array
    ended_BxW: jax.Array


def length_penalty(length: jax.Array, alpha: float) -> jax.Array:
    """lp(Y) = (5 + |Y|)^alpha / (5 + 1)^alpha (Wu et al. 2016, eq. 14), |Y| with the token that ends it; 1 where alpha is 0."""
    return ((5.0 + length.astype(jnp.float32)) / 6.0) ** alpha


@functools.partial(jax.jit, static_argnames=("model", "num_tokens", "width", "alpha", "end", "prefix"))
def beam_search(
    model: Model,
    params: Any,
    prompt_BxT: jax.Array,
    *,
    num_tokens: int,
    width: int,
    end: int,
    alpha: float = 0.6,
    segment_BxT: jax.Array | None = None,
    prefix: int = 0,
) -> tuple[jax.Array, jax.Array]:
    """The `width` best continuations found of each row, best first: ids BxWxC, filled up with `end`, and scores BxW.

    At each step a row keeps its W likeliest hypotheses, of which those that took `end` stay as they are, until all have ended or
    `num_tokens` are written. They are ranked at the end by log p(Y) / lp(Y); the coverage penalty of eq. 14 is left out. Width 1 is
    greedy search. Where fewer than W are possible, the rest has a score of -1e30. `prefix` and `segment_BxT` are those of
    `sampling.generate`.
    """
    rows, length = prompt_BxT.shape
    vocab = model.vocab_size
    cache = families.init_cache(model, rows, length + num_tokens, prefix)
    logits_BxTxV, cache = families.apply(model, params, prompt_BxT, segment_BxT, cache, prefix=prefix)
    axes = _row_axes(model, params, prompt_BxT, segment_BxT, length + num_tokens, prefix)
    cache = _take(cache, axes, jnp.repeat(jnp.arange(rows), width))
    logits_BxWxV = jnp.repeat(logits_BxTxV[:, -1:], width, axis=1)
    # One hypothesis, empty, and W - 1 that are none.
    none_BxW = jnp.broadcast_to(jnp.arange(width)[None, :] > 0, (rows, width))
    first = _Beam(
        step=jnp.int32(0),
        cache=cache,
        logits_BxWxV=logits_BxWxV,
        ids_BxWxC=jnp.full((rows, width, num_tokens), end, jnp.int32),
        log_p_BxW=jnp.where(none_BxW, jnp.float32(IMPOSSIBLE), 0),
        length_BxW=jnp.zeros((rows, width), jnp.int32),
        ended_BxW=none_BxW,
    )
    only_end_1x1xV = jnp.where(jnp.arange(vocab) == end, jnp.float32(0), 2 * IMPOSSIBLE)[None, None, :]

    def one(beam: _Beam) -> _Beam:
        log_p_BxWxV = jnp.where(beam.ended_BxW[..., None], only_end_1x1xV, jax.nn.log_softmax(beam.logits_BxWxV))
        log_p_BxWxV += beam.log_p_BxW[..., None]
        log_p_BxW, flat_BxW = jax.lax.top_k(log_p_BxWxV.reshape(rows, -1), width)
        parent_BxW, token_BxW = flat_BxW // vocab, (flat_BxW % vocab).astype(jnp.int32)
        ended_BxW = jnp.take_along_axis(beam.ended_BxW, parent_BxW, axis=1)
        length_BxW = jnp.take_along_axis(beam.length_BxW, parent_BxW, axis=1) + (~ended_BxW).astype(jnp.int32)
        ids_BxWxC = jnp.take_along_axis(beam.ids_BxWxC, parent_BxW[..., None], axis=1)
        rows_X = (parent_BxW + jnp.arange(rows)[:, None] * width).reshape(-1)
        logits_XxTxV, cache = families.apply(
            model, params, token_BxW.reshape(-1, 1), cache=_take(beam.cache, axes, rows_X)
        )
        return _Beam(
            step=beam.step + 1,
            cache=cache,
            logits_BxWxV=logits_XxTxV[:, -1].reshape(rows, width, vocab),
            ids_BxWxC=jax.lax.dynamic_update_slice_in_dim(ids_BxWxC, token_BxW[..., None], beam.step, axis=2),
            log_p_BxW=log_p_BxW,
            length_BxW=length_BxW,
            ended_BxW=ended_BxW | (token_BxW == end),
        )

    beam = jax.lax.while_loop(lambda b: (b.step < num_tokens) & ~b.ended_BxW.all(), one, first)
    score_BxW = beam.log_p_BxW / length_penalty(beam.length_BxW, alpha)
    score_BxW = jnp.where(beam.log_p_BxW > IMPOSSIBLE / 2, score_BxW, IMPOSSIBLE)
    score_BxW, order_BxW = jax.lax.top_k(score_BxW, width)
    return jnp.take_along_axis(beam.ids_BxWxC, order_BxW[..., None], axis=1), score_BxW


def _row_axes(model: Model, params: Any, prompt_BxT, segment_BxT, length: int, prefix: int) -> Any:
    """For each array of the cache behind a prompt, the axis of its rows, or -1: where its shape follows their number."""

    def shapes(rows: int):
        def row(x):
            return None if x is None else jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype)

        def read(params, prompt_BxT, segment_BxT):
            cache = families.init_cache(model, rows, length, prefix)
            return families.apply(model, params, prompt_BxT, segment_BxT, cache, prefix=prefix)[1]

        return jax.eval_shape(read, params, row(prompt_BxT), row(segment_BxT))

    def axis(a, b):
        return next((i for i, (n, m) in enumerate(zip(a.shape, b.shape, strict=True)) if n != m), -1)

    return jax.tree.map(axis, shapes(1), shapes(2))


def _take(cache: Any, axes: Any, rows_X: jax.Array) -> Any:
    return jax.tree.map(lambda x, axis: x if axis < 0 else jnp.take(x, rows_X, axis=axis), cache, axes)
