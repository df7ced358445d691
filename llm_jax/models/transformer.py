"""The decoder-only Transformer: its Flax modules and its cache of keys and values.

Parameters carry logical axis names ("vocab", "positions", "embed", "heads", "kv", "head", "mlp", "layers"). Those of
the blocks are stacked over layers whether the layers are scanned or unrolled, so that a checkpoint does not know which
of the two trained it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from llm_jax import axes
from llm_jax.config import Model
from llm_jax.models.attention import attend
from llm_jax.models.layers import Norm, activate, embed, lookup, normal, normal_out, project
from llm_jax.models.moe import Mixture

Params = Any


class Cache(NamedTuple):
    """Keys and values of the positions seen so far; `length` of them are filled."""

    k_LxBxSxKxH: jax.Array
    v_LxBxSxKxH: jax.Array
    length: jax.Array
    start_B: jax.Array | None = None
    """Where the document begins that each row continues; nothing before is seen. None: with the row."""

    @property
    def room(self) -> int:
        """Positions that it can keep."""
        return self.k_LxBxSxKxH.shape[2]


def _kept(*names: str):
    """A policy of jax.checkpoint: values under one of these names, and with any of them cuDNN's attention and its normalisers."""
    named = jax.checkpoint_policies.save_only_these_names(*names)
    return lambda primitive, *a, **k: (names and primitive.name == CUDNN) or named(primitive, *a, **k)


CUDNN = "dot_product_attention_fwd_wrapper"
KEPT = {"elementwise": _kept("attention", "hidden"), "hidden": _kept("attention"), "block": _kept()}
"""By `Model.recompute`: what the backward pass finds of a block beside its input."""


def rotation(positions_BxT: jax.Array, cfg: Model) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of each position's angles, BxTx1xH/2 in the dtype of the computation (Su et al. 2021, eq. 15)."""
    half = cfg.head_width // 2
    frequency_H = cfg.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle_BxTx1xH = (positions_BxT.astype(jnp.float32)[:, :, None] * frequency_H[None, None, :])[:, :, None, :]
    return jnp.cos(angle_BxTx1xH).astype(cfg.dtype), jnp.sin(angle_BxTx1xH).astype(cfg.dtype)


def rotate(x_BxTxNxH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary position embedding by `rotation`'s angles, halves rotated against each other as in GPT-NeoX and Llama."""
    half = x_BxTxNxH.shape[-1] // 2
    a, b = x_BxTxNxH[..., :half], x_BxTxNxH[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def sinusoids(positions_BxT: jax.Array, width: int) -> jax.Array:
    """The fixed positions of Vaswani et al. 2017, section 3.5: sines in the first half of the width, then cosines."""
    frequency_D = 10_000.0 ** (-jnp.arange(width // 2, dtype=jnp.float32) / (width // 2))
    angle_BxTxD = positions_BxT.astype(jnp.float32)[:, :, None] * frequency_D[None, None, :]
    return jnp.concatenate([jnp.sin(angle_BxTxD), jnp.cos(angle_BxTxD)], axis=-1)


def keep_for_maps(module: nn.Module, q_BxTxNxH: jax.Array, k_BxSxKxH: jax.Array) -> None:
    """Sows queries and keys in the collection "attention" where a caller makes it mutable, as maps.py does; else for nothing."""
    module.sow("attention", "queries_keys", (q_BxTxNxH, k_BxSxKxH), init_fn=lambda: None, reduce_fn=lambda _, new: new)


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023); multi-head when K == N, multi-query when K == 1."""

    cfg: Model
    causal: bool = True

    @nn.compact
    def __call__(self, x_BxTxD, angles, segment_BxT, cache, length, visible_BxS=None):
        cfg = self.cfg
        heads, kv_heads, width = cfg.num_heads, cfg.kv_heads, cfg.head_width
        q_DxNxH = self.param("q", normal(("embed", "heads", "head"), cfg.d_model), (cfg.d_model, heads, width))
        k_DxKxH = self.param("k", normal(("embed", "kv", "head"), cfg.d_model), (cfg.d_model, kv_heads, width))
        v_DxKxH = self.param("v", normal(("embed", "kv", "head"), cfg.d_model), (cfg.d_model, kv_heads, width))
        out_NxHxD = self.param(
            "out", normal_out(("heads", "head", "embed"), heads * width, cfg.num_layers), (heads, width, cfg.d_model)
        )
        q_BxTxNxH, k_BxTxKxH, v_BxTxKxH = (
            checkpoint_name(project(x_BxTxD, kernel), "attention") for kernel in (q_DxNxH, k_DxKxH, v_DxKxH)
        )
        if cfg.qk_norm:
            q_BxTxNxH = Norm("rmsnorm", "head", name="q_norm")(q_BxTxNxH)
            k_BxTxKxH = Norm("rmsnorm", "head", name="k_norm")(k_BxTxKxH)
        if cfg.positions == "rotary":
            q_BxTxNxH, k_BxTxKxH = rotate(q_BxTxNxH, *angles), rotate(k_BxTxKxH, *angles)
        if cache is not None:
            k_BxTxKxH = jax.lax.dynamic_update_slice_in_dim(cache[0], k_BxTxKxH, length, axis=1)
            v_BxTxKxH = jax.lax.dynamic_update_slice_in_dim(cache[1], v_BxTxKxH, length, axis=1)
            cache = (k_BxTxKxH, v_BxTxKxH)
        keep_for_maps(self, q_BxTxNxH, k_BxTxKxH)
        y_BxTxNxH = attend(
            q_BxTxNxH,
            k_BxTxKxH,
            v_BxTxKxH,
            window=cfg.window,
            segment_BxT=segment_BxT,
            offset=length if cache else None,
            causal=self.causal,
            visible_BxS=visible_BxS,
        )
        return checkpoint_name(project(checkpoint_name(y_BxTxNxH, "attention"), out_NxHxD, 2), "attention"), cache


class MLP(nn.Module):
    """Position-wise feed-forward."""

    cfg: Model

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        cfg = self.cfg
        up_DxF = self.param("up", normal(("embed", "mlp"), cfg.d_model), (cfg.d_model, cfg.ff_width))
        down_FxD = self.param(
            "down", normal_out(("mlp", "embed"), cfg.ff_width, cfg.num_layers), (cfg.ff_width, cfg.d_model)
        )
        up_BxTxF, gate_BxTxF = checkpoint_name(project(x_BxTxD, up_DxF), "hidden"), None
        if cfg.mlp == "swiglu":
            gate_DxF = self.param("gate", normal(("embed", "mlp"), cfg.d_model), (cfg.d_model, cfg.ff_width))
            gate_BxTxF = checkpoint_name(project(x_BxTxD, gate_DxF), "hidden")
        return project(activate(cfg.mlp, up_BxTxF, gate_BxTxF), down_FxD)


class Block(nn.Module):
    """Attention and MLP, each on a residual branch; norms before the branch, or after the sum (Vaswani et al. 2017)."""

    cfg: Model
    train: bool
    causal: bool = True

    @nn.compact
    def __call__(self, x_BxTxD, cache, angles, segment_BxT, length, visible_BxS=None):
        cfg = self.cfg
        dropout = nn.Dropout(cfg.dropout, deterministic=not self.train)
        attention = Attention(cfg, self.causal, name="attention")
        mlp = Mixture(cfg, self.train, name="mlp") if cfg.experts.number else MLP(cfg, name="mlp")
        norm1, norm2 = Norm(cfg.norm, name="norm1"), Norm(cfg.norm, name="norm2")
        if cfg.norm_position == "pre":
            x_BxTxD, y_BxTxD = norm1(x_BxTxD, fork=True)
            y_BxTxD, cache = attention(y_BxTxD, angles, segment_BxT, cache, length, visible_BxS)
            x_BxTxD, y_BxTxD = norm2(x_BxTxD + dropout(y_BxTxD), fork=True)
            x_BxTxD += dropout(mlp(y_BxTxD))
        else:
            y_BxTxD, cache = attention(x_BxTxD, angles, segment_BxT, cache, length, visible_BxS)
            x_BxTxD = norm1(x_BxTxD + dropout(y_BxTxD))
            x_BxTxD = norm2(x_BxTxD + dropout(mlp(x_BxTxD)))
        return axes.constrain(x_BxTxD, "rows", "sequence", None), cache


def recomputed(cfg: Model) -> Any:
    """Block, of which the backward pass computes anew what `cfg.recompute` says."""
    return Block if cfg.recompute == "nothing" else nn.remat(Block, policy=KEPT[cfg.recompute])


class Transformer(nn.Module):
    """The whole model as a linen module; training and generation see it through llm_jax/models/families.py."""

    cfg: Model
    train: bool = False

    @nn.compact
    def __call__(
        self,
        tokens_BxT: jax.Array,
        segment_BxT: jax.Array | None = None,
        cache: Cache | None = None,
        place: Callable[[jax.Array], jax.Array] | None = None,
    ):
        """`place` puts the embeddings of media among those of the tokens, BxTxD to BxTxD."""
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        embed_VxD = self.param("embed", normal(("vocab", "embed"), cfg.d_model), (cfg.vocab_size, cfg.d_model))
        length = cache.length if cache is not None else jnp.int32(0)
        positions_BxT = positions(tokens_BxT, segment_BxT, length)
        start_B, visible_BxS = None, None
        if (
            cache is not None and segment_BxT is not None
        ):  # of the first tokens: all read their row's last document alone
            start_B, segment_BxT = tokens_BxT.shape[1] - 1 - positions_BxT[:, -1], None
        elif cache is not None and cache.start_B is not None:
            start_B, positions_BxT = cache.start_B, positions_BxT - cache.start_B[:, None]
        if cache is not None and start_B is not None:
            visible_BxS = jnp.arange(cache.k_LxBxSxKxH.shape[2])[None, :] >= start_B[:, None]
        angles = rotation(positions_BxT, cfg) if cfg.positions == "rotary" else None
        # The tied matrix has variance 1/D for the logits; sqrt(D) lifts the input to 1 (Vaswani et al. 2017, 3.4).
        x_BxTxD = embed(embed_VxD, tokens_BxT, dtype) * dtype.type(cfg.d_model**0.5)
        if place is not None:
            x_BxTxD = place(x_BxTxD)
        if cfg.positions == "learned":
            shape = (cfg.max_context, cfg.d_model)
            table_TxD = self.param("positions", normal(("positions", "embed"), cfg.d_model), shape)
            x_BxTxD += lookup(table_TxD, positions_BxT, dtype) * dtype.type(cfg.d_model**0.5)
        elif cfg.positions == "sinusoidal":
            x_BxTxD += sinusoids(positions_BxT, cfg.d_model).astype(dtype)
        x_BxTxD = axes.constrain(x_BxTxD, "rows", "sequence", None)
        x_BxTxD = nn.Dropout(cfg.dropout, deterministic=not self.train)(x_BxTxD)
        layers = nn.scan(
            recomputed(cfg),
            variable_axes={"params": 0, "routing": 0, "attention": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0 if cache is not None else nn.broadcast, *4 * (nn.broadcast,)),
            length=cfg.num_layers,
            unroll=1 if cfg.scan_layers else cfg.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(cfg, self.train, name="blocks")
        kv = cache[:2] if cache is not None else None
        x_BxTxD, kv = layers(x_BxTxD, kv, angles, segment_BxT, length, visible_BxS)
        if cfg.norm_position == "pre":  # a post-norm block ends in one already
            x_BxTxD = Norm(cfg.norm, name="norm")(x_BxTxD)
        if cfg.tie_embeddings:
            # The barrier keeps the gradient's product DxV: turned round by XLA's CPU compiler it costs 10 % of a small step.
            head_DxV = jax.lax.optimization_barrier(embed_VxD.T)
        else:
            head_DxV = self.param("head", normal(("embed", "vocab"), cfg.d_model), (cfg.d_model, cfg.vocab_size))
        logits_BxTxV = axes.constrain(project(x_BxTxD, head_DxV), "rows", "sequence", "vocab").astype(jnp.float32)
        if cfg.logit_softcap:
            logits_BxTxV = cfg.logit_softcap * jnp.tanh(logits_BxTxV / cfg.logit_softcap)
        if cache is None:
            return logits_BxTxV
        k_LxBxSxKxH, v_LxBxSxKxH = kv
        return logits_BxTxV, Cache(k_LxBxSxKxH, v_LxBxSxKxH, length + tokens_BxT.shape[1], start_B)


def positions(tokens_BxT: jax.Array, segment_BxT: jax.Array | None, length: jax.Array) -> jax.Array:
    """Positions count from the start of the row, 1xT, or of the document where segments tell documents apart, BxT."""
    index_1xT = jnp.arange(tokens_BxT.shape[1], dtype=jnp.int32)[None, :] + length
    if segment_BxT is None:
        return index_1xT
    index_BxT = jnp.broadcast_to(index_1xT, tokens_BxT.shape)
    changes_BxT = segment_BxT[:, 1:] != segment_BxT[:, :-1]
    starts_BxT = jnp.concatenate([jnp.ones_like(segment_BxT[:, :1], bool), changes_BxT], axis=1)
    return index_BxT - jax.lax.cummax(jnp.where(starts_BxT, index_BxT, 0), axis=1)


def init_cache(cfg: Model, batch: int, length: int, prefix: int = 0) -> Cache:
    """Zeros, for `batch` rows of at most `length` positions."""
    shape = (cfg.num_layers, batch, length, cfg.kv_heads, cfg.head_width)
    return Cache(jnp.zeros(shape, cfg.dtype), jnp.zeros(shape, cfg.dtype), jnp.int32(0))
