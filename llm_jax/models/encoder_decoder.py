"""The encoder-decoder Transformer (Vaswani et al. 2017): an encoder that sees the whole source, and a decoder that sees it too.

Of a row of T tokens the encoder reads the first P, `prefix`, in both directions; the decoder reads the rest, causally, and attends
to all that the encoder made of them. As published: norm_position=post, norm=layernorm, positions=sinusoidal, mlp=relu, qk_norm=false,
dropout=0.1, train.label_smoothing=0.1 and train.schedule=inverse_sqrt; biases, which the paper has, are left out as in the other
families. The defaults of `Model` are its modern form: pre-norm, rotary positions in self-attention (none across), queries normed.

A source shorter than P stands at the right of the prefix, behind padding: `segment_BxT` numbers it as another document. Positions
count from the source's start, so that padding changes nothing.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from llm_jax.config import Model
from llm_jax.models.attention import attend
from llm_jax.models.layers import Norm, embed, lookup, normal, normal_out, project
from llm_jax.models.transformer import MLP, Attention, Block, keep_for_maps, positions, rotation, sinusoids

Params = Any


class Cache(NamedTuple):
    """What the decoder has read so far, and the source as its layers see it: keys and values that are computed once."""

    k_LxBxSxKxH: jax.Array
    v_LxBxSxKxH: jax.Array
    source_k_LxBxPxKxH: jax.Array
    source_v_LxBxPxKxH: jax.Array
    length: jax.Array
    visible_BxP: jax.Array | None
    """Where the source is no padding; None: everywhere."""

    @property
    def room(self) -> int:
        """Positions that it can keep of the decoder's own tokens."""
        return self.k_LxBxSxKxH.shape[2]


class CrossAttention(nn.Module):
    """Attention from the decoder to the encoder's output, or to the keys and values that were made of it before."""

    cfg: Model

    @nn.compact
    def __call__(self, x_BxTxD, source_BxPxD, kv, visible_BxP):
        cfg = self.cfg
        heads, kv_heads, width = cfg.num_heads, cfg.kv_heads, cfg.head_width
        q_DxNxH = self.param("q", normal(("embed", "heads", "head"), cfg.d_model), (cfg.d_model, heads, width))
        out_NxHxD = self.param(
            "out", normal_out(("heads", "head", "embed"), heads * width, cfg.num_layers), (heads, width, cfg.d_model)
        )
        q_BxTxNxH = project(x_BxTxD, q_DxNxH)
        if cfg.qk_norm:
            q_BxTxNxH = Norm("rmsnorm", "head", name="q_norm")(q_BxTxNxH)
        if source_BxPxD is not None:
            axes, shape = ("embed", "kv", "head"), (cfg.d_model, kv_heads, width)
            k_DxKxH, v_DxKxH = (self.param(name, normal(axes, cfg.d_model), shape) for name in ("k", "v"))
            k_BxPxKxH, v_BxPxKxH = project(source_BxPxD, k_DxKxH), project(source_BxPxD, v_DxKxH)
            if cfg.qk_norm:
                k_BxPxKxH = Norm("rmsnorm", "head", name="k_norm")(k_BxPxKxH)
            kv = (k_BxPxKxH, v_BxPxKxH)
        keep_for_maps(self, q_BxTxNxH, kv[0])
        y_BxTxNxH = attend(q_BxTxNxH, *kv, causal=False, visible_BxS=visible_BxP)
        return project(y_BxTxNxH, out_NxHxD, 2), kv


class DecoderBlock(nn.Module):
    """Self-attention, attention to the source and MLP, each on a residual branch (Vaswani et al. 2017, figure 1)."""

    cfg: Model
    train: bool

    @nn.compact
    def __call__(self, x_BxTxD, cache, source_BxPxD, visible_BxP, angles, length):
        cfg = self.cfg
        dropout = nn.Dropout(cfg.dropout, deterministic=not self.train)
        attention, cross, mlp = (
            Attention(cfg, name="attention"),
            CrossAttention(cfg, name="cross"),
            MLP(cfg, name="mlp"),
        )
        own, across = (cache[:2], cache[2:]) if cache is not None else (None, None)

        def branch(norm, x_BxTxD, of):
            norm = Norm(cfg.norm, name=norm)
            if cfg.norm_position == "pre":
                y_BxTxD, kept = of(norm(x_BxTxD))
                return x_BxTxD + dropout(y_BxTxD), kept
            y_BxTxD, kept = of(x_BxTxD)
            return norm(x_BxTxD + dropout(y_BxTxD)), kept

        x_BxTxD, own = branch("norm1", x_BxTxD, lambda y: attention(y, angles, None, own, length))
        x_BxTxD, across = branch("norm2", x_BxTxD, lambda y: cross(y, source_BxPxD, across, visible_BxP))
        x_BxTxD, _ = branch("norm3", x_BxTxD, lambda y: (mlp(y), None))
        return x_BxTxD, (*own, *across) if cache is not None else None


class EncoderDecoder(nn.Module):
    """The whole model as a linen module."""

    cfg: Model
    train: bool = False

    @nn.compact
    def __call__(self, tokens_BxT: jax.Array, segment_BxT: jax.Array | None, cache: Cache | None, prefix: int):
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        embed_VxD: Any = self.param("embed", normal(("vocab", "embed"), cfg.d_model), (cfg.vocab_size, cfg.d_model))
        table: Any = None
        if cfg.positions == "learned":
            shape = (cfg.max_context, cfg.d_model)
            table = self.param("positions", normal(("positions", "embed"), cfg.d_model), shape)
        dropout = nn.Dropout(cfg.dropout, deterministic=not self.train)

        def embedded(tokens_BxT, position_BxT):
            x_BxTxD = embed(embed_VxD, tokens_BxT, dtype) * dtype.type(cfg.d_model**0.5)
            if table is not None:
                x_BxTxD += lookup(table, position_BxT, dtype) * dtype.type(cfg.d_model**0.5)
            elif cfg.positions == "sinusoidal":
                x_BxTxD += sinusoids(position_BxT, cfg.d_model).astype(dtype)
            angles = rotation(position_BxT, cfg) if cfg.positions == "rotary" else None
            return dropout(x_BxTxD), angles

        def stack(block, layers: int, per_layer: bool, shared: int, **arguments):
            return nn.scan(
                block,
                variable_axes={"params": 0, "attention": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(0 if per_layer else nn.broadcast, *shared * (nn.broadcast,)),
                length=layers,
                unroll=1 if cfg.scan_layers else layers,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )(train=self.train, **arguments)

        zero = jnp.int32(0)
        if prefix:
            source_BxP, segment_BxP = tokens_BxT[:, :prefix], None
            visible_BxP: jax.Array | None = None
            if segment_BxT is not None:
                segment_BxP = segment_BxT[:, :prefix]
                visible_BxP = segment_BxP == segment_BxT[:, prefix : prefix + 1]
            x_BxPxD, angles = embedded(source_BxP, positions(source_BxP, segment_BxP, zero))
            encoder = dataclasses.replace(cfg, num_layers=cfg.encoder_layers)
            layers = stack(Block, cfg.encoder_layers, False, 3, cfg=encoder, causal=False, name="encoder_blocks")
            source_BxPxD, _ = layers(x_BxPxD, None, angles, segment_BxP, zero)
            if cfg.norm_position == "pre":
                source_BxPxD = Norm(cfg.norm, name="encoder_norm")(source_BxPxD)
        else:
            assert cache is not None
            source_BxPxD, visible_BxP = None, cache.visible_BxP

        tokens_BxT = tokens_BxT[:, prefix:]
        length = cache.length if cache is not None else zero
        x_BxTxD, angles = embedded(tokens_BxT, positions(tokens_BxT, None, length))
        layers = stack(DecoderBlock, cfg.num_layers, cache is not None, 4, cfg=cfg, name="decoder_blocks")
        kv = cache[:4] if cache is not None else None
        x_BxTxD, kv = layers(x_BxTxD, kv, source_BxPxD, visible_BxP, angles, length)
        if cfg.norm_position == "pre":
            x_BxTxD = Norm(cfg.norm, name="norm")(x_BxTxD)
        if cfg.tie_embeddings:
            head_DxV = jax.lax.optimization_barrier(embed_VxD.T)  # as in transformer.py
        else:
            head_DxV = self.param("head", normal(("embed", "vocab"), cfg.d_model), (cfg.d_model, cfg.vocab_size))
        logits_BxTxV = project(x_BxTxD, head_DxV).astype(jnp.float32)
        if cfg.logit_softcap:
            logits_BxTxV = cfg.logit_softcap * jnp.tanh(logits_BxTxV / cfg.logit_softcap)
        if cache is None:
            return logits_BxTxV
        k_LxBxSxKxH, v_LxBxSxKxH, source_k_LxBxPxKxH, source_v_LxBxPxKxH = kv
        length = length + tokens_BxT.shape[1]
        return logits_BxTxV, Cache(
            k_LxBxSxKxH, v_LxBxSxKxH, source_k_LxBxPxKxH, source_v_LxBxPxKxH, length, visible_BxP
        )


def init_cache(cfg: Model, batch: int, length: int, prefix: int) -> Cache:
    """Zeros, for `batch` rows of at most `length` positions, the first `prefix` of them of the source."""
    own, source = (
        jnp.zeros((cfg.num_layers, batch, positions, cfg.kv_heads, cfg.head_width), cfg.dtype)
        for positions in (length - prefix, prefix)
    )
    return Cache(own, own, source, source, jnp.int32(0), None)
