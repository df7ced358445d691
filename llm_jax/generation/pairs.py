"""Sequence-to-sequence models at work: texts in, texts out, by greedy or beam search, and how far they are from the right ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.config import Config
from llm_jax.data.prepare import Prepared
from llm_jax.data.tokenizer import Tokenizer
from llm_jax.generation.beam import beam_search
from llm_jax.generation.sampling import generate
from llm_jax.settings import BadInput
from llm_jax.training import loop

ROWS = 64
"""Texts of one compiled call."""


def transduce(
    cfg: Config, tokenizer: Tokenizer, params: Any, sources: Sequence[str], *, width: int = 1, alpha: float = 0.6
) -> list[str]:
    """What a model that was trained on data.source=pairs makes of each source; width 1 is greedy, wider a beam search.

    Raises BadInput for a source that data.prefix has no room for.
    """
    prefix, room = cfg.data.prefix, cfg.data.context - cfg.data.prefix
    prompt_RxT = np.full((-(-len(sources) // ROWS) * ROWS, prefix + 1), tokenizer.pad, np.int32)
    prompt_RxT[:, -2:] = tokenizer.bos  # rows that fill up the last call are empty sources
    for row, text, ids in zip(prompt_RxT, sources, tokenizer.encode(sources), strict=False):
        if len(ids) >= prefix:
            raise BadInput(f'"{text}" has {len(ids)} tokens; data.prefix={prefix} leaves room for {prefix - 1}')
        row[prefix - len(ids) - 1 :] = [tokenizer.bos, *ids, tokenizer.bos]
    found: list[str] = []
    for start in range(0, len(prompt_RxT), ROWS):
        prompt_BxT = jnp.asarray(prompt_RxT[start : start + ROWS])
        rows: dict[str, Any] = {"segment_BxT": (prompt_BxT == tokenizer.pad).astype(jnp.int32), "prefix": prefix}
        if width == 1:
            key = jax.random.key(0)
            new_BxC = generate(cfg.model, params, prompt_BxT, key, num_tokens=room, temperature=0, **rows)
        else:
            new_BxWxC, _ = beam_search(
                cfg.model, params, prompt_BxT, num_tokens=room, width=width, alpha=alpha, end=tokenizer.bos, **rows
            )
            new_BxC = new_BxWxC[:, 0]
        found += [tokenizer.decode(until(ids, tokenizer.bos)) for ids in np.asarray(new_BxC).tolist()]
    return found[: len(sources)]


def transduce_text(cfg: Config, prepared: Prepared, folder: Path, source: str, *, width: int = 1) -> str:
    """What the model trained in `folder` makes of one source; see `transduce`."""
    if width < 1:
        raise BadInput(f"--beam must be at least 1, got {width}")
    return transduce(cfg, prepared.tokenizer(), loop.load_params(cfg, folder), [source], width=width)[0]


def until(ids: list[int], end: int) -> list[int]:
    """The ids before the first `end`."""
    return ids[: ids.index(end)] if end in ids else ids


def held_out(cfg: Config, prepared: Prepared) -> list[tuple[str, str]]:
    """(source, target) of each held-out pair, in the order of the rows."""
    tokenizer, prefix = prepared.tokenizer(), cfg.data.prefix
    rows = (row["tokens"] for part in prepared.rows("validation") for row in part)
    return [
        (tokenizer.decode(_text(row[:prefix], tokenizer)), tokenizer.decode(_text(row[prefix:], tokenizer)))
        for row in rows
    ]


def _text(ids: np.ndarray, tokenizer: Tokenizer) -> list[int]:
    return ids[(ids != tokenizer.pad) & (ids != tokenizer.bos)].tolist()


def edit_distance(a: str, b: str) -> int:
    """Characters to insert, delete or replace (Levenshtein 1966)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def score(found: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
    """{"exact_match": share of texts that are right, "character_error_rate": edits a character that is wanted}."""
    edits = sum(edit_distance(a, b) for a, b in zip(found, wanted, strict=True))
    return {
        "exact_match": float(np.mean([a == b for a, b in zip(found, wanted, strict=True)])),
        "character_error_rate": edits / max(1, sum(map(len, wanted))),
    }
