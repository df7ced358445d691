"""Models with an encoder of media at work: what they write behind pictures and sounds, many at once, and how right it is."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.config import Config
from llm_jax.data.media import MARK, decode, encode
from llm_jax.data.prepare import Prepared
from llm_jax.data.tokenizer import Tokenizer
from llm_jax.generation import pairs
from llm_jax.generation.sampling import generate
from llm_jax.models.media import Items
from llm_jax.settings import BadInput

ROWS = 64
"""Prompts of one compiled call."""


class Question(NamedTuple):
    """A text up to its last item of media, its items, and what stands behind."""

    prompt: str
    items_Ix: np.ndarray
    wanted: str


def caption(
    cfg: Config,
    tokenizer: Tokenizer,
    params: Any,
    prompts: Sequence[str],
    items_RxIx: Sequence[np.ndarray] | np.ndarray,
) -> list[str]:
    """What a model writes behind each prompt, greedily, until it ends the text or data.context is full.

    `items_RxIx` are the media of each, as `data.media.load_items` gives them. Raises BadInput for a prompt that leaves no room.
    """
    ids = [[tokenizer.bos, *encode(tokenizer, prompt, cfg.model.media.tokens).tolist()] for prompt in prompts]
    longest = max(map(len, ids), default=0)
    if longest >= cfg.data.context:
        raise BadInput(f"a prompt of {longest} tokens leaves no room in data.context={cfg.data.context}")
    found: list[str] = []
    for start in range(0, len(ids), ROWS):
        chosen = list(range(start, min(start + ROWS, len(ids))))
        chosen += (ROWS - len(chosen)) * chosen[:1]  # one shape, one compilation
        prompt_BxT = np.full((ROWS, longest), tokenizer.pad, np.int32)
        for row, i in zip(prompt_BxT, chosen, strict=True):
            row[longest - len(ids[i]) :] = ids[i]
        new_BxC = generate(
            cfg.model,
            params,
            jnp.asarray(prompt_BxT),
            jax.random.key(0),
            num_tokens=cfg.data.context - longest,
            temperature=0,
            segment_BxT=jnp.asarray(prompt_BxT == tokenizer.pad, jnp.int32),
            media=Items(
                jnp.asarray(np.stack([items_RxIx[i] for i in chosen])), jnp.asarray(prompt_BxT == tokenizer.media)
            ),
        )
        found += [tokenizer.decode(pairs.until(new, tokenizer.bos)) for new in np.asarray(new_BxC).tolist()]
    return found[: len(ids)]


def held_out(cfg: Config, prepared: Prepared) -> list[Question]:
    """A question of each held-out row that has media, in the order of the rows."""
    tokenizer, found = prepared.tokenizer(), []
    for row in (row for part in prepared.rows("validation") for row in part):
        ids = row["tokens"][(row["tokens"] != tokenizer.bos) & (row["tokens"] != tokenizer.pad)]
        text, mark, wanted = decode(tokenizer, ids, cfg.model.media.tokens).rpartition(MARK)
        if mark:
            found.append(Question(text + mark, row["media"], wanted))
    return found


def answer(cfg: Config, prepared: Prepared, params: Any, count: int) -> tuple[list[Question], list[str]]:
    """At most `count` questions of the held-out set, spread evenly over it, and what the model answers."""
    asked = held_out(cfg, prepared)
    asked = [asked[i] for i in np.linspace(0, len(asked) - 1, min(count, len(asked))).astype(int)]
    prompts, items, _ = zip(*asked, strict=True)
    return asked, caption(cfg, prepared.tokenizer(), params, prompts, items)


def score(found: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
    """ "exact_match", the accuracy where texts are names of classes, and "character_error_rate" as `pairs.score` has them; "token_f1":
    the mean over texts of the harmonic mean of precision and recall of words (Rajpurkar et al. 2016, section 6.1)}."""
    f1 = [_f1(a.split(), b.split()) for a, b in zip(found, wanted, strict=True)]
    return pairs.score(found, wanted) | {"token_f1": float(np.mean(f1))}


def _f1(found: list[str], wanted: list[str]) -> float:
    if not found or not wanted:
        return float(found == wanted)
    common = sum((collections.Counter(found) & collections.Counter(wanted)).values())
    return 2 * common / (len(found) + len(wanted))
