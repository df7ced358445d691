"""Attention on a TPU: JAX's splash kernel, causal or not, with windows and documents, and never a TxS array in memory.

It runs on each device's rows and heads (models/attention.py has the shard_map around it), forwards and backwards.
"""

from __future__ import annotations

import jax
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from llm_jax import kernels

BLOCKS = (512, 256, 128)
"""Queries and keys that a program holds, the first that divides a row; lanes of a register are 128."""
WIDTH = 64
"""Heads are a multiple of it wide: narrower ones fill too few lanes."""
KEPT = "attention"
"""What its output and normalisers are called for jax.checkpoint: see transformer.KEPT."""


def serves(positions: int, keys: int, width: int) -> bool:
    """Whether programs traced now have the kernel for rows of such lengths and heads of such a width, without a cache."""
    return kernels.platform() == "tpu" and fits(positions, keys, width)


def fits(positions: int, keys: int, width: int) -> bool:
    """Whether the kernel takes them."""
    return positions == keys and positions % BLOCKS[-1] == 0 and width % WIDTH == 0


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
    T, N, H = q_BxTxNxH.shape[1:]
    block = next(block for block in BLOCKS if T % block == 0)
    sees = (window - 1 if window else None, 0 if causal else None)
    mask = splash.LocalMask((T, T), sees, offset=0) if window else splash.CausalMask((T, T))
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask if window or causal else splash.FullMask((T, T))] * N),
        block_sizes=splash.BlockSizes(*(6 * (block,)), block_q_dq=block, block_kv_dq=block),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=KEPT,
        interpret=interpret,
    )
    q, k, v = (x.swapaxes(1, 2) for x in (q_BxTxNxH * q_BxTxNxH.dtype.type(H**-0.5), k_BxTxKxH, v_BxTxKxH))
    segments = splash.SegmentIds(segment_BxT, segment_BxT) if segment_BxT is not None else None
    return jax.vmap(kernel)(q, k, v, segments).swapaxes(1, 2)
