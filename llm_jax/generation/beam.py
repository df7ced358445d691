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
    live_BxWxC: jax.Array
    log_p_BxW: jax.Array
    """Of the live ones."""
    done_BxWxC: jax.Array
    score_BxW: jax.Array
    """Of the finished ones, by the length penalty; best first."""
    length_BxW: jax.Array
    count_B: jax.Array
    """How many have finished; at W of them a row is ready."""


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

    The score is log p(Y) / lp(Y); the coverage penalty of eq. 14 is left out. A hypothesis that takes `end` among the best `width`
    continuations of a row is finished, and the row is ready with `width` of them or after `num_tokens`, when those still open are
    finished as they stand. Width 1 is greedy search. Where fewer were found, the rest has a score of -1e30. `prefix` and
    `segment_BxT` are those of `sampling.generate`.
    """
    rows, length = prompt_BxT.shape
    vocab = model.vocab_size
    cache = families.init_cache(model, rows, length + num_tokens, prefix)
    logits_BxTxV, cache = families.apply(model, params, prompt_BxT, segment_BxT, cache, prefix=prefix)
    axes = _row_axes(model, params, prompt_BxT, segment_BxT, length + num_tokens, prefix)
    cache = _take(cache, axes, jnp.repeat(jnp.arange(rows), width))
    logits_BxWxV = jnp.repeat(logits_BxTxV[:, -1:], width, axis=1)
    empty_BxWxC = jnp.full((rows, width, num_tokens), end, jnp.int32)
    nothing_BxW = jnp.full((rows, width), jnp.float32(IMPOSSIBLE))
    first = _Beam(
        step=jnp.int32(0),
        cache=cache,
        logits_BxWxV=logits_BxWxV,
        live_BxWxC=empty_BxWxC,
        log_p_BxW=nothing_BxW.at[:, 0].set(0),
        done_BxWxC=empty_BxWxC,
        score_BxW=nothing_BxW,
        length_BxW=jnp.zeros((rows, width), jnp.int32),
        count_B=jnp.zeros(rows, jnp.int32),
    )

    def finish(beam: _Beam, ids_BxNxC, score_BxN, length_BxN) -> _Beam:
        """With more finished hypotheses, N a row, of which the best W remain."""
        score_BxN = jnp.concatenate([beam.score_BxW, score_BxN], axis=1)
        score_BxW, best_BxW = jax.lax.top_k(score_BxN, width)
        ids_BxNxC = jnp.concatenate([beam.done_BxWxC, ids_BxNxC], axis=1)
        length_BxN = jnp.concatenate([beam.length_BxW, length_BxN], axis=1)
        return beam._replace(
            done_BxWxC=jnp.take_along_axis(ids_BxNxC, best_BxW[..., None], axis=1),
            score_BxW=score_BxW,
            length_BxW=jnp.take_along_axis(length_BxN, best_BxW, axis=1),
        )

    def one(beam: _Beam) -> _Beam:
        log_p_BxWxV = beam.log_p_BxW[..., None] + jax.nn.log_softmax(beam.logits_BxWxV)
        # As many again as the beam is wide: even if all of the best end, there are others to go on with.
        number = min(2 * width, width * vocab)
        log_p_BxN, flat_BxN = jax.lax.top_k(log_p_BxWxV.reshape(rows, -1), number)
        parent_BxN, token_BxN = flat_BxN // vocab, (flat_BxN % vocab).astype(jnp.int32)
        ids_BxNxC = jnp.take_along_axis(beam.live_BxWxC, parent_BxN[..., None], axis=1)
        ids_BxNxC = jax.lax.dynamic_update_slice_in_dim(ids_BxNxC, token_BxN[..., None], beam.step, axis=2)

        ended_BxN = token_BxN == end
        ready_Bx1 = (beam.count_B >= width)[:, None]
        best_1xN = (jnp.arange(number) < width)[None, :]
        ends_BxN = ended_BxN & best_1xN & (log_p_BxN > IMPOSSIBLE / 2) & ~ready_Bx1
        penalty = length_penalty(beam.step + 1, alpha)
        score_BxN = jnp.where(ends_BxN, log_p_BxN / penalty, IMPOSSIBLE)
        beam = finish(beam, ids_BxNxC, score_BxN, jnp.full_like(token_BxN, beam.step + 1))

        log_p_BxW, best_BxW = jax.lax.top_k(jnp.where(ended_BxN, 2 * IMPOSSIBLE, log_p_BxN), width)
        parent_BxW = jnp.take_along_axis(parent_BxN, best_BxW, axis=1)
        token_BxW = jnp.take_along_axis(token_BxN, best_BxW, axis=1)
        rows_X = (parent_BxW + jnp.arange(rows)[:, None] * width).reshape(-1)
        logits_XxTxV, cache = families.apply(
            model, params, token_BxW.reshape(-1, 1), cache=_take(beam.cache, axes, rows_X)
        )
        return beam._replace(
            step=beam.step + 1,
            cache=cache,
            logits_BxWxV=logits_XxTxV[:, -1].reshape(rows, width, vocab),
            live_BxWxC=jnp.take_along_axis(ids_BxNxC, best_BxW[..., None], axis=1),
            log_p_BxW=log_p_BxW,
            count_B=beam.count_B + ends_BxN.sum(1, dtype=jnp.int32),
        )

    beam = jax.lax.while_loop(lambda b: (b.step < num_tokens) & (b.count_B < width).any(), one, first)
    open_BxW = (beam.log_p_BxW > IMPOSSIBLE / 2) & (beam.count_B < width)[:, None]
    score_BxW = jnp.where(open_BxW, beam.log_p_BxW / length_penalty(beam.step, alpha), IMPOSSIBLE)
    beam = finish(beam, beam.live_BxWxC, score_BxW, jnp.full_like(beam.length_BxW, beam.step))
    written_BxWxC = jnp.arange(num_tokens)[None, None, :] < beam.length_BxW[..., None]
    return jnp.where(written_BxWxC, beam.done_BxWxC, end), beam.score_BxW


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
