"""Sampling from a trained model with a key/value cache: one compiled loop a shape."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.config import Config, Model
from llm_jax.data import media as prompts
from llm_jax.data.prepare import Prepared
from llm_jax.models import families
from llm_jax.models.media import Items
from llm_jax.settings import BadInput
from llm_jax.training import loop


def sample_token(logits_BxV: jax.Array, key: jax.Array, temperature: float, top_k: int | None) -> jax.Array:
    """One id a row, int32: the likeliest at temperature 0, else drawn from softmax(logits / temperature), of the top k if given."""
    if temperature == 0:
        return jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
    if top_k is not None:
        least_Bx1 = jax.lax.top_k(logits_BxV, top_k)[0][:, -1:]
        logits_BxV = jnp.where(logits_BxV >= least_Bx1, logits_BxV, -jnp.inf)
    return jax.random.categorical(key, logits_BxV / temperature, axis=-1).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("model", "num_tokens", "temperature", "top_k", "prefix"))
def generate(
    model: Model,
    params: Any,
    prompt_BxT: jax.Array,
    key: jax.Array,
    *,
    num_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    segment_BxT: jax.Array | None = None,
    prefix: int = 0,
    media: Items | None = None,
) -> jax.Array:
    """`num_tokens` further ids of each row, int32: the prompt in one pass, with its media, then a token at a time.

    An encoder reads the first `prefix` tokens of the prompt. Prompts of unequal length stand at the right, behind padding that
    `segment_BxT` numbers as another document.
    """
    rows, length = prompt_BxT.shape
    cache = families.init_cache(model, rows, length + num_tokens, prefix)
    logits_BxTxV, cache = families.apply(model, params, prompt_BxT, segment_BxT, cache, prefix=prefix, media=media)

    def one(carry, key):
        cache, logits_BxV = carry
        token_B = sample_token(logits_BxV, key, temperature, top_k)
        logits_BxTxV, cache = families.apply(model, params, token_B[:, None], cache=cache)
        return (cache, logits_BxTxV[:, -1]), token_B

    keys = jax.random.split(key, num_tokens)
    return jax.lax.scan(one, (cache, logits_BxTxV[:, -1]), keys)[1].T


def continue_text(
    cfg: Config,
    prepared: Prepared,
    folder: Path,
    prompt: str,
    num_tokens: int,
    *,
    temperature: float = 0.8,
    top_k: int | None = None,
    seed: int = 0,
    media: Sequence[Path] = (),
) -> str:
    """The text that the model trained in `folder` puts behind `prompt`, until it begins another document.

    Each mark <media> of the prompt is the next of the files `media`. An encoder that is trained on rows of text reads the first
    data.prefix tokens; a shorter prompt has padding before it.
    """
    if num_tokens < 1:
        raise BadInput(f"--tokens must be at least 1, got {num_tokens}")
    if temperature < 0:
        raise BadInput(f"--temperature must not be negative, got {temperature}; 0 takes the likeliest token")
    if top_k is not None and not 1 <= top_k <= cfg.model.vocab_size:
        raise BadInput(f"--top_k must lie in [1, {cfg.model.vocab_size}], got {top_k}")
    tokenizer = prepared.tokenizer()
    reads, items = cfg.model.media, None
    if media or reads.kind != "none":
        items = prompts.load_items(reads, prompt, media)
        ids = [tokenizer.bos, *prompts.encode(tokenizer, prompt, reads.tokens).tolist()]
    else:
        ids = [tokenizer.bos, *tokenizer.encode([prompt])[0].tolist()]
    prefix = cfg.data.prefix if cfg.model.encodes else 0
    padding = max(0, prefix + 1 - len(ids))
    positions = cfg.model.max_positions
    read = len(ids) + padding - prefix  # by the decoder
    if positions is not None and read + num_tokens > positions:
        room = max(1, positions - read)
        raise BadInput(f"the model has {positions} positions and the prompt takes {len(ids)}: --tokens {room} fits")
    params = loop.load_params(cfg, folder)
    prompt_1xT = jnp.asarray([padding * [tokenizer.pad] + ids], jnp.int32)
    new = generate(
        cfg.model,
        params,
        prompt_1xT,
        jax.random.key(seed),
        num_tokens=num_tokens,
        temperature=temperature,
        top_k=top_k,
        segment_BxT=jnp.asarray([padding * [1] + len(ids) * [0]], jnp.int32) if padding else None,
        prefix=prefix,
        media=Items(jnp.asarray(items)[None], prompt_1xT == tokenizer.media) if items is not None else None,
    )[0].tolist()
    return tokenizer.decode(new[: new.index(tokenizer.bos)] if tokenizer.bos in new else new)
