"""The families of models behind one interface: training, evaluation and generation call these and never a family by its name.

A family is a linen module of (tokens_BxT, segment_BxT, cache), and of `prefix` where it has an encoder, and a function for its
empty cache. A Transformer may have an encoder of media beside it (media.py). An n-gram model is counted, not trained, and has
neither parameters nor a module: see ngram.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec

from llm_jax.config import Model
from llm_jax.models import encoder_decoder, feedforward, ngram, recurrent, seq2seq, transformer
from llm_jax.models import media as encoders
from llm_jax.models.media import Items
from llm_jax.settings import BadInput

Params = Any

MODULES: dict[str, type[nn.Module]] = {
    "transformer": transformer.Transformer,
    "encoder_decoder": encoder_decoder.EncoderDecoder,
    "lstm": recurrent.Recurrent,
    "rnn": recurrent.Recurrent,
    "seq2seq_rnn": seq2seq.Seq2Seq,
    "feedforward": feedforward.FeedForward,
}
CACHES: dict[str, Callable[[Model, int, int, int], Any]] = {
    "transformer": transformer.init_cache,
    "encoder_decoder": encoder_decoder.init_cache,
    "lstm": recurrent.init_cache,
    "rnn": recurrent.init_cache,
    "seq2seq_rnn": seq2seq.init_cache,
    "feedforward": feedforward.init_cache,
    "ngram": ngram.init_cache,
}


def _module(cfg: Model, train: bool = False) -> Any:
    return MODULES[cfg.family](cfg, train=train)


def _boxed(cfg: Model, key: jax.Array) -> Params:
    cfg = replace(cfg, scan_layers=True)  # the same numbers; on a GPU, 12 layers one by one compile for half a minute
    prefix = (1,) if cfg.encodes else ()
    params = _module(cfg).init(key, jnp.zeros((1, 2), jnp.int32), None, None, *prefix)["params"]
    if cfg.media.kind == "none":
        return params
    items_1x1x = jnp.zeros((1, 1, *cfg.media.shape), cfg.media.dtype)
    return {**params, "media": encoders.Media(cfg).init(jax.random.fold_in(key, 1), items_1x1x)["params"]}


def init(cfg: Model, key: jax.Array) -> Params:
    """Float32 parameters as a plain tree of arrays; those of the blocks are stacked over layers. Those of a language model are the
    same with media and without."""
    return ngram.init(cfg) if cfg.counted else nn.meta.unbox(_boxed(cfg, key))


@functools.lru_cache
def logical_axes(cfg: Model) -> Params:
    """The tree of `init` with a PartitionSpec of logical axis names for each parameter; counts are not sharded."""
    if cfg.counted:
        return jax.tree.map(lambda _: PartitionSpec(), ngram.init(cfg))
    return nn.get_partition_spec(jax.eval_shape(functools.partial(_boxed, cfg), jax.random.key(0)))


def apply(
    cfg: Model,
    params: Params,
    tokens_BxT: jax.Array,
    segment_BxT: jax.Array | None = None,
    cache: Any = None,
    dropout_key: jax.Array | None = None,
    prefix: int = 0,
    media: Items | None = None,
):
    """Logits for the token after each position from `prefix` on: `logits_BxTxV`, float32; with a cache, `(logits_BxTxV, cache)`.

    The first `prefix` tokens are read and nothing is predicted at them. Families with an encoder read them with it, and need one at
    least; with a cache they are given once, with the first call, and the cache keeps the source.

    Rows of `segment_BxT` number the documents packed into a row; none sees another. Behind an encoder a row is one document and the
    padding around it. With a cache of `init_cache` the tokens continue it; that they still fit is the caller's count. Segments go
    with the first tokens of a cache, which then continues the last document of each row, and only its logits mean anything; an
    n-gram model refuses them. `media` are the pictures or sounds of the tokens given, for models of a model.media.kind; without them
    placeholders are read as tokens. A dropout key means training: without one, dropout is off. Raises BadInput for more tokens than
    the model or the cache has positions, and for media that the model has no encoder for.
    """
    if cfg.encodes and cache is None and not prefix:
        raise BadInput(
            f"model.family={cfg.family} reads the first tokens of a row with its encoder: prefix must be 1 or more"
        )
    _check_room(cfg, tokens_BxT.shape[1], cache, prefix)
    if cfg.counted:
        out = ngram.apply(cfg, params, tokens_BxT, segment_BxT, cache)
    else:
        rngs = {"dropout": dropout_key} if dropout_key is not None else {}
        module, read = _module(cfg, train=dropout_key is not None), (prefix,) if cfg.encodes else ()
        if media is not None:
            read = (_placing(cfg, params, media, dropout_key),)
        out = module.apply({"params": params}, tokens_BxT, segment_BxT, cache, *read, rngs=rngs)
    if cfg.encodes or not prefix:
        return out
    return out[:, prefix:] if cache is None else (out[0][:, prefix:], out[1])


def apply_training(
    cfg: Model,
    params: Params,
    tokens_BxT: jax.Array,
    segment_BxT: jax.Array | None = None,
    dropout_key: jax.Array | None = None,
    prefix: int = 0,
    media: Items | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(logits_BxTxV, routing): as `apply`, with what the routers of a mixture of experts did, a layer (moe.Routing); else empty."""
    if not cfg.experts.number:
        return apply(cfg, params, tokens_BxT, segment_BxT, None, dropout_key, prefix, media), {}
    _check_room(cfg, tokens_BxT.shape[1], None, prefix)
    rngs = {"dropout": dropout_key} if dropout_key is not None else {}
    place = _placing(cfg, params, media, dropout_key) if media is not None else None
    logits_BxTxV, sown = _module(cfg, train=True).apply(
        {"params": params}, tokens_BxT, segment_BxT, None, place, rngs=rngs, mutable=["routing"]
    )
    return logits_BxTxV[:, prefix:], sown["routing"]["blocks"]["mlp"]["sums"]


def _placing(cfg: Model, params: Params, media: Items, dropout_key: jax.Array | None):
    """What puts the embeddings of the media among those of the tokens."""
    if cfg.media.kind == "none":
        raise BadInput(
            "the model has no encoder of media: model.media.kind=none; train one with model.media.kind=image or audio"
        )
    rngs = {"dropout": jax.random.fold_in(dropout_key, 1)} if dropout_key is not None else {}
    encoder = encoders.Media(cfg, train=dropout_key is not None)
    embeddings_BxRxD: Any = encoder.apply({"params": params["media"]}, media.items_BxIx, rngs=rngs)
    return lambda x_BxTxD: encoders.place(x_BxTxD, embeddings_BxRxD, media.at_BxT)


def check_attends(cfg: Model) -> None:
    """Refuses a family without attention."""
    if not (cfg.attends or cfg.family == "seq2seq_rnn"):
        raise BadInput(f"model.family={cfg.family} has no attention; transformer, encoder_decoder and seq2seq_rnn have")


def sown_attention(
    cfg: Model, params: Params, tokens_BxT: jax.Array, segment_BxT: jax.Array | None = None, prefix: int = 0
) -> dict[str, Any]:
    """What attention reads, in all layers: (q_LxBxTxNxH, k_LxBxSxKxH), after norms and rotation, for "self" of a decoder-only model,
    and for "encoder", "decoder" and "cross" of one with an encoder. Of seq2seq_rnn, {"weights": a_TxBxP}: softmaxed, of its one layer.

    Raises BadInput for a family without attention, and for more tokens than the model has positions.
    """
    check_attends(cfg)
    _check_room(cfg, tokens_BxT.shape[1], None, prefix)
    read = (prefix,) if cfg.encodes else ()
    _, sown = _module(cfg).apply({"params": params}, tokens_BxT, segment_BxT, None, *read, mutable=["attention"])
    sown = sown["attention"]
    if cfg.family == "seq2seq_rnn":
        return {"weights": sown["decoder"]["weights"]}
    if cfg.family == "transformer":
        return {"self": sown["blocks"]["attention"]["queries_keys"]}
    places = {"encoder": ("encoder_blocks", "attention"), "decoder": ("decoder_blocks", "attention")}
    places["cross"] = ("decoder_blocks", "cross")
    return {name: sown[block][layer]["queries_keys"] for name, (block, layer) in places.items()}


def init_cache(cfg: Model, batch: int, length: int, prefix: int = 0) -> Any:
    """An empty cache for `batch` rows of at most `length` positions, of which `prefix` are those of an encoder.

    Raises BadInput beyond the positions of the model.
    """
    _check_room(cfg, length, None, prefix)
    return CACHES[cfg.family](cfg, batch, length, prefix)


def _check_room(cfg: Model, length: int, cache: Any, prefix: int) -> None:
    """Refuses rows for which the model or the cache has no positions. An encoder and its decoder count from 0 each."""
    read = length - prefix if cfg.encodes else length
    most = max(prefix, read) if cfg.encodes else read
    if cfg.max_positions is not None and most > cfg.max_positions:
        raise BadInput(f"{most} tokens exceed the learned positions; model.max_context={cfg.max_positions}")
    room = getattr(cache, "room", None)
    if room is not None and read > room:
        raise BadInput(f"{read} tokens exceed the cache; it has {room} positions")
