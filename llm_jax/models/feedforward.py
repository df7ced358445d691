"""The feed-forward language model of Bengio et al. 2003, section 2: the embeddings of the last n - 1 tokens side by side, one hidden
layer of tanh, and direct connections from the embeddings to the output where asked for.

    y = b + W x + U tanh(d + H x),   x = (C(w_{t-1}), ..., C(w_{t-n+1}))

Dimension letters beside those of config.py: O the tokens that it sees, `ngram_order` - 1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from llm_jax.config import Model
from llm_jax.models.layers import lookup, normal, project

Params = Any
NOTHING = -1
"""In place of a token before the start of the row or document. Its embedding is zero."""


class Cache(NamedTuple):
    """The last n - 2 tokens read: with the next one they are all that the model sees."""

    tokens_Bx_: jax.Array


class FeedForward(nn.Module):
    """The whole model as a linen module."""

    cfg: Model
    train: bool = False

    @nn.compact
    def __call__(self, tokens_BxT: jax.Array, segment_BxT: jax.Array | None, cache: Cache | None):
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        seen, length, hidden = cfg.ngram_order - 1, tokens_BxT.shape[1], (cfg.ff_width,)
        embed_VxD: Any = self.param("embed", normal(("vocab", "embed"), cfg.d_model), (cfg.vocab_size, cfg.d_model))
        zeros = nn.initializers.zeros_init()
        hidden_OxDxF = self.param(
            "hidden", normal(("context", "embed", "mlp"), seen * cfg.d_model), (seen, cfg.d_model, *hidden)
        )
        bias_F: Any = self.param("bias", nn.with_logical_partitioning(zeros, ("mlp",)), hidden)
        head_FxV = self.param("head", normal(("mlp", "vocab"), cfg.ff_width), (*hidden, cfg.vocab_size))
        bias_V: Any = self.param("head_bias", nn.with_logical_partitioning(zeros, ("vocab",)), (cfg.vocab_size,))

        before = cache or init_cache(cfg, tokens_BxT.shape[0], length)
        all_Bx_ = jnp.concatenate([before.tokens_Bx_, tokens_BxT], axis=1)
        context_BxTxO = jnp.stack([all_Bx_[:, k : k + length] for k in reversed(range(seen))], axis=2)
        if segment_BxT is not None:
            padded_Bx_ = jnp.pad(segment_BxT, ((0, 0), (seen - 1, 0)), mode="edge")
            segment_BxTxO = jnp.stack([padded_Bx_[:, k : k + length] for k in reversed(range(seen))], axis=2)
            context_BxTxO = jnp.where(segment_BxTxO == segment_BxT[:, :, None], context_BxTxO, NOTHING)
        x_BxTxOxD = lookup(embed_VxD, context_BxTxO, dtype) * dtype.type(cfg.d_model**0.5)
        x_BxTxOxD = jnp.where((context_BxTxO != NOTHING)[..., None], x_BxTxOxD, dtype.type(0))
        dropout = nn.Dropout(cfg.dropout, deterministic=not self.train)
        x_BxTxOxD = dropout(x_BxTxOxD)
        h_BxTxF = dropout(jnp.tanh(project(x_BxTxOxD, hidden_OxDxF, 2) + bias_F.astype(dtype)[None, None]))
        logits_BxTxV = project(h_BxTxF, head_FxV)
        if cfg.direct_connections:
            direct = normal(("context", "embed", "vocab"), seen * cfg.d_model)
            logits_BxTxV += project(x_BxTxOxD, self.param("direct", direct, (seen, cfg.d_model, cfg.vocab_size)), 2)
        logits_BxTxV = logits_BxTxV.astype(jnp.float32) + bias_V[None, None]
        if cache is None:
            return logits_BxTxV
        if segment_BxT is not None:
            all_Bx_ = jnp.where(padded_Bx_ == segment_BxT[:, -1:], all_Bx_, NOTHING)
        return logits_BxTxV, Cache(all_Bx_[:, length:])


def init_cache(cfg: Model, batch: int, length: int = 0, prefix: int = 0) -> Cache:
    """Of the last n - 2 tokens, none of them seen yet; any number of tokens fits."""
    return Cache(jnp.full((batch, cfg.ngram_order - 2), NOTHING, jnp.int32))
