"""The recurrent encoder-decoder with additive attention (Bahdanau et al. 2015, «Neural Machine Translation by Jointly Learning to
Align and Translate»), with LSTM cells in place of its gated units.

The encoder reads the first P tokens of a row, `prefix`, in both directions: each layer is two LSTMs of half the width, side by side.
Its outputs h_j are the annotations. At each step the bottom layer of the decoder looks at them from its last state s,

    e_j = v . tanh(W s + U h_j),   a = softmax(e),   c = sum_j a_j h_j,   s' = LSTM(y, c, s),

and adds s' + O c to the residual stream, on which further layers are those of recurrent.py. The first state is tanh(A h_1): the
annotation of the first source token, whose backward half has read all of the source. Time comes first inside of the loops.

Dimension letters beside those of config.py: Z gates, 4 (input, forget, cell, output); R directions, 2; E half the width.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from llm_jax.config import Model
from llm_jax.models.layers import Norm, lookup, normal, project
from llm_jax.models.recurrent import Layer, document_starts, forget_bias, lstm_cell, orthogonal, unroll

Params = Any
GATES, DIRECTIONS = 4, 2


class Cache(NamedTuple):
    """The state of the decoder's layers, and the source: annotations, and U h_j of each, computed once."""

    h_LxBxD: jax.Array
    c_LxBxD: jax.Array
    source_BxPxD: jax.Array
    keys_BxPxD: jax.Array
    visible_BxP: jax.Array | None
    """Where the source is no padding; None: everywhere."""


def _both(draw):
    """An initial value for each direction."""
    return lambda key, shape, dtype=jnp.float32: jnp.stack(
        [draw(k, shape[1:], dtype) for k in jax.random.split(key, shape[0])]
    )


class EncoderLayer(nn.Module):
    """Norm, two LSTMs that run against each other, and residual branch."""

    cfg: Model
    train: bool

    @nn.compact
    def __call__(self, x_TxBxD, keep_RxTxBx1):
        cfg = self.cfg
        _, rows, width = x_TxBxD.shape
        half, dtype = width // 2, x_TxBxD.dtype
        axes = ("embed", "directions", "gates", "state")
        input_DxRxZxE = self.param("input", normal(axes, width), (width, DIRECTIONS, GATES, half))
        w_RxExZxE: Any = self.param(
            "recurrent",
            nn.with_logical_partitioning(_both(orthogonal), ("directions", "embed", "gates", "state")),
            (DIRECTIONS, half, GATES, half),
        )
        bias_RxZxE: Any = self.param(
            "bias", nn.with_logical_partitioning(_both(forget_bias), axes[1:]), (DIRECTIONS, GATES, half)
        )
        x_TxBxRxZxE = (
            project(Norm(cfg.norm, name="norm")(x_TxBxD), input_DxRxZxE) + bias_RxZxE.astype(dtype)[None, None]
        )
        forward_TxBxZxE, backward_TxBxZxE = x_TxBxRxZxE[:, :, 0], x_TxBxRxZxE[::-1, :, 1]
        zeros = jnp.zeros((DIRECTIONS, rows, half), dtype), jnp.zeros((DIRECTIONS, rows, half), jnp.float32)
        # Both in one loop: half as many steps, of products of twice the size.
        y_RxTxBxE, _ = jax.vmap(functools.partial(unroll, lstm_cell))(
            jnp.stack([forward_TxBxZxE, backward_TxBxZxE]), w_RxExZxE.astype(dtype), zeros, keep_RxTxBx1
        )
        y_TxBxD = jnp.concatenate([y_RxTxBxE[0], y_RxTxBxE[1, ::-1]], axis=-1)
        return x_TxBxD + nn.Dropout(cfg.dropout, deterministic=not self.train)(y_TxBxD), None


def align(query_BxD, keys_BxPxD, score_D, source_BxPxD, visible_BxP) -> tuple[jax.Array, jax.Array]:
    """(c_BxD, a_BxP) of the equations above; the softmax is float32."""
    energy_BxPxD = jnp.tanh(keys_BxPxD + query_BxD[:, None, :])
    e_BxP = jnp.einsum("bpd,d->bp", energy_BxPxD, score_D).astype(jnp.float32)
    if visible_BxP is not None:
        e_BxP = jnp.where(visible_BxP, e_BxP, jnp.float32(-1e30))
    a_BxP = jax.nn.softmax(e_BxP)
    return jnp.einsum("bp,bpd->bd", a_BxP.astype(source_BxPxD.dtype), source_BxPxD), a_BxP


class AttendingLayer(nn.Module):
    """The bottom of the decoder: norm, LSTM that attends to the source, and residual branch."""

    cfg: Model
    train: bool

    @nn.compact
    def __call__(self, x_TxBxD, state, source_BxPxD, keys_BxPxD, visible_BxP):
        cfg = self.cfg
        width, dtype = cfg.d_model, x_TxBxD.dtype
        axes, shape = ("embed", "gates", "state"), (width, GATES, width)
        input_DxZxD = self.param("input", normal(axes, width), shape)
        context_DxZxD = self.param("context", normal(axes, width), shape)
        w_DxZxD: Any = self.param("recurrent", nn.with_logical_partitioning(orthogonal, axes), shape)
        bias_ZxD: Any = self.param("bias", nn.with_logical_partitioning(forget_bias, axes[1:]), shape[1:])
        query_DxD: Any = self.param("query", normal(("embed", "state"), width), (width, width))
        score_D: Any = self.param("score", normal(("state",), width), (width,))
        out_DxD = self.param("out", normal(("state", "embed"), width), (width, width))
        x_TxBxZxD = project(Norm(cfg.norm, name="norm")(x_TxBxD), input_DxZxD) + bias_ZxD.astype(dtype)[None, None]
        # Both products with the state are one.
        w_Dx_: Any = jnp.concatenate([query_DxD, w_DxZxD.reshape(width, -1)], axis=1).astype(dtype)
        context_DxZxD, score_D = context_DxZxD.astype(dtype), score_D.astype(dtype)

        kept = self.is_mutable_collection("attention")  # the weights of each step, which training does not read again

        def step(state, x_BxZxD):
            h_BxD, c_BxD = state
            both_Bx_ = h_BxD @ w_Dx_
            context_BxD, a_BxP = align(both_Bx_[:, :width], keys_BxPxD, score_D, source_BxPxD, visible_BxP)
            gates_BxZxD = x_BxZxD + both_Bx_[:, width:].reshape(x_BxZxD.shape) + project(context_BxD, context_DxZxD)
            state = lstm_cell(gates_BxZxD, c_BxD)
            return state, (state[0], context_BxD, a_BxP if kept else None)

        state, (h_TxBxD, context_TxBxD, a_TxBxP) = jax.lax.scan(step, state, x_TxBxZxD)
        if kept:
            self.sow("attention", "weights", a_TxBxP, init_fn=lambda: None, reduce_fn=lambda _, new: new)
        y_TxBxD = h_TxBxD + project(context_TxBxD, out_DxD)
        return x_TxBxD + nn.Dropout(cfg.dropout, deterministic=not self.train)(y_TxBxD), state


class Seq2Seq(nn.Module):
    """The whole model as a linen module."""

    cfg: Model
    train: bool = False

    @nn.compact
    def __call__(self, tokens_BxT: jax.Array, segment_BxT: jax.Array | None, cache: Cache | None, prefix: int):
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        rows, width = tokens_BxT.shape[0], cfg.d_model
        embed_VxD: Any = self.param("embed", normal(("vocab", "embed"), width), (cfg.vocab_size, width))
        dropout = nn.Dropout(cfg.dropout, deterministic=not self.train)

        def embedded(tokens_BxT):
            return dropout(lookup(embed_VxD, tokens_BxT.T, dtype) * dtype.type(width**0.5))

        def stack(layer, layers: int, name: str, in_axes):
            return nn.scan(
                layer,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=in_axes,
                length=layers,
                unroll=1 if cfg.scan_layers else layers,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )(cfg, self.train, name=name)

        if prefix:
            keep: Any = None
            visible_BxP, first_BxP = None, jnp.arange(prefix)[None, :] == 0
            if segment_BxT is not None:
                segment_BxP = segment_BxT[:, :prefix]
                visible_BxP = segment_BxP == segment_BxT[:, prefix : prefix + 1]
                first_BxP = visible_BxP & (jnp.cumsum(visible_BxP, axis=1) == 1)
                keep = document_starts(segment_BxP), document_starts(segment_BxP[:, ::-1])
            x_TxBxD, _ = stack(EncoderLayer, cfg.encoder_layers, "encoder_blocks", nn.broadcast)(
                embedded(tokens_BxT[:, :prefix]), jnp.stack(keep) if keep else None
            )
            source_BxPxD = Norm(cfg.norm, name="encoder_norm")(jnp.swapaxes(x_TxBxD, 0, 1))
            keys_DxD = self.param("keys", normal(("embed", "state"), width), (width, width))
            keys_BxPxD = project(source_BxPxD, keys_DxD)
            start_DxD = self.param("start", normal(("embed", "state"), width), (width, width))
            first_BxD = jnp.where(first_BxP[..., None], source_BxPxD, dtype.type(0)).sum(1)
            h_BxD = jnp.tanh(project(first_BxD, start_DxD))
            h_LxBxD = jnp.concatenate([h_BxD[None], jnp.zeros((cfg.num_layers - 1, rows, width), dtype)])
            c_LxBxD = jnp.zeros((cfg.num_layers, rows, width), jnp.float32)
        else:
            assert cache is not None
            h_LxBxD, c_LxBxD, source_BxPxD, keys_BxPxD, visible_BxP = cache

        bottom = AttendingLayer(cfg, self.train, name="decoder")
        x_TxBxD, (h_BxD, c_BxD) = bottom(
            embedded(tokens_BxT[:, prefix:]), (h_LxBxD[0], c_LxBxD[0]), source_BxPxD, keys_BxPxD, visible_BxP
        )
        h_LxBxD, c_LxBxD, above = h_BxD[None], c_BxD[None], (h_LxBxD[1:], c_LxBxD[1:])
        if cfg.num_layers > 1:
            layers = stack(Layer, cfg.num_layers - 1, "decoder_blocks", (0, nn.broadcast))
            x_TxBxD, above = layers(x_TxBxD, above, None)
            h_LxBxD, c_LxBxD = jnp.concatenate([h_LxBxD, above[0]]), jnp.concatenate([c_LxBxD, above[1]])
        x_BxTxD = Norm(cfg.norm, name="norm")(jnp.swapaxes(x_TxBxD, 0, 1))
        shape = (width, cfg.vocab_size)
        head_DxV = embed_VxD.T if cfg.tie_embeddings else self.param("head", normal(("embed", "vocab"), width), shape)
        logits_BxTxV = project(x_BxTxD, head_DxV).astype(jnp.float32)
        if cache is None:
            return logits_BxTxV
        return logits_BxTxV, Cache(h_LxBxD, c_LxBxD, source_BxPxD, keys_BxPxD, visible_BxP)


def init_cache(cfg: Model, batch: int, length: int, prefix: int) -> Cache:
    """Zeros. The decoder's state has no length: any number of tokens fits."""
    state, source = (cfg.num_layers, batch, cfg.d_model), (batch, prefix, cfg.d_model)
    zeros = jnp.zeros(source, cfg.dtype)
    return Cache(jnp.zeros(state, cfg.dtype), jnp.zeros(state, jnp.float32), zeros, zeros, None)
