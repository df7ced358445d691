"""Attention on a TPU: JAX's splash kernel, causal or not, with windows and documents, and never a TxS array in memory.

It runs on each device's rows, heads and queries (models/attention.py has the shard_map around it), forwards and backwards.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from llm_jax import kernels

BLOCKS = (512, 256, 128)
"""Queries and keys that a program holds, the first that divides a row; lanes of a register are 128."""
WIDTH = 64
"""Heads are a multiple of it wide: narrower ones fill too few lanes."""
KEPT = "attention"
"""What its output and normalisers are called for jax.checkpoint: see transformer.KEPT."""


def serves(positions: int, keys: int, width: int, shards: int = 1) -> bool:
    """Whether programs traced now have the kernel for rows of such lengths and heads of such a width, without a cache."""
    return kernels.platform() == "tpu" and fits(positions, keys, width, shards)


def fits(positions: int, keys: int, width: int, shards: int = 1) -> bool:
    """Whether the kernel takes them, each of so many devices a part of the positions and all keys."""
    return positions == keys and positions % (shards * BLOCKS[-1]) == 0 and width % WIDTH == 0


def attend(
    q_BxTxNxH: jax.Array,
    k_BxTxKxH: jax.Array,
    v_BxTxKxH: jax.Array,
    segment_BxT: jax.Array | None,
    window: int | None,
    causal: bool,
    interpret: bool = False,
) -> jax.Array:
    """As models.attention.attend without a cache; see `fits`."""
    kernel = make(q_BxTxNxH.shape[1], q_BxTxNxH.shape[2], window, causal, interpret=interpret)
    return apply(kernel, q_BxTxNxH, k_BxTxKxH, v_BxTxKxH, segment_BxT, segment_BxT)


def make(T: int, N: int, window: int | None, causal: bool, shards: int = 1, interpret: bool = False):
    """The kernel of N heads on rows of T: a pytree of what its blocks see, for `apply`. Each of several `shards` of the queries takes its
    part of it, as kernel.manual_sharding_spec says.
    """
    block = next(block for block in BLOCKS if T // shards % block == 0)
    sees = (window - 1 if window else None, 0 if causal else None)
    mask = splash.LocalMask((T, T), sees, offset=0) if window else splash.CausalMask((T, T))
    return splash.make_splash_mha(
        splash.MultiHeadMask([mask if window or causal else splash.FullMask((T, T))] * N),
        block_sizes=splash.BlockSizes(*(6 * (block,)), block_q_dq=block, block_kv_dq=block),
        head_shards=1,
        q_seq_shards=shards,
        residual_checkpoint_name=KEPT,
        interpret=interpret,
    )


def apply(
    kernel: Any,
    q_BxTxNxH: jax.Array,
    k_BxSxKxH: jax.Array,
    v_BxSxKxH: jax.Array,
    segment_BxT: jax.Array | None,
    segment_BxS: jax.Array | None,
) -> jax.Array:
    """Attention by a kernel of `make`, BxTxNxH; documents of the queries and of the keys."""
    scale = q_BxTxNxH.dtype.type(q_BxTxNxH.shape[-1] ** -0.5)
    q, k, v = (x.swapaxes(1, 2) for x in (q_BxTxNxH * scale, k_BxSxKxH, v_BxSxKxH))
    segments = None
    if segment_BxT is not None and segment_BxS is not None:
        segments = splash.SegmentIds(segment_BxT, segment_BxS)
    return jax.vmap(kernel)(q, k, v, segments).swapaxes(1, 2)
