"""Attention maps of a trained model: for one text, who attends to whom in each layer and head.

Models sow what attention reads (queries and keys after norms and rotation) and the weights are computed here, in float64 and with the
plain mask, so that a map does not depend on the kernel that ran.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.config import Config, Model
from llm_jax.data.media import MARK
from llm_jax.data.prepare import Prepared
from llm_jax.data.tokenizer import Tokenizer
from llm_jax.generation.pairs import transduce
from llm_jax.models import families
from llm_jax.models.attention import attention_mask
from llm_jax.settings import require
from llm_jax.training import loop

MOST_TOKENS = 256
"""In one map: beyond, nobody reads it, and its numbers grow with the square."""


@dataclass(frozen=True)
class Map:
    """One kind of attention in all layers and heads: "self" of a decoder-only model, "encoder", "decoder", and "cross" between them."""

    name: str
    weights_LxNxTxS: np.ndarray
    """Float64; rows over S add up to 1, and are 0 where the mask is False."""
    visible_TxS: np.ndarray
    """The mask: where a query may look."""
    queries: tuple[str, ...] = ()
    """Text of the tokens that look, T."""
    keys: tuple[str, ...] = ()
    """Text of the tokens that are looked at, S."""


def softmax_weights(q_LxTxNxH: np.ndarray, k_LxSxKxH: np.ndarray, visible_TxS: np.ndarray) -> np.ndarray:
    """softmax(q k / sqrt(H)) over visible keys, LxNxTxS in float64; query head n reads key head n // G."""
    group = q_LxTxNxH.shape[2] // k_LxSxKxH.shape[2]
    q_LxTxNxH = np.asarray(q_LxTxNxH, np.float64) * q_LxTxNxH.shape[-1] ** -0.5
    k_LxSxNxH = np.repeat(np.asarray(k_LxSxKxH, np.float64), group, axis=2)
    scores_LxNxTxS = np.where(visible_TxS, np.einsum("ltnh,lsnh->lnts", q_LxTxNxH, k_LxSxNxH), -np.inf)
    weights_LxNxTxS = np.exp(scores_LxNxTxS - scores_LxNxTxS.max(-1, keepdims=True))
    return weights_LxNxTxS / weights_LxNxTxS.sum(-1, keepdims=True)


_sown = functools.partial(jax.jit, static_argnums=(0, 4))(families.sown_attention)


def attention_maps(
    model: Model, params: Any, tokens_T: np.ndarray, segment_T: np.ndarray | None = None, prefix: int = 0
) -> list[Map]:
    """The maps of one row of tokens, whose documents `segment_T` numbers and of which an encoder reads the first `prefix`.

    Padding before a source is a document of its own: it attends to itself in the encoder, and nobody else does. Raises BadInput for a
    family without attention.
    """
    segment_BxT = None if segment_T is None else jnp.asarray(segment_T)[None]
    sown = _sown(model, params, jnp.asarray(tokens_T)[None], segment_BxT, prefix)
    segment_BxP, source_P = None, np.ones(prefix, bool)
    if segment_BxT is not None and prefix:
        segment_BxP, source_P = segment_BxT[:, :prefix], np.asarray(segment_BxT[0, :prefix] == segment_BxT[0, prefix])
    if "weights" in sown:
        a_TxP = np.asarray(sown["weights"][:, 0], np.float64)
        return [Map("cross", a_TxP[None, None], np.broadcast_to(source_P, a_TxP.shape))]
    masks: dict[str, Any] = {
        "self": (model.window, segment_BxT, None, True),
        "encoder": (None, segment_BxP, None, False),
        "decoder": (None, None, None, True),
        "cross": (None, None, None, False, source_P[None]),
    }
    found = []
    for name in (name for name in masks if name in sown):  # jit has sorted them
        q_LxTxNxH, k_LxSxKxH = (np.asarray(x[:, 0].astype(jnp.float32)) for x in sown[name])
        visible = attention_mask(q_LxTxNxH.shape[1], k_LxSxKxH.shape[1], *masks[name])
        visible_TxS = np.asarray(jnp.broadcast_to(visible, (1, 1, 1, q_LxTxNxH.shape[1], k_LxSxKxH.shape[1]))[0, 0, 0])
        found.append(Map(name, softmax_weights(q_LxTxNxH, k_LxSxKxH, visible_TxS), visible_TxS))
    return found


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[str, ...]:
    """What each token stands for, in letters that a label can hold: a space is ␣, the mark before a document <s>.

    Of a character of several tokens, as UTF-8 beyond ASCII is in bytes, the first has it and the others are empty.
    """
    marks = {tokenizer.bos: "<s>", tokenizer.pad: "<pad>"}
    texts: list[str] = []
    while len(texts) < len(ids):
        start = len(texts)
        if ids[start] in marks:
            texts.append(marks[ids[start]])
            continue
        pieces = {width: tokenizer.decode(ids[start : start + width]) for width in range(1, 5)}
        width = next((width for width, piece in pieces.items() if piece and "\ufffd" not in piece), 1)
        shown = pieces[width].replace(" ", "␣").replace("\n", "\\n").replace("\t", "\\t")
        texts += [shown, *(width - 1) * [""]]
    return tuple(texts[: len(ids)])


def maps_of_text(cfg: Config, prepared: Prepared, folder: Path, text: str) -> list[Map]:
    """The maps of the model trained in `folder`, with the text of their tokens.

    Of a model trained on pairs the text is the source, and the target is what the model makes of it, greedily. An encoder trained on
    running text reads the first half of the text here, at most data.prefix tokens.

    Raises BadInput for a family without attention, an empty text, and one of more than MOST_TOKENS tokens or the model's positions.
    """
    families.check_attends(cfg.model)
    require(bool(text), "--prompt is empty; give it a sentence")
    require(
        cfg.model.media.kind == "none" or MARK not in text,
        f"--prompt: attention to media is not drawn; leave out {MARK}",
    )
    tokenizer = prepared.tokenizer()
    ids = [tokenizer.bos, *tokenizer.encode([text])[0].tolist()]
    require(len(ids) <= MOST_TOKENS, f"--prompt has {len(ids)} tokens; a map can be read up to {MOST_TOKENS}")
    params = loop.load_params(cfg, folder)
    prefix = min(cfg.data.prefix, -(-len(ids) // 2))
    if cfg.data.source == "pairs":
        prefix = len(ids)
        target = transduce(cfg, tokenizer, params, [text])[0]
        ids += [tokenizer.bos, *tokenizer.encode([target])[0].tolist()]
    prefix = prefix if cfg.model.encodes else 0
    texts = token_texts(tokenizer, ids)
    source, rest = texts[:prefix], texts[prefix:]
    read = {"self": (texts, texts), "encoder": (source, source), "decoder": (rest, rest), "cross": (rest, source)}
    found = attention_maps(cfg.model, params, np.asarray(ids, np.int32), None, prefix)
    return [Map(one.name, one.weights_LxNxTxS, one.visible_TxS, *read[one.name]) for one in found]
