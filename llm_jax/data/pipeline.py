"""Batches of token rows, read through Grain: which rows make up step n depends on the seed and n alone."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import grain.python as grain
import numpy as np

from llm_jax.data.prepare import Prepared


class Windows:
    """Rows of `context` + 1 tokens cut from the longer stored rows: random access, for Grain. {"tokens"}, and "media" of rows that have
    them."""

    def __init__(self, sources: Sequence[Any], row_tokens: int, context: int):
        self._sources, self._context = sources, context
        self._per_row = row_tokens // context
        self._ends = list(np.cumsum([len(source) for source in sources]))

    def __len__(self) -> int:
        return int(self._ends[-1]) * self._per_row

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        tokens, stored = self.window(int(index))
        return {"tokens": tokens, "media": stored["media"]} if "media" in stored else {"tokens": tokens}

    def window(self, index: int) -> tuple[np.ndarray, dict[str, Any]]:
        """The tokens, int32 [context + 1], and the stored row that they were cut from."""
        row, offset = divmod(index, self._per_row)
        part = bisect.bisect_right(self._ends, row)
        stored = self._sources[part][row - (self._ends[part - 1] if part else 0)]
        start = offset * self._context
        return stored["tokens"][start : start + self._context + 1].astype(np.int32), stored


def num_windows(prepared: Prepared, context: int) -> int:
    """Training rows of an epoch."""
    return prepared.tokens["train"] // context


def train_iterator(
    prepared: Prepared, context: int, rows_per_step: int, seed: int, rows: Sequence[int] | None = None, step: int = 0
) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches {"tokens": tokens_BxT, "media": items_BxIx of rows that have them} from `step` on, shuffled anew each epoch.

    Of each step's rows, those numbered in `rows`, a host's share, and no others are read. Row r of step n is one row of the data, whoever
    reads it and wherever it was begun: there is no state to save, and the hosts of a restart may be fewer or more.
    """
    windows = Windows(prepared.rows("train"), prepared.row_tokens, context)
    endless = grain.MapDataset.source(windows).seed(seed).shuffle().repeat()
    rows = range(rows_per_step) if rows is None else rows

    def one(i: int) -> dict[str, np.ndarray]:
        return endless[i // len(rows) * rows_per_step + rows[i % len(rows)]]

    dataset = grain.MapDataset.range(step * len(rows), len(endless) // rows_per_step * len(rows)).map(one)
    dataset = dataset.batch(len(rows))
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=16)))


def segments(tokens_BxT: np.ndarray, bos: int) -> np.ndarray:
    """Numbers the documents of the inputs of each row, int32 from 0."""
    return np.cumsum(tokens_BxT[..., :-1] == bos, axis=-1, dtype=np.int32)


class EvalSet(NamedTuple):
    """The fixed held-out rows, with the document that each begins in, and their media where they have any."""

    tokens_BxT: np.ndarray
    document_B: np.ndarray
    items_BxIx: np.ndarray | None = None


def eval_set(prepared: Prepared, context: int, max_tokens: int) -> EvalSet:
    """About `max_tokens` of the held-out split, spread evenly over it; all of it where it is smaller."""
    windows = Windows(prepared.rows("validation"), prepared.row_tokens, context)
    count = max(1, min(len(windows), max_tokens // context))
    bos = prepared.tokenizer().bos
    tokens, documents, media = [], [], []
    for index in np.linspace(0, len(windows) - 1, count).astype(int):
        window, stored = windows.window(int(index))
        start = (index * context) % prepared.row_tokens
        tokens.append(window)
        documents.append(int(stored["document"]) + int((stored["tokens"][: start + 1] == bos).sum()))  # see rows.pair
        media += [stored["media"]] if "media" in stored else []
    return EvalSet(np.stack(tokens), np.asarray(documents), np.stack(media) if media else None)
