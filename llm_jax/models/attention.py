"""Attention: a GPU's or a TPU's kernels, where they serve, else plain matrix products, which they are held to."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from llm_jax import axes, kernels
from llm_jax.kernels import attention as documents
from llm_jax.kernels import splash
from llm_jax.parts import in_blocks


def attention_mask(
    num_queries: int,
    num_keys: int,
    window: int | None,
    segment_BxT: jax.Array | None,
    offset: jax.Array | None,
    causal: bool = True,
    visible_BxS: jax.Array | None = None,
) -> jax.Array:
    """True where a query may look, shape B or 1 x 1 x 1 x T x S: not ahead if causal, within the window, within its own document,
    and at visible keys alone.

    `offset` is the position of the first query among the keys (0 without a cache). `segment_BxT` numbers the documents of the keys;
    where those are more than the queries, a query has the number of the key at its position.
    """
    query_Tx1 = jnp.arange(num_queries)[:, None] + (0 if offset is None else offset)
    key_1xS = jnp.arange(num_keys)[None, :]
    mask_TxS = key_1xS <= query_Tx1 if causal else jnp.ones((num_queries, num_keys), bool)
    if window is not None:
        mask_TxS &= query_Tx1 - key_1xS < window
    mask = mask_TxS[None, None, None]
    if segment_BxT is not None:
        own_BxT = segment_BxT
        if num_queries < num_keys:
            own_BxT = jax.lax.dynamic_slice_in_dim(segment_BxT, 0 if offset is None else offset, num_queries, axis=1)
        mask = mask & (own_BxT[:, None, None, :, None] == segment_BxT[:, None, None, None, :])
    if visible_BxS is not None:
        mask = mask & visible_BxS[:, None, None, None, :]
    return mask


def attend(
    q_BxTxNxH: jax.Array,
    k_BxSxKxH: jax.Array,
    v_BxSxKxH: jax.Array,
    *,
    window: int | None = None,
    segment_BxT: jax.Array | None = None,
    offset: jax.Array | None = None,
    causal: bool = True,
    visible_BxS: jax.Array | None = None,
) -> jax.Array:
    """softmax(q k / sqrt(H)) v, BxTxNxH, with the softmax in float32; query head n reads key head n // G.
    Causal unless told otherwise; `attention_mask` says who sees whom.

    cuDNN's kernel has no mask but causality and a window: given a mask as an array it is three times slower. So documents are told
    apart by a kernel of ours, which small models have in any case (kernels.small). Where neither serves, a window that divides a longer
    row is computed in blocks.
    """
    small = kernels.small(q_BxTxNxH.shape[2] * q_BxTxNxH.shape[3], k_BxSxKxH.shape[1])
    how = {"window": window, "causal": causal, "small": small}
    if axes.mesh().empty:
        return _attend(q_BxTxNxH, k_BxSxKxH, v_BxSxKxH, segment_BxT, visible_BxS, offset, **how)
    return _on_mesh(q_BxTxNxH, k_BxSxKxH, v_BxSxKxH, segment_BxT, visible_BxS, offset, **how)


def exchanges(heads: int, kv_heads: int, tensor: int, sequence: int) -> bool:
    """Whether devices along the axis `sequence` exchange positions for heads: where there are heads of both kinds for all of them."""
    return heads % (tensor * sequence) == kv_heads % (tensor * sequence) == 0


def _on_mesh(q_BxTxNxH, k_BxSxKxH, v_BxSxKxH, segment_BxT, visible_BxS, offset, **how):
    """Each device attends for its own rows and heads. Where positions are spread it gets those of whole rows, and gives heads for them: as
    much work for each, by all kernels (DeepSpeed-Ulysses, Jacobs et al. 2023). With too few heads it has its own queries and all keys
    (Llama 3, 2024, section 3.3.2)."""
    (T, N, H), (S, K) = q_BxTxNxH.shape[1:], k_BxSxKxH.shape[1:3]
    tensor, shards, continues = axes.size("tensor"), axes.size("sequence"), offset is not None
    heads = "heads" if N % tensor == 0 and (K == 1 or K % tensor == 0) else None
    queries = axes.spec(("rows", None if continues else "sequence", heads), q_BxTxNxH.shape)
    keys = axes.spec(("rows", None, heads), k_BxSxKxH.shape)
    rows, whole = PartitionSpec(keys[0]), PartitionSpec()
    by_heads = queries[1] and exchanges(N, K, tensor, shards)
    if queries[1] and not by_heads and visible_BxS is None and splash.serves(T, S, H, shards):
        kernel = splash.make(T, N // (tensor if heads else 1), how["window"], how["causal"], shards)
        of_kernel = kernel.manual_sharding_spec(NamedSharding(axes.mesh(), PartitionSpec(None, "sequence")))
        own = PartitionSpec(*queries[:2])
        spread = axes.local(splash.apply, (of_kernel, queries, keys, keys, own, rows), queries)
        return spread(kernel, q_BxTxNxH, k_BxSxKxH, v_BxSxKxH, segment_BxT, segment_BxT)

    def part(q, k, v, segment, visible, offset):
        if by_heads:
            q, k, v = (jax.lax.all_to_all(x, "sequence", split_axis=2, concat_axis=1, tiled=True) for x in (q, k, v))
            y = _attend(q, k, v, segment, visible, offset, **how)
            return jax.lax.all_to_all(y, "sequence", split_axis=1, concat_axis=2, tiled=True)
        if queries[1]:
            offset = jax.lax.axis_index("sequence") * q.shape[1]
        return _attend(q, k, v, segment, visible, offset, **how)

    keys = queries if by_heads else keys
    spread = axes.local(part, (queries, keys, keys, rows, rows, whole), queries)
    return spread(q_BxTxNxH, k_BxSxKxH, v_BxSxKxH, segment_BxT, visible_BxS, offset)


def _attend(q_BxTxNxH, k_BxSxKxH, v_BxSxKxH, segment_BxT, visible_BxS, offset, *, window, causal, small):
    q, offset_or_visible = q_BxTxNxH, offset is not None or visible_BxS is not None
    queries, num_keys, width = q.shape[1], k_BxSxKxH.shape[1], q.shape[3]
    if not offset_or_visible and splash.serves(queries, num_keys, width):
        return splash.attend(q, k_BxSxKxH, v_BxSxKxH, segment_BxT, window, causal)
    fits = kernels.used() and not offset_or_visible and q.dtype == jnp.bfloat16 and width % 8 == 0 and width <= 128
    if fits and queries == num_keys and (small or segment_BxT is not None):
        ids_BxT = jnp.zeros(q.shape[:2], jnp.int32) if segment_BxT is None else segment_BxT
        return documents.attend(q, k_BxSxKxH, v_BxSxKxH, ids_BxT, causal, window)
    if fits and not small and segment_BxT is None:
        sees = (window - 1, 0) if window else None
        return jax.nn.dot_product_attention(
            q, k_BxSxKxH, v_BxSxKxH, is_causal=causal, local_window_size=sees, implementation="cudnn"
        )
    if window and causal and not offset_or_visible and in_blocks(window, queries):
        return attend_window(q, k_BxSxKxH, v_BxSxKxH, window=window, segment_BxT=segment_BxT)
    return attend_plain(
        q,
        k_BxSxKxH,
        v_BxSxKxH,
        window=window,
        segment_BxT=segment_BxT,
        offset=offset,
        causal=causal,
        visible_BxS=visible_BxS,
    )


def attend_plain(
    q_BxTxNxH: jax.Array,
    k_BxSxKxH: jax.Array,
    v_BxSxKxH: jax.Array,
    *,
    window: int | None = None,
    segment_BxT: jax.Array | None = None,
    offset: jax.Array | None = None,
    causal: bool = True,
    visible_BxS: jax.Array | None = None,
) -> jax.Array:
    """As `attend`, on every backend.

    Divided by the sum of the exponentials after the product with v and not before (Dao et al. 2022, Algorithm 1): the gradient's
    sums then run over H and not over S.
    """
    B, T, N, H = q_BxTxNxH.shape
    S, K = k_BxSxKxH.shape[1:3]
    q_BxTxKxGxH = q_BxTxNxH.reshape(B, T, K, N // K, H) * q_BxTxNxH.dtype.type(H**-0.5)
    scores_BxKxGxTxS = jnp.einsum("btkgh,bskh->bkgts", q_BxTxKxGxH, k_BxSxKxH).astype(jnp.float32)
    mask = attention_mask(T, S, window, segment_BxT, offset, causal, visible_BxS)
    # A large negative number, not -inf: a row of a cache that sees nothing yet must not turn NaN.
    scores_BxKxGxTxS = jnp.where(mask, scores_BxKxGxTxS, jnp.float32(-1e30))
    largest_BxKxGxTx1 = jax.lax.stop_gradient(scores_BxKxGxTxS.max(-1, keepdims=True))
    exp_BxKxGxTxS = jnp.exp(scores_BxKxGxTxS - largest_BxKxGxTx1)
    sum_BxTxKxGx1 = jnp.moveaxis(exp_BxKxGxTxS.sum(-1), 3, 1)[..., None]
    y_BxTxKxGxH = jnp.einsum("bkgts,bskh->btkgh", exp_BxKxGxTxS.astype(v_BxSxKxH.dtype), v_BxSxKxH)
    return (y_BxTxKxGxH / sum_BxTxKxGx1.astype(y_BxTxKxGxH.dtype)).reshape(B, T, N, H)


def attend_window(
    q_BxTxNxH: jax.Array,
    k_BxTxKxH: jax.Array,
    v_BxTxKxH: jax.Array,
    *,
    window: int,
    segment_BxT: jax.Array | None = None,
) -> jax.Array:
    """`attend_plain` with a window, causal and without a cache, at a cost of T x 2 window and not T x T; T is a multiple of the window.

    The row is cut into blocks of `window` queries. The furthest key that the first query of a block sees is the second of the block
    before, so that two blocks of keys are all that a block of queries needs: rows of their own for `attend_plain` (Beltagy et al. 2020,
    section 3.1, cut their sliding window alike).
    """
    B, T = q_BxTxNxH.shape[:2]
    blocks = T // window

    def with_the_one_before(x: jax.Array) -> jax.Array:
        x = x.reshape(B, blocks, window, *x.shape[2:])
        before = jnp.pad(x[:, :-1], [(0, 0), (1, 0), *(x.ndim - 2) * [(0, 0)]])
        return jnp.concatenate([before, x], axis=2).reshape(B * blocks, 2 * window, *x.shape[3:])

    first = jnp.arange(B * blocks)[:, None] % blocks == 0
    y = attend_plain(
        q_BxTxNxH.reshape(B * blocks, window, *q_BxTxNxH.shape[2:]),
        with_the_one_before(k_BxTxKxH),
        with_the_one_before(v_BxTxKxH),
        window=window,
        segment_BxT=None if segment_BxT is None else with_the_one_before(segment_BxT),
        offset=jnp.int32(window),
        visible_BxS=~first | (jnp.arange(2 * window)[None, :] >= window),  # nothing stands before the first block
    )
    return y.reshape(q_BxTxNxH.shape)
