"""The families of models behind one interface: training, evaluation and generation call these and never a family by its name."""

from __future__ import annotations

from typing import Any

import jax

from llm_jax.config import Model
from llm_jax.models import feedforward, ngram, recurrent, transformer

Params = Any

FAMILIES: dict[str, Any] = {
    "transformer": transformer,
    "lstm": recurrent,
    "rnn": recurrent,
    "feedforward": feedforward,
    "ngram": ngram,
}
"""The module of each `Model.family`, with functions of the same names and arguments as here."""


def init(cfg: Model, key: jax.Array) -> Params:
    """Float32 parameters as a plain tree of arrays; those of the blocks are stacked over layers."""
    return FAMILIES[cfg.family].init(cfg, key)


def apply(
    cfg: Model,
    params: Params,
    tokens_BxT: jax.Array,
    segment_BxT: jax.Array | None = None,
    cache: Any = None,
    dropout_key: jax.Array | None = None,
):
    """Logits for the token after each position: `logits_BxTxV`, float32; with a cache, `(logits_BxTxV, cache)`.

    Rows of `segment_BxT` number the documents packed into a row; none sees another. With a cache of `init_cache` the tokens
    continue it, in rows of one document each; that they still fit is the caller's count. A dropout key means training:
    without one, dropout is off. Raises BadInput for more tokens than the model or the cache has positions, and for segments
    with a cache.
    """
    return FAMILIES[cfg.family].apply(cfg, params, tokens_BxT, segment_BxT, cache, dropout_key)


def apply_training(
    cfg: Model,
    params: Params,
    tokens_BxT: jax.Array,
    segment_BxT: jax.Array | None = None,
    dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(logits_BxTxV, routing): as `apply`, with what the routers of a mixture of experts did, a layer (moe.Routing); else empty."""
    if not cfg.experts.number:
        return apply(cfg, params, tokens_BxT, segment_BxT, dropout_key=dropout_key), {}
    return FAMILIES[cfg.family].apply_routed(cfg, params, tokens_BxT, segment_BxT, dropout_key)


def init_cache(cfg: Model, batch: int, length: int) -> Any:
    """An empty cache for `batch` rows of at most `length` positions. Raises BadInput beyond the positions of the model."""
    return FAMILIES[cfg.family].init_cache(cfg, batch, length)


def logical_axes(cfg: Model) -> Params:
    """The tree of `init` with a PartitionSpec of logical axis names for each parameter."""
    return FAMILIES[cfg.family].logical_axes(cfg)
