"""Attention within documents: a query sees the keys of its own document, and of a window, without an array of T x T in memory.

FlashAttention (Dao et al. 2022; the backward pass in two kernels as in Dao 2023, section 3.1.2), which leaves out blocks of keys that no
query of a block can see. For rows of many documents, as cuDNN's kernel takes no mask but causality and a window; and for small models.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

LEAST = -1e30
"""Stands for a score that is not looked at: finite, so that no difference of two of them is NaN."""
BLOCK = 64
"""Queries, and keys, of one product."""
NUM_WARPS, NUM_STAGES = 4, 2


class _Kind(NamedTuple):
    """What a kernel is compiled for."""

    length: int
    width: int
    causal: bool
    window: int | None

    @property
    def shape(self) -> tuple[int, int]:
        """Of a tile: columns beyond the width are zeros."""
        return BLOCK, pl.next_power_of_2(max(16, self.width))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def attend(
    q_BxTxNxH: jax.Array,
    k_BxTxKxH: jax.Array,
    v_BxTxKxH: jax.Array,
    segment_BxT: jax.Array,
    causal: bool = True,
    window: int | None = None,
    interpret: bool = False,
) -> jax.Array:
    """As `models.attention.attend` of such arguments, whatever T and H."""
    return _forward(q_BxTxNxH, k_BxTxKxH, v_BxTxKxH, segment_BxT, causal, window, interpret)[0]


def _forward(q, k, v, segment_BxT, causal, window, interpret):
    kind = _Kind(q.shape[1], q.shape[3], causal, window)
    rows = jax.ShapeDtypeStruct((q.shape[0], q.shape[2], q.shape[1]), jnp.float32)
    of_block, of_row, ids, reach, _ = _specs(q, k)
    out, lse_BxNxT = _call(
        _forward_kernel,
        kind,
        q,
        interpret,
        in_specs=[reach, reach, ids, of_block, of_row, of_row],
        out_specs=[of_block, pl.BlockSpec((None, None, BLOCK), lambda i, n, b: (b, n, i))],
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), rows],
    )(*_reach(segment_BxT), segment_BxT, q, k, v)
    return out, (q, k, v, segment_BxT, out, lse_BxNxT)


def _backward(causal, window, interpret, residuals, grad):
    q, k, v, segment_BxT, out, lse_BxNxT = residuals
    kind = _Kind(q.shape[1], q.shape[3], causal, window)
    delta_BxNxT = jnp.einsum("btnh,btnh->bnt", out, grad, preferred_element_type=jnp.float32)
    of_block, of_row, ids, reach, sums = _specs(q, k)
    own_row = pl.BlockSpec((None, q.shape[1], None, q.shape[3]), lambda i, n, b: (b, 0, n, 0))
    arguments = (*_reach(segment_BxT), segment_BxT, q, k, v, grad, lse_BxNxT, delta_BxNxT)
    like_q = jax.ShapeDtypeStruct(q.shape, q.dtype)
    (dq,) = _call(
        _queries_kernel,
        kind,
        q,
        interpret,
        in_specs=[reach, reach, ids, of_block, of_row, of_row, of_block, sums, sums],
        out_specs=[of_block],
        out_shape=[like_q],
    )(*arguments)
    # A query head a program; the heads that share a key head are added up behind.
    groups = q.shape[2] // k.shape[2]
    part = jax.ShapeDtypeStruct(q.shape, jnp.float32 if groups > 1 else k.dtype)
    dk, dv = _call(
        _keys_kernel,
        kind,
        q,
        interpret,
        in_specs=[reach, reach, ids, own_row, of_row, of_row, own_row, sums, sums],
        out_specs=[of_block, of_block],
        out_shape=[part, part],
    )(*arguments)

    def added(x):
        return x.reshape(*k.shape[:3], groups, k.shape[3]).sum(3).astype(k.dtype) if groups > 1 else x

    return dq, added(dk), added(dv), None


attend.defvjp(_forward, _backward)


def _specs(q, k) -> tuple[Any, ...]:
    """Of a program of (block, query head, row of the batch): its block of q, its whole row of keys, of document ids, of blocks in reach,
    and of numbers a query."""
    length, width, groups = q.shape[1], q.shape[3], q.shape[2] // k.shape[2]
    blocks = pl.cdiv(length, BLOCK)
    return (
        pl.BlockSpec((None, BLOCK, None, width), lambda i, n, b: (b, i, n, 0)),
        pl.BlockSpec((None, length, None, width), lambda i, n, b: (b, 0, n // groups, 0)),
        pl.BlockSpec((None, length), lambda i, n, b: (b, 0)),
        pl.BlockSpec((None, blocks), lambda i, n, b: (b, 0)),
        pl.BlockSpec((None, None, length), lambda i, n, b: (b, n, 0)),
    )


def _call(kernel, kind: _Kind, q, interpret: bool, **specs):
    return pl.pallas_call(
        functools.partial(kernel, kind=kind),
        grid=(pl.cdiv(kind.length, BLOCK), q.shape[2], q.shape[0]),
        interpret=interpret,
        compiler_params=triton.CompilerParams(num_warps=NUM_WARPS, num_stages=NUM_STAGES),
        name=kernel.__name__.strip("_"),
        **specs,
    )


def _reach(segment_BxT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first and the last block that may share a document with each block, by their smallest and largest ids: exact where documents
    are numbered in order, and never too few."""
    rows, length = segment_BxT.shape
    fill = -length % BLOCK
    blocks_BxCxT = jnp.pad(segment_BxT, ((0, 0), (0, fill)), mode="edge").reshape(rows, -1, BLOCK)
    low_BxC, high_BxC = blocks_BxCxT.min(-1), blocks_BxCxT.max(-1)
    meet_BxCxC = (low_BxC[:, :, None] <= high_BxC[:, None, :]) & (low_BxC[:, None, :] <= high_BxC[:, :, None])
    first_BxC = jnp.argmax(meet_BxCxC, axis=-1).astype(jnp.int32)
    last_BxC = meet_BxCxC.shape[-1] - 1 - jnp.argmax(meet_BxCxC[:, :, ::-1], axis=-1).astype(jnp.int32)
    return first_BxC, last_BxC


# ---- The kernels, and what they share ----


def _places(block, kind: _Kind, own: bool = False):
    """Where the tile of a block lies in an array, or in the one block that an array is seen as, and which of it is in the array."""
    row, column = (jax.lax.broadcasted_iota(jnp.int32, kind.shape, axis) for axis in (0, 1))
    inside = (row + block * BLOCK < kind.length) & (column < kind.width)
    return (row if own else row + block * BLOCK, column), inside


def _tile(ref, block, kind: _Kind, own: bool = False):
    """The rows of a block, with zeros where there are none."""
    where, inside = _places(block, kind, own)
    return triton.load(ref.at[where], mask=inside, other=0.0)


def _store(ref, value, block, kind: _Kind):
    """Into the one block that `ref` is."""
    where, inside = _places(block, kind, own=True)
    triton.store(ref.at[where], value.astype(ref.dtype), mask=inside)


def _numbers(ref, block, kind: _Kind, other):
    """Of the positions of a block."""
    place = block * BLOCK + jax.lax.iota(jnp.int32, BLOCK)
    return triton.load(ref.at[place], mask=place < kind.length, other=other)


def _scores(q, k, query_block, key_block, ids_ref, kind: _Kind):
    """q k / sqrt(H) of two tiles, LEAST where a query may not look."""
    scores = triton.dot(q, k.T) * (kind.width**-0.5)
    query, key = (jax.lax.broadcasted_iota(jnp.int32, (BLOCK, BLOCK), axis) for axis in (0, 1))
    query, key = query + query_block * BLOCK, key + key_block * BLOCK
    of_query, of_key = (_numbers(ids_ref, block, kind, -1) for block in (query_block, key_block))
    shape = (BLOCK, BLOCK)
    seen = jnp.broadcast_to(of_query[:, None], shape) == jnp.broadcast_to(of_key[None, :], shape)
    seen &= key < kind.length
    if kind.causal:
        seen &= key <= query
    if kind.window:
        seen &= query - key < kind.window
    return jnp.where(seen, scores, LEAST)


def _columns(value_, kind: _Kind | None = None):
    """A number a row, along the columns of a tile, or of scores."""
    return jnp.broadcast_to(value_[:, None], kind.shape if kind else (BLOCK, BLOCK))


def _keys_of(block, first_ref, last_ref, kind: _Kind):
    """Blocks of keys, from and up to, that some query of a block sees."""
    start, end = first_ref[block], last_ref[block] + 1
    if kind.window:
        start = jnp.maximum(start, (block * BLOCK - kind.window + 1) // BLOCK)
    return start, (block + 1 if kind.causal else end)


def _queries_of(block, first_ref, last_ref, kind: _Kind):
    """Blocks of queries, from and up to, of which some sees a key of a block."""
    start, end = first_ref[block], last_ref[block] + 1
    if kind.window:
        end = jnp.minimum(end, (block * BLOCK + BLOCK - 2 + kind.window) // BLOCK + 1)
    return (block if kind.causal else start), end


def _forward_kernel(first_ref, last_ref, ids_ref, q_ref, k_ref, v_ref, out_ref, lse_ref, *, kind: _Kind):
    block = pl.program_id(0)
    q = _tile(q_ref, block, kind, own=True)

    def one(j, carry):
        sum_, largest_, total_ = carry
        scores = _scores(q, _tile(k_ref, j, kind), block, j, ids_ref, kind)
        new_ = jnp.maximum(largest_, scores.max(1))
        # A row that has seen nothing yet has weights of 1 here: its own key, which it always sees, makes them 0 later.
        weights = jnp.exp(scores - _columns(new_))
        shrink_ = jnp.exp(largest_ - new_)
        v = _tile(v_ref, j, kind)
        sum_ = sum_ * _columns(shrink_, kind) + triton.dot(weights.astype(v.dtype), v)
        return sum_, new_, total_ * shrink_ + weights.sum(1)

    start = jnp.zeros(kind.shape, jnp.float32), jnp.full((BLOCK,), LEAST, jnp.float32), jnp.zeros((BLOCK,), jnp.float32)
    first, end = _keys_of(block, first_ref, last_ref, kind)
    sum_, largest_, total_ = jax.lax.fori_loop(first, end, one, start)
    total_ = jnp.maximum(total_, 1e-30)  # of rows beyond the last
    _store(out_ref, sum_ / _columns(total_, kind), block, kind)
    place = jax.lax.iota(jnp.int32, BLOCK)
    triton.store(lse_ref.at[place], largest_ + jnp.log(total_), mask=place + block * BLOCK < kind.length)


def _slopes(q, k, v, grad, query_block, key_block, ids_ref, lse_ref, delta_ref, kind: _Kind):
    """(weights, their gradient by the scores) of two tiles."""
    scores = _scores(q, k, query_block, key_block, ids_ref, kind)
    lse_, delta_ = (_numbers(ref, query_block, kind, 0.0) for ref in (lse_ref, delta_ref))
    weights = jnp.exp(scores - _columns(lse_))
    return weights, weights * (triton.dot(grad, v.T) - _columns(delta_)) * (kind.width**-0.5)


def _queries_kernel(first_ref, last_ref, ids_ref, q_ref, k_ref, v_ref, grad_ref, lse_ref, delta_ref, dq_ref, *, kind):
    block = pl.program_id(0)
    q, grad = (_tile(ref, block, kind, own=True) for ref in (q_ref, grad_ref))

    def one(j, sum_):
        k, v = _tile(k_ref, j, kind), _tile(v_ref, j, kind)
        _, slopes = _slopes(q, k, v, grad, block, j, ids_ref, lse_ref, delta_ref, kind)
        return sum_ + triton.dot(slopes.astype(k.dtype), k)

    first, end = _keys_of(block, first_ref, last_ref, kind)
    _store(dq_ref, jax.lax.fori_loop(first, end, one, jnp.zeros(kind.shape, jnp.float32)), block, kind)


def _keys_kernel(
    first_ref, last_ref, ids_ref, q_ref, k_ref, v_ref, grad_ref, lse_ref, delta_ref, dk_ref, dv_ref, *, kind
):
    block = pl.program_id(0)
    k, v = _tile(k_ref, block, kind), _tile(v_ref, block, kind)

    def one(i, sums):
        q, grad = _tile(q_ref, i, kind), _tile(grad_ref, i, kind)
        weights, slopes = _slopes(q, k, v, grad, i, block, ids_ref, lse_ref, delta_ref, kind)
        dk, dv = sums
        dk += triton.dot(slopes.astype(q.dtype).T, q)
        return dk, dv + triton.dot(weights.astype(grad.dtype).T, grad)

    zeros = jnp.zeros(kind.shape, jnp.float32)
    first, end = _queries_of(block, first_ref, last_ref, kind)
    dk, dv = jax.lax.fori_loop(first, end, one, (zeros, zeros))
    _store(dk_ref, dk, block, kind)
    _store(dv_ref, dv, block, kind)
