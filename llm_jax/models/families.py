"""The families of models behind one interface: training, evaluation and generation call these and never a family by its name."""

from __future__ import annotations

from typing import Any

import jax

from llm_jax.config import Model
from llm_jax.models import encoder_decoder, feedforward, ngram, recurrent, seq2seq, transformer

Params = Any

FAMILIES: dict[str, Any] = {
    "transformer": transformer,
    "encoder_decoder": encoder_decoder,
    "lstm": recurrent,
    "rnn": recurrent,
    "seq2seq_rnn": seq2seq,
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
    prefix: int = 0,
):
    """Logits for the token after each position from `prefix` on: `logits_BxTxV`, float32; with a cache, `(logits_BxTxV, cache)`.

    The first `prefix` tokens are read and nothing is predicted at them. Families with an encoder read them with it, and need one at
    least; with a cache they are given once, with the first call, and the cache keeps the source.

    Rows of `segment_BxT` number the documents packed into a row; none sees another. Behind an encoder a row is one document and the
    padding around it. With a cache of `init_cache` the tokens continue it; that they still fit is the caller's count. Segments go
    with the first tokens of a cache, which then continues the last document of each row, and only its logits mean anything; an
    n-gram model refuses them. A dropout key means training: without one, dropout is off. Raises BadInput for more tokens than the
    model or the cache has positions.
    """
    if cfg.encodes:
        return FAMILIES[cfg.family].apply(cfg, params, tokens_BxT, segment_BxT, cache, dropout_key, prefix)
    out = FAMILIES[cfg.family].apply(cfg, params, tokens_BxT, segment_BxT, cache, dropout_key)
    if not prefix:
        return out
    return out[:, prefix:] if cache is None else (out[0][:, prefix:], out[1])


def apply_training(
    cfg: Model,
    params: Params,
    tokens_BxT: jax.Array,
    segment_BxT: jax.Array | None = None,
    dropout_key: jax.Array | None = None,
    prefix: int = 0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(logits_BxTxV, routing): as `apply`, with what the routers of a mixture of experts did, a layer (moe.Routing); else empty."""
    if not cfg.experts.number:
        return apply(cfg, params, tokens_BxT, segment_BxT, None, dropout_key, prefix), {}
    logits_BxTxV, routing = FAMILIES[cfg.family].apply_routed(cfg, params, tokens_BxT, segment_BxT, dropout_key)
    return logits_BxTxV[:, prefix:], routing


def init_cache(cfg: Model, batch: int, length: int, prefix: int = 0) -> Any:
    """An empty cache for `batch` rows of at most `length` positions, of which `prefix` are those of an encoder.

    Raises BadInput beyond the positions of the model.
    """
    if cfg.encodes:
        return FAMILIES[cfg.family].init_cache(cfg, batch, length, prefix)
    return FAMILIES[cfg.family].init_cache(cfg, batch, length)


def logical_axes(cfg: Model) -> Params:
    """The tree of `init` with a PartitionSpec of logical axis names for each parameter."""
    return FAMILIES[cfg.family].logical_axes(cfg)
