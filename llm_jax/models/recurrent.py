"""Recurrent language models: the vanilla RNN (Elman 1990; Mikolov et al. 2010) and the LSTM (Hochreiter and Schmidhuber 1997,
with the forget gate of Gers et al. 2000).

Layers are stacked on a residual stream, each behind a norm, with dropout between them and never on the recurrence (Zaremba et al.
2014). The norms, which the first of these models had not, take 9 % off the loss of an LSTM of 25 k parameters at 1e11 FLOPs, each
way at its best learning rate. The products with the inputs of all steps are one matrix product before the loop over time; inside
it remains the product with the state. Dimension letters beside those of config.py: Z gates, 4 of an LSTM (input, forget, cell,
output) and 1 of an RNN.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from llm_jax.config import Model
from llm_jax.models.layers import Norm, lookup, normal, project

Params = Any
State = Any
"""Of one layer: (h_BxD, c_BxD), the output and the cell; c is None in an RNN, which has none."""


class Cache(NamedTuple):
    """The state after the tokens read so far: of constant size, however many they are."""

    h_LxBxD: jax.Array
    c_LxBxD: jax.Array | None


def lstm_cell(gates_BxZxD: jax.Array, c_BxD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(h, c) after one step, from the sum of the products with input and state and of the bias; the cell is float32."""
    i, f, g, o = (gates_BxZxD[:, z].astype(jnp.float32) for z in range(4))
    c_BxD = jax.nn.sigmoid(f) * c_BxD + jax.nn.sigmoid(i) * jnp.tanh(g)
    return (jax.nn.sigmoid(o) * jnp.tanh(c_BxD)).astype(gates_BxZxD.dtype), c_BxD


def rnn_cell(gates_BxZxD: jax.Array, c_BxD: None) -> tuple[jax.Array, None]:
    """(h, None) after one step, h = tanh of the sum of products and bias (Elman 1990)."""
    return jnp.tanh(gates_BxZxD[:, 0]), None


CELLS = {"lstm": (lstm_cell, 4), "rnn": (rnn_cell, 1), "seq2seq_rnn": (lstm_cell, 4)}
"""The step of a family, and its number of gates."""


def _steps(cell, x_TxBxZxD, w_DxZxD, state, keep_TxBx1, saved: bool):
    """The loop over time: outputs, last state, and what the backward pass reads: the gates, and the state before each step."""

    def step(state, xs):
        x_BxZxD, keep_Bx1 = xs
        if keep_Bx1 is not None:
            state = jax.tree.map(lambda s: s * keep_Bx1.astype(s.dtype), state)
        h_BxD, c_BxD = state
        gates_BxZxD = x_BxZxD + project(h_BxD, w_DxZxD)
        new = cell(gates_BxZxD, c_BxD)
        return new, (new[0], (gates_BxZxD, h_BxD, c_BxD) if saved else None)

    last, (y_TxBxD, residuals) = jax.lax.scan(step, state, (x_TxBxZxD, keep_TxBx1))
    return (y_TxBxD, last), residuals


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def unroll(cell, x_TxBxZxD: jax.Array, w_DxZxD: jax.Array, state: State, keep_TxBx1: jax.Array | None):
    """(y_TxBxD, last state) of `cell` run over time from `state`; where `keep` is 0, a step starts from zeros.

    Its own backward pass collects the gradients of the gates and forms that of `w` from all steps in one product. Left to
    autodiff, each step would add a gradient of the size of `w` to a sum, which costs more than its matrix products.
    """
    return _steps(cell, x_TxBxZxD, w_DxZxD, state, keep_TxBx1, saved=False)[0]


def _unroll_forward(cell, x_TxBxZxD, w_DxZxD, state, keep_TxBx1):
    out, residuals = _steps(cell, x_TxBxZxD, w_DxZxD, state, keep_TxBx1, saved=True)
    return out, (residuals, w_DxZxD, keep_TxBx1)


def _unroll_backward(cell, saved, cotangents):
    (gates_TxBxZxD, h_TxBxD, c_TxBxD), w_DxZxD, keep_TxBx1 = saved
    dy_TxBxD, dlast = cotangents
    w_ZxDxD = jnp.moveaxis(w_DxZxD, 0, -1)

    def step(dstate, xs):
        dy_BxD, gates_BxZxD, c_BxD, keep_Bx1 = xs
        dh_BxD, dc_BxD = dstate
        _, pull_back = jax.vjp(cell, gates_BxZxD, c_BxD)
        dgates_BxZxD, dc_BxD = pull_back((dy_BxD + dh_BxD, dc_BxD))
        dstate = project(dgates_BxZxD, w_ZxDxD, 2), dc_BxD
        if keep_Bx1 is not None:
            dstate = jax.tree.map(lambda s: s * keep_Bx1.astype(s.dtype), dstate)
        return dstate, dgates_BxZxD

    dstate, dgates_TxBxZxD = jax.lax.scan(step, dlast, (dy_TxBxD, gates_TxBxZxD, c_TxBxD, keep_TxBx1), reverse=True)
    dw_DxZxD = jnp.einsum("tbd,tbze->dze", h_TxBxD, dgates_TxBxZxD)
    return dgates_TxBxZxD, dw_DxZxD, dstate, jax.tree.map(jnp.zeros_like, keep_TxBx1)


unroll.defvjp(_unroll_forward, _unroll_backward)


def orthogonal(key: jax.Array, shape: tuple[int, int, int], dtype: Any = jnp.float32) -> jax.Array:
    """An orthogonal matrix for each gate: states neither grow nor vanish along the loop before anything is learnt."""
    width, gates, _ = shape
    draw = functools.partial(nn.initializers.orthogonal(), shape=(width, width), dtype=dtype)
    return jnp.moveaxis(jax.vmap(draw)(jax.random.split(key, gates)), 0, 1)


def forget_bias(key: jax.Array, shape: tuple[int, int], dtype: Any = jnp.float32) -> jax.Array:
    """Zeros; 1 for the forget gate, so that an LSTM starts by remembering (Jozefowicz et al. 2015, section 2)."""
    return jnp.zeros(shape, dtype).at[1:2].set(1)  # an RNN has no row 1


class Layer(nn.Module):
    """Norm, recurrence and residual branch."""

    cfg: Model
    train: bool

    @nn.compact
    def __call__(self, x_TxBxD, state, keep_TxBx1):
        cfg = self.cfg
        cell, gates = CELLS[cfg.family]
        axes, shape = ("embed", "gates", "state"), (cfg.d_model, gates, cfg.d_model)
        input_DxZxD = self.param("input", normal(axes, cfg.d_model), shape)
        w_DxZxD: Any = self.param("recurrent", nn.with_logical_partitioning(orthogonal, axes), shape)
        bias_ZxD: Any = self.param("bias", nn.with_logical_partitioning(forget_bias, axes[1:]), shape[1:])
        gates_TxBxZxD = project(Norm(cfg.norm, name="norm")(x_TxBxD), input_DxZxD)
        gates_TxBxZxD += bias_ZxD.astype(x_TxBxD.dtype)[None, None]
        y_TxBxD, state = unroll(cell, gates_TxBxZxD, w_DxZxD.astype(x_TxBxD.dtype), state, keep_TxBx1)
        return x_TxBxD + nn.Dropout(cfg.dropout, deterministic=not self.train)(y_TxBxD), state


class Recurrent(nn.Module):
    """The whole model as a linen module, time first inside."""

    cfg: Model
    train: bool = False

    @nn.compact
    def __call__(self, tokens_BxT: jax.Array, segment_BxT: jax.Array | None, cache: Cache | None):
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        embed_VxD: Any = self.param("embed", normal(("vocab", "embed"), cfg.d_model), (cfg.vocab_size, cfg.d_model))
        x_TxBxD = lookup(embed_VxD, tokens_BxT.T, dtype) * dtype.type(cfg.d_model**0.5)
        x_TxBxD = nn.Dropout(cfg.dropout, deterministic=not self.train)(x_TxBxD)
        state = cache or init_cache(cfg, tokens_BxT.shape[0], 0)
        layers = nn.scan(
            Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast),
            length=cfg.num_layers,
            unroll=1 if cfg.scan_layers else cfg.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(cfg, self.train, name="blocks")
        x_TxBxD, state = layers(x_TxBxD, tuple(state), document_starts(segment_BxT))
        x_BxTxD = Norm(cfg.norm, name="norm")(jnp.swapaxes(x_TxBxD, 0, 1))
        if cfg.tie_embeddings:
            head_DxV = embed_VxD.T
        else:
            head_DxV = self.param("head", normal(("embed", "vocab"), cfg.d_model), (cfg.d_model, cfg.vocab_size))
        logits_BxTxV = project(x_BxTxD, head_DxV).astype(jnp.float32)
        return logits_BxTxV if cache is None else (logits_BxTxV, Cache(*state))


def document_starts(segment_BxT: jax.Array | None) -> jax.Array | None:
    """TxBx1, for `unroll`: 0 where a document begins, and so a state of zeros."""
    if segment_BxT is None:
        return None
    same_BxT = segment_BxT[:, 1:] == segment_BxT[:, :-1]
    keep_BxT = jnp.concatenate([jnp.zeros_like(segment_BxT[:, :1], bool), same_BxT], axis=1)
    return keep_BxT.T[:, :, None].astype(jnp.float32)


def init_cache(cfg: Model, batch: int, length: int = 0, prefix: int = 0) -> Cache:
    """Zeros. A state has no length: any number of tokens fits."""
    shape = (cfg.num_layers, batch, cfg.d_model)
    return Cache(jnp.zeros(shape, cfg.dtype), jnp.zeros(shape, jnp.float32) if cfg.family == "lstm" else None)
